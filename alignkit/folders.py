"""Replace folders atomically: a model, a stage, a checkpoint, a frozen model, a comparison.

The new folder is written beside the old one under a hidden name with alignkit's marker, flushed to disk, and exchanged
with the old one in one step if the system supports it (Linux). Otherwise two renames are used: if a process is killed
between them, the old folder has its temporary name, and `recover` restores its name. `sweep` deletes the leftovers of
killed processes the next time, if they carry the marker and no process holds their lock.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from alignkit.killpoints import reached
from alignkit.storage import flush, locked

MARK = "alignkit-part"  # .NAME.alignkit-part-new-ID: being written, .NAME.alignkit-part-old-ID: replaced


@contextlib.contextmanager
def replacing(directory: str | Path, *, keep: bool | Callable[[str], bool] = False,
              overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty folder to write in; at the end of the block it replaces `directory` atomically.

    keep: files in the old folder that are missing in the new one are kept (a stage's records beside its weights); a
    function decides by name. overwrite=False raises FileExistsError if a non-empty folder exists at the time of the
    exchange. Until the exchange, and if the block raises, `directory` is unchanged. Files get the permissions of the
    umask.
    """
    directory = Path(os.path.realpath(directory) if os.path.islink(directory) else os.path.abspath(directory))
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover(directory)
    sweep(directory)
    new = _temporary(directory, "new")
    new.mkdir()
    try:
        with locked(new):  # tells `sweep` that a running process uses this folder
            reached("folder.begun")
            yield new
            if keep and directory.is_dir():
                _take_along(directory, new, keep if callable(keep) else lambda name: True)
            reached("folder.written")
            _settle(new)
            reached("folder.flushed")
            old = _exchange(new, directory) if overwrite else _appear(new, directory)
            flush(directory.parent)
            reached("folder.exchanged")
            if old:
                shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if not os.path.lexists(directory):
            for old in _leftovers(directory, "old"):
                old.rename(directory)
                break
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(directory)  # the error of a full disk names no file
        raise


def recover(directory: str | Path) -> None:
    """Restore the name of a folder whose process was killed between two renames. Every reader may call this."""
    directory = Path(os.path.abspath(directory))
    if os.path.lexists(directory):
        return
    end = time.monotonic() + 2
    while any(map(is_held, _leftovers(directory, "new"))) and time.monotonic() < end:
        if os.path.lexists(directory):
            return
        time.sleep(0.01)  # a running process is between its two renames
    for old in _leftovers(directory, "old"):
        with contextlib.suppress(OSError):
            old.rename(directory)
            return


def is_held(folder: str | Path) -> bool:
    """Whether a running process holds the lock of a folder."""
    try:
        with locked(folder):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def sweep(directory: str | Path) -> list[Path]:
    """Delete the leftovers of killed processes for `directory`; returns `directory`. Folders held by a running process,
    and folders without the marker, are kept."""
    directory = Path(os.path.abspath(directory))
    swept = []
    for leftover in [*_leftovers(directory, "new"), *_leftovers(directory, "old")]:
        with contextlib.suppress(OSError), locked(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
            swept.append(leftover)
    return swept


def discard(directory: str | Path) -> None:
    """Delete a whole folder. If the process is killed meanwhile, the rest has a temporary name; half a folder never
    keeps the original name."""
    directory = Path(os.path.abspath(directory))
    old = _temporary(directory, "old")
    directory.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def leftovers(folder: str | Path) -> list[Path]:
    """All temporary folders of killed or running processes at any depth below `folder`."""
    return [path for path in sorted(Path(folder).rglob(f".*.{MARK}-*")) if path.is_dir() and not path.is_symlink()]


def _temporary(directory: Path, kind: str) -> Path:
    return directory.with_name(f".{directory.name}.{MARK}-{kind}-{uuid.uuid4().hex[:12]}")


def _leftovers(directory: Path, kind: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{directory.name}.{MARK}-{kind}-") + "[0-9a-f]{12}")
    with contextlib.suppress(OSError):
        return sorted(path for path in directory.parent.iterdir()
                      if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink())
    return []


def _take_along(old: Path, new: Path, keep: Callable[[str], bool]) -> None:
    """Add the files that exist only in `old` to `new`: as hard links, or as copies if the disk has no hard links."""
    def bring(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    ours = {path.name for path in leftovers(old) if path.parent == old}
    for kept in old.iterdir():
        target = new / kept.name
        if os.path.lexists(target) or kept.name in ours or not keep(kept.name):
            continue
        if kept.is_dir() and not kept.is_symlink():
            shutil.copytree(kept, target, copy_function=bring, symlinks=True,
                            ignore=shutil.ignore_patterns(f".*.{MARK}-*"))
        else:
            bring(str(kept), str(target))


def _settle(new: Path) -> None:
    """Set the permissions of the umask (safetensors writes 0600, but a shared run folder must be readable) and flush
    everything to disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [*new.rglob("*"), new]:
        came_along = path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1)  # already on disk
        if not came_along:
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
            flush(path)


def _exchange(new: Path, directory: Path) -> Path | None:
    """Give `new` the name of `directory`; returns the old folder's new path, None if there was none."""
    if not os.path.lexists(directory):
        new.rename(directory)
        return None
    if _swap(new, directory):
        return new
    old = _temporary(directory, "old")
    directory.rename(old)
    reached("folder.between")
    new.rename(directory)
    return old


def _appear(new: Path, directory: Path) -> None:
    """Give `new` the name of `directory`, which does not exist or is empty."""
    try:
        os.rename(new, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(error.errno, f"{directory} was made by another process meanwhile") from error


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system or the disk does not support it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))
