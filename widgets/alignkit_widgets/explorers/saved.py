"""An explorer as one HTML file: its pictures for a grid of settings, computed beforehand.

A grid, and not each explorer's formulas a second time in JavaScript: the page then shows what Python computed, sentence
by sentence, for every explorer, and nothing has to be kept in step. The pictures are blocks (numbers and text), which
take less room than drawings and are drawn by the notebook's own explorer.js at the width of the page.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignkit.storage import write_atomically
from alignkit_widgets.explorers.blocks import plain
from alignkit_widgets.explorers.view import view_config
from alignkit_widgets.pages.live import live_page

MOST_STATES = 4000
MOST_BYTES = 1_000_000
DIGITS = 4  # significant digits of the points of curves; texts and tables are as in the notebook
HERE = Path(__file__).parent


def save_explorer(explorer, path: str | Path, grid: Mapping[str, int | Sequence]) -> Path:
    """Write a page of an explorer; see `Explorer.save_html`."""
    if unknown := sorted(set(grid) - set(explorer.controls)):
        raise ValueError(f"grid names {', '.join(unknown)}, expected some of {', '.join(explorer.controls)}")
    axes = _thinned(explorer, {name: _axis(explorer, name, grid.get(name)) for name in explorer.controls}, set(grid))
    count = math.prod(map(len, axes.values()))
    if count > MOST_STATES:
        raise ValueError(f"grid has {count:,} settings, expected at most {MOST_STATES:,}: give fewer values")
    data = _pictures(explorer, axes) | _controls(explorer, axes)
    page = live_page(explorer.title, _about(explorer, axes, count), HERE / "explorer.js", HERE / "explorer.css",
                     "explorer_page.js", data)
    size = len(page.encode())
    if size > MOST_BYTES:
        raise ValueError(f"the page would have {size:,} bytes, expected at most {MOST_BYTES:,}: give fewer values")
    write_atomically(path, page)
    return Path(path)


# --- the settings ----------------------------------------------------------------------------------------------------
def _axis(explorer, name: str, wanted: int | Sequence | None) -> list:
    """The values of a control in the page; its present value is always one of them."""
    control, now = explorer.controls[name], explorer.values[name]
    if name in explorer.hide and name not in {along.slider.name for along in _moves(explorer).values()}:
        return [now]
    if wanted is None or isinstance(wanted, int):
        values = {"slider": lambda: list(control.stops), "choice": lambda: list(control.options),
                  "toggle": lambda: [True, False]}[control.kind]()
        return values if wanted is None else _spread(values, now, wanted)
    values = [control.parse(value) for value in wanted]
    return sorted({*values, now}) if control.kind == "slider" else list(dict.fromkeys([*values, now]))


def _spread(values: list, now: object, n: int) -> list:
    """`n` of the values, evenly spread, with the first, the last and `now`."""
    if n < 1:
        raise ValueError(f"grid gives {n} values to a control, expected at least 1")
    if n == 1:
        return [now]
    chosen = [values[i] for i in sorted({round(i * (len(values) - 1) / (n - 1)) for i in range(n)})]
    if now in chosen:
        return chosen
    if isinstance(now, str | bool):
        return [*chosen[:-1], now]
    inner = chosen[1:-1] or chosen[:1]
    chosen[chosen.index(min(inner, key=lambda value: abs(value - now)))] = now
    return sorted(chosen)


def _thinned(explorer, axes: dict[str, list], given: set[str]) -> dict[str, list]:
    """The axes with half the values on the longest of those that were not given, until the grid is small enough."""
    while math.prod(map(len, axes.values())) > MOST_STATES:
        free = [name for name, values in axes.items() if name not in given and len(values) > 2]
        if not free:
            break
        longest = max(free, key=lambda name: len(axes[name]))
        axes[longest] = _spread(axes[longest], explorer.values[longest], (len(axes[longest]) + 1) // 2)
    return axes


def _moves(explorer) -> dict:
    """The buttons that a page can carry out: those that move a slider."""
    return {name: button.press for name, button in explorer.buttons.items() if hasattr(button.press, "slider")}


def _controls(explorer, axes: Mapping[str, list]) -> dict:
    """What the page's script needs of the controls, in the order of a state string."""
    config, moves = view_config(explorer.config()), _moves(explorer)
    shown = []
    for control in config["controls"]:
        name = control["name"]
        if control["kind"] == "button" and name in moves:
            shown.append(control)
        elif len(axes.get(name, ())) > 1:
            shown.append(control | _offered(explorer.controls[name], axes[name]))
    described = [
        {"name": name, "values": values, "written": [explorer.controls[name].write(value) for value in values],
         "start": values.index(explorer.values[name]), "kept": explorer.controls[name].kept}
        for name, values in axes.items()
    ]
    return {"config": config | {"controls": shown}, "axes": described,
            "moves": {name: [along.slider.name, along.by, along.around] for name, along in moves.items()}}


