"""Files that appear whole or not at all, folders that one process writes at a time, and files that nobody
vouches for."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from rapidin.errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Windows has neither of the first two; its C library changes line ends unless a file is opened as binary.
_NO_LINK, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)

PARTIAL = ".partial"
LOCK = ".lock"


def reason(error: OSError) -> str:
    """What the system says of an error, in words."""
    return error.strerror or str(error) or type(error).__name__


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name beside `path` under which the block writes a file that is moved to `path` when it ends.

    It is on disk under `path` then, whole; where the block or the disk fails, `path` is as it was. Raises
    UserError where the system will not write.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # it might be a link that leads elsewhere
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        why = reason(error) if path.parent.is_dir() else "its folder is gone"
        raise UserError(f"cannot write '{path}': {why}", "what was written before is kept") from None


def check_not_input(outputs: Iterable[str | Path | None], inputs: Iterable[str | Path]) -> None:
    """Raise UserError if a file that is to be written is one that is read, under whatever name."""
    inputs = list(inputs)
    for out in outputs:
        if out is None or not os.path.exists(out):
            continue
        if any(os.path.exists(path) and os.path.samefile(path, out) for path in inputs):
            raise UserError(f"'{out}' is read as input, and would be overwritten", "write to another file")


def replace_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file; it is on disk when this returns, whole, or what was there before is. Raises UserError.

    data: all of it, or its pieces; where making one raises, nothing is written.
    """
    with (
        replacing(path) as partial,
        os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666), "wb") as file,
    ):
        for piece in (data,) if isinstance(data, bytes) else data:
            file.write(piece)


def _sync(path: Path) -> None:
    """Bring what was written into a file or folder to disk; of folders Windows takes care itself."""
    if sys.platform == "win32" and path.is_dir():
        return
    number = os.open(path, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | _BINARY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def lock_folder(folder: Path) -> IO[bytes]:
    """The folder, made where it is missing, for this process alone until what is returned is closed.

    The lock is the system's own, so it ends with the process, however that ends. Raises UserError where
    another process holds it, the folder cannot be written, or its file system knows no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | _NO_LINK | _BINARY, 0o666), "rb+")
    except OSError as error:
        raise UserError(f"cannot write into '{folder}': {reason(error)}") from None
    try:
        _lock(file)
    except OSError as error:
        file.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise UserError(
                f"another process is writing into '{folder}'", "wait for it, or name another folder"
            ) from None
        raise UserError(
            f"the file system of '{folder}' knows no locks, so two writers could not be told apart "
            f"({reason(error)})",
            "write to another disk, and copy the folder when it is complete",
        ) from None
    return file


def _lock(file: IO[bytes]) -> None:
    """Take the system's lock of a file. Raises OSError where another has it, or there are no locks."""
    if sys.platform == "win32":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_partials(folder: Path) -> None:
    """Remove what a killed process left half written; for whoever holds the folder's lock."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"*{PARTIAL}"):
            if path.is_symlink() or path.is_file():
                path.unlink()


# ------------------------------------------------------------------------- files that nobody vouches for


def regular_file_size(path: Path) -> int | str:
    """The size of a regular file in bytes, else what is wrong with it, in words. No link is followed: what
    belongs to a folder lies in it."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    if stat.S_ISLNK(status.st_mode):
        return "is a link, and links are not followed: put the file itself there"
    return status.st_size if stat.S_ISREG(status.st_mode) else "is no file"


def read_regular_file(path: Path, name: str, remedy: str, *, most: int, size: int | None = None) -> bytes:
    """The bytes of a regular file of at most `most` bytes, or of exactly `size`.

    name: of the file, in words. Raises UserError where it is missing, a link, larger, or cannot be read.
    """
    actual = regular_file_size(path)
    if isinstance(actual, str):
        raise UserError(f"the {name} '{path}' {actual}", remedy)
    if size is not None and actual != size:
        raise UserError(f"the {name} '{path}' has {actual:,} bytes instead of {size:,}", remedy)
    if actual > most:
        raise UserError(f"the {name} '{path}' has {actual:,} bytes, at most {most:,} are read", remedy)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | _NO_LINK | _NO_WAIT | _BINARY), "rb") as file:
            return file.read(actual)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {reason(error)}") from None
