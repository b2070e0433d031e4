"""Earlier states of a run that is steered, to go back to: a few copies in memory, never more than a GiB together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from alignkit.optim import copied, size

MOST = 20  # copies, besides the one of the start
LIMIT = 2**30  # bytes


class Snapshots:
    """`kept` maps an iteration to a copy of what `state.state_dict()` said after it.

    One at the start, then one every total / 20 iterations; fewer of a large state, and none of one above the limit. The
    tiny policy with its critic and both optimizers takes 2 to 3 MB a copy; of a model with a LoRA adapter, the adapter.
    """

    def __init__(self, state: object, total: int) -> None:
        self.state, self.total = state, total
        self.kept: dict[int, Mapping] = {}

    def take(self, iteration: int) -> None:
        """Copy the state, if it is the turn of this iteration."""
        now = self.state.state_dict()
        room = min(MOST, LIMIT // max(size(now), 1))
        if room and not (self.kept and iteration % math.ceil(self.total / room)):
            self.kept[iteration] = copied(now)

    def restore(self, iteration: int) -> None:
        """Put the state back to what it was after `iteration`, and forget the copies of later ones."""
        self.state.load_state_dict(copied(self.kept[iteration]))  # an optimizer writes into what it has loaded
        self.kept = {at: saved for at, saved in self.kept.items() if at <= iteration}
