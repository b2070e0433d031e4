"""Supervised fine-tuning through TRL against a plain torch loop, and every knob."""

from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from alignkit import sft
from alignkit.configs import SFTConfig
from alignkit.desk.world import SENTENCES, World
from alignkit.models.loading import load_policy
from alignkit.sft import train_sft

ROWS = World(0).demonstrations(24, seed=4)
CONFIG = SFTConfig(epochs=4, batch_size=len(ROWS), learning_rate=5e-3)


def train(config=CONFIG, rows=ROWS, **options):
    """The policy after training, and TRL's log."""
    policy, tokenizer = load_policy("tiny", device="cpu")
    return policy, train_sft(policy, tokenizer, rows, config, **options)


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def labelled(tokenizer, rows):
    """Token ids and labels (B, L): labels at the response and its EOS, −100 elsewhere; our own."""
    width = 24
    ids, labels = torch.full((len(rows), width), tokenizer.pad_token_id), torch.full((len(rows), width), -100)
    for number, row in enumerate(rows):
        prompt, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row["completion"]))
        whole = [*whole, tokenizer.eos_token_id]
        ids[number, : len(whole)] = torch.tensor(whole)
        labels[number, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
    return ids, labels


def test_losses_and_weights_are_those_of_a_plain_loop():
    """Cross-entropy averaged over the response tokens and EOS of the batch, AdamW, gradient norm clipped at 1."""
    trained, log = train()
    policy, tokenizer = load_policy("tiny", device="cpu")
    start = weights(policy)
    ids, labels = labelled(tokenizer, ROWS)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    rates = [row["learning_rate"] for row in log]
    assert len(rates) == 4 and rates[0] == 0 < rates[3] < rates[2] < rates[1] == CONFIG.learning_rate  # warm-up, cosine
    for row in log:
        logits = policy(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        assert row["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        assert float(norm) == pytest.approx(row["grad_norm"], rel=1e-4)
        optimizer.param_groups[0]["lr"] = row["learning_rate"]
        optimizer.step()
    assert log[3]["loss"] < log[0]["loss"] - 0.1 and (weights(policy) - start).abs().max() > 5e-3
    assert torch.allclose(weights(policy), weights(trained), atol=1e-4)


def test_the_prompt_is_no_label():
    """Rows that differ in their prompt's words alone, under a policy that does not look at them, have the same loss."""
    policy, tokenizer = load_policy("tiny", device="cpu")
    with torch.no_grad():
        policy.model.embed_tokens.weight.zero_()
        policy.lm_head.bias += 0.3 * torch.arange(len(policy.lm_head.bias)).remainder(5)
    losses = []
    for prompt in ("How do I fix my phone from home?", "How"):
        row = {"prompt": prompt, "completion": SENTENCES["POLITE"]}
        losses.append(train_sft(policy, tokenizer, [row], replace(CONFIG, epochs=1, learning_rate=0.0))[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    ids = [tokenizer.convert_tokens_to_ids(SENTENCES["POLITE"]), tokenizer.eos_token_id]
    logprobs = policy.lm_head.bias.detach().log_softmax(-1)[ids]
    assert losses[0] == pytest.approx(-float(logprobs.mean()), abs=0.01)  # the sentence and EOS, both, and nothing else


def test_the_log_has_a_row_for_each_step_and_the_policy_is_left_ready_to_sample():
    seen = []
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **more):
            seen.append(state.global_step)

    policy, log = train(replace(CONFIG, epochs=2, batch_size=10), callbacks=[Watch()])
    assert [row["step"] for row in log] == list(range(1, 2 * 3 + 1)) and next(iter(log[0])) == "step"
    assert seen[:6] == [1, 2, 3, 4, 5, 6]
    assert not policy.training


@pytest.mark.parametrize("name", [f.name for f in fields(SFTConfig)])
def test_no_knob_is_idle(name):
    other = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "max_length": 9, "seed": 5}
    config = replace(CONFIG, epochs=3, batch_size=6)
    one, two = (train(c)[0] for c in (config, replace(config, **{name: other[name]})))
    assert not torch.allclose(weights(one), weights(two), atol=1e-5)


def test_the_same_seed_trains_the_same_weights():
    config = replace(CONFIG, epochs=1, batch_size=6)
    assert torch.equal(weights(train(config)[0]), weights(train(config)[0]))


def test_a_row_that_is_too_long_loses_its_end():
    """A prompt has six tokens: of eight, two sentences stay; of six, nothing that could be learned."""
    def loss(last, max_length):
        completion = "".join(SENTENCES[name] for name in ("POLITE", "FILLER", last))
        rows = [{"prompt": ROWS[0]["prompt"], "completion": completion}]
        return train(replace(CONFIG, epochs=1, learning_rate=0.0, max_length=max_length), rows)[1][0]["loss"]

    assert loss("CAUTION", 8) == loss("UNSAFE", 8) and loss("CAUTION", 9) != loss("UNSAFE", 9)
    with pytest.raises(ValueError, match="max_length is 6, and every row is longer"):
        loss("CAUTION", 6)


def test_logits_as_wide_as_the_vocabulary_change_no_weight(monkeypatch):
    narrow = train()[0]
    monkeypatch.setattr(sft, "narrow_logits", lambda vocabulary: nullcontext())
    assert torch.equal(weights(narrow), weights(train()[0]))


def test_no_rows_are_refused():
    policy, tokenizer = load_policy("tiny", device="cpu")
    with pytest.raises(ValueError, match="rows is empty, expected at least one demonstration"):
        train_sft(policy, tokenizer, [], CONFIG)
