"""What a sweep found: its table as points of the reward–KL plane, and which settings can be told apart.

Read from a sweep's folder, or its `table.jsonl` alone, or the recorded sweep that comes with alignkit. No model is
loaded, and no interval is made up: points that were sampled keep the intervals of their evaluation, exact ones have
none, and means over seeds have Student's.
"""

import contextlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import RunError
from alignkit.formulas.intervals import Estimate, mean_estimate
from alignkit.metrics import METRICS, is_number
from alignkit.stages import STAGES
from alignkit.storage import read_json
from alignkit.sweeps.exact import known_curves
from alignkit.sweeps.grid import is_id
from alignkit.sweeps.table import FACTS

if TYPE_CHECKING:
    from alignkit.exact.sweep import Sweep

TABLE, RECORD = "table.jsonl", "sweep.json"
METHODS = ("ppo", "dpo")  # stages whose policies are points; the frozen checkpoint is PPO's
FIGURES = {"kl": "kl_to_sft", "proxy": "proxy_mean", "gold": "gold_mean"}  # of the plane: names in results.json
RECORDED = "recorded"  # the notebook of a sweep that is recorded
MOST_NAMED = 3  # settings that a sentence names
Setting = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Point:
    """A trained policy of one job on the reward–KL plane.

    job: the job's ID; method: "ppo" or "dpo"; setting: the parameters that the sweep varies, without the seed. kl: nats
    a response; proxy, gold: SFT-sd, None where not measured. run: the job's run directory, None if it is not at hand.
    """

    job: str
    method: str
    setting: Setting
    seed: int | None
    kl: Estimate
    proxy: Estimate | None
    gold: Estimate | None
    run: Path | None = None

    @property
    def label(self) -> str:
        """The setting in words."""
        return setting_words(self.setting)


@dataclass(frozen=True)
class Place:
    """A setting in a ranking: its mean over seeds, and the best setting's lead over it.

    values: seed -> figure, of the seeds that are compared. mean: with Student's interval over these. lead: best − this,
    paired over the seeds; None for the best itself, and where no seed is common. left_out: how many of the setting's
    seeds are not compared. told: whether the lead's interval excludes 0.
    """

    setting: Setting
    values: dict[object, float]
    mean: Estimate
    lead: Estimate | None = None
    left_out: int = 0

    @property
    def told(self) -> bool:
        return self.lead is not None and self.lead.excludes_zero


