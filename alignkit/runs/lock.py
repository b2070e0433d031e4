"""One lock for a run directory: notebooks, the course and the app hold it while they work there.

A kernel inherits the lock's descriptor. Should its parent be killed, nobody else begins in the directory before the
kernel, too, has ended.
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

KERNEL_SECONDS = 3  # a kernel ends so soon after its parent was killed, if its computation lets it
_handles: dict[str, int] = {}  # run directory -> descriptor of the lock that this process holds on it


@contextlib.contextmanager
def run_lock(run: str | Path) -> Iterator[None]:
    """Hold RUN/.lock while the block runs, RUN made if need be. The system lets go of it when this process and its
    kernels end, however.

    Waits KERNEL_SECONDS for the kernel of a process that was killed, so that a job can be started again at once. Raises
    RunInUse, which names the holder, if another process, or another place of this one, works in `run`, and
    RunError if RUN cannot be made or RUN/.lock is a link or a device, which nobody but a stranger would put there.
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
    """The descriptors with which a child process holds the lock that this process has on `run`; for Popen's pass_fds.

    () if it has none, and on Windows, where no lock is inherited.
    """
    handle = _handles.get(os.path.realpath(run))
    return () if handle is None or os.name == "nt" else (handle,)


def _try(note: Path, stack: contextlib.ExitStack) -> int | None:
    """The descriptor of the lock, which `stack` lets go of; None if somebody else has it."""
    try:
        return stack.enter_context(locked(note))
    except BlockingIOError:
        return None


def _holder(note: Path) -> tuple[str, bool]:
    """Who holds the lock, as RUN/.lock says, and whether that process was killed, so that its kernel holds it."""
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
