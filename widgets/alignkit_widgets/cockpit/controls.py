"""The controls: the range of a slider, its stops, and the changes that wait for the next iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """A number between `low` and `high` (inclusive) that starts at `start`; `log` gives the slider log spacing."""

    low: float
    high: float
    start: float
    log: bool = False

    @classmethod
    def parse(cls, name: str, spec: object) -> Control:
        """A control from (low, high, start) or (low, high, start, "log"). Raises ValueError for anything else."""
        parts = tuple(spec) if isinstance(spec, (tuple, list)) else ()
        good = len(parts) in (3, 4) and all(is_finite(p) for p in parts[:3]) and parts[3:] in ((), ("log",))
        if not good:
            raise ValueError(
                f"controls[{name!r}] is {spec!r}, expected (low, high, start) or (low, high, start, 'log')"
            )
        control = cls(*(float(p) for p in parts[:3]), log=len(parts) == 4)
        if not (control.low < control.high and control.low <= control.start <= control.high):
            raise ValueError(f"controls[{name!r}] is {spec!r}, expected low < high and low <= start <= high")
        if control.log and control.low < 0:
            raise ValueError(f"controls[{name!r}] is {spec!r}: a slider with log spacing cannot go below 0")
        return control

    def stops(self, n: int = 100) -> list[float]:
        """About n + 1 ascending values of the slider, to three digits, including the ends and `start`.

        With log spacing from 0, the stops are 0 and then four decades below `high`.
        """
        if self.log:
            low = self.low or self.high / 1e4
            inner = [low * (self.high / low) ** (i / n) for i in range(n + 1)]
        else:
            inner = [self.low + (self.high - self.low) * i / n for i in range(n + 1)]
        rounded = {float(f"{v:.3g}") for v in inner}
        return sorted({v for v in rounded if self.low <= v <= self.high} | {self.low, self.high, self.start})


class Controls:
    """The current values, and those that wait to take effect."""

    def __init__(self, specs: Mapping[str, object]) -> None:
        self.ranges = {name: Control.parse(name, spec) for name, spec in specs.items()}
        self.values = self.starts()
        self.waiting: dict[str, float] = {}

    def starts(self) -> dict[str, float]:
        """The values at the start of a run."""
        return {name: control.start for name, control in self.ranges.items()}

    def ask(self, name: object, value: object) -> None:
        """Record a change for the next iteration, clipped to the control's range. Invalid requests are ignored, because
        a message from a page must not be able to end a run."""
        control = self.ranges.get(name) if isinstance(name, str) else None
        if control is not None and is_finite(value):
            self.waiting[name] = min(max(float(value), control.low), control.high)

    def take(self) -> dict[str, tuple[float, float]]:
        """Apply the waiting changes and return {name: (old, new)} of the values that changed."""
        changed = {n: (self.values[n], v) for n, v in self.waiting.items() if v != self.values[n]}
        self.values.update(self.waiting)
        self.waiting = {}
        return changed

    def rewind(self, values: Mapping[str, float]) -> None:
        """Return to `values`, which applied earlier; the current slider positions wait for the next iteration."""
        asked = self.values | self.waiting
        self.values = self.values | dict(values)
        self.waiting = {name: value for name, value in asked.items() if value != self.values[name]}

    def force(self, values: Mapping[str, float]) -> None:
        """Set exactly `values` for the next iteration. Raises ValueError for an unknown control."""
        unknown = sorted(set(values) - set(self.ranges))
        if unknown:
            raise ValueError(f"replay names the controls {unknown}, expected some of {sorted(self.ranges)}")
        self.waiting = {name: float(value) for name, value in values.items()}


def is_finite(value: object) -> bool:
    """Whether a value is a number that fits into a float; True and False are not numbers."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False
