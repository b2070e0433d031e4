"""Detect whether a notebook has a front end, and print progress if it has none."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping

from IPython.display import display


def has_front_end() -> bool:
    """Whether the notebook is open in a front end.

    ALIGNKIT_HEADLESS=1 means no front end, =0 means there is one. Without it: there must be a Jupyter kernel, and the
    cell must come from a client that could answer `input()`, unlike papermill and nbconvert.
    """
    chosen = os.environ.get("ALIGNKIT_HEADLESS", "").strip().lower()
    if chosen:
        return chosen in ("0", "false", "no")
    kernel = getattr(_shell(), "kernel", None)
    return bool(kernel is not None and getattr(kernel, "_allow_stdin", True))


def in_kernel() -> bool:
    """Whether this is a Jupyter kernel, with or without a front end: pictures can be displayed."""
    return getattr(_shell(), "kernel", None) is not None


def _shell() -> object | None:
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


class TextProgress:
    """A line of progress every few seconds, for logs and terminals."""

    def __init__(self, title: str, keys: list[str], every: float = 5.0) -> None:
        self.title, self.keys, self.every = title, keys, every
        self.last = time.monotonic()

    def update(self, place: str, row: Mapping[str, object], final: bool = False) -> None:
        """Print `place` ("12 of 40, 31.0 s left") and the latest numbers, unless the last line is too recent."""
        now = time.monotonic()
        if now - self.last < self.every and not final:
            return
        self.last = now
        numbers = [f"{k} {row[k]:.4g}" for k in self.keys if isinstance(row.get(k), float)]
        print(" | ".join([f"{self.title}: {place}", *numbers]), flush=True)


def display_png(picture: tuple[bytes, dict], text: str) -> None:
    """Show a picture, (PNG, metadata), below the cell's earlier output."""
    data, metadata = bundle(picture, text)
    display(data, metadata=metadata, raw=True)


def bundle(picture: tuple[bytes, dict], text: str) -> tuple[dict, dict]:
    """A picture, (PNG, metadata), in the form of IPython's `display` with raw=True: data and metadata by MIME type."""
    png, metadata = picture
    return {"image/png": base64.b64encode(png).decode(), "text/plain": text}, {"image/png": metadata}
