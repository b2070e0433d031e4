"""docs/quality.md and its picture, from the record."""

import json
from pathlib import Path


def load(path: Path) -> dict:
    """The record."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(record: dict, page: Path, picture: Path) -> None:
    """Write the page and its picture."""


def tables(record: dict) -> str:
    """The page's tables."""
    return ""
