"""RLOO, GRPO and a KL in the loss: identities, expected gradients by enumeration beside the exact ones, and runs.

The enumerated world: responses of at most two phrases, 133 to a prompt. An expectation over the responses of a group is
a sum over all pairs of them, and the gradient comes from `accumulate_gradient`, the code that trains.
"""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch

from alignkit import exact
from alignkit import ppo as ppo_module
from alignkit.configs import PPOConfig
from alignkit.desk.tiny import phrase_ids
from alignkit.errors import NonFinite, RunError
from alignkit.formulas.kl import ESTIMATORS, exact_kl
from alignkit.formulas.losses import grpo_advantages, rloo_advantages, token_rewards
from alignkit.forward.reading import response_logits, response_logprobs
from alignkit.forward.rollout import Rollout, encode_prompts
from alignkit.models.adapters import add_lora, frozen_copy
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOBatch, PPOState, accumulate_gradient, collect, ppo, ppo_iteration, ppo_step
from alignkit.runs.checkpoints import Checkpoints
from tests.test_exact import WORLD, noisy_policy
from tests.test_knobs import train_ppo
from tests.test_parts import gradients, ppo_state
from tests.test_ppo_step import PROMPTS, noisy, rows_of, slow_logprobs, weights

RLOO = PPOConfig(iterations=4, prompts_per_iteration=12, samples_per_prompt=3, minibatch_size=18, epochs=2, kl_coef=0.3,
                 advantage="rloo")
GRPO = replace(RLOO, advantage="grpo", kl_penalty="k3")
GROUPS = {"rloo": rloo_advantages, "grpo": grpo_advantages}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(prompts, responses):
    return [math.sin(len(text)) * 2 for text in responses]


def make_state(config, **options):
    policy, tokenizer = load_policy("tiny", device="cpu")
    return PPOState.start(noisy(policy, 1), tokenizer, score, PROMPTS, config, **options)


# Formulas.


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_rloo_is_the_distance_from_the_group_s_mean_times_n_over_n_minus_1(samples):
    totals = random(5 * samples, seed=samples)
    advantages = rloo_advantages(totals, samples).tolist()
    for row, value in enumerate(totals.tolist()):
        first = row - row % samples
        group = totals[first : first + samples].tolist()
        others = [other for place, other in enumerate(group) if first + place != row]
        assert advantages[row] == pytest.approx(value - sum(others) / len(others), abs=1e-12)
        assert advantages[row] == pytest.approx(samples / (samples - 1) * (value - sum(group) / samples), abs=1e-12)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("samples", [2, 5])
def test_group_advantages_sum_to_0_and_do_not_see_what_a_prompt_adds_to_all_its_rewards(kind, samples):
    totals, of_prompt = random(4 * samples, seed=1), 10 * random(4, seed=2)
    advantages = GROUPS[kind](totals, samples)
    assert advantages.view(4, samples).sum(1).abs().max() < 1e-12
    moved = GROUPS[kind](totals + of_prompt.repeat_interleave(samples), samples)
    assert torch.allclose(moved, advantages, atol=1e-9)
    assert torch.allclose(GROUPS[kind](-totals, samples), -advantages)
    assert (advantages * totals).sum() > 0  # the better response is made likelier


