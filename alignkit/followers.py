"""The processes that train together with this one: started here, in step with it at every iteration, ended with it.

`alignkit run NOTEBOOK --processes N` sets PROCESSES for the notebook's kernel, which becomes process 0: it keeps the
charts, the checkpoints and all files. The others (`python -m alignkit.jobs.worker --follow`) load the same run by
themselves. They read one command a line from a pipe. When the pipe ends, however this process ended, they end too.
torchrun's processes get the same commands from process 0 by `told`.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from alignkit.errors import AlignkitError, RunError
from alignkit.processes import broadcast, join, same_everywhere, sharded, sharing, told
from alignkit.runs.checkpoints import packed, unpacked
from alignkit.shards import Shards, gathered, optimizers, share_out, without_states
from alignkit.stages import PROCESSES
from alignkit.storage import plain

LOST = re.compile(r"gloo|nccl|connection|peer|timed out|store", re.IGNORECASE)  # an exchange that failed, not a cause


def on_processes(iterate: Callable, state) -> Callable:
    """`iterate(state, config)`, carried out by all processes of `alignkit run --processes N`; otherwise `iterate`.

    iterate: `ppo_iteration` or `dpo_iteration`. state: a PPOState or DPOState before its first step. Only this state is
    trained by several processes. Its iterations return the same statistics, up to rounding, and raise the same errors;
    RunError if another process fails.
    """
    job = json.loads(os.environ.get(PROCESSES, "{}"))
    return iterate if job.get("count", 1) < 2 else Followers(iterate, state, job)


class Followers:
    """N − 1 processes that follow this one. They start at the first iteration, and again if one of them was lost."""

    def __init__(self, iterate: Callable, state, job: Mapping):
        self.iterate, self.state, self.job = iterate, state, dict(job)
        self.facts = plain(dict(state.facts()), "facts")
        self.started: list[subprocess.Popen] = []
        self.logs: list = []
        self.sum: int | None = None  # of the state after the last iteration
        self.shards = Shards(state, self._gathering) if self.job.get("shard") else None

    def __call__(self, state, config):
        """One iteration of the state, by all processes; of any other state, by this process alone."""
        if state is not self.state:
            return self.iterate(state, config)
        if self.shards:
            self.shards.check()
        with self._guarded():
            if not self.started:
                self._start()
            send = self._sum() != self.sum  # new, or restored from a checkpoint, or rewound
            self._say({"config": asdict(config), "send": send})
            with self.shards.apart_during() if self.shards else contextlib.nullcontext():
                stats = together(self.iterate, state, config, send, shard=bool(self.shards))
            self.sum = self._sum()
            return stats

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """An error in the block ends the other processes; RunError if one of them is the cause."""
        try:
            yield
        except BaseException as error:
            cause = self._cause(error)
            self.close()
            if cause:
                then = ("the next one starts the processes again" if self.state.whole else
                        "optimiser states that it kept are lost: go on from the last checkpoint")
                raise RunError(f"{cause}; nothing was changed by this iteration, and {then}") from error
            raise

    @contextlib.contextmanager
    def _gathering(self, number: int) -> Iterator[None]:
        """The other processes call `gathered` while the block does."""
        with self._guarded():
            self._say({"gather": number})
            yield

    def _sum(self) -> int:
        """`checksum` of the state as this process has it."""
        with sharing():
            return checksum(self.state.state_dict())

    def close(self) -> None:
        """End the other processes."""
        for process in self.started:
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.kill()
            process.wait()
            process.stdout.close()
        for log in self.logs:
            log.close()
        self.started, self.logs, self.sum = [], [], None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _start(self) -> None:
        if dist.is_initialized():
            raise RunError("this process has a torch.distributed group already; --processes makes one of its own")
        count, root = self.job["count"], Path(__file__).resolve().parents[1]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
        with tempfile.TemporaryDirectory() as folder:
            meeting = Path(folder) / "meeting"
            for rank in range(1, count):
                self.logs.append(tempfile.TemporaryFile())  # noqa: SIM115 (closed by `close`)
                self.started.append(subprocess.Popen(
                    [sys.executable, "-P", "-m", "alignkit.jobs.worker", "--follow"], env=env, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.logs[-1]))
                weakref.finalize(self, self.started[-1].kill)
                self._say({**self.job, "rank": rank, "meeting": str(meeting), "threads": torch.get_num_threads()}, rank)
            for rank, process in enumerate(self.started, 1):
                if not process.stdout.readline():  # it says "ready", or it has ended
                    raise RunError(f"process {rank} of {count} could not load the run: {self._last_words(rank)}")
            join(meeting, 0, count)
            told(self.facts)

    def _say(self, command: dict, rank: int | None = None) -> None:
        for process in self.started if rank is None else [self.started[rank - 1]]:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which the next exchange notices
                process.stdin.write(json.dumps(command) + "\n")
                process.stdin.flush()

    def _cause(self, error: BaseException) -> str:
        """Why another process failed, if that is what made this one fail with `error`; else ""."""
        if isinstance(error, AlignkitError) or not isinstance(error, RuntimeError) or not LOST.search(str(error)):
            return ""
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        ended = [rank for rank, process in enumerate(self.started, 1) if process.poll() is not None]
        words = {rank: self._last_words(rank) for rank in ended}
        causes = [rank for rank in ended if not LOST.search(words[rank])] or ended
        if not causes:
            return ""
        return f"process {causes[0]} of {self.job['count']} failed: {words[causes[0]]}"

    def _last_words(self, rank: int) -> str:
        """The last line that a process wrote, or how it ended if it wrote none."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.started[rank - 1].wait(10)
        self.logs[rank - 1].seek(0)
        lines = self.logs[rank - 1].read().decode(errors="replace").strip().splitlines()
        code = self.started[rank - 1].poll()
        if code is not None and code < 0:
            return f"it was killed by signal {-code}"
        return lines[-1].removeprefix("alignkit.errors.") if lines else f"it ended with exit code {code}"


