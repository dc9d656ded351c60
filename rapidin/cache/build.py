"""The caching loop: examples in groups of like length to sketches, sketches to codes, codes to shards.

Where the code learns from a sample, that comes first: the sample's sketches go into a small float16 cache
inside the folder, so that a killed run goes on there too, and the shards take them from it instead of making
them again. Several processes share the sample and the shards: each takes the next that nobody has taken, one
of them keeps the manifest and fits the code.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from rapidin import distributed, ops
from rapidin.cache import Cache, CacheWriter, Manifest, ShardWriter, codec
from rapidin.cache.codec import Basis, Code, PackedCode
from rapidin.cache.shards import Rows
from rapidin.cache.signals import Stop
from rapidin.data.encoding import Encoded, Encoder, Status
from rapidin.data.examples import Examples
from rapidin.data.records import record_hash
from rapidin.distributed import World
from rapidin.errors import UserError
from rapidin.ops.transfer import Download, upload

SHARD_BYTES = 16 << 20  # a killed run loses at most this much, and a file this large is read at full speed
GROUP_BYTES = 32 << 20  # sketches held in float32 at a time
MOST_SHARDS = 16384  # the manifest names each, and is written anew after each
GPU_GROUP_BYTES = 128 << 20  # the same on a GPU, whose kernels want more rows than a CPU's caches

# Sketches [n, blocks, width] of texts, their status [n] uint8, both on the model's device; reports examples,
# tokens and skipped ones as it goes.
Sketch = Callable[[Sequence[Encoded]], tuple[Tensor, Tensor]]
# Gives a shard's rows and counts, once their last bytes have come from the device.
Finish = Callable[[], tuple[Rows, dict[str, int]]]


def shard_rows(manifest: Manifest, folder: Path | None = None) -> int:
    """Rows of a shard: as in the cache that is there, else 16 MiB, but no more work than a killed run may
    lose, and few enough files."""
    if folder is not None:
        with contextlib.suppress(UserError):
            return Manifest.read(folder).shard_rows
    by_bytes = max(32, SHARD_BYTES // manifest.row_bytes)
    return max(min(8192, by_bytes, max(1024, manifest.rows // 128)), manifest.rows // MOST_SHARDS)


def open_writer(
    folder: Path,
    manifest: Manifest,
    world: World,
    part: tuple[int, int] | None = None,
    prefix: Callable[[int], str] | None = None,
) -> ShardWriter:
    """The writer of this process: the leader's keeps the manifest. UserError as `CacheWriter`'s, and where
    what another process would cache is not what the leader would."""
    if world.leads:
        writer = CacheWriter(folder, manifest, prefix, part)
        world.share(lambda: writer.manifest.data_bytes)
        return writer
    theirs = Manifest.of_bytes(world.share(lambda: b""), folder)
    theirs.refuse_unless_same(manifest, folder)
    return ShardWriter(folder, theirs, part)


def agree(writer: ShardWriter, world: World) -> None:
    """The leader's manifest counts for all, once it has come this far."""
    if not world.alone:
        data = world.share(lambda: writer.manifest.data_bytes)
        writer.manifest = Manifest.of_bytes(data, writer.folder)


def sample_rows(rows: int, size: int, seed: int, stream: int = 17) -> list[int]:
    """`size` of the rows 0 .. rows - 1, drawn by the seed, ascending; all where there are no more.

    stream: of the keyed hash in docs/sketch.md, one for each purpose.
    """
    if size >= rows:
        return list(range(rows))
    from rapidin.ops import _cpu

    words = torch.empty(rows, dtype=torch.int32, device="cpu")
    _cpu.hash_words(seed, stream, 0, rows, words.data_ptr())
    return sorted(torch.argsort(words, stable=True)[:size].tolist())


