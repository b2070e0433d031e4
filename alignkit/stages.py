"""The five stages of a run, the notebooks that make them, and the files of a run."""

import re

STAGES = {  # folder in RUN -> name of the stage, description
    "sft": ("SFT", "imitate demonstrations"),
    "reward": ("Reward model", "learn what annotators prefer"),
    "ppo": ("PPO", "optimise that, stay near SFT"),
    "frozen": ("Freeze & evaluate", "lock the weights, measure"),
    "dpo": ("DPO", "sharpen on preference pairs"),
}
CHAIN = {  # the notebooks of the course, in order, and each notebook's folder in RUN
    "00_the_world": None,
    "01_sft": "sft",
    "02_reward_model": "reward",
    "03a_ppo_by_hand": None,
    "03b_ppo": "ppo",
    "04_freeze_and_evaluate": "frozen",
    "05_dpo": "dpo",
}
NEEDS = {  # the stages whose models a notebook reads
    "02_reward_model": ("sft",),
    "03a_ppo_by_hand": ("sft", "reward"),
    "03b_ppo": ("sft", "reward"),
    "04_freeze_and_evaluate": ("sft", "reward", "ppo"),
    "05_dpo": ("sft", "reward", "frozen"),
}
TRAINED_TOGETHER = ("ppo", "dpo")  # the stages that several processes can train
SHARDED = ("optimizer",)  # what each of several processes can keep a part of only: the states of the optimisers
PROCESSES = "ALIGNKIT_PROCESSES"  # environment of their kernel: {"count", "shard", "notebook", "values": parameters}
CARD = "README.md"  # the model card of a frozen checkpoint, which is written after its evaluation
# records in a stage's folder, which later stages may add to
RUN_FILES = ("results.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "samples.json", "suites.json", CARD)


def has_number(notebook: str, number: str) -> bool:
    """Whether `number` refers to a notebook, given by name: `03a` means 03a_ppo_by_hand; `3`, `03` and `03b` mean
    03b_ppo.

    If two lessons share a number, the digits alone mean the one that makes a stage of RUN.
    """
    lesson, given = re.match(r"(\d+)([a-z]?)_", notebook, re.ASCII), re.fullmatch(r"(\d+)([a-z]?)", number, re.ASCII)
    if not lesson or not given or int(lesson[1]) != int(given[1]):
        return False
    return lesson[2] == given[2] or (not given[2] and bool(CHAIN.get(notebook)))


def in_order(stages) -> list[str]:
    """Names of stages in the order of training, followed by other names in their given order."""
    return [stage for stage in STAGES if stage in stages] + [stage for stage in stages if stage not in STAGES]
