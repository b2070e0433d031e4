"""The sampler draws from the whole softmax and nothing else, and what it draws is scored as it was drawn."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from alignkit.desk.tiny import phrase_ids
from alignkit.desk.world import SENTENCES, World
from alignkit.errors import NonFinite
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import token_logprobs
from alignkit.forward import cpu, sampling
from alignkit.forward.reading import response_logits
from alignkit.forward.rollout import (
    Rollout,
    decode_responses,
    encode_prompts,
    full_ids,
    left_pad,
    right_pad,
    rollout_from_ids,
)
from alignkit.forward.sampling import _inverse_cdf, generate_texts, sample
from alignkit.models.loading import load_policy

STORIES = Path(__file__).resolve().parents[1].parent / "shared/models/stories260K"
DESK = [prompt.text * (1 + number % 2) for number, prompt in enumerate(World(0).train_prompts[::57])][:32]  # ragged
TALES = ["Once upon a time", "Tim had a red ball. He liked to", "The dog",
         "One day, a little girl named Lily went to the park and"] * 8


@pytest.fixture(scope="module")
def desk():
    """A tiny policy whose weights are large enough that prompts and earlier tokens matter, tokenizer and prompts."""
    policy, tokenizer = load_policy("tiny", seed=1, device="cpu")
    generator = seeded(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return policy, tokenizer, DESK


@pytest.fixture(scope="module", params=["desk", pytest.param("stories260K", marks=pytest.mark.shared)])
def any_model(request):
    """The tiny policy, and a real pretrained Llama where its folder is there."""
    if request.param == "desk":
        return request.getfixturevalue("desk")
    return *load_policy(STORIES, device="cpu"), TALES


def draw(policy, tokenizer, prompts, max_new_tokens=4, seed=0, **options):
    ids, mask = encode_prompts(tokenizer, prompts)
    return sample(policy, ids, mask, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
                  pad_token_id=tokenizer.pad_token_id, generator=seeded(seed), **options)


def constant_policy(logits, **config):
    """A policy that gives these next-token logits (V,) whatever came before."""
    policy = PhiForCausalLM(PhiConfig(vocab_size=len(logits), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=1, max_position_embeddings=16, **config)).eval()
    with torch.no_grad():
        policy.lm_head.weight.zero_()
        policy.lm_head.bias.copy_(torch.as_tensor(logits))
    return policy


def sample_constant(logits, n, tokens=1, eos=1, **options):
    """n responses of `constant_policy`."""
    return sample(constant_policy(logits), torch.full((n, 1), 2), torch.ones(n, 1, dtype=torch.bool), pad_token_id=0,
                  max_new_tokens=tokens, eos_token_id=eos, generator=seeded(7), **options)


def p_value(drawn, probabilities):
    """χ² test of drawn tokens (N,) against probabilities (V,); tokens of probability 0 must not occur."""
    counts = torch.bincount(drawn.flatten(), minlength=len(probabilities)).double()
    expected = probabilities.double() * drawn.numel()
    assert (counts[expected < 1e-9] == 0).all()
    kept = expected > 1e-9
    statistic = ((counts - expected)[kept].square() / expected[kept]).sum().detach()
    return float(torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2))


# What is drawn.


def test_tokens_are_drawn_from_the_softmax():
    logits = 1.5 * torch.randn(12, generator=seeded(3))
    assert p_value(sample_constant(logits, 20_000).response_ids, logits.softmax(0)) > 0.001


def test_there_is_no_hidden_top_k():
    """200 equally likely tokens: each of them occurs about a hundred times."""
    drawn = sample_constant(torch.zeros(200), 20_000).response_ids
    assert p_value(drawn, torch.full((200,), 1 / 200)) > 0.001
    assert torch.bincount(drawn.flatten(), minlength=200).min() > 50


def test_there_is_no_hidden_top_p():
    """The 1 % of probability that lies on 50 rare tokens is drawn 1 % of the time."""
    probabilities = torch.tensor([0.99] + [0.01 / 50] * 50)
    rare = (sample_constant(probabilities.log(), 40_000, eos=60).response_ids > 0).float().mean()
    assert float(rare) == pytest.approx(0.01, abs=0.002)  # four standard errors


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_temperature_divides_the_logits_of_sampling_and_of_the_log_probs(temperature):
    logits = 1.5 * torch.randn(12, generator=seeded(4))
    rollout = sample_constant(logits, 20_000, temperature=temperature)
    expected = (logits / temperature).log_softmax(0)
    assert p_value(rollout.response_ids, expected.exp()) > 0.001
    assert torch.allclose(rollout.logprobs, expected[rollout.response_ids], atol=1e-5)


@pytest.mark.parametrize("never", [-1e4, -torch.inf])
def test_a_token_of_probability_0_is_never_drawn_not_even_at_the_edges_of_the_uniform(never):
    logits = torch.tensor([never, 0.3, never, never, -0.5, never])
    drawn = sample_constant(logits, 5000, eos=9).response_ids
    assert sorted(set(drawn.flatten().tolist())) == [1, 4]
    edges = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    token, logprob = _inverse_cdf(logits.expand(2, -1), edges)
    assert token.tolist() == [1, 4] and torch.allclose(logprob, logits.log_softmax(0)[token])


def test_the_second_token_follows_the_distribution_after_the_first(desk):
    policy, tokenizer, _ = desk
    rollout = draw(policy, tokenizer, [DESK[0]] * 6000, max_new_tokens=2)
    logits = response_logits(policy, rollout[:1])
    assert p_value(rollout.response_ids[:, 0], logits[0, 0].softmax(-1)) > 0.001
    first = rollout.response_ids[:, 0].mode().values
    assert first != tokenizer.eos_token_id
    after = rollout[rollout.response_ids[:, 0] == first]
    assert len(after) > 500
    assert p_value(after.response_ids[:, 1], response_logits(policy, after[:1])[0, 1].softmax(-1)) > 0.001


def test_a_very_low_temperature_is_hugging_face_s_greedy_decoding(any_model):
    policy, tokenizer, prompts = any_model
    ids, mask = encode_prompts(tokenizer, prompts[:8])
    own = draw(policy, tokenizer, prompts[:8], max_new_tokens=12, temperature=1e-5)
    theirs = policy.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, output_logits=True,
                             return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id,
                             eos_token_id=tokenizer.eos_token_id)
    length = own.response_ids.shape[1]
    assert torch.equal(theirs.sequences[:, ids.shape[1] :][:, :length], own.response_ids)
    logits = response_logits(policy, own)
    for t in range(length):
        here = own.response_mask[:, t]
        assert torch.allclose(logits[here, t], theirs.logits[t][here], atol=1e-4)


def test_rows_that_have_ended_are_read_no_longer_and_the_others_do_not_notice(any_model, monkeypatch):
    policy, tokenizer, prompts = any_model
    read = []
    forward = policy.forward
    monkeypatch.setattr(
        policy,
        "forward",
        functools.wraps(forward)(lambda **inputs: (read.append(len(inputs["input_ids"])), forward(**inputs))[1]),
    )
    eos = int(
        draw(policy, tokenizer, prompts, max_new_tokens=3).response_ids.flatten().mode().values
    )  # what comes often
    ids, mask = encode_prompts(tokenizer, prompts)

    def drawn():
        read.clear()
        made = sample(policy, ids, mask, max_new_tokens=40, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
                      generator=seeded(3))
        return made, list(read)

    made, counts = drawn()
    monkeypatch.setattr(sampling, "_selectable", lambda cache: False)
    plain, all_rows = drawn()
    assert set(all_rows[-39:]) == {len(prompts)} and counts[-1] <= len(prompts) / 2
    for name, value in vars(plain).items():
        assert torch.allclose(getattr(made, name).double(), value.double(), rtol=0, atol=1e-5), name


@pytest.mark.parametrize("reader", ["fast", "generic", "generic, a cache without rows"])
def test_a_prompt_that_is_sampled_several_times_is_read_once_and_nothing_else_changes(desk, reader, monkeypatch):
    policy, tokenizer, prompts = desk
    if reader != "fast":
        monkeypatch.setattr(cpu, "reader", lambda model: None)
    if reader == "generic, a cache without rows":
        monkeypatch.setattr(sampling, "_selectable", lambda cache: False)
    read, decoders = [], {name: getattr(place, name) for place, name in ((cpu, "Decoder"), (sampling, "_Decoder"))}
    monkeypatch.setattr(cpu, "Decoder", lambda made, ids, *rest: (read.append(len(ids)), decoders["Decoder"](
        made, ids, *rest))[1])
    monkeypatch.setattr(sampling, "_Decoder", lambda made, ids, *rest: (read.append(len(ids)), decoders["_Decoder"](
        made, ids, *rest))[1])
    several = [prompt for prompt in prompts[:6] for _ in range(5)]
    made = draw(policy, tokenizer, several)
    assert read == ([6, 30] if reader == "generic, a cache without rows" else [6])
    monkeypatch.setattr(torch, "unique", lambda rows, **_: (rows, torch.arange(len(rows))))
    each = draw(policy, tokenizer, several)
    assert read[-1] == 30
    for name, value in vars(each).items():
        assert torch.allclose(getattr(made, name).double(), value.double(), rtol=0, atol=1e-5), name
    assert len({tuple(row) for row in made.response_ids.tolist()}) > 6


def test_the_same_generator_draws_the_same_and_another_another(desk):
    policy, tokenizer, prompts = desk
    one, same, other = (draw(policy, tokenizer, prompts, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(getattr(one, name), getattr(same, name)) for name in vars(one))
    assert one.response_ids.shape != other.response_ids.shape or not torch.equal(one.response_ids, other.response_ids)


def test_the_global_generator_is_neither_read_nor_moved(desk):
    policy, tokenizer, prompts = desk
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = draw(policy, tokenizer, prompts)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(policy, tokenizer, prompts).response_ids, one.response_ids)


def test_seeded_streams_differ_and_depend_on_every_number_and_their_order():
    draws = {numbers: torch.rand(4, generator=seeded(*numbers)) for numbers in
             ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 2), (2, 1, 0), (7, 3, 1))}
    assert len({tuple(values.tolist()) for values in draws.values()}) == len(draws)
    assert torch.equal(torch.rand(4, generator=seeded(0, 1)), draws[0, 1])


# How it is scored.


def test_the_sampler_s_log_probs_are_those_of_a_full_forward_pass(any_model):
    policy, tokenizer, prompts = any_model
    for temperature in (1.0, 0.7):
        rollout = draw(policy, tokenizer, prompts, max_new_tokens=12, temperature=temperature)
        assert not rollout.prompt_mask.all(), "the prompts should need padding"
        with torch.no_grad():
            logits = response_logits(policy, rollout, temperature)
        scored = torch.where(rollout.response_mask, token_logprobs(logits, rollout.response_ids), 0.0)
        assert torch.allclose(rollout.logprobs, scored, atol=1e-5)


@torch.no_grad()
def test_neither_padding_nor_the_rest_of_the_batch_changes_a_logit(any_model):
    """In float64, where what is left is not rounding."""
    policy, tokenizer, prompts = any_model
    rollout = draw(policy, tokenizer, prompts, max_new_tokens=6)
    policy = copy.deepcopy(policy).double()
    together = response_logits(policy, rollout)
    for row in range(0, 32, 5):
        prompt, response = (ids[row][mask[row]].tolist() for ids, mask in
                            ((rollout.prompt_ids, rollout.prompt_mask), (rollout.response_ids, rollout.response_mask)))
        alone = response_logits(policy, rollout_from_ids([prompt], [response], eos_token_id=2, pad_token_id=0))
        wide = rollout_from_ids([prompt, [3] * 40], [response, [3] * 20], eos_token_id=2, pad_token_id=0)
        for other in (alone, response_logits(policy, wide)):
            assert torch.allclose(other[0, : len(response)], together[row, : len(response)], rtol=0, atol=1e-9)
        plain = policy(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(plain, alone[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_response_logits_at_a_temperature_are_divided_by_it(desk):
    policy, tokenizer, prompts = desk
    rollout = draw(policy, tokenizer, prompts[:3])
    assert torch.allclose(response_logits(policy, rollout, 0.5), 2 * response_logits(policy, rollout), atol=1e-4)


# Where a response ends.


def test_a_response_ends_with_eos_and_only_padding_follows():
    rollout = sample_constant([0.0, 0.0, 0.0, 0.0], 400, tokens=6)
    pad, eos = 0, 1
    for ids, mask, logprobs, finished in zip(rollout.response_ids, rollout.response_mask, rollout.logprobs,
                                             rollout.finished, strict=True):
        ends = (ids == eos).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else 6
        assert bool(finished) == bool(ends)
        assert mask.tolist() == [True] * length + [False] * (6 - length)  # EOS counts
        assert (ids[length:] == pad).all() and (logprobs[length:] == 0).all() and (logprobs[:length] < -1).all()
    assert 0.7 < float(rollout.finished.float().mean()) < 0.95  # 1 − 0.75⁶ = 0.82


def test_sampling_stops_when_every_response_has_ended():
    rollout = sample_constant([-1e4, 0.0, -1e4], 5, tokens=8)
    assert rollout.response_ids.tolist() == [[1]] * 5 and rollout.finished.all()


def test_a_prompt_s_own_eos_or_padding_token_does_not_end_anything(desk):
    policy = desk[0]
    ids = torch.tensor([[1, 2, 0, 2]])  # bos, eos, pad and eos as real tokens of a prompt
    rollout = sample(policy, ids, torch.ones_like(ids, dtype=torch.bool), max_new_tokens=3, eos_token_id=2,
                     pad_token_id=0, generator=seeded(1))
    assert rollout.response_mask[0, 0] and torch.equal(rollout.prompt_ids, ids)


# Refusals.


def test_weights_that_are_nan_are_refused(desk):
    _, tokenizer, prompts = desk
    broken = load_policy("tiny", device="cpu")[0]
    with torch.no_grad():
        broken.model.embed_tokens.weight[5:] = torch.nan
    with pytest.raises(NonFinite, match="the policy's logits are NaN or infinite; its weights have diverged"):
        draw(broken, tokenizer, prompts[:2])


def test_what_does_not_fit_the_context_is_refused(desk):
    policy, tokenizer, prompts = desk
    ids = encode_prompts(tokenizer, prompts[:1])[0]
    fits = 64 - ids.shape[1]
    assert draw(policy, tokenizer, prompts[:1], max_new_tokens=fits).response_ids.shape[1] <= fits
    with pytest.raises(ValueError,
                       match=rf"prompts of {ids.shape[1]} tokens and max_new_tokens={fits + 1} do not fit .* of 64"):
        draw(policy, tokenizer, prompts[:1], max_new_tokens=fits + 1)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(desk, temperature):
    policy, tokenizer, prompts = desk
    with pytest.raises(ValueError, match=f"temperature is {temperature}, expected a positive number"):
        draw(policy, tokenizer, prompts[:1], temperature=temperature)


def test_a_prompt_without_tokens_is_refused_by_its_number():
    tokenizer = load_policy("tiny", device="cpu")[1]
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="prompt 1 is empty: it has no tokens"):
        encode_prompts(tokenizer, ["How do I", ""])


# Texts and ids.


@pytest.mark.parametrize("model", ["tiny", pytest.param(STORIES, marks=pytest.mark.shared)])
def test_special_tokens_written_in_a_prompt_stay_text(model):
    tokenizer = load_policy(model, device="cpu")[1]
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    for text in (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token):
        ids, mask = encode_prompts(tokenizer, [f"How {text} do I", "How do I fix my phone today and now"])
        row = ids[0][mask[0]].tolist()
        assert row[0] == tokenizer.bos_token_id and not special & set(row[1:])


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    assert [part.tolist() for part in left_pad([[5], [6, 7, 8]], 0)] == [
        [[0, 0, 5], [6, 7, 8]], [[False, False, True], [True, True, True]]]
    assert [part.tolist() for part in right_pad([[5], [6, 7, 8]], 0)] == [
        [[5, 0, 0], [6, 7, 8]], [[True, False, False], [True, True, True]]]
    made = rollout_from_ids([[5], [6, 7]], [[8, 2], [9]], eos_token_id=2, pad_token_id=0)
    assert made.finished.tolist() == [True, False] and (made.logprobs == 0).all()
    ids, mask = full_ids(made)
    assert ids.tolist() == [[0, 5, 8], [6, 7, 9]]  # the last token predicts nothing
    assert mask.tolist() == [[False, True, True], [True, True, True]]


def test_a_part_of_a_rollout_is_a_rollout(desk):
    policy, tokenizer, prompts = desk
    rollout = draw(policy, tokenizer, prompts)
    some = rollout[torch.tensor([3, 1])]
    assert isinstance(some, Rollout) and len(some) == 2 and len(rollout) == 32
    for name, value in vars(rollout).items():
        assert torch.equal(getattr(some, name), value[[3, 1]])


def test_responses_are_decoded_without_eos_and_padding(desk):
    _, tokenizer, _ = desk
    polite, caution = (phrase_ids(tokenizer)[i] for i in (0, 3))
    made = rollout_from_ids([[1]] * 3, [[polite, caution, 2], [2], [caution]], eos_token_id=2, pad_token_id=0)
    assert decode_responses(tokenizer, made) == [SENTENCES["POLITE"] + SENTENCES["CAUTION"], "", SENTENCES["CAUTION"]]


def test_generated_texts_come_prompt_by_prompt_and_repeat_with_their_seed(desk):
    policy, tokenizer, prompts = desk
    where = {"max_new_tokens": 4, "samples": 3, "batch_size": 8}  # a prompt's samples are spread over two batches
    texts = generate_texts(policy, tokenizer, prompts[:5], seed=1, **where)
    assert len(texts) == 5 and all(len(row) == 3 for row in texts)
    assert texts == generate_texts(policy, tokenizer, prompts[:5], seed=1, **where)
    assert texts != generate_texts(policy, tokenizer, prompts[:5], seed=2, **where)
    assert len({text for row in texts for text in row}) > 5  # batches and samples have their own random numbers
    alone = constant_policy([0.0 if i == phrase_ids(tokenizer)[4] else -1e4 for i in range(len(tokenizer))])
    assert generate_texts(alone, tokenizer, ["How"], max_new_tokens=2, seed=0) == [[SENTENCES["REFUSE"] * 2]]


def test_samples_of_a_prompt_go_to_that_prompt():
    """A policy whose only response to a prompt is the sentence that the prompt's last word stands for."""
    policy, tokenizer = load_policy("tiny", device="cpu")
    ids = phrase_ids(tokenizer)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
        policy.model.embed_tokens.weight.zero_()
        for number, word in enumerate((" from home", " from work", " in a game")):
            policy.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word), number] = 100.0
            policy.lm_head.weight[ids[number], number] = 100.0
        for layer in policy.model.layers:  # nothing but the residual stream
            layer.self_attn.dense.weight.zero_(), layer.mlp.fc2.weight.zero_()
    prompts = [f"How do I fix my phone {where}" for where in ("from home", "from work", "in a game")]
    texts = generate_texts(policy, tokenizer, prompts, max_new_tokens=1, seed=0, samples=2)
    assert texts == [[sentence] * 2 for sentence in list(SENTENCES.values())[:3]]