def _offered(control, values: list) -> dict:
    """The part of a control's description that says which values there are."""
    if control.kind == "slider":
        names = [control.show(value) for value in values] if control.names else []
        return {"stops": [float(f"{value:.6g}") for value in values], "names": names}
    return {"options": [[key, plain(control.options[key])] for key in values]} if control.kind == "choice" else {}


def _about(explorer, axes: Mapping[str, list], count: int) -> str:
    """The sentence that states the grid."""
    label = {name: control.label or name for name, control in explorer.controls.items()}
    several = [f"{label[name]}: {len(values)} values" for name, values in axes.items() if len(values) > 1]
    fixed = [f"{label[name]} = {explorer.controls[name].show(values[0])}" for name, values in axes.items()
             if len(values) == 1]
    settings = f"{count:,} settings ({'; '.join(several)})" if several else "one setting"
    text = f"Computed beforehand by alignkit for {settings}"
    return (text + (f"; fixed here: {', '.join(fixed)}" if fixed else "")
            + f". In a notebook, {type(explorer).__name__} has all values and takes this state.")


# --- the pictures ----------------------------------------------------------------------------------------------------
def _pictures(explorer, axes: Mapping[str, list]) -> dict:
    """{"shapes", "nodes", "roots"}: the picture of each setting, the last control fastest; equal parts stored once."""
    parts, before = _Parts(), explorer.values
    try:
        roots = []
        for values in itertools.product(*axes.values()):
            explorer._values = dict(zip(axes, values, strict=True))
            roots.append(parts.put(explorer.rows())[0])
    finally:
        explorer._values = before
    return {"shapes": {name: list(keys) for keys, name in parts.shapes.items()}, "nodes": parts.nodes, "roots": roots}


class _Parts:
    """JSON values in parts that refer to each other: [i] is the part number i, and equal parts have one number.

    A part is a text, ["list", items …], ["points", xs, ys] for a curve, or [shape, values …] for an object whose keys
    are in `shapes`.
    """

    def __init__(self) -> None:
        self.nodes: list = []
        self.shapes: dict[tuple, str] = {}
        self._known: dict[str, int] = {}

    def put(self, value: object) -> object:
        """The value itself if it is short, or a reference."""
        if isinstance(value, str):
            return value if len(value) < 10 else self._node(value)
        if isinstance(value, dict):
            shape = self.shapes.setdefault(tuple(value), f"{value.get('kind', 'part')}{len(self.shapes)}")
            return self._node([shape, *map(self.put, value.values())])
        if isinstance(value, list) and len(value) > 3 and all(map(_is_point, value)):
            columns = [["list", *(each if each is None else float(f"{each:.{DIGITS}g}") for each in column)]
                       for column in zip(*value, strict=True)]
            return self._node(["points", *map(self._node, columns)])
        return self._node(["list", *map(self.put, value)]) if isinstance(value, list) else value

    def _node(self, node: object) -> list[int]:
        key = json.dumps(node, ensure_ascii=False)
        if key not in self._known:
            self._known[key] = len(self.nodes)
            self.nodes.append(node)
        return [self._known[key]]


def _is_point(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(v is None or type(v) in (int, float) for v in value)
