"""CheckpointComparer: responses of two or more checkpoints to the same prompts, side by side, optionally blind, with
votes."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alignkit.data.labels import UNDECIDED, Item, choice_items
from alignkit.formulas.intervals import vote_shares
from alignkit_widgets.boards.board import Board, button
from alignkit_widgets.boards.responses import sample_side_by_side


class CheckpointComparer(Board):
    """Compare the responses of checkpoints to the same prompts, and vote.

    ```python
    comparer = CheckpointComparer({"SFT": run / "sft", "PPO": run / "ppo"}, prompts, "votes.jsonl", max_new_tokens=4)
    shares = await comparer.run()          # {"SFT": Estimate, "PPO": Estimate}: share of the votes with its interval
    ```

    Votes are stored like labels: the file holds them as preference pairs, the log beside it holds all of them. Prompts
    with the same response from every checkpoint are skipped and counted in `.same`.

    Args:
        checkpoints: name -> a folder, a Hub id, or (policy, tokenizer).
        prompts: texts.
        path: the file for the votes.
        max_new_tokens: of a response.
        world: the desk world, whose behaviours are shown beside the responses; None: no such notes.
        blind: hide the names and shuffle the order by `seed`, until "Show names" is pressed.
        seed: of the sampling and of the order.
        patience: seconds that `run` waits for a closed page.

    Raises ValueError with fewer than two checkpoints, or if their responses are equal for all prompts.
    """

    pictured = 3

    def __init__(
        self,
        checkpoints: Mapping[str, object],
        prompts: Sequence[str],
        path: str | Path,
        *,
        max_new_tokens: int,
        world=None,
        blind: bool = True,
        seed: int = 0,
        temperature: float = 1.0,
        title: str = "Which checkpoint answers better?",
        patience: float = 180.0,
    ) -> None:
        if not 2 <= len(checkpoints) <= 6:
            raise ValueError(f"checkpoints are {', '.join(checkpoints) or 'none'}, expected two to six of them")
        rows = sample_side_by_side(
            checkpoints, prompts, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, world=world
        )
        differing = [row for row in rows if len({text.strip() for text in row["responses"].values()}) > 1]
        if not differing:
            names = ", ".join(checkpoints)
            raise ValueError(f"{names} give the same responses to all {len(rows)} prompts; there is nothing to compare")
        self.names, self.same, self.blind = list(checkpoints), len(rows) - len(differing), blind
        items = choice_items(differing, seed)
        if not blind:
            items = [replace(item, order=tuple(self.names)) for item in items]
        super().__init__(title, items, path, patience)

    async def run(self) -> dict:
        """Show the board until Done is pressed; without a front end, only its first prompts. Returns `shares()`."""
        await self.watch()
        return self.shares()

    def shares(self) -> dict:
        """Share of the votes for each checkpoint, with Wilson's interval; ties are divided, skips ignored."""
        votes = [row["choice"] for row in self.log.choices.values() if row["choice"] != "skip"]
        return vote_shares(votes, self.names)

    def buttons(self) -> list[dict]:
        over, cards = self.at is None, []
        for place, letter in enumerate(string.ascii_uppercase[: len(self.names)]):
            arrow = [("ArrowLeft", "ArrowRight")[place]] if len(self.names) == 2 else []
            cards.append(button(f"vote {place}", f"{letter} is better", *arrow, letter.lower(), off=over, card=place))
        buttons = [
            *cards,
            button("tie", "Tie", "t", off=over),
            button("skip", "Skip", "s", off=over),
            button("undo", "Undo", "u", off=not self.log.choices),
            button("previous", "Previous", "p", off=len(self.items) < 2),
            button("next", "Next", "n", off=len(self.items) < 2),
        ]
        if self.blind:
            buttons.append(button("reveal", "Show names", "v"))
        return [*buttons, button("done", "Done")] if self.running else buttons

    def press(self, button: str, item: Item | None) -> None:
        if button == "undo":
            self.undo()
        elif button == "done":
            self.finished = True
        elif button == "reveal":
            self.blind = False
        elif button in ("previous", "next"):
            place = (0 if button == "next" else -1) if self.at is None else self.at + (1 if button == "next" else -1)
            self.go(place % len(self.items))
        elif item is not None:
            vote = button if button in UNDECIDED else item.order[int(button.removeprefix("vote "))]
            self.choose(item, vote, blind=self.blind)

    def label(self, item: Item, place: int) -> dict:
        name = item.order[place]
        return {
            "label": string.ascii_uppercase[place],
            "name": "" if self.blind else name,
            "tag": item.notes.get(name, ""),
        }

    def status(self) -> str:
        kinds = [row["choice"] for row in self.log.choices.values()]
        more = [f"{kinds.count(kind)} {word}" for kind, word in (("tie", "tied"), ("skip", "skipped")) if kind in kinds]
        votes = sum(kind != "skip" for kind in kinds)
        same = f"; {self.same} prompt{'s' * (self.same != 1)} with identical responses skipped" if self.same else ""
        end = "; every prompt has a vote" if self.at is None else ""
        return f"{', '.join([f'{votes} vote' + 's' * (votes != 1), *more])}{end}{same} · {self.log.path}"

    def results(self) -> list[dict]:
        if self.blind:
            return []
        votes = [row["choice"] for row in self.log.choices.values()]
        return [
            {
                "name": name,
                "text": f"{name}: {votes.count(name)} vote{'s' * (votes.count(name) != 1)}"
                + (f", {share.value:.0%} of all" if share.low is not None else ""),
                "value": share.value,
                "low": share.low,
                "high": share.high,
            }
            for name, share in self.shares().items()
        ]
