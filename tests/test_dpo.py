"""DPO: each loss against a slow float64 reference and its identities, TRL's trainer on the same pairs, the optimum,
every knob."""

import copy
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from alignkit.configs import DPOConfig
from alignkit.desk.tiny import phrase_ids
from alignkit.desk.world import SENTENCES, World
from alignkit.dpo import Pairs, check_first_step, dpo, dpo_step, with_reference
from alignkit.errors import InvariantError, NonFinite
from alignkit.formulas.losses import dpo_loss, implicit_reward
from alignkit.formulas.randomness import seeded
from alignkit.forward.reading import response_logps
from alignkit.forward.rollout import encode_prompts, encode_rows
from alignkit.models.adapters import AdapterOff, add_lora, frozen_copy, reference_policy
from alignkit.models.loading import load_policy, save_model
from alignkit.optim import adamw

TEXTS = list(SENTENCES.values())
PROMPTS = [prompt.text * (1 + number % 2) for number, prompt in enumerate(World(0).train_prompts[::23])]  # ragged


def noisy_policy(seed):
    """A tiny policy whose weights are large enough that prompts and earlier tokens matter."""
    policy, tokenizer = load_policy("tiny", seed=seed, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return policy, tokenizer


def random_pairs(n, seed=0):
    """Rows prompt / chosen / rejected: ragged prompts, responses of none to three sentences."""
    rng = np.random.default_rng(seed)
    rows = []
    while len(rows) < n:
        chosen, rejected = ("".join(rng.choice(TEXTS, rng.integers(0, 4))) for _ in range(2))
        if chosen != rejected:
            rows.append({"prompt": PROMPTS[len(rows)], "chosen": chosen, "rejected": rejected})
    return rows


ROWS = random_pairs(20)
CLEAR = [{"prompt": text, "chosen": TEXTS[0], "rejected": TEXTS[1]} for text in PROMPTS[:8]]  # one preference, no noise
QUICK = DPOConfig(beta=0.5, batch_size=8, epochs=1, learning_rate=5e-4, warmup=0.0)


def train(config, rows=CLEAR, seed=0, **options):
    """The policy after training, and the list of statistics."""
    policy, tokenizer = load_policy("tiny", seed=seed, device="cpu")
    return policy, list(dpo(policy, tokenizer, rows, config, **options))


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


# The losses, by their formulas.


def random_logps(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-10 + 3 * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(4)]


def slow_loss(chosen, rejected, ref_chosen, ref_rejected, beta, loss_type, smoothing):
    gap = (chosen - ref_chosen) - (rejected - ref_rejected)
    right, flipped = math.log1p(math.exp(-beta * gap)), math.log1p(math.exp(beta * gap))
    if loss_type == "sigmoid":
        return (1 - smoothing) * right + smoothing * flipped
    if loss_type == "robust":
        return ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)
    return (gap - 1 / (2 * beta)) ** 2 if loss_type == "ipo" else max(0.0, 1 - beta * gap)


@pytest.mark.parametrize("loss_type,smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0),
                                                 ("robust", 0.2)])
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_each_loss_equals_a_slow_reference(loss_type, smoothing, beta):
    logps = random_logps()
    loss = dpo_loss(*logps, beta=beta, loss_type=loss_type, label_smoothing=smoothing)
    rows = zip(*(values.tolist() for values in logps), strict=True)
    assert loss.tolist() == pytest.approx([slow_loss(*row, beta, loss_type, smoothing) for row in rows], rel=1e-12,
                                          abs=1e-12)


