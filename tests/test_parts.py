"""What is computed in parts, because all at once it would not fit a GPU, is what it is all at once."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from alignkit import sampling
from alignkit.models import AdapterOff, add_lora
from alignkit.sampling import read_responses, response_logits, response_logprobs, rollout_from_ids, seeded
from alignkit.tokens import token_logprobs
from tests.test_fast import made

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
        monkeypatch.setattr(sampling.fast, "reader", lambda model: None)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    mask, parts, found = rollout.response_mask, [], []
    checkpoint = sampling.checkpoint

    def counted(*given, **options):
        parts.append(len(given[1]))
        return checkpoint(*given, **options)

    monkeypatch.setattr(sampling, "checkpoint", counted)
    for most in (2**28, 3 * 61):
        monkeypatch.setattr(sampling, "MOST_LOGITS", most)
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
    monkeypatch.setattr(sampling, "MOST_LOGITS", 3 * 61)
    read_responses(policy, rollout)  # the check is over
    assert held() == 0


@pytest.mark.parametrize("change", ["logits are scaled", "head with an adapter", "no logits_to_keep"])
def test_logits_that_are_more_than_a_linear_head_are_read_as_ever(change, monkeypatch):
    monkeypatch.setattr(sampling, "MOST_LOGITS", 61)
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
    monkeypatch.setattr(sampling, "checkpoint", None)
    assert torch.equal(response_logprobs(policy, rollout), expected)
