"""SFT: what training leaves behind."""

import copy

import torch

from alignkit.models import load_policy
from alignkit.sft import SFTConfig, train_sft


def test_a_copy_of_a_trained_policy_runs_its_own_weights():
    policy, tokenizer = load_policy("tiny", device="cpu")
    train_sft(policy, tokenizer, [{"prompt": "How do I reset the printer today?", "completion": " Happy to help!"}] * 4, SFTConfig(epochs=1))
    twin = copy.deepcopy(policy)
    ids = tokenizer("How do I reset the printer today?", return_tensors="pt").input_ids
    with torch.no_grad():
        twin.lm_head.bias.add_(torch.arange(len(twin.lm_head.bias)))
        assert not torch.allclose(twin(ids).logits, policy(ids).logits)
