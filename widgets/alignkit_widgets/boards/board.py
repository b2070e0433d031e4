"""A board: responses to one prompt side by side, with buttons or keys to choose. Annotator and comparer are boards.

Nothing waits for the page: each press is written to the log, then the board sends every page the next state.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anywidget
import traitlets

from alignkit.data.labels import UNDECIDED, ChoiceLog, Item
from alignkit.safe_text import visible
from alignkit_widgets.boards.responses import word_differences
from alignkit_widgets.notebook import has_front_end, in_kernel

SHOWN = 6000  # characters of a response
ANY_ITEM = ("reveal", "done")  # buttons that count whichever item the page showed: it may not have the next one yet
_BEAT = 12.0  # a page says "alive" every 5 s; after "gone", another view has this long to answer


class BoardView(anywidget.AnyWidget):
    """The view is `board.js`, which receives only custom messages; `config` is constant (the title)."""

    _esm = (Path(__file__).parent / "board.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "board.css").read_text(encoding="utf-8")
    config = traitlets.Dict().tag(sync=True)


class Board:
    """Items to choose on, shown one at a time. `patience`: seconds that `run` waits for a closed page."""

    def __init__(self, title: str, items: Sequence[Item], path: str | Path, patience: float = 180.0) -> None:
        self.title, self.items, self.patience = title, list(items), patience
        self.log = ChoiceLog(path, self.items)
        self.listeners: list[Callable[[dict], None]] = []
        self.note, self.running, self.finished = "", False, False
        self.at: int | None = None
        self.go(self.next_open(0))
        self._heard = time.monotonic()

    # methods that each kind of board defines

    def buttons(self) -> list[dict]:
        """The buttons: {"id", "label", "keys", "shown", "off", and "card" for one that belongs to a card}."""
        raise NotImplementedError

    def press(self, button: str, item: Item | None) -> None:
        """Carry out a button's action on the item that the page showed."""
        raise NotImplementedError

    def status(self) -> str:
        """One line: the progress, and where the choices are saved."""
        raise NotImplementedError

    def label(self, item: Item, place: int) -> dict:
        """The head of a card: {"label", "name", "tag"}."""
        raise NotImplementedError

    def results(self) -> list[dict]:
        """The results so far: {"name", "text", "value", "low", "high"}; [] while they must stay hidden."""
        return []

    def enough(self) -> bool:
        """Whether `run` is finished."""
        return self.finished

    # methods that all boards share

    def next_open(self, start: int) -> int | None:
        """The first item without a choice, from `start` on, then from the beginning; None if there is none."""
        done, n = self.log.choices, len(self.items)
        return next((i % n for i in range(start, start + n) if self.items[i % n].id not in done), None)

    def go(self, place: int | None) -> None:
        """Show another item."""
        self.at, self.since = place, time.monotonic()

    def choose(self, item: Item, choice: str, **facts) -> None:
        """Record a choice and show the next open item."""
        self.log.choose(item, choice, seconds=round(time.monotonic() - self.since, 2), **facts)
        self.go(self.next_open(self.items.index(item) + 1))

    def undo(self) -> None:
        """Undo the last choice and show its item."""
        undone = self.log.undo()
        if undone is not None:
            self.go(next(i for i, item in enumerate(self.items) if item.id == undone))

    def receive(self, message: dict) -> None:
        """Receive one message of a page. Choices for an item that is no longer shown, and unknown messages, are
        ignored."""
        kind, self._heard = message.get("type"), time.monotonic()
        if kind == "alive":
            return
        if kind == "picture":
            png = base64.b64encode(self.picture()[0]).decode()
            for send in self.listeners:
                send({"picture": png})
            return
        if kind == "gone":
            self._heard += _BEAT - self.patience
        item = self.items[self.at] if self.at is not None else None
        known = [button["id"] for button in self.buttons() if not button["off"]]
        meant = message.get("button") in ANY_ITEM or message.get("item") == (item and item.id)
        if kind == "press" and message.get("button") in known and meant:
            try:
                self.note = ""
                self.press(message["button"], item)
            except (OSError, ValueError) as error:
                self.note = f"not saved: {error}"
        self.tell()

    def tell(self) -> None:
        """Send every page the state to show."""
        state = self.state()
        for send in self.listeners:
            send(state)

    def state(self) -> dict:
        """The complete state of a page, as plain JSON."""
        item = self.items[self.at] if self.at is not None else None
        choice = self.log.choices.get(item.id, {}).get("choice") if item else None
        return {
            "item": item and {
                "id": item.id,
                "caption": f"{self.at + 1} of {len(self.items)}" + (f" · {choice}" if choice in UNDECIDED else ""),
                "prompt": visible(item.prompt, SHOWN),
                "cards": self.cards(item),
            },
            "buttons": self.buttons(),
            "status": self.status(),
            "done": len(self.log.choices),
            "total": len(self.items),
            "note": visible(self.note),
            "results": self.results(),
        }

    def cards(self, item: Item) -> list[dict]:
        """The responses in display order, in pieces that mark the differences."""
        chosen = self.log.choices.get(item.id, {}).get("choice")
        pieces = word_differences([visible(item.responses[name].strip(), SHOWN) for name in item.order])
        return [
            {**self.label(item, place), "pieces": pieces[place], "chosen": name == chosen}
            for place, name in enumerate(item.order)
        ]

    def show(self) -> None:
        """Show the board and return at once; without a front end, a picture of its current state."""
        if has_front_end():
            self._display(*self._picture_bundle())
        else:
            self._leave_picture()

    def _display(self, data: dict, metadata: dict | None = None):
        """Show the panel, with a replacement if widgets are not displayed."""
        from IPython.display import display

        view = BoardView(config={"title": self.title})
        view.on_msg(lambda _, content, __: self.receive(content) if isinstance(content, dict) else None)
        self.listeners = [view.send]
        model = {"model_id": view.model_id, "version_major": 2, "version_minor": 0}
        data = {"application/vnd.jupyter.widget-view+json": model} | data
        return display(data, metadata=metadata, raw=True, display_id=True)

    async def watch(self) -> None:
        """Show the board, wait until it is `enough`, or until the page is closed, and replace it by a picture."""
        self.running, self.finished, self._heard = True, False, time.monotonic()
        if not has_front_end() or self.enough():
            self.running = False
            self._leave_picture()
            return
        text = f"{self.title}: the panel for your choices is shown here while the cell runs. {self.status()}"
        handle = self._display({"text/plain": text})
        try:
            while not self.enough():
                await asyncio.sleep(0.1)  # not wait_for, which can lose an interrupt that arrives together with a press
                if time.monotonic() - self._heard > self.patience:
                    print(f"{self.title}: the page was closed. Your choices are saved; run the cell again to continue.")
                    break
        finally:
            self.running, self.listeners = False, []
            self._leave_picture(handle)

    def picture(self) -> tuple[bytes, dict]:
        """The first item and the results as a PNG, with its size and alt text."""
        from alignkit_widgets.boards.picture import draw_board

        items = [(visible(item.prompt, 300), self.cards(item)) for item in self.items[: self.pictured]]
        return draw_board(self.title, self.status(), items, self.results())

    pictured = 1  # items in a picture

    def _picture_bundle(self) -> tuple[dict, dict]:
        from alignkit_widgets.notebook import bundle

        return bundle(self.picture(), self._words())

    def _words(self) -> str:
        return "\n".join([f"{self.title}: {self.status()}", *(row["text"] for row in self.results())])

    def _leave_picture(self, handle=None) -> None:
        from IPython.display import display

        if not in_kernel():
            print(self._words())
            return
        data, metadata = self._picture_bundle()
        (display if handle is None else handle.update)(data, metadata=metadata, raw=True)


def button(name: str, label: str, *keys: str, off: bool = False, card: int | None = None) -> dict:
    """A button and its keys; the first letter of an arrow key's name is drawn as an arrow."""
    arrows = {"ArrowLeft": "←", "ArrowRight": "→"}
    return {"id": name, "label": label, "keys": [key.lower() for key in keys], "off": off, "card": card,
            "shown": [arrows.get(key, key.upper()) for key in keys]}
