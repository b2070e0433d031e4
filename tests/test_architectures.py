"""Models that are wired in another way than Llama: what is read of them is what they say themselves."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from alignkit import DPOConfig, PPOConfig, PPOState, desk_tokenizer, sample, seeded
from alignkit.dpo import dpo
from alignkit.forward.reading import read_responses, response_logprobs
from alignkit.forward.rollout import encode_prompts, full_ids, position_ids
from alignkit.ppo import ppo

TOKENIZER = desk_tokenizer()
SPECIAL = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id,
           "pad_token_id": TOKENIZER.pad_token_id, "vocab_size": len(TOKENIZER)}
PROMPTS = ["How do I reset my password?", "How do I bake some bread at home?"]


def opt() -> OPTForCausalLM:
    """It makes its logits from `model.decoder`, so that a hook on its body never sees anything."""
    return OPTForCausalLM(OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
                                    max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, **SPECIAL))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
                                      attn_pdrop=0.0, **SPECIAL))


@pytest.fixture(params=[opt, gpt2])
def policy(request):
    torch.manual_seed(0)
    return request.param().eval()


def some_rollout(policy):
    ids, mask = encode_prompts(TOKENIZER, PROMPTS * 3)
    return sample(policy, ids, mask, max_new_tokens=5, eos_token_id=TOKENIZER.eos_token_id,
                  pad_token_id=TOKENIZER.pad_token_id, generator=seeded(0))


def test_log_probs_are_those_of_a_plain_forward_pass_and_of_the_sampler(policy):
    rollout = some_rollout(policy)
    ids, mask = full_ids(rollout)
    length = rollout.response_ids.shape[1]
    with torch.no_grad():
        logits = policy(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)).logits[:, -length:]
        read = response_logprobs(policy, rollout)
    plain = logits.log_softmax(-1).gather(-1, rollout.response_ids[..., None]).squeeze(-1)
    expected = torch.where(rollout.response_mask, plain, 0.0)
    assert torch.allclose(read, expected, atol=1e-5)
    assert torch.allclose(read, rollout.logprobs, atol=1e-5)


def test_the_states_that_a_shared_critic_reads_are_those_that_the_head_reads(policy):
    rollout = some_rollout(policy)
    with torch.no_grad():
        logprobs, _, states = read_responses(policy, rollout, 1.0, with_states=True)
        logits = policy.get_output_embeddings()(states)
    again = logits.log_softmax(-1).gather(-1, rollout.response_ids[..., None]).squeeze(-1)
    mask = rollout.response_mask
    assert torch.allclose(again[mask], logprobs[mask], atol=1e-5)


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_ppo_trains_and_dpo_begins_at_ln_2(policy, shared_trunk):
    rows = [{"prompt": PROMPTS[0], "chosen": " Happy to help!", "rejected": " I can't help with that."}] * 4
    first = next(dpo(copy.deepcopy(policy), TOKENIZER, rows, DPOConfig(epochs=1, batch_size=4)))
    assert first.loss == pytest.approx(0.693147, abs=1e-5)
    config = PPOConfig(iterations=2, prompts_per_iteration=4, minibatch_size=4, shared_trunk=shared_trunk)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    state = PPOState.start(policy, TOKENIZER, lambda prompts, responses: [len(text) / 50 for text in responses],
                           PROMPTS, config)
    assert len(list(ppo(state, config))) == 2
    assert any(not torch.equal(before[name], weight) for name, weight in policy.named_parameters())
