"""Checks before anything starts: values out of range, and a model or data that cannot be used.

These checks write nothing and need no run directory. A message contains only the cause.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignkit.configs import DPOConfig, PPOConfig, RewardConfig, SFTConfig, preset
from alignkit.errors import DataError, ParameterError, RunError
from alignkit.jobs.job import Job
from alignkit.stages import CHAIN, SHARDED

CONFIGS = {"01_sft": (SFTConfig,), "02_reward_model": (RewardConfig,), "03a_ppo_by_hand": (PPOConfig,),
           "03b_ppo": (PPOConfig,), "05_dpo": (DPOConfig,), "your_model": (PPOConfig, DPOConfig)}
LEAST = {"demonstrations": 1, "pairs": 1, "heldout_pairs": 1, "scale_samples": 2, "eval_prompts": 1, "eval_samples": 1,
         "lora_rank": 0}  # minimum of parameters that no config checks
READ_THE_MODEL = ("00_the_world", "01_sft", "your_model")  # later notebooks take the model from a stage of the run
NEED_PAIRS = ("02_reward_model", "05_dpo", "your_model")
ROWS = 2000  # number of rows of the data to check


def check_shard(shard: str | None, processes: int) -> None:
    """Raise ParameterError if `shard` is not None, and unknown or of no use with so many processes."""
    if shard not in (None, *SHARDED):
        raise ParameterError(f"shard is {shard!r}, expected {' or '.join(map(repr, SHARDED))}")
    if shard and processes < 2:
        raise ParameterError(f"shard is {shard!r}, expected none with {processes} process, which has nobody to share "
                             "with; several train with --processes, or with torchrun --nproc-per-node")


def check_before(jobs: Sequence[Job]) -> None:
    """Raise ParameterError, RunError or DataError if one of the jobs cannot work, whatever its run directory contains.

    Checks the values against the configs, the model's records and its class, and the first rows of the data.
    """
    for job in jobs:
        check_values(job)
        if job.name == "your_model" and job.settings.get("refusal_prompts"):
            from alignkit.evaluate.refusals import read_refusal_prompts

            read_refusal_prompts(job.settings["refusal_prompts"])
    names = {job.name for job in jobs}
    model = next((job.settings.get("model") for job in jobs if job.name in READ_THE_MODEL), None)
    if model not in (None, "tiny"):
        of_pairs = "your_model" in names and not any(job.settings.get("reward") for job in jobs)
        check_model(model, scored="02_reward_model" in names or of_pairs)
    readings: dict[tuple, list[Job]] = {}
    for job in jobs:
        reading = tuple(job.settings.get(name) for name in ("data", "kind", "split", "columns", "skip_bad"))
        readings.setdefault(reading, []).append(job)
    for reading, readers in readings.items():
        if reading[0] not in (None, "desk"):
            _check_data(*reading, [job.name for job in readers if job.name in (*CHAIN, *NEED_PAIRS)])


def check_model(model: str | Path, *, scored: bool) -> None:
    """Raise RunError if a model cannot be read or, with scored, cannot become a reward model. No weight is read."""
    from alignkit.models import loading

    try:
        loading.check_model(model, scored=scored)
    except ValueError as error:
        raise RunError(str(error)) from None


def check_values(job: Job) -> None:
    """Raise ParameterError if a config refuses a value."""
    values = job.settings
    if type(seed := values.get("seed", 0)) is int and not 0 <= seed < 2**63:
        raise ParameterError(f"seed is {seed}, expected a whole number from 0 to 2**63 - 1; the parameter is "
                             f"{job.parameters['seed']}")
    for name, least in LEAST.items() if job.builds_beside else ():
        if type(value := values.get(name)) is int and value < least:
            raise ParameterError(f"{job.name}: {name} is {value}, expected {least} or more; the parameter is "
                                 f"{job.parameters[name]}")
    for config in CONFIGS.get(job.name, ()):
        fields = {field.name for field in dataclasses.fields(config)}
        refused = None  # the value with which the config is refused for the last time: later ones may make it fit
        for name, chosen in _one_after_the_other({name: values[name] for name in values if name in fields}):
            try:
                preset(config, values.get("model", "tiny"), **chosen)
            except ValueError as error:
                refused = refused or ParameterError(f"{job.name}: {error}; the parameter is {job.parameters[name]}")
            else:
                refused = None
        if refused:
            raise refused


def _one_after_the_other(values: Mapping[str, object]):
    """Each name of `values` with the values up to it, so that an error can name the refused value."""
    chosen: dict[str, object] = {}
    for name, value in values.items():
        chosen[name] = value
        yield name, chosen


def _check_data(data: str, kind: str | None, split: str | None, columns: str | None, skip_bad: bool,
                readers: Sequence[str]) -> None:
    """Raise DataError if the data cannot be read, has bad rows among the first ones, or is not of the kind that a
    notebook needs."""
    from alignkit.data.files import readable
    from alignkit.data.rows import check

    if not readers:  # a user's own notebook may read the data in its own way
        if os.path.exists(data):
            readable(data, split)
        return
    try:
        report = check(data, kind, split=split, columns=columns, most=ROWS)
    except DataError:
        raise
    except ValueError as error:
        raise ParameterError(str(error)) from None
    if report.problems and not skip_bad:
        bad = f"{report.bad_rows:,} bad row{'s' * (report.bad_rows > 1)} among the first {report.rows:,}"
        advice = "`alignkit check` lists all, -p skip_bad=True leaves out a tenth of the rows at most"
        raise DataError(f"{report.problems[0]}" + (f" ({bad}; {advice})" if report.bad_rows else ""))
    pairs_for = [name for name in readers if name in NEED_PAIRS]
    if report.kind in ("prompts", "demonstrations") and pairs_for:
        raise DataError(f"{data}: has {report.kind}, and notebook {pairs_for[0]} needs pairs (chosen, rejected)")
    if report.kind == "prompts" and "01_sft" in readers:
        raise DataError(f"{data}: has prompts only, and notebook 01_sft needs demonstrations (prompt, completion) or "
                        "pairs")
