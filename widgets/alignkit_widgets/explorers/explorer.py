"""The base class of all explorers: controls, a pure function from their state to a picture, and a string for the state.

```python
Explorer("A line", [Slider("slope", (0, 1, 2), 1)],
         lambda state: [[Chart("ax", Axis("x", 0, 1), Axis("y", 0, 2), [Series("", [(0, 0), (1, state["slope"])])])]])
```

The kernel does the computation; the page (explorer.js) requests one picture at a time, always the newest.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from alignkit_widgets.explorers.blocks import Copy, plain, unfolded
from alignkit_widgets.notebook import has_front_end, in_kernel


@dataclass(frozen=True)
class Slider:
    """A number with fixed stops; a state string may also give a value between stops, unless `between` is False."""

    name: str
    stops: Sequence[float]
    start: float
    label: str = ""
    kept: bool = False  # reset does not change it
    between: bool = True
    names: Sequence[str] = ()  # texts to show for the stops instead of their numbers
    ends: Sequence[str] = ()  # what the left and the right end of the slider mean
    kind: ClassVar[str] = "slider"

    def parse(self, value: object) -> float:
        """The value requested by a page or a state string. Raises ValueError that says what was expected."""
        try:
            number = float(f"{float(value):.6g}")
        except (TypeError, ValueError):
            number = math.nan
        low, high = min(self.stops), max(self.stops)
        if self.between and not low <= number <= high:
            raise ValueError(f"{self.name} is {value!r}, expected a number from {low:g} to {high:g}")
        if not self.between and number not in self.stops:
            raise ValueError(f"{self.name} is {value!r}, expected one of {', '.join(f'{s:g}' for s in self.stops)}")
        return number

    def write(self, value: float) -> str:
        """The value in the form of a state string."""
        return f"{value:.6g}"

    def show(self, value: float) -> str:
        """The value as shown to the reader."""
        return self.names[list(self.stops).index(value)] if self.names else self.write(value).replace("-", "−")


@dataclass(frozen=True)
class Choice:
    """One of several options. options: {key: text for the reader}; the keys are used in state strings."""

    name: str
    options: Mapping[str, str]
    start: str
    label: str = ""
    kept: bool = False
    kind: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        if bad := [key for key in self.options if not re.fullmatch(r"[\w.+-]+", key)]:
            raise ValueError(f"options of {self.name!r} have the keys {bad}, expected letters, digits and _.+-")

    def parse(self, value: object) -> str:
        """As `Slider.parse`."""
        if value not in self.options:
            raise ValueError(f"{self.name} is {value!r}, expected one of {', '.join(self.options)}")
        return value

    def write(self, value: str) -> str:
        """As `Slider.write`."""
        return value

    def show(self, value: str) -> str:
        """As `Slider.show`."""
        return self.options[value]


@dataclass(frozen=True)
class Toggle:
    """Something to show or hide."""

    name: str
    start: bool = True
    label: str = ""
    kept: bool = False
    kind: ClassVar[str] = "toggle"

    def parse(self, value: object) -> bool:
        """As `Slider.parse`; a state string holds 0 or 1."""
        if value not in (True, False, "0", "1"):
            raise ValueError(f"{self.name} is {value!r}, expected 0 or 1")
        return value in (True, "1")

    def write(self, value: bool) -> str:
        """As `Slider.write`."""
        return "1" if value else "0"

    def show(self, value: bool) -> str:
        """As `Slider.show`."""
        return "shown" if value else "left out"


@dataclass(frozen=True)
class Button:
    """An action. press(state) may return {control: new value}, a sentence to show, or an awaitable of either."""

    name: str
    label: str
    press: Callable[[dict], object]
    kind: ClassVar[str] = "button"


@dataclass(frozen=True)
class Along:
    """A button's action that moves a slider by some stops, so that a saved page can carry it out too.

    around: the first stop follows the last.
    """

    slider: Slider
    by: int
    around: bool = False

    def __call__(self, state: Mapping) -> dict[str, float]:
        stops, now = list(self.slider.stops), state[self.slider.name]
        at = min(range(len(stops)), key=lambda i: abs(stops[i] - now)) + self.by
        return {self.slider.name: stops[at % len(stops) if self.around else min(max(at, 0), len(stops) - 1)]}


class Explorer:
    """Controls and a picture that is computed for each setting.

    Args:
        title: of the explorer.
        controls: Slider, Choice, Toggle and Button, in their order on the page.
        draw: {control: value} -> rows of blocks. It must depend on nothing else.
        state: initial values, "beta=0.2&prompt=3" (the format of `explorer.state`); others have their defaults.
        hide: names of controls to hide, for teaching; also "reset", "picture", "state" and "copy", the other buttons.

    Raises ValueError that names an unknown name or an invalid value.
    """

    page_grid: ClassVar[Mapping[str, int | Sequence]] = {}  # the grid of `save_html`, unless one is given

    def __init__(
        self,
        title: str,
        controls: Sequence[Slider | Choice | Toggle | Button],
        draw: Callable[[dict], list],
        *,
        state: str = "",
        hide: Sequence[str] = (),
    ) -> None:
        self.title, self.draw = title, draw
        self.buttons = {c.name: c for c in controls if isinstance(c, Button)}
        self.controls = {c.name: c for c in controls if not isinstance(c, Button)}
        known = [*self.controls, *self.buttons, "reset", "picture", "state", "copy"]
        if isinstance(hide, str) or (unknown := sorted(set(hide) - set(known))):
            wrong = "a string" if isinstance(hide, str) else unknown
            raise ValueError(f"hide is {hide!r}: {wrong}, expected a list of names out of {', '.join(known)}")
        self.hide = frozenset(hide)
        self._order = [c.name for c in controls if c.name not in self.hide]
        self._values = {name: control.parse(control.start) for name, control in self.controls.items()}
        self._values |= self._parse(state)
        self._start, self.view, self.note = dict(self._values), None, ""

    @property
    def values(self) -> dict:
        """The value of each control."""
        return dict(self._values)

    @property
    def state(self) -> str:
        """The values as a short string, which restores them: `explorer.state = …` or `Explorer(…, state=…)`."""
        return "&".join(f"{name}={control.write(self._values[name])}" for name, control in self.controls.items())

    @state.setter
    def state(self, text: str) -> None:
        self.set(**self._parse(text))

    def set(self, **values: object) -> None:
        """Set controls and update the picture. Raises ValueError on an unknown name or a bad value."""
        if unknown := sorted(set(values) - set(self.controls)):
            raise ValueError(f"state names {', '.join(unknown)}, expected some of {', '.join(self.controls)}")
        self._values |= {name: self.controls[name].parse(value) for name, value in values.items()}
        self.send()

    def reset(self) -> None:
        """Return to the initial values, except for a seed."""
        self.set(**{name: value for name, value in self._start.items() if not self.controls[name].kept})

    def press(self, name: str) -> None:
        """Carry out a button's action. An error is shown in the page and not raised."""
        self._react(lambda: self.buttons[name].press(self.values))

    def rows(self) -> list:
        """The picture in its current state as plain JSON: rows of blocks."""
        rows = [[b for b in row if "copy" not in self.hide or not isinstance(b, Copy)]
                for row in self.draw(self.values)]
        return [plain(row) for row in rows if row]

    def text(self) -> str:
        """The picture in words and figures: its sentences and its tables."""
        lines = [f"{self.title} ({self.state})"]
        for block in (part for row in unfolded(self.rows()) for part in row):
            if block["kind"] == "text":
                lines.append(block["text"])
            elif block["kind"] == "table":
                lines += ["  ".join(str(cell) for cell in row) for row in [block["columns"], *block["rows"]]]
        return "\n".join(lines)

    def picture(self) -> tuple[bytes, dict]:
        """The picture in its current state as a PNG, and its size and alt text."""
        from alignkit_widgets.explorers.explorer_picture import draw_explorer

        shown = {c.label or c.name: c.show(self._values[c.name]) for c in map(self.controls.get, self._order) if c}
        return draw_explorer(self.title, plain(shown), unfolded(self.rows()))

    def save_html(self, path: str | Path, *, grid: Mapping[str, int | Sequence] | None = None) -> Path:
        """Write the explorer as one HTML file that works without Python; returns `path`.

        Its pictures are computed beforehand for each setting of a grid; the page names the grid. Its state is in the
        URL: page.html#beta=0.2&prompt=3. Nothing is loaded from elsewhere.
        grid: {control: its values in the page, or their number}; 1 fixes a control at its present value. A control
        that is not named keeps all its values, or every second (fourth, …) if there would be more than 4,000 settings.
        Buttons that need Python are left out.

        Raises ValueError for an unknown control, for more than 4,000 settings, or for a page of more than 1 MB.
        """
        from alignkit_widgets.explorers.saved import save_explorer

        return save_explorer(self, path, self.page_grid if grid is None else grid)

    def __repr__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict] | dict:
        """A live view if the notebook has a front end, and always a picture if there is a kernel."""
        data, metadata = {"text/plain": self.text()}, {}
        if in_kernel():
            from alignkit_widgets.notebook import bundle

            data, metadata = bundle(self.picture(), data["text/plain"])
        if has_front_end():
            if self.view is None:
                from alignkit_widgets.explorers.view import make_view

                self.view = make_view(self.config(), self.receive)
            view = {"version_major": 2, "version_minor": 0, "model_id": self.view.model_id}
            data["application/vnd.jupyter.widget-view+json"] = view
        return data, metadata

    def receive(self, message: Mapping) -> None:
        """Receive one message of a page. An invalid message is answered with the current picture."""
        kind, number, begun = message.get("type"), message.get("n"), time.perf_counter()
        number = number if type(number) is int and abs(number) < 2**53 else None  # it is returned unchanged
        if kind == "set":
            self._react(lambda: dict(message.get("values") or {}), number, begun)
        elif kind == "reset":
            self._react(self.reset, number, begun)
        elif kind == "state" and isinstance(message.get("text"), str):
            self._react(lambda: self._parse(message["text"]), number, begun)
        elif kind == "picture" and self.view is not None:
            self.view.send({"picture": base64.b64encode(self.picture()[0]).decode()})
        elif kind == "press" and message.get("name") in list(self.buttons):
            self._react(lambda: self.buttons[message["name"]].press(self.values), number, begun)
        else:
            self.send(number, begun)

    def _react(self, act: Callable, number: object = None, begun: float | None = None) -> None:
        """Carry out an action, apply its result, and answer with the picture."""
        self.note = ""
        try:
            self._take(act())
        except Exception as error:  # show it on the page: a traceback would be invisible here
            self.note = f"{type(error).__name__}: {error}"
        self.send(number, begun)

    def _take(self, outcome: object) -> None:
        """Apply the result of an action: new values, a sentence to show, an awaitable of either, or nothing."""
        if inspect.isawaitable(outcome):
            self._task = asyncio.ensure_future(self._wait(outcome))
            self._task.add_done_callback(lambda _: self.send())
        elif isinstance(outcome, Mapping):
            known = {name: value for name, value in outcome.items() if name in self.controls}
            self._values |= {name: self.controls[name].parse(value) for name, value in known.items()}
        elif outcome is not None:
            self.note = str(outcome)

    async def _wait(self, awaitable) -> None:
        try:
            self._take(await awaitable)
        except Exception as error:
            self.note = f"{type(error).__name__}: {error}"

    def send(self, number: object = None, begun: float | None = None) -> None:
        """Send the current picture to the view, if there is one; number: of the message that this answers."""
        if self.view is None:
            return
        answer = {"n": number, "values": self.values, "state": self.state, "rows": []}
        try:
            answer["rows"] = self.rows()
        except Exception as error:
            self.note = f"{type(error).__name__}: {error}"
        took = 1000 * (time.perf_counter() - begun) if begun else None
        self.view.send(answer | {"note": plain(self.note), "ms": took})

    def config(self) -> dict:
        """The constant data of a page: the title, the controls in their order, and the footer."""
        every = self.controls | self.buttons
        controls = [{"kind": c.kind, "name": c.name, "label": plain(c.label or c.name)}
                    | ({"stops": [float(f"{s:.6g}") for s in c.stops], "names": plain(c.names),
                       "ends": list(c.ends)}
                       if isinstance(c, Slider) else {})
                    | ({"options": [[k, plain(v)] for k, v in c.options.items()]} if isinstance(c, Choice) else {})
                    for c in (every[name] for name in self._order)]
        return {"title": self.title, "controls": controls, "reset": bool(self.controls) and "reset" not in self.hide,
                "picture": "picture" not in self.hide, "state": "state" not in self.hide}

    def _parse(self, text: str) -> dict:
        parts = [part.partition("=") for part in text.split("&")] if text else []
        names = [name for name, _, _ in parts]
        for name, equals, _ in parts:
            if name not in self.controls or not equals or names.count(name) > 1:
                problem = "unknown" if name not in self.controls else "there twice" if equals else "without a value"
                raise ValueError(f"state is {text!r}: {name} is {problem}, expected NAME=VALUE with the names "
                                 f"{', '.join(self.controls)}, joined by '&'")
        try:
            return {name: self.controls[name].parse(value) for name, _, value in parts}
        except ValueError as error:
            raise ValueError(f"state is {text!r}: {error}") from None
