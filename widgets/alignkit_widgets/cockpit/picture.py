"""The final picture of a run: its charts, and the policy's behaviour at the start and at the end."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from alignkit import plots

_SCALE = 1.5  # pixels drawn for each CSS pixel


def draw_run(config: dict, rows: list[dict], marks: list[dict], place: str, branches: list[dict]) -> tuple[bytes, dict]:
    """One PNG of a run, and its metadata for the notebook: width and height in CSS pixels, and the alt text.

    `config` contains "title", "unit" and "charts"; `rows`, `marks` and `branches` are the session's; `place` says how
    far the run came. Raises ValueError if no row has a charted metric.
    """
    panels = {chart["title"]: chart["keys"] for chart in config["charts"]}
    changes = [(mark["step"], mark["name"] + ("" if mark["old"] is None else f" {mark['old']:.4g} → {mark['new']:.4g}"))
               for mark in marks]
    unit, title = config["unit"], f"{config['title']}: {place}"
    left = [branch["rows"] for branch in branches]
    figures = [
        plots.plot_metrics(
            rows, panels, columns=min(4, len(panels)), xlabel=unit, marks=changes, branches=left, title=title
        )
    ]
    shared = [row for row in rows if "shares" in row]
    if shared:
        ends = {f"{unit} {row['step']}": row["shares"] for row in (shared[0], shared[-1])}
        axes = plots.plot_behaviour(ends)
        axes.set_ylabel("")
        figures.append(axes.get_figure())
    images = [_pixels(figure) for figure in figures]
    width = max(image.shape[1] for image in images)
    padded = [np.pad(i, ((0, 16), (0, width - i.shape[1]), (0, 0)), constant_values=255) for i in images]
    picture, buffer = np.concatenate(padded), io.BytesIO()
    imsave(buffer, picture, format="png")
    size = {"width": round(picture.shape[1] / _SCALE), "height": round(picture.shape[0] / _SCALE)}
    return buffer.getvalue(), size | {"alt": "; ".join([title, *map(plots.describe, figures)])}


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(96 * _SCALE)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
