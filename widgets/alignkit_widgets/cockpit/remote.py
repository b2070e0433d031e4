"""The buttons: a page plays, pauses, steps and stops a loop that runs in a cell."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from alignkit_widgets.cockpit.controls import Controls
from alignkit_widgets.cockpit.session import Session

_TURNS = 5  # a message needs a few turns of the event loop inside ipykernel (about 2 µs each)
_BEAT = 5.0  # a page with a paused run says "alive" every 2 s; after "gone", another view has this long to answer


class Remote:
    """Stores how many iterations may run now: None for all remaining ones, 0 while paused, n for n and then a pause.

    A rewind does not change this: a paused run is paused at the earlier iteration.
    """

    def __init__(self, controls: Controls, patience: float) -> None:
        self.controls, self.patience = controls, patience
        self.budget: int | None = None
        self.stop = False
        self.target: object = None  # iteration to return to, as sent by the page
        self.session: Session | None = None
        self._heard = time.monotonic()
        self._wake = asyncio.Event()

    def receive(self, message: dict) -> None:
        """Receive one message of the page. Unknown ones are ignored."""
        kind = message.get("type")
        self._heard = time.monotonic()
        if kind == "play":
            self.budget = None
        elif kind == "pause":
            self.budget = 0
        elif kind == "step":
            self.budget = (self.budget or 0) + 1
        elif kind == "stop":
            self.stop = True
        elif kind == "rewind":
            self.target = message.get("iteration")
        elif kind == "set":
            self.controls.ask(message.get("name"), message.get("value"))
        elif kind == "gone":
            self._heard += _BEAT - self.patience
        if self.session is not None and kind == "sync":
            self.session.feed.resend(self.session.status())
        elif self.session is not None and kind == "picture":
            self.session.send_picture()
        elif self.session is not None and kind != "alive":
            self.session.feed.update(self.session.status(), force=True)
        self._wake.set()

    async def turn(self) -> bool:
        """Process messages, wait while the run is paused, and return whether to run the next iteration."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        self._rewind()
        if self.budget == 0 and not self.stop:
            self.session.move("paused")
            await self._wait()
            self.session.move("running")
        if self.budget:
            self.budget -= 1
        return not self.stop

    def take(self, iteration: int, replay: Mapping[int, Mapping[str, float]] | None) -> dict[str, float]:
        """Apply the waiting changes, or those of `replay`, for `iteration`; marks changes, returns all values."""
        if replay is not None and iteration in replay:
            self.controls.force(replay[iteration])
        self.session.mark(iteration, self.controls.take())
        return dict(self.controls.values)

    async def _wait(self) -> None:
        while self.budget == 0 and not self.stop:
            self._wake.clear()
            try:
                async with asyncio.timeout(1.0):  # wait_for can lose an interrupt that comes with a message
                    await self._wake.wait()
            except TimeoutError:
                if time.monotonic() - self._heard > self.patience:
                    self.budget = None
                    self.session.note = "the page of the paused run was closed, so the run continued"
            self._rewind()

    def _rewind(self) -> None:
        if self.target is not None:
            target, self.target = self.target, None
            self.session.rewind(target)
