"""Models read by `alignkit.forward.cpu` give what they themselves give; what cannot be read so is left to the model."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from alignkit.configs import PPOConfig
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import token_logprobs
from alignkit.forward import cpu, sampling
from alignkit.forward.known import spread
from alignkit.forward.reading import response_logits, token_values
from alignkit.forward.rollout import full_ids, left_pad, position_ids, rollout_from_ids
from alignkit.forward.sampling import sample
from alignkit.models import adapters, heads
from alignkit.models.adapters import add_lora
from alignkit.models.heads import reward_model_from
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo_step
from tests.test_ppo_step import batch_of

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama, two heads a key": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "llama, with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "phi, relu, two heads a key": lambda: PhiForCausalLM(PhiConfig(**SIZES, hidden_act="relu", num_key_value_heads=2)),
}
PROMPTS = [[5, 9, 33, 7], [8], [9, 9, 40, 41, 17, 60, 3], [12, 30], [7, 7, 7, 7, 7, 7]]
RESPONSES = [[4, 5, 2], [6, 2], [30, 31, 32, 33, 34], [2], [9, 10, 11, 12, 2]]


def made(name, seed=0):
    """A model whose every weight matters: norms and biases are not 1 and 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return made(request.param)


@pytest.fixture
def ragged():
    return rollout_from_ids(PROMPTS, RESPONSES, eos_token_id=2, pad_token_id=0)


def generic(monkeypatch):
    """From here on nothing is read fast."""
    monkeypatch.setattr(cpu, "reader", lambda model: None)


def watched(monkeypatch):
    """Which models are read fast from here on."""
    seen, read = [], cpu.Reader._read
    monkeypatch.setattr(cpu.Reader, "_read", lambda self, *rest: (seen.append(self.model), read(self, *rest))[1])
    return seen


# The same numbers.


