"""How time, bytes and network grow with the data and the GPUs: measured on one machine, and modelled beyond.

    python studies/scaling/scaling.py measure    # 10^4 to 10^7 rows: studies/scaling/cpu.json
    python studies/scaling/scaling.py            # docs/measured/scaling.md's tables from it; --write puts
    them there

The tables say what is measured and what is assumed; nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))
import doc_tables

RESULTS = Path(__file__).resolve().parent / "cpu.json"
PAGE = doc_tables.DOCS / "measured" / "scaling.md"
NAME = "tables of the scaling study"  # on the page
BLOCKS, WIDTH, BYTES = 210, 512, 256  # of the caches that are measured


@dataclass(frozen=True)
class Measured:
    """Measured on one thread of one machine. scan: (rows, seconds to open the cache, of one query's scan from
    memory, of reading all rows' lengths, as `fisher` does); fisher: seconds of all its passes over 10,000
    rows, from which on they read no more; manifest_bytes: of a shard's entry; the rest in seconds: to write
    and to read a manifest of 16,384 shards, to write a shard of 16 MiB to disk, to find a text's place, to
    read and check one."""

    machine: str
    threads: int
    scan: list[tuple[int, float, float, float]]
    fisher: float
    manifest_bytes: float
    manifest_write: float
    manifest_read: float
    shard_write: float
    text_find: float
    text_check: float

    @staticmethod
    def read() -> Measured:
        """The measurement that was kept."""
        value = json.loads(RESULTS.read_text())
        return Measured(**{field.name: value[field.name] for field in fields(Measured)})


@dataclass(frozen=True)
class Assumed:
    """What is assumed, not measured. A GPU does `flops` operations a second on a model of `parameters`, four
    for each and token (forward, and backward to the inputs); an example has `tokens` and `text` bytes;
    `example` bytes of it are kept; a node of `gpus` reads `disk` bytes a second from where the cache is, a
    GPU `memory` from its own; `gpu_bytes` of a GPU's memory are free for rows."""

    parameters: float = 7e9
    flops: float = 4e14
    tokens: int = 256
    text: int = 1024
    example: int = 2048
    gpus: int = 8
    disk: float = 5e9
    memory: float = 2.5e12
    gpu_bytes: float = 4e10

    @property
    def rate(self) -> float:
        """Examples a second that a GPU caches."""
        return self.flops / (4 * self.parameters * self.tokens)


@dataclass(frozen=True)
class Outlook:
    """One row of the table. seconds: caching; checked: of that, reading and checking the text, which each
    process does; cache, manifest: bytes; shards: files; scan_memory, scan_disk: seconds of a query's scan
    where the rows are in GPUs' memory (None: they do not fit) and where they come from disks; network: bytes
    between processes while caching; asked: for a query."""

    examples: int
    gpus: int
    seconds: float
    checked: float
    cache: float
    manifest: float
    shards: int
    scan_memory: float | None
    scan_disk: float
    network: float
    asked: float


def outlook(examples: int, gpus: int, measured: Measured, assumed: Assumed) -> Outlook:
    """What the model says of so many examples on so many GPUs."""
    from rapidin.cache.build import MAX_SHARDS

    shard_rows = max(min(8192, max(1024, examples // 128)), examples // MAX_SHARDS)
    shards = -(-examples // shard_rows)
    rounds = -(-shards // gpus)  # whoever takes the last shard is waited for
    making = rounds * min(shard_rows, examples) / assumed.rate
    checked = examples * measured.text_check
    cache = float(examples) * assumed.example
    nodes = -(-gpus // assumed.gpus)
    fits = cache / gpus <= assumed.gpu_bytes
    manifest = shards * measured.manifest_bytes
    return Outlook(
        examples,
        gpus,
        making + checked,
        checked,
        cache,
        manifest,
        shards,
        cache / gpus / assumed.memory if fits else None,
        cache / nodes / assumed.disk,
        shards * 64.0 + gpus * (3 * manifest + 4096.0),
        gpus * 4.0 * BLOCKS * WIDTH + gpus * 2 * 10 * 12.0,
    )


# -------------------------------------------------------------------------------------------- page


def _bytes(n: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if n >= size:
            return f"{n / size:,.3g} {unit}" if n < 1000 * size else f"{n / size:,.0f} {unit}"
    return f"{n:,.0f} B"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "does not fit"
    for size, unit in ((86400 * 365.25, "years"), (86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds * 1e3:,.3g} ms"


def tables(measured: Measured, assumed: Assumed) -> str:
    """The tables of docs/measured/scaling.md."""
    seen = [
        (
            f"{rows:,}",
            _bytes(rows * BYTES),
            _time(opened),
            _time(scan),
            _bytes(rows * BYTES / scan) + "/s",
            _time(lengths),
        )
        for rows, opened, scan, lengths in measured.scan
    ]
    text = (
        f"Measured: {measured.machine}, {measured.threads} thread, rows of {BYTES} bytes (1 bit a number), "
    )
    text += "one query, from memory.\n\n"
    text += doc_tables.table(
        ("rows", "bytes", "opening the cache", "scan", "scanned", "lengths for `fisher`"), seen
    )
    text += "\n" + doc_tables.table(
        ("measured", ""),
        [
            ("a manifest of 16,384 shards: bytes", _bytes(16384 * measured.manifest_bytes)),
            ("to write it", _time(measured.manifest_write)),
            ("to read it", _time(measured.manifest_read)),
            ("a shard of 16 MiB to disk, fsync and checksum", _time(measured.shard_write)),
            ("finding the places of a million texts", _time(1e6 * measured.text_find)),
            ("reading and checking a million texts", _time(1e6 * measured.text_check)),
            ("`fisher`'s other passes, from 10,000 rows on the same", _time(measured.fisher)),
        ],
    )
    text += f"""
Modelled: {assumed.parameters / 1e9:g}B parameters, examples of {assumed.tokens} tokens and
{assumed.text:,} bytes of text, {assumed.example:,} bytes of each kept. **Assumed**:
{assumed.flops / 1e12:,.0f} Tflop/s a GPU, so {assumed.rate:,.0f} examples/s; {_bytes(assumed.memory)}/s of
its memory, {_bytes(assumed.gpu_bytes)} of it for rows; {_bytes(assumed.disk)}/s of storage for a node of
{assumed.gpus} GPUs. **Measured**: text and manifest, above.

"""
    rows = []
    for examples in (52_000, 10**6, 10**8, 10**10):
        for gpus in (1, 8, 64, 1024):
            o = outlook(examples, gpus, measured, assumed)
            rows.append(
                (
                    f"{examples:,}",
                    f"{gpus:,}",
                    _time(o.seconds),
                    f"{o.checked / o.seconds:.0%}",
                    _bytes(o.cache),
                    f"{o.shards:,}",
                    _bytes(o.manifest),
                    _time(o.scan_memory),
                    _time(o.scan_disk),
                    _bytes(o.network),
                    _bytes(o.asked),
                )
            )
    head = ("examples", "GPUs", "caching", "of which reading text", "cache", "shards", "manifest")
    more = ("scan, GPU memory", "scan, disk", "network, caching", "network, a query")
    return text + doc_tables.table((*head, *more), rows)


# ----------------------------------------------------------------------------------------- measuring


def best(run: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def measure(folder: Path, sizes: Sequence[int]) -> Measured:
    """Measure this machine; caches are written into the folder, one at a time, and removed."""
    import shutil

    import torch
    from random_cache import write_cache

    from rapidin.attribution import methods
    from rapidin.attribution.methods.moment import squares
    from rapidin.attribution.scan import scan_cache
    from rapidin.attribution.scan_pieces import CacheScan
    from rapidin.cache import Cache, Manifest, codec
    from rapidin.cache.manifest import Shard
    from rapidin.cache.names import shard_name
    from rapidin.data.examples import open_examples
    from rapidin.files import replace_file

    scan, passes, manifest = [], 0.0, None
    query = torch.randn(1, BLOCKS, WIDTH, generator=torch.Generator().manual_seed(0))
    for rows in sizes:
        write_cache(folder / "cache", BLOCKS, WIDTH, rows, codec.CodecConfig("sign", BYTES), shards=None)
        opened = best(lambda: Cache(folder / "cache"))
        cache = Cache(folder / "cache")
        manifest = cache.manifest
        source = CacheScan(cache, methods.prepare(query, cache))
        scan_cache(source, 10)  # into memory
        scanned = best(lambda source=source: scan_cache(source, 10))  # type: ignore[misc]
        lengths = best(lambda c=cache: squares(c, "layer", query.device), 1)  # type: ignore[misc]
        scan.append((rows, opened, scanned, lengths))
        if rows == sizes[0]:
            passes = best(lambda c=cache: methods.prepare(query, c, method="fisher"), 1)  # type: ignore[misc]
        print(scan[-1], flush=True)
        del cache, source
        shutil.rmtree(folder / "cache")
    assert manifest is not None
    few = len(manifest.data_bytes) if not manifest.shards else 0
    manifest.rows, manifest.shard_rows = 16384 * 1024, 1024
    manifest.shards = [
        Shard(shard_name(n), n * 1024, 1024, 1 << 18, "0" * 64, {"ok": 1024, "empty": 0, "no_target": 0})
        for n in range(16384)
    ]
    whole = manifest.data_bytes
    manifest.write(folder)
    data = b"\0" * (16 << 20)
    lines = folder / "texts.jsonl"
    line = json.dumps({"prompt": "a" * 300, "completion": "b" * 700}) + "\n"
    lines.write_text(line * 100_000)
    return Measured(
        machine=f"{platform.machine()}, {os.cpu_count()} hyperthreads, which did other things too",
        threads=torch.get_num_threads(),
        scan=scan,
        fisher=passes,
        manifest_bytes=(len(whole) - few) / 16384,
        manifest_write=best(lambda: manifest.write(folder)),
        manifest_read=best(lambda: Manifest.read(folder)),
        shard_write=best(lambda: replace_file(folder / "shard", data)),
        text_find=best(lambda: open_examples(str(lines), checked=False), 2) / 100_000,
        text_check=best(lambda: open_examples(str(lines)), 2) / 100_000,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="?", choices=["measure"])
    parser.add_argument("--most", type=int, default=10**7, help="rows of the largest cache")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/measured/scaling.md")
    options = parser.parse_args()
    if options.what == "measure":
        with tempfile.TemporaryDirectory() as place:
            sizes = [n for n in (10**4, 10**5, 10**6, 10**7) if n <= options.most]
            found = measure(Path(place), sizes)
        RESULTS.write_text(json.dumps(asdict(found), indent=1) + "\n")
    elif options.write:
        doc_tables.write(PAGE, NAME, f"\n{tables(Measured.read(), Assumed())}\n")
    else:
        print(tables(Measured.read(), Assumed()))
