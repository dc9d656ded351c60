"""Codecs: from sketches to the few bytes that a cache stores of each, and from these to what a scan reads.

plan: the protocols and the plan of a scan; floats, packed: the two codecs; fit: the shape of a row for a
budget of bytes; learn: bases from a sample; basis: the basis as a codec uses it and a file keeps it.
"""

from rapidin.cache.codec.basis import Basis
from rapidin.cache.codec.fit import (
    DEFAULT_SAMPLE,
    DTYPES,
    FLOATS,
    PACKED,
    ROW_OVERHEAD,
    CodecConfig,
    RowShape,
    fit_shape,
    min_row_bytes,
    shared_size,
)
from rapidin.cache.codec.floats import FloatCodec
from rapidin.cache.codec.learn import LearnedBasis, learn_basis, learning_bytes
from rapidin.cache.codec.packed import PER_LAYER, RESIDUAL, SHARED, PackedCodec
from rapidin.cache.codec.plan import Codec, JoinedQueries, ScanPlan, TensorSpecs, concatenate_plans

__all__ = [
    "DEFAULT_SAMPLE",
    "DTYPES",
    "FLOATS",
    "PACKED",
    "PER_LAYER",
    "RESIDUAL",
    "ROW_OVERHEAD",
    "SHARED",
    "Basis",
    "Codec",
    "CodecConfig",
    "FloatCodec",
    "JoinedQueries",
    "LearnedBasis",
    "PackedCodec",
    "RowShape",
    "ScanPlan",
    "TensorSpecs",
    "concatenate_plans",
    "fit_shape",
    "learn_basis",
    "learning_bytes",
    "min_row_bytes",
    "shared_size",
]
