"""Axe's rules of accessibility on a page, from the PyPI package that brings axe.min.js along: no request is made."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def serious_faults(page) -> list[str]:
    """What axe finds on a page that it calls serious or critical: rule, message and the elements."""
    axe = Path(find_spec("axe_playwright_python").submodule_search_locations[0]) / "axe.min.js"
    page.evaluate(axe.read_text(encoding="utf-8"))
    # preload would read style sheets again, to judge orientation locks, and look for imported ones in the wrong folder
    found = page.evaluate("() => axe.run(document, { resultTypes: ['violations'], preload: false })")["violations"]
    return [f"{fault['id']}: {fault['help']}: {[node['target'] for node in fault['nodes']]}" for fault in found
            if fault["impact"] in ("serious", "critical")]
