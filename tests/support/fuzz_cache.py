"""Caches that nobody vouches for: valid ones are changed at random, and all that reads a cache reads them.

    python tests/support/fuzz_cache.py --inputs 100000          # minutes; --seed, --first, --keep FOLDER
    python tests/support/fuzz_cache.py --corpus tests/end_to_end/hostile --inputs 1500

Each input is one valid cache or ensemble with something changed: values and keys of the manifest, bytes and
headers of shards, basis and preconditioner (mostly with sizes and checksums made right again, as an attacker
would), or files that became links, pipes or folders. All of it must be read or refused with a UserError: any
other exception, a crash, more than a second of processor time, or memory beyond the limit is a finding.
Inputs run in a process of their own, so that a crash names its input, and depend on seed and number alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from tiny import tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.ensemble import Ensemble, read_members
from rapidin.attribution.methods import prepare, self_influence
from rapidin.attribution.provenance import read_fitted
from rapidin.attribution.scan import all_scores, scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.attribution.training_data import training_data
from rapidin.cache import Cache, CacheWriter, Manifest
from rapidin.cache.codec import Basis, CodecConfig, RowShape
from rapidin.cache.layout import Block
from rapidin.cache.shards import Rows
from rapidin.cli.tables import info_report
from rapidin.errors import UserError
from rapidin.gradients.model import LoadedModel
from rapidin.gradients.preconditioner import Preconditioner
from rapidin.gradients.scale import Scale
from rapidin.gradients.settings import HASH
from rapidin.results.terminal import make_console as rich_console

WIDTH, ROWS, SHARD_ROWS = 8, 7, 3
LAYERS = [Block("a.weight", (3, 4), 0.5, 0, WIDTH), Block("b.weight", (5, 2), 0.5, WIDTH, WIDTH)]
MEMORY = 1 << 30  # bytes that an input may take beyond what the process has
DECOY = Path(tempfile.gettempdir()) / f"rapidin-decoy-{os.getpid()}"  # links lead there, nobody follows them
SECONDS = 10.0  # of wall time, for machines that do other things too

# ------------------------------------------------------------------------------------------- valid caches


def _manifest(code: CodecConfig, preconditioner: Any = "off") -> Manifest:
    return Manifest(
        model={
            "source": {"model": "m", "adapter": None, "base": None, "dtype": "float32"},
            "identity": {"architecture": "A", "model": "1", "tokenizer": "2"},
        },
        sketch={"projection": "tensor", "width": WIDTH, "seed": 3, "hash": HASH},
        gradient={
            "at": [0.5],
            "loss": "mean",
            "include": [],
            "exclude": [],
            "preconditioner": preconditioner,
        },
        text={"eos": True, "max_length": 128, "too_long": "truncate"},
        data={"path": None, "form": "text", "identity": "0" * 64},
        codec=code,
        rows=ROWS,
        shard_rows=SHARD_ROWS,
        layers=list(LAYERS),
    )


def _basis(shape: RowShape, generator: torch.Generator) -> Basis:
    def made(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) / 4

    return Basis(
        made(2, WIDTH),
        made(2 * WIDTH, shape.shared),
        [made(WIDTH, p) for p in shape.per_layer],
        made(sum(shape.per_layer)).abs() + 0.1,
        made(2).abs() + 0.1,
        torch.ones(()),
        made(2),
    ).rounded()


def _fill(folder: Path, manifest: Manifest, preconditioner: bytes | None, shape: RowShape | None) -> None:
    generator = torch.Generator().manual_seed(1)
    with CacheWriter(folder, manifest) as writer:
        if preconditioner is not None:
            writer.set_preconditioner(preconditioner)
        if shape is not None:
            basis = _basis(shape, generator) if shape.shared or sum(shape.per_layer) else None
            writer.set_fitted_codec(shape, basis, {"sample": 7.0, "unexplained_p99": 0.5} if basis else {})
        for n in writer.missing:
            count = writer.manifest.rows_of(n)
            unit = torch.nn.functional.normalize(torch.randn(count, 2, WIDTH, generator=generator), dim=2)
            rows = Rows(
                tensors=writer.codec.encode(unit, torch.rand(count, 2, generator=generator) + 0.1),
                index=torch.arange(count) + n * SHARD_ROWS,
                status=torch.zeros(count, dtype=torch.uint8),
                truncated=torch.zeros(count, dtype=torch.uint8),
                record=torch.arange(count),
            )
            writer.write(n, rows, {"ok": count})


def make_valid(folder: Path, loaded: LoadedModel) -> dict[str, Path]:
    """Valid inputs by name: caches in several codes, one of them a model's, and an ensemble of two."""
    table = {
        block.name: Scale(torch.rand(block.shape[0]) + 1, torch.rand(block.shape[1]) + 1) for block in LAYERS
    }
    preconditioner = Preconditioner([table])
    record = {
        "kind": "sample",
        "exponent": 0.5,
        "floor": 0.01,
        "sample": 4,
        "file": "preconditioner.safetensors",
    }
    record |= {"bytes": 0, "sha256": None}
    _fill(folder / "float16", _manifest(CodecConfig("float16"), record), preconditioner.data, None)
    shape = RowShape("sign", 4, (3, 2), (5, 4), 4)
    _fill(folder / "learnt", _manifest(CodecConfig("sign", 200, 8), "off"), None, shape)
    _fill(folder / "int4", _manifest(CodecConfig("int4")), None, CodecConfig("int4").shape(2, WIDTH))
    Ensemble.write(folder / "ensemble", "tracin", [("one", 0.5), ("two", 0.25)])
    for name in ("one", "two"):
        shutil.copytree(folder / "float16", folder / "ensemble" / name)
    made = Attributor(loaded, width=WIDTH, preconditioner="kfac", include=["q_proj", "norm"])
    made.cache([f"Give {n} tips." for n in range(ROWS)], folder / "model", shard_rows=SHARD_ROWS)
    return {name: folder / name for name in ("float16", "learnt", "int4", "model", "ensemble")}


