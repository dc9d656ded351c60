"""A GPU that is not there, for the flow of work: which device and stream, what is waited for, what is freed.

Tensors of "cuda:0" are `GpuTensor`s. Their numbers lie in memory of the CPU and every operation is done at
once, so that results can be held against those of the CPU. What a GPU would do with them is kept beside:

- an operation on tensors of both devices raises, as torch does, and so do a CPU tensor's `record_stream`, the
  numpy array of a tensor of the GPU and the like;
- what makes the CPU wait is counted by the place that asked for it (`Gpu.waits`): `.item()`, `.tolist()`,
  `.cpu()`, boolean indices, copies from memory that is not pinned;
- each stream has a vector clock, which events carry to other streams and to the CPU. Reads and writes without
  an order between them, memory that is freed while another stream uses it (`record_stream` is missing), and
  the CPU's use of pinned memory that a copy still reads or writes are reported in `Gpu.problems`. Nothing is
  ever taken to be finished because time has passed: an event's `query` is True only where the CPU has waited.
- a captured graph (`Gpu.capture`) knows what it reads: `Graph.lost` says what of it is gone.

Ops of `rapidin.ops` are replaced by one rule (`_rule`): the kernels of the CPU on the numbers; all tensors
among the arguments are read and all results written by the current stream. `Gpu(kernels="cuda")` runs the
real Python of the CUDA backend instead, on emulated kernels, and looks every pointer up that they are given.

In C++ these tensors are the CPU's, for autograd knows no others in a torch without CUDA: there the backward
pass of `FakeTensorMode` on "cuda:0" ends the process. What C++ decides by device is decided before it is
asked, in `_Calls`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import itertools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import peft  # noqa: F401 - packages that it imports ask for a GPU then, and must not find this one
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]

Clock = dict[int, int]
_numbers = itertools.count()

_the: Gpu | None = None  # the one in use
_state = threading.local()


def _join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        if clock.get(stream, 0) < tick:
            clock[stream] = tick


# ---- memory ----


class Memory:
    """An allocation. stream: of a GPU's, whose memory the allocator takes it for; pinned: the CPU's."""

    def __init__(self, gpu: Gpu, begin: int, size: int, what: str, pinned: bool, stream: int) -> None:
        self.begin, self.size, self.what, self.pinned, self.stream = begin, size, what, pinned, stream
        self.reads: Clock = {}
        self.writes: Clock = {}
        self.recorded: set[int] = set()
        self.of_graph = gpu.capturing
        self._gpu = gpu

    def __str__(self) -> str:
        kind = "pinned memory" if self.pinned else "memory of the GPU"
        return f"{kind} ({self.size} bytes, made by {self.what})"

    def __del__(self) -> None:
        if not self.pinned:
            self._gpu.freed(self)


class GpuTensor(Tensor):
    """A tensor of "cuda:0"; `held`: its numbers; `memory`: where they lie, None where there are none."""

    held: Tensor
    memory: Memory | None

    @staticmethod
    def __new__(cls, held: Tensor, memory: Memory | None) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=CPU,
        )  # fmt: skip
        made.held, made.memory = held, memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _gpu().dispatch(func, args, kwargs or {})

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: GpuTensor) -> None:
        if not isinstance(value, GpuTensor):
            raise RuntimeError("incompatible tensor type: .data of a tensor of the GPU given one of the CPU")
        self.held, self.memory = value.held, value.memory

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return _gpu().pointer(self)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def cpu(self) -> Tensor:  # type: ignore[override]
        return _gpu().move(self, CPU, None, False, False)

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def pin_memory(self, device: Any = None) -> Tensor:
        raise RuntimeError("cannot pin a tensor of the GPU, only dense CPU tensors can be pinned")

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def register_hook(self, hook: Any) -> Any:
        def run(grad: Tensor) -> Any:
            with _Calls():  # which torch leaves before it calls the autograd engine
                return hook(grad)

        return Tensor.register_hook(self, run)

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        if self.memory is not None:
            self.memory.recorded.add(stream.number)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> GpuTensor:
        return memo.setdefault(id(self), self.clone().detach().requires_grad_(self.requires_grad))


# ---- streams and events, as torch.cuda has them ----


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        gpu = _gpu()
        self.clock = dict(gpu.clocks[(stream or gpu.current()).number])

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _gpu().current()).wait_event(self)

    def query(self) -> bool:
        known = _gpu().host()
        return all(known.get(stream, 0) >= tick for stream, tick in self.clock.items())

    def synchronize(self) -> None:
        _join(_gpu().host(), self.clock)


class Stream:
    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        gpu = _gpu()
        self.device, self.number = CUDA, len(gpu.clocks)
        gpu.clocks[self.number] = {}

    @property
    def cuda_stream(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)

    def wait_event(self, event: Event) -> None:
        _join(_gpu().clocks[self.number], event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return self.record_event().query()

    def synchronize(self) -> None:
        self.record_event().synchronize()


@dataclass
class Graph:
    """A captured graph: what its kernels read that is not its own, and what its copies read of the CPU's."""

    memory: list[tuple[weakref.ref[Memory], str]] = field(default_factory=list)
    pinned: list[tuple[weakref.ref[Memory], int, bytes]] = field(default_factory=list)

    def lost(self) -> list[str]:
        """What is no longer there, or no longer what it was."""
        found = [f"a captured kernel reads {what}, which is freed" for ref, what in self.memory if not ref()]
        for ref, address, before in self.pinned:
            if ref() is None:
                found.append("a captured copy reads pinned memory that is freed")
            elif ctypes.string_at(address, len(before)) != before:
                found.append("a captured copy reads pinned memory that was written anew")
        return found


