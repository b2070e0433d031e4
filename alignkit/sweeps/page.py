"""sweep.html: what a sweep found, on one page, and the text that `alignkit compare` prints of it.

The page has no script. A point of the plane links to the job's run directory beside the page.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from alignkit import plots
from alignkit.formulas.intervals import Estimate, mean_estimate
from alignkit.metrics import duration, is_number
from alignkit.pages.render import Picture, picture, render
from alignkit.safe_text import one_line
from alignkit.storage import write_atomically
from alignkit.sweeps.curves import sweep_curves
from alignkit.sweeps.exact import write_curves
from alignkit.sweeps.results import (
    FIGURES,
    Point,
    SweepResults,
    by_setting,
    estimate_of,
    figure_of,
    load_results,
    ranking,
    ranking_words,
    setting_words,
    title_of,
)

PAGE = "sweep.html"
MOST_ROWS, MOST_PLACES, MOST_SPOTS, MOST_LABELS = 400, 15, 400, 24
TITLES = {"kl": "KL to SFT, nats", "proxy": "proxy, SFT-sd", "gold": "gold, SFT-sd"}


def build_page(root: str | Path) -> Path:
    """Write DIR/sweep.html from the sweep's tables; returns its path. Raises RunError if DIR holds no sweep."""
    root = Path(root)
    results = load_results(root)
    points = results.points()
    methods = list(dict.fromkeys(point.method for point in points))
    done, failed = results.finished, results.failed
    page = render(
        "sweep.html", name=root.absolute().name,
        facts={"notebook": results.notebook, "jobs": len(results.rows), "finished": len(done), "failed": len(failed),
               "seeds": ", ".join(map(str, results.seeds[:20])) or "not varied"},
        failures=[{**{name: row.get(name) or "" for name in ("job", "status", "error")}, "link": _link(results, row)}
                  for row in failed],
        planes=[_plane(results, points)] if points else [],
        sections=[_section(results, [point for point in points if point.method == method]) for method in methods]
        or _numbers(results),
        jobs=[_row(results, row, methods) for row in results.rows[:MOST_ROWS]], columns=_columns(methods),
        left_out=max(0, len(results.rows) - MOST_ROWS), commands=list(results.commands),
    )
    write_atomically(root / PAGE, page)
    return root / PAGE


def report_sweep(root: str | Path, say: Callable[[str], object]) -> Path:
    """Enumerate the exact frontiers that the sweep of the tiny desk model lacks, and write DIR/sweep.html; returns its
    path. say: is told what takes time. Raises RunError if DIR holds no sweep."""
    results = load_results(root)
    write_curves(results.root, results.policy_runs, results.own_reward, say)
    return build_page(root)


def compared(results: SweepResults) -> str:
    """A sweep's settings as a table for the terminal: a row a setting with means over seeds, best first, and what the
    best cannot be told from."""
    lines = []
    points = results.points()
    for method in dict.fromkeys(point.method for point in points):
        own = [point for point in points if point.method == method]
        figure = figure_of(own)
        places = ranking(own, figure)
        means = {place.setting: place for place in places}
        table = [["setting", "seeds", *(TITLES[name] for name in FIGURES), f"lead of the best, {figure}"]]
        for place in places:
            cells = [_mean([point for point in own if point.setting == place.setting and point.seed in place.values],
                           name) for name in FIGURES]
            lead = means[place.setting].lead
            table.append([one_line(setting_words(place.setting), 60), str(len(place.values)), *cells,
                          "" if lead is None else f"{lead:+.2f}{'' if place.told else '  not told apart'}"])
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
        lines += [method.upper(), *("  ".join(row).rstrip() for row in padded),
                  one_line(ranking_words(places, figure), 2000), ""]
    if not points:
        lines += [f"{len(results.finished)} jobs finished, and none measured KL and reward as `ppo` and `dpo` do; "
                  "their numbers are in table.csv", ""]
    lines += [f"{one_line(row['job'], 200)}: {row['status']}: {one_line(row.get('error') or '', 300)}"
              for row in results.failed]
    brackets = "In brackets: 95 % intervals over seeds (Student's t); with one seed, those of its evaluation."
    return "\n".join([*lines, *([brackets] if points else [])]).rstrip()


def plane_of(results: SweepResults, points: Sequence[Point], seed: int | None = None):
    """The reward–KL plane of a sweep's points as Axes, with the curves of one seed (`curves.sweep_curves`)."""
    curves = sweep_curves(results, seed)
    groups = by_setting(points)
    if len(groups) > MOST_LABELS:
        groups = [{**group, "label": ""} for group in groups]
    title = "Every job on the reward–KL plane"
    title += "" if curves.world is None else f"; exact curves of world {curves.world}"
    return plots.plot_sweep_plane(groups, **curves.drawn, title=title)


def effects_of(results: SweepResults, method: str):
    """Small multiples of one method: gold, proxy and KL against each parameter that was varied; None without one."""
    figures = {f"{method}.{FIGURES[name]}": TITLES[name] for name in ("gold", "proxy", "kl")}
    return _effects(results, figures)


def places_of(points: Sequence[Point], figure: str) -> dict[str, dict]:
    """The ranking as `plots.plot_ranking` takes it, the first MOST_PLACES."""
    return {setting_words(place.setting) or "the only setting": {
        "values": list(place.values.values()), "mean": place.mean.value, "low": place.mean.low,
        "high": place.mean.high, "told": place.told} for place in ranking(points, figure)[:MOST_PLACES]}


