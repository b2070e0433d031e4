"""What is computed in parts, because all at once it would not fit a GPU, is what it is all at once."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from alignkit.configs import DPOConfig, PPOConfig
from alignkit.desk.tiny import phrase_ids
from alignkit.dpo import Pairs, dpo, dpo_step, with_reference
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import token_logprobs
from alignkit.forward import cpu, reading
from alignkit.forward.precision import checkpointed
from alignkit.forward.reading import read_responses, response_logits, response_logprobs
from alignkit.forward.rollout import groups, passes, rollout_from_ids
from alignkit.models.adapters import AdapterOff, add_lora
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo_iteration, ppo_step
from tests.test_fast import generic, made
from tests.test_ppo_step import batch_of

# Log-probs, without all logits.


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def lora():
    policy = add_lora(made("qwen2"))
    with torch.no_grad():  # an adapter that does something
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=seeded(1)).mul_(0.1)
    return policy


READ = {"llama": lambda: made("llama"), "llama, the model's own pass": lambda: made("llama").requires_grad_(True),
        "gpt2": gpt2, "lora": lora, "lora, adapter off": lambda: AdapterOff(lora())}
RAGGED = [[5, 9, 33, 7], [8], [9, 9, 40, 41, 17], [12, 30]], [[4, 5, 2], [6, 2], [30, 31, 32, 33, 34, 9], [2]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", READ)
def test_log_probs_in_parts_are_those_of_all_logits_at_once_and_so_are_gradients(name, temperature, monkeypatch):
    policy, rollout = READ[name](), rollout_from_ids(*RAGGED, eos_token_id=2, pad_token_id=0)
    if "own" in name:
        monkeypatch.setattr(cpu, "reader", lambda model: None)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    mask, parts, found = rollout.response_mask, [], []
    checkpoint = reading.checkpoint

    def counted(*given, **options):
        parts.append(len(given[1]))
        return checkpoint(*given, **options)

    monkeypatch.setattr(reading, "checkpoint", counted)
    for most in (2**28, 3 * 61):
        monkeypatch.setattr(reading, "MOST_LOGITS", most)
        logprobs, entropies, states = read_responses(policy, rollout, temperature, with_entropy=True, with_states=True)
        loss = logprobs.sum() + 0.3 * entropies.square().sum() + 0.1 * states[mask].square().sum()
        gradients = torch.autograd.grad(loss, weights) if weights else ()
        found.append([logprobs, entropies, states * mask[..., None], *gradients])
        assert read_responses(policy, rollout, temperature)[1:] == (None, None)
    assert parts[:4] == [3, 3, 3, 3] and sum(parts[:4]) == mask.sum()
    expected = torch.where(mask, token_logprobs(response_logits(policy, rollout, temperature), rollout.response_ids), 0)
    assert torch.equal(found[0][0], expected)  # as ever, to the last bit, where the logits are few
    assert (found[1][0][~mask] == 0).all() and (found[1][1][~mask] == 0).all()
    for whole, chunked in zip(*found, strict=True):
        assert (whole - chunked).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_kept_for_the_backward_pass_is_smaller_than_the_logits(name, monkeypatch):
    policy, rollout = READ[name](), rollout_from_ids(*RAGGED, eos_token_id=2, pad_token_id=0)
    weights = {weight.data_ptr() for weight in policy.parameters()}

    def held():
        """Elements with a dimension of the vocabulary's size that autograd keeps, weights aside."""
        kept = []

        def keep(tensor):
            if 61 in tensor.shape and tensor.untyped_storage().data_ptr() not in weights:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            response_logprobs(policy, rollout, 0.7)
        return sum(kept)

    assert held() >= rollout.response_mask.sum() * 61
    monkeypatch.setattr(reading, "MOST_LOGITS", 3 * 61)
    read_responses(policy, rollout)  # the check is over
    assert held() == 0


