"""The cockpit's other half in the browser: an anywidget that is fed by custom messages only.

Synced traits are held back while an awaiting cell runs (ipykernel 7.4); custom messages get through, both ways.
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
    """The view is `cockpit.js`; `config` is what never changes during a run (title, charts, controls)."""

    _esm = (Path(__file__).parent / "cockpit.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "cockpit.css").read_text(encoding="utf-8")
    config = traitlets.Dict().tag(sync=True)


class PanelDisplay:
    """One panel shown in one cell, and replaced by a picture in the end."""

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
        """Put a picture, (PNG, metadata), where the panel was; `text` shows where there are no pictures."""
        data, metadata = bundle(picture, text)
        self.handle.update(data, metadata=metadata, raw=True)
