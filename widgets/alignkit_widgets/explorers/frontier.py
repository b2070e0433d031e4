"""FrontierExplorer: the reward–KL plane; a price of KL selects the optimal policy, with recorded runs beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from alignkit.exact.prompts import Enumerated, at_price
from alignkit.exact.sweep import RecordedRun, Sweep
from alignkit.sweeps.exact import BETAS
from alignkit.sweeps.results import Point, SweepResults, load_results
from alignkit_widgets.explorers.blocks import Axis, Bars, Chart, Copy, Fold, Series, Table, Text, fixed, number
from alignkit_widgets.explorers.explorer import Button, Choice, Explorer, Slider, Toggle
from alignkit_widgets.explorers.own_plane import own_rows, own_series
from alignkit_widgets.explorers.sweep_plane import sweep_controls, sweep_rows


class FrontierExplorer(Explorer):
    """The highest proxy at each price of KL, β, its gold, and the results of PPO and DPO runs.

    Args:
        sweep: recorded runs and exact curves (`alignkit.load_sweep()`); or any sweep's results
            (`alignkit.load_results(folder)`, or the folder), whose jobs are shown with their intervals, with a command
            to copy for each; or None.
        truth: enumerated prompts (`alignkit.enumerate_world(…)`): shows the best behaviours and responses for a
            chosen prompt; without a sweep, also its curve.
        points: a run's own policies, measured on the prompts of `truth` (`alignkit.sweeps.results.Point`).
        train: called with {"kl_coef": β, "seed": s} by *train this*; may return a sentence or an awaitable.
            None: no button.
        state, hide: as for every Explorer.

    Raises ValueError if both sweep and truth are None, if no job of a sweep has a measured KL and reward, or on a bad
    state.
    """

    def __init__(
        self,
        sweep: Sweep | SweepResults | str | Path | None = None,
        *,
        truth: Enumerated | None = None,
        points: Sequence[Point] = (),
        train: Callable[[dict], object] | None = None,
        state: str = "",
        hide: Sequence[str] = (),
    ) -> None:
        if sweep is None and truth is None:
            raise ValueError("sweep and truth are None, expected at least one of them")
        if isinstance(sweep, str | Path):
            sweep = load_results(sweep)
        self.results, self.truth = sweep if isinstance(sweep, SweepResults) else None, truth
        self.points = tuple(points)
        self.sweep = None if self.results else sweep
        if self.results:
            super().__init__("Reward against KL", sweep_controls(self.results),
                             lambda state: sweep_rows(self.results, state), state=state, hide=hide)
            return
        self.curves = {seed: world.frontier for seed, world in sweep.worlds.items()} if sweep else {}
        if truth is not None and truth.seed not in self.curves:
            self.curves[truth.seed] = truth.frontier(BETAS)
        self.curves = {seed: _without_ends(curve) for seed, curve in self.curves.items()}
        seed = truth.seed if truth is not None else min(self.curves)
        low = max(min(curve["beta"]) for curve in self.curves.values())
        high = min(max(curve["beta"]) for curve in self.curves.values())
        stops = {float(f"{b:.2g}") for b in np.geomspace(low, high, 76)} | {low, high}
        stops |= {run.value for run in sweep.runs} if sweep else set()
        stops = sorted(b for b in stops if low <= b <= high)
        start = min(stops, key=lambda b: abs(math.log(b / 0.35)))
        controls = [Slider("beta", stops[::-1], start, "β, price of KL",
                           ends=("KL expensive", "KL cheap")),  # the point moves the way the slider does
                    Choice("seed", {str(s): f"world {s}" for s in sorted(self.curves)}, str(seed), "seed", kept=True)]
        if truth is not None:
            names = {str(i): f"{prompt.text} ({prompt.kind})" for i, prompt in enumerate(truth.prompts)}
            controls.append(Choice("prompt", names, "0", "prompt"))
        if sweep is not None and sweep.runs:
            controls.append(Toggle("runs", True, "recorded runs"))
        if train is not None:
            controls.append(Button("train", "train this", lambda values: train(self.parameters(values))))
        super().__init__("Reward against KL", controls, self._rows, state=state, hide=hide)

    def parameters(self, values: Mapping[str, object] | None = None) -> dict[str, float | int]:
        """The setting as parameters of notebook 03b: {"kl_coef": β, "seed": s}; of a sweep, the chosen job's."""
        values = self.values if values is None else values
        if self.results:
            return dict(self.results.points()[int(values["point"])].setting)
        return {"kl_coef": values["beta"], "seed": int(values["seed"])}

    def _rows(self, state: Mapping) -> list:
        seed, beta = int(state["seed"]), state["beta"]
        curve = self.curves[seed]
        here = at_price(curve, beta)
        runs = self._runs(seed) if state.get("runs") else {}
        line = " ".join(f"-p {name}={value:g}" for name, value in self.parameters(state).items())
        plane, table, below = self._plane(seed, beta, here, runs), self._table(seed, beta, here, runs), []
        if self.truth is not None and seed == self.truth.seed:
            title = "This prompt: what the best policy does, and its likeliest responses"
            below = [[Fold(title, self._prompt(int(state["prompt"]), beta))]]
        return [[Text(self._says(beta, curve, here), lead=True)], [plane, table], *below,
                [Copy("copy as parameters", line)]]

    def _says(self, beta: float, curve: Mapping, here: Mapping) -> str:
        peak = int(np.argmax(curve["gold"]))
        text = (f"At β = {number(beta)} the best policy is {fixed(here['kl'])} nats from SFT: "
                f"proxy {fixed(here['proxy'])}, gold {fixed(here['gold'])} SFT-sd. "
                f"One more nat buys less than {number(beta)} of proxy reward. ")
        if 0 < peak < len(curve["gold"]) - 1 and beta < curve["beta"][peak] / 1.3:
            return text + (f"Gold was highest, {fixed(curve['gold'][peak])}, at β = {number(curve['beta'][peak], 2)}: "
                           "beyond that point, more proxy reward means less gold.")
        bent = 0 < peak < len(curve["gold"]) - 1 and beta < 1.3 * curve["beta"][peak]
        return text + ("Gold peaks near this price." if bent else "A lower price raises proxy and gold." if peak
                       else "")

    def _plane(self, seed: int, beta: float, here: Mapping, runs: Mapping[str, list[RecordedRun]]) -> Chart:
        curve, series = self.curves[seed], []
        order = np.argsort(curve["kl"])
        for name, look in (("proxy", "proxy"), ("gold", "gold")):
            title = {"proxy": "most proxy possible", "gold": "gold of that policy"}[name]
            series.append(Series(title, [(curve["kl"][i], curve[name][i]) for i in order], look))
        for method, method_runs in runs.items():
            every = {value: self.sweep.select(method, value) for value in self.sweep.values(method)}
            for name in ("proxy", "gold"):
                spans = [(*_span(every[run.value], "kl"), *_span(every[run.value], name)) for run in method_runs]
                points = [(run.kl, getattr(run, name)) for run in method_runs]
                labels = _labels(method_runs, 0.05 * max(curve["kl"])) if name == "proxy" else ()
                series.append(Series(f"{method.upper()}, {name}", points, method, line=False, marks=True,
                                     open=name == "gold", spans=spans, labels=labels))
        series += own_series(self._own(seed))
        series.append(Series("best at this price, proxy", [(here["kl"], here["proxy"])], "best", line=False, big=True))
        series.append(Series("its gold", [(here["kl"], here["gold"])], "gold", line=False, big=True))
        points = [point for s in series for point in s.points] + [(s[1], v) for each in series for s in each.spans
                                                                  for v in s[2:]]
        low, high = min(y for _, y in points), max(y for _, y in points)
        margin = 0.06 * (high - low)
        title = "Reward against KL" + (f" · crosses: the range over {len(self.sweep.seeds)} seeds" if runs
                                       and len(self.sweep.seeds) > 1 else "")
        return Chart(title, Axis("KL to SFT, nats per response", 0, 1.03 * max(x for x, _ in points)),
                     Axis("reward, SFT-sd", low - margin, high + margin), series,
                     marks=[("x", here["kl"], f"β = {number(beta)}")], height=290, weight=1.55,
                     drag=("beta", [(at_price(curve, b)["kl"], b) for b in self.controls["beta"].stops]))

    def _own(self, seed: int) -> tuple[Point, ...]:
        """The run's own policies, if they belong to the world that is shown."""
        return self.points if self.truth is not None and seed == self.truth.seed else ()

    def _table(self, seed: int, beta: float, here: Mapping, runs: Mapping[str, list[RecordedRun]]) -> Table:
        rows = [["best possible", number(beta), fixed(here["kl"]), fixed(here["proxy"]), fixed(here["gold"]), "100 %"]]
        for method, method_runs in runs.items():
            run = min(method_runs, key=lambda r: abs(math.log(r.value / beta)))
            rows.append([f"{method.upper()}, nearest run", number(run.value), fixed(run.kl), fixed(run.proxy),
                         fixed(run.gold),
                         f"{100 * run.share:.0f} %"])
        rows += own_rows(self._own(seed), self.curves[seed])
        columns = ["policy", "β", "KL", "proxy", "gold", "of possible gain"]
        whole = runs or self._own(seed)
        title = "At this price" + ", and this run's own policies" * bool(self._own(seed))
        return Table(title, columns if whole else columns[:-1], rows if whole else [rows[0][:-1]], hot=[0])

    def _prompt(self, which: int, beta: float) -> list:
        truth = self.truth
        best, ref = truth.optimum(which, beta), truth.ref_logps[which]
        now, before = truth.shares(which, best), truth.shares(which, ref)
        bars = Bars("Behaviour on this prompt", {"SFT": "sft", "best at this β": "blue"},
                    [(name, before[name], now[name]) for name in now], "share of responses", percent=True)
        rows = [[text.strip() or "(nothing)", f"{100 * ref[i].exp():.1f} %", f"{100 * best[i].exp():.1f} %",
                 fixed(truth.proxy[which, i].item(), sign=True), fixed(truth.gold[which, i].item(), sign=True)]
                for i, text in truth.likeliest(best)]
        columns = ["response", "SFT", "at this β", "proxy", "gold"]
        return [bars, Table("The likeliest responses", columns, rows, weight=2)]

    def _runs(self, seed: int) -> dict[str, list[RecordedRun]]:
        methods = dict.fromkeys(run.method for run in self.sweep.runs)
        by_method = {m: [r for r in self.sweep.runs if r.method == m and r.seed == seed] for m in methods}
        return {m: sorted(runs, key=lambda r: r.value) for m, runs in by_method.items() if runs}


def _without_ends(curve: Mapping) -> dict[str, list[float]]:
    """The points of a frontier whose β can be set by a slider."""
    kept = [i for i, beta in enumerate(curve["beta"]) if beta and math.isfinite(beta)]
    return {name: [values[i] for i in kept] for name, values in curve.items()}


def _labels(runs: Sequence[RecordedRun], room: float) -> list[str]:
    """The price at each run, where it is at least `room` nats from the last that was written."""
    words, last = [""] * len(runs), -math.inf
    for i in sorted(range(len(runs)), key=lambda i: runs[i].kl):
        if runs[i].kl - last >= room:
            words[i], last = f"{runs[i].value:g}", runs[i].kl
    return words


def _span(runs: Sequence[RecordedRun], name: str) -> tuple[float, float]:
    values = [getattr(run, name) for run in runs]
    return min(values), max(values)
