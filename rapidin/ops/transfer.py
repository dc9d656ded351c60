"""Between the CPU and a GPU: copies that are made while both go on working.

On a device that is the CPU the same calls copy nothing, or at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from rapidin.ops.lifetimes import upload

__all__ = ["BUFFERS", "CopyStream", "Download", "GpuCopyStream", "Prefetcher", "stride_there", "upload"]

BUFFERS = 3  # shards in flight: one read from disk, one copied, one scanned

download_streams: dict[torch.device, torch.cuda.Stream] = {}  # made when first needed


class Download:
    """Tensors on their way to the CPU: in pinned memory, by a stream of its own, after the work so far.

    Any thread may wait for them. Tensors on the CPU are ready at once and not copied. Raises ValueError
    unless all are on one device: otherwise one of them was created on the wrong device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        devices = list(dict.fromkeys(x.device for x in tensors))
        if len(devices) > 1:
            raise ValueError(
                f"Download: all tensors must be on one device, got {', '.join(map(str, devices))}; "
                "move those that are elsewhere with .to()"
            )
        if not devices or devices[0].type != "cuda":
            self._tensors = list(tensors)
            return
        device = devices[0]
        if device not in download_streams:
            download_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = download_streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        self._tensors = []
        with torch.cuda.stream(stream):
            for x in tensors:
                host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
                self._tensors.append(host.copy_(x, non_blocking=True))
                x.record_stream(stream)  # its memory is not given to others before the copy is made
        self._event = stream.record_event()

    def ready(self) -> bool:
        """Whether `wait` would not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[Tensor]:
        """The tensors on the CPU, in their order."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


# ------------------------------------------------------------------------------------- prefetching


class CopyStream(Protocol):
    """Copies between the CPU and a device, and what they come before and after.

    An event is a point in the order of the device's work; None stands for one that is long past.
    """

    def buffers(self, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Memory for `rows` rows like those of `like`: on the CPU, where the device reads it, and on the
        device."""

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy each pair's first, on the CPU, to its second, once the event `after` is reached; an event."""

    def before(self, event: Any) -> None:
        """What the device is told to do from now on comes after the event."""

    def now(self) -> Any:
        """The event of all that the device was told to do so far, copies apart."""

    def wait(self, event: Any) -> None:
        """The CPU waits for the event."""


class GpuCopyStream:
    """Copies in a stream of their own, beside the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffers(self, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        shape = (rows, *like.shape[1:])
        host = torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=True)
        there = torch.empty(shape, dtype=like.dtype, device=self.device)
        # The allocator knows this memory as the current stream's, whose older work may still use it.
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        there.record_stream(self._copies)
        return host, there

    def send(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        if after is not None:
            self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            for host, there in pairs:
                there.copy_(host, non_blocking=True)
        event: torch.cuda.Event = self._copies.record_event()
        return event

    def before(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def now(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()


_ALIGNED = 16  # bytes, the widest load of a GPU


def stride_there(numbers: int, each: int) -> int:
    """The stride of rows on a device, in numbers of `each` bytes: rows begin at multiples of 16 bytes, for
    the widest loads, unless the padding takes more than an eighth more memory."""
    padded = -(-numbers * each // _ALIGNED) * _ALIGNED
    return padded // each if padded % each == 0 and 8 * padded <= 9 * numbers * each else numbers


def _padded(x: Tensor) -> Tensor:
    """An empty tensor whose rows are as long as x's on a device, padding included."""
    return x.new_empty(0, stride_there(x.shape[1], x.element_size())) if x.ndim == 2 else x[:0]


Label = TypeVar("Label")
Key = TypeVar("Key", bound=Hashable)


class Prefetcher(Generic[Label, Key]):
    """Copies batches of tensors to a device, some of them ahead, in `buffers` times the largest one's memory.

    >>> for label, tensors in Prefetcher(GpuCopyStream(device)).carry(batches):
    ...     # tensors are on the device until the next is asked for
    """

    def __init__(self, stream: CopyStream, buffers: int = BUFFERS) -> None:
        self._stream = stream
        self._buffers: list[_Buffer[Key]] = [_Buffer(stream) for _ in range(buffers)]

    def carry(
        self, batches: Iterable[tuple[Label, Mapping[Key, Tensor]]]
    ) -> Iterator[tuple[Label, dict[Key, Tensor]]]:
        """The batches in their order, each with its tensors on the device; axis 0 may differ in length."""
        in_flight: list[tuple[Label, _Buffer[Key], dict[Key, Tensor]]] = []
        for number, (label, tensors) in enumerate(batches):
            buffer = self._buffers[number % len(self._buffers)]
            in_flight.append((label, buffer, buffer.send(tensors)))
            if len(in_flight) == len(self._buffers):
                yield from self._arrive(in_flight)
        while in_flight:
            yield from self._arrive(in_flight)

    def _arrive(
        self, in_flight: list[tuple[Label, _Buffer[Key], dict[Key, Tensor]]]
    ) -> Iterator[tuple[Label, dict[Key, Tensor]]]:
        label, buffer, tensors = in_flight.pop(0)
        self._stream.before(buffer.sent)
        yield label, tensors
        buffer.used = self._stream.now()


class _Buffer(Generic[Key]):
    """Memory for one batch on both sides. sent: the event of the last copy; used: of its last reader."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._memory: dict[Key, tuple[Tensor, Tensor]] = {}
        self.sent: Any = None
        self.used: Any = None

    def send(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        self._stream.wait(self.sent)  # until then the copy before reads the memory on the CPU
        pairs, copies = [], {}
        for name, x in tensors.items():
            if name not in self._memory or len(self._memory[name][0]) < len(x):
                self._memory[name] = self._stream.buffers(_padded(x), len(x))
            host, there = (memory[: len(x)] for memory in self._memory[name])
            pairs.append((host, there))  # padding included: one copy of contiguous memory
            if x.ndim == 2:
                host, there = (memory[:, : x.shape[1]] for memory in (host, there))
            host.copy_(x)
            copies[name] = there
        self.sent = self._stream.send(pairs, self.used)
        return copies
