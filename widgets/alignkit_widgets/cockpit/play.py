"""The command `alignkit play`, found by entry point: it loads the page's code, and with it matplotlib, when it runs."""

import argparse
from pathlib import Path

from alignkit.jobs.cli import folder
from alignkit.safe_text import one_line


def add_play(add) -> None:
    """Add `alignkit play` to the command; add(name, function, about) returns its parser."""
    play = add("play", _play, "write a recorded PPO run as one HTML file that plays, pauses and scrubs",
               epilog="example: alignkit play runs/course --out ppo.html")
    about = "a run directory, or a folder with a PPO run's metrics.jsonl"
    play.add_argument("run", type=folder, metavar="RUN", help=about)
    play.add_argument("--out", type=Path, metavar="FILE", help="the page to write (default: play.html in RUN)")


def _play(options: argparse.Namespace) -> None:
    from alignkit_widgets.cockpit.player import save_run

    page = save_run(options.run, options.out or options.run / "play.html")
    print(f"{one_line(page, 1000)}, {page.stat().st_size / 1e6:.1f} MB")
