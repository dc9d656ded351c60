"""The manifest: what a cache is, which of its shards are done; written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rapidin.cache.codec import FLOATS, PACKED, Format, Shape
from rapidin.cache.layout import Block
from rapidin.errors import UserError, short
from rapidin.files import read_own, replace_file

FORMAT = "rapidin-cache"
VERSION = 3
_OLDER = 2  # read as well: `_renamed` says how its keys are called now
NAME = "manifest.json"
PRECONDITIONER = "preconditioner.safetensors"
_PRECONDITIONER_FILES = (PRECONDITIONER, "preconditioner.safetensors")  # the latter in caches of version 2
BASIS = "basis.safetensors"

# What a manifest may say at most. Whatever is believed of it is first held against these, so that no manifest
# makes a reader ask for more than its files are worth.
MOST_BYTES = 64 << 20  # of the manifest itself
MOST_NUMBERS = 1 << 28  # of a sketch
MOST_HEADER = 1 << 16  # bytes of a shard besides its rows
_SHARD_WORDS = 400  # bytes that the manifest takes for a shard, at most

# How a difference between a cache and what is asked of it is told to the user.
_WORDS = {
    "model": "for another model",
    "sketch": "with another sketch",
    "gradient": "with other gradients",
    "text": "with another treatment of the texts",
    "rows": "for another number of examples",
    "data": "from other data",
    "code": "with another code",
    "shard_rows": "with another number of rows a shard",
    "layers": "for other layers",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One finished shard: rows ``first .. first + rows - 1``; counts: examples by what became of them.

    It has fewer rows than its place has room for where examples were added to a cache and their shard is yet
    to be written."""

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
        statistics = {_word(k): float(v) for k, v in dict(value["statistics"]).items()}
        file, shape, size = value["file"], Shape.from_json(value["shape"]), _count(value["bytes"])
        if file is None:
            return Packing(shape, statistics=statistics)
        if file != BASIS:
            raise ValueError(f"{short(file)} is not the basis's file")
        return Packing(shape, file, size, _checksum(value["sha256"]), statistics)