# ---- the device ----

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
_WAITS |= {"unique_consecutive", "is_nonzero", "linalg_eigh", "_linalg_eigh", "_linalg_svd"}
# That torch gives tensors of the CPU among those of a GPU: what is copied, and indices, which are sent over.
_MIXED = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "index_put", "_unsafe_index"}
_FACTORIES = {
    torch.arange, torch.empty, torch.empty_strided, torch.eye, torch.full, torch.linspace, torch.ones,
    torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor, torch.zeros,
    torch.Tensor.new_empty, torch.Tensor.new_full, torch.Tensor.new_ones, torch.Tensor.new_zeros,
    torch.empty_like, torch.full_like, torch.ones_like, torch.rand_like, torch.zeros_like,
}  # fmt: skip


class Gpu:
    """kernels: "rule" or "cuda", see the top of this file; memory_bytes: what `mem_get_info` says is free."""

    def __init__(self, kernels: str = "rule", memory_bytes: int = 1 << 30) -> None:
        self.kernels, self.memory_bytes, self.number = kernels, memory_bytes, next(_numbers)
        self.problems: list[str] = []
        self.waits: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()  # of ops of rapidin
        self.clocks: dict[int, Clock] = {}
        self.capturing: Graph | None = None
        self.live_bytes = self.most_bytes = 0  # of the GPU's memory, now and at most
        self._hosts: dict[int, Clock] = {}
        self._memory: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._pinned: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._pointers_allowed = 0
        self._main = threading.get_ident()

    # -- entering --

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Gpu]:
        """The device is there inside the block."""
        global _the
        assert _the is None
        _the = self
        self.default = Stream()
        import gpu_kernels

        from rapidin.ops.transfer import download_streams

        try:
            with (
                pytest.MonkeyPatch.context() as patch,
                mock.patch.dict(download_streams, clear=True),
                gpu_kernels.installed(self),
                self.modes(),
            ):
                self._patch(patch)
                yield self
        finally:
            _the = None

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        with _Calls(), _Operations():
            yield

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        from rapidin.ops.lifetimes import Kept

        cuda = torch.cuda
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": self._stream,
            "current_stream": lambda device=None: self.current(),
            "default_stream": lambda device=None: self.default,
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "is_available": lambda: True,
            "is_initialized": lambda: False,
            "mem_get_info": lambda device=None: (self.memory_bytes, self.memory_bytes),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: self.wait("synchronize", everything=True),
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "get_device_properties": lambda device=None: SimpleNamespace(
                multi_processor_count=3, major=9, minor=0, total_memory=self.memory_bytes
            ),
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda *_, **__: True,
            "_lazy_init": lambda: None,
        }.items():
            patch.setattr(cuda, name, value)
        get = Kept.get
        # What is kept is kept for this GPU.
        patch.setattr(Kept, "get", lambda kept, key, *given: get(kept, (self.number, key), *given))
        submit, result = ThreadPoolExecutor.submit, Future.result

        def in_thread(pool: Any, task: Any, *args: Any, **named: Any) -> Any:
            """What the CPU knows goes along to a thread, and comes back with its result."""
            known = dict(self.host())

            def run() -> Any:
                self._hosts[threading.get_ident()] = known
                with self.modes():
                    return task(*args, **named)

            future = submit(pool, run)
            future.known = known
            return future

        def waited(future: Any, timeout: Any = None) -> Any:
            found = result(future, timeout)
            _join(self.host(), getattr(future, "known", {}))
            return found

        patch.setattr(Tensor, "record_stream", _record_stream)  # of a tensor of the CPU
        patch.setattr(ThreadPoolExecutor, "submit", in_thread)
        patch.setattr(Future, "result", waited)

    @contextlib.contextmanager
    def _stream(self, stream: Stream | None) -> Iterator[None]:
        before = self.current()
        _state.stream = before if stream is None else stream
        try:
            yield
        finally:
            _state.stream = before

    def current(self) -> Stream:
        found = getattr(_state, "stream", None)
        return found if found is not None and getattr(_state, "gpu", None) is self else self._begin()

    def _begin(self) -> Stream:
        _state.gpu, _state.stream = self, self.default
        return self.default

    def host(self) -> Clock:
        """What this thread of the CPU knows to be done."""
        return self._hosts.setdefault(threading.get_ident(), {})

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """What is done inside the block is a graph's, by a stream of its own."""
        torch.cuda.synchronize()  # as torch.cuda.graph does
        stream, self.capturing = Stream(), Graph()
        try:
            with self._stream(stream):
                yield self.capturing
        finally:
            self.capturing = None
            _join(self.host(), self.clocks[stream.number])

    # -- what happens --

    def wait(self, why: str, *, everything: bool = False) -> None:
        """The CPU waits for the current stream, or for all."""
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing ({why})")
        self.waits[f"{_asker()} {why}"] += 1
        for clock in self.clocks.values() if everything else [self.clocks[self.current().number]]:
            _join(self.host(), clock)

    def use(self, what: str, reads: list[Memory], writes: list[Memory]) -> None:
        """The current stream reads and writes memory."""
        stream = self.current().number
        clock = self.clocks[stream]
        _join(clock, self.host())
        clock[stream] = clock.get(stream, 0) + 1
        for verb, memories in (("reads", reads), ("writes", writes)):
            for memory in memories:
                others = [("writes", memory.writes), *([("reads", memory.reads)] if verb == "writes" else [])]
                for their, uses in others:
                    for other, tick in uses.items():
                        if other != stream and clock.get(other, 0) < tick:
                            self.problem(
                                f"{what} on stream {stream} {verb} {memory}, which stream {other} {their}, "
                                "and no event orders them"
                            )
                (memory.reads if verb == "reads" else memory.writes)[stream] = clock[stream]
                if self.capturing is not None and memory.of_graph is not self.capturing and not memory.pinned:
                    self.capturing.memory.append((weakref.ref(memory), f"{memory} in {what}"))

    def use_by_host(self, what: str, x: Tensor, *, writes: bool) -> None:
        """The CPU reads or writes a tensor, whose memory may be pinned."""
        memory = self.pinned(x)
        if memory is None:
            return
        known = self.host()
        for their, uses in (("writes", memory.writes), *([("reads", memory.reads)] if writes else [])):
            for stream, tick in uses.items():
                if known.get(stream, 0) < tick:
                    self.problem(
                        f"{what}: the CPU {'writes' if writes else 'reads'} {memory}, which stream {stream} "
                        f"{their}, without having waited"
                    )

    def freed(self, memory: Memory) -> None:
        """Nothing holds this memory any longer: the allocator may give it to its stream's next work."""
        self.live_bytes -= memory.size
        if _the is not self or (self.capturing is not None and memory.of_graph is self.capturing):
            return
        home, known = self.clocks[memory.stream], self.host()
        for stream in {*memory.reads, *memory.writes} - {memory.stream} - memory.recorded:
            tick = max(memory.reads.get(stream, 0), memory.writes.get(stream, 0))
            if max(home.get(stream, 0), known.get(stream, 0)) < tick:
                self.problem(f"{memory} of stream {memory.stream} is freed while stream {stream} may use it")

    def problem(self, text: str) -> None:
        if len(self.problems) < 100:
            self.problems.append(f"{text} [{_asker()}]")

    # -- memory --

    def wrap(self, held: Tensor) -> GpuTensor:
        """A tensor of the GPU with these numbers, in memory that is known or new."""
        begin = held.untyped_storage().data_ptr()
        memory = self._memory.get(begin) if begin else None
        if memory is None and begin:
            stream = self.current().number
            memory = Memory(self, begin, held.untyped_storage().nbytes(), _asker(), False, stream)
            # What the stream did before may still use it: it is as if it was written by the stream now.
            clock = self.clocks[stream]
            clock[stream] = clock.get(stream, 0) + 1
            memory.writes[stream] = clock[stream]
            self._memory[begin] = memory
            self.live_bytes += memory.size
            self.most_bytes = max(self.most_bytes, self.live_bytes)
        return GpuTensor(held, memory)

    def wrapped(self, x: Any, known: dict[int, GpuTensor]) -> Any:
        """Each tensor in x as one of the GPU; known: by the identities of their numbers."""
        if isinstance(x, Tensor):
            return known[id(x)] if id(x) in known else self.wrap(x)
        return type(x)(self.wrapped(each, known) for each in x) if isinstance(x, list | tuple) else x

    def pin(self, like: Tensor) -> Tensor:
        """A pinned tensor with the numbers of one of the CPU."""
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing (pinned memory)")
        numbers = np.empty(max(1, like.numel() * like.element_size()), dtype=np.uint8).view(_Owned)
        made = torch.from_numpy(numbers)[: like.numel() * like.element_size()].view(like.dtype)
        made = made.view(like.shape).copy_(like)
        memory = Memory(self, numbers.ctypes.data, numbers.nbytes, _asker(), True, 0)
        self._pinned[memory.begin] = memory
        weakref.finalize(numbers, lambda memory: None, memory)  # as long as the storage is there
        return made

    def pinned(self, x: Tensor) -> Memory | None:
        return self._pinned.get(x.untyped_storage().data_ptr()) if x.layout == torch.strided else None

    def at(self, address: int) -> Memory | None:
        """The memory of the GPU that an address is in."""
        known = self._memory.get(address)
        if known is not None:
            return known
        for memory in list(self._memory.values()):
            if memory.begin <= address < memory.begin + memory.size:
                return memory
        return None

    def words(self, address: int, count: int) -> list[int]:
        """64-bit integers of the GPU's memory."""
        return list((ctypes.c_int64 * count).from_address(address))

    def pointer(self, x: GpuTensor) -> int:
        if not self._pointers_allowed:
            raise RuntimeError(f"an address of the GPU's memory is asked for by {_asker()}")
        return x.held.data_ptr()

    @contextlib.contextmanager
    def pointers(self) -> Iterator[None]:
        """Addresses may be asked for inside the block: kernels get them."""
        self._pointers_allowed += 1
        try:
            yield
        finally:
            self._pointers_allowed -= 1

    def held(self, x: Any) -> Any:
        """The same with the numbers of each tensor of the GPU, also inside of lists and of objects."""
        if isinstance(x, GpuTensor):
            return x.held
        if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
            return type(x)(self.held(each) for each in x)
        if isinstance(x, dict):
            return {name: self.held(each) for name, each in x.items()}
        own = _fields(x)
        if own:
            again = copy.copy(x)
            for name, value in own.items():
                object.__setattr__(again, name, CPU if value == CUDA else self.held(value))
            return again
        return CPU if isinstance(x, torch.device) else x

    def all_memory(self, x: Any) -> list[Memory]:
        """Of each tensor of the GPU in x, also inside of lists and of objects."""
        if isinstance(x, GpuTensor):
            return [] if x.memory is None else [x.memory]
        inner: Any = ()
        if isinstance(x, list | tuple):
            inner = x
        elif isinstance(x, dict):
            inner = x.values()
        else:
            inner = _fields(x).values()
        return [memory for each in inner for memory in self.all_memory(each)]

    # -- copies --

    def move(self, x: Tensor, device: torch.device, dtype: Any, non_blocking: bool, fresh: bool) -> Tensor:
        """`x.to(device, dtype)`."""
        if x.device.type == device.type:
            return torch.Tensor.to(x, dtype or x.dtype, copy=fresh) if fresh or dtype else x
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("a copy between devices that gradients go through")
        if isinstance(x, GpuTensor):
            made = torch.empty_like(x.held, dtype=dtype or x.dtype)
            if non_blocking:
                made = self.pin(made)
            return self.copy(made, x, non_blocking)
        converted = x if dtype is None else x.to(dtype)
        with torch.utils._python_dispatch._disable_current_modes():
            made = self.wrap(torch.empty_like(converted))
        return self.copy(made, converted, non_blocking)

    def copy(self, to: Tensor, x: Tensor, non_blocking: bool) -> Tensor:
        """`to.copy_(x)`, of which at least one is the GPU's."""
        host = next((each for each in (to, x) if not isinstance(each, GpuTensor)), None)
        reads = self.all_memory(x)
        writes = self.all_memory(to)
        pinned = None if host is None else self.pinned(host)
        if pinned is not None:
            self.use_by_host("copy_", host, writes=host is to)
            if self.capturing is not None:  # read at each replay, not now
                address = host.data_ptr()
                numbers = ctypes.string_at(address, host.nbytes)
                self.capturing.pinned.append((weakref.ref(pinned), address, numbers))
            elif non_blocking:
                (writes if host is to else reads).append(pinned)
        self.use("copy_", reads, writes)
        with torch.utils._python_dispatch._disable_current_modes():
            self.held(to).copy_(self.held(x))
        if host is not None and (pinned is None or not non_blocking):
            way = "to the CPU" if host is to else "from memory that is not pinned"
            self.wait(f"copy {way}" if pinned is None else f"copy {way}, blocking")
        return to

    # -- operations --

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation of torch."""
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = _name(func)
        gpu: list[GpuTensor] = []
        cpu: list[Tensor] = []
        for each in (*args, *kwargs.values()):
            for x in each if isinstance(each, list | tuple) else (each,):
                if isinstance(x, GpuTensor):
                    gpu.append(x)
                elif isinstance(x, Tensor):
                    cpu.append(x)
        device = kwargs.get("device")
        wanted = torch.device(device).type if device is not None else None
        here = bool(gpu) if wanted is None else wanted == "cuda"
        if wanted == "cpu" or (wanted is None and not gpu and not cpu):
            here = self._meant(bool(gpu))
        if not here and not gpu:
            for x in cpu:
                self.use_by_host(name, x, writes=False)
            for x in _written(func, args, kwargs):
                self.use_by_host(name, x, writes=True)
            if kwargs.get("pin_memory"):
                return self.pin(func(*args, **{**kwargs, "pin_memory": False}))
            return func(*args, **kwargs)
        if (
            name == "copy_"
            and cpu
            and not (len(cpu) == 1 and cpu[0].ndim == 0 and isinstance(args[0], GpuTensor))
        ):
            return self.copy(
                args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            )
        if gpu and any(x.ndim for x in cpu):
            if name not in _MIXED:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                    f"and cpu! (aten::{name}, asked for by {_asker()})"
                )
            if any(x.ndim for x in cpu):
                self.wait(f"aten::{name} with an index of the CPU")
        if gpu and not here:
            raise NotImplementedError(f"aten::{name} of a tensor of the GPU, to be made on the CPU")
        waits = name in _WAITS or (
            name in ("index", "index_put_", "_index_put_impl_", "index_put")
            and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        )
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            waits = True
        named = {key: self.held(value) for key, value in kwargs.items()}
        if "device" in named:
            named["device"] = CPU
        found = func(*(self.held(each) for each in args), **named)
        made = self.wrapped(found, {id(x.held): x for x in gpu})
        reads = [x.memory for x in gpu if x.memory is not None]
        if not (func.is_view or name == "detach"):
            written = [x for x in _written(func, args, kwargs) if isinstance(x, GpuTensor)]
            writes = [x.memory for x in written if x.memory is not None]
            writes += [m for m in self.all_memory(made) if m not in writes and m not in reads]
            self.use(f"aten::{name}", reads, writes)
        if waits:
            self.wait(f"aten::{name}")
        return made

    def _meant(self, has_gpu: bool) -> bool:
        """Whether what C++ makes on "the CPU" is the GPU's: it takes these tensors for the CPU's."""
        stack = getattr(_state, "calls", [])
        if stack:
            factory, of_gpu, named = stack[-1]
            return (has_gpu and not named) if factory else of_gpu
        return has_gpu or torch._C._current_graph_task_id() != -1


class _Owned(np.ndarray):
    """An array whose end can be seen."""


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes to, of its arguments."""
    found: list[Tensor] = []
    for n, name in _outputs(func):
        value = args[n] if n is not None and n < len(args) else kwargs.get(name)
        found += [x for x in (value if isinstance(value, list | tuple) else [value]) if x is not None]
    return found


