"""Colours and dashes of the charts, the same in JavaScript and in pictures."""

from __future__ import annotations

from alignkit import plots


def looks() -> dict:
    """What `cockpit.js` draws with: colours of behaviours, colour and dashes of lines, names of metrics."""
    return {
        "behaviours": {name: colour for name, (colour, _) in plots.BEHAVIOUR_FACES.items()},
        "lines": [[colour, dashes(line)] for colour, _, line, _ in plots.SERIES],
        "labels": {key: name for key, (name, _) in plots.METRICS.items()},
    }


def dashes(line: str | tuple) -> str:
    """A line style of matplotlib, in units of the line's width, as an SVG stroke-dasharray for lines of 1.8 pixels."""
    return "" if line == "-" else " ".join(f"{1.8 * length:g}" for length in line[1])
