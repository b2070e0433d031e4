"""Advice on a run directory, finished or not: from its stored evaluations and logs, without loading a model."""

import json
from collections.abc import Mapping
from pathlib import Path

from alignkit.errors import RunError
from alignkit.evaluate.comparison import Comparison, compare
from alignkit.evaluate.decision import Decision, decide
from alignkit.evaluate.evaluation import Evaluation
from alignkit.metrics import is_number
from alignkit.storage import read_json

EVALUATED = ("sft", "ppo", "dpo")  # the stages that make another policy; "frozen" holds a copy of PPO's


def advise_run(run: str | Path) -> Decision:
    """What to do next with the run in a directory: `decide` on RUN/sft, RUN/ppo and RUN/dpo as far as they have been
    evaluated, the reward model's report, and the logs of PPO and DPO, also unfinished ones.

    Raises RunError, saying what to do, if `run` is no run directory, if nothing in it was evaluated, or if its stages
    were evaluated on different sets.
    """
    run = Path(run)
    if not run.is_dir() or not any((run / name).exists() for name in ("run.json", "jobs.json", *EVALUATED)):
        raise RunError(f"{run} is no run directory: it has neither run.json nor jobs.json nor a stage")
    paths = {stage: run / stage / "evaluation.json" for stage in EVALUATED}
    evaluations = {stage: Evaluation.load(path) for stage, path in paths.items() if path.exists()}
    if not evaluations:
        raise RunError(f"{run}: nothing was evaluated yet: run notebook 01 there (alignkit run 01_sft --out {run}), or "
                       "continue the run")
    logs = {stage: rows_of(run, stage) for stage in ("ppo", "dpo")}
    answer = decide(_comparison(run, evaluations), stages={stage: stage for stage in evaluations},
                    reward=_report(run), history=logs, seconds=_seconds(run, evaluations))
    waiting = [f"what {stage.upper()} has become: {len(rows)} steps are logged, and it is not evaluated yet."
               for stage, rows in logs.items() if rows and stage not in evaluations]
    return Decision(answer.decision, answer.step, answer.reasons, (*answer.unknown, *waiting))


def _comparison(run: Path, evaluations: Mapping[str, Evaluation]) -> Comparison:
    try:
        return compare(evaluations)
    except ValueError as error:
        raise RunError(f"{run}: {error}. Run the later stages again with --restart") from None


def rows_of(run: str | Path, stage: str) -> list[dict]:
    """The rows that a stage has logged so far, in RUN/STAGE or, while it is made again, in RUN/STAGE.new; an unfinished
    last line is left out."""
    for folder in (f"{stage}.new", stage):
        path = Path(run) / folder / "metrics.jsonl"
        if path.exists():
            return [row for line in path.read_text(encoding="utf-8").splitlines() if (row := _row(line))]
    return []


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _report(run: Path) -> dict:
    path = run / "reward" / "results.json"
    return read_json(path) if path.exists() else {}


def _seconds(run: Path, stages: Mapping) -> dict[str, float]:
    """Seconds of training up to each stage, as far as every stage so far has recorded them."""
    known, total = {}, 0.0
    for stage in stages:
        path = run / stage / "results.json"
        spent = read_json(path).get("training_seconds") if path.exists() else None
        if stage != next(iter(stages)) and not is_number(spent):
            break
        total += spent if is_number(spent) else 0.0
        known[stage] = total
    return known