def test_grpo_standardises_and_does_not_see_a_prompt_s_scale_and_rloo_does():
    totals, scale = random(12, seed=3), torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64).repeat_interleave(4)
    one, scaled = (grpo_advantages(each, 4) for each in (totals, scale * totals))
    assert torch.allclose(one, scaled, atol=1e-5)
    assert one.view(3, 4).square().mean(1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert torch.allclose(rloo_advantages(scale * totals, 4), scale * rloo_advantages(totals, 4))
    pair = torch.tensor([0.3, 0.9, -5.0, -40.0])
    assert grpo_advantages(pair, 2).tolist() == pytest.approx([-1, 1, 1, -1], abs=1e-6)
    assert rloo_advantages(pair, 2).tolist() == pytest.approx([-0.6, 0.6, 35, -35])


@pytest.mark.parametrize("kind", GROUPS)
def test_equal_rewards_in_a_group_give_0_and_no_nan(kind):
    totals = torch.tensor([0.1, 0.1, 0.1, 5e3, 5e3, 5e3])  # the mean of three tenths is rounded in float32
    assert GROUPS[kind](totals, 3).abs().max() < 1e-3


@pytest.mark.parametrize("shape, samples", [((6,), 1), ((6,), 4), ((6, 2), 2), ((6,), 0)])
@pytest.mark.parametrize("kind", GROUPS)
def test_rows_that_are_no_groups_are_refused(kind, shape, samples):
    with pytest.raises(ValueError, match=rf"totals has shape \({shape[0]},.*\) and samples is {samples}, expected"):
        GROUPS[kind](torch.zeros(shape), samples)


# Expected gradients, by enumeration.


@pytest.fixture(scope="module")
def desk():
    """A reference, a policy beside it, and for two prompts the rollout of all 133 responses, its batch and rewards.

    The rewards of the second prompt are five times as large. They are multiples of ¼, so that there are ties.
    """
    reference, tokenizer = noisy_policy(1)
    policy, generator = copy.deepcopy(reference), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    texts = [WORLD.heldout_prompts[i].text for i in (0, 404)]
    ids, mask = encode_prompts(tokenizer, texts)
    space = exact.response_space(11, 2)
    response_ids, kept = space.token_ids(phrase_ids(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    where = {"phrase_ids": phrase_ids(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_phrases": 2}
    rewards = (4 * torch.randn(2, len(space), generator=generator).double()).round() / 4
    rewards[1] *= 5
    batches = []
    for row in range(2):
        rollout = Rollout(ids[row].expand(len(space), -1), mask[row].expand(len(space), -1), response_ids, kept,
                          torch.zeros(response_ids.shape), space.length < 2)
        with torch.no_grad():
            logprobs, ref_logprobs = (response_logprobs(model, rollout) for model in (policy, reference))
        zeros = torch.zeros_like(logprobs)
        batches.append(PPOBatch(rollout, logprobs, zeros, zeros, zeros, ref_logprobs))
    config = replace(RLOO, samples_per_prompt=2, max_new_tokens=2)
    state = PPOState.start(policy, tokenizer, score, texts, config, ref_policy=frozen_copy(reference))
    return {"state": state, "config": config, "ids": ids, "mask": mask, "where": where, "batches": batches,
            "rewards": rewards, "policy": policy, "reference": reference,
            "logps": exact.trie_logps(policy, ids, mask, **where),
            "ref_logps": exact.trie_logps(reference, ids, mask, **where)}


def flat(given):
    return torch.cat([gradient.flatten().double() for gradient in given])


def collected_gradient(desk):
    """What is in the policy's gradients, and an end of it."""
    parameters = list(desk["policy"].parameters())
    found = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    desk["policy"].zero_grad(set_to_none=True)
    return found


def expected_advantages(desk, row, config):
    """π(y) E[A(y)] of each response y of a prompt (133,), over all pairs of responses that a group can be."""
    batch, probability = desk["batches"][row], desk["logps"][row].exp()
    charged = config.kl_coef if config.kl_penalty == "reward" else 0.0
    rewards = token_rewards(desk["rewards"][row], batch.old_logprobs.double(), batch.ref_logprobs.double(),
                            batch.rollout.response_mask, charged)
    n = len(rewards)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n)).flatten()  # first, second, first, second, …
    advantages, _ = ppo_module._advantages(rewards[pairs], torch.zeros_like(rewards[pairs]),
                                           batch.rollout.response_mask[pairs], config)
    chance = torch.outer(probability, probability).flatten().repeat_interleave(2)
    return torch.zeros(n).double().index_add(0, pairs, chance * advantages[:, 0]) / 2


def surrogate_gradient(desk, config, prompts=(0, 1)):
    """−E[∇ loss] of the clipped surrogate in units of the objective: a sum over tokens, a mean over prompts."""
    for row in prompts:
        batch = desk["batches"][row]
        mask, weight = batch.rollout.response_mask, expected_advantages(desk, row, config)
        weighted = replace(batch, advantages=torch.where(mask, weight[:, None].float(), 0.0))
        accumulate_gradient(desk["state"], weighted, float(mask.sum()) / len(prompts),
                            replace(config, kl_penalty="reward"))
    return -collected_gradient(desk)


def penalty_gradient(desk, kind, kl_coef=1.0):
    """E[∇ loss] of the KL in the loss for prompt 0: each response with its probability, a sum over its tokens."""
    batch, config = desk["batches"][0], replace(desk["config"], kl_penalty=kind, kl_coef=kl_coef)
    for y, chance in enumerate(desk["logps"][0].exp().tolist()):
        tokens = float(batch.rollout.response_mask[y].sum())
        accumulate_gradient(desk["state"], batch[y : y + 1], chance * tokens, config)
    return collected_gradient(desk)


def exact_gradient(desk, rewards, beta, prompts=slice(None)):
    found = exact.exact_gradient(desk["policy"], desk["ids"][prompts], desk["mask"][prompts], rewards[prompts],
                                 desk["ref_logps"][prompts], beta, **desk["where"])
    return flat(found.values())


@pytest.fixture(scope="module")
def penalties(desk):
    """`penalty_gradient` of each estimator."""
    return {kind: penalty_gradient(desk, kind) for kind in ESTIMATORS}


def cosine(one, other):
    return float(one @ other / (one.norm() * other.norm()))


def assert_same(found, expected, tolerance=1e-5):
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_rloo_s_expected_gradient_is_that_of_the_objective(desk):
    truth = exact_gradient(desk, desk["rewards"], 0.3)
    assert_same(surrogate_gradient(desk, desk["config"]), truth)
    assert (truth - exact_gradient(desk, desk["rewards"], 0.0)).norm() > 0.01 * truth.norm()  # the KL counts


def test_grpo_s_expected_gradient_with_two_samples_is_that_of_winning_against_oneself(desk):
    """A = ±1: the sizes of the rewards do not count, only which of two responses has the larger one."""
    config = replace(desk["config"], advantage="grpo", kl_coef=0.0)
    probability, r = desk["logps"].exp(), desk["rewards"]
    wins = (probability[:, None, :] * (r[:, :, None] - r[:, None, :]).sign()).sum(2)  # P(R' < R) − P(R' > R)
    expected = exact.score_gradient(desk["policy"], desk["ids"], desk["mask"], probability * wins / 2, **desk["where"])
    found = surrogate_gradient(desk, config)
    assert_same(found, flat(expected.values()))
    assert 0.5 < cosine(found, exact_gradient(desk, r, 0.0)) < 0.99


def test_grpo_weighs_prompts_by_the_inverse_of_their_rewards_scale_and_rloo_does_not(desk):
    rloo, grpo = (replace(desk["config"], advantage=kind, kl_coef=0.0) for kind in GROUPS)
    truth = [exact_gradient(desk, desk["rewards"], 0.0, slice(row, row + 1)) for row in range(2)]
    found = {kind: [surrogate_gradient(desk, config, (row,)) for row in range(2)]
             for kind, config in zip(GROUPS, (rloo, grpo), strict=True)}
    sizes = {kind: [float(found[kind][row] @ truth[row] / truth[row].square().sum()) for row in range(2)]
             for kind in GROUPS}
    assert sizes["rloo"] == pytest.approx([1, 1], abs=1e-4)
    assert sizes["grpo"][0] / sizes["grpo"][1] == pytest.approx(5, rel=0.1)  # the second prompt's rewards are 5 ×
    assert all(0.8 < cosine(found["grpo"][row], truth[row]) < 0.999 for row in range(2))  # nor is it proportional


def state_kls(desk):
    """KL(π ‖ π_ref) and KL(π_ref ‖ π) of the next token, and the probability that π comes there: 12 states each.

    The states of prompt 0: before the first token, and after each phrase. Differentiable in π; probabilities too.
    """
    batch = desk["batches"][0]
    one = batch.rollout[torch.arange(1, 12)]  # a phrase and EOS
    logits, ref = response_logits(desk["policy"], one), response_logits(desk["reference"], one).detach()
    logits, ref = (torch.cat([each[:1, 0], each[:, 1]]).double() for each in (logits, ref))
    first = logits[0].log_softmax(-1)[one.response_ids[:, 0]].exp()
    visits = torch.cat([torch.ones(1).double(), first])
    forth = (logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - ref.log_softmax(-1))).sum(-1)
    assert torch.allclose(forth.detach(), exact_kl(logits.detach(), ref), atol=1e-4)
    back = (ref.log_softmax(-1).exp() * (ref.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    return forth, back, visits


def of(desk, value):
    return flat(torch.autograd.grad(value, list(desk["policy"].parameters()), allow_unused=False))


def test_k1_in_the_loss_has_expected_gradient_0(desk, penalties):
    found, kl = penalties["k1"], exact_gradient(desk, 0 * desk["rewards"], -1.0, slice(0, 1))
    assert float(found.norm() / kl.norm()) < 1e-5
    batch = desk["batches"][0]
    accumulate_gradient(desk["state"], batch[5:6], 1.0, replace(desk["config"], kl_penalty="k1", kl_coef=1.0))
    assert collected_gradient(desk).norm() > kl.norm()  # of one response it is anything but 0


def test_k2_in_the_loss_has_the_gradient_of_each_token_s_kl_where_the_policy_is(desk, penalties):
    forth, _, visits = state_kls(desk)
    assert_same(penalties["k2"], of(desk, (visits.detach() * forth).sum()))


def test_k3_in_the_loss_has_the_gradient_of_the_kl_in_the_other_direction(desk, penalties):
    found = penalties["k3"]
    forth, back, visits = state_kls(desk)
    assert_same(found, of(desk, (visits.detach() * back).sum()))
    forth, _, visits = state_kls(desk)
    wanted = of(desk, (visits.detach() * forth).sum())
    assert (found - wanted).norm() > 0.1 * wanted.norm()


def test_what_k2_leaves_out_is_what_early_tokens_do_to_later_kl(desk, penalties):
    """∇ KL(π ‖ π_ref) of whole responses = k2's + Σ_s ∇ P(s) · KL at s: the responses' KL also falls if the policy
    avoids the states where it differs from the reference."""
    whole = exact_gradient(desk, 0 * desk["rewards"], -1.0, slice(0, 1))
    found = penalties["k2"]
    forth, _, visits = state_kls(desk)
    assert_same(found + of(desk, (visits * forth.detach()).sum()), whole)
    assert float((found - whole).norm() / whole.norm()) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_coef_is_the_price_of_a_nat_in_the_loss_and_target_kl_adapts_it(desk, penalties, kind):
    state = desk["state"]
    assert_same(penalty_gradient(desk, kind, 0.3), 0.3 * penalties[kind])
    adapted = replace(desk["config"], kl_penalty=kind, kl_coef=100.0, target_kl=1.0)
    state.kl_coef, batch = 0.3, desk["batches"][0]
    accumulate_gradient(state, batch, 1.0, adapted)
    found = collected_gradient(desk)
    accumulate_gradient(state, batch, 1.0, replace(adapted, kl_coef=0.3, target_kl=None))
    state.kl_coef = None
    assert torch.equal(found, collected_gradient(desk))


# A step and an iteration, beside slow ones.


@pytest.fixture
def moved():
    """A run past its first iteration, so that policy and reference differ."""
    state = make_state(RLOO, ref_policy=frozen_copy(noisy(load_policy("tiny", device="cpu")[0], 2)))
    state.iteration = 1
    return state


@pytest.mark.parametrize("config", [RLOO, replace(RLOO, kl_penalty="k2"), GRPO, replace(GRPO, kl_penalty="reward")],
                         ids=lambda config: f"{config.advantage} {config.kl_penalty}")
def test_an_iteration_compares_the_total_rewards_of_the_responses_to_one_prompt(moved, config):
    batch, measured = collect(moved, replace(config, temperature=0.8, missing_eos_penalty=0.5))
    rows = rows_of(batch.rollout)
    totals, kls = [], []
    for prompt, response in rows:
        old, ref = (sum(slow_logprobs(model, prompt, response, 0.8)) for model in (moved.policy, moved.ref_policy))
        said = score(None, [moved.tokenizer.decode(response, skip_special_tokens=True)])[0]
        totals.append(said - 0.5 * (response[-1] != moved.tokenizer.eos_token_id))
        kls.append(old - ref)
    charged = [total - 0.3 * kl for total, kl in zip(totals, kls, strict=True)]
    rewards = charged if config.kl_penalty == "reward" else totals
    for start in range(0, len(rows), 3):
        assert len({tuple(prompt) for prompt, _ in rows[start : start + 3]}) == 1
        group = torch.tensor(rewards[start : start + 3]).double()
        for row in range(start, start + 3):
            expected = rewards[row] - float(group.sum() - rewards[row]) / 2
            if config.advantage == "grpo":
                expected = (rewards[row] - float(group.mean())) / max(float(group.std(correction=0)), 1e-4)
            n = len(rows[row][1])
            assert batch.advantages[row, :n].tolist() == pytest.approx([expected] * n, abs=2e-3)
            assert (batch.advantages[row, n:] == 0).all()
    assert (batch.old_values == 0).all() and (batch.returns == 0).all() and measured["explained_variance"] == 0
    assert measured["kl_to_ref"] == pytest.approx(sum(kls) / len(kls), abs=1e-3)
    assert measured["rlhf_reward"] == pytest.approx(sum(charged) / len(charged), abs=1e-3)  # wherever the KL is


@pytest.mark.parametrize("config", [RLOO, replace(RLOO, kl_penalty="k1"), replace(GRPO, kl_penalty="k2"), GRPO],
                         ids=lambda config: f"{config.advantage} {config.kl_penalty}")
def test_a_step_is_that_of_a_slow_loop_over_tokens(moved, config):
    """Loss: clipped surrogate with the group's advantages plus kl_coef times the KL, a mean over real tokens."""
    config = replace(config, clip_range=0.1, max_grad_norm=0.5)
    batch, _ = collect(moved, config)
    shift = torch.randn(batch.old_logprobs.shape, generator=torch.Generator().manual_seed(3))
    mask, slow = batch.rollout.response_mask, copy.deepcopy(moved.policy)
    batch = replace(batch, old_logprobs=torch.where(mask, batch.old_logprobs + 0.2 * shift, 0.0))
    surrogate, penalty, dead = [], [], 0
    for number, (prompt, response) in enumerate(rows_of(batch.rollout)):
        logprobs = slow(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        ref = slow_logprobs(moved.ref_policy, prompt, response, 1.0)
        for t, token in enumerate(response):
            a, new = float(batch.advantages[number, t]), logprobs[len(prompt) - 1 + t, token]
            ratio = (new - batch.old_logprobs[number, t]).exp()
            surrogate.append(-torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a))
            dead += (a > 0 and float(ratio.detach()) > 1.1) or (a < 0 and float(ratio.detach()) < 0.9)
            gap = new - ref[t]
            penalty.append({"reward": 0 * gap, "k1": gap, "k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}
                           [config.kl_penalty])
    loss = sum(surrogate) / len(surrogate)
    (loss + 0.3 * sum(penalty) / len(penalty)).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(slow.parameters(), 0.5))
    torch.optim.AdamW(slow.parameters(), lr=config.learning_rate, eps=1e-5, weight_decay=0.0).step()
    measured = ppo_step(moved, batch, config)
    assert measured["policy_loss"] == pytest.approx(float(loss.detach()), abs=1e-5) and measured["value_loss"] == 0
    assert measured["clip_fraction"] == pytest.approx(dead / len(surrogate)) and dead > 3
    assert measured["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert torch.allclose(weights(moved.policy), weights(slow), atol=2e-5)


@pytest.mark.parametrize("most", [1, 40, 10_000])
@pytest.mark.parametrize("options", [{"advantage": "rloo", "kl_penalty": "k2"},
                                     {"advantage": "grpo", "kl_penalty": "k3", "gradient_checkpointing": True},
                                     {"kl_penalty": "k3"}], ids=str)
def test_a_step_in_passes_is_the_step_in_one(most, options):
    samples = 2 if "advantage" in options else 1
    state, config = ppo_state(samples_per_prompt=samples, entropy_coef=0.1, **options)
    ppo_iteration(state, config)
    batch, _ = collect(state, config)
    other = copy.deepcopy(state)
    expected = ppo_step(state, batch, config)
    found = ppo_step(other, batch, replace(config, tokens_per_pass=most))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5) and found.keys() == expected.keys()
    for mine, theirs in zip(gradients(state.policy), gradients(other.policy), strict=True):
        assert (mine - theirs).abs().max() <= 1e-6 * max(1.0, float(mine.abs().max()))


# Runs.


@pytest.mark.parametrize("config", [RLOO, GRPO], ids=["rloo", "grpo"])
def test_a_run_without_a_critic_saves_and_goes_on_bit_for_bit(config, tmp_path):
    config = replace(config, target_kl=0.05, kl_horizon=100)
    state = make_state(config)
    assert state.critic is None and state.critic_optimizer is None and state.facts()["critic"] is None
    assert not [name for name in state.state_dict() if "critic" in name]
    checkpoints = Checkpoints(tmp_path / "checkpoints", state, config)
    stats = [ppo_iteration(state, config) for _ in range(2)]
    assert all(row.value_loss == 0 and row.explained_variance == 0 for row in stats)
    assert stats[0].kl_to_ref == pytest.approx(0, abs=1e-4) and stats[0].ratio_first == pytest.approx(1, abs=1e-4)
    checkpoints.save(2)
    went = list(ppo(state, config))
    again = make_state(config)
    assert Checkpoints(tmp_path / "checkpoints", again, config).resume() == 2
    assert list(ppo(again, config)) == went and len(went) == 2
    assert torch.equal(weights(again.policy), weights(state.policy))
    with pytest.raises(RunError, match="advantage"):
        other = replace(config, advantage="gae", kl_penalty="reward")
        Checkpoints(tmp_path / "checkpoints", make_state(other), other).resume()


def test_a_run_without_a_critic_that_is_killed_ends_with_the_same_bytes(monkeypatch):
    from experiments import kills  # not in the copies of the package that tests.mutants makes

    monkeypatch.setattr(kills, "PPOConfig", functools.partial(PPOConfig, advantage="grpo", kl_penalty="k3",
                                                              samples_per_prompt=2))
    (row,) = kills.measure(3, seed=2, only=("ppo",), tell=lambda _: None)
    assert row["kills"] >= 3 and row["same"] == row["runs"], row["wrong"]


def test_what_a_run_with_a_critic_saved_is_refused_by_one_without_and_the_other_way_round():
    with_critic = replace(RLOO, advantage="gae")
    made = {"without": make_state(RLOO), "with": make_state(with_critic)}
    ppo_iteration(made["with"], with_critic)
    ppo_iteration(made["without"], RLOO)
    for name, other in (("with", "without"), ("without", "with")):
        before = weights(made[other].policy)
        with pytest.raises(ValueError, match=f"saved is of a run {name} a critic, expected that of a run {other} one"):
            made[other].load_state_dict(made[name].state_dict())
        assert torch.equal(weights(made[other].policy), before) and made[other].iteration == 1


def test_a_run_is_not_steered_from_a_critic_to_none():
    state, config = make_state(RLOO), replace(RLOO, advantage="gae")
    message = "advantage is 'gae', expected 'rloo' or 'grpo' in a run that was started without a critic"
    with pytest.raises(ValueError, match=message):
        ppo_iteration(state, config)
    assert state.iteration == 0
    ppo_iteration(state, GRPO)
    with pytest.raises(ValueError, match="advantage is 'rloo', expected 'gae' in a run that was started with a critic"):
        ppo_iteration(make_state(config), RLOO)


def test_an_iteration_that_fails_half_way_is_taken_back(monkeypatch):
    state = make_state(RLOO)
    ppo_iteration(state, RLOO)
    before, steps, step = copy.deepcopy(state.state_dict()), [], state.policy_optimizer.step

    def failing():
        if steps:
            raise KeyboardInterrupt
        steps.append(step())

    monkeypatch.setattr(state.policy_optimizer, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        ppo_iteration(state, RLOO)
    assert all(torch.equal(value, state.state_dict()["policy"][name]) for name, value in before["policy"].items())
    assert state.iteration == 1


def test_a_loss_that_is_not_finite_leaves_the_weights(moved):
    batch, _ = collect(moved, GRPO)
    bad = replace(batch, ref_logprobs=torch.where(batch.rollout.response_mask, math.inf, 0.0))
    before = weights(moved.policy)
    with pytest.raises(NonFinite, match="the weights were left as they were"):
        ppo_step(moved, bad, GRPO)
    with pytest.raises(ValueError, match=r"batch.ref_logprobs is None, expected .* with kl_penalty 'k3'"):
        ppo_step(moved, replace(batch, ref_logprobs=None), GRPO)
    assert torch.equal(weights(moved.policy), before)
    ppo_step(moved, replace(batch, ref_logprobs=None), RLOO)


@pytest.mark.parametrize("config", [RLOO, GRPO], ids=["rloo", "grpo"])
def test_an_adapter_is_trained_without_a_critic(config):
    policy, tokenizer = load_policy("tiny", device="cpu")
    state = PPOState.start(add_lora(noisy(policy, 1), rank=2), tokenizer, score, PROMPTS, config)
    before = copy.deepcopy(state.policy.state_dict())
    stats = list(ppo(state, config))
    changed = {name for name, value in state.policy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora" in name for name in changed) and changed == state.state_dict()["policy"].keys()
    assert stats[0].kl_to_ref == pytest.approx(0, abs=1e-4) and stats[-1].kl_to_ref_k3 > 1e-4


def test_k1_in_the_loss_holds_nothing_back_and_k2_k3_and_the_reward_do():
    """With a high price on-policy: the KL grows as without any, or stays low. Figures of seed 0 on the desk."""
    config = PPOConfig(iterations=10, prompts_per_iteration=32, samples_per_prompt=4, minibatch_size=128, epochs=1,
                       learning_rate=3e-3, advantage="rloo", kl_coef=1.0, lr_decay=False)
    options = {"none": {"kl_coef": 0.0}, "reward": {}} | {kind: {"kl_penalty": kind} for kind in ESTIMATORS}
    kl = {name: train_ppo(replace(config, **option), 0)[0][-1].kl_to_ref_k3 for name, option in options.items()}
    assert kl["k1"] > 0.8 * kl["none"], kl
    assert max(kl["k2"], kl["reward"]) < 0.2 * kl["none"] and kl["k3"] < 0.5 * kl["none"], kl


# Settings.


@pytest.mark.parametrize("options, message", [
    ({"advantage": "reinforce"}, "advantage is 'reinforce', expected one of gae, rloo, grpo"),
    ({"kl_penalty": "k4"}, "kl_penalty is 'k4', expected one of reward, k1, k2, k3"),
    ({"advantage": "rloo"}, "samples_per_prompt is 1, expected at least 2 with advantage 'rloo', which compares"),
    ({"advantage": "grpo", "samples_per_prompt": 4, "shared_trunk": True},
     "shared_trunk is True, expected False with advantage 'grpo', which has no critic to share"),
    ({"advantage": "rloo", "samples_per_prompt": 2, "critic_warmup": 3},
     "critic_warmup is 3, expected 0 with advantage 'rloo', which has no critic"),
    ({"advantage": "rloo", "samples_per_prompt": 2, "gamma": 0.9}, "gamma is 0.9, expected 1 with advantage 'rloo'"),
    ({"kl_penalty": "k2"}, "whiten_advantages is True, expected False with kl_penalty 'k2': whitening scales the rew"),
    ({"kl_penalty": "k3", "whiten_advantages": False, "whiten_rewards": True}, "whiten_rewards is True, expected Fal"),
    ({"kl_penalty": "k3", "advantage": "rloo", "samples_per_prompt": 2, "whiten_rewards": True}, "whiten_rewards is T"),
])
def test_settings_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_group_advantages_are_never_whitened():
    states = [make_state(replace(RLOO, whiten_advantages=chosen)) for chosen in (False, True)]
    batches = [collect(state, replace(RLOO, whiten_advantages=chosen))[0] for state, chosen in
               zip(states, (False, True), strict=True)]
    assert torch.equal(batches[0].advantages, batches[1].advantages)


def test_a_critic_is_refused_where_none_is_used():
    policy, tokenizer = load_policy("tiny", device="cpu")
    with pytest.raises(ValueError, match="critic is a Linear, expected None with advantage 'rloo'"):
        PPOState.start(policy, tokenizer, score, PROMPTS, RLOO, critic=torch.nn.Linear(1, 1))
