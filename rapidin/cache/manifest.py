"""The manifest: what a cache is, which of its shards are done; written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rapidin.errors import UserError, short
from rapidin.layers import Block
from rapidin.pack import Format, Shape

FORMAT = "rapidin-cache"
VERSION = 2
NAME = "manifest.json"
GEOMETRY = "geometry.safetensors"

# How a difference between a cache and what is asked of it is told to the user.
_WORDS = {
    "model": "for another model",
    "sketch": "with another sketch",
    "gradient": "with other gradients",
    "text": "with another treatment of the texts",
    "data": "from other data",
    "code": "with another code",
    "rows": "for another number of examples",
    "shard_rows": "with another number of rows a shard",
    "layers": "for other layers",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One finished shard: rows ``first .. first + rows - 1``; counts: examples by what became of them."""

    file: str
    first: int
    rows: int
    bytes: int
    sha256: str
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class Packing:
    """A fitted code. shape: what a row is made of; file, bytes, sha256: the basis it learnt, or None;
    statistics: what the sample said of it."""

    shape: Shape
    file: str | None = None
    bytes: int = 0
    sha256: str = ""
    statistics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The packing as the manifest keeps it."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Packing:
        """What `to_json` wrote; KeyError, TypeError or ValueError where it is none."""
        statistics = {str(k): float(v) for k, v in value["statistics"].items()}
        file = None if value["file"] is None else str(value["file"])
        return Packing(
            Shape.from_json(value["shape"]), file, _count(value["bytes"]), str(value["sha256"]), statistics
        )


