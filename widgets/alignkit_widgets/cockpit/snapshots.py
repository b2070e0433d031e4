"""Earlier states of a steered run, for rewinding: a few copies in memory, at most a GiB together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from alignkit.optim import copied, size

MOST = 20  # copies, besides the initial one
LIMIT = 2**30  # bytes


class Snapshots:
    """`kept` maps an iteration to a copy of the result of `state.state_dict()` after it.

    One at the start, then one every total / 20 iterations; fewer for a large state, and none if one exceeds the limit.
    A copy of the tiny policy with its critic and both optimizers takes 2 to 3 MB; for a model with a LoRA adapter, only
    the adapter is copied.
    """

    def __init__(self, state: object, total: int) -> None:
        self.state, self.total = state, total
        self.kept: dict[int, Mapping] = {}

    def take(self, iteration: int) -> None:
        """Copy the state if a snapshot is due at this iteration."""
        now = self.state.state_dict()
        room = min(MOST, LIMIT // max(size(now), 1))
        if room and not (self.kept and iteration % math.ceil(self.total / room)):
            self.kept[iteration] = copied(now)

    def restore(self, iteration: int) -> None:
        """Restore the state after `iteration`, and delete the copies of later ones."""
        self.state.load_state_dict(copied(self.kept[iteration]))  # an optimizer modifies the state that it has loaded
        self.kept = {at: saved for at, saved in self.kept.items() if at <= iteration}