@dataclass(frozen=True)
class SweepResults:
    """A sweep's table. rows: as in `table.jsonl`; parameters: the names that were given, in order.

    notebook: its name, or "course"; root: the sweep's folder, None if only a table is at hand. frontiers: seed -> the
    exact optimum "beta", "kl", "proxy", "gold" (lists), where it is known; gold_frontiers: the same for gold ("beta",
    "kl", "gold"); best_of_n: "n", "kl", "proxy", "gold"; curve_prompts: on how many prompts these are exact; no_curve:
    seed -> why it has none, where one could be expected. exact: every point was enumerated, and not only the curves.
    """

    notebook: str
    rows: tuple[dict, ...]
    parameters: tuple[str, ...]
    root: Path | None = None
    commands: tuple[str, ...] = ()
    frontiers: Mapping[int, Mapping] = field(default_factory=dict)
    gold_frontiers: Mapping[int, Mapping] = field(default_factory=dict)
    best_of_n: Mapping[int, Mapping] = field(default_factory=dict)
    curve_prompts: Mapping[int, int] = field(default_factory=dict)
    no_curve: Mapping[int, str] = field(default_factory=dict)
    exact: bool = False

    @property
    def varied(self) -> list[str]:
        """The parameters with more than one value, without the seed."""
        return [name for name in self.parameters if name != "seed" and not _of_seed(name)
                and len({_key(row.get(name)) for row in self.rows}) > 1]

    @property
    def seeds(self) -> list:
        """The seeds of the finished jobs, in order."""
        return sorted({row["seed"] for row in self.finished if is_number(row.get("seed"))})

    @property
    def finished(self) -> list[dict]:
        """The rows of the jobs that finished."""
        return [row for row in self.rows if row["status"] == "finished"]

    @property
    def failed(self) -> list[dict]:
        """The rows of the jobs that failed, died or ran out of time."""
        return [row for row in self.rows if row["status"] not in ("finished", "not run", "interrupted")]

    def points(self, method: str | None = None) -> list[Point]:
        """The policies of the finished jobs whose KL and reward were measured, of one method or all, in the table's
        order."""
        found = []
        for row in self.finished:
            for stage in METHODS if method is None else (method,):
                kl, proxy, gold = (estimate_of(row, f"{stage}.{name}") for name in FIGURES.values())
                if kl and (proxy or gold):
                    found.append(Point(row["job"], stage, self.setting(row), row.get("seed"), kl, proxy, gold,
                                       self.run_of(row)))
        return found

    def setting(self, row: Mapping) -> Setting:
        """What the sweep varied, as this row has it; a parameter that it was not given is left out."""
        return tuple((name, row[name]) for name in self.varied if row.get(name) is not None)

    def run_of(self, row: Mapping) -> Path | None:
        """The run directory of a row's job, None if it is not at hand."""
        if self.root is None or not is_id(str(row["job"])):
            return None
        place = self.root / ("jobs" if row["status"] == "finished" else "failed") / row["job"]
        return place if place.is_dir() else None

    @property
    def policy_runs(self) -> list[Path]:
        """The run directories of the jobs that are points, as far as they are at hand."""
        return list(dict.fromkeys(point.run for point in self.points() if point.run is not None))

    @property
    def own_reward(self) -> bool:
        """Whether a job was given a reward instead of the reward model of its run."""
        names = [name for name in self.parameters if name.rpartition(".")[2] == "reward"]
        return any(row.get(name) is not None for row in self.finished for name in names)

    def command_of(self, job: str, out: str | None = None) -> str:
        """The command that runs one job again, with what it begins with, in the folder `out` (default: the sweep's); of
        a recorded sweep, the command that made all of it."""
        if self.notebook == RECORDED:  # its runs begin at SFT with settings of their own
            return self.commands[0]
        row = next(row for row in self.rows if row["job"] == job)
        given = [(name, row[name]) for name in self.parameters if row.get(name) is not None]
        words = [word for name, value in given for word in ("-p", f"{name}={as_axis(value)}")]
        place = out or (str(self.root) if self.root else "runs/sweep")
        return shlex.join(["alignkit", "sweep", self._given_notebook, *words, "--out", place])

    @property
    def _given_notebook(self) -> str:
        """The notebook as the sweep's command named it: by its path, if it is not one of alignkit's."""
        for command in self.commands:
            with contextlib.suppress(ValueError):  # a quote that is not closed
                given = shlex.split(command)[2:3]
                if given and Path(given[0]).stem == self.notebook:
                    return given[0]
        return self.notebook

    def numbers(self, most: int = 6) -> list[str]:
        """Names of results to look at if no policy was measured: those that are no ends of intervals, in order."""
        known = {*self.parameters, "job", *FACTS}
        names = dict.fromkeys(name for row in self.finished for name, value in row.items() if is_number(value))
        return [name for name in names if name not in known and "_ci95" not in name][:most]


def load_results(source: "str | Path | Sweep | None" = None) -> SweepResults:
    """The results of a sweep: its folder, its `table.jsonl`, a recorded sweep or its file, or None for the one that
    comes with alignkit.

    Raises RunError that says what is missing or damaged.
    """
    if not isinstance(source, str | Path):
        return recorded_results(source or _recorded_sweep())
    path = Path(source).expanduser()
    table, root = (path / TABLE, path) if path.is_dir() else (path, path.parent)
    if table.suffix == ".json" and table.is_file():
        return recorded_results(_recorded_sweep(table))
    if not table.is_file():
        raise RunError(f"{path} holds no sweep: there is no {TABLE}; `alignkit sweep … --out {path}` makes one")
    rows = _rows(table)
    record = _record(root)
    jobs = record.get("jobs", {})
    names = dict.fromkeys(name for row in rows for name in (*jobs.get(row["job"], ()), *_before_status(row)))
    commands = [grid.get("command") for grid in record.get("grids", ()) if isinstance(grid, Mapping)]
    results = SweepResults(record.get("notebook") or "NOTEBOOK", tuple(rows), tuple(names), root.absolute(),
                           tuple(command for command in commands if isinstance(command, str)))
    return replace(results, **known_curves(results.root, results.policy_runs, results.own_reward))


