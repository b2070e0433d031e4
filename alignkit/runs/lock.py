"""The lock of a run directory: notebooks, the course and the app hold it while they use the directory.

A kernel inherits the lock's descriptor. If its parent is killed, the lock stays held until the kernel has ended too.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from alignkit.errors import RunError, RunInUse
from alignkit.storage import locked

KERNEL_SECONDS = 3  # a kernel usually ends within this time after its parent was killed
_handles: dict[str, int] = {}  # run directory -> descriptor of the lock that this process holds on it


@contextlib.contextmanager
def run_lock(run: str | Path) -> Iterator[None]:
    """Hold RUN/.lock inside the block; RUN is created if missing. The system releases the lock when this process and
    its kernels end for any reason.

    Waits KERNEL_SECONDS for the kernel of a killed process, so that a job can be restarted at once. Raises RunInUse,
    which names the holder, if another process, or another part of this one, uses `run`; RunError if RUN cannot be
    created, or if RUN/.lock is a link or a device, which alignkit never creates.
    """
    note = Path(run) / ".lock"
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise RunError(f"run directory {str(run)!r} cannot be made: {error}") from None
    if os.path.lexists(note) and (note.is_symlink() or not note.is_file()):
        raise RunError(f"{note} is not a plain file; delete it")
    note.touch()
    patience = time.monotonic() + KERNEL_SECONDS
    with contextlib.ExitStack() as stack:
        while (handle := _try(note, stack)) is None:
            holder, was_killed = _holder(note)
            if not was_killed or time.monotonic() > patience:
                left = " (which was killed; its kernel is still at work, and ends when its computation does)"
                raise RunInUse(f"{run} is in use by {holder}{left if was_killed else ''}; wait, or choose another run "
                               "directory")
            time.sleep(0.1)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note.write_text(f"pid {os.getpid()} since {now}\n", encoding="utf-8")
        directory = os.path.realpath(run)
        _handles[directory] = handle
        try:
            yield
        finally:
            del _handles[directory]
            with contextlib.suppress(OSError):  # the directory was removed meanwhile
                note.write_text("", encoding="utf-8")


def lock_handles(run: str | Path) -> tuple[int, ...]:
    """The descriptors by which a child process inherits this process's lock on `run`; for Popen's pass_fds.

    () if this process holds no lock, and on Windows, where locks are not inherited.
    """
    handle = _handles.get(os.path.realpath(run))
    return () if handle is None or os.name == "nt" else (handle,)


def _try(note: Path, stack: contextlib.ExitStack) -> int | None:
    """The descriptor of the lock, which `stack` releases; None if it is already held."""
    try:
        return stack.enter_context(locked(note))
    except BlockingIOError:
        return None


def _holder(note: Path) -> tuple[str, bool]:
    """The holder of the lock according to RUN/.lock, and whether it was killed, so that only its kernel holds
    the lock."""
    with note.open(encoding="utf-8", errors="replace") as file:
        holder = file.read(200).strip() or "another process"
    match = re.match(r"pid (\d{1,9}) ", holder)
    if match and os.name == "posix":
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            return holder, True
        except OSError:
            pass
    return holder, False
