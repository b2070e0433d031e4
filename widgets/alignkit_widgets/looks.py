"""The style of charts, shared by JavaScript and pictures: colours, dashes, and gaps for missing numbers."""

from __future__ import annotations

import math

from alignkit import plots
from alignkit.metrics import GLOSSARY


def looks() -> dict:
    """Data for `cockpit.js`: colours of behaviours, colour and dashes of lines, names of metrics, meanings of terms."""
    return {
        "behaviours": {name: colour for name, (colour, _) in plots.BEHAVIOUR_FACES.items()},
        "lines": [[colour, dashes(line)] for colour, _, line, _ in plots.SERIES],
        "labels": {name: metric.label for name, metric in plots.METRICS.items()},
        "glossary": GLOSSARY,
    }


def dashes(line: str | tuple) -> str:
    """A line style of matplotlib, in units of the line's width, as an SVG stroke-dasharray for lines of 1.8 pixels."""
    return "" if line == "-" else " ".join(f"{1.8 * length:g}" for length in line[1])


def finite(value: float) -> float | None:
    """`value`, or None for NaN and the infinities, which JSON lacks and a chart shows as a gap."""
    return value if math.isfinite(value) else None