@dataclass
class Manifest:
    """What a cache holds.

    model: names and hashes of model, adapter and tokenizer; sketch: projection, width, seed, hash; gradient:
    points, loss, preconditioner; text: how texts became tokens; data: where the examples came from; code: how
    rows are packed; rows: examples in all; shard_rows: rows of each shard but the last; layers: the layer
    table; packing: what became of the code once it was fitted, None before; shards: those that are done.
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
    def preconditioner(self) -> dict[str, Any] | None:
        """What the manifest says of the preconditioner, None for none."""
        value = self.gradient.get("preconditioner", "off")
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
    def rows_begun(self) -> int:
        """Examples that the cache was begun with, from which samples were drawn: later ones were added."""
        return int(self.data.get("begun", self.rows))

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

    def shard_at(self, n: int) -> Shard | None:
        """Shard n, None where it is not done. It may have only the first of its rows, where examples were
        added since."""
        first = n * self.shard_rows
        place = bisect_left(self.shards, first, key=lambda shard: shard.first)
        found = self.shards[place] if place < len(self.shards) else None
        return found if found is not None and found.first == first else None

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
                missing = object()
                part = next(
                    k
                    for k in {**mine[key], **theirs[key]}
                    if mine[key].get(k, missing) != theirs[key].get(k, missing)
                )
                there, here = (
                    preconditioner_words(whole[key][part])
                    if (key, part) == ("gradient", "preconditioner")
                    else short(whole[key].get(part))
                    for whole in (mine, theirs)
                )
                detail = f" ({part}: {there} there, {here} here)"
            elif not isinstance(mine[key], list):
                detail = f" ({mine[key]} there, {theirs[key]} here)"
            remedy = "name another folder with --out"
            if key == "rows" and self.rows < wanted.rows:
                remedy += ", or add those that are new with --append"
            raise UserError(f"the cache in '{folder}' was made {words}{detail}", remedy)

    def _definition(self) -> dict[str, Any]:
        """What makes two caches the same; where files lie is no part of it."""
        whole = self.to_json()
        whole["model"] = whole["model"]["identity"]
        whole["data"] = {k: v for k, v in whole["data"].items() if k not in ("path", "begun")}
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
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        return text.encode("utf-8", "surrogatepass")  # names of files are any bytes

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest, atomically and on disk when this returns."""
        replace_file(folder / NAME, self.data_bytes)

    def check_size(self) -> None:
        """Raise UserError where the cache would be larger than can be read again."""
        if self.dim > MOST_NUMBERS:
            raise UserError(
                f"a sketch of {self.dim:,} numbers, at most {MOST_NUMBERS:,} are possible", "lower --width"
            )
        if self.shards_in_all * _SHARD_WORDS > MOST_BYTES // 2:
            raise UserError(
                f"the cache would have {self.shards_in_all:,} shards, too many for one manifest",
                f"say --shard-rows {-(-self.rows * _SHARD_WORDS * 2 // MOST_BYTES)} or more",
            )

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a cache; UserError where there is none or it is damaged."""
        path = folder / NAME
        if not os.path.isdir(folder):
            raise UserError(f"no such cache: '{folder}'")
        if not os.path.lexists(path):
            members = sorted(found.parent.name for found in folder.glob(f"*/{NAME}"))
            if members:
                raise UserError(f"'{folder}' holds several caches", f"name one of them: {', '.join(members)}")
            raise UserError(f"'{folder}' is no cache: it has no {NAME}")
        return Manifest.of_bytes(read_own(path, "manifest", "cache again", most=MOST_BYTES), folder)

    @staticmethod
    def of_bytes(data: bytes, folder: Path) -> Manifest:
        """The manifest of the cache in `folder` from the bytes of its file; UserError where it is damaged."""
        try:
            value = json.loads(data)
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise ValueError("it is not a rapidin manifest")
            if value.get("version") == _OLDER:
                value = _renamed(value)
            elif value.get("version") != VERSION:
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
        parts: dict[str, Any] = {key: _part(key, value[key]) for key in _PARTS}
        if "preconditioner" in parts["gradient"]:  # older caches do not say: they have none
            parts["gradient"]["preconditioner"] = _preconditioner(parts["gradient"]["preconditioner"])
        manifest = Manifest(
            **parts,
            code=Format.from_json(value["code"]),
            rows=_count(value["rows"]),
            shard_rows=_count(value["shard_rows"]),
            layers=[Block.from_json(block) for block in value["layers"]],
            packing=None if value["packing"] is None else Packing.from_json(value["packing"]),
            shards=[shard_of_json(shard) for shard in value["shards"]],
        )
        manifest._check_layers()
        manifest._check_shards()
        return manifest

    def _check_layers(self) -> None:
        """Raise ValueError where layers, code and sketch do not go together."""
        if not self.layers:
            raise ValueError("no layers")
        start = 0
        for block in self.layers:
            if block.start != start or not 1 <= block.width == self.width:
                raise ValueError(f"the block of {short(block.name)} lies wrong")
            start += block.width
        if start > MOST_NUMBERS:
            raise ValueError(f"a sketch of {start} numbers")
        if self.sketch["width"] != self.width:
            raise ValueError("the layers have another width than the sketch")
        packed = self.code.dtype in PACKED
        if packed and (self.width & (self.width - 1) or not 0 <= self.sketch["seed"] < 2**64):
            raise ValueError("the width is no power of two, or the seed is none")
        if self.packing is None:
            return
        shape = self.packing.shape
        if not packed or shape.dtype != self.code.dtype or len(shape.tail) != len(self.layers):
            raise ValueError("the packing is for another code, or another number of layers")
        if len(shape.rest) != len(shape.tail) or max(*shape.tail, *shape.rest) > self.width:
            raise ValueError("a block has more directions than numbers")
        learnt = self.packing.file is not None
        if shape.head > start or bool(shape.head or sum(shape.tail)) > learnt:
            raise ValueError("the head has more directions than numbers, or nothing was learnt")
        if shape.head and "outside_99" not in self.packing.statistics:
            raise ValueError("the packing lacks a statistic")
        if learnt:
            numbers = 4 * start + 2 * start * shape.head + 2 * self.width * sum(shape.tail)
            numbers += 4 * (sum(shape.tail) + 2 * len(self.layers) + 1)
            if not numbers <= self.packing.bytes <= numbers + MOST_HEADER:
                raise ValueError("the basis has the wrong size")

    def _check_shards(self) -> None:
        """Raise ValueError where the shards are not as the rows and their code have them."""
        if self.shard_rows < 1 or max(self.rows, self.shard_rows) >= 2**62:
            raise ValueError("no rows a shard, or too many")
        if not 0 <= self.rows_begun <= self.rows:
            raise ValueError("the cache was begun with more rows than it has")
        if self.shards and self.packing is None and self.code.dtype not in FLOATS:
            raise ValueError("there are shards, and it is not said how they are packed")
        next_first = 0
        for shard in self.shards:
            n, rest = divmod(shard.first, self.shard_rows)
            if rest or shard.first < next_first or shard.file != shard_name(n):
                raise ValueError(f"the shard {short(shard.file)} is out of order")
            if not 1 <= shard.rows <= self.rows_of(n):
                raise ValueError(f"the shard {short(shard.file)} has the wrong number of rows")
            if not 0 < shard.bytes - shard.rows * self.row_bytes <= MOST_HEADER:
                raise ValueError(f"the shard {short(shard.file)} has the wrong size")
            next_first = shard.first + self.shard_rows


def gradient_settings(gradient: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's `gradient` as it was asked for, so that two of them can be compared.

    What a sample's preconditioner came to is no part of that: data, model and seed say it. A state's is.
    """
    preconditioner = gradient.get("preconditioner", "off")
    if preconditioner != "off":
        left_out = {"file", "bytes"} if preconditioner["kind"] == "optimizer" else {"file", "bytes", "sha256"}
        preconditioner = {k: v for k, v in preconditioner.items() if k not in left_out}
    return {**gradient, "preconditioner": preconditioner}


