"""Pack: from sketches to the few bytes that a cache keeps of each, and back to what a scan needs."""

from rapidin.cache.codec.code import Basis, Code, FloatCode, Joined, PackedCode, ScanPlan, side_by_side
from rapidin.cache.codec.fit import (
    FLOATS,
    PACKED,
    SAMPLE,
    Format,
    Shape,
    fit,
    head_for,
    least_bytes,
    row_bytes_besides,
    width_for,
)
from rapidin.cache.codec.learn import Learnt, learn, learning_bytes

__all__ = [
    "FLOATS",
    "PACKED",
    "SAMPLE",
    "Basis",
    "Code",
    "FloatCode",
    "Format",
    "Joined",
    "Learnt",
    "PackedCode",
    "ScanPlan",
    "Shape",
    "fit",
    "head_for",
    "learn",
    "learning_bytes",
    "least_bytes",
    "row_bytes_besides",
    "side_by_side",
    "width_for",
]
