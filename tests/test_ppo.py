"""PPO: every formula against a slow float64 reference, the optimum it must reach, its invariants and its knobs."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from alignkit import ppo as ppo_module
from alignkit.configs import PPOConfig
from alignkit.desk.tiny import phrase_ids, tiny_reward_model
from alignkit.desk.world import SENTENCES, World
from alignkit.errors import InvariantError, NonFinite
from alignkit.formulas.losses import adapt_kl_coef, clipped, gae, policy_loss, token_rewards, value_loss
from alignkit.formulas.randomness import seeded
from alignkit.formulas.tokens import masked_mean
from alignkit.forward.rollout import encode_prompts
from alignkit.forward.sampling import sample
from alignkit.models.adapters import add_lora, frozen_copy
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOBatch, PPOState, ppo, ppo_iteration, ppo_step

PROMPTS = [prompt.text for prompt in World(0).train_prompts[:64]]
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False], [False] * 4])


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def slow_gae(rewards, values, length, gamma, gae_lambda):
    """A_t = Σ_l (γλ)^l δ_{t+l} by its definition, for one response."""
    def value(t):
        return values[t] if t < length else 0.0
    delta = [rewards[t] + gamma * value(t + 1) - values[t] for t in range(length)]
    return [sum((gamma * gae_lambda) ** (s - t) * delta[s] for s in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma,gae_lambda", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_its_definition_on_ragged_responses(gamma, gae_lambda):
    rewards, values = random(4, 4, seed=1), random(4, 4, seed=2)
    advantages, returns = gae(rewards, values, MASK, gamma, gae_lambda)
    for row, length in enumerate([4, 2, 1, 0]):
        expected = slow_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, gae_lambda)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[row, :length].tolist(), strict=True)], abs=1e-12
        )
    assert (advantages[~MASK] == 0).all() and (returns[~MASK] == 0).all()


def test_gae_with_lambda_1_is_return_to_go_minus_value():
    rewards, values = random(1, 4, seed=3), random(1, 4, seed=4)
    advantages, returns = gae(rewards, values, MASK[:1], 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns, to_go) and torch.allclose(advantages, to_go - values)


def test_gae_names_the_argument_whose_shape_is_wrong():
    with pytest.raises(ValueError, match=r"values has shape \(2,\), expected \(2, 3\) \(the shape of rewards\)"):
        gae(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3, dtype=torch.bool))


def test_policy_loss_equals_a_slow_reference_and_its_gradient_is_zero_exactly_where_clipped():
    logprobs = (random(6, 5, seed=5, scale=0.4)).requires_grad_()
    old, advantages = random(6, 5, seed=6, scale=0.1), random(6, 5, seed=7)
    loss = policy_loss(logprobs, old, advantages, 0.2)
    found = loss.detach()
    for b in range(6):
        for t in range(5):
            ratio, a = math.exp(float(logprobs[b, t].detach() - old[b, t])), float(advantages[b, t])
            assert float(found[b, t]) == pytest.approx(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a), abs=1e-12)
    loss.sum().backward()
    dead = clipped(logprobs, old, advantages, 0.2)
    assert 0 < dead.float().mean() < 1
    assert torch.equal(logprobs.grad == 0, dead)
    assert torch.equal(
        logprobs.grad[~dead] < 0, advantages[~dead] > 0
    )  # a good token becomes likelier when the loss falls


def test_policy_loss_at_ratio_1_has_the_policy_gradient():
    logprobs = random(3, 4, seed=8).requires_grad_()
    advantages = random(3, 4, seed=9)
    policy_loss(logprobs, logprobs.detach(), advantages).sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)


def test_value_loss_equals_a_slow_reference():
    values, old, returns = random(4, 4, seed=10), random(4, 4, seed=11), random(4, 4, seed=12)
    loss = value_loss(values, old, returns, 0.3)
    for b in range(4):
        for t in range(4):
            v, o, r = float(values[b, t]), float(old[b, t]), float(returns[b, t])
            near = o + min(max(v - o, -0.3), 0.3)
            assert float(loss[b, t]) == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), abs=1e-12)
    assert torch.allclose(value_loss(values, old, returns, math.inf), 0.5 * (values - returns) ** 2)


def test_token_rewards_charge_kl_everywhere_and_add_the_score_once_at_the_last_token():
    logprobs, ref = random(4, 4, seed=13), random(4, 4, seed=14)
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    rewards = token_rewards(scores, logprobs, ref, MASK, 0.5)
    for row, length in enumerate([4, 2, 1, 0]):
        for t in range(4):
            expected = -0.5 * float(logprobs[row, t] - ref[row, t]) * (t < length) + float(scores[row]) * (
                t == length - 1
            )
            assert float(rewards[row, t]) == pytest.approx(expected, abs=1e-12)
    assert (
        float(token_rewards(scores, logprobs, ref, MASK, 0.0).sum()) == 6.0
    )  # the empty response has no token to reward


def test_the_adaptive_controller_is_zieglers():
    assert adapt_kl_coef(0.1, kl=12.0, target_kl=6.0, responses=100, horizon=1000) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, kl=6.3, target_kl=6.0, responses=100, horizon=1000) == pytest.approx(
        0.1 * (1 + 0.05 * 0.1)
    )
    assert adapt_kl_coef(0.1, kl=0.0, target_kl=6.0, responses=100, horizon=1000) == pytest.approx(0.1 * 0.98)


def favour(name, other=-1.0):
    """A reward of 1 for responses that contain the sentence, `other` for the rest."""
    return lambda prompts, responses: [1.0 if SENTENCES[name] in text else other for text in responses]


CLARIFYING = favour("CLARIFY")


def make_state(config, reward=CLARIFYING, seed=0, **options):
    policy, tokenizer = load_policy("tiny", seed=seed)
    return PPOState.start(policy, tokenizer, reward, PROMPTS, config, **options)


SMALL = PPOConfig(iterations=3, prompts_per_iteration=32, minibatch_size=16, epochs=4)


def test_one_token_ppo_reaches_the_closed_form_optimum():
    """π*(y) ∝ π_ref(y) exp(r(y)/β) over eleven sentences and the empty response, one prompt, one token."""
    policy, tokenizer = load_policy("tiny", seed=3)
    values = {"": 0.3, **{text: 0.25 * math.sin(1.7 * i) + 0.1 * i for i, text in enumerate(SENTENCES.values())}}
    config = PPOConfig(
        iterations=60,
        prompts_per_iteration=1024,
        minibatch_size=512,
        max_new_tokens=1,
        kl_coef=0.4,
        epochs=2,
        learning_rate=1e-3,
        critic_learning_rate=5e-3,
        lr_decay=True,
    )
    critic = tiny_reward_model(tokenizer, hidden=16)
    state = PPOState.start(policy, tokenizer, lambda p, texts: [values[t] for t in texts], ["?"], config, critic=critic)
    ids = [*phrase_ids(tokenizer), tokenizer.eos_token_id]
    r = torch.tensor([*list(values.values())[1:], values[""]], dtype=torch.float64)

    def logprobs(model):
        prompt, mask = encode_prompts(tokenizer, ["?"])
        with torch.no_grad():
            return model(input_ids=prompt, attention_mask=mask).logits[0, -1, ids].double().log_softmax(-1)

    reference = logprobs(state.ref_policy)
    best = (reference + r / config.kl_coef).log_softmax(-1)
    assert float((best.exp() * (best - reference)).sum()) > 0.1  # there is something to learn
    for _ in ppo(state, config):
        pass
    reached = logprobs(policy)
    assert float((best.exp() * (best - reached)).sum()) < 1e-3
    assert float((reached.exp() * (reached - best)).sum()) < 1e-3


def test_the_first_iteration_starts_from_ratio_1_and_kl_0():
    stats = ppo_iteration(make_state(SMALL), SMALL)
    assert stats.kl_to_ref == pytest.approx(0, abs=1e-5) and stats.kl_to_ref_k3 == pytest.approx(0, abs=1e-5)
    assert stats.ratio_first == pytest.approx(1, abs=1e-4)
    assert stats.rlhf_reward == pytest.approx(stats.score, abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_reference_stops_the_run_and_says_so(precision):
    config = replace(SMALL, precision=precision)
    state = make_state(config, ref_policy=frozen_copy(sharp(load_policy("tiny", seed=9)[0])))
    with pytest.raises(
        InvariantError,
        match="step 0: .log π − log π_ref. is .* The reference is not the policy that training starts from",
    ):
        ppo_iteration(state, config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sampler_that_does_not_score_alike_stops_the_run(precision, monkeypatch):
    def warmer(*args, temperature, **options):
        return sample(*args, temperature=1.7, **options)
    monkeypatch.setattr(ppo_module, "sample", warmer)
    config = replace(SMALL, precision=precision)
    state = make_state(config)
    sharp(state.policy)
    with pytest.raises(InvariantError, match="step 0: the ratio π / π_old is off before any step"):
        ppo_iteration(state, config)


def sharp(policy):
    """The policy with opinions: a fresh one says everything about equally often, at any temperature."""
    with torch.no_grad():
        policy.lm_head.weight.mul_(8)
    return policy


def test_logged_kl_is_the_kl_that_is_charged():
    config = replace(SMALL, kl_coef=0.7, learning_rate=5e-3)
    state = make_state(config)
    ppo_iteration(state, config)
    stats = ppo_iteration(state, config)
    assert abs(stats.kl_to_ref) > 0.01  # k1 can be negative; it is what is charged all the same
    assert stats.rlhf_reward == pytest.approx(stats.score - 0.7 * stats.kl_to_ref, abs=1e-4)


def test_only_policy_and_critic_are_trained():
    state = make_state(SMALL)
    before = {name: copy.deepcopy(model.state_dict()) for name, model in
              (("policy", state.policy), ("critic", state.critic), ("ref", state.ref_policy))}
    ppo_iteration(state, SMALL)
    changed = {name: any(not torch.equal(value, model.state_dict()[key]) for key, value in before[name].items())
               for name, model in (("policy", state.policy), ("critic", state.critic), ("ref", state.ref_policy))}
    assert changed == {"policy": True, "critic": True, "ref": False}


def run(config, reward=CLARIFYING, seed=0, **options):
    state = make_state(config, reward, seed, **options)
    return state, list(ppo(state, config))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = [
        torch.cat([p.flatten() for p in run(replace(SMALL, seed=seed))[0].policy.parameters()]) for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_iteration_repeated_on_the_same_state_repeats_exactly():
    state = make_state(SMALL)
    ppo_iteration(state, SMALL)
    again = copy.deepcopy(state)
    assert ppo_iteration(state, SMALL) == ppo_iteration(again, SMALL)
    for one, two in zip(state.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_saved_state_goes_on_as_the_run_did_also_in_a_fresh_run():
    config = replace(SMALL, iterations=5, target_kl=0.05, kl_horizon=100)
    state = make_state(config)
    ppo_iteration(state, config)
    saved = copy.deepcopy(state.state_dict())
    went = [ppo_iteration(state, config) for _ in range(2)]
    assert went[0].kl_coef != config.kl_coef, "the adaptive coefficient is part of the state"
    for again in (state, make_state(config)):
        again.load_state_dict(copy.deepcopy(saved))
        assert [ppo_iteration(again, config) for _ in range(2)] == went


def test_a_saved_state_holds_what_is_trained_and_is_refused_by_another_model():
    policy, tokenizer = load_policy("tiny")
    state = PPOState.start(add_lora(policy, rank=2), tokenizer, favour("CLARIFY"), PROMPTS, SMALL)
    saved = state.state_dict()
    assert saved["policy"] and all("lora" in name for name in saved["policy"])
    assert {"embed_tokens" in name for name in saved["critic"]} == {True, False}
    with pytest.raises(ValueError, match=r"saved\['policy'\] is of another model; one of the two has no .*lora"):
        make_state(SMALL).load_state_dict(saved)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_before_anything_changes(bad):
    state = make_state(SMALL, lambda prompts, responses: [0.0] * 7 + [bad] + [0.0] * (len(responses) - 8))
    before = copy.deepcopy(state.policy.state_dict())
    with pytest.raises(NonFinite, match="for response 7 of iteration 1; nothing was changed"):
        ppo_iteration(state, SMALL)
    assert all(torch.equal(value, state.policy.state_dict()[key]) for key, value in before.items())


def test_a_loss_that_is_not_finite_leaves_the_weights():
    state = make_state(SMALL)
    ids, mask = encode_prompts(state.tokenizer, PROMPTS[:4])
    rollout = sample(state.policy, ids, mask, max_new_tokens=4, eos_token_id=2, pad_token_id=0, generator=seeded(0))
    zeros = torch.zeros_like(rollout.logprobs)
    batch = PPOBatch(rollout, rollout.logprobs, zeros, torch.where(rollout.response_mask, math.nan, 0.0), zeros)
    before = copy.deepcopy(state.policy.state_dict())
    with pytest.raises(NonFinite, match="the weights were left as they were"):
        ppo_step(state, batch, SMALL)
    assert all(torch.equal(value, state.policy.state_dict()[key]) for key, value in before.items())


def test_a_reward_with_a_wrong_number_of_scores_is_refused():
    with pytest.raises(ValueError, match=r"reward returned shape \(3,\), expected \(32,\): one score a response"):
        ppo_iteration(make_state(SMALL, lambda prompts, responses: [0.0] * 3), SMALL)


def test_equal_scores_give_no_nan_and_almost_no_movement():
    _state, stats = run(replace(SMALL, kl_coef=0.0), lambda prompts, responses: [1.0] * len(responses))
    assert all(math.isfinite(value) for row in stats for value in row.log().values())


def test_ppo_learns_what_is_rewarded():
    _, stats = run(
        replace(SMALL, iterations=12, prompts_per_iteration=128, minibatch_size=64, kl_coef=0.05, learning_rate=2e-3)
    )
    assert stats[-1].score > stats[0].score + 0.3 and stats[-1].kl_to_ref > 0.1


# Every knob does what its docs say.

LONG = replace(SMALL, iterations=8, prompts_per_iteration=128, minibatch_size=64, learning_rate=2e-3, kl_coef=0.05)


def test_kl_coef_keeps_the_policy_close():
    last = [run(replace(LONG, kl_coef=coef))[1][-1].kl_to_ref for coef in (0.0, 0.3, 3.0)]
    assert last[0] > 1.5 * last[1] > 1.5 * last[2]


def test_target_kl_moves_the_coefficient_towards_the_target():
    _, high = run(replace(LONG, target_kl=0.001, kl_horizon=300))
    _, low = run(replace(LONG, target_kl=50.0, kl_horizon=300))
    assert high[-1].kl_coef > high[0].kl_coef == 0.05 == low[0].kl_coef > low[-1].kl_coef


def test_max_kl_stops_the_run_and_max_step_kl_leaves_steps_out():
    _, stats = run(replace(LONG, kl_coef=0.0, max_kl=0.05))
    assert len(stats) < LONG.iterations and stats[-1].kl_to_ref > 0.05 >= stats[-2].kl_to_ref
    _, some = run(replace(LONG, iterations=1, epochs=4, max_step_kl=1e-9))
    assert some[0].steps == 2  # one epoch of two minibatches instead of four


def test_epochs_and_minibatches_make_the_steps_they_say():
    assert run(replace(SMALL, iterations=1, epochs=3, minibatch_size=10))[1][0].steps == 3 * 4


def test_samples_per_prompt_repeats_prompts():
    state, _ = run(replace(SMALL, iterations=1, prompts_per_iteration=8, samples_per_prompt=4))
    prompts = state.last_rollout.prompt_ids
    assert len(prompts) == 32
    assert all(torch.equal(prompts[4 * i], prompts[4 * i + k]) for i in range(8) for k in range(4))


def test_prompts_are_drawn_evenly_from_the_strata():
    config = replace(SMALL, iterations=1)
    policy, tokenizer = load_policy("tiny")
    seen = []

    def reward(prompts, responses):
        return (seen.extend(prompts), [0.0] * len(prompts))[1]
    state = PPOState.start(policy, tokenizer, reward, [PROMPTS[:60], PROMPTS[60:61]], config)
    ppo_iteration(state, config)
    assert sum(text == PROMPTS[60] for text in seen) == 16


def test_missing_eos_penalty_is_charged_once_and_only_without_eos():
    config = replace(SMALL, iterations=1, kl_coef=0.0, missing_eos_penalty=0.7, max_new_tokens=2)
    _state, stats = run(config, lambda prompts, responses: [1.0] * len(responses))
    unfinished = 1 - stats[0].eos_rate
    assert 0 < unfinished < 1
    assert stats[0].score == 1.0 and stats[0].rlhf_reward == pytest.approx(1 - 0.7 * unfinished, abs=1e-5)


def test_score_clip_limits_what_is_learned_from():
    _, stats = run(
        replace(SMALL, iterations=1, kl_coef=0.0, score_clip=2.0), lambda prompts, responses: [9.0] * len(responses)
    )
    assert stats[0].score == 9.0 and stats[0].rlhf_reward == pytest.approx(2.0, abs=1e-5)


def test_entropy_bonus_keeps_entropy_up():
    ends = [run(replace(LONG, iterations=10, entropy_coef=coef))[1][-1].entropy for coef in (0.0, 1.0)]
    assert ends[1] > ends[0] + 0.1


def test_ptx_mix_pulls_towards_the_demonstrations():
    demonstrations = [{"prompt": text, "completion": SENTENCES["FILLER"]} for text in PROMPTS]
    config = replace(LONG, ptx_coef=1.0)
    _, stats = run(config, demonstrations=demonstrations)
    assert stats[0].ptx_loss > 0 and stats[-1].ptx_loss < stats[0].ptx_loss - 0.3
    with pytest.raises(ValueError, match="ptx_coef is 1.0 but there are no demonstrations"):
        make_state(config)


def test_learning_rates_of_0_change_nothing_and_lr_decay_ends_low():
    state = make_state(replace(SMALL, learning_rate=0.0, critic_learning_rate=0.0))
    before = [p.clone() for p in (*state.policy.parameters(), *state.critic.parameters())]
    list(ppo(state, replace(SMALL, learning_rate=0.0, critic_learning_rate=0.0)))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (*state.policy.parameters(), *state.critic.parameters()), strict=True)
    )
    state, _ = run(replace(SMALL, lr_decay=True))
    assert state.policy_optimizer.param_groups[0]["lr"] == pytest.approx(SMALL.learning_rate / 3)


def test_critic_warmup_trains_the_critic_alone():
    config = replace(SMALL, critic_warmup=3)
    state = make_state(config)
    before = [p.clone() for p in state.policy.parameters()]
    critic = [p.clone() for p in state.critic.parameters()]
    list(ppo(state, config))
    assert all(torch.equal(a, b) for a, b in zip(before, state.policy.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(critic, state.critic.parameters(), strict=True))


def test_clip_range_bounds_how_far_one_iteration_goes():
    config = replace(LONG, iterations=1, epochs=8, learning_rate=5e-3, kl_coef=0.0)
    tight, wide = (run(replace(config, clip_range=c))[1][0] for c in (0.02, 10.0))
    assert tight.clip_fraction > 0.2 and wide.clip_fraction < 0.05
    assert tight.kl_to_old < wide.kl_to_old


def test_value_clip_range_holds_the_critic_back():
    config = replace(LONG, iterations=1, epochs=8, critic_learning_rate=2e-2)

    def movement(clip):
        state = make_state(replace(config, value_clip_range=clip))
        before = [p.clone() for p in state.critic.parameters()]
        ppo_iteration(state, replace(config, value_clip_range=clip))
        return sum(float((a - b).abs().sum()) for a, b in zip(before, state.critic.parameters(), strict=True))

    assert movement(1e-3) != movement(math.inf)


def test_temperature_is_that_of_sampling_and_of_scoring():
    entropies = [run(replace(SMALL, iterations=1, temperature=t, max_new_tokens=1))[1][0].entropy for t in (0.3, 1.0)]
    assert entropies[0] < entropies[1]  # and no InvariantError: the trainer divides by the same temperature


def test_whiten_rewards_scales_but_does_not_shift():
    state, stats = run(replace(SMALL, whiten_rewards=True))
    assert all(math.isfinite(v) for row in stats for v in row.log().values())
    plain = run(SMALL)[0]
    assert any(not torch.equal(a, b) for a, b in zip(state.policy.parameters(), plain.policy.parameters(), strict=True))


def test_gamma_and_lambda_and_whitening_reach_the_advantages(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        ppo_module,
        "ppo_step",
        lambda state, batch, config, **more: (
            (seen.setdefault("batch", batch)
            and None)
            or {
                k: 0.0
                for k in (
                    "policy_loss",
                    "value_loss",
                    "ptx_loss",
                    "grad_norm",
                    "clip_fraction",
                    "kl_to_old",
                    "ratio",
                    "ratio_max",
                )
            }
        ),
    )

    def advantages(**options):
        seen.clear()
        config = replace(SMALL, minibatch_size=32, **options)
        ppo_iteration(make_state(config), config)
        return seen["batch"]
    white = advantages()
    mask = white.rollout.response_mask
    assert float(masked_mean(white.advantages, mask)) == pytest.approx(0, abs=1e-5)
    assert float(masked_mean(white.advantages.square(), mask)) == pytest.approx(1, abs=1e-3)
    raw = advantages(whiten_advantages=False)
    assert float(masked_mean(raw.advantages.square(), mask)) != pytest.approx(1, abs=1e-2)
    for option in ({"gamma": 0.5}, {"gae_lambda": 0.0}):
        assert not torch.allclose(advantages(whiten_advantages=False, **option).advantages, raw.advantages)


def test_max_grad_norm_limits_the_step():
    norms = []
    for limit in (1e-3, 1e3):
        config = replace(SMALL, iterations=1, epochs=1, minibatch_size=32, max_grad_norm=limit)
        state = make_state(config)
        ppo_iteration(state, config)
        norms.append(
            float(torch.cat([p.grad.flatten() for p in state.policy.parameters() if p.grad is not None]).norm())
        )
    assert norms[0] == pytest.approx(1e-3, rel=1e-3) and norms[1] > 1e-2


@pytest.mark.parametrize(
    "name,value",
    [
        ("iterations", 0),
        ("epochs", 0),
        ("kl_coef", -1.0),
        ("gamma", 1.5),
        ("temperature", 0.0),
        ("clip_range", -0.1),
        ("learning_rate", math.nan),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        PPOConfig(**{name: value})


def test_every_stat_has_a_plot_name_and_a_meaning():
    stats = run(replace(SMALL, iterations=1))[1][0]
    assert list(stats.log())[:4] == ["step", "objective/scores", "objective/rlhf_reward", "objective/kl"]
    assert all(f.metadata["meaning"] for f in stats.__dataclass_fields__.values())
