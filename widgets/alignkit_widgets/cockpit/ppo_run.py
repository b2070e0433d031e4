"""PPO in a cockpit, as in notebook 03b and `alignkit app`: its charts, its sliders, and the content of a row."""

from __future__ import annotations

from collections import Counter

from alignkit.configs import PPOConfig
from alignkit.forward.rollout import decode_responses
from alignkit.ppo import PPOState, PPOStats, ran_away
from alignkit.task import Task

SAMPLES = 6  # number of (prompt, response) pairs per iteration for the cockpit

PPO_CHARTS = [
    ("proxy reward, SFT-sd", ["objective/scores", "objective/rlhf_reward"]),
    ("KL to SFT, nats per response", ["objective/kl"]),
    ("entropy, nats per response", ["objective/entropy"]),
    ("critic: explained variance", ["val/explained_variance"]),
]
# where gold is known and its scale too: what the score stands for, instead of what PPO maximises
GOLD_CHARTS = [("reward, SFT-sd", ["objective/scores", "gold"]), *PPO_CHARTS[1:]]


def ppo_controls(config: PPOConfig) -> dict[str, tuple]:
    """The controls of a PPO run, for a TrainingCockpit: name -> (low, high, start)."""
    return {
        "kl_coef": (0.0, max(1.0, 4 * config.kl_coef), config.kl_coef),
        "learning_rate": (config.learning_rate / 30, 10 * config.learning_rate, config.learning_rate, "log"),
        "clip_range": (0.05, 0.5, config.clip_range),
    }


def ppo_row(state: PPOState, stats: PPOStats, task: Task, config: PPOConfig,
            gold_scale: tuple[float, float] | None = None) -> dict:
    """The return value of a cockpit's `step` after an iteration: its metrics, samples, and in the desk world the
    shares, and with a `gold_scale` the gold of the sampled responses.

    state: as `ppo_iteration` left it; stats: its return value; config: its config. shares: prompt class -> behaviour ->
    share. stop: the reason to end the run if KL ran away. gold_scale: (mean, sd) of the raw gold of SFT's responses;
    the row then has "gold", in SFT-sd, which training never sees.
    """
    row, rollout = stats.log(), state.last_rollout
    del row["step"]  # the cockpit counts the steps
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
        if gold_scale is not None:
            mean, sd = gold_scale
            row["gold"] = (task.world.gold_scores(prompts, responses).mean() - mean) / sd
    return row
