"""Training shared by several processes: each reads its own rows of a batch, and all of them make the same step.

Every process holds the whole state and draws the same prompts, random numbers and minibatches, because its rank is part
of no seed. Rows are shared out, results are gathered, and gradients are added up before they are clipped, so training
on N processes computes the numbers of one process, up to rounding, and the N copies of the weights stay equal bit for
bit. Outside `sharing`, and in one process, every function here returns what it was given.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**24  # elements of the gradients that are added up at a time
TIMEOUT = timedelta(minutes=30)  # for one exchange: the longest that one process waits for another
_shared = _sharded = False


@contextlib.contextmanager
def sharing(shard: bool = False) -> Iterator[None]:
    """Inside the block, all processes of torch.distributed's group share the work. Each of them must enter it, and
    compute the same. An error in one of them is an error in all, at their next exchange or after the group's
    timeout. shard: whether each keeps a part of the optimiser states only (`alignkit.shards`)."""
    global _shared, _sharded
    before, _shared, _sharded = (_shared, _sharded), dist.is_initialized(), shard
    try:
        yield
    finally:
        _shared, _sharded = before


def count() -> int:
    """The number of processes that share the work now; 1 outside `sharing`."""
    return dist.get_world_size() if _shared else 1


def sharded() -> bool:
    """Whether each process keeps a part of the optimiser states only; False outside `sharing`."""
    return _sharded and count() > 1


def own_rows(rows: int) -> tuple[slice, float]:
    """The rows of this process out of `rows`, and their weight, 1.

    A process that is left without a row reads the first one with weight 0, so that it takes part in every sum.
    """
    if count() == 1:
        return slice(None), 1.0
    start, stop = (rows * place // count() for place in (dist.get_rank(), dist.get_rank() + 1))
    return (slice(start, stop), 1.0) if start < stop else (slice(0, 1), 0.0)


def in_shares(work: Callable[[slice], Iterable[Tensor]], rows: int) -> list[Tensor]:
    """The tensors (rows, …) that `work(slice(None))` returns, while each process computes `work` of its own rows.

    Tensors (n, T) that have other numbers of columns in other processes are padded on the right with 0.
    """
    own, weight = own_rows(rows)
    parts = list(work(own))
    if count() == 1:
        return parts
    columns = torch.tensor([part.shape[1] if part.dim() > 1 else 1 for part in parts], device=parts[0].device)
    dist.all_reduce(columns, op=dist.ReduceOp.MAX)
    return [_gathered(part, own if weight else slice(0), rows, width)
            for part, width in zip(parts, columns.tolist(), strict=True)]


def _gathered(part: Tensor, own: slice, rows: int, width: int) -> Tensor:
    """The rows of all processes, of which `part` are this one's `own`: each adds its rows to zeros, so nothing is
    rounded."""
    kind = torch.uint8 if part.dtype == torch.bool else part.dtype
    flat = part.unsqueeze(1) if part.dim() == 1 else part
    whole = torch.zeros(rows, width, *flat.shape[2:], dtype=kind, device=part.device)
    whole[own, : flat.shape[1]] = flat[: len(whole[own])].to(kind)
    dist.all_reduce(whole)
    return (whole.squeeze(1) if part.dim() == 1 else whole).to(part.dtype)


def summed(values: dict[str, Tensor], largest: str = "") -> dict[str, Tensor]:
    """The sum over the processes of each number (), and the maximum of the one that is called `largest`."""
    if count() == 1:
        return values
    mine = torch.stack(list(values.values())).double()
    each = mine.new_zeros(count(), len(mine))
    each[dist.get_rank()] = mine
    dist.all_reduce(each)
    kinds = [value.dtype for value in values.values()]
    return {name: (column.max() if name == largest else column.sum()).to(kind)
            for name, column, kind in zip(values, each.T, kinds, strict=True)}


@torch.no_grad()
def sum_gradients(*models: nn.Module | None) -> None:
    """Add up the gradients of the models over the processes; a weight without one in every process keeps none."""
    if count() == 1:
        return
    weights = list({id(weight): weight for model in models if model is not None for weight in model.parameters()
                    if weight.requires_grad}.values())
    moved = torch.tensor([float(weight.grad is not None) for weight in weights], device=weights[0].device)
    dist.all_reduce(moved)
    weights = [weight for weight, given in zip(weights, moved.tolist(), strict=True) if given]
    for weight in weights:
        if weight.grad is None:  # an expert to which this process's rows have not led, for example
            weight.grad = torch.zeros_like(weight)
    for bucket in _buckets([weight.grad for weight in weights]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of at most BUCKET elements; a larger one alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def told(value: object = None) -> object:
    """In every process the `value` of process 0: numbers, text, lists and mappings."""
    text = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    size = torch.tensor([len(text)], device=_device())
    dist.broadcast(size, 0)
    letters = torch.zeros(int(size), dtype=torch.uint8, device=size.device)
    letters[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    dist.broadcast(letters, 0)
    return json.loads(letters.cpu().numpy().tobytes())


def same_everywhere(number: int) -> bool:
    """Whether all processes of the group call this with the same whole number, below 2⁶³."""
    ends = torch.tensor([number, -number], device=_device())
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return int(ends.sum()) == 0


def broadcast(tensor: Tensor) -> Tensor:
    """In every process the tensor of process 0, of the same shape and type; on the CPU."""
    moved = tensor.detach().to(_device(), copy=True).contiguous()
    dist.broadcast(moved, 0)
    return moved.cpu()


def broadcast_weights(weights: list[Tensor], source: int) -> None:
    """Overwrite the weights with those of the process `source`."""
    for bucket in _buckets(weights):
        flat = torch.cat([weight.detach().flatten() for weight in bucket])
        dist.broadcast(flat, source)
        for weight, new in zip(bucket, flat.split([weight.numel() for weight in bucket]), strict=True):
            weight.detach().copy_(new.view_as(weight))


def moved(tensor: Tensor | None, shape: Sequence[int], kind: torch.dtype, source: int, target: int) -> Tensor | None:
    """In the process `target` the tensor that `source` gives, of this shape and type; None in all others."""
    if dist.get_rank() == source != target:
        dist.send(tensor.detach().to(_device()).contiguous(), target)
    if dist.get_rank() != target:
        return None
    if source != target:
        tensor = torch.empty(shape, dtype=kind, device=_device())
        dist.recv(tensor, source)
    return tensor


def join(meeting: Path, rank: int, number: int) -> None:
    """Join the group of `number` processes of this machine that meet at the file `meeting`; they use the loopback
    interface alone.

    With a GPU for each process they exchange through nccl, otherwise through gloo.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    dist.init_process_group(backend(number), store=dist.FileStore(str(meeting), number), rank=rank, world_size=number,
                            timeout=TIMEOUT)


def backend(number: int) -> str:
    """What `number` processes on one machine exchange tensors through: "nccl" if each has a GPU, else "gloo"."""
    return "nccl" if dist.is_nccl_available() and torch.cuda.device_count() >= number else "gloo"


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
