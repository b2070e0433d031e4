"""Every number that a user can turn, turned: the outcome moves as documented, over seeds, with an interval without 0.

Each row trains twice a seed, from the same policy on the same prompts, and takes the paired differences. What a knob
does to a single number exactly (steps made, rewards charged) is tested beside the formula, in test_ppo.py and
test_dpo.py.
"""

import math
import pydoc
import statistics
from dataclasses import fields, replace

import numpy as np
import pytest

from alignkit import exact
from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignkit.desk.world import SENTENCES, World, phrase_counts
from alignkit.dpo import dpo
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo

PROMPTS = [prompt.text for prompt in World(0).train_prompts[:64]]
SEEDS = range(4)
T_95 = 3.182  # Student's t with 3 degrees of freedom, two-sided 95 %
PPO = PPOConfig(iterations=5, prompts_per_iteration=32, minibatch_size=16, epochs=2, learning_rate=3e-3, kl_coef=0.05)
DPO = DPOConfig(beta=0.5, batch_size=16, epochs=3, learning_rate=3e-4, warmup=0.0)
DEMONSTRATIONS = [{"prompt": text, "completion": SENTENCES["FILLER"]} for text in PROMPTS]


def reward(prompts, responses):
    """+1 for each clarifying question, −0.5 for every other sentence."""
    counts = phrase_counts(responses)
    clarify = list(SENTENCES).index("CLARIFY")
    return (1.5 * counts[:, clarify] - 0.5 * counts.sum(1)).astype(float).tolist()


def always(prompts, responses):
    """+1 for whatever is said."""
    return [1.0] * len(responses)


def train_ppo(config, seed, reward=reward):
    """All statistics and the state, after training."""
    policy, tokenizer = load_policy("tiny", seed=seed, device="cpu")
    demonstrations = DEMONSTRATIONS if config.ptx_coef else ()
    config = replace(config, seed=seed)
    state = PPOState.start(policy, tokenizer, reward, PROMPTS, config, demonstrations=demonstrations)
    return list(ppo(state, config)), state


def said(text):
    """Log-prob that a trained policy gives to one sentence as the whole response, mean over some prompts."""
    def measure(stats, state):
        space, prompts = exact.response_space(), World(0).train_prompts[:4]
        wanted = space.texts().index(SENTENCES[text])
        return float(exact.response_logps(state.policy, state.tokenizer, list(prompts))[:, wanted].mean())
    return measure


def last(name):
    return lambda stats, state: getattr(stats[-1], name)


def distance(stats, state):
    """How far the weights went, L2."""
    both = zip(state.policy.parameters(), state.ref_policy.parameters(), strict=True)
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in both))


def length(stats, state):
    return float(state.last_rollout.response_mask.sum(1).float().mean())


def total_steps(stats, state):
    return sum(row.steps for row in stats)


def score_noise(stats, state):
    """Log of how far an iteration's mean score is from the two beside it."""
    scores = np.array([row.score for row in stats])
    return math.log(np.abs(np.diff(scores, 2)).mean())


STILL = {"learning_rate": 0.0}  # for knobs of sampling: the policy stays as it is
NOISE = {**STILL, "iterations": 16, "max_new_tokens": 1, "epochs": 1, "minibatch_size": 1024}
# name -> (a small value, a large one, what is measured, the sign of large − small, other settings of both)
PPO_KNOBS = {
    "iterations": (2, 6, last("kl_to_ref"), +1, {"lr_decay": False}),
    "prompts_per_iteration": (16, 128, score_noise, -1, NOISE),
    "samples_per_prompt": (1, 8, score_noise, -1, {**NOISE, "prompts_per_iteration": 16}),
    "max_new_tokens": (1, 4, length, +1, {"iterations": 1}),
    "temperature": (0.1, 1.0, last("entropy"), +1, {**STILL, "iterations": 1, "max_new_tokens": 1}),
    "kl_coef": (0.0, 2.0, last("kl_to_ref"), -1, {}),
    "target_kl": (0.01, 3.0, last("kl_coef"), -1, {"kl_horizon": 60}),
    "kl_horizon": (100, 10_000, last("kl_coef"), -1, {"target_kl": 1e-3}),  # a target that is exceeded
    "max_kl": (0.05, 5.0, lambda stats, state: len(stats), +1, {"kl_coef": 0.0}),
    "max_step_kl": (1e-4, 10.0, total_steps, +1, {}),
    "gamma": (
        0.3,
        1.0,
        length,
        +1,
        {"reward": always, "iterations": 10},
    ),  # what comes later is worth less: stop sooner
    "gae_lambda": (0.0, 1.0, last("score"), +1, {"critic_learning_rate": 0.0}),  # with a critic that knows nothing
    "clip_range": (0.02, 0.5, last("kl_to_ref"), +1, {"epochs": 6}),
    "entropy_coef": (0.0, 1.0, last("entropy"), +1, {"iterations": 8}),
    "ptx_coef": (0.1, 2.0, said("FILLER"), +1, {}),
    "missing_eos_penalty": (0.0, 5.0, last("eos_rate"), +1, {"max_new_tokens": 2, "iterations": 8}),
    "score_clip": (0.05, 10.0, last("rlhf_reward"), -1, {**STILL, "iterations": 1, "kl_coef": 0.0}),
    "epochs": (1, 3, last("kl_to_ref"), +1, {}),
    "minibatch_size": (8, 32, last("kl_to_ref"), -1, {}),
    "learning_rate": (5e-4, 2e-3, last("kl_to_ref"), +1, {}),
    "critic_learning_rate": (1e-5, 5e-3, last("explained_variance"), +1, {}),
    "critic_warmup": (0, 4, last("kl_to_ref"), -1, {}),
    "lr_decay": (False, True, distance, -1, {}),
}
ELSEWHERE = {  # tested by their exact effect in test_ppo.py, test_ppo_step.py and test_without_a_critic.py
    "advantage", "kl_penalty",
    "shared_trunk", "precision", "tokens_per_pass", "gradient_checkpointing", "halve_passes", "value_coef",
    "value_clip_range", "whiten_rewards", "whiten_advantages", "max_grad_norm", "seed"}