class CachingLoop:
    """Fills a cache. device: where sketches are made and packed; tell: something to say to the user, once;
    learn_only: stop when the code has learnt; idle: what to do when no shard is left to be taken."""

    def __init__(
        self,
        writer: ShardWriter,
        world: World,
        examples: Examples,
        encoder: Encoder,
        sketch: Sketch,
        device: torch.device,
        tell: Callable[[str], None],
        *,
        learn_only: bool = False,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.writer, self.world, self.examples, self.encoder = writer, world, examples, encoder
        self.learn_only, self.idle = learn_only, idle
        self.sketch, self.device, self.tell = sketch, device, tell
        manifest = writer.manifest
        wanted = manifest.code.sample
        # Where examples were added since, the code keeps what it has learnt from those before.
        self.sample = sample_rows(manifest.rows_begun, wanted, manifest.sketch["seed"]) if wanted else []
        self._place = {row: n for n, row in enumerate(self.sample)}
        self._sampled: Cache | None = None

    def run(self) -> None:
        """Learn what is to be learnt, and write every missing shard.

        SIGINT and SIGTERM wait until the shard in hand is written.
        """
        manifest = self.writer.manifest
        with Stop(self.tell) as stop:
            self.world.interrupt = stop.check
            if self.writer.missing:
                if self.sample and (manifest.packing is None or self._needs_sample()):
                    self._sketch_sample(stop)
                stop.check()
                if manifest.code.dtype in codec.PACKED and manifest.packing is None:
                    if self.world.leads:
                        self._fit()
                    agree(self.writer, self.world)
            if self.writer.missing and not self.learn_only:
                code = self.writer.code.to(self.device)
                self._fill(self.writer, lambda n: self._shard(self._rows(n), code), stop)
            self.world.interrupt = lambda: None
        self._sampled = None
        if self.world.leads and not self.learn_only:
            shutil.rmtree(self.writer.sample_folder, ignore_errors=True)

    def _fill(self, writer: ShardWriter, make: Callable[[int], Finish], stop: Stop) -> None:
        """Write the missing shards, all processes together; all are in the manifest when this returns."""
        jobs = writer.missing  # now, while it is the same for all
        begun = [n for n in jobs if writer.manifest.shard_at(n) is not None]
        with _WriterThread(writer) as thread:
            # What is there of a shard is the leader's to go on with.
            for n in begun if self.world.leads else ():
                stop.check()
                thread.write(n, make(n))
            for n in self.world.take([n for n in jobs if n not in begun]):
                stop.check()
                thread.write(n, make(n))
            self.idle()
        if isinstance(writer, CacheWriter):
            self.world.meet(writer.take_up)
            writer.take_up()
            patience = time.monotonic() + self.world.patience
            while writer.missing and time.monotonic() < patience:  # a network's folder may show files late
                time.sleep(0.2)
                writer.take_up()
            if writer.missing:
                raise UserError(
                    f"{len(writer.missing)} shards that other processes wrote are not in '{writer.folder}'",
                    "name a folder with --out that all machines share, or see --part",
                )
            writer.finish()
        else:
            self.world.meet()
        agree(writer, self.world)

    def _rows(self, n: int) -> range:
        """The rows of shard n that are still to be made."""
        manifest = self.writer.manifest
        first, there = n * manifest.shard_rows, manifest.shard_at(n)
        return range(first + (there.rows if there else 0), first + manifest.rows_of(n))

    def _needs_sample(self) -> bool:
        """Whether a row that is still to be made is one of the sample."""
        missing, each = set(self.writer.missing), self.writer.manifest.shard_rows
        return any(row // each in missing and row in self._rows(row // each) for row in self.sample)

    def sampled_rows(self) -> int:
        """Rows whose sketches wait in the sample's folder, while no shard holds them."""
        folder = self.writer.sample_folder
        if not self.sample or not self.world.leads or not folder.exists():
            return 0
        try:
            done = Manifest.read(folder)
        except UserError:
            return 0
        kept = {
            row
            for shard in self.writer.manifest.shards
            for row in range(shard.first, shard.first + shard.rows)
        }
        there = (row for shard in done.shards for row in self.sample[shard.first : shard.first + shard.rows])
        return sum(row not in kept for row in there)

    # ------------------------------------------------------------------------------------ learning

    def _sketch_sample(self, stop: Stop) -> None:
        whole = self.writer.manifest
        data = {key: value for key, value in whole.data.items() if key != "begun"}
        manifest = Manifest(
            whole.model, whole.sketch, whole.gradient, whole.text, data, codec.Format("float16"),
            rows=len(self.sample), shard_rows=32, layers=whole.layers,
        )  # fmt: skip
        folder = self.writer.sample_folder
        with open_writer(folder, manifest, self.world) as writer:
            if writer.missing:
                self.tell(f"learning the code from a sample of {len(self.sample):,} examples first")

            def make(n: int) -> Finish:
                chosen = self.sample[n * manifest.shard_rows :][: manifest.rows_of(n)]
                return self._shard(chosen, writer.code)

            self._fill(writer, make, stop)
        self._sampled = Cache(folder)

    def _fit(self) -> None:
        manifest = self.writer.manifest
        blocks, width, seed = len(manifest.layers), manifest.width, manifest.sketch["seed"]
        basis, learnt, statistics = None, None, {}
        if self._sampled is not None:
            good = (self._sampled.status() == 0).nonzero()[:, 0].tolist()
            if len(good) < 4:
                raise UserError(
                    f"only {len(good)} of {len(self.sample)} sampled examples have a gradient: too few",
                    "leave --bytes out, or say --sample 0",
                )
            kept = torch.cat([rows.code["sketch"] for _, rows in self._sampled.shards()])  # float16 still
            units = kept[good].view(len(good), blocks, width)
            del kept
            head = codec.head_for(manifest.code, blocks)
            if self.device.type == "cuda" and codec.learning_bytes(units, head) < _free(self.device):
                units = units.to(self.device)
            learnt = codec.learn(units, head).cpu()
        assert isinstance(self.writer, CacheWriter)
        shape = codec.fit(manifest.code, blocks, width, learnt)
        if learnt is not None and self._sampled is not None:
            basis = Basis.of(learnt, shape, self._sampled.lengths(good), seed).rounded()
            statistics = {"sample": float(len(good)), **learnt.outside()}
        self.writer.set_packing(shape, basis, statistics)

    # ----------------------------------------------------------------------------------------------- shards

    def _shard(self, wanted: Sequence[int], code: Code) -> Finish:
        """Make the sketches of these rows and pack them, on a GPU without waiting for it."""
        records = [self.examples.get(row) for row in wanted]
        encoded = [self.encoder.example(record) for record in records]
        names = list(code.fields())
        under_way: list[tuple[list[int], Download]] = []
        for group in self._groups(encoded):
            unit, length, status = self._unit_blocks([wanted[i] for i in group], [encoded[i] for i in group])
            fields = code.encode(unit, length)
            unlike = self._unlike(code, unit, status)
            under_way.append((group, Download([*(fields[name] for name in names), status, unlike])))

        def finish() -> tuple[Rows, dict[str, int]]:
            cpu, n = torch.device("cpu"), len(wanted)
            fields = {
                name: torch.zeros(n, *shape, dtype=dtype, device=cpu)
                for name, (dtype, shape) in code.fields().items()
            }
            status, unlike = torch.zeros(n, dtype=torch.uint8, device=cpu), 0
            for group, download in under_way:
                *values, status[group], found = download.wait()
                for name, value in zip(names, values, strict=True):
                    fields[name][group] = value
                unlike += int(found)
            counts = {s.name.lower(): int((status == s).sum()) for s in Status}
            counts["truncated"] = sum(e.truncated for e in encoded)
            if isinstance(code, PackedCode) and code.shape.head:
                counts["unlike_sample"] = unlike
            index = [self.examples.index(row) for row in wanted]
            rows = Rows(
                code=fields,
                index=torch.tensor(index, dtype=torch.int64, device=cpu),
                status=status,
                truncated=torch.tensor([e.truncated for e in encoded], dtype=torch.uint8, device=cpu),
                record=torch.tensor([record_hash(r) for r in records], dtype=torch.int64, device=cpu),
            )
            return rows, counts

        return finish

    def _groups(self, encoded: Sequence[Encoded]) -> list[list[int]]:
        """Examples of like length together, as many as may be held at a time."""
        held = GPU_GROUP_BYTES if self.device.type == "cuda" else GROUP_BYTES
        size = max(16, held // (4 * self.writer.manifest.dim))
        order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].ids), i))
        return [order[at : at + size] for at in range(0, len(order), size)]

    def _unit_blocks(self, rows: Sequence[int], encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit blocks, their lengths and status: from the sample where it has them, else made."""
        layers, width = len(self.writer.manifest.layers), self.writer.manifest.width
        known: list[int] = []
        new: list[int] = []
        for i, row in enumerate(rows):
            (known if self._sampled is not None and row in self._place else new).append(i)
        if new:
            sketch, made_status = self.sketch([encoded[i] for i in new])
            made_unit, made_length = ops.unit_blocks(sketch)
            if not known:
                return made_unit, made_length, made_status
        unit = torch.zeros(len(rows), layers, width, device=self.device)
        length = unit.new_zeros(len(rows), layers)
        status = torch.zeros(len(rows), dtype=torch.uint8, device=self.device)
        if new:
            at = self._places(new)
            unit[at], length[at], status[at] = made_unit, made_length, made_status
        if known and self._sampled is not None:
            at, places = self._places(known), [self._place[rows[i]] for i in known]
            sampled = self._sampled.sketches(places).view(-1, layers, width)
            unit[at] = upload(sampled, self.device)
            length[at] = upload(self._sampled.lengths(places), self.device)
            status[at] = upload(self._sampled.status(places), self.device)
        return unit, length, status

    def _places(self, chosen: Sequence[int]) -> Tensor:
        return upload(torch.tensor(chosen, dtype=torch.int64, device="cpu"), self.device)

    def _unlike(self, code: Code, unit: Tensor, status: Tensor) -> Tensor:
        """Examples of which the learnt directions hold less than of all but one in a hundred sampled ones."""
        if not isinstance(code, PackedCode) or not code.shape.head:
            return status.new_zeros((), dtype=torch.int64)  # downloaded with tensors of that device
        assert self.writer.manifest.packing is not None
        limit = self.writer.manifest.packing.statistics["outside_99"]
        return ((code.basis.outside(unit) > limit) & (status == 0)).sum()


def _free(device: torch.device) -> int:
    """Bytes of a GPU's memory that can be had."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


class _WriterThread:
    """Shards go to disk while the next one is made; one at a time, in order, none lost when this ends."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rapidin-shards")
        self._pending: Future[None] | None = None

    def write(self, n: int, finish: Finish) -> None:
        """Hand a shard over; waits for the one before, and raises what became of it."""
        self._wait()
        self._pending = self._pool.submit(lambda: self._writer.write(n, *finish()))

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> _WriterThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait()
        finally:
            self._pool.shutdown()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far caching is.

    done of total examples, of which `resumed` were there already; tokens: read by this run;
    skipped: examples without a sketch in this run; message: something to tell the user, once. Of several
    processes, all count."""

    done: int
    total: int
    tokens: int
    skipped: int
    resumed: int
    message: str | None = None


OnProgress = Callable[[Progress], None]


class Meter:
    """Counts what caching does and tells the caller."""

    def __init__(
        self, on_progress: OnProgress | None, writer: ShardWriter, world: distributed.World, sampled: int
    ) -> None:
        """sampled: examples sketched by an earlier run that wait for their shards."""
        self._tell = on_progress
        rows_of = writer.manifest.rows_of
        self._total = sum(map(rows_of, writer.wanted))
        self._resumed = self._total - sum(map(rows_of, writer.missing)) + sampled
        self._tally = world.tally(3)  # done, tokens, skipped
        self._under_way: list[tuple[int, int, Download | None]] = []
        self.tell(None)

    def sketched(self, done: int, tokens: int, skipped: Download | None) -> None:
        """Counts a batch when the device has made it: `add`, with skipped on its way to the CPU."""
        self._under_way.append((done, tokens, skipped))
        self.settle(wait=False)

    def settle(self, *, wait: bool) -> None:
        """Counts batches that are made; wait: all of them."""
        while self._under_way:
            done, tokens, skipped = self._under_way[0]
            if not (wait or skipped is None or skipped.ready()):
                return
            del self._under_way[0]
            self.add(done, tokens, skipped=0 if skipped is None else int(skipped.wait()[0]))
        if wait:
            self._tally.total(now=True)

    def add(self, done: int, tokens: int, *, skipped: int) -> None:
        self._tally.add(done, tokens, skipped)
        self.tell(None)

    def tell(self, message: str | None, *, now: bool = False) -> None:
        done, tokens, skipped = self._tally.total(now=now)
        if self._tell:
            done += self._resumed
            self._tell(Progress(done, self._total, tokens, skipped, self._resumed, message))