def loss_at(margin, beta=0.5, **options):
    """Loss and d loss / d margin where β log π/π_ref (chosen) − β log π/π_ref (rejected) is `margin`."""
    chosen = torch.tensor(np.atleast_1d(margin) / beta, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(len(chosen), dtype=torch.float64)
    loss = dpo_loss(chosen, zero, zero, zero, beta=beta, **options)
    loss.sum().backward()
    return loss.detach(), chosen.grad / beta


@pytest.mark.parametrize("options,expected", [({}, math.log(2)), ({"label_smoothing": 0.3}, math.log(2)),
                                              ({"loss_type": "hinge"}, 1.0), ({"loss_type": "ipo"}, 1 / (4 * 0.5**2)),
                                              ({"loss_type": "robust", "label_smoothing": 0.3}, math.log(2))])
def test_the_loss_at_margin_0_has_a_known_value(options, expected):
    assert float(loss_at(0.0, **options)[0]) == pytest.approx(expected, abs=1e-12)


def test_the_gradient_of_the_sigmoid_is_beta_times_sigma_of_minus_the_margin():
    logps = [values.requires_grad_() for values in random_logps()]
    dpo_loss(*logps, beta=0.3).sum().backward()
    margin = (implicit_reward(logps[0], logps[2], 0.3) - implicit_reward(logps[1], logps[3], 0.3)).detach()
    weight = 0.3 * torch.sigmoid(-margin)
    # chosen up, rejected down, the reference the other way round
    for values, sign in zip(logps, (-1, 1, 1, -1), strict=True):
        assert torch.allclose(values.grad, sign * weight, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust"])
def test_swapping_chosen_and_rejected_turns_the_gradient(loss_type):
    """The first step goes exactly the other way: at margin 0 the swapped pair has minus the gradient of the pair."""
    grads = []
    for order in ((0, 1), (1, 0)):
        own = [torch.zeros(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        dpo_loss(own[order[0]], own[order[1]], torch.zeros(5), torch.zeros(5), beta=0.5,
                 loss_type=loss_type).sum().backward()
        grads.append((own[0].grad, own[1].grad))
    assert torch.equal(grads[0][0], -grads[1][0]) and torch.equal(grads[0][1], -grads[1][1])
    assert (grads[0][0] < 0).all()  # as written, the chosen response becomes likelier


def test_the_sigmoid_loss_is_bradley_terry_on_implicit_rewards():
    logps = random_logps()
    rewards = [implicit_reward(logps[side], logps[side + 2], 0.7) for side in (0, 1)]
    probability = rewards[0].exp() / (rewards[0].exp() + rewards[1].exp())
    assert torch.allclose(dpo_loss(*logps, beta=0.7), -probability.log(), atol=1e-12)
    swapped = dpo_loss(logps[1], logps[0], logps[3], logps[2], beta=0.7)
    assert torch.allclose((-dpo_loss(*logps, beta=0.7)).exp() + (-swapped).exp(), torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_ipo_is_least_where_the_log_ratio_gap_is_one_over_two_beta(beta):
    margins = beta * np.linspace(-3 / beta, 3 / beta, 6001)
    loss, gradient = loss_at(margins, beta, loss_type="ipo")
    assert margins[int(loss.argmin())] / beta == pytest.approx(1 / (2 * beta), abs=1e-3 / beta)
    value, slope = loss_at(0.5, beta, loss_type="ipo")
    assert float(value) == pytest.approx(0, abs=1e-12) and float(slope) == pytest.approx(0, abs=1e-12)
    assert (gradient[margins > 0.51] > 0).all()  # unlike the sigmoid it pulls back what went too far


@pytest.mark.parametrize("smoothing", [0.1, 0.3, 0.45])
def test_cdpo_is_at_rest_where_sigma_of_the_margin_is_one_minus_epsilon(smoothing):
    rest = math.log((1 - smoothing) / smoothing)
    assert float(loss_at(rest, label_smoothing=smoothing)[1]) == pytest.approx(0, abs=1e-12)
    _, (below, above) = loss_at([rest - 0.1, rest + 0.1], label_smoothing=smoothing)
    assert below < 0 < above
    assert (loss_at(np.linspace(-9, 9, 50))[1] < 0).all()  # without smoothing it never rests


@pytest.mark.parametrize("flips", [0.1, 0.3, 0.45])
def test_the_robust_loss_of_flipped_labels_is_on_average_the_loss_of_the_right_ones(flips):
    """E over flips = (1 − ε) L(m) + ε L(−m) = −log σ(m) if L is robust, in value and gradient; not if it is cDPO's."""
    margins = np.linspace(-6, 6, 49)
    right, right_slope = loss_at(margins)
    for loss_type, unbiased in (("robust", True), ("sigmoid", False)):
        (kept, kept_slope), (turned, turned_slope) = (
            loss_at(sign * margins, loss_type=loss_type, label_smoothing=flips) for sign in (1, -1))
        mean = (1 - flips) * kept + flips * turned
        slope = (1 - flips) * kept_slope - flips * turned_slope
        assert torch.allclose(mean, right, atol=1e-10) == unbiased
        assert torch.allclose(slope, right_slope, atol=1e-10) == unbiased


def test_the_robust_loss_without_flips_is_the_sigmoid():
    logps = random_logps()
    assert torch.equal(dpo_loss(*logps, beta=0.7, loss_type="robust"), dpo_loss(*logps, beta=0.7))


@pytest.mark.parametrize("flips", [0.0, 0.2, 0.4])
def test_the_gradient_of_the_robust_loss_is_that_of_finite_differences(flips):
    margins, step = np.linspace(-5, 5, 21), 1e-5
    options = {"loss_type": "robust", "label_smoothing": flips}
    ahead, behind = (loss_at(margins + sign * step, **options)[0] for sign in (1, -1))
    assert torch.allclose(loss_at(margins, **options)[1], (ahead - behind) / (2 * step), atol=1e-8)


def test_flipped_labels_teach_a_robust_policy_what_the_right_ones_teach():
    """With one label in four flipped and ε = 1/4, full-batch training goes as it goes on the right labels."""
    rows = [row for row in CLEAR for _ in range(4)]
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} if number % 4 == 0 else row
               for number, row in enumerate(rows)]
    config = replace(QUICK, batch_size=len(rows), epochs=6, max_grad_norm=1e9)
    right = train(config, rows)[0]
    robust = train(replace(config, loss_type="robust", label_smoothing=0.25), flipped)[0]
    smoothed = train(replace(config, label_smoothing=0.25), flipped)[0]
    start = load_policy("tiny", seed=0, device="cpu")[0]
    went, apart = ((weights(right) - weights(other)).norm() for other in (start, robust))
    assert apart < 1e-3 * went
    assert (weights(right) - weights(smoothed)).norm() > 0.1 * went


def test_sigmoid_and_hinge_fall_with_the_margin_and_hinge_stops_at_1():
    for loss_type in ("sigmoid", "hinge"):
        loss, _ = loss_at(np.linspace(-8, 0.99, 200), loss_type=loss_type)
        assert (loss.diff() < 0).all()
    assert loss_at([1.0, 1.5, 9.0], loss_type="hinge")[0].tolist() == [0, 0, 0]
    # and no overflow
    assert (loss_at(np.array([-1000.0, 1000.0]))[0] == torch.tensor([1000.0, 0.0], dtype=torch.float64)).all()


def test_what_depends_on_the_prompt_alone_cancels():
    """f(x) added to both of the reference's log-probs, or to both of the policy's, changes no loss."""
    logps = random_logps()
    prompt_term = 5 * torch.randn(64, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for loss_type in ("sigmoid", "ipo", "hinge", "robust"):
        options = {"beta": 0.4, "loss_type": loss_type}
        loss = dpo_loss(*logps, **options)
        own, ref = logps[:2], logps[2:]
        assert torch.allclose(dpo_loss(*own, *(v + prompt_term for v in ref), **options), loss, atol=1e-10)
        assert torch.allclose(dpo_loss(*(v + prompt_term for v in own), *ref, **options), loss, atol=1e-10)


def test_wrong_shapes_and_unknown_losses_are_named():
    good, bad = torch.zeros(3), torch.zeros(3, 1)
    for position, name in ((1, "policy_rejected_logps"), (2, "ref_chosen_logps"), (3, "ref_rejected_logps")):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 1\), expected \(3,\)"):
            dpo_loss(*[bad if i == position else good for i in range(4)], beta=1.0)
    with pytest.raises(ValueError, match="loss_type is 'dpo', expected one of sigmoid, ipo, hinge, robust"):
        dpo_loss(good, good, good, good, beta=1.0, loss_type="dpo")


# The same numbers as TRL's trainer.

SAME_METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                "logps/rejected", "grad_norm")
PARITY = DPOConfig(beta=0.3, learning_rate=0.0, epochs=1, batch_size=len(ROWS), warmup=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy and a reference that differ, as folders: TRL reloads an in-memory reference from its path."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 1), ("reference", 2)):
        save_model(*noisy_policy(seed), folder / name)
    return folder


def trl_run(folders, rows, loss_type, precompute, **options):
    """TRL's log and model after training the saved policy against the saved reference."""
    import trl
    from datasets import Dataset

    policy, tokenizer = load_policy(folders / "policy", device="cpu")
    reference, _ = load_policy(folders / "reference", device="cpu")
    options = {"learning_rate": 0.0, "per_device_train_batch_size": len(rows), "num_train_epochs": 1, **options}
    args = trl.DPOConfig(output_dir=str(folders / "trl"), loss_type=[loss_type], precompute_ref_log_probs=precompute,
                         beta=PARITY.beta, bf16=False, use_cpu=True, gradient_checkpointing=False, max_length=None,
                         lr_scheduler_type="constant", adam_epsilon=1e-5, report_to="none", save_strategy="no",
                         logging_steps=1, disable_tqdm=True, **options)
    trainer = trl.DPOTrainer(policy, reference, args=args, train_dataset=Dataset.from_list(rows),
                             processing_class=tokenizer)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], trainer.model


def own_run(folders, rows, config):
    policy, tokenizer = load_policy(folders / "policy", device="cpu")
    reference, _ = load_policy(folders / "reference", device="cpu")
    return [stats.log() for stats in dpo(policy, tokenizer, rows, config, ref_policy=reference)], policy


def assert_same_metrics(own, trl, names=SAME_METRICS):
    for name in names:
        assert own[name] == pytest.approx(trl[name], abs=1e-4, rel=1e-5), name


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("trl_name,options", [
    ("sigmoid", {}), ("hinge", {"loss_type": "hinge"}), ("sigmoid_norm", {"length_normalised": True}),
    ("ipo", {"loss_type": "ipo", "length_normalised": True}),  # TRL's IPO is per token
])
def test_loss_and_metrics_equal_trl_s_dpo_trainer(folders, trl_name, options, precompute):
    trl, _ = trl_run(folders, ROWS, trl_name, precompute)
    own, _ = own_run(folders, ROWS, replace(PARITY, precompute_reference=precompute, **options))
    assert len(trl) == len(own) == 1
    assert_same_metrics(own[0], trl[0])
    assert abs(own[0]["rewards/margins"]) > 0.01 and 0 < own[0]["rewards/accuracies"] < 1  # they do differ


def test_the_robust_loss_equals_trl_s(folders):
    trl, _ = trl_run(folders, ROWS, "robust", True, label_smoothing=0.2)
    own, _ = own_run(folders, ROWS, replace(PARITY, loss_type="robust", label_smoothing=0.2))
    assert_same_metrics(own[0], trl[0])


@pytest.mark.parametrize("precompute", [True, False])
def test_label_smoothing_equals_trl_s(folders, precompute):
    """TRL 1.16 smooths labels in `aot` only, which sorts a batch; on batches of one pair it is cDPO."""
    rows = ROWS[:6]
    trl, _ = trl_run(folders, rows, "aot", precompute, label_smoothing=0.2, per_device_train_batch_size=1)
    own, _ = own_run(folders, rows, replace(PARITY, label_smoothing=0.2, batch_size=1, precompute_reference=precompute))
    assert len(trl) == len(own) == 6
    own, trl = (sorted(log, key=lambda row: row["logps/chosen"]) for log in (own, trl))  # each has its own order
    for mine, theirs in zip(own, trl, strict=True):
        assert_same_metrics(mine, theirs)


@pytest.mark.parametrize("trl_name,options", [("sigmoid", {}),
                                              ("ipo", {"loss_type": "ipo", "length_normalised": True})])
def test_after_some_steps_metrics_and_weights_are_still_trl_s(folders, trl_name, options):
    trl, trl_model = trl_run(folders, ROWS, trl_name, True, learning_rate=1e-3, num_train_epochs=4, max_grad_norm=1.0,
                             weight_decay=0.0)
    own, policy = own_run(folders, ROWS, replace(PARITY, learning_rate=1e-3, epochs=4, max_grad_norm=1.0, **options))
    assert len(own) == len(trl) == 4 and own[3]["loss"] < own[0]["loss"] - 0.05
    for mine, theirs in zip(own, trl, strict=True):
        assert_same_metrics(mine, theirs)
    start = weights(load_policy(folders / "policy", device="cpu")[0])
    assert (weights(policy) - start).abs().max() > 3e-3
    assert torch.allclose(weights(policy), weights(trl_model), atol=1e-5)


# What it must reach.


def test_one_token_dpo_reaches_the_closed_form_optimum():
    """π*(y) ∝ π_ref(y) e^{r(y)/β} over twelve responses.

    With r = log w, Bradley–Terry's P(i ≻ j) is w_i / (w_i + w_j): of each two, w_i pairs prefer i and w_j prefer j.
    """
    policy, tokenizer = load_policy("tiny", seed=3, device="cpu")
    responses = [*TEXTS, ""]
    ids = [*phrase_ids(tokenizer), tokenizer.eos_token_id]
    with torch.no_grad():
        policy.lm_head.bias[ids] += 0.7 * torch.randn(12, generator=seeded(0))  # π_ref is not uniform
    wins = [1, 3, 2, 1, 3, 1, 2, 3, 1, 3, 2, 1]
    rows = [{"prompt": "How", "chosen": responses[i], "rejected": responses[j]}
            for i in range(12) for j in range(12) if i != j for _ in range(wins[i])]
    config = DPOConfig(beta=0.5, max_new_tokens=1, epochs=60, batch_size=len(rows), learning_rate=5e-3, warmup=0.02)

    def logprobs():
        prompt, mask = encode_prompts(tokenizer, ["How"])
        with torch.no_grad():
            return policy(input_ids=prompt, attention_mask=mask).logits[0, -1, ids].double().log_softmax(-1)

    reference = logprobs()
    best = (reference + torch.tensor(wins).double().log() / config.beta).log_softmax(-1)
    assert float((best.exp() * (best - reference)).sum()) > 0.1  # there is something to learn
    for _ in dpo(policy, tokenizer, rows, config):
        pass
    reached = logprobs()
    assert float((best.exp() * (best - reached)).sum()) < 1e-3
    assert float((reached.exp() * (reached - best)).sum()) < 1e-3


# What must hold before the first step.


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("loss_type,expected", [("sigmoid", math.log(2)), ("ipo", 1.0), ("hinge", 1.0),
                                                ("robust", math.log(2))])
def test_the_first_step_starts_from_margin_0(loss_type, expected, precompute):
    _, stats = train(replace(QUICK, loss_type=loss_type, precompute_reference=precompute), ROWS)
    assert stats[0].margin == pytest.approx(0, abs=1e-5) and stats[0].loss == pytest.approx(expected, abs=1e-4)
    assert stats[0].chosen_shift == pytest.approx(0, abs=1e-5) and stats[0].rejected_shift == pytest.approx(0, abs=1e-5)
    assert stats[0].chosen_logps < -1


def test_a_reference_that_is_not_the_start_stops_the_run_only_if_it_should_be(monkeypatch):
    other, tokenizer = noisy_policy(9)
    policy, _ = noisy_policy(8)
    stats = next(dpo(policy, tokenizer, ROWS, QUICK, ref_policy=other))  # an explicit choice: allowed
    assert abs(stats.margin) > 0.05
    monkeypatch.setattr("alignkit.dpo.reference_policy", lambda policy: frozen_copy(other))
    with pytest.raises(InvariantError, match=r"step 0: DPO's margin is .* expected 0\.00000.* The reference is not"):
        next(dpo(policy, tokenizer, ROWS, QUICK))


def test_the_check_reads_margin_and_loss():
    stats = train(QUICK)[1][0]
    check_first_step(stats, QUICK)
    check_first_step(replace(stats, margin=0.01), QUICK, tolerance=0.05)
    for wrong in ({"margin": 0.01}, {"margin": math.nan}, {"loss": 0.7}, {"loss": math.inf}):
        with pytest.raises(InvariantError, match=f"DPO's {next(iter(wrong))} is"):
            check_first_step(replace(stats, **wrong), QUICK)


def test_with_lora_the_switched_off_adapter_is_the_frozen_copy():
    base, tokenizer = noisy_policy(4)
    # the reference is read while the adapter changes
    config = replace(QUICK, learning_rate=5e-3, epochs=3, precompute_reference=False)
    off_policy, copy_policy = (add_lora(copy.deepcopy(base)) for _ in range(2))
    assert isinstance(reference_policy(off_policy), AdapterOff)
    off = [stats.log() for stats in dpo(off_policy, tokenizer, CLEAR, config)]
    copied = [stats.log() for stats in dpo(copy_policy, tokenizer, CLEAR, config, ref_policy=frozen_copy(base))]
    for one, other in zip(off, copied, strict=True):
        one.pop("rewards/accuracies"), other.pop("rewards/accuracies")  # at margin 0 it is the sign of rounding
        assert one == pytest.approx(other, abs=1e-5)
    assert off[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and off[2]["rewards/margins"] > 0.01


# The step.


def one_batch(rows=CLEAR, seed=0):
    policy, tokenizer = noisy_policy(seed)
    pairs = Pairs(*(encode_rows(tokenizer, rows, side, 4) for side in ("chosen", "rejected")))
    return policy, with_reference(frozen_copy(policy), pairs)


def test_response_logps_are_the_sums_of_an_unpadded_forward():
    policy, tokenizer = noisy_policy(5)
    responses = encode_rows(tokenizer, ROWS, "chosen", 8)
    with torch.no_grad():
        logps = response_logps(policy, responses)
        for row, value in zip(ROWS, logps, strict=True):
            prompt, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row["chosen"]))
            ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
            logprobs = policy(input_ids=ids).logits[0].double().log_softmax(-1)
            slow = sum(float(logprobs[t - 1, ids[0, t]]) for t in range(len(prompt), ids.shape[1]))
            assert float(value) == pytest.approx(slow, abs=1e-4)


def test_a_step_without_reference_log_probs_is_refused():
    policy, pairs = one_batch()
    with pytest.raises(ValueError, match="pairs carry no reference log-probs; call with_reference"):
        dpo_step(policy, adamw(list(policy.parameters()), 1e-3), Pairs(pairs.chosen, pairs.rejected), QUICK)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights(bad):
    policy, pairs = one_batch()
    broken = replace(pairs, ref_chosen_logps=torch.where(torch.arange(8) == 3, bad, pairs.ref_chosen_logps))
    before = weights(policy)
    with pytest.raises(NonFinite, match=r"DPO step 7 has loss .*; the weights were left as they were"):
        dpo_step(policy, adamw(list(policy.parameters()), 1e-3), broken, QUICK, step=7)
    assert torch.equal(weights(policy), before)


def test_statistics_are_of_before_the_step_and_make_sense():
    policy, pairs = one_batch(ROWS)
    pairs = replace(pairs, ref_chosen_logps=pairs.ref_chosen_logps - 1.0)  # as if chosen had become e times likelier
    with torch.no_grad():
        chosen, rejected = (response_logps(policy, side) for side in (pairs.chosen, pairs.rejected))
    stats = dpo_step(policy, adamw(list(policy.parameters()), 1e-3), pairs, QUICK)
    expected = {"loss": math.log(1 + math.exp(-0.5)), "chosen_reward": 0.5, "rejected_reward": 0.0, "margin": 0.5,
                "accuracy": 1.0, "chosen_logps": float(chosen.mean()), "rejected_logps": float(rejected.mean()),
                "chosen_shift": 1.0, "rejected_shift": 0.0}
    assert {name: getattr(stats, name) for name in expected} == pytest.approx(expected, abs=1e-5)


def test_pairs_are_cut_by_rows():
    _, pairs = one_batch(ROWS)
    some = pairs[torch.tensor([5, 2])]
    assert len(some) == 2 and len(pairs) == len(ROWS)
    assert torch.equal(some.ref_rejected_logps, pairs.ref_rejected_logps[[5, 2]])
    assert torch.equal(some.chosen.response_ids, pairs.chosen.response_ids[[5, 2]])


def test_eos_ends_a_response_if_it_fits():
    _, tokenizer = load_policy("tiny", device="cpu")
    rows = [{"prompt": PROMPTS[0], "chosen": "".join(TEXTS[:n])} for n in range(5)]
    encoded = encode_rows(tokenizer, rows, "chosen", 4)
    assert encoded.response_mask.sum(1).tolist() == [1, 2, 3, 4, 4]
    assert encoded.finished.tolist() == [True, True, True, True, False]
    assert encoded.response_ids[0].tolist() == [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * 3


# Every knob does what its docs say.


def log_ratio_gap(stats, config):
    return stats.margin / config.beta


LONG = replace(QUICK, epochs=60, learning_rate=3e-3)


def test_a_larger_beta_stays_closer():
    configs = [replace(LONG, beta=beta) for beta in (0.2, 1.0, 5.0)]
    gaps = [log_ratio_gap(train(config)[1][-1], config) for config in configs]
    assert gaps[0] > 1.5 * gaps[1] > 1.5 * 1.5 * gaps[2] > 0


def test_ipo_stops_at_its_target_and_hinge_at_margin_1():
    config = replace(LONG, loss_type="ipo", beta=0.25)
    assert log_ratio_gap(train(config)[1][-1], config) == pytest.approx(1 / (2 * 0.25), rel=0.05)
    _, stats = train(replace(LONG, loss_type="hinge"))
    assert stats[-1].loss < 0.01 and 1.0 <= stats[-1].margin < 2.0


def test_label_smoothing_limits_the_margin():
    _, stats = train(replace(LONG, label_smoothing=0.2, beta=1.0))
    assert stats[-1].margin == pytest.approx(math.log(0.8 / 0.2), rel=0.05)
    assert train(replace(LONG, beta=1.0))[1][-1].margin > 2 * math.log(4)


def test_length_normalisation_measures_per_token_and_logs_per_response():
    rows = [{**row, "chosen": TEXTS[0] * 3} for row in CLEAR]  # three sentences and EOS against one and EOS
    config = replace(LONG, loss_type="ipo", beta=1.0, length_normalised=True)
    _, stats = train(config, rows)
    per_token = stats[-1].chosen_shift / 4 - stats[-1].rejected_shift / 2
    assert per_token == pytest.approx(0.5, rel=0.05)
    shift = stats[-1].chosen_shift - stats[-1].rejected_shift
    assert log_ratio_gap(stats[-1], config) == pytest.approx(shift, abs=1e-4)
    plain = train(replace(config, length_normalised=False), rows)[1][-1]
    assert log_ratio_gap(plain, config) == pytest.approx(0.5, rel=0.15)


def test_what_lies_beyond_max_new_tokens_is_not_seen():
    rows = [{"prompt": text, "chosen": TEXTS[0] + TEXTS[1], "rejected": TEXTS[0] + TEXTS[2]} for text in PROMPTS[:8]]
    start = weights(load_policy("tiny", device="cpu")[0])
    cut, stats = train(replace(QUICK, epochs=5, max_new_tokens=1), rows)  # all that is left is the sentence they share
    assert stats[-1].margin == 0 and torch.equal(weights(cut), start)
    assert train(replace(QUICK, epochs=5, max_new_tokens=2), rows)[1][-1].margin > 0.01


def test_epochs_and_batch_size_make_the_steps_they_say():
    _, stats = train(replace(QUICK, epochs=3, batch_size=6), ROWS)
    assert [row.step for row in stats] == list(range(1, 3 * 4 + 1))  # 20 pairs: 6, 6, 6, 2


def test_a_learning_rate_of_0_changes_nothing():
    policy, stats = train(replace(QUICK, learning_rate=0.0, epochs=2))
    assert torch.equal(weights(policy), weights(load_policy("tiny", device="cpu")[0]))
    assert stats[0].loss == pytest.approx(stats[1].loss) and stats[0].grad_norm > 0


def test_warmup_rises_linearly_over_its_share_of_the_steps():
    _, stats = train(replace(QUICK, epochs=10, warmup=0.4, learning_rate=1e-3))
    assert [row.learning_rate for row in stats] == pytest.approx([2.5e-4, 5e-4, 7.5e-4] + [1e-3] * 7)
    assert [row.learning_rate for row in train(replace(QUICK, epochs=2, learning_rate=1e-3))[1]] == [1e-3] * 2


def test_precomputing_the_reference_changes_no_number():
    config = replace(QUICK, epochs=3, batch_size=6, learning_rate=2e-3)
    runs = [train(replace(config, precompute_reference=precompute), ROWS)[1] for precompute in (True, False)]
    for one, other in zip(*runs, strict=True):
        one, other = ({**stats.log(), "rewards/accuracies": 0} for stats in (one, other))  # at margin 0: rounding
        assert one == pytest.approx(other, abs=1e-4)


def test_the_seed_orders_the_pairs_and_nothing_else():
    def chosen(seed):
        policy, stats = train(replace(QUICK, batch_size=5, seed=seed), ROWS)
        return weights(policy), [row.chosen_logps for row in stats]

    (first, one), (second, two), (third, three) = (chosen(seed) for seed in (1, 1, 2))
    assert torch.equal(first, second) and one == two
    assert not torch.equal(first, third) and one[0] != three[0]
    _, stats = train(replace(QUICK, batch_size=5, epochs=2, learning_rate=0.0), ROWS)
    per_step = [round(row.chosen_logps, 4) for row in stats]
    # each epoch sees each pair once
    assert per_step[:4] != per_step[4:] and np.mean(per_step[:4]) == pytest.approx(np.mean(per_step[4:]), abs=1e-3)


def test_max_grad_norm_limits_the_step():
    norms = []
    for limit in (1e-3, 1e3):
        policy, stats = train(replace(QUICK, max_grad_norm=limit))
        norms.append(float(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).norm()))
        assert stats[0].grad_norm > 1e-2  # what is logged is the norm before the clip
    assert norms[0] == pytest.approx(1e-3, rel=1e-3) and norms[1] > 1e-2


@pytest.mark.parametrize("name", [f.name for f in fields(DPOConfig)])
def test_no_knob_is_idle(name):
    """Turned, every option changes where two epochs end, but for those that say when and how pairs are read."""
    other = {"beta": 2.0, "loss_type": "ipo", "label_smoothing": 0.3, "length_normalised": True, "max_new_tokens": 1,
             "epochs": 3, "batch_size": 10, "learning_rate": 1e-4, "max_grad_norm": 1e-3, "warmup": 1.0,
             "precompute_reference": False, "precision": "bf16", "seed": 5, "tokens_per_pass": 40,
             "gradient_checkpointing": True, "halve_passes": True}
    config = replace(QUICK, epochs=2, learning_rate=2e-3)
    ends = [weights(train(c, ROWS)[0]) for c in (config, replace(config, **{name: other[name]}))]
    still = name in ("precompute_reference", "tokens_per_pass", "gradient_checkpointing", "halve_passes")
    assert torch.allclose(*ends, atol=1e-4 if still else 1e-5) == still


@pytest.mark.parametrize("options,message", [
    ({"beta": 0.0}, "beta is 0.0, expected more than 0"), ({"beta": math.nan}, "beta is nan"),
    ({"loss_type": "dpo"}, "loss_type is 'dpo', expected one of sigmoid, ipo, hinge, robust"),
    ({"label_smoothing": 0.5}, "label_smoothing is 0.5, expected a share"),
    ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ({"label_smoothing": 0.1, "loss_type": "ipo"},
     "label_smoothing goes with loss_type 'sigmoid' or 'robust' only, not with 'ipo'"),
    ({"epochs": 0}, "epochs is 0, expected at least 1"), ({"batch_size": 0}, "batch_size is 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"warmup": 1.5}, "warmup is 1.5, expected a share of the steps"),
    ({"precision": "fp16"}, "precision is 'fp16', expected one of fp32, bf16"),
])
def test_a_config_that_makes_no_sense_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**options)


def test_no_rows_are_refused():
    policy, tokenizer = load_policy("tiny", device="cpu")
    with pytest.raises(ValueError, match="rows is empty, expected at least one preference pair"):
        next(dpo(policy, tokenizer, [], QUICK))


def test_every_stat_has_a_plot_name_and_a_meaning():
    stats = train(QUICK)[1][0]
    assert list(stats.log())[:6] == ["step", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
                                     "rewards/margins"]
    assert all(f.metadata["meaning"] for f in fields(stats))


@pytest.mark.parametrize("precompute", [True, False])
def test_in_bf16_the_first_step_still_starts_from_margin_0_and_stays_near_fp32(precompute):
    ends = [train(replace(QUICK, precision=precision, precompute_reference=precompute), rows=ROWS)
            for precision in ("fp32", "bf16")]
    for _, steps in ends:
        assert steps[0].margin == pytest.approx(0, abs=0.05) and steps[0].loss == pytest.approx(math.log(2), abs=0.05)
    (policy, exact), (low, rounded) = ends
    assert [row.chosen_logps for row in rounded] == pytest.approx([row.chosen_logps for row in exact], rel=0.02,
                                                                  abs=0.05)
    assert not torch.equal(weights(policy), weights(low))
