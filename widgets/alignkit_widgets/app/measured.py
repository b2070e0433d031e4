"""A run's own policies on the reward–KL plane: exact on a few prompts of the desk world, elsewhere from samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignkit import exact
from alignkit.errors import RunError
from alignkit.evaluate.evaluation import EvaluationSet, evaluate, evaluation_set
from alignkit.exact.prompts import Enumerated
from alignkit.formulas.intervals import Estimate
from alignkit.models.loading import load_policy
from alignkit.storage import read_json, write_json
from alignkit.sweeps.results import FIGURES, Point, estimate_of
from alignkit_widgets.app.playground import CONFIG, Playground, measured_file

PROMPTS, SAMPLES = 40, 4  # to measure on if the course has not left an evaluation set


def own_policies(playground: Playground) -> dict[str, Path]:
    """The run's different policies by name: the frozen checkpoint is left out beside the PPO policy that it copies."""
    found = playground.checkpoints()
    return {name: folder for name, folder in found.items() if name != "frozen" or "ppo" not in found}


def exact_points(playground: Playground, truth: Enumerated, known: dict[tuple, Point]) -> list[Point]:
    """Each policy's KL, proxy and gold on the prompts of `truth`, by enumeration of all responses.

    known: what was computed before, by folder and time of its weights; is added to. A policy of other words than the
    desk world's sentences is left out.
    """
    prompts = [prompt.text for prompt in truth.prompts]
    points = []
    for name, folder in own_policies(playground).items():
        key = (name, (folder / "config.json").stat().st_mtime_ns)
        if key not in known:
            try:
                logps = exact.response_logps(*load_policy(folder), prompts)
            except ValueError:
                continue
            values = {"kl": logps - truth.ref_logps, "proxy": truth.proxy, "gold": truth.gold}
            means = {each: float(exact.expectation(logps, table).mean()) for each, table in values.items()}
            known[key] = _point(playground, name, folder, {each: Estimate(v, None, None) for each, v in means.items()})
        points.append(known[key])
    return points


def measured_points(playground: Playground) -> tuple[list[Point], list[str]]:
    """The policies whose KL and proxy were measured on held-out prompts, with 95 % intervals, and the names of those
    that were not: from the stages' results.json and from RUN/app/measured."""
    points, missing = [], []
    for name, folder in own_policies(playground).items():
        figures = _figures(folder / "results.json") or _figures(measured_file(playground.run, name))
        if figures is None:
            missing.append(name)
        else:
            points.append(_point(playground, name, folder, figures))
    return points, missing


def measure_policies(playground: Playground, names: list[str], tell: Callable[[str], None]) -> None:
    """Draw responses of policies to held-out prompts and store their KL to SFT and proxy in RUN/app/measured.

    The course's evaluation set if the run has one. tell: is told which policy is being measured.
    """
    course_set = playground.run / "evaluation_set.json"
    evalset = EvaluationSet.load(course_set) if course_set.exists() else evaluation_set(
        playground.task, PROMPTS, SAMPLES, playground.seed)
    reference, _ = load_policy(playground.run / "sft")
    for number, name in enumerate(names, 1):
        tell(f"Measuring {name}, {number} of {len(names)}: {len(evalset.prompts)} held-out prompts, {evalset.samples} "
             "responses each …")
        folder = playground.checkpoints()[name]
        policy, tokenizer = (reference, load_policy(folder)[1]) if name == "sft" else load_policy(folder)
        measured = evaluate(policy, tokenizer, evalset, ref_policy=reference, reward=playground.scorer, name=name)
        file = measured_file(playground.run, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, measured.summary())


def _figures(file: Path) -> dict[str, Estimate] | None:
    """The figures of the plane in a results.json; None if KL or proxy is not there."""
    try:
        row = read_json(file)
    except (OSError, RunError):
        return None
    for name in list(row):
        if name.endswith("_ci95") and isinstance(row[name], list) and len(row[name]) == 2:
            row |= {f"{name}.{end}": value for end, value in enumerate(row[name])}
    found = {figure: estimate_of(row, name) for figure, name in FIGURES.items()}
    return found if found["kl"] and found["proxy"] else None


def _point(playground: Playground, name: str, folder: Path, figures: dict[str, Estimate | None]) -> Point:
    method = "ppo" if name.startswith("app/") or name == "frozen" else name
    try:
        price = (("kl_coef", read_json(folder / CONFIG)["kl_coef"]),) if name.startswith("app/") else ()
    except (OSError, RunError, KeyError):
        price = ()
    return Point(name, method, price, playground.seed, figures["kl"], figures["proxy"], figures.get("gold"), folder)
