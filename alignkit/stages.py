"""The five stages of the relay, the notebooks that make them, and the files of a run."""

STAGES = {  # the folder of RUN -> what the stage is called, what it does
    "sft": ("SFT", "imitate demonstrations"),
    "reward": ("Reward model", "learn what annotators prefer"),
    "ppo": ("PPO", "optimise that, stay near SFT"),
    "frozen": ("Freeze & evaluate", "lock the weights, measure"),
    "dpo": ("DPO", "sharpen on preference pairs"),
}
CHAIN = {  # the notebooks of the course, in order, and the folder of RUN that is each one's own
    "00_the_world": None,
    "01_sft": "sft",
    "02_reward_model": "reward",
    "03b_ppo": "ppo",
    "04_freeze_and_evaluate": "frozen",
    "05_dpo": "dpo",
}
NEEDS = {  # the stages that a notebook reads, each with its model
    "02_reward_model": ("sft",),
    "03b_ppo": ("sft", "reward"),
    "04_freeze_and_evaluate": ("sft", "reward", "ppo"),
    "05_dpo": ("sft", "reward", "frozen"),
}
CARD = "README.md"  # the model card of a frozen checkpoint, which is written after its evaluation
# records in a stage's folder, which later stages may add to
RUN_FILES = ("results.json", "metrics.jsonl", "evaluation.json", "samples.json", "suites.json", CARD)


def in_order(stages) -> list[str]:
    """Names of stages in the order of the relay; others after them, as they came."""
    return [stage for stage in STAGES if stage in stages] + [stage for stage in stages if stage not in STAGES]
