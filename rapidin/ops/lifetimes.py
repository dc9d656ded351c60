"""The lifetime of memory whose addresses are passed to GPU kernels.

A launch only queues a kernel, which reads memory later, and in a captured graph at each replay. Torch
guarantees:

- Freed memory is reused only by later work of the stream that it was allocated on. So work queued earlier on
  that stream is safe; work on other streams is safe after `record_stream`.
- A copy from pinned memory reads it later. Torch reuses the memory only after the copy.
- Memory allocated while a graph is captured belongs to the graph and lives as long as it. Memory allocated
  before must outlive the graph, and pinned memory that a captured copy reads must also stay unchanged.

So there are three kinds of tensors, each held in one way:

- Arguments, temporaries and results of a call: by a variable, until the last launch, on the current stream.
- Tensors kept between calls: by `Kept`, which handles other streams and graphs.
- Tables first needed in a captured call: `Kept` copies them from pinned memory that nothing else ever uses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_ONCE_BEFORE = (
    "a kernel's table was first needed while a CUDA graph was captured; "
    "make the same call once before the capture"
)

Tensors = TypeVar("Tensors", Tensor, tuple[Tensor, ...])


@dataclass
class _Entry(Generic[Tensors]):
    """A kept table. ready: recorded after its upload, None on the CPU; streams: handles of the streams that
    may read it."""

    value: Tensors
    ready: torch.cuda.Event | None = None
    streams: set[int] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in _listed(self.value))


def _listed(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, for later work of its current stream. The CPU does not wait for the copy."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def not_captured(device: torch.device) -> None:
    """To be called where something is made that stays: a graph's own memory holds nothing before its replay,
    and goes with it. Raises RuntimeError while a graph is captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(_ONCE_BEFORE)


class Kept:
    """Tensors, or tuples of them, by key, kept between calls within limit_bytes: the least recently used one
    is dropped first.

    Tensors that a captured graph reads are kept for the life of the process, since the end of the graph is
    not known. reserve_bytes: the least pinned memory that is reserved for captures: tables first requested in
    a capture are copied to the device by the graph itself, from there; 0 for none.

    >>> tables = Kept(1 << 20)
    >>> table = tables.get(key, device, lambda: torch.tensor(numbers, device="cpu"))
    """

    def __init__(self, limit_bytes: int, *, reserve_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, _Entry[Any]] = OrderedDict()
        self._captured: dict[Hashable, _Entry[Any]] = {}
        self._bytes = 0
        self._reserve = _Reserve(reserve_bytes) if reserve_bytes else None
        self._lock = Lock()

    def sizes(self) -> list[int]:
        """The bytes of each kept value, the least recently used first; those of graphs apart."""
        return [entry.bytes for entry in self._entries.values()]

    @contextmanager
    def emptied(self, limit_bytes: int) -> Iterator[None]:
        """Inside the block nothing is kept from before, and at most `limit_bytes`; afterwards all is as
        before."""
        before = dict(vars(self))
        size = 0 if self._reserve is None else self._reserve.least_bytes
        vars(self).update(vars(Kept(limit_bytes, reserve_bytes=size)))
        try:
            yield
        finally:
            vars(self).update(before)

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensors]) -> Tensors:
        """The value of a key on a device, whose current stream may read it from now on.

        make: creates it on the CPU if it is not kept. Does not wait for the device. Call this with the device
        as the current one (as `rapidin.ops.backends` does), and hold the result until the last launch.
        Raises RuntimeError in a capture if it is neither kept nor fits into the reserve.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            entry = self._captured.get((key, device)) or self._entries.get((key, device))
            if entry is not None and (key, device) in self._entries:
                self._entries.move_to_end((key, device))
                if capturing:  # now kept for the life of the process
                    self._captured[key, device] = self._entries.pop((key, device))
                    self._bytes -= entry.bytes
        if entry is None:
            made = make()
            if capturing:
                return self._for_graph(made, device)
            entry = self._keep((key, device), _sent(made, device))
            if self._reserve is not None and device.type == "cuda":
                self._reserve.provide(entry.bytes)
        if entry.ready is not None and not capturing:  # a capture comes after all that was there before it
            stream = torch.cuda.current_stream(device)
            if stream.cuda_stream not in entry.streams:
                stream.wait_event(entry.ready)
                for x in _listed(entry.value):
                    x.record_stream(stream)
                entry.streams.add(stream.cuda_stream)
        value: Tensors = entry.value
        return value

    def _keep(self, key: Hashable, made: _Entry[Tensors]) -> _Entry[Tensors]:
        with self._lock:
            entry = self._captured.get(key) or self._entries.setdefault(key, made)
            if entry is made:
                self._bytes += made.bytes
            while self._bytes > self.limit_bytes and len(self._entries) > 1:
                self._bytes -= self._entries.popitem(last=False)[1].bytes
        return entry

    def _for_graph(self, made: Tensors, device: torch.device) -> Tensors:
        hosts = [None if self._reserve is None else self._reserve.take(x) for x in _listed(made)]
        there = tuple(host.to(device, non_blocking=True) for host in hosts if host is not None)
        if len(there) < len(hosts):
            raise RuntimeError(_ONCE_BEFORE)
        return there if isinstance(made, tuple) else there[0]


Made = TypeVar("Made", bound=Callable[..., Any])


def kept(limit_bytes: int) -> Callable[[Made], Callable[..., Any]]:
    """Decorates a function that creates tensors on the CPU: the result takes the device as one more, last
    argument, and keeps the tensors there within limit_bytes.

    >>> @kept(1 << 20)
    ... def table(width: int) -> Tensor: ...
    >>> table(64, device)
    """

    def decorated(function: Made) -> Callable[..., Any]:
        tables = Kept(limit_bytes)

        @wraps(function)
        def run(*arguments: Any) -> Any:
            *key, device = arguments
            return tables.get(tuple(key), device, lambda: function(*key))

        run.tables = tables  # type: ignore[attr-defined]
        return run

    return decorated


def _sent(made: Tensors, device: torch.device) -> _Entry[Tensors]:
    """CPU tensors on a device, by copies that the CPU does not wait for."""
    single = not isinstance(made, tuple)
    if device.type != "cuda":
        there: Any = tuple(x.to(device) for x in _listed(made))
        return _Entry(there[0] if single else there)
    stream = torch.cuda.current_stream(device)
    there = tuple(upload(x, device) for x in _listed(made))
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record(stream)
    return _Entry(there[0] if single else there, ready, {stream.cuda_stream})


class _Reserve:
    """Pinned memory for captures, during which none can be allocated. Memory taken from it is never reused:
    the graph's copy reads it at each replay."""

    def __init__(self, least_bytes: int) -> None:
        self.least_bytes = least_bytes
        self._all: list[Tensor] = []  # held for good
        self._used = 0
        self._lock = Lock()

    def provide(self, most_bytes: int) -> None:
        """Reserve room for a few calls with tables of `most_bytes` each. Not to be called in a capture."""
        with self._lock:
            left = self._all[-1].nbytes - self._used if self._all else 0
            if left < max(self.least_bytes // 2, 4 * most_bytes):
                size = max(self.least_bytes, 8 * most_bytes)
                self._all.append(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True))
                self._used = 0

    def take(self, x: Tensor) -> Tensor | None:
        """A copy of x in reserved memory; None where there is no room."""
        with self._lock:
            if not self._all or self._all[-1].nbytes - self._used < x.nbytes:
                return None
            begin = self._used
            self._used += -(-x.nbytes // 16) * 16
            return self._all[-1][begin : begin + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