# ------------------------------------------------------------------------------------------------ changes

_HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 255, 2**31 - 1, 2**31, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18,
    10**300, -(10**18), 1.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), "", "x", "..",
    "../manifest.json", "/etc/passwd", "/dev/zero", "shard-000000.safetensors", "a\x00b", "\ud800", "\x1b[2J",
    "1", "1e9", "x" * 100_000, [], {}, [[]], {"a": {"b": {"c": {"d": {"e": []}}}}}, [0] * 1000,
    list(range(300)), [None], ["a"], [1.0],
]  # fmt: skip


def _deep(kind: str, depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from _nodes(part, (*path, key))


def _inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def change_json(value: Any, rng: random.Random) -> Any:
    """A value of JSON with one to three things changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = list(_nodes(value))
        if not paths:
            return rng.choice(_HOSTILE)
        path = rng.choice(paths)
        outer, key = _inside(value, path[:-1]), path[-1]
        old, how = outer[key], rng.random()
        if how < 0.45:
            new: Any = copy.deepcopy(rng.choice(_HOSTILE))
        elif how < 0.6 and isinstance(old, int | float) and not isinstance(old, bool):
            new = rng.choice(
                [old + 1, old - 1, old * 2, -old, old * 10**6, old << 32 if isinstance(old, int) else old / 3]
            )
        elif how < 0.7:
            new = copy.deepcopy(_inside(value, rng.choice(paths)))
        elif how < 0.73:
            new = _deep(rng.choice(("list", "dict")), rng.choice((20, 200, 800)))
        elif how < 0.85:
            del outer[key]
            continue
        elif isinstance(outer, list):
            outer.insert(rng.randrange(len(outer) + 1), copy.deepcopy(old))
            continue
        else:
            outer[rng.choice(("x", "", "\ud800", "preconditioner", "dropout", "begun", "path"))] = (
                copy.deepcopy(old)
            )
            continue
        outer[key] = new
    return value


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them changed, moved, added or gone."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, how = rng.randrange(len(found) + 1), rng.randrange(7)
        span = rng.choice((1, 2, 4, 8, 64, 1000))
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            found[at : at + span] = rng.randbytes(span)
        elif how == 2:
            del found[at : at + span]
        elif how == 3:
            found[at:at] = rng.choice((b"\0", b"\xff", b"[", b"{", b'"', b"9")) * span
        elif how == 4:
            del found[at:]
        elif how == 5:
            found[at : at + 8] = struct.pack("<q", rng.choice((-1, 0, 2**31, 2**62, len(found))))
        else:
            found[at:at] = found[: rng.randrange(len(found) + 1)]
    return bytes(found)


def change_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header changed, or a claim about the header's length, or its numbers."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = rng.random()
    if how < 0.1:
        return struct.pack("<Q", rng.choice((0, 1, 2**20, 2**31, 2**62, 2**64 - 1, length + 8))) + data[8:]
    if how < 0.35:  # numbers of every size where numbers belong
        special = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x00\x7c", b"\x00\x00\xc0\x7f"))
        start = rng.randrange(len(body) + 1)
        span = rng.choice((8, 64, len(body)))
        body = body[:start] + (special * len(body))[: min(span, len(body) - start)] + body[start + span :]
    elif how < 0.45:
        name = rng.choice(list(header))
        header[rng.choice(("x", "__metadata__", "index", "0/a.weight/rows"))] = header.pop(name)
    else:
        header = change_json(header, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _sign(folder: Path, value: Any, name: str, data: bytes) -> None:
    """Make the manifest say of a file what it is."""
    says = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name.startswith("shard"):
        for shard in value["shards"]:
            if shard["file"] == name:
                shard.update(says, xxh3=xxhash.xxh3_64_hexdigest(data))
    elif name.startswith("basis"):
        value["fitted_codec"].update(says)
    else:
        value["gradient"]["preconditioner"].update(says)


def change(folder: Path, rng: random.Random) -> None:
    """Change something in a folder with a cache or an ensemble."""
    if (folder / "ensemble.json").exists():
        if rng.random() < 0.7:
            _change_text(folder / "ensemble.json", rng)
            return
        folder = folder / rng.choice(("one", "two"))
    how = rng.random()
    tensors = sorted(path.name for path in folder.glob("*.safetensors"))
    if how < 0.5:
        _change_text(folder / "manifest.json", rng)
    elif how < 0.93:
        value = json.loads((folder / "manifest.json").read_bytes())
        for name in rng.sample(tensors, rng.choice((1, 1, 2))):
            data = (folder / name).read_bytes()
            data = (change_tensors if rng.random() < 0.7 else change_bytes)(data, rng)
            (folder / name).write_bytes(data)
            if rng.random() < 0.8:
                _sign(folder, value, name, data)
        if rng.random() < 0.1:
            value = change_json(value, rng)
        _write(folder / "manifest.json", value)
    else:
        path = folder / rng.choice((*tensors, "manifest.json"))
        path.unlink()
        kind = rng.randrange(7)
        if kind < 3:
            path.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", path.name, "../float16/manifest.json")))
        elif kind == 3:
            os.mkfifo(path)
        elif kind == 4:
            path.mkdir()
        elif kind == 5:
            (folder / ".lock").unlink(missing_ok=True)
            (folder / rng.choice((".lock", "sample", "manifest.json.partial"))).symlink_to(
                rng.choice((DECOY, DECOY / "file"))
            )


def _write(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _change_text(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if rng.random() < 0.25:
        path.write_bytes(change_bytes(data, rng))
    elif rng.random() < 0.02:
        path.write_bytes(
            rng.choice(
                (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"[]," * 10_000, b"\xef\xbb\xbf{}")
            )
        )
    else:
        _write(path, change_json(json.loads(data), rng))


# ------------------------------------------------------------------------------------------- what reads it


def read_all(folder: Path, wanted: bytes, loaded: LoadedModel, *, report: bool) -> str:
    """Everything that a command does with a folder before and after the model; how far that went."""
    reached = "refused when opened"

    def step(run: Callable[[], Any]) -> Any:
        try:
            return run()
        except UserError as error:
            if "\n" in str(error):
                raise ValueError("more than one line") from error
            return None

    found = step(lambda: read_members(folder))
    members = [folder] if found is None else [member.path for member in found[1]][:4]
    for member in members:
        problems = step(lambda path=member: Cache.verify(path))
        cache = step(lambda path=member: Cache(path))
        if cache is not None:
            reached = "opened, refused when read"
            if step(lambda c=cache: _read_cache(c, report)):
                reached = "read, altered as 'verify' says" if problems else "read"
            if "dtype" in cache.manifest.model["source"] and len(cache.layers) > len(LAYERS):
                step(lambda c=cache: Attributor.like(c.manifest, loaded))
        step(lambda path=member: CacheWriter(path, pickle.loads(wanted)).close())
    if found is not None:
        step(lambda: Ensemble.read(folder))
    return reached


def _read_cache(cache: Cache, report: bool) -> bool:
    """Whether a cache with examples was read and scanned."""
    info = cache.info()
    if report:
        rich_console(io.StringIO()).print(info_report(info))
    training_data(cache, None)
    manifest = cache.manifest
    if manifest.preconditioner is not None and manifest.preconditioner["sha256"] is not None:
        read_fitted(manifest)
    if not manifest.shards:
        return False
    for read in (cache.sketches, cache.lengths, cache.index, cache.status, cache.records):
        assert len(read()) == len(cache)
    sketch = torch.ones(1, len(cache.layers), manifest.width)
    for normalize in ("layer", "none"):
        source = CacheScan(cache, prepare(sketch, cache, method="dot", normalize=normalize))
        (_, rows), _ = scan_cache(source, 2)
        assert int(rows.max()) < manifest.rows
    with contextlib.suppress(UserError):  # a cache may be for more examples than a table has room for
        all_scores(source)
        self_influence(cache)
    return True


# ----------------------------------------------------------------------------------------------- the runs


class _Place:
    """Where inputs are made: valid folders, and a copy of one that is put back after each change."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        _decoy()
        self.loaded = LoadedModel.of(tiny_llama(num_hidden_layers=1), tiny_tokenizer())
        valid = make_valid(folder / "valid", self.loaded)
        self.names = list(valid)
        self.wanted = [pickle.dumps(Manifest.read(valid[name])) for name in ("float16", "learnt")]
        self.files = {
            name: {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            for name, root in valid.items()
        }

    def put(self, name: str) -> Path:
        """The folder of a valid input as it was, whatever lies there now."""
        root, files = self.folder / "now" / name, self.files[name]
        shutil.rmtree(root, ignore_errors=True)
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    def make(self, seed: int, number: int) -> Path:
        rng = random.Random(f"{seed}/{number}")
        root = self.put(rng.choice((*self.names, "learnt", "float16")))
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)  # for what is made here, not for what reads it
        change(root, rng)
        sys.setrecursionlimit(limit)
        return root


def _decoy() -> None:
    """Make the folder anew that links lead to."""
    shutil.rmtree(DECOY, ignore_errors=True)
    DECOY.mkdir()
    (DECOY / "file").write_bytes(b"kept")


def _changed_outside() -> bool:
    """Whether something was done to that folder; it is put right."""
    if os.listdir(DECOY) == ["file"] and (DECOY / "file").read_bytes() == b"kept":
        return False
    _decoy()
    return True


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _work(place: _Place, numbers: range, now: mmap.mmap, out: int, make: Callable[[int], Path]) -> None:
    """Runs inputs and writes a line of JSON for each that is a finding, and one at the end."""
    _limit()
    counted: Counter[str] = Counter()
    for number in numbers:
        now[:8] = struct.pack("<q", number)
        folder = make(number)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        began = time.process_time()
        try:
            wanted = place.wanted[number % len(place.wanted)]
            counted[read_all(folder, wanted, place.loaded, report=number % 4 == 0)] += 1
            if _changed_outside():
                raise ValueError("a file outside of the folder was changed")
            if time.process_time() - began > 1.0:
                raise TimeoutError(f"{time.process_time() - began:.1f} s")
        except BaseException as error:
            lines = [
                f"{f.name} {Path(f.filename).name}:{f.lineno}"
                for f in traceback.extract_tb(error.__traceback__)[-4:]
            ]
            found = {
                "number": number,
                "error": f"{type(error).__name__}: {error}"[:200],
                "where": " < ".join(reversed(lines)),
            }
            os.write(out, (json.dumps(found) + "\n").encode())
        signal.setitimer(signal.ITIMER_REAL, 0)
        if number + 1 == numbers.stop or not (number + 1) % 1000:
            os.write(out, (json.dumps({"counted": counted}) + "\n").encode())
            counted.clear()


def run(
    numbers: range, place: _Place, make: Callable[[int], Path]
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Runs inputs, in a new process after each that ends one; what became of them, and the findings."""
    counted: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    now = mmap.mmap(-1, 8)
    first = numbers.start
    while first < numbers.stop:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                _work(place, range(first, numbers.stop), now, write, make)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            for line in pipe:
                value = json.loads(line)
                if "counted" in value:
                    counted.update(value["counted"])
                    if not sum(counted.values()) % 10_000:
                        print(f"{sum(counted.values()):,}: {dict(counted)}", flush=True)
                else:
                    findings.append(value)
                    print(_words(value), flush=True)
        _, status = os.waitpid(child, 0)
        reached = struct.unpack("<q", now[:8])[0]
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            what = f"more than {SECONDS:g} s" if name == "SIGALRM" else f"ended by {name}"
            findings.append({"number": reached, "error": what, "where": ""})
            print(_words(findings[-1]), flush=True)
        first = reached + 1
    return counted, findings


def _words(found: dict[str, Any]) -> str:
    return f"input {found['number']}: {found['error']}  ({found['where']})"


# What a link is kept as, with its target as text: whoever copies the tree may follow links, and one leads to
# a file without end.
LINK = ".link"


def keep(root: Path, kept: Path) -> None:
    """Copy an input to where it is kept."""
    shutil.copytree(root, kept, symlinks=True)
    for path in [path for path in kept.rglob("*") if path.is_symlink()]:
        target = os.readlink(path)
        path.unlink()
        path.with_name(path.name + LINK).write_text(target)


def corpus(folder: Path, place: _Place) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Runs the inputs that were kept."""
    kept = sorted(path for path in folder.iterdir() if path.is_dir())

    def make(number: int) -> Path:
        root = place.folder / "now" / "kept"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(kept[number], root)
        for path in list(root.rglob("*" + LINK)):
            target = path.read_text()
            path.with_name(path.name.removesuffix(LINK)).symlink_to(
                DECOY / "file" if target.startswith("decoy") else target
            )
            path.unlink()
        return root

    return run(range(len(kept)), place, make)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that are findings")
    parser.add_argument("--corpus", type=Path, help="run the inputs kept in this folder first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        place = _Place(Path(folder))
        kept = []
        if arguments.corpus is not None:
            counted, kept = corpus(arguments.corpus, place)
            print(f"{sum(counted.values()):,} kept inputs: {dict(counted)}, {len(kept)} findings")
        numbers = range(arguments.first, arguments.first + arguments.inputs)
        counted, findings = run(numbers, place, lambda n: place.make(arguments.seed, n))
        for found in findings:
            if arguments.keep is not None:
                root = place.make(arguments.seed, found["number"])
                kept = arguments.keep / f"{arguments.seed}-{found['number']}"
                for pipe in [path for path in root.rglob("*") if path.is_fifo()]:
                    pipe.unlink()  # cannot be copied
                keep(root, kept)
    shutil.rmtree(DECOY)
    seconds = time.perf_counter() - began
    print(f"{sum(counted.values()):,} inputs in {seconds:.0f} s: {dict(counted)}, {len(findings)} findings")
    return 1 if findings or kept else 0


if __name__ == "__main__":
    sys.exit(main())