def test_logits_and_gradients_of_ragged_prompts_are_the_model_s_own(model, ragged, monkeypatch):
    seen = watched(monkeypatch)
    weights, mask = list(model.parameters()), ragged.response_mask
    direction = torch.randn(*mask.shape, model.config.vocab_size, generator=seeded(1))
    found = []
    for _ in range(2):
        logits = response_logits(model, ragged)
        gradients = torch.autograd.grad((logits * direction)[mask].sum(), weights)
        found.append((logits[mask], gradients))
        generic(monkeypatch)
    (fast_logits, fast_gradients), (logits, gradients) = found
    assert set(seen) == {model} and logits.abs().max() > 1
    assert torch.allclose(fast_logits, logits, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(fast_gradients, gradients, strict=True):
        assert theirs.abs().max() > 0
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_score_at_every_position_and_its_gradients_are_the_model_s_own(model, ragged, monkeypatch):
    critic = reward_model_from(model)
    ids, mask = full_ids(ragged)
    kept, direction = mask[:, -5:], torch.randn(len(ids), 5, generator=seeded(2))
    weights, found = list(critic.parameters()), []
    for _ in range(2):
        values = token_values(critic, ids, mask, 5)
        found.append((values[kept], torch.autograd.grad((values * direction)[kept].sum(), weights)))
        generic(monkeypatch)
    (values, gradients), (expected, expected_gradients) = found
    assert torch.allclose(values, expected, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_without_padding_and_with_everything_wanted_it_is_the_same(model):
    ids = torch.randint(3, 61, (4, 9), generator=seeded(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    reader = cpu.reader(model)
    logits = reader.logits(reader(ids, mask, mask)).view(4, 9, -1)
    assert torch.allclose(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-4)


def test_nothing_wanted_is_nothing(model):
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert cpu.reader(model)(ids, mask, ~mask).shape == (0, 32)


@pytest.mark.parametrize("temperature", [1e-5, 1.0])
def test_greedy_and_sampled_tokens_are_those_of_the_model_s_own_decoding(model, temperature, monkeypatch):
    ids, mask = left_pad([prompt * (1 + row % 2) for row, prompt in enumerate(PROMPTS * 8)], 0)
    seen, drawn = watched(monkeypatch), []
    for _ in range(2):
        drawn.append(
            sample(
                model,
                ids,
                mask,
                max_new_tokens=12,
                eos_token_id=2,
                pad_token_id=0,
                generator=seeded(4),
                temperature=temperature,
            )
        )
        generic(monkeypatch)
    assert set(seen) == {model}
    for name in ("response_ids", "response_mask", "finished"):
        assert torch.equal(*(getattr(rollout, name) for rollout in drawn)), name
    assert torch.allclose(drawn[0].logprobs, drawn[1].logprobs, atol=1e-4)


def test_the_decoder_reads_on_with_the_rows_that_are_left(model):
    ids, mask = left_pad(PROMPTS, 0)
    every, some = (cpu.Decoder(cpu.reader(model), ids, mask, 4) for _ in range(2))
    tokens = torch.randint(3, 61, (4, len(ids)), generator=seeded(6))
    real, rows = torch.tensor([True, True, False, True, True]), torch.tensor([0, 3, 4])
    for t in range(2):
        assert torch.equal(every.step(tokens[t], real), some.step(tokens[t], real))
    some.select(rows)
    for t in (2, 3):
        expected = every.step(tokens[t], real)
        assert torch.allclose(some.step(tokens[t][rows], real[rows]), expected[rows], atol=1e-5)


def test_rows_that_have_ended_are_read_no_longer(monkeypatch):
    policy, tokenizer = load_policy("tiny", device="cpu")
    assert cpu.reader(policy) is not None
    ids, mask = left_pad([[1, 15, 20], [1, 16]] * 40, 0)
    read, drawn, step = [], [], cpu.Decoder.step
    monkeypatch.setattr(
        cpu.Decoder, "step", lambda self, tokens, real: (read.append(len(tokens)), step(self, tokens, real))[1]
    )
    for selectable in (True, False):
        monkeypatch.setattr(cpu.Decoder, "selectable", selectable)
        drawn.append(
            sample(
                policy,
                ids,
                mask,
                max_new_tokens=30,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
                generator=seeded(6),
            )
        )
    steps = drawn[0].response_ids.shape[1] - 1
    assert read[0] == len(ids) and read[steps - 1] <= len(ids) / 2 and set(read[steps:]) == {len(ids)}
    for name, value in vars(drawn[1]).items():
        assert torch.allclose(getattr(drawn[0], name).double(), value.double(), rtol=0, atol=1e-5), name


def test_a_ppo_step_moves_the_weights_as_the_model_s_own_forward_pass_does(monkeypatch):
    ragged = rollout_from_ids([[1, 15, 20], [1, 16]] * 4, [[4, 5, 2], [6, 2]] * 4, eos_token_id=2, pad_token_id=0)
    policy, tokenizer = load_policy("tiny", device="cpu")
    config = PPOConfig(minibatch_size=8)
    state = PPOState.start(policy, tokenizer, lambda prompts, responses: [0.0] * len(prompts), ["How"], config)
    batch, other, seen = batch_of(state, ragged), copy.deepcopy(state), watched(monkeypatch)
    measured = ppo_step(state, batch, config)
    assert set(seen) == {state.policy, state.critic}
    generic(monkeypatch)
    assert ppo_step(other, batch, config) == pytest.approx(measured, abs=1e-4)
    for mine, theirs in ((state.policy, other.policy), (state.critic, other.critic)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, atol=2e-5)


# The model's own weights, as they are now.


def test_a_weight_changed_in_place_is_read(model, ragged):
    mask = ragged.response_mask
    before = response_logits(model, ragged)[mask]
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(5)), alpha=0.3)
        ids, attention = full_ids(ragged)
        logits = model(input_ids=ids, attention_mask=attention, position_ids=position_ids(attention)).logits[:, -5:][
            mask
        ]
        now = response_logits(model, ragged)[mask]
        assert torch.allclose(now, logits, rtol=1e-4, atol=1e-4), name
        assert not torch.allclose(now, before, atol=1e-4), name
        before = now


def test_a_step_of_the_optimiser_is_seen_by_the_decoder(model):
    ids, mask = left_pad(PROMPTS, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    drawn = sample(model, ids, mask, max_new_tokens=5, eos_token_id=2, pad_token_id=0, generator=seeded(7))
    logits = model(
        input_ids=torch.cat([drawn.prompt_ids, drawn.response_ids], 1),
        attention_mask=torch.cat([drawn.prompt_mask, drawn.response_mask], 1),
        position_ids=position_ids(torch.cat([drawn.prompt_mask, drawn.response_mask], 1)),
    ).logits
    expected = token_logprobs(logits[:, mask.shape[1] - 1 : -1], drawn.response_ids)
    assert torch.allclose(drawn.logprobs, torch.where(drawn.response_mask, expected, 0.0), atol=1e-4)


def test_reading_leaves_the_model_the_random_numbers_and_the_gradients_alone(model, ragged):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        assert not response_logits(model, ragged).requires_grad
    assert response_logits(model, ragged).requires_grad
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What is not read so.


def lora(model):
    return add_lora(model)


def inside_lora(model):
    return add_lora(model).get_base_model()


def watched_by_a_hook(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)
    return model


def with_its_own_forward(model):
    model.forward = lambda *args, **options: type(model).forward(model, *args, **options)
    return model


def with_dropout(model):
    model.config.attention_dropout = 0.5
    return model.train()


def in_float64(model):
    return model.double()


def with_a_layer_of_its_own(model):
    class Linear(nn.Linear):
        pass

    layer = model.model.layers[0].self_attn
    layer.q_proj.__class__ = Linear
    return model


def with_quantised_weights(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def with_checkpoints(model):
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize(
    "change",
    [
        lora,
        inside_lora,
        watched_by_a_hook,
        with_its_own_forward,
        with_dropout,
        in_float64,
        with_a_layer_of_its_own,
        with_checkpoints,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi"])
def test_what_is_more_than_the_plain_model_is_left_to_the_model(name, change, ragged):
    model = made(name)
    assert cpu.reader(model) is not None  # and so it is known to agree; it is looked at again all the same
    changed = change(model)
    assert cpu.reader(changed) is None
    ids, mask = full_ids(ragged)
    if changed.training:
        return
    with torch.no_grad():
        expected = changed(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, -5:]
        found = response_logits(changed, ragged)
    assert torch.allclose(found[ragged.response_mask], expected[ragged.response_mask], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}},
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
    ],
    ids=["linear rope", "dynamic rope", "gelu", "biased MLP"],
)
def test_other_kinds_of_llama_are_left_to_the_model(options):
    assert cpu.reader(LlamaForCausalLM(LlamaConfig(**SIZES, **options)).eval()) is None


def test_a_sliding_window_and_norms_of_q_and_k_are_left_to_the_model():
    window = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert "sliding_attention" in window.layer_types
    assert cpu.reader(Qwen2ForCausalLM(window).eval()) is None
    assert cpu.reader(PhiForCausalLM(PhiConfig(**SIZES, qk_layernorm=True)).eval()) is None


def test_another_architecture_is_left_to_the_model(ragged):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    assert cpu.reader(model) is None
    assert response_logits(model, ragged).shape == (5, 5, 61)


def test_a_model_whose_numbers_differ_is_left_to_the_model_and_asked_once(monkeypatch):
    model, asked = made("llama"), []
    agrees, norm = cpu._agrees, cpu._norm
    monkeypatch.setattr(cpu, "_agrees", lambda model: (asked.append(model), agrees(model))[1])
    monkeypatch.setattr(cpu, "_norm", lambda x, module: norm(x, module) + 1e-3)
    assert cpu.reader(model) is None and cpu.reader(model) is None and asked == [model]
    monkeypatch.setattr(cpu, "_norm", norm)
    other = copy.deepcopy(model)
    assert cpu.reader(other) is not None and cpu.reader(other) is not None and asked == [model, other]


def test_a_model_that_is_gone_is_not_kept():
    import gc

    before = len(cpu._agreed)
    model = made("phi")
    cpu.reader(model)
    assert len(cpu._agreed) == before + 1
    del model
    gc.collect()
    assert len(cpu._agreed) <= before


def test_the_desk_world_s_models_and_every_tied_copy_are_read_fast():
    policy, _ = load_policy("tiny", device="cpu")
    for each in (policy, adapters.frozen_copy(policy), reward_model_from(policy), heads.value_model_from(policy)):
        assert cpu.reader(each) is not None


def test_a_decoder_that_is_full_says_so(model):
    ids, mask = left_pad(PROMPTS, 0)
    decoder = cpu.Decoder(cpu.reader(model), ids, mask, 1)
    one, real = torch.full((len(ids),), 5), torch.ones(len(ids), dtype=torch.bool)
    decoder.step(one, real)
    with pytest.raises(IndexError, match="room for 8 tokens has no place for one more"):
        decoder.step(one, real)


def test_what_was_read_goes_back_to_its_place():
    mask = torch.tensor([[True, False], [True, True]])
    packed = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert spread(packed, mask).tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert torch.equal(spread(packed, torch.ones(3, 1, dtype=torch.bool)), packed[:, None])


def test_the_sampler_s_two_decoders_are_interchangeable():
    """Every name that `sample` uses is there in both."""
    for name in ("step", "select", "selectable"):
        assert hasattr(cpu.Decoder, name) and hasattr(sampling._Decoder, name)