def together(iterate: Callable, state, config, send: bool, shard: bool = False):
    """One iteration in step with the other processes, each of which calls this; returns what `iterate` does.

    send: whether process 0 gives its state to the others first. shard: whether each keeps a part of the optimiser
    states only. Raises RunError if the states differ afterwards, in more than the parts.
    """
    with sharing(shard):
        if send:
            _send(state)
        stats = iterate(state, config)
        if not same_everywhere(checksum(_common(state))):
            raise RunError("the processes have computed different weights; they need the same libraries, the same kind "
                           "of processor and as many threads")
        return stats


def obey(commands: Iterable[Mapping], iterate: Callable, state, kind: type, shard: bool) -> None:
    """What processes 1 and more do: iterations of `state` with configs of this kind, and the gathering of states."""
    for command in commands:
        if "gather" in command:
            gathered(optimizers(state)[command["gather"]])
        else:
            together(iterate, state, kind(**command["config"]), command["send"], shard)


def check_facts(facts: Mapping) -> None:
    """Compare the run that this process has loaded with that of process 0, which calls `told(facts)`. RunError if they
    differ."""
    own, theirs = plain(dict(facts), "facts"), told()
    differing = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if differing:
        raise RunError(f"it has loaded another {', '.join(differing)} than process 0; the notebook has to train what "
                       "the parameters say, and on the same machine")


def checksum(saved: Mapping) -> int:
    """A number that changes if a bit of a `state_dict()` does: of weights, optimisers, counters."""
    leaves: list[object] = []

    def walk(value: object) -> None:
        if isinstance(value, Mapping):
            for name, item in value.items():
                leaves.append(name)
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif isinstance(value, Tensor):
            whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
            bits = value.detach().contiguous().view(whole)
            leaves.append((tuple(value.shape), int(bits.sum(dtype=torch.int64))))  # in any order of the additions
        else:
            leaves.append(value)

    walk(saved)
    return int.from_bytes(hashlib.blake2b(repr(leaves).encode(), digest_size=7).digest(), "big")


def _common(state) -> Mapping:
    """The part of `state.state_dict()` that is the same in all processes."""
    return without_states(state.state_dict()) if sharded() else state.state_dict()


def _send(state) -> None:
    """Give the state of process 0 to all; of optimiser states that are shared out, to each its part."""
    tensors: dict[str, Tensor] = {}
    tree = packed(_common(state), tensors, {})
    tree, shapes = told([tree, {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()}])
    if dist.get_rank() == 0:
        for tensor in tensors.values():
            broadcast(tensor)
    else:
        state.load_state_dict(unpacked(tree, {
            name: broadcast(torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch."))))
            for name, (shape, dtype) in shapes.items()}))
    if sharded():
        share_out(state)
