"""PPO in a cockpit, the same in notebook 03b and in `alignkit app`: its charts, its sliders, and what a row holds."""

from __future__ import annotations

from collections import Counter

from alignkit.configs import PPOConfig
from alignkit.forward.rollout import decode_responses
from alignkit.ppo import PPOState, PPOStats, ran_away
from alignkit.task import Task

SAMPLES = 6  # (prompt, response) pairs of an iteration that the cockpit gets to see

PPO_CHARTS = [
    ("score and score − β·KL, SFT-sd", ["objective/scores", "objective/rlhf_reward"]),
    ("KL to SFT, nats a response", ["objective/kl"]),
    ("entropy, nats a response", ["objective/entropy"]),
    ("critic: explained variance", ["val/explained_variance"]),
]


def ppo_controls(config: PPOConfig) -> dict[str, tuple]:
    """What can be steered in a PPO run, as a TrainingCockpit takes it: name -> (low, high, start)."""
    return {
        "kl_coef": (0.0, max(1.0, 4 * config.kl_coef), config.kl_coef),
        "learning_rate": (config.learning_rate / 30, 10 * config.learning_rate, config.learning_rate, "log"),
        "clip_range": (0.05, 0.5, config.clip_range),
    }


def ppo_row(state: PPOState, stats: PPOStats, task: Task, config: PPOConfig) -> dict:
    """What a cockpit's `step` returns after an iteration: its metrics, samples, and in the desk world the shares.

    state: as `ppo_iteration` left it; stats: what that returned; config: what it was given. shares: class of prompt ->
    behaviour -> share. stop: why the run should end, if KL ran away.
    """
    row, rollout = stats.log(), state.last_rollout
    del row["step"]  # the cockpit counts
    row["stop"] = ran_away(stats, config)
    prompts = [state.tokenizer.decode(ids[kept], skip_special_tokens=True)
               for ids, kept in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    responses = decode_responses(state.tokenizer, rollout)
    row["samples"] = list(zip(prompts, responses, strict=True))[:SAMPLES]
    if task.world is not None:
        counts = {kind: Counter() for kind in task.strata()}
        for prompt, behaviour in zip(prompts, task.world.behaviours(prompts, responses), strict=True):
            counts[task.world.find(prompt).kind][behaviour] += 1
        row["shares"] = {kind: {behaviour: n / seen.total() for behaviour, n in seen.items()}
                         for kind, seen in counts.items() if seen}
    return row