def interval(differences):
    """95 % interval of the mean, by Student's t."""
    half = T_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences) - half, statistics.mean(differences) + half


def assert_direction(low, high, sign, what):
    differences = [sign * (b - a) for a, b in zip(low, high, strict=True)]
    bottom, top = interval(differences)
    assert bottom > 0, (
        f"{what}: {'rise' if sign > 0 else 'fall'} expected, of {bottom:.4f} to {top:.4f}; {low} -> {high}"
    )


def test_the_table_names_every_knob():
    assert {f.name for f in fields(PPOConfig)} == PPO_KNOBS.keys() | ELSEWHERE
    assert not PPO_KNOBS.keys() & ELSEWHERE


@pytest.mark.parametrize("name", PPO_KNOBS)
def test_a_ppo_knob_moves_the_outcome_as_documented(name):
    small, large, measure, sign, rest = PPO_KNOBS[name]
    rewarded, rest = rest.get("reward", reward), {key: value for key, value in rest.items() if key != "reward"}
    ends = [[measure(*train_ppo(replace(PPO, **{**rest, name: value}), seed, rewarded)) for seed in SEEDS]
            for value in (small, large)]
    assert_direction(*ends, sign, name)


def pairs(seed):
    """Noisy preferences: the clarifying question is chosen three times in four."""
    rng = np.random.default_rng(seed)
    rows = []
    for text in PROMPTS:
        sides = [SENTENCES["CLARIFY"], SENTENCES[str(rng.choice(["FILLER", "REFUSE", "ANS1"]))]]
        chosen, rejected = sides if rng.random() < 0.75 else sides[::-1]
        rows.append({"prompt": text, "chosen": chosen, "rejected": rejected})
    return rows


def train_dpo(config, seed):
    policy, tokenizer = load_policy("tiny", seed=seed, device="cpu")
    return list(dpo(policy, tokenizer, pairs(seed), replace(config, seed=seed)))


DPO_KNOBS = {
    "beta": (0.1, 5.0, -1, {"epochs": 8, "learning_rate": 1e-3}),
    "label_smoothing": (0.0, 0.45, -1, {"epochs": 8, "learning_rate": 1e-3}),
    "epochs": (1, 5, +1, {}),
    "batch_size": (8, 64, -1, {}),
    "learning_rate": (3e-5, 3e-4, +1, {}),
    "max_grad_norm": (1e-9, 1.0, +1, {}),
}
DPO_ELSEWHERE = {  # in test_dpo.py
    "loss_type", "length_normalised", "max_new_tokens", "precompute_reference", "precision", "seed", "warmup",
    "tokens_per_pass", "gradient_checkpointing", "halve_passes"}


def test_the_table_names_every_knob_of_dpo():
    assert {f.name for f in fields(DPOConfig)} == DPO_KNOBS.keys() | DPO_ELSEWHERE


@pytest.mark.parametrize("name", DPO_KNOBS)
def test_a_dpo_knob_moves_the_outcome_as_documented(name):
    small, large, sign, rest = DPO_KNOBS[name]
    ends = []
    for value in (small, large):
        config = replace(DPO, **{**rest, name: value})
        margins = [statistics.mean(row.margin for row in train_dpo(config, seed)[-4:]) for seed in SEEDS]
        ends.append([margin / config.beta for margin in margins])
    assert_direction(*ends, sign, name)


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, PPOConfig, DPOConfig])
def test_help_shows_the_sentence_of_every_knob(config):
    page = " ".join(pydoc.plain(pydoc.render_doc(config)).replace("|", " ").split())
    headings = [f.metadata["group"] for f in fields(config) if f.metadata["group"]]
    assert fields(config)[0].metadata["group"] and len(headings) == len(set(headings)) > 2
    for f in fields(config):
        meaning = f.metadata["meaning"]
        assert meaning[0].isupper() or meaning[0] == '"'
        assert meaning.endswith(".") and len(meaning) > 9
        assert f"{f.name} = {f.default!r}: {meaning}" in page


def test_the_interval_is_students():
    assert interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - 2.0541, 2.5 + 2.0541), abs=1e-3)
    with pytest.raises(AssertionError, match="knob: rise expected"):
        assert_direction([0.0] * 4, [1.0, -1.0, 1.0, -0.5], +1, "knob")
