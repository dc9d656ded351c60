"""The ops on the Triton kernels of rapidin.kernels. Arguments have been checked; each function is one op."""

from rapidin.ops.triton.packing import pack, rotate, unit_blocks, unpack
from rapidin.ops.triton.scan import topk_scan, topk_scan_both_ends
from rapidin.ops.triton.sketches import embedding_sketch, flat_sketch, linear_sketch, matrix_sketch

__all__ = [
    "embedding_sketch",
    "flat_sketch",
    "linear_sketch",
    "matrix_sketch",
    "pack",
    "rotate",
    "topk_scan",
    "topk_scan_both_ends",
    "unit_blocks",
    "unpack",
]
