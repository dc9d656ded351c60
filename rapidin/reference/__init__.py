"""What the ops compute, said in plain torch and float64: slow, and right by definition (docs/sketch.md)."""

from rapidin.reference.flat_sketch import flat_sketch
from rapidin.reference.linear_sketch import embedding_sketch, linear_sketch, matrix_sketch
from rapidin.reference.packed import pack, unpack
from rapidin.reference.topk_scan import topk_scan, topk_scan_both_ends
from rapidin.reference.turn import turn, unit_blocks

__all__ = [
    "embedding_sketch",
    "flat_sketch",
    "linear_sketch",
    "matrix_sketch",
    "pack",
    "topk_scan",
    "topk_scan_both_ends",
    "turn",
    "unit_blocks",
    "unpack",
]
