"""Results of reading a source: problems of single rows, the report of `check`, and the rows with their notes."""

from collections.abc import Iterable
from dataclasses import dataclass

PROBLEM_LIMIT = 100_000  # maximum number of stored problems; further ones are only counted


@dataclass(frozen=True)
class Problem:
    """One reason why a row cannot be used. `line` counts from 1; it is a row number if unit is "row"."""

    file: str
    line: int
    field: str
    reason: str
    unit: str = "line"

    def __str__(self) -> str:
        row = f"row {self.line}: " if self.unit == "row" else ""
        return f"{self.file}:{self.line}: {row}{self.field + ': ' if self.field else ''}{self.reason}"


class Rows(list):
    """A list of rows (dicts of text) with the observations made while reading.

    kind: "pairs", "demonstrations" or "prompts"; source: str; skipped: number of bad rows skipped; problems: the
    reasons; warnings: sentences about suspicious good rows; left_out: rows without information, such as ties.
    """

    def __init__(self, rows: Iterable[dict], kind: str, source: str, skipped=0, problems=(), warnings=(), left_out=0):
        super().__init__(rows)
        self.kind, self.source, self.skipped, self.left_out = kind, source, skipped, left_out
        self.problems, self.warnings = tuple(problems), tuple(warnings)


@dataclass(frozen=True)
class Report:
    """The findings of `check` about a source.

    kind: "pairs" | "demonstrations" | "prompts", None if no row could be read; rows: number of rows; bad_rows: rows
    with a problem; problems: the reasons in file order (at most PROBLEM_LIMIT); warnings: sentences; left_out: rows
    without information, such as ties and replies labelled as bad.
    """

    source: str
    kind: str | None
    rows: int
    bad_rows: int
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    left_out: int = 0

    @property
    def ok(self) -> bool:
        """True if there is at least one row and every row can be used."""
        return self.rows > self.left_out and self.bad_rows == 0

    def __str__(self) -> str:
        what = {"pairs": "preference pairs", None: "no readable rows"}.get(self.kind, self.kind)
        good = self.rows - self.bad_rows - self.left_out
        counts = f"{self.rows:,} row{'s' * (self.rows != 1)}, {good:,} good, {self.bad_rows:,} bad"
        counts += f", {self.left_out:,} left out" if self.left_out else ""
        more = [f"... and more: only the first {PROBLEM_LIMIT:,} problems are listed"]
        return "\n".join([*map(str, self.problems), *(more if len(self.problems) >= PROBLEM_LIMIT else []),
                          *(f"{self.source}: warning: {warning}" for warning in self.warnings),
                          f"{self.source}: {what}: {counts}: {'ok' if self.ok else 'not ok'}"])
