"""Shared parts of PPO's and DPO's steps: the optimiser, its learning rate, two computations in parallel on two cores,
steps that are made completely or not at all, and recovery when memory runs out."""

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from alignkit.errors import OutOfMemory, is_out_of_memory
from alignkit.processes import count


def adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW without weight decay, fused, eps 1e-5 (Huang 2024, detail 25)."""
    return torch.optim.AdamW(parameters, lr=learning_rate, eps=1e-5, weight_decay=0.0, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate for all following steps."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


A, B = TypeVar("A"), TypeVar("B")


def side_by_side(one: Callable[[], A], other: Callable[[], B], device: torch.device) -> tuple[A, B]:
    """Run `one()` and `other()`, two independent computations, and return both results.

    They run in parallel on a CPU if an operation uses one thread, this process may use more cores, and no other process
    shares the work: `other` runs in a separate thread with the caller's grad mode and autocast. Otherwise they run one
    after the other. An exception, or an interrupt at any time, is raised after both have ended, or when `other` can no
    longer begin.
    """
    if torch.device(device).type != "cpu" or torch.get_num_threads() > 1 or _cores() < 2 or count() > 1:
        return one(), other()
    grad, dtype, lowered = torch.is_grad_enabled(), torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    door, ended = threading.Lock(), threading.Event()  # the first thread to take the lock decides whether `other` runs
    passed: list[str] = []
    outcome: dict[str, object] = {}

    def beside() -> None:
        with door:
            passed.append("other")
        if passed[0] == "other":
            try:
                with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, lowered):
                    outcome["value"] = other()
            except BaseException as error:
                outcome["error"] = error
            finally:
                ended.set()

    try:
        threading.Thread(target=beside, daemon=True).start()
        first = one()
        ended.wait()
    except BaseException:
        with door:
            passed.append("caller")
        if passed[0] == "other":
            ended.wait()
        raise
    if "error" in outcome:
        raise outcome["error"]
    return first, outcome["value"]


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def all_or_nothing(state) -> Iterator[None]:
    """If the block raises, restore `state`: a PPOState, or any object with PyTorch's state_dict() and
    load_state_dict(saved). An interrupt (Ctrl-C) counts as raising."""
    saved = state.state_dict()
    before = copied(saved, None if _fits_twice(saved) else torch.device("cpu"))
    try:
        yield
    except BaseException:
        state.load_state_dict(before)
        raise


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def check_weights(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if saved weights do not fit a model's by name and shape; `where` names them in the message."""
    differing = sorted(weights.keys() ^ saved.keys())
    if differing:
        raise ValueError(f"{where} is of another model; one of the two has no {', '.join(differing[:3])}")
    for name, weight in weights.items():
        if weight.shape != saved[name].shape:
            raise ValueError(f"{where} is of a model of another size: {name} is {tuple(saved[name].shape)} there, "
                             f"{tuple(weight.shape)} here")


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved weights, already checked by `check_weights`, into a model's."""
    for name, weight in weights.items():
        weight.copy_(saved[name])


def copied(value: object, device: torch.device | None = None) -> object:
    """The same as `copy.deepcopy` of nested dicts and lists of tensors, in a sixth of the time.

    device: the device of the copies; None: that of the tensors.
    """
    if isinstance(value, Mapping):
        return {key: copied(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(item, device) for item in value)
    if isinstance(value, Tensor):
        return value.detach().clone() if device is None else value.detach().to(device, copy=True)
    return copy.deepcopy(value)


def size(value: object) -> int:
    """Bytes of the tensors and arrays in nested dicts and lists."""
    if isinstance(value, Mapping):
        return sum(map(size, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(size, value))
    return getattr(value, "nbytes", 0)


def within_memory(attempt: Callable[[object], A], state, config, whole: Callable[[], tuple[int, int]]) -> A:
    """Call `attempt(config)`, which changes nothing if it raises. If memory runs out and config.halve_passes is set,
    repeat it with half as many tokens per pass. Gradients are added over passes, so the effective batch stays the same.
    It is not repeated if several processes share the work, since the others do not know that one has run out.

    state: the state that `attempt` changes; its `pass_limit` stores the number of tokens per pass that fit. whole:
    returns the number of tokens of the largest pass without a limit, and of the longest row. Raises OutOfMemory, which
    says which setting to lower, and to what value.
    """
    if state.pass_limit is not None:
        config = replace(config, tokens_per_pass=min(state.pass_limit, config.tokens_per_pass or state.pass_limit))
    while True:
        try:
            return attempt(config)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            most, longest = whole()
            half = (config.tokens_per_pass or most) // 2
            if not config.halve_passes or half < longest or count() > 1:
                can = f"set tokens_per_pass to {half}, or halve_passes=True" if half >= longest else (
                    f"a pass of one row has {longest} tokens already: shorten max_length or max_new_tokens")
                raise OutOfMemory(f"memory ran out, and nothing was changed: {can}; or lower {_rows(config)}. "
                                  f"({str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no more'})"
                                  ) from error
            state.pass_limit, config = half, replace(config, tokens_per_pass=half)


def _fits_twice(value: object) -> bool:
    """Whether a copy of nested tensors fits into memory beside the original; on a GPU it may use half of the free
    memory."""
    if not torch.cuda.is_available():
        return True
    return size(value) < torch.cuda.mem_get_info()[0] / 2


def _rows(config) -> str:
    names = ("prompts_per_iteration", "minibatch_size", "batch_size")
    return ", ".join(f"{name} from {value} to {max(1, value // 2)}"
                     for name in names if (value := getattr(config, name, None)))
