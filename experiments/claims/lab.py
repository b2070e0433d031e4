"""What the labs of the claims share: a rule as a row of a record, the tables of their pages, and their command.

A *lab* trains and measures in several worlds, keeps what is finished in a folder, and writes a record into the package
and a page into `docs/`: `experiments.claims`, `dials`, `knowledge`, `unpacking` and `advice`.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch

from alignkit.evaluate.claims import VERDICTS, Claim
from alignkit.runs.records import versions
from alignkit.storage import plain, settings, write_atomically
from experiments.sweep import write_compact

DOCS = Path(__file__).parents[2] / "docs"
WORKERS = {"--workers": {"type": int, "default": os.cpu_count() or 1, "help": "processes, one thread each"}}
MEANING = (
    "*Confirmed*: the 95 % interval over worlds lies on the claimed side of 0, and the mean is beyond the margin. "
    "*Refuted*: the interval lies on the other side, or inside the margin on both sides. *Within* is confirmed inside "
    "the margin and refuted outside. *Undecided*: anything else.")


# ---- a record
def claim_row(rule, experiment: str, worlds: Mapping[str, float | None]) -> dict:
    """A rule, its statistic in each world, and what measured it: the fields of `alignkit.evaluate.claims.Claim`."""
    fixed = ("name", "source", "original", "english", "quantity", "side", "margin")
    return {**{name: getattr(rule, name) for name in fixed}, "experiment": experiment, "worlds": dict(worlds)}


def key_of(size) -> dict:
    """The settings of a frozen dataclass, which may hold configs, as plain JSON types."""
    values = {each.name: getattr(size, each.name) for each in fields(size)}
    return plain({name: settings(value) if is_dataclass(value) else value for name, value in values.items()})


# ---- a page
def bound(claim: Claim) -> str:
    """The rule in words."""
    if claim.side == "within":
        return f"within ±{claim.margin:.3g}"
    if not claim.margin:
        return f"{claim.side} 0"
    return f"{'above ' if claim.side == 'above' else 'below −'}{claim.margin:.3g}"


def claim_cells(claim: Claim) -> dict[str, str]:
    """Column -> cell of a claim's row."""
    return {"claim": claim.name, "what the article says": f"{claim.source}: {claim.english}<br>{claim.original}",
            "quantity": claim.quantity, "rule": bound(claim), "mean [95 % interval]": f"{claim.estimate:.3f}",
            "worlds": str(len(claim.values)), "verdict": f"**{claim.verdict}**"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def claims_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of rows made by `claim_cells`."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


def counted(claims: Sequence[Claim], comparisons: int | None = None) -> str:
    """How many claims have which verdict, and how many of their intervals miss by chance. comparisons: the number of
    intervals if it is not that of the claims."""
    of, number = {name: sum(claim.verdict == name for claim in claims) for name in VERDICTS}, comparisons or len(claims)
    return (f"{len(claims)} claims: {', '.join(f'{of[name]} {name}' for name in VERDICTS)}. The intervals are not "
            f"corrected for their number: of {number} true values about {0.05 * number:.0f} lie outside their interval "
            "by chance, and a claim whose true value is 0 is called confirmed in up to 2.5 % of cases.")


# ---- a command
def run_lab(name: str, about: str, arguments: Sequence[str] | None, *, seeds: Sequence[int], folder: Path, file: Path,
            make: Callable[[argparse.Namespace], dict], page: Callable[[Path], str],
            options: Mapping[str, dict] | None = None) -> None:
    """The command of a lab: make its record, write it, and print its page.

    name: of the lab's module and page. about: what the command does, in one line. seeds, folder: what is taken unless
    the arguments say otherwise. file: the shipped record. make: parsed arguments -> the record without the command and
    the versions; it may hold a "command" of its own. page: file of a record -> its page. options: further options with
    the arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=about)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--folder", type=Path, default=folder, help="where what is finished is kept")
    parser.add_argument("--json", type=Path, default=None, help="write the record here")
    parser.add_argument("--record", action="store_true", help=f"write the shipped record and docs/{name}.md")
    for option, how in (options or {}).items():
        parser.add_argument(option, **how)
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    target = file if given.record else given.json or given.folder / f"{name}.json"
    command = f"python -m experiments.{name} --seeds {' '.join(map(str, given.seeds))} --record"
    write_compact(target, plain({"command": command, "versions": versions(), **make(given)}))
    text = page(target)
    if given.record:
        write_atomically(DOCS / f"{name}.md", text)
    print(text)