def _section(results: SweepResults, points: Sequence[Point]) -> dict:
    """The part of the page about one method."""
    method, figure = points[0].method, figure_of(points)
    pictures = [plots.plot_ranking(places_of(points, figure), TITLES[figure])]
    groups = by_setting(points)
    if any("gold" in group and "proxy" in group for group in groups):
        few = len(groups) <= MOST_LABELS
        pictures.append(plots.plot_proxy_against_gold([group if few else {**group, "label": ""} for group in groups]))
    if effects := effects_of(results, method):
        pictures.append(effects)
    return {"heading": f"{method.upper()}: the best setting", "words": ranking_words(ranking(points, figure), figure),
            "pictures": [_picture(each) for each in pictures]}


def _numbers(results: SweepResults) -> list[dict]:
    """The part of the page about a notebook that trains no policy: its results against the parameters."""
    figures = {name: title_of(name) for name in results.numbers()}
    effects = _effects(results, figures) if figures else None
    if effects is None:
        return []
    words = "Which of these numbers should be high is not known here, so none is ranked."
    return [{"heading": "Results", "words": words, "pictures": [_picture(effects)]}]


def _effects(results: SweepResults, figures: Mapping[str, str]):
    known = {key: label for key, label in figures.items() if any(is_number(row.get(key)) for row in results.finished)}
    rows = [{**row, **{key: row.get(key) if is_number(row.get(key)) else None for key in known}}
            for row in results.finished]
    varied = [name for name in results.varied if any(row.get(name) is not None and any(
        row[key] is not None for key in known) for row in rows)]
    varied = varied or [name for name in results.parameters if name == "seed" and len(results.seeds) > 1]
    if not known or not varied:
        return None
    return plots.plot_parameter_panels([{**row, **{name: _shown(row.get(name)) for name in varied}} for row in rows],
                                       varied[:4], known)


def _shown(value: object) -> object:
    return value if is_number(value) else "default" if value is None else str(value)


def _plane(results: SweepResults, points: Sequence[Point]) -> dict:
    """The plane as a picture, and where on it each job's point lies, in per cent, with a link to its run."""
    ax = plane_of(results, points)
    figure = ax.get_figure(root=True)
    shown = _picture(ax)
    width, height = figure.get_size_inches() * figure.dpi
    spots = []
    for point in points[:MOST_SPOTS] if point_links(results) else ():
        for name in ("proxy", "gold"):
            reward: Estimate | None = getattr(point, name)
            if reward is not None:
                x, y = ax.transData.transform((point.kl.value, reward.value))
                spots.append({"left": f"{100 * x / width:.2f}", "top": f"{100 - 100 * y / height:.2f}",
                              "link": f"{quote(f'jobs/{point.job}')}/",
                              "words": f"{point.method.upper()}, {point.label or 'default'}, seed {point.seed}: KL "
                                       f"{point.kl:.2f}, {name} {reward:+.2f}"})
    return {"picture": shown, "spots": spots, "words": sweep_curves(results).words}


def point_links(results: SweepResults) -> bool:
    """Whether the jobs' run directories are at hand."""
    return any(results.run_of(row) for row in results.finished)


def _picture(drawn) -> Picture:
    png, facts = drawn._repr_png_()
    return picture(png, facts["alt"], width=facts["width"])


def _columns(methods: Sequence[str]) -> list[str]:
    measured = [f"{method.upper()} {TITLES[name]}" for method in methods for name in FIGURES]
    return ["Job", "status", *measured, "took"]


def _row(results: SweepResults, row: Mapping, methods: Sequence[str]) -> dict:
    """A row of the table of jobs: its link and its cells."""
    seed = f"seed {row['seed']}" if results.seeds and row.get("seed") is not None else ""
    measured = [estimate_of(row, f"{method}.{FIGURES[name]}") for method in methods for name in FIGURES]
    return {"link": _link(results, row), "job": row["job"], "status": row["status"],
            "words": ", ".join(filter(None, (setting_words(results.setting(row)), seed))) or row["job"],
            "measured": [_cell(estimate) for estimate in measured],
            "took": duration(row["seconds"]) if is_number(row.get("seconds")) else "–"}


def _cell(estimate: Estimate | None) -> dict:
    if estimate is None or not math.isfinite(estimate.value):
        return {"value": "–", "between": ""}
    between = "" if estimate.low is None else f"{estimate.low:.2f} to {estimate.high:.2f}"
    return {"value": f"{estimate.value:.2f}", "between": between}


def _link(results: SweepResults, row: Mapping) -> str:
    """The address of a job's folder relative to the page, "" if it is not there."""
    run = results.run_of(row)
    if run is None:
        return ""
    inside = "report.html" if (run / "report.html").is_file() else ""
    return f"{quote(f'{run.parent.name}/{run.name}')}/{inside}"


def _mean(points: Sequence[Point], name: str) -> str:
    values = [getattr(point, name) for point in points]
    if any(value is None for value in values):
        return "–"
    return f"{values[0]:.2f}" if len(values) == 1 else f"{mean_estimate([value.value for value in values]):.2f}"
