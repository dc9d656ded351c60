"""The files of a cache besides its shards: the codec's basis and the preconditioner, as the manifest records
them; and the codec that the manifest and the basis make."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rapidin.cache.codec import FLOATS, Basis, Codec, FloatCodec, PackedCodec, RowShape, TensorSpecs
from rapidin.cache.manifest import FittedCodec, Manifest
from rapidin.cache.names import BASIS, PRECONDITIONER
from rapidin.errors import UserError
from rapidin.files import read_regular_file, replace_file

_T = TypeVar("_T")


def codec_of(manifest: Manifest, folder: Path) -> Codec:
    """The codec of a cache, with its basis read from the folder. Raises UserError if that is not valid."""
    blocks, width, fitted = len(manifest.layers), manifest.width, manifest.fitted_codec
    if manifest.codec.dtype in FLOATS:
        return FloatCodec(manifest.codec.dtype, blocks, width)
    if fitted is None:
        raise UserError(
            f"the cache in '{folder}' holds no examples yet", "run the same 'rapidin cache' again"
        )
    basis = None if fitted.file is None else read_basis(folder, fitted, width)
    return PackedCodec(fitted.shape, width, manifest.sketch["seed"], basis)


def shard_specs(manifest: Manifest) -> TensorSpecs:
    """The codec's tensors in a shard of this cache, without reading the basis."""
    if manifest.codec.dtype in FLOATS:
        return FloatCodec(manifest.codec.dtype, len(manifest.layers), manifest.width).tensor_specs()
    assert manifest.fitted_codec is not None
    shape, seed = manifest.fitted_codec.shape, manifest.sketch["seed"]
    return PackedCodec(shape, manifest.width, seed).tensor_specs()


def _read_tensors(
    path: Path, name: str, remedy: str, size: int, sha256: str, make: Callable[[dict[str, Tensor]], _T]
) -> _T:
    """What `make` makes of the tensors of a safetensors file of known size and checksum.

    name: of the file, in words. Raises UserError if it is another file, or `make` raises ValueError, KeyError
    or TypeError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_regular_file(path, name, remedy, most=size, size=size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"the {name} '{path}' is altered: its checksum is not the manifest's", remedy)
    try:
        return make(load(data))
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"the {name} '{path}' is damaged: {error}", remedy) from None


def read_basis(folder: Path, fitted: FittedCodec, width: int) -> Basis:
    """The basis of a fitted codec. Raises UserError if the file is not as the manifest records it."""
    assert fitted.file is not None
    return _read_tensors(
        folder / fitted.file,
        "basis",
        "the cache cannot be read without it: restore it, or cache again",
        fitted.bytes,
        fitted.sha256,
        lambda tensors: Basis.of_tensors(tensors, fitted.shape, width),
    )


def write_basis(folder: Path, basis: Basis, shape: RowShape, statistics: dict[str, float]) -> FittedCodec:
    """Write a basis; it is on disk under its name when this returns."""
    from safetensors.torch import save

    data = save({name: value.contiguous() for name, value in basis.tensors().items()})
    replace_file(folder / BASIS, data)
    return FittedCodec(shape, BASIS, len(data), hashlib.sha256(data).hexdigest(), statistics)


def read_preconditioner(
    folder: Path, record: Mapping[str, Any], make: Callable[[dict[str, Tensor]], _T]
) -> _T:
    """What `make` makes of the tensors of a cache's preconditioner.

    Raises UserError if the file is not as the manifest's record says, or `make` raises ValueError, KeyError
    or TypeError.
    """
    path = folder / record["file"]
    again = "run the same 'rapidin cache' again: it is made again"
    if not os.path.lexists(path):
        raise UserError(f"the preconditioner '{path}' is missing", again)
    return _read_tensors(
        path, "preconditioner", f"delete that file and {again}", record["bytes"], record["sha256"], make
    )


def preconditioner_record(data: bytes) -> dict[str, Any]:
    """The manifest's record of a preconditioner's file with these bytes."""
    return {"file": PRECONDITIONER, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_preconditioner(folder: Path, data: bytes) -> dict[str, Any]:
    """Write a preconditioner's file; it is on disk when this returns. Gives the manifest's record of the
    file."""
    replace_file(folder / PRECONDITIONER, data)
    return preconditioner_record(data)