def preconditioner_words(value: str | Mapping[str, Any]) -> str:
    """A manifest's preconditioner in words."""
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


# What the parts of a manifest are to hold, where they hold it.
_PARTS: dict[str, dict[str, str]] = {
    "model": {"source": "names", "identity": "names"},
    "sketch": {"projection": "text", "width": "count", "seed": "count", "hash": "text"},
    "gradient": {
        "at": "numbers",
        "loss": "text",
        "include": "texts",
        "exclude": "texts",
        "dropout": "thinning",
    },
    "text": {"eos": "flag", "max_length": "count", "too_long": "too_long"},
    "data": {"path": "paths", "form": "text", "identity": "text", "begun": "count"},
}
_NEEDED = {
    "model": ("source", "identity"),
    "sketch": ("projection", "width", "seed"),
    "gradient": ("at", "loss", "include", "exclude"),
    "text": ("eos", "max_length", "too_long"),
    "data": (),
}
_KINDS: dict[str, Any] = {
    "text": lambda v: isinstance(v, str),
    "texts": lambda v: isinstance(v, list) and all(isinstance(each, str) for each in v),
    "paths": lambda v: v is None or isinstance(v, str) or (bool(v) and _KINDS["texts"](v)),
    "names": lambda v: (
        isinstance(v, dict) and all(each is None or isinstance(each, str) for each in v.values())
    ),
    "thinning": lambda v: _KINDS["count"](dict(v)["seed"]) and _is_number(v["rate"]) and len(v) == 2,
    "numbers": lambda v: isinstance(v, list) and all(_is_number(each) for each in v),
    "count": lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
    "flag": lambda v: isinstance(v, bool),
    "too_long": lambda v: v in ("truncate", "skip"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _part(name: str, value: Any) -> dict[str, Any]:
    """A part of a manifest; ValueError where it holds something else than it must."""
    if not isinstance(value, dict) or not all(key in value for key in _NEEDED[name]):
        raise ValueError(f"'{name}' is not what it must be")
    for key, each in value.items():
        kind = _PARTS[name].get(key)
        if kind is None and name == "gradient" and key == "preconditioner":
            continue
        # What a later rapidin of this format adds is kept, so long as it is simple.
        fits = _KINDS[kind](each) if kind else each is None or isinstance(each, str | int | float)
        if not fits:
            raise ValueError(f"'{key}' of '{name}' is {short(each)}")
    return value


def _renamed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of format version 2 with the keys of version 3."""
    gradient = value["gradient"]
    if not isinstance(gradient, dict):
        raise ValueError(f"'gradient' is {short(gradient)}")
    gradient = {{"preconditioner": "preconditioner"}.get(key, key): part for key, part in gradient.items()}
    return {**value, "version": VERSION, "gradient": gradient}


def _preconditioner(value: Any) -> str | dict[str, Any]:
    if value == "off":
        return "off"
    if not isinstance(value, dict) or value["kind"] not in ("sample", "kfac", "optimizer"):
        raise ValueError(f"{short(value)} is no preconditioner")
    if value["sha256"] is None and value["kind"] == "optimizer":
        raise ValueError("the preconditioner has no checksum")
    if value["file"] not in _PRECONDITIONER_FILES:
        raise ValueError(f"{short(value['file'])} is not the preconditioner's file")
    if value["kind"] == "kfac":
        own: dict[str, Any] = {"rank": _count(value["rank"]), "damping": float(value["damping"])}
    else:
        own = {"floor": float(value["floor"])}
    return {
        "kind": value["kind"],
        "exponent": float(value["exponent"]),
        **own,
        "sample": _count(value["sample"]),
        "file": value["file"],
        "bytes": _count(value["bytes"]),
        "sha256": None if value["sha256"] is None else _checksum(value["sha256"]),
    }


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{short(value)} is no count")
    return value


def _checksum(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{short(value)} is no checksum")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[a-z0-9_]{1,40}", value):
        raise ValueError(f"{short(value)} is no name")
    return value


def shard_of_json(value: Any) -> Shard:
    """The shard that `asdict` gave; KeyError, TypeError or ValueError where it is none."""
    if not isinstance(value, dict) or not isinstance(value["counts"], dict):
        raise ValueError(f"{short(value)} is no shard")
    counts = {_word(k): _count(n) for k, n in value["counts"].items()}
    first, rows, size = (_count(value[key]) for key in ("first", "rows", "bytes"))
    return Shard(str(value["file"]), first, rows, size, _checksum(value["sha256"]), counts)
