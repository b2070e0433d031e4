"""An explorer's half in the browser: an anywidget that is fed by custom messages only, as the cockpit's is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anywidget
import traitlets

from alignkit_widgets.explorers.blocks import LOOKS
from alignkit_widgets.looks import dashes


class View(anywidget.AnyWidget):
    """The view is `explorer.js`; `config` is what never changes (title, controls, looks)."""

    _esm = (Path(__file__).parent / "explorer.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "explorer.css").read_text(encoding="utf-8")
    config = traitlets.Dict().tag(sync=True)


def make_view(config: dict, on_message: Callable[[dict], None]) -> View:
    """A view of an explorer whose messages go to `on_message`."""
    view = View(config=view_config(config))
    view.on_msg(lambda _, content, __: on_message(content) if isinstance(content, dict) else None)
    return view


def view_config(config: dict) -> dict:
    """`config` with what `explorer.js` draws with: colour, marker and dashes of each look."""
    looks = {name: [colour, marker, dashes(line)] for name, (colour, marker, line) in LOOKS.items()}
    return config | {"looks": looks}
