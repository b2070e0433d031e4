"""What PPO's and DPO's steps share: the optimiser, its learning rate, two computations side by side on two cores, steps
that are made whole or not at all, and what to do when memory runs out."""

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


def adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW without weight decay, fused, eps 1e-5 (Huang 2024, detail 25)."""
    return torch.optim.AdamW(parameters, lr=learning_rate, eps=1e-5, weight_decay=0.0, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


A, B = TypeVar("A"), TypeVar("B")


def side_by_side(one: Callable[[], A], other: Callable[[], B], device: torch.device) -> tuple[A, B]:
    """`one(), other()`, where neither needs or changes what the other changes.

    `other` runs in a thread of its own, in the caller's grad mode and autocast, on a CPU of which an operation uses one
    thread and this process may use more cores. Elsewhere one runs after the other. An exception, and an interrupt
    whenever it comes, is raised when both have ended, or `other` will never begin.
    """
    if torch.device(device).type != "cpu" or torch.get_num_threads() > 1 or _cores() < 2:
        return one(), other()
    grad, dtype, lowered = torch.is_grad_enabled(), torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    door, ended = threading.Lock(), threading.Event()  # whoever passes the door first says whether `other` runs
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def all_or_nothing(state) -> Iterator[None]:
    """If the block raises, put `state` back to what it was before: a PPOState, or anything with PyTorch's
    state_dict() and load_state_dict(saved). An interrupt (Ctrl-C) counts as raising."""
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
    """Raise ValueError if saved weights do not fit a model's, by name and shape; `where` names them."""
    differing = sorted(weights.keys() ^ saved.keys())
    if differing:
        raise ValueError(f"{where} is of another model; one of the two has no {', '.join(differing[:3])}")
    for name, weight in weights.items():
        if weight.shape != saved[name].shape:
            raise ValueError(f"{where} is of a model of another size: {name} is {tuple(saved[name].shape)} there, "
                             f"{tuple(weight.shape)} here")


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved weights, which `check_weights` let pass, into a model's."""
    for name, weight in weights.items():
        weight.copy_(saved[name])


def copied(value: object, device: torch.device | None = None) -> object:
    """What `copy.deepcopy` would make of nested dicts and lists of tensors, in a sixth of the time.

    device: where the copies of tensors are; None: where the tensors are.
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
    """`attempt(config)`, which changes nothing when it raises; where memory runs out, again with half the tokens a
    pass, if config.halve_passes says so. Gradients add up over passes, so the effective batch stays as it is.

    state: what `attempt` changes; its `pass_limit` remembers how many tokens a pass fit. whole: says how many tokens
    the largest pass has without a limit, and the longest row. Raises OutOfMemory, which says what to lower to what.
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
            if not config.halve_passes or half < longest:
                can = f"set tokens_per_pass to {half}, or halve_passes=True" if half >= longest else (
                    f"a pass of one row has {longest} tokens already: shorten max_length or max_new_tokens")
                raise OutOfMemory(f"memory ran out, and nothing was changed: {can}; or lower {_rows(config)}. "
                                  f"({str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no more'})"
                                  ) from error
            state.pass_limit, config = half, replace(config, tokens_per_pass=half)


def _fits_twice(value: object) -> bool:
    """Whether a copy of nested tensors has room beside them, half of the free memory of a GPU at most."""
    if not torch.cuda.is_available():
        return True
    return size(value) < torch.cuda.mem_get_info()[0] / 2


def _rows(config) -> str:
    names = ("prompts_per_iteration", "minibatch_size", "batch_size")
    return ", ".join(f"{name} from {value} to {max(1, value // 2)}"
                     for name in names if (value := getattr(config, name, None)))