@dataclass
class Manifest:
    """What a cache holds.

    model: names and hashes of model, adapter and tokenizer; sketch: projection, width, seed, hash; gradient:
    points, loss, geometry; text: how texts became tokens; data: where the examples came from; code: how rows
    are packed; rows: examples in all; shard_rows: rows of each shard but the last; layers: the layer table;
    packing: what became of the code once it was fitted, None before; shards: those that are done.
    """

    model: dict[str, Any]
    sketch: dict[str, Any]
    gradient: dict[str, Any]
    text: dict[str, Any]
    data: dict[str, Any]
    code: Format
    rows: int
    shard_rows: int
    layers: list[Block]
    packing: Packing | None = None
    shards: list[Shard] = field(default_factory=list)
    folder: Path | None = field(default=None, compare=False, repr=False)  # where it was read

    @property
    def geometry(self) -> dict[str, Any] | None:
        """What the manifest says of the geometry, None for none."""
        value = self.gradient.get("geometry", "off")
        return None if value == "off" else dict(value)

    @property
    def dim(self) -> int:
        """Numbers in one example's sketch."""
        return sum(block.width for block in self.layers)

    @property
    def rows_done(self) -> int:
        """Examples in the finished shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether every example is cached."""
        return self.rows_done == self.rows

    @property
    def shards_in_all(self) -> int:
        """Shards of the finished cache."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, n: int) -> int:
        """Rows of shard n."""
        return max(0, min(self.shard_rows, self.rows - n * self.shard_rows))

    def has(self, shard: Shard) -> bool:
        """Whether such a shard is one of this cache's."""
        n, rest = divmod(shard.first, self.shard_rows)
        return not rest and shard.file == shard_name(n) and shard.rows == self.rows_of(n) > 0

    @property
    def width(self) -> int:
        """Bins of a block."""
        return self.layers[0].width

    @property
    def row_bytes(self) -> int:
        """Bytes that an example takes in a shard, all told."""
        if self.packing is not None:
            return self.packing.shape.row_bytes
        return self.code.row_bytes(len(self.layers), self.width)

    @property
    def counts(self) -> dict[str, int]:
        """Examples by what became of them, over the finished shards."""
        total: dict[str, int] = {}
        for shard in self.shards:
            for what, n in shard.counts.items():
                total[what] = total.get(what, 0) + n
        return total

    def refuse_unless_same(self, wanted: Manifest, folder: Path) -> None:
        """Raise UserError naming the first thing in which the cache in `folder` is not the one wanted."""
        mine, theirs = self._definition(), wanted._definition()
        for key, words in _WORDS.items():
            if mine[key] == theirs[key]:
                continue
            detail = ""
            if key == "model":
                words = other_model(mine[key], theirs[key])
            elif isinstance(mine[key], dict):
                part = next(k for k in {**mine[key], **theirs[key]} if mine[key].get(k) != theirs[key].get(k))
                there, here = (
                    geometry_words(whole[key][part]) if part == "geometry" else short(whole[key].get(part))
                    for whole in (mine, theirs)
                )
                detail = f" ({part}: {there} there, {here} here)"
            elif not isinstance(mine[key], list):
                detail = f" ({mine[key]} there, {theirs[key]} here)"
            raise UserError(
                f"the cache in '{folder}' was made {words}{detail}", "name another folder with --out"
            )

    def _definition(self) -> dict[str, Any]:
        """What makes two caches the same; where files lie is no part of it."""
        whole = self.to_json()
        whole["model"] = whole["model"]["identity"]
        whole["data"] = {k: v for k, v in whole["data"].items() if k != "path"}
        whole["gradient"] = gradient_settings(whole["gradient"])
        del whole["packing"]
        return whole

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{k: getattr(self, k) for k in ("model", "sketch", "gradient", "text", "data")},
            "code": self.code.to_json(),
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "packing": None if self.packing is None else self.packing.to_json(),
            "layers": [block.to_json() for block in self.layers],
            "shards": [asdict(shard) for shard in self.shards],
        }

    @property
    def data_bytes(self) -> bytes:
        """The bytes of the manifest's file."""
        return (json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest, atomically and on disk when this returns."""
        replace_file(folder / NAME, self.data_bytes)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a cache; UserError where there is none or it is damaged."""
        path = folder / NAME
        if not folder.is_dir():
            raise UserError(f"no such cache: '{folder}'")
        if not path.is_file():
            members = sorted(found.parent.name for found in folder.glob(f"*/{NAME}"))
            if members:
                raise UserError(f"'{folder}' holds several caches", f"name one of them: {', '.join(members)}")
            raise UserError(f"'{folder}' is no cache: it has no {NAME}")
        try:
            return Manifest.of_bytes(path.read_bytes(), folder)
        except OSError as error:
            raise UserError(f"cannot read '{path}': {error.strerror}") from None

    @staticmethod
    def of_bytes(data: bytes, folder: Path) -> Manifest:
        """The manifest of the cache in `folder` from the bytes of its file; UserError where it is damaged."""
        try:
            value = json.loads(data)
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise ValueError("it is not a rapidin manifest")
            if value.get("version") != VERSION:
                raise UserError(
                    f"the cache in '{folder}' has format version {short(value.get('version'))}, "
                    f"this rapidin reads {VERSION}",
                    "use the rapidin that wrote it, or cache again",
                )
            manifest = Manifest._of_json(value)
            manifest.folder = folder
            return manifest
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"'{folder / NAME}' is damaged: {type(error).__name__} {short(error)}", "cache again"
            ) from None

    @staticmethod
    def _of_json(value: Mapping[str, Any]) -> Manifest:
        parts = {key: value[key] for key in ("model", "sketch", "gradient", "text", "data")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError("a part is not an object")
        if not isinstance(parts["model"]["identity"], dict):
            raise ValueError("the model has no identity")
        if "geometry" in parts["gradient"]:  # older caches do not say: they have none
            parts["gradient"]["geometry"] = _geometry(parts["gradient"]["geometry"])
        manifest = Manifest(
            **parts,
            code=Format.from_json(value["code"]),
            rows=_count(value["rows"]),
            shard_rows=_count(value["shard_rows"]),
            layers=[Block.from_json(block) for block in value["layers"]],
            packing=None if value["packing"] is None else Packing.from_json(value["packing"]),
            shards=[shard_of_json(shard) for shard in value["shards"]],
        )
        if not manifest.layers:
            raise ValueError("no layers")
        if manifest.packing and len(manifest.packing.shape.tail) != len(manifest.layers):
            raise ValueError("the packing is for another number of layers")
        start = 0
        for block in manifest.layers:
            if block.start != start or not 1 <= block.width == manifest.width:
                raise ValueError(f"the block of {short(block.name)} lies wrong")
            start += block.width
        if manifest.shard_rows < 1:
            raise ValueError("no rows a shard")
        next_first = 0
        for shard in manifest.shards:
            if shard.first < next_first or not manifest.has(shard):
                raise ValueError(f"the shard {short(shard.file)} is out of order, or has the wrong rows")
            next_first = shard.first + shard.rows
        return manifest


def gradient_settings(gradient: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's `gradient` as it was asked for, so that two of them can be compared.

    What a sample's geometry came to is no part of that: data, model and seed say it. A state's is.
    """
    geometry = gradient.get("geometry", "off")
    if geometry != "off":
        left_out = {"file", "bytes"} if geometry["kind"] == "optimizer" else {"file", "bytes", "sha256"}
        geometry = {k: v for k, v in geometry.items() if k not in left_out}
    return {**gradient, "geometry": geometry}


def geometry_words(value: str | Mapping[str, Any]) -> str:
    """A manifest's geometry in words."""
    if isinstance(value, str):
        return value
    if value["kind"] == "optimizer":
        source = f"from the optimizer's state {str(value['sha256'])[:8]}"
    else:
        source = f"from a sample of {value['sample']} examples"
    if value["kind"] == "kfac":
        return f"K-FAC's {source}, rank {value['rank']}, damping {value['damping']:g}"
    return f"{source}, exponent {value['exponent']:g}, floor {value['floor']:g}"


def other_model(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In words, how the model that a cache was made with differs from another, by their identities."""
    # First what is missing: with an adapter the model's own parameters have other names, and so another hash.
    for part, words in (("adapter", "an adapter"), ("base", "a base model")):
        if part in there and part not in here:
            return f"with {words}, and none is given"
        if part in here and part not in there:
            return f"without {words}, and one is given"
    parts = {"model": "model", "adapter": "adapter", "base": "base model"}
    differs = next((words for part, words in parts.items() if there.get(part) != here.get(part)), "tokenizer")
    return f"with another {differs}: its contents are not the same"


def shard_name(n: int) -> str:
    """File name of shard n."""
    return f"shard-{n:06d}.safetensors"


def replace_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file beside its place, bring it to disk, and move it there: it appears whole or not at all.

    data: all of it, or its pieces; where making one raises, nothing is left of the file."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write '{path}': {error.strerror}", "what was written before is kept"
        ) from None
    except UserError:
        partial.unlink(missing_ok=True)
        raise


def _geometry(value: Any) -> str | dict[str, Any]:
    if value == "off":
        return "off"
    if not isinstance(value, dict) or value["kind"] not in ("sample", "kfac", "optimizer"):
        raise ValueError(f"{short(value)} is no geometry")
    if value["sha256"] is None and value["kind"] == "optimizer":
        raise ValueError("the geometry has no checksum")
    if value["kind"] == "kfac":
        own: dict[str, Any] = {"rank": _count(value["rank"]), "damping": float(value["damping"])}
    else:
        own = {"floor": float(value["floor"])}
    return {
        "kind": value["kind"],
        "exponent": float(value["exponent"]),
        **own,
        "sample": _count(value["sample"]),
        "file": str(value["file"]),
        "bytes": _count(value["bytes"]),
        "sha256": None if value["sha256"] is None else str(value["sha256"]),
    }


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{short(value)} is no count")
    return value


def shard_of_json(value: Any) -> Shard:
    """The shard that `asdict` gave; KeyError, TypeError or ValueError where it is none."""
    if not isinstance(value, dict) or not isinstance(value["counts"], dict):
        raise ValueError(f"{short(value)} is no shard")
    counts = {str(k): _count(n) for k, n in value["counts"].items()}
    first, rows, size = (_count(value[key]) for key in ("first", "rows", "bytes"))
    return Shard(str(value["file"]), first, rows, size, str(value["sha256"]), counts)
