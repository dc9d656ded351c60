"""Several processes that fill or scan one cache together, started by torchrun, or share a machine.

`join` finds out whether that is so. What they have to agree on is little, and goes through the store that
torch.distributed meets by: who makes which shard, what the leader decided, who waits, who failed. Each tells
the store that it lives, so that none waits for one that is gone. Collectives are kept for what needs them:
hits of a scan, and the parts of a model that is larger than one GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from rapidin.errors import UserError

_T = TypeVar("_T")

JOINING = 600.0  # seconds within which all processes must have started
PATIENCE = 120.0  # seconds without a sign of life after which a process counts as gone
BEAT = 3.0  # seconds between signs of life
_POLICY = "OMP_WAIT_POLICY"  # read by the OpenMP runtime when torch loads it
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerError(Exception):
    """Another process of the run failed or is gone. code: what to exit with; said: whether it said why."""

    def __init__(self, what: str, code: int = 1, *, said: bool = False) -> None:
        super().__init__(what)
        self.code, self.said = code, said


class World:
    """The processes of a run, of which this is number `rank` of `size`; one alone without a launcher.

    All of them make the same calls of `share`, `take`, `meet`, `gather` and `tally` in the same order. Each
    call raises PeerError where another process failed, or has given no sign of life for `patience` seconds
    (`RAPIDIN_PATIENCE`).

    >>> for n in world.take(missing):                 # each n goes to one process, the next to who is free
    ...     write(n)
    >>> world.meet()
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.patience = float(os.environ.get("RAPIDIN_PATIENCE", PATIENCE))
        self.interrupt: Callable[[], None] = lambda: None  # called again and again by who waits
        self._store = store
        self._step = 0
        self._grouped = False
        self._seen: dict[int, tuple[bytes, float]] = {}  # a process's last sign of life, and when it changed
        self._looked = 0.0
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None
        if not self.alone:
            self._heart = threading.Thread(target=self._beat, name="rapidin-alive", daemon=True)
            self._heart.start()

    @property
    def alone(self) -> bool:
        """Whether this process is the only one."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this process keeps the manifest and speaks for all."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------ agreeing

    def share(self, make: Callable[[], bytes]) -> bytes:
        """What the leader makes, for all: only there `make` is called."""
        if self.alone:
            return make()
        key = self._key("share")
        if self.leads:
            value = make()
            self._ask("set", key, value)
            return value
        self._wait(lambda: bool(self._ask("check", [key])))
        shared: bytes = self._ask("get", key)
        return shared

    def take(self, jobs: Sequence[_T]) -> Iterator[_T]:
        """The jobs that fall to this process, in order: whoever is free takes the next. `jobs` is the same
        for all."""
        if self.alone:
            yield from jobs
            return
        key = self._key("take")
        self.check()
        while (n := self._ask("add", key, 1) - 1) < len(jobs):
            yield jobs[n]
            self.check()

    def range_of(self, count: int) -> tuple[int, int]:
        """This process's range of `count` things in a row, as [start, end); ranges are in the order of
        ranks."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def meet(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until all processes are here. meanwhile: what the leader does again and again until then."""
        if self.alone:
            return
        key = self._key("meet")
        self._ask("add", f"{key}/here", 1)
        if not self.leads:
            self._wait(lambda: bool(self._ask("check", [f"{key}/go"])))
            return
        self._wait(lambda: bool(self._ask("add", f"{key}/here", 0) == self.size), meanwhile)
        self._ask("set", f"{key}/go", "1")

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes by rank, each a thing that can be pickled; tensors on the CPU."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        self.meet()  # who is late is waited for here, where the death of another is noticed
        values: list[Any] = [None] * self.size
        self.collective(lambda: dist.all_gather_object(values, value, group=self.small_group))
        return values

    def most(self, number: int) -> int:
        """The largest of all processes' numbers, for those that go in step."""
        if self.alone:
            return number
        import torch
        import torch.distributed as dist

        value = torch.tensor(number, device="cpu")
        self.collective(lambda: dist.all_reduce(value, dist.ReduceOp.MAX, group=self.small_group))
        return int(value)

    def tally(self, numbers: int) -> Tally:
        """Counters that all processes add to."""
        return Tally(self, numbers, self._key("tally"))

    def check(self) -> None:
        """Raise PeerError where another process failed or is gone."""
        if self.alone:
            return
        if self._ask("check", ["failed"]):
            code, _, what = self._ask("get", "failed").decode().partition(" ")
            raise PeerError(what, int(code), said=True)
        now = time.monotonic()
        if now - self._looked < BEAT:
            return
        self._looked = now
        # The leader looks at all, the others at the leader: when it stops, so do they.
        for rank in range(1, self.size) if self.leads else (0,):
            sign = self._ask("get", f"alive/{rank}") if self._ask("check", [f"alive/{rank}"]) else b""
            if rank not in self._seen or self._seen[rank][0] != sign:
                self._seen[rank] = (sign, now)
            elif now - self._seen[rank][1] > self.patience:
                raise PeerError(
                    f"process {rank} of {self.size} has given no sign of life for {self.patience:g} s; "
                    "rerun the same command to resume"
                )

    def fail(self, what: str, code: int) -> bool:
        """Tell the others that this process failed; whether it is the first, whose line is to be printed."""
        if self.alone:
            return True
        try:
            first: bool = self._store.add("failures", 1) == 1
            if first:
                self._store.set("failed", f"{code} {what}")
            return first
        except RuntimeError:  # the store has gone with another process
            return True

    def _key(self, kind: str) -> str:
        self._step += 1
        return f"{kind}/{self._step}"

    def _ask(self, question: str, *values: Any) -> Any:
        """What the store answers to one of its methods."""
        try:
            return getattr(self._store, question)(*values)
        except RuntimeError:
            raise PeerError(
                "the process that all others meet at is gone; rerun the same command to resume"
            ) from None

    def _wait(self, reached: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        pause = 0.002
        while not reached():
            self.check()
            self.interrupt()
            meanwhile()
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(BEAT if count else 0.0):
                count += 1
                self._store.set(f"alive/{self.rank}", str(count))

    # --------------------------------------------------------------------------------- collectives

    @property
    def group(self) -> Any:
        """The process group of all, made when it is first asked for, by all at once: NCCL for tensors on
        GPUs, gloo for those of the CPU."""
        import torch
        import torch.distributed as dist

        if not self._grouped:
            self.meet()
            gpus = torch.cuda.is_available() and dist.is_nccl_available()
            if not dist.is_initialized():
                self.collective(
                    lambda: dist.init_process_group(
                        "cpu:gloo,cuda:nccl" if gpus else "gloo",
                        store=dist.PrefixStore("group", self._store),  # type: ignore[attr-defined]
                        rank=self.rank,
                        world_size=self.size,
                        timeout=timedelta(seconds=self.patience),
                    )
                )
            self._grouped = True
        return dist.group.WORLD

    @property
    def small_group(self) -> Any:
        """The same for objects: they travel by the CPU."""
        import torch.distributed as dist

        if not hasattr(self, "_small"):
            group = self.group
            several = dist.get_backend(group) != "gloo"
            self._small = dist.new_group(backend="gloo") if several else group
        return self._small

    def collective(self, run: Callable[[], _T]) -> _T:
        """Run what all processes run together; PeerError where that fails because one of them is gone."""
        if self.alone:
            return run()
        import torch.distributed as dist

        try:
            return run()
        except RuntimeError as error:
            lines = str(error).strip().splitlines() or [""]
            if not isinstance(error, dist.DistError) and "gloo" not in lines[0].lower():
                raise
            time.sleep(0.5)  # for who failed to say why
            self.check()
            raise PeerError(
                f"the processes lost each other ({lines[0]}); rerun the same command to resume"
            ) from error

    # ------------------------------------------------------------------------------------- the end

    def device(self, name: str | None) -> str:
        """The device of this process: by its number on this machine where there are GPUs. UserError where
        there are fewer GPUs than processes."""
        import torch

        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if self.alone or name != "cuda":
            return name
        if self.local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(
                f"there are more processes than GPUs on this machine ({count})",
                "start at most one for each GPU, or use `device='cpu'`",
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def leave(self) -> None:
        """The last call. Whoever holds the store stays until the others have let go of it."""
        if self.alone:
            return
        import torch.distributed as dist

        self._ended.set()
        if self._heart is not None:
            self._heart.join(BEAT)
        if self._grouped:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        with contextlib.suppress(RuntimeError):
            self._store.add("left", 1)
            deadline = time.monotonic() + BEAT
            while self.leads and self._store.add("left", 0) < self.size and time.monotonic() < deadline:
                time.sleep(0.01)


class Tally:
    """Counters of a run: `add` counts for all processes, `total` says what all have counted."""

    def __init__(self, world: World, numbers: int, key: str) -> None:
        self._world, self._key = world, key
        self._counted, self._sent, self._total = [0] * numbers, [0] * numbers, [0] * numbers
        self._at = 0.0

    def add(self, *numbers: int) -> None:
        """Add to each counter."""
        self._counted = [a + b for a, b in zip(self._counted, numbers, strict=True)]

    def total(self, *, now: bool = False) -> list[int]:
        """What all processes have counted, at most half a second old; now: this moment's, once all have
        called this so."""
        if self._world.alone:
            return self._counted
        if now or time.monotonic() - self._at > 0.5:
            self._at = time.monotonic()
            for n, (counted, sent) in enumerate(zip(self._counted, self._sent, strict=True)):
                self._total[n] = self._world._ask("add", f"{self._key}/{n}", counted - sent)
            self._sent = self._counted
        return self._total


_world = World()


def world() -> World:
    """The run that this process is part of."""
    return _world


@contextlib.contextmanager
def using(run: World) -> Iterator[World]:
    """Inside the block this process is part of `run`."""
    global _world
    before, _world = _world, run
    try:
        yield run
    finally:
        _world = before


def by_itself() -> contextlib.AbstractContextManager[World]:
    """Inside the block this process shares nothing with the others, as one that reads all while they wait."""
    run = world()
    return using(run if run.alone else World())


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return all(name in os.environ for name in _ENVIRONMENT) and os.environ["WORLD_SIZE"] != "1"


def join() -> World:
    """Take part in the run that the environment names, as torchrun sets it; alone without one.

    Raises UserError where the other processes do not come.
    """
    global _world
    if not launched():
        return _world
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what a lost peer means is said in one line
    import torch.distributed as dist

    try:
        meeting = dist.rendezvous("env://", timeout=timedelta(seconds=JOINING))  # type: ignore[attr-defined]
        store, rank, size = next(meeting)
        name = _name(store, rank, size)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot meet the other processes at {os.environ['MASTER_ADDR']}: {str(error).splitlines()[0]}",
            "start all of them with torchrun",
        ) from None
    store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    _world = World(rank, size, store, int(os.environ.get("LOCAL_RANK", "0")))
    return _world


def _name(store: Any, rank: int, size: int) -> str:
    """The leader's name for this run, in a store that may still hold what an earlier start left there.

    Each of the others says hello by a name that no earlier process had, and the leader answers to that.
    """
    unique_name, deadline = f"rapidin/{uuid.uuid4().hex}", time.monotonic() + JOINING
    if rank:
        store.set(f"rapidin/hello/{rank}", unique_name)
    while time.monotonic() < deadline:
        if rank and store.check([unique_name]):
            name = str(store.get(unique_name).decode())
            store.add(f"{name}/here", 1)
            return name
        for other in () if rank else range(1, size):
            if store.check([f"rapidin/hello/{other}"]):
                store.set(store.get(f"rapidin/hello/{other}").decode(), unique_name)
        if not rank and store.add(f"{unique_name}/here", 0) == size - 1:
            return unique_name
        time.sleep(0.02)
    raise RuntimeError(f"not all {size} processes have started within {JOINING:g} s")


def leave() -> None:
    """The run is over for this process."""
    global _world
    _world.leave()
    _world = World()


def patient_threads() -> None:
    """Let torch's threads sleep while they wait for work, instead of spinning.

    Threads that spin take the time of the processor from whichever thread has work to do: where other
    processes were busy too, training steps of a small model took ten times as long
    (docs/measured/results.md). The command line calls this by itself. In Python call it before torch is
    imported, or set OMP_WAIT_POLICY=passive; a policy that is set already is kept.

    Raises UserError if torch has been imported without a policy, since it is too late then.
    """
    if _POLICY not in os.environ and "torch" in sys.modules:
        raise UserError(
            "torch is imported already, and its threads cannot be changed",
            f"call rapidin.patient_threads() before, or start Python with {_POLICY}=passive",
        )
    os.environ.setdefault(_POLICY, "passive")
