"""The manifest: what a cache is and which of its shards are finished; written whole or not at all."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rapidin.cache import schema
from rapidin.cache.codec import FLOATS, PACKED, CodecConfig, RowShape
from rapidin.cache.differences import gradient_settings, refuse_difference
from rapidin.cache.layout import Block
from rapidin.cache.names import BASIS, MANIFEST, shard_name
from rapidin.errors import UserError, short
from rapidin.files import read_regular_file, replace_file

FORMAT = "rapidin-cache"
VERSION = 3
_UPGRADED_VERSION = 2  # read as well: `schema.upgraded` gives its keys their present names

# Limits of what a manifest may say. They are checked before anything in it is used, so that no manifest makes
# a reader allocate more than the cache's files are worth.
_MAX_BYTES = 64 << 20  # of the manifest itself
_MAX_DIM = 1 << 28  # numbers of a sketch
MAX_HEADER = 1 << 16  # bytes of a shard besides its rows
_SHARD_BYTES = 400  # of the manifest, that a shard's entry takes at most


@dataclass(frozen=True, slots=True)
class Shard:
    """One finished shard, which stores rows ``first`` to ``first + rows - 1``.

    It has fewer rows than its range if examples were added to the cache and it is yet to be rewritten.
    counts: number of examples by status; xxh3: the checksum that its first reader compares, None in caches of
    earlier versions.
    """

    file: str
    first: int
    rows: int
    bytes: int
    sha256: str
    counts: dict[str, int]
    xxh3: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The shard as the manifest stores it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_json(value: Any) -> Shard:
        """The shard that `to_json` gave; KeyError, TypeError or ValueError if it is not one."""
        if not isinstance(value, dict) or not isinstance(value["counts"], dict):
            raise ValueError(f"{short(value)} is not a shard")
        counts = {schema.name(k): schema.count(n) for k, n in value["counts"].items()}
        first, rows, size = (schema.count(value[key]) for key in ("first", "rows", "bytes"))
        fast = value.get("xxh3")
        return Shard(
            str(value["file"]),
            first,
            rows,
            size,
            schema.checksum(value["sha256"]),
            counts,
            None if fast is None else schema.checksum(fast, 16),
        )


@dataclass(frozen=True, slots=True)
class FittedCodec:
    """A codec as it was fitted.

    shape: of a packed row; file, bytes, sha256: of the basis that was learned, if any; statistics: of the
    sample.
    """

    shape: RowShape
    file: str | None = None
    bytes: int = 0
    sha256: str = ""
    statistics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fitted codec as the manifest stores it."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> FittedCodec:
        """What `to_json` wrote; KeyError, TypeError or ValueError if it is not valid."""
        statistics = {schema.name(k): float(v) for k, v in dict(value["statistics"]).items()}
        file, shape, size = value["file"], RowShape.from_json(value["shape"]), schema.count(value["bytes"])
        if file is None:
            return FittedCodec(shape, statistics=statistics)
        if file != BASIS:
            raise ValueError(f"{short(file)} is not the basis's file")
        return FittedCodec(shape, file, size, schema.checksum(value["sha256"]), statistics)


@dataclass
class Manifest:
    """The contents of a cache.

    model: names and hashes of model, adapter and tokenizer; sketch: projection, width, seed, hash; gradient:
    points, loss, preconditioner; text: how texts became tokens; data: where the examples came from; codec:
    how rows are to be stored; rows: number of examples; shard_rows: rows of each shard but the last; layers:
    the layer table; fitted_codec: the packed codec once it is fitted, None before; shards: those that are
    finished; null: the best scores of the null distribution (`rapidin.attribution.null_scores`), None if
    there is none; folder: where the manifest was read.
    """

    model: dict[str, Any]
    sketch: dict[str, Any]
    gradient: dict[str, Any]
    text: dict[str, Any]
    data: dict[str, Any]
    codec: CodecConfig
    rows: int
    shard_rows: int
    layers: list[Block]
    fitted_codec: FittedCodec | None = None
    shards: list[Shard] = field(default_factory=list)
    null: dict[str, dict[str, list[float]]] | None = None
    folder: Path | None = field(default=None, compare=False, repr=False)

    @property
    def preconditioner(self) -> dict[str, Any] | None:
        """The record of the preconditioner, None without one."""
        value = self.gradient.get("preconditioner", "off")
        return None if value == "off" else dict(value)

    @property
    def dim(self) -> int:
        """Numbers in one example's sketch."""
        return sum(block.width for block in self.layers)

    @property
    def width(self) -> int:
        """Sketch dimension of a block."""
        return self.layers[0].width

    @property
    def row_bytes(self) -> int:
        """Bytes that an example takes in a shard, in total."""
        if self.fitted_codec is not None:
            return self.fitted_codec.shape.row_bytes
        return self.codec.row_bytes(len(self.layers), self.width)

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
        """Examples before any were added, from which samples were drawn."""
        return int(self.data.get("begun", self.rows))

    @property
    def shards_in_all(self) -> int:
        """Shards of the finished cache."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, n: int) -> int:
        """Rows of shard n."""
        return max(0, min(self.shard_rows, self.rows - n * self.shard_rows))

    def fits(self, shard: Shard) -> bool:
        """Whether a shard could be a whole one of this cache, by its name, range and number of rows."""
        n, offset = divmod(shard.first, self.shard_rows)
        return not offset and shard.file == shard_name(n) and shard.rows == self.rows_of(n) > 0

    def shard_at(self, n: int) -> Shard | None:
        """Shard n, None if it is not finished. It may have fewer rows than `rows_of` if examples were added
        since."""
        first = n * self.shard_rows
        i = bisect_left(self.shards, first, key=lambda shard: shard.first)
        shard = self.shards[i] if i < len(self.shards) else None
        return shard if shard is not None and shard.first == first else None

    @property
    def counts(self) -> dict[str, int]:
        """Number of examples by status, over the finished shards."""
        total: dict[str, int] = {}
        for shard in self.shards:
            for status, n in shard.counts.items():
                total[status] = total.get(status, 0) + n
        return total

    # ---------------------------------------------------------------------------------- comparing

    def refuse_unless_same(self, requested: Manifest, folder: Path) -> None:
        """Raise UserError naming the first difference between the cache in `folder` and the requested one."""
        append = self.rows < requested.rows
        refuse_difference(self._definition(), requested._definition(), folder, may_append=append)

    def _definition(self) -> dict[str, Any]:
        """What makes two caches the same, without where files are."""
        value = self.to_json()
        value["model"] = value["model"]["identity"]
        how = ("path", "begun", "map", "streaming")
        value["data"] = {k: v for k, v in value["data"].items() if k not in how}
        value["gradient"] = gradient_settings(value["gradient"])
        del value["fitted_codec"]
        return value

    # ------------------------------------------------------------------------------------ writing

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **{section: getattr(self, section) for section in schema.SECTIONS},
            "codec": self.codec.to_json(),
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "fitted_codec": None if self.fitted_codec is None else self.fitted_codec.to_json(),
            "layers": [block.to_json() for block in self.layers],
            "shards": [shard.to_json() for shard in self.shards],
            **({} if self.null is None else {"null": self.null}),
        }

    @property
    def data_bytes(self) -> bytes:
        """The bytes of the manifest's file."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        return text.encode("utf-8", "surrogatepass")  # names of files may be any bytes

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest, atomically; it is on disk when this returns."""
        replace_file(folder / MANIFEST, self.data_bytes)

    def check_size(self) -> None:
        """Raise UserError if the cache would be larger than can be read again."""
        if self.dim > _MAX_DIM:
            raise UserError(
                f"the sketch would have {self.dim:,} numbers, at most {_MAX_DIM:,} are possible",
                "lower `width`",
            )
        if self.shards_in_all * _SHARD_BYTES > _MAX_BYTES // 2:
            least = -(-self.rows * _SHARD_BYTES * 2 // _MAX_BYTES)
            raise UserError(
                f"the cache would have {self.shards_in_all:,} shards, too many for one manifest",
                f"`shard_rows` must be at least {least}",
            )

    # ------------------------------------------------------------------------------------ reading

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a cache. Raises UserError if there is none or it is damaged."""
        path = folder / MANIFEST
        if not os.path.isdir(folder):
            raise UserError(f"cache not found: '{folder}'")
        if not os.path.lexists(path):
            members = sorted(member.parent.name for member in folder.glob(f"*/{MANIFEST}"))
            if members:
                raise UserError(f"'{folder}' holds several caches", f"name one of them: {', '.join(members)}")
            raise UserError(f"'{folder}' is not a rapidin cache: it has no {MANIFEST}")
        return Manifest.of_bytes(read_regular_file(path, "manifest", "cache again", most=_MAX_BYTES), folder)

    @staticmethod
    def of_bytes(data: bytes, folder: Path) -> Manifest:
        """The manifest of the cache in `folder` from the bytes of its file. Raises UserError if damaged."""
        try:
            value = json.loads(data)
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise ValueError("it is not a rapidin manifest")
            if value.get("version") == _UPGRADED_VERSION:
                value = schema.upgraded(value, VERSION)
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
                f"'{folder / MANIFEST}' is damaged: {type(error).__name__} {short(error)}", "cache again"
            ) from None

    @staticmethod
    def _of_json(value: Mapping[str, Any]) -> Manifest:
        sections: dict[str, Any] = {
            section: schema.checked_section(section, value[section]) for section in schema.SECTIONS
        }
        gradient = sections["gradient"]
        if "preconditioner" in gradient:  # caches of early versions do not say: they have none
            gradient["preconditioner"] = schema.checked_preconditioner(gradient["preconditioner"])
        fitted = value["fitted_codec"]
        manifest = Manifest(
            **sections,
            codec=CodecConfig.from_json(value["codec"]),
            rows=schema.count(value["rows"]),
            shard_rows=schema.count(value["shard_rows"]),
            layers=[Block.from_json(block) for block in value["layers"]],
            fitted_codec=None if fitted is None else FittedCodec.from_json(fitted),
            shards=[Shard.from_json(shard) for shard in value["shards"]],
            null=None if value.get("null") is None else schema.checked_null(value["null"]),
        )
        manifest._check_layers()
        if manifest.fitted_codec is not None:
            manifest._check_fitted_codec(manifest.fitted_codec)
        manifest._check_shards()
        return manifest

    def _check_layers(self) -> None:
        """Raise ValueError if layers, codec and sketch do not agree."""
        if not self.layers:
            raise ValueError("there are no layers")
        start = 0
        for block in self.layers:
            if block.start != start or not 1 <= block.width == self.width:
                raise ValueError(f"the block of {short(block.name)} has the wrong range")
            start += block.width
        if start > _MAX_DIM:
            raise ValueError(f"the sketch has {start} numbers")
        if self.sketch["width"] != self.width:
            raise ValueError("the layers have another width than the sketch")
        seed_is_valid = 0 <= self.sketch["seed"] < 2**64
        if self.codec.dtype in PACKED and (self.width & (self.width - 1) or not seed_is_valid):
            raise ValueError("the width is not a power of two, or the seed is out of range")

    def _check_fitted_codec(self, fitted: FittedCodec) -> None:
        """Raise ValueError if the fitted codec does not agree with codec, layers and the basis's size."""
        shape, dim = fitted.shape, self.dim
        if shape.dtype != self.codec.dtype or len(shape.per_layer) != len(self.layers):
            raise ValueError("the fitted codec is for another dtype or another number of layers")
        if len(shape.residual) != len(shape.per_layer):
            raise ValueError("the fitted codec has residuals of another number of layers")
        if max(*shape.per_layer, *shape.residual) > self.width or shape.shared > dim:
            raise ValueError("a basis has more directions than dimensions")
        directions = sum(shape.per_layer)
        if fitted.file is None:
            if shape.shared or directions:
                raise ValueError("the fitted codec has directions but no basis file")
            return
        if shape.shared and "unexplained_p99" not in fitted.statistics:
            raise ValueError("the fitted codec lacks a statistic")
        size = 4 * dim + 2 * dim * shape.shared + 2 * self.width * directions
        size += 4 * (directions + 2 * len(self.layers) + 1)
        if not size <= fitted.bytes <= size + MAX_HEADER:
            raise ValueError("the basis has the wrong size")

    def _check_shards(self) -> None:
        """Raise ValueError if the shards do not agree with the rows and their codec."""
        if self.shard_rows < 1 or max(self.rows, self.shard_rows) >= 2**62:
            raise ValueError("the number of rows, or of rows in a shard, is out of range")
        if not 0 <= self.rows_begun <= self.rows:
            raise ValueError("the cache was begun with more rows than it has")
        if self.shards and self.fitted_codec is None and self.codec.dtype not in FLOATS:
            raise ValueError("there are shards, but no fitted codec")
        next_first = 0
        for shard in self.shards:
            n, offset = divmod(shard.first, self.shard_rows)
            if offset or shard.first < next_first or shard.file != shard_name(n):
                raise ValueError(f"the shard {short(shard.file)} is out of order")
            if not 1 <= shard.rows <= self.rows_of(n):
                raise ValueError(f"the shard {short(shard.file)} has the wrong number of rows")
            if not 0 < shard.bytes - shard.rows * self.row_bytes <= MAX_HEADER:
                raise ValueError(f"the shard {short(shard.file)} has the wrong size")
            next_first = shard.first + self.shard_rows