def is_sweep(place: str | Path) -> bool:
    """Whether a folder is a sweep's."""
    return (Path(place) / RECORD).is_file() or (Path(place) / TABLE).is_file()


def recorded_results(sweep: "Sweep") -> SweepResults:
    """A recorded sweep as the table that `alignkit sweep` would write: a row a run; every figure is exact."""
    rows = []
    for run in sweep.runs:
        name = {"ppo": "kl_coef", "dpo": "beta"}[run.method]
        rows.append({"job": f"{run.method}_{name}={run.value:g}_seed={run.seed}", name: run.value, "seed": run.seed,
                     "status": "finished", "host": None, "seconds": run.seconds, "attempts": 1, "error": None,
                     **{f"{run.method}.{FIGURES[axis]}": getattr(run, axis) for axis in FIGURES}})
    worlds = sweep.worlds
    return SweepResults(RECORDED, tuple(rows), ("kl_coef", "beta", "seed"), None, (sweep.command,),
                        {seed: world.frontier for seed, world in worlds.items()},
                        {seed: world.gold_frontier for seed, world in worlds.items()},
                        {seed: world.best_of_n for seed, world in worlds.items()},
                        {seed: len(world.prompts) for seed, world in worlds.items()}, exact=True)


def ranking(points: Sequence[Point], figure: str = "gold") -> list[Place]:
    """The settings of one method by their mean `figure` ("proxy" or "gold") over seeds, best first.

    Seeds are worlds, so settings are compared on the seeds that all of them have; the others are left out. The lead of
    the best over each other is paired: the mean of the differences, with Student's interval. Without a common seed each
    setting has the mean of its own seeds, and there are no leads. The best of many settings was chosen by the same
    seeds, so its mean is too high by chance, and its leads are too. Raises ValueError if the points have several
    methods.
    """
    if len(methods := {point.method for point in points}) > 1:
        raise ValueError(f"points are of {sorted(methods)}, expected one method")
    by_setting: dict[Setting, dict] = {}
    for point in points:
        if (found := getattr(point, figure)) is not None:
            by_setting.setdefault(point.setting, {})[point.seed] = found.value
    shared = set.intersection(*map(set, by_setting.values())) if by_setting else set()
    places = []
    for setting, values in by_setting.items():
        compared = {seed: value for seed, value in values.items() if seed in shared} or values
        places.append(Place(setting, compared, mean_estimate(list(compared.values())),
                            left_out=len(values) - len(compared)))
    places.sort(key=lambda place: -place.mean.value)
    return [*places[:1], *(replace(each, lead=_lead(places[0].values, each.values)) for each in places[1:])]


def ranking_words(places: Sequence[Place], figure: str) -> str:
    """The ranking in two or three sentences: the best setting, what it cannot be told from, and what that is worth."""
    if not places:
        return f"No job has a measured {figure}."
    best, others = places[0], places[1:]
    name = setting_words(best.setting) or "The only setting"
    if not others:
        return f"{name} has a mean {figure} of {best.mean:+.2f} SFT-sd over {_seeds(best)}; there is no other setting."
    words = f"{name} has the highest mean {figure}, {best.mean:+.2f} SFT-sd over {_seeds(best)}. "
    if all(each.lead is None for each in others):
        return words + ("No seed is common to all settings, and means of different worlds cannot be compared: give all "
                        "of them the same seeds.")
    if any(each.left_out for each in places):
        words += f"Compared on the {_seeds(best)} that all settings have. "
    if stages := [name for name, _ in best.setting if name.partition(".")[0] in ("sft", "reward")]:
        words += (f"{' and '.join(stages)} changes the SFT policy or the reward model, and with them the units of the "
                  "rewards and the origin of KL. ")
    if len(best.values) < 2:
        return words + "One seed is no evidence: no two settings can be told apart. Add seeds with -p seed=0..4."
    close, below = [each for each in others if not each.told], [each for each in others if each.told]
    if close:
        named = "; ".join(f"{setting_words(each.setting)} (lead {each.lead:+.2f})" for each in close[:MOST_NAMED])
        words += f"It cannot be told from {named}" + (f" and {len(close) - MOST_NAMED} more"
                                                      if len(close) > MOST_NAMED else "") + ". "
    if below:
        others_below = "every other setting" if not close else f"{len(below)} other setting{'s' * (len(below) > 1)}"
        words += f"It is above {others_below} by more than chance. "
    several = f"; the intervals of the {len(others)} leads are not corrected for their number" if others[1:] else ""
    return words + f"The same seeds chose it, so its mean and its leads are too high by chance{several}."


