"""A sweep's jobs on the reward–KL plane, for FrontierExplorer: sampled points with intervals, exact curves if known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from alignkit.exact.prompts import at_price
from alignkit.formulas.intervals import Estimate
from alignkit.sweeps.curves import Curves, sweep_curves
from alignkit.sweeps.results import (
    Point,
    SweepResults,
    figure_of,
    ranking,
    ranking_words,
    setting_words,
)
from alignkit_widgets.explorers.blocks import Axis, Chart, Copy, Series, Table, Text, number
from alignkit_widgets.explorers.explorer import Choice, Slider

ALL = "all"
UNITS = {"kl": "KL, nats", "proxy": "proxy, SFT-sd", "gold": "gold, SFT-sd"}
MOST_LABELS = 24


def sweep_controls(results: SweepResults) -> list:
    """The controls of a sweep: the seed, or all of them; a job; the price of KL where an exact curve is known.

    Raises ValueError if no job has a measured KL and reward.
    """
    points = results.points()
    if not points:
        raise ValueError(f"the sweep of {results.notebook} has no job with a measured KL and reward: expected "
                         "ppo.kl_to_sft or dpo.kl_to_sft, with a proxy or gold, in its table")
    seeds = {str(seed): f"seed {seed}" for seed in results.seeds}
    controls: list = [Choice("seed", {ALL: "all seeds, mean and range"} | seeds if len(seeds) != 1 else seeds,
                             ALL if len(seeds) != 1 else next(iter(seeds)), "seed", kept=True),
                      Choice("point", {str(i): point_words(point) for i, point in enumerate(points)}, "0", "job")]
    if results.frontiers:
        prices = sorted({float(f"{beta:.2g}") for curve in results.frontiers.values() for beta in _prices(curve)})
        low = max(min(_prices(curve)) for curve in results.frontiers.values())
        high = min(max(_prices(curve)) for curve in results.frontiers.values())
        prices = [beta for beta in prices if low <= beta <= high]
        far = max(point.kl.value for point in points)  # the opening price is one that the plane shows, if there is any
        seen = [beta for beta in prices if any(at_price(curve, beta)["kl"] <= far
                                               for curve in results.frontiers.values())]
        start = min(seen or prices, key=lambda beta: abs(math.log(beta / 0.35)))
        controls.insert(0, Slider("beta", prices, start, "β, price of KL"))
    return controls


def sweep_rows(results: SweepResults, state: Mapping) -> list:
    """The picture for one state: the plane, the chosen job, and the command that runs it."""
    points = results.points()
    chosen = points[int(state["point"])]
    own = [point for point in points if point.method == chosen.method]
    figure = figure_of(own)
    copies = [[Copy("copy the command that runs it", results.command_of(chosen.job))]]
    if chosen.run:
        copies.append([Copy("copy the path of its run", str(chosen.run))])
    curves = sweep_curves(results, next((seed for seed in results.seeds if str(seed) == state["seed"]), None))
    plane = _plane(results, points, chosen, state, curves)
    words = curves.words
    if curves.exact and (reached := at_price(curves.exact, state["beta"])["kl"]) > plane.x.high:
        words = f"The optimum at β = {number(state['beta'])} lies right of this picture, at {reached:.2f} nats. {words}"
    return [[Text(f"{chosen.method.upper()}: {ranking_words(ranking(own, figure), figure)}", lead=True)],
            [plane, _table(results, chosen)], *[[Text(words)]] * bool(words), *copies]


def point_words(point: Point) -> str:
    """A job in words: "PPO, kl_coef 0.2, seed 0"."""
    seed = "" if point.seed is None else f"seed {point.seed}"
    return ", ".join(filter(None, (point.method.upper(), point.label, seed)))


def _plane(results: SweepResults, points: Sequence[Point], chosen: Point, state: Mapping, found: Curves) -> Chart:
    whole = state["seed"] == ALL
    shown = points if whole else [point for point in points if str(point.seed) == state["seed"]]
    runs = [series for method in dict.fromkeys(point.method for point in points) for name in ("proxy", "gold")
            for series in _series([point for point in shown if point.method == method], method, name, whole)]
    runs += [Series("", [(chosen.kl.value, value.value)], chosen.method, line=False, big=True, open=name == "gold")
             for name in ("proxy", "gold") if (value := getattr(chosen, name)) and chosen in shown]
    ends = [(x, y) for series in runs for place in series.spans or [(p[0], p[0], p[1], p[1]) for p in series.points]
            for x, y in ((place[0], place[2]), (place[1], place[3]))]
    far = 1.1 * max((x for x, _ in ends), default=1.0)
    curves, marks = [], []
    if curve := found.exact:
        here, far = at_price(curve, state["beta"]), 1.4 * far
        order = [i for i in np.argsort(curve["kl"]) if curve["kl"][i] <= far]
        for name, title in (("proxy", "most proxy possible"), ("gold", "gold of that policy")):
            places = [(curve["kl"][i], curve[name][i]) for i in order]
            curves.append(Series(f"{title}, world {found.world}", places, name))
        if here["kl"] <= far:
            curves += [Series("", [(here["kl"], here[name])], name, line=False, big=True) for name in ("proxy", "gold")]
            marks.append(("x", here["kl"], f"β = {number(state['beta'])}"))
    elif sampled := found.sampled:
        places = [place for place in zip(sampled["kl"], sampled["proxy"], strict=True) if place[0] <= far]
        curves.append(Series(f"proxy possible, estimated from {sampled['samples']} responses", places, "dotted"))
        if sampled["ceiling"] <= far:
            marks.append(("x", sampled["ceiling"], f"log {sampled['samples']}"))
    ends += [place for series in curves for place in series.points]
    low, high = min(y for _, y in ends), max(y for _, y in ends)
    margin = 0.06 * (high - low) or 0.1
    crosses = "the range over seeds" if whole else "exact" if results.exact else "95 % intervals of the evaluation"
    return Chart("Reward against KL" + ("" if crosses == "exact" else f" · crosses: {crosses}"),
                 Axis("KL to SFT, nats per response", 0, far), Axis("reward, SFT-sd", low - margin, high + margin),
                 [*curves, *runs], marks=marks, height=360, weight=1.55)


def _series(points: Sequence[Point], method: str, name: str, whole: bool) -> list[Series]:
    """The points of one method and reward: each with its interval, or the mean and range of each setting."""
    known = [point for point in points if getattr(point, name) is not None]
    if not known:
        return []
    groups: dict = {}
    for point in known:
        groups.setdefault(point.setting if whole else point.job, []).append(point)
    places, spans = [], []
    for own in groups.values():
        across, up = [point.kl for point in own], [getattr(point, name) for point in own]
        places.append((_mean(across), _mean(up)))
        spans.append((*_span(across), *_span(up)))
    labels = [setting_words(own[0].setting) for own in groups.values()]
    labels = labels if name == "proxy" and len(labels) <= MOST_LABELS else ()
    return [Series(f"{method.upper()}, {name}", places, method, line=False, marks=True, open=name == "gold",
                   spans=spans, labels=labels)]


def _table(results: SweepResults, chosen: Point) -> Table:
    rows = [[word, f"{value:.2f}".replace("-", "−")] for name, word in UNITS.items()
            if (value := getattr(chosen, name)) is not None]
    row = next(row for row in results.rows if row["job"] == chosen.job)
    given = [[name, f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])]
             for name in results.parameters if row.get(name) is not None]
    return Table(point_words(chosen), ["", "exact" if results.exact else "with 95 % interval"], [*rows, *given])


def _prices(curve: Mapping) -> list[float]:
    return [beta for beta in curve["beta"] if beta and math.isfinite(beta)]


def _mean(values: Sequence[Estimate]) -> float:
    return float(np.mean([value.value for value in values]))


def _span(values: Sequence[Estimate]) -> tuple[float, float]:
    if len(values) == 1 and values[0].low is not None:
        return values[0].low, values[0].high
    return min(value.value for value in values), max(value.value for value in values)
