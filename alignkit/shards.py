"""Optimiser states that are shared out (ZeRO-1, Rajbhandari et al. 2020): `--shard optimizer`.

AdamW keeps two numbers for each number of a weight, and changes a weight by nothing but its own gradient and states. So
each process keeps the states of some weights, steps those, and gives them to the others: the same bits as without, and
about 1/N of the states in each of N processes. Outside an iteration process 0 brings all states together whenever
`state.state_dict()` is asked for, so that a checkpoint or a snapshot does not depend on the number of processes.

torch's ZeroRedundancyOptimizer does the same, but it brings the states together by pickle, which alignkit reads and
writes nowhere, and wants to be made in place of AdamW, in a notebook that does not know how many processes train.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from alignkit.errors import RunError
from alignkit.processes import broadcast_weights, count, moved, sharded

STATES = ("step", "exp_avg", "exp_avg_sq")  # of a weight: AdamW's, in the order in which it makes them


def keepers(weights: list[Tensor], number: int) -> list[int]:
    """The process, of `number`, that keeps the states of each weight: the largest weights first, each goes to the
    process that has the fewest elements so far."""
    held, place = [0] * number, [0] * len(weights)
    for index in sorted(range(len(weights)), key=lambda index: -weights[index].numel()):
        place[index] = held.index(min(held))
        held[place[index]] += weights[index].numel()
    return place


@torch.no_grad()
def take_step(optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimiser. With sharded states a process steps the weights whose states it keeps, and gets the
    others from the processes that keep theirs."""
    if not sharded():
        optimizer.step()
        return
    weights = _weights(optimizer)
    kept = keepers(weights, count())
    gradients = [weight.grad for weight in weights]
    for weight, keeper in zip(weights, kept, strict=True):
        if keeper != dist.get_rank():
            weight.grad = None  # the optimiser passes over it
    optimizer.step()
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    for keeper in range(count()):
        broadcast_weights([weight for weight, place in zip(weights, kept, strict=True)
                           if place == keeper and weight.grad is not None], keeper)


def optimizers(state) -> list[torch.optim.Optimizer]:
    """The optimisers of a PPOState or DPOState, in the same order in every process."""
    return [optimizer for _, optimizer in state.trained().values()]


def without_states(saved: Mapping) -> dict:
    """A state's `state_dict()` without the states of its optimisers: what is equal in all processes."""
    return {name: {**part, "state": {}} if isinstance(part, Mapping) and "param_groups" in part else part
            for name, part in saved.items()}


def share_out(state) -> None:
    """Give each process the optimiser states that it keeps. Process 0 has all of them before; the others have none."""
    for optimizer in optimizers(state):
        for _, weight, keeper in _with_states(optimizer):
            for name in STATES:
                tensor = _moved(optimizer, weight, name, 0, keeper)
                if tensor is not None:
                    optimizer.state[weight][name] = tensor.to(weight.device)
            if dist.get_rank() != keeper:
                optimizer.state.pop(weight, None)


def gathered(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor | None]]:
    """The states of all weights by their numbers in the optimiser, in process 0; None instead of them in the others.

    All processes call this. What came from others is on the CPU if they exchange through it."""
    return {number: {name: _moved(optimizer, weight, name, keeper, 0) for name in STATES}
            for number, weight, keeper in _with_states(optimizer)}


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _with_states(optimizer: torch.optim.Optimizer) -> list[tuple[int, Tensor, int]]:
    """The weights of which a process has states: number, weight and keeper."""
    weights = _weights(optimizer)
    known = torch.tensor([float(weight in optimizer.state) for weight in weights], device=weights[0].device)
    dist.all_reduce(known)
    kept = keepers(weights, dist.get_world_size())
    return [(number, weight, kept[number]) for number, weight in enumerate(weights) if known[number]]


def _moved(optimizer: torch.optim.Optimizer, weight: Tensor, name: str, source: int, target: int) -> Tensor | None:
    """A weight's state of this name in the process `target`, from `source`; None in the others."""
    shape, kind = ((), torch.float32) if name == "step" else (weight.shape, weight.dtype)
    return moved(optimizer.state[weight][name] if dist.get_rank() == source else None, shape, kind, source, target)


class Shards:
    """In process 0: makes `state.state_dict()` whole outside an iteration, and knows when states are lost.

    asking: makes a context in which the other processes call `gathered` of the optimiser of this number.
    """

    def __init__(self, state, asking: Callable[[int], AbstractContextManager]):
        self.state, self.asking = state, asking
        self.apart = False  # whether other processes keep the states that this one lacks
        for number, optimizer in enumerate(optimizers(state)):
            optimizer.register_state_dict_post_hook(functools.partial(self._whole, number))
            optimizer.register_load_state_dict_post_hook(self._loaded)

    @contextlib.contextmanager
    def apart_during(self) -> Iterator[None]:
        """Around an iteration or a gathering. An error in it ends the other processes, so it loses what they keep:
        `state.whole` is False then, until a whole state is loaded."""
        self.apart = True
        try:
            yield
        except BaseException:
            self.apart = False
            self.state.whole = not any(optimizer.state for optimizer in optimizers(self.state))
            raise

    def check(self) -> None:
        """Raise RunError if optimiser states are lost."""
        if not self.state.whole:
            raise RunError("optimiser states are lost with the processes that kept them; the same command goes on from "
                           "the last checkpoint, and so does the state once a checkpoint is loaded into it")

    def _whole(self, number: int, optimizer: torch.optim.Optimizer, saved: dict) -> dict:
        if count() > 1:  # within an iteration each process copies and restores its own
            return saved
        self.check()
        if not self.apart:
            return saved
        with self.asking(number), self.apart_during():
            return {**saved, "state": gathered(optimizer)}

    def _loaded(self, _optimizer: torch.optim.Optimizer) -> None:
        if count() == 1:
            self.apart = False
