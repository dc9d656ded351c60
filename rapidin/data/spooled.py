"""Data that can be read only once, kept where its rows can be read again: in a temporary file.

Temporary files have no name and disappear with the process; TMPDIR says in which folder they are.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import IO, Any

from rapidin.data.records import Record
from rapidin.data.sources import Malformed, Numbered, as_record, cannot_read
from rapidin.errors import UserError, needs
from rapidin.files import reason

_CHUNK = 1 << 20
_NO_ROOM = "set TMPDIR to a folder on a disk with more room"


class _Zstandard:
    """Reads frames of Zstandard. A file that ends within one raises EOFError, which the package's own reader
    of streams does not."""

    def __init__(self, file: IO[bytes]) -> None:
        package = needs("zstandard", "reading a .zst file", "data")
        self._new = package.ZstdDecompressor().decompressobj
        self._file, self._frame = file, self._new()

    def read(self, size: int) -> bytes:
        """The next bytes, of about `size` compressed ones; none at the end."""
        while True:
            rest = self._frame.unused_data if self._frame.eof else b""
            chunk = rest or self._file.read(size)
            if not chunk:
                if not self._frame.eof:
                    raise EOFError("the last frame is not complete")
                return b""
            if self._frame.eof:
                self._frame = self._new()
            data: bytes = self._frame.decompress(chunk)
            if data:
                return data


def _standard(module: str) -> Any:
    """A module of the standard library that some builds of Python lack."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"this Python was built without {module}", "decompress the file first") from None


# The first bytes of a compressed file, and what reads it.
_COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"\x28\xb5\x2f\xfd": _Zstandard,
    b"\xfd7zXZ\0": lambda file: _standard("lzma").LZMAFile(file),
    b"BZh": lambda file: _standard("bz2").BZ2File(file),
}


def spool(stream: Any, name: str) -> IO[bytes]:
    """A temporary file with what is left of a stream of bytes or text. Raises UserError if the stream cannot
    be read, or the disk is full."""
    spooled = _temporary()
    while True:
        try:
            chunk = stream.read(_CHUNK)
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not UTF-8 text ({error.reason})") from error
        except io.UnsupportedOperation as error:
            raise UserError(f"{name} is not open for reading", "open it again") from error
        except (OSError, EOFError, zlib.error) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise UserError(f"cannot read {name}: it is damaged or incomplete ({why})") from error
        except Exception as error:
            if type(error).__name__ not in ("ZstdError", "LZMAError"):
                raise
            raise UserError(f"cannot read {name}: it is damaged or incomplete ({error})") from error
        if not chunk:
            break
        _write(spooled, chunk if isinstance(chunk, bytes) else chunk.encode("utf-8", "surrogatepass"), name)
    spooled.seek(0)
    return spooled


def decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """The file itself, or a temporary one with its decompressed content."""
    try:
        first = file.read(6)
        file.seek(0)
    except OSError as error:
        raise cannot_read(name, error) from error
    for magic, reader in _COMPRESSIONS.items():
        if first.startswith(magic):
            with file:
                return spool(reader(file), name)
    return file


def compressed(pieces: Iterable[bytes], suffix: str) -> Iterator[bytes]:
    """The pieces of a file compressed as the suffix of its name says, such as ".gz"."""
    made = _COMPRESSORS[suffix]()
    for piece in pieces:
        if data := made.compress(piece):
            yield data
    yield made.flush()


def _zstandard() -> Any:
    return needs("zstandard", "writing a .zst file", "data").ZstdCompressor().compressobj()


_COMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.compressobj(wbits=31),  # 31: in the form of gzip
    ".zst": _zstandard,
    ".zstd": _zstandard,
    ".xz": lambda: _standard("lzma").LZMACompressor(),
    ".bz2": lambda: _standard("bz2").BZ2Compressor(),
}


def _temporary() -> IO[bytes]:
    try:
        file: IO[bytes] = tempfile.TemporaryFile(prefix="rapidin-")  # noqa: SIM115  (closed with its owner)
    except OSError as error:
        raise UserError(f"cannot write a temporary file: {reason(error)}", _NO_ROOM) from error
    return file


def _write(file: IO[bytes], data: bytes, name: str) -> None:
    try:
        file.write(data)
    except OSError as error:
        what = f"cannot keep {name} in a temporary file in {tempfile.gettempdir()}: {reason(error)}"
        raise UserError(what, _NO_ROOM) from error


class Spooled(Numbered):
    """Rows of an iterable, which is read once and only as far as needed."""

    def __init__(self, rows: Iterable[Any], name: str) -> None:
        self.path = None
        self._rows = iter(rows)
        self._name = name
        self._file = _temporary()
        self._offsets = array("Q")

    @property
    def lines(self) -> int:
        return len(self._offsets)

    def _find(self, limit: int | None) -> Iterator[Any]:
        offset = 0
        while limit is None or len(self._offsets) < limit:
            try:
                value = next(self._rows)
            except StopIteration:
                return
            try:
                data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
            except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
                what = f"{self.where(len(self._offsets))} cannot be kept for reading it again: {error}"
                raise UserError(what, "give records of texts, numbers and lists") from error
            self._offsets.append(offset)
            _write(self._file, data, f"the {self._name}")
            offset += len(data)
            yield value

    def scan(self, limit: int | None) -> Iterator[Record | Malformed]:
        return (as_record(value, self.where(row)) for row, value in enumerate(self._find(limit)))

    def skim(self, limit: int | None) -> int:
        return sum(1 for _ in self._find(limit))

    def read(self, row: int) -> Record | Malformed:
        self._file.seek(self._offsets[row])
        return as_record(pickle.load(self._file), self.where(row))
