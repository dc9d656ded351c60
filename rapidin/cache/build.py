"""The caching loop: examples in groups of like length to sketches, sketches to codec tensors, these to
shards.

If the codec learns a basis from a sample, that comes first. The sample's sketches go into a small float16
cache inside the folder, so that a killed run resumes there too, and the shards take them from it instead of
making them again. So they do with sketches that were made as the preconditioner was fitted. Several processes
share the sample and the shards: each takes the next one that no other has taken. The leading process keeps
the manifest and fits the codec.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rapidin import ops
from rapidin.cache import codec as codecs
from rapidin.cache.codec import Basis, Codec, CodecConfig, PackedCodec
from rapidin.cache.learned_files import preconditioner_record
from rapidin.cache.manifest import Manifest
from rapidin.cache.reader import Cache
from rapidin.cache.shards import Rows
from rapidin.cache.signals import Stop
from rapidin.cache.writer import CacheWriter, Finish, ShardWriter, WriterThread
from rapidin.data.encoding import AnyExample, Status
from rapidin.data.examples import Examples
from rapidin.data.records import Record, record_hash
from rapidin.distributed import World
from rapidin.errors import UserError
from rapidin.ops.transfer import Download, upload

SHARD_BYTES = 16 << 20  # a killed run loses at most this much, and a file this large is read at full speed
MAX_SHARDS = 16384  # the manifest names each, and is rewritten after each
GROUP_BYTES = 32 << 20  # of sketches that are held in float32 at a time
GPU_GROUP_BYTES = 128 << 20  # the same on a GPU, whose kernels need more rows than a CPU's caches hold
_SAMPLE_SHARD_ROWS = 32
_MIN_SAMPLED = 4  # examples with a gradient that a basis can be learned from

# Gives sketches [n, blocks, width] of texts and their status [n] uint8, both on the model's device; reports
# examples, tokens and skipped ones as it goes.
Sketch = Callable[[Sequence[AnyExample]], tuple[Tensor, Tensor]]
ExampleOf = Callable[[int, Record | None], AnyExample]  # of a row and its record, None for a malformed one


def shard_rows(manifest: Manifest, folder: Path | None = None) -> int:
    """Rows of a shard: as in the cache that is in `folder`, else such that a shard has 16 MiB, a killed run
    loses little work, and there are not too many files."""
    if folder is not None:
        with contextlib.suppress(UserError):
            return Manifest.read(folder).shard_rows
    by_bytes = max(32, SHARD_BYTES // manifest.row_bytes)
    return max(min(8192, by_bytes, max(1024, manifest.rows // 128)), manifest.rows // MAX_SHARDS)


def open_writer(
    folder: Path,
    manifest: Manifest,
    world: World,
    shard_slice: tuple[int, int] | None = None,
    prefix: Callable[[int], str] | None = None,
) -> ShardWriter:
    """The writer of this process; the leader's keeps the manifest.

    Raises UserError like `CacheWriter`, and if this process would cache something else than the leader.
    """
    if world.leads:
        writer = CacheWriter(folder, manifest, prefix, shard_slice)
        world.share(lambda: writer.manifest.data_bytes)
        return writer
    leaders = Manifest.of_bytes(world.share(lambda: b""), folder)
    leaders.refuse_unless_same(manifest, folder)
    return ShardWriter(folder, leaders, shard_slice)


def agree(writer: ShardWriter, world: World) -> None:
    """Wait for the leader to come this far, and take over its manifest."""
    if not world.alone:
        data = world.share(lambda: writer.manifest.data_bytes)
        writer.manifest = Manifest.of_bytes(data, writer.folder)


def sample_rows(rows: int, size: int, seed: int, stream: int = 17) -> list[int]:
    """`size` of the rows 0 to rows - 1, drawn by the seed, ascending; all of them if there are no more.

    stream: of the keyed hash in docs/reference/sketch.md, one for each purpose.
    """
    if size >= rows:
        return list(range(rows))
    from rapidin.ops import _cpu

    words = torch.empty(rows, dtype=torch.int32, device="cpu")
    _cpu.hash_words(seed, stream, 0, rows, words.data_ptr())
    if size <= 0:
        return []
    few = (words <= words.kthvalue(size).values).nonzero()[:, 0]  # with all that share the last one's word
    return sorted(few[torch.argsort(words[few], stable=True)[:size]].tolist())


class CachingLoop:
    """Fills a cache.

    device: where sketches are made and encoded; tell: called with messages for the user; learn_only: stop
    when the codec is fitted; idle: called when no shard is left to be taken.
    """

    def __init__(
        self,
        writer: ShardWriter,
        world: World,
        examples: Examples,
        example: ExampleOf,
        sketch: Sketch,
        device: torch.device,
        tell: Callable[[str], None],
        *,
        learn_only: bool = False,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        self.writer, self.world, self.examples, self.example = writer, world, examples, example
        self.learn_only, self.idle = learn_only, idle
        self.sketch, self.device, self.tell = sketch, device, tell
        manifest = writer.manifest
        size = manifest.codec.sample
        # If examples were added, the codec keeps the basis that it learned from those before.
        self.sample = sample_rows(manifest.rows_begun, size, manifest.sketch["seed"]) if size else []
        self._sample_cache: Cache | None = None
        # Caches with sketches that are made already, and where each row is in them.
        self._stored: list[tuple[Cache, dict[int, int]]] = []

    def run(self) -> None:
        """Fit the codec, if it is not, and write every missing shard.

        SIGINT and SIGTERM wait until the shard that is being made is written.
        """
        manifest = self.writer.manifest
        with Stop(self.tell) as stop:
            self.world.interrupt = stop.check
            if self.writer.missing:
                self._open_fitted()
                if self.sample and (manifest.fitted_codec is None or self._needs_sample()):
                    self._sketch_sample(stop)
                stop.check()
                if manifest.codec.dtype in codecs.PACKED and manifest.fitted_codec is None:
                    if self.world.leads:
                        self._fit_codec()
                    agree(self.writer, self.world)
            if self.writer.missing and not self.learn_only:
                codec = self.writer.codec.to(self.device)
                self._fill(self.writer, lambda n: self.make_shard(self._missing_rows(n), codec), stop)
            self.world.interrupt = lambda: None
        self._sample_cache, self._stored = None, []
        if self.world.leads and not self.learn_only:
            self.writer.remove_samples()

    def _fill(self, writer: ShardWriter, make: Callable[[int], Finish], stop: Stop) -> None:
        """Write the missing shards, all processes together; all are in the manifest when this returns."""
        missing = writer.missing  # read now, while it is the same for all processes
        begun = [n for n in missing if writer.manifest.shard_at(n) is not None]
        with WriterThread(writer) as thread:
            # The leader completes the shards that have some of their rows.
            for n in begun if self.world.leads else ():
                stop.check()
                thread.write(n, make(n))
            for n in self.world.take([n for n in missing if n not in begun]):
                stop.check()
                thread.write(n, make(n))
            self.idle()
        if isinstance(writer, CacheWriter):
            self._record_others(writer)
        else:
            self.world.meet()
        agree(writer, self.world)

    def _record_others(self, writer: CacheWriter) -> None:
        """Wait for the other processes, and record the shards that they wrote."""
        self.world.meet(writer.record_receipts)
        writer.record_receipts()
        deadline = time.monotonic() + self.world.patience
        while writer.missing and time.monotonic() < deadline:  # a network's folder may show files late
            time.sleep(0.2)
            writer.record_receipts()
        if writer.missing:
            raise UserError(
                f"{len(writer.missing)} shards that other processes wrote are not in '{writer.folder}'",
                "name a folder that all machines share, or see `part`",
            )
        writer.finish()

    def _missing_rows(self, n: int) -> range:
        """The rows of shard n that are not cached."""
        manifest = self.writer.manifest
        first, shard = n * manifest.shard_rows, manifest.shard_at(n)
        return range(first + (shard.rows if shard else 0), first + manifest.rows_of(n))

    # ---------------------------------------------------------------------------------- the sample

    def _needs_sample(self) -> bool:
        """Whether a row that is not cached is one of the sample."""
        return self.awaited(self.sample) > 0

    def sampled_rows(self) -> int:
        """Number of rows whose sketches are in the folder of a sample and not in a shard."""
        if not self.world.leads:
            return 0
        fitted = _fitted_cache(self.writer)
        sampled = set() if fitted is None else set(fitted.index().tolist())
        if self.sample and self.writer.sample_folder.exists():
            with contextlib.suppress(UserError):
                for shard in Manifest.read(self.writer.sample_folder).shards:
                    sampled.update(self.sample[shard.first : shard.first + shard.rows])
        return self.awaited(sampled)

    def awaited(self, rows: Iterable[int]) -> int:
        """How many of these rows this run is to write."""
        missing, size = set(self.writer.missing), self.writer.manifest.shard_rows
        return sum(row // size in missing and row in self._missing_rows(row // size) for row in rows)

    def _sketch_sample(self, stop: Stop) -> None:
        """Sketch the sample into a cache of its own."""
        manifest = _sample_manifest(
            self.writer.manifest, CodecConfig("float16"), len(self.sample), _SAMPLE_SHARD_ROWS
        )
        folder = self.writer.sample_folder
        with open_writer(folder, manifest, self.world) as writer:
            if writer.missing:
                self.tell(f"learning the codec's basis from a sample of {len(self.sample):,} examples first")

            def make(n: int) -> Finish:
                rows = self.sample[n * manifest.shard_rows :][: manifest.rows_of(n)]
                return self.make_shard(rows, writer.codec)

            self._fill(writer, make, stop)
        self._sample_cache = Cache(folder)
        self._stored.append((self._sample_cache, {row: n for n, row in enumerate(self.sample)}))

    def _open_fitted(self) -> None:
        """Use the sketches that were made as the preconditioner was fitted, in all processes or in none."""
        cache = _fitted_cache(self.writer) if self.world.leads else None
        if self.world.share(lambda: b"1" if cache is not None else b"0") == b"1":
            cache = cache or Cache(self.writer.fitted_folder)
            self._stored.append((cache, {row: n for n, row in enumerate(cache.index().tolist())}))

    def _fit_codec(self) -> None:
        """Fit the codec to its budget and, if there is a sample, to that."""
        manifest = self.writer.manifest
        blocks, width, seed = len(manifest.layers), manifest.width, manifest.sketch["seed"]
        basis, learned, statistics = None, None, {}
        if self._sample_cache is not None:
            valid = (self._sample_cache.status() == 0).nonzero()[:, 0].tolist()
            if len(valid) < _MIN_SAMPLED:
                raise UserError(
                    f"only {len(valid)} of {len(self.sample)} sampled examples have a gradient, "
                    f"at least {_MIN_SAMPLED} are needed",
                    "leave `bytes` out, or use `sample=0`",
                )
            # Concatenated in float16, and one copy at a time.
            sketches = torch.cat([rows.tensors["sketch"] for _, rows in self._sample_cache.shards()])
            units = sketches[valid].view(len(valid), blocks, width)
            del sketches
            shared = codecs.shared_size(manifest.codec, blocks)
            if self.device.type == "cuda" and codecs.learning_bytes(units, shared) < _free_bytes(self.device):
                units = units.to(self.device)
            learned = codecs.learn_basis(units, shared).cpu()
        assert isinstance(self.writer, CacheWriter)
        shape = codecs.fit_shape(manifest.codec, blocks, width, learned)
        if learned is not None and self._sample_cache is not None:
            basis = Basis.of(learned, shape, self._sample_cache.lengths(valid), seed).rounded()
            statistics = {"sample": float(len(valid)), **learned.unexplained()}
        self.writer.set_fitted_codec(shape, basis, statistics)

    # ------------------------------------------------------------------------------------- shards

    def make_shard(self, rows: Sequence[int], codec: Codec) -> Finish:
        """Make the sketches of these rows and encode them, on a GPU without waiting for it."""
        records = [self.examples.get(row) for row in rows]
        encoded = [self.example(row, record) for row, record in zip(rows, records, strict=True)]
        names = list(codec.tensor_specs())
        downloads: list[tuple[list[int], Download]] = []
        for group in self._groups(encoded):
            unit, length, status = self._unit_blocks([rows[i] for i in group], [encoded[i] for i in group])
            tensors = codec.encode(unit, length)
            unlike = self._unlike_sample(codec, unit, status)
            downloads.append((group, Download([*(tensors[name] for name in names), status, unlike])))

        def finish() -> tuple[Rows, dict[str, int]]:
            cpu, n = torch.device("cpu"), len(rows)
            tensors = {
                name: torch.zeros(n, *shape, dtype=dtype, device=cpu)
                for name, (dtype, shape) in codec.tensor_specs().items()
            }
            status, unlike = torch.zeros(n, dtype=torch.uint8, device=cpu), 0
            for group, download in downloads:
                *values, status[group], unlike_in_group = download.wait()
                for name, value in zip(names, values, strict=True):
                    tensors[name][group] = value
                unlike += int(unlike_in_group)
            counts = {s.name.lower(): int((status == s).sum()) for s in Status}
            counts["truncated"] = sum(e.truncated for e in encoded)
            if isinstance(codec, PackedCodec) and codec.shape.shared:
                counts["unlike_sample"] = unlike
            index = [self.examples.index(row) for row in rows]
            shard = Rows(
                tensors=tensors,
                index=torch.tensor(index, dtype=torch.int64, device=cpu),
                status=status,
                truncated=torch.tensor([e.truncated for e in encoded], dtype=torch.uint8, device=cpu),
                record=torch.tensor([record_hash(r) for r in records], dtype=torch.int64, device=cpu),
            )
            return shard, counts

        return finish

    def _groups(self, encoded: Sequence[AnyExample]) -> list[list[int]]:
        """Examples of like length together, as many as may be held at a time."""
        group_bytes = GPU_GROUP_BYTES if self.device.type == "cuda" else GROUP_BYTES
        size = max(16, group_bytes // (4 * self.writer.manifest.dim))
        order = sorted(range(len(encoded)), key=lambda i: (-encoded[i].length, i))
        return [order[at : at + size] for at in range(0, len(order), size)]

    def _unit_blocks(
        self, rows: Sequence[int], encoded: Sequence[AnyExample]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit blocks, their lengths and status: from the cache of a sample if one has them, else made."""
        layers, width = len(self.writer.manifest.layers), self.writer.manifest.width
        new = list(range(len(rows)))
        parts: list[tuple[list[int], tuple[Tensor, Tensor, Tensor]]] = []
        for cache, position in self._stored:
            stored, new = [i for i in new if rows[i] in position], [i for i in new if rows[i] not in position]
            if stored:
                parts.append((stored, self._read(cache, [position[rows[i]] for i in stored])))
        if new:
            sketch, made_status = self.sketch([encoded[i] for i in new])
            made = (*ops.unit_blocks(sketch), made_status)
            if not parts:
                return made
            parts.append((new, made))
        unit = torch.zeros(len(rows), layers, width, device=self.device)
        length = unit.new_zeros(len(rows), layers)
        status = torch.zeros(len(rows), dtype=torch.uint8, device=self.device)
        for chosen, values in parts:
            at = self._indices(chosen)
            unit[at], length[at], status[at] = values
        return unit, length, status

    def _read(self, cache: Cache, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit blocks, their lengths and status, of rows of the cache of a sample."""
        sketches = cache.sketches(positions).view(-1, len(self.writer.manifest.layers), cache.manifest.width)
        values = (sketches, cache.lengths(positions), cache.status(positions))
        unit, length, status = (upload(value, self.device) for value in values)
        return unit, length, status

    def _indices(self, chosen: Sequence[int]) -> Tensor:
        return upload(torch.tensor(chosen, dtype=torch.int64, device="cpu"), self.device)

    def _unlike_sample(self, codec: Codec, unit: Tensor, status: Tensor) -> Tensor:
        """Number of examples that the shared basis explains less of than of 99 in 100 sampled ones."""
        if not isinstance(codec, PackedCodec) or not codec.shape.shared:
            return status.new_zeros((), dtype=torch.int64)  # downloaded with tensors of that device
        assert self.writer.manifest.fitted_codec is not None
        limit = self.writer.manifest.fitted_codec.statistics["unexplained_p99"]
        return ((codec.basis.unexplained(unit) > limit) & (status == 0)).sum()


def write_fitted(
    writer: CacheWriter, preconditioner: bytes, rows: Sequence[int], sketches: Tensor, status: Tensor
) -> None:
    """Write sketches that were made as the preconditioner was fitted, for the shards of a cache to take them.

    They are on disk when this returns, and count once the manifest has the preconditioner with these bytes.
    rows: of the data; sketches: [n, blocks, width] float32, and status [n] uint8, as of `Sketch`.
    """
    folder, whole = writer.fitted_folder, writer.manifest
    shutil.rmtree(folder, ignore_errors=True)
    # Nothing is lost on the way to the shards.
    codec = CodecConfig("float16" if whole.codec.dtype == "float16" else "float32")
    manifest = _sample_manifest(whole, codec, len(rows), len(rows))
    record = (whole.preconditioner or {}) | preconditioner_record(preconditioner)
    manifest.gradient = whole.gradient | {"preconditioner": record}
    unit, length = ops.unit_blocks(sketches)
    with CacheWriter(folder, manifest) as fitted:
        tensors = fitted.codec.encode(unit, length)
        names = list(tensors)
        *values, on_cpu = Download([*(tensors[name] for name in names), status]).wait()
        unused = torch.zeros(len(rows), dtype=torch.int64, device="cpu")  # shards take these from the data
        made = Rows(
            tensors=dict(zip(names, values, strict=True)),
            index=torch.tensor(rows, dtype=torch.int64, device="cpu"),
            status=on_cpu,
            truncated=unused.to(torch.uint8),
            record=unused,
        )
        fitted.write(0, made, {s.name.lower(): int((on_cpu == s).sum()) for s in Status})


def _fitted_cache(writer: ShardWriter) -> Cache | None:
    """The sketches that were made as the cache's preconditioner was fitted; None if there are none, or they
    were made in another way than those of the cache are."""
    if writer.manifest.preconditioner is None or not writer.fitted_folder.exists():
        return None
    try:
        cache = Cache(writer.fitted_folder)
    except UserError:
        return None
    whole = Manifest.of_bytes(writer.manifest.data_bytes, writer.folder)
    alike = all(
        getattr(cache.manifest, key) == getattr(whole, key)
        for key in ("sketch", "gradient", "text", "layers")
    )
    return cache if alike and cache.manifest.complete else None


def _sample_manifest(whole: Manifest, codec: CodecConfig, rows: int, shard_rows: int) -> Manifest:
    """The manifest of a cache inside another one, with the sketches of a sample of its rows."""
    data = {key: value for key, value in whole.data.items() if key != "begun"}
    return Manifest(
        whole.model, whole.sketch, whole.gradient, whole.text, data, codec,
        rows=rows, shard_rows=shard_rows, layers=whole.layers,
    )  # fmt: skip


def _free_bytes(device: torch.device) -> int:
    """Bytes of a GPU's memory that can be allocated."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
