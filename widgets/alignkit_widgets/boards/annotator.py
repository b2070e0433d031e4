"""PreferenceAnnotator: choose the better of two responses; every label is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from alignkit.data.labels import UNDECIDED, Item, choice_items, stored_rows
from alignkit.formulas.intervals import Estimate, wilson
from alignkit_widgets.boards.board import Board, button
from alignkit_widgets.boards.responses import sample_pairs
from alignkit_widgets.notebook import has_front_end


def first_shown(choices: Sequence[Mapping]) -> Estimate | None:
    """How often the left response was chosen, among choices other than tie and skip; ½ without position bias."""
    decided = [row for row in choices if row["choice"] not in UNDECIDED]
    left = sum(row["choice"] == row["order"][0] for row in decided)
    return Estimate(left / len(decided), *wilson(left, len(decided))) if decided else None


class PreferenceAnnotator(Board):
    """Label pairs of responses with mouse or keyboard.

    ```python
    annotator = PreferenceAnnotator(rows, "labels.jsonl")       # rows: [{"prompt", "a", "b"}, …]
    labels = await annotator.run(20)                            # rows prompt / chosen / rejected, after 20 of them
    scorer, moved = retrain(scorer, labels, heldout)            # alignkit.labels
    ```

    Each label is on disk before the next pair is shown; an existing file is continued (see `alignkit.data.labels`). The
    left–right order is shuffled by `seed` and recorded.

    Args:
        rows: pairs to label; None: those in `labels`.
        path: the file to write, in the format of `alignkit.load_rows`; FILE.log.jsonl beside it is the log.
        labels: a stored label file, which a run without a front end replays.
        seed: of the left–right order.
        patience: seconds that `run` waits for a closed page.

    Raises ValueError if a row lacks a field, FileExistsError if `path` is a file that was not written by alignkit.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, str]] | None,
        path: str | Path,
        *,
        labels: str | Path | None = None,
        seed: int = 0,
        title: str = "Which response is better?",
        patience: float = 180.0,
    ) -> None:
        if rows is None and labels is None:
            raise ValueError("rows and labels are None, expected pairs to label, or a stored label file")
        self.stored, self.goal = labels, None
        given = stored_rows(labels) if rows is None else [_row(row, number) for number, row in enumerate(rows)]
        super().__init__(title, choice_items(given, seed), path, patience)

    @classmethod
    def from_policy(
        cls,
        policy,
        tokenizer,
        prompts: Sequence[str],
        path: str | Path,
        *,
        max_new_tokens: int,
        seed: int = 0,
        **options,
    ) -> PreferenceAnnotator:
        """Label pairs of different responses that `policy` gives to `prompts`."""
        rows = sample_pairs(policy, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed)
        return cls(rows, path, seed=seed, **options)

    @property
    def labels(self) -> list[dict]:
        """The preference pairs made here so far: prompt, chosen, rejected, label. Ties and skips give none."""
        return [row for row in self.log.pairs() if row["label"]["item"] in self.log.items]

    async def run(self, n: int | None = None) -> list[dict]:
        """Show the pairs until `n` of them are labelled (None: all), or Done is pressed; returns `labels`.

        Labels that were already in the file count. Without a front end the stored labels are replayed instead. Raises
        ValueError if none of them matches a pair.
        """
        self.goal = n
        if not has_front_end() and self.stored is not None:
            if not self.log.replay(self.stored) and not self.log.choices:
                raise ValueError(f"{self.stored} has no label on any of the {len(self.items)} pairs to label")
            self.go(self.next_open(0))
        await self.watch()
        return self.labels

    def enough(self) -> bool:
        return self.finished or self.at is None or (self.goal is not None and len(self.labels) >= self.goal)

    def buttons(self) -> list[dict]:
        over = self.at is None
        buttons = [
            button("left", "Left is better", "ArrowLeft", "l", off=over, card=0),
            button("right", "Right is better", "ArrowRight", "r", off=over, card=1),
            button("tie", "Tie", "t", off=over),
            button("skip", "Skip", "s", off=over),
            button("undo", "Undo", "u", off=not self.log.choices),
        ]
        return [*buttons, button("done", "Done")] if self.running else buttons

    def press(self, button: str, item: Item | None) -> None:
        if button == "undo":
            self.undo()
        elif button == "done":
            self.finished = True
        elif item is not None:
            self.choose(item, item.order[button == "right"] if button in ("left", "right") else button)

    def label(self, item: Item, place: int) -> dict:
        return {"label": ("Left", "Right")[place], "name": "", "tag": ""}

    def status(self) -> str:
        choices = list(self.log.choices.values())
        kinds = [row["choice"] for row in choices]
        labels = sum(kind not in UNDECIDED for kind in kinds)
        more = [f"{kinds.count(kind)} {word}" for kind, word in (("tie", "tied"), ("skip", "skipped")) if kind in kinds]
        goal = f" of {self.goal}" if self.running and self.goal else ""
        counted = ", ".join([f"{labels}{goal} label{'s' * (labels != 1 or bool(goal))}", *more])
        end = "; all pairs are done" if self.at is None else ""
        done = " · the cell runs until you press Done" if self.running else ""
        return f"{counted}{end}{done} · {self.log.path}"

    def results(self) -> list[dict]:
        left = first_shown(list(self.log.choices.values())) if self.at is None or not self.running else None
        if left is None:
            return []
        text = f"left was chosen in {left.value:.0%} of the labels (without a habit, about 50%)"
        return [{"name": "left", "text": text, "value": left.value, "low": left.low, "high": left.high}]


def _row(row: Mapping[str, str], number: int) -> dict:
    if not {"prompt", "a", "b"} <= row.keys():
        raise ValueError(f"rows[{number}] has the keys {sorted(row)}, expected prompt, a and b")
    return {"prompt": row["prompt"], "responses": {"a": row["a"], "b": row["b"]}}