@pytest.mark.parametrize("change", ["logits are scaled", "head with an adapter", "no logits_to_keep"])
def test_logits_that_are_more_than_a_linear_head_are_read_as_ever(change, monkeypatch):
    monkeypatch.setattr(reading, "MOST_LOGITS", 61)
    rollout, policy = rollout_from_ids(*RAGGED, eos_token_id=2, pad_token_id=0), gpt2()
    forward = policy.forward
    if change == "logits are scaled":

        @functools.wraps(forward)
        def scaled(**inputs):
            output = forward(**inputs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

        policy.forward = scaled
    elif change == "no logits_to_keep":
        policy.forward = lambda input_ids, attention_mask, position_ids, use_cache: forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
    else:
        policy = get_peft_model(made("llama"), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    logits = response_logits(policy, rollout)
    expected = torch.where(rollout.response_mask, token_logprobs(logits, rollout.response_ids), 0.0)
    monkeypatch.setattr(reading, "checkpoint", None)
    assert torch.equal(response_logprobs(policy, rollout), expected)


def test_ppo_and_dpo_learn_the_same_from_parts(monkeypatch):
    ends = []
    for most in (2**28, 50):
        monkeypatch.setattr(reading, "MOST_LOGITS", most)
        state, config = ppo_state(entropy_coef=0.1, ptx_coef=0.5)
        ppo_iteration(state, config)
        policy, tokenizer = load_policy("tiny", device="cpu")
        rows = [{"prompt": "How do I", "chosen": "Yes.", "rejected": text} for text in ("No.", "Maybe not")]
        stats = list(dpo(policy, tokenizer, rows, DPOConfig(epochs=1, batch_size=2)))
        ends.append((*gradients(state.policy, state.critic, policy), torch.tensor(stats[0].loss)))
    for whole, parted in zip(*ends, strict=True):
        assert (whole - parted).norm() <= 1e-4 * whole.norm()


# Minibatches, in several passes.


def ppo_state(**options):
    """A run on a ragged batch of prompts, and its config."""
    policy, tokenizer = load_policy("tiny", device="cpu")
    config = PPOConfig(prompts_per_iteration=24, minibatch_size=24, epochs=1, max_grad_norm=1e9, learning_rate=1e-4,
                       whiten_advantages=False, max_new_tokens=6, **options)
    prompts = ["How do I fix my phone", "How", "How do I use the app from home today"]
    shown = [{"prompt": "How do I", "completion": text} for text in ("Yes.", "Maybe not, but who knows")]
    with torch.no_grad():
        for weight in policy.model.parameters():  # a policy to which prompts matter
            if weight.ndim > 1:
                weight.normal_(0, 0.2, generator=seeded(weight.numel()))
    return PPOState.start(policy, tokenizer, lambda prompts, texts: [len(text) / 50 for text in texts], prompts, config,
                          demonstrations=shown), config


def gradients(*models):
    return [weight.grad.clone() for model in models for weight in model.parameters() if weight.grad is not None]


def counted(policy):
    """Shapes that the policy's first layer reads from here on."""
    read, layer = [], policy.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: (read.append(tuple(x.shape[:2])), forward(x))[1]
    return read


@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("most", [1, 40, 100, 10_000])
def test_a_ppo_step_in_passes_is_the_step_in_one(most, shared_trunk):
    """Gradients, what was measured, and the weights after it, with an entropy bonus and demonstrations."""
    state, config = ppo_state(entropy_coef=0.1, ptx_coef=0.5, shared_trunk=shared_trunk)
    ppo_iteration(state, config)
    rollout = state.last_rollout
    assert len(set(rollout.prompt_mask.sum(1).tolist())) > 1 and len(set(rollout.response_mask.sum(1).tolist())) > 1
    batch, other = batch_of(state, rollout), copy.deepcopy(state)
    first, second, *_ = phrase_ids(state.tokenizer)
    said = [[first, 2], [second], [first, second, first, 2], [2]]
    demonstrations = rollout_from_ids(RAGGED[0], said, eos_token_id=2, pad_token_id=0)
    counted(state.policy)
    read = counted(other.policy)
    expected = ppo_step(state, batch, config, demonstrations=demonstrations)
    found = ppo_step(other, batch, replace(config, tokens_per_pass=most), demonstrations=demonstrations)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5) and found.keys() == expected.keys()
    if most in (40, 100):
        assert len(read) > 3 and all(rows * columns <= most for rows, columns in read)
    for one, two in ((state.policy, other.policy), (state.critic, other.critic)):
        for mine, theirs in zip(gradients(one), gradients(two), strict=True):
            assert (mine - theirs).abs().max() <= 1e-6 * max(1.0, float(mine.abs().max()))


@pytest.mark.parametrize("options", [{}, {"shared_trunk": True}, {"minibatch_size": 7}], ids=str)
def test_a_rollout_scored_in_passes_is_scored_the_same_and_in_its_order(options):
    (state, config), (other, _) = (ppo_state() for _ in range(2))
    config = replace(config, **{k: v for k, v in options.items() if k != "shared_trunk"})
    if "shared_trunk" in options:
        (state, config), (other, _) = (ppo_state(**options) for _ in range(2))
    stats = ppo_iteration(state, config), ppo_iteration(other, replace(config, tokens_per_pass=60))
    assert vars(stats[1]) == pytest.approx(vars(stats[0]), abs=1e-4)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("most", [1, 40, 10_000])
def test_a_dpo_step_in_passes_is_the_step_in_one(most, loss_type):
    policy, ref = made("qwen2"), made("qwen2", seed=1)
    prompts, chosen = RAGGED
    rejected = [[8, 2], [7, 7, 7, 2], [2], [4, 4, 4, 4, 4]]
    pairs = Pairs(*(rollout_from_ids(prompts, side, eos_token_id=2, pad_token_id=0) for side in (chosen, rejected)))
    config = DPOConfig(loss_type=loss_type, length_normalised=True, max_grad_norm=1e9, learning_rate=1e-4)
    found = []
    for its in (config, replace(config, tokens_per_pass=most)):
        scored = with_reference(ref, pairs, tokens_per_pass=its.tokens_per_pass)
        trained = copy.deepcopy(policy)
        stats = dpo_step(trained, torch.optim.SGD(trained.parameters(), 1e-3), scored, its)
        found.append((vars(stats), scored.ref_chosen_logps, scored.ref_rejected_logps, gradients(trained)))
    whole, parted = found
    assert parted[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-5)
    for mine, theirs in zip(whole[1:3], parted[1:3], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    for mine, theirs in zip(whole[3], parted[3], strict=True):
        assert (mine - theirs).norm() <= 1e-5 * mine.norm()


def test_groups_are_of_like_length_and_hold_each_row_once():
    prompts, responses = torch.tensor([4, 1, 5, 2, 30]), torch.tensor([3, 2, 6, 1, 30])
    found = [rows.tolist() for rows in groups(prompts, responses, 16)]
    assert found == [[1, 3], [0], [2], [4]]  # 2 · 3, 3 · 6 > 16, 2 · 10 > 16, and a row that is too long alone
    assert [rows.tolist() for rows in groups(prompts, responses, 1000)] == [[1, 3, 0, 2, 4]]
    rollout = rollout_from_ids(*RAGGED, eos_token_id=2, pad_token_id=0)
    for rows, part in passes(rollout, 12, 100):
        assert part.prompt_mask.any(0).all() and part.response_mask.any(0).all()
        kept = [ids[mask].tolist() for ids, mask in zip(part.response_ids, part.response_mask, strict=True)]
        assert kept == [RAGGED[1][row] for row in rows.tolist()]
    assert [rows for rows, _ in passes(rollout, None, 3)] == [slice(0, 3), slice(3, 6)]


# Layers, twice.


@pytest.mark.parametrize("name", READ)
def test_layers_computed_again_give_the_same_gradients_and_keep_less(name, monkeypatch):
    policy, rollout = READ[name](), rollout_from_ids(*RAGGED, eos_token_id=2, pad_token_id=0)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    if not weights:
        return
    generic(monkeypatch)
    modes = [module.training for module in policy.modules()]
    found = []
    for wanted in (False, True):
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with checkpointed(policy, wanted), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs = response_logprobs(policy, rollout)
        found.append((torch.autograd.grad(logprobs.sum(), weights), sum(kept)))
        assert [module.training for module in policy.modules()] == modes
        assert not any("forward" in vars(module) for module in policy.modules())
    for mine, theirs in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(mine, theirs)
    assert found[1][1] < 0.5 * found[0][1]


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_gradient_checkpointing_reads_each_layer_again_and_moves_the_weights_the_same(shared_trunk):
    ends = []
    for again in (False, True):
        state, config = ppo_state(shared_trunk=shared_trunk, gradient_checkpointing=again)
        ppo_iteration(state, config)
        batch, read = batch_of(state, state.last_rollout), counted(state.policy)
        measured = ppo_step(state, batch, config)
        assert len(read) == 1 + again
        ends.append((measured, gradients(state.policy, state.critic)))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-4)
    for mine, theirs in zip(ends[0][1], ends[1][1], strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * max(1.0, float(mine.abs().max()))


@pytest.mark.parametrize("config", [PPOConfig, DPOConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_pass": 0}, "tokens_per_pass is 0, expected None or a whole number of at least 1"),
        ({"tokens_per_pass": 2.5}, "tokens_per_pass is 2.5"),
        ({"tokens_per_pass": True}, "tokens_per_pass is True"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing is 'yes', expected True or False"),
    ],
)
def test_options_that_make_no_sense_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