def figure_of(points: Sequence[Point]) -> str:
    """The figure to rank by: gold where every point has it, else proxy."""
    return "gold" if points and all(point.gold is not None for point in points) else "proxy"


def estimate_of(row: Mapping, name: str) -> Estimate | None:
    """A figure of a row with its 95 % interval, if the row has one; None if the figure is not there."""
    value = row.get(name)
    if not (is_number(value) and math.isfinite(value)):
        return None
    stem = name.removesuffix("_mean").removesuffix("_rate")
    low, high = (row.get(f"{stem}_ci95.{end}") for end in (0, 1))
    return Estimate(value, low, high) if is_number(low) and is_number(high) else Estimate(value, None, None)


def setting_words(setting: Setting) -> str:
    """A setting in words: "kl_coef 0.2, epochs 4"."""
    return ", ".join(f"{name} {value:g}" if is_number(value) else f"{name} {value}" for name, value in setting)


def by_setting(points: Sequence[Point]) -> list[dict]:
    """The points as `plots.plot_sweep_plane` takes them: a dict a method and setting, with arrays over its seeds; one
    seed keeps the intervals of its evaluation."""
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        groups.setdefault((point.method, point.setting), []).append(point)
    found = []
    for (method, setting), own in groups.items():
        group: dict[str, object] = {"name": method.upper(), "label": setting_words(setting)}
        for figure in FIGURES:
            values = [getattr(point, figure) for point in own]
            if all(value is not None for value in values):
                group[figure] = [value.value for value in values]
                if len(own) == 1 and values[0].low is not None:
                    group[f"{figure}_ci95"] = (values[0].low, values[0].high)
        found.append(group)
    return found


def title_of(name: str) -> str:
    """The heading of a result's name: "ppo.kl_to_sft" -> "PPO: KL to SFT, nats"."""
    stage, _, metric = name.partition(".")
    if metric not in METRICS:
        return name
    return f"{STAGES[stage][0] if stage in STAGES else stage}: {METRICS[metric].title('SFT')}"


def as_axis(value: object) -> str:
    """A parameter's value as the text of an axis with this one value (`grid.axis`)."""
    if isinstance(value, str):
        plain = value and not set(value) & set(",'\"[]{}()\\") and ".." not in value and value == value.strip()
        return value if plain else repr(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else f"{value}"


def _seeds(place: Place) -> str:
    return f"{len(place.values)} seed{'s' * (len(place.values) != 1)}"


def _recorded_sweep(path: Path | None = None) -> "Sweep":
    from alignkit.exact.sweep import load_sweep  # a package that loads torch, which a sweep's own table does not need

    return load_sweep(path)


def _lead(best: Mapping, other: Mapping) -> Estimate | None:
    both = [seed for seed in best if seed in other]
    return mean_estimate([best[seed] - other[seed] for seed in both]) if both else None


def _rows(table: Path) -> list[dict]:
    """The rows of a table.jsonl. Raises RunError with the number of a line that is none."""
    rows = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("job"), str) or not isinstance(row.get("status"), str):
            raise RunError(f"{table}, line {number} is no row of a sweep's table (an object with job and status); "
                           "delete the file and repeat the sweep's command: it writes the tables again")
        rows.append(row)
    return rows


def _record(root: Path) -> dict:
    try:
        return read_json(root / RECORD)
    except (OSError, RunError):
        return {}


def _before_status(row: Mapping) -> list[str]:
    names = list(row)
    return names[1:names.index("status")]


def _of_seed(name: str) -> bool:
    return name.rpartition(".")[2] == "seed"


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


