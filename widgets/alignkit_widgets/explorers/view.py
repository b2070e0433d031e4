"""An explorer's browser side: an anywidget that receives only custom messages, as the cockpit's does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anywidget
import traitlets

from alignkit.metrics import GLOSSARY
from alignkit_widgets.explorers.blocks import LOOKS
from alignkit_widgets.looks import dashes


class View(anywidget.AnyWidget):
    """The view is `explorer.js`; `config` is constant (title, controls, looks)."""

    _esm = (Path(__file__).parent / "explorer.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "explorer.css").read_text(encoding="utf-8")
    config = traitlets.Dict().tag(sync=True)


def make_view(config: dict, on_message: Callable[[dict], None]) -> View:
    """A view of an explorer whose messages go to `on_message`."""
    view = View(config=view_config(config))
    view.on_msg(lambda _, content, __: on_message(content) if isinstance(content, dict) else None)
    return view


def view_config(config: dict) -> dict:
    """`config` plus what `explorer.js` needs besides: colour, marker and dashes of each look, and what terms mean."""
    looks = {name: [colour, marker, dashes(line)] for name, (colour, marker, line) in LOOKS.items()}
    return config | {"looks": looks, "glossary": GLOSSARY}
