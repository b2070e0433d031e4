"""Send a folder as bytes: its plain files and folders as a tar archive after the archive's SHA-256.

An archive from another machine is unpacked by the rules here and not by tarfile's: names below the folder, plain files
and folders, and nothing twice.
"""

import contextlib
import hashlib
import io
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from alignkit.errors import RunError

DIGEST = hashlib.sha256().digest_size


def pack(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> bytes:
    """The files and folders below `folder` whose name (relative, with /) is wanted; what lies in an unwanted folder is
    left out with it.

    Raises RunError, naming it, on a link or a device: what it stands for need not exist elsewhere.
    """
    stream = io.BytesIO(b"\0" * DIGEST)
    stream.seek(DIGEST)
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, dereference=True) as archive:
        left = sorted(folder.iterdir(), reverse=True)
        while left:
            path = left.pop()
            name, kind = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if not wanted(name):
                continue
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise RunError(f"{name} is a link or no plain file, which is not sent to another machine; write a file")
            archive.add(path, name, recursive=False)
            if stat.S_ISDIR(kind):
                left += sorted(path.iterdir(), reverse=True)
    content = stream.getbuffer()
    content[:DIGEST] = hashlib.sha256(content[DIGEST:]).digest()
    return content.tobytes()


def unpack(content: bytes, folder: Path) -> None:
    """Write the files and folders of a parcel into `folder`, which is made and must not exist.

    Raises RunError if a byte differs from what was packed, or if the archive holds a link, a device, a name outside
    `folder`, or a name twice; OSError if the disk is full.
    """
    body = memoryview(content)[DIGEST:]
    if len(content) <= DIGEST or hashlib.sha256(body).digest() != bytes(content[:DIGEST]):
        raise RunError("what was sent does not have the SHA-256 with which it was sent")
    folder.mkdir(parents=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(body), mode="r:") as archive:
            for member in archive:
                _write(archive, member, folder)
    except tarfile.TarError as error:
        raise RunError(f"what was sent is no archive: {error}") from None


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    parts = PurePosixPath(member.name).parts
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None
    if not parts or ".." in parts or parts[0].startswith("/") or "\\" in member.name or not (plain or member.isdir()):
        raise RunError(f"what was sent holds {member.name[:200]!r}, which is no plain file or folder below its own")
    path = folder.joinpath(*parts)
    try:
        if member.isdir():
            path.mkdir()
            return
        with path.open("xb") as file, contextlib.closing(archive.extractfile(member)) as source:
            while part := source.read(2**20):
                file.write(part)
    except (FileExistsError, FileNotFoundError, NotADirectoryError):
        raise RunError(f"what was sent holds {member.name[:200]!r} twice, or before its folder") from None
