"""A run's own policies on the reward–KL plane, measured from samples where nothing can be enumerated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from alignkit.formulas.intervals import Estimate
from alignkit.sweeps.results import Point
from alignkit_widgets.explorers.blocks import Axis, Chart, Series, Table, Text, fixed, number
from alignkit_widgets.explorers.explorer import Choice, Explorer

MOST_ROWS = 9  # of a run's policies in a table, besides SFT: the newest

class OwnPlane(Explorer):
    """Measured proxy against measured KL of a run's policies, with 95 % intervals.

    Args:
        points: the policies, SFT first.
        frontier: an estimate of the most proxy at each KL (`alignkit.sweeps.sampled.run_frontier`), or None.
        missing: names of policies that were not measured yet.

    Raises ValueError if points is empty.
    """

    def __init__(self, points: Sequence[Point], frontier: Mapping | None = None, missing: Sequence[str] = ()) -> None:
        if not points:
            raise ValueError("points is empty, expected at least one measured policy")
        self.points, self.frontier, self.missing = tuple(points), frontier, tuple(missing)
        names = {str(number): point.job for number, point in enumerate(self.points)}
        super().__init__("Reward against KL, measured", [Choice("policy", names, str(len(names) - 1), "policy")],
                         self._rows)

    def _rows(self, state: Mapping) -> list:
        chosen, start = self.points[int(state["policy"])], self.points[0]
        other = "" if chosen is start else f", and that of {start.job} is {start.proxy:+.2f}"
        says = (f"{chosen.job} is {chosen.kl:.2f} nats from SFT; its proxy reward is {chosen.proxy:+.2f} SFT-sd{other}"
                ", with 95 % intervals over held-out prompts. "
                "The proxy is what PPO was trained on, so a higher one does not show that the responses are better.")
        if self.missing:
            says += f" Not measured yet: {', '.join(self.missing)}."
        rows = [[point.job, f"{point.kl:.2f}".replace("-", "−"), f"{point.proxy:+.2f}".replace("-", "−")]
                for point in self.points]
        table = Table("With 95 % intervals", ["policy", "KL, nats per response", "proxy, SFT-sd"], rows,
                      hot=[int(state["policy"])], weight=1.2)
        return [[Text(says.replace(" -", " −").replace("[-", "[−"), lead=True)], [self._plane(chosen), table]]

    def _plane(self, chosen: Point) -> Chart:
        series = own_series(self.points, crosses=True)
        series.append(Series("", [(chosen.kl.value, chosen.proxy.value)], chosen.method, line=False, big=True))
        ends = [(x, y) for each in series for span in each.spans for x, y in zip(span[:2], span[2:], strict=True)]
        far = 1.15 * max([x for x, _ in ends] + [0.1])
        if self.frontier is not None:
            places = [place for place in zip(self.frontier["kl"], self.frontier["proxy"], strict=True)
                      if place[0] <= far]
            name = f"most proxy possible, estimated from {self.frontier['samples']} responses"
            series.insert(0, Series(name, places, "dotted"))
            ends += places
        low, high = min(y for _, y in ends), max(y for _, y in ends)
        margin = 0.06 * (high - low) or 0.1
        return Chart("Proxy reward against KL · crosses: 95 % intervals",
                     Axis("KL to SFT, nats per response", min(0.0, *(x for x, _ in ends)), far),
                     Axis("proxy reward, SFT-sd", low - margin, high + margin), series, height=300, weight=1.55)


def own_series(points: Sequence[Point], crosses: bool = False) -> list[Series]:
    """The points of each method: proxy, and gold as hollow markers where it is known; with their intervals as
    crosses."""
    series = []
    for method in dict.fromkeys(point.method for point in points):
        own = [point for point in points if point.method == method]
        for figure in ("proxy", "gold"):
            known = [point for point in own if getattr(point, figure) is not None]
            if known:
                places = [(point.kl.value, getattr(point, figure).value) for point in known]
                spans = [(*_ends(point.kl), *_ends(getattr(point, figure))) for point in known] if crosses else ()
                labels = [_label(point) for point in known] if figure == "proxy" else ()
                series.append(Series(f"{method.upper()}, {figure}", places, method, line=False, marks=True,
                                     open=figure == "gold", spans=spans, labels=labels))
    return series


def own_rows(points: Sequence[Point], curve: Mapping) -> list[list[str]]:
    """Rows of FrontierExplorer's table: SFT and the newest other policies, with their share of the gain over SFT that
    is possible at their KL."""
    if not points:
        return []
    order, start = np.argsort(curve["kl"]), points[0].proxy.value
    kl, most = (np.asarray(curve[name])[order] for name in ("kl", "proxy"))
    rows = []
    for point in (points[0], *points[1:][-MOST_ROWS:]):
        possible = float(np.interp(point.kl.value, kl, most)) - start
        gained = point.proxy.value - start
        share = f"{100 * gained / possible:.0f} %" if point is not points[0] and possible > 0 else ""
        price = "".join(number(value) for _, value in point.setting)
        rows.append([point.job, price, *(fixed(each.value) for each in (point.kl, point.proxy, point.gold)), share])
    return rows


def _ends(value: Estimate) -> tuple[float, float]:
    return (value.value, value.value) if value.low is None else (value.low, value.high)


def _label(point: Point) -> str:
    return point.job.removeprefix("app/")