@cache
def _outputs(func: Any) -> list[tuple[int | None, str]]:
    return [
        (None if argument.kwarg_only else n, argument.name)
        for n, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


@cache
def _name(func: Any) -> str:
    return str(func._schema.name.partition("::")[2])


def _fields(x: Any) -> dict[str, Any]:
    """What an object of rapidin's consists of."""
    if not type(x).__module__.startswith("rapidin."):
        return {}
    if dataclasses.is_dataclass(x):
        return {each.name: getattr(x, each.name) for each in dataclasses.fields(x)} | getattr(
            x, "__dict__", {}
        )
    return getattr(x, "__dict__", {})


def _asker() -> str:
    """Who asked: the innermost function that is neither torch's nor of these helpers."""
    frame = sys._getframe(1)
    while frame is not None:
        name = _named(frame.f_code)
        if name:
            return name
        frame = frame.f_back
    return "?"


@cache
def _named(code: CodeType) -> str:
    """File and function, "" for torch's and the helpers'."""
    path = Path(code.co_filename)
    if "torch" in path.parts or code.co_filename.startswith("<") or path.name in _HELPERS:
        return ""
    if "site-packages" in path.parts:  # which may lie in the checkout's own environment
        return "/".join(path.parts[path.parts.index("site-packages") + 1 :]) + f":{code.co_name}"
    if path.is_relative_to(ROOT):
        return f"{path.relative_to(ROOT)}:{code.co_name}"
    return ""


_HELPERS = {"gpu_flow.py", "gpu_kernels.py", "contextlib.py"}


def _gpu() -> Gpu:
    assert _the is not None, "a tensor of the GPU is used after the GPU is gone"
    return _the


class _Operations(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is not compiled need not be kept from it: to import it takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _gpu().dispatch(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What C++ would decide by the device that it takes tensors to be on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = _OWN.get(func)
        if own is not None:
            return own(_gpu(), *args, **kwargs)
        calls = _state.__dict__.setdefault("calls", [])
        of_gpu = any(
            isinstance(x, GpuTensor)
            for each in (*args, *kwargs.values())
            for x in (each if isinstance(each, list | tuple) else (each,))
        )
        calls.append((func in _FACTORIES, of_gpu, kwargs.get("device") is not None))
        try:
            return func(*args, **kwargs)
        finally:
            calls.pop()


def _to(gpu: Gpu, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        device, dtype, rest = args[0].device, args[0].dtype, list(args[1:])
        non_blocking = kwargs.get("non_blocking", rest[0] if rest else False)
    else:
        args = tuple(str(a) if isinstance(a, torch.device) else a for a in args)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type == x.device.type or device.type == "meta":
        if isinstance(x, GpuTensor):
            return x if dtype in (None, x.dtype) and not copy else Tensor.to(x, dtype or x.dtype, copy=copy)
        return Tensor.to(x, *args, copy=copy, **kwargs)
    return gpu.move(x, device, dtype, non_blocking, copy)


def _tensor(
    gpu: Gpu, data: Any, *, dtype: Any = None, device: Any = None, pin_memory: bool = False, **_: Any
) -> Tensor:
    if isinstance(data, GpuTensor):
        raise NotImplementedError("torch.tensor of a tensor of the GPU")
    if device is not None and torch.device(device).type == "meta":
        return torch.tensor(data, dtype=dtype, device=device)
    made = torch.tensor(data, dtype=dtype, device=CPU)
    if pin_memory:
        return gpu.pin(made)
    wanted = CPU if device is None else torch.device(device)
    return made if wanted.type == "cpu" else gpu.move(made, wanted, None, False, False)


def _pin_memory(gpu: Gpu, x: Tensor, device: Any = None) -> Tensor:
    return x if gpu.pinned(x) is not None else gpu.pin(x)


def _record_stream(x: Tensor, stream: Stream) -> None:
    raise NotImplementedError("Could not run 'aten::record_stream' with arguments from the 'CPU' backend.")


def _looked_at(call: Callable[..., Any]) -> Callable[..., Any]:
    def own(gpu: Gpu, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        gpu.use_by_host(call.__name__, x, writes=False)
        return call(x, *args, **kwargs)

    return own


_OWN: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cpu: lambda gpu, x, **_: x,
    Tensor.cuda: lambda gpu, x, *_, non_blocking=False, **__: gpu.move(x, CUDA, None, non_blocking, False),
    torch.tensor: _tensor,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: lambda gpu, x, *_: gpu.pinned(x) is not None,
    Tensor.tolist: _looked_at(Tensor.tolist),
    Tensor.numpy: _looked_at(Tensor.numpy),
    Tensor.data_ptr: _looked_at(Tensor.data_ptr),
}


def to_gpu(model: Any) -> Any:
    """The model with its parameters and buffers on the GPU, shared ones once."""
    known: dict[int, Any] = {}

    def moved(x: Tensor) -> Tensor:
        if id(x) not in known:
            there = x.detach().clone().to(CUDA)
            known[id(x)] = nn.Parameter(there, x.requires_grad) if isinstance(x, nn.Parameter) else there
        return known[id(x)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    table[name] = moved(value)
    return model
