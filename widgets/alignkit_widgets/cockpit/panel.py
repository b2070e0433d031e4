"""The cockpit's browser side: an anywidget that receives only custom messages.

While an awaiting cell runs, synced traits are delayed (ipykernel 7.4), but custom messages pass in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anywidget
import traitlets
from IPython.display import display

from alignkit_widgets.looks import looks
from alignkit_widgets.notebook import bundle


class Panel(anywidget.AnyWidget):
    """The view is `cockpit.js`; `config` is constant during a run (title, charts, controls)."""

    _esm = (Path(__file__).parent / "cockpit.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "cockpit.css").read_text(encoding="utf-8")
    config = traitlets.Dict().tag(sync=True)


class PanelDisplay:
    """One panel shown in one cell, and replaced by a picture at the end."""

    def __init__(self, config: dict, on_message: Callable[[dict], None]) -> None:
        self.panel = Panel(config=config | looks())
        self.panel.on_msg(lambda _, content, __: on_message(content) if isinstance(content, dict) else None)
        view = {"model_id": self.panel.model_id, "version_major": 2, "version_minor": 0}
        self.handle = display(
            {
                "application/vnd.jupyter.widget-view+json": view,
                "text/plain": f"{config['title']}: a live panel while the cell runs, a picture after that.",
            },
            raw=True,
            display_id=True,
        )

    def send(self, message: dict) -> None:
        """Queue one custom message for every view of the panel."""
        self.panel.send(message)

    def replace(self, picture: tuple[bytes, dict], text: str) -> None:
        """Replace the panel by a picture, (PNG, metadata); `text` is shown if pictures are not displayed."""
        data, metadata = bundle(picture, text)
        self.handle.update(data, metadata=metadata, raw=True)
