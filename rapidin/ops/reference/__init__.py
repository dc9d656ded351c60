"""What the ops compute, said in plain torch and float64: slow, and right by definition
(docs/reference/sketch.md)."""

from rapidin.ops.reference.flat_sketch import flat_sketch
from rapidin.ops.reference.linear_sketch import embedding_sketch, linear_sketch, matrix_sketch, stack_sketch
from rapidin.ops.reference.packed import pack, unpack
from rapidin.ops.reference.rotate import rotate, unit_blocks
from rapidin.ops.reference.topk_scan import topk_scan, topk_scan_both_ends

__all__ = [
    "embedding_sketch",
    "flat_sketch",
    "linear_sketch",
    "matrix_sketch",
    "pack",
    "rotate",
    "stack_sketch",
    "topk_scan",
    "topk_scan_both_ends",
    "unit_blocks",
    "unpack",
]
