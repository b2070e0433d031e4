"""What PPO's and DPO's steps share: the optimiser, its learning rate, two computations side by side on two cores."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn


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
    thread and this process may use more cores. Elsewhere one runs after the other. An exception is raised when both
    have ended.
    """
    if torch.device(device).type != "cpu" or torch.get_num_threads() > 1 or _cores() < 2:
        return one(), other()
    grad, dtype, lowered = torch.is_grad_enabled(), torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def beside() -> B:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, lowered):
            return other()

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(beside)
        return one(), job.result()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
