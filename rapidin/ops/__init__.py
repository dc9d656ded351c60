"""One function per kernel: checks its arguments, then runs the backend asked for.

backend=None takes the best for the tensors' device; a backend asked for by name runs or raises.
"""

from rapidin.ops.flat_sketch import flat_sketch
from rapidin.ops.linear_sketch import embedding_sketch, linear_sketch
from rapidin.ops.low_rank import LowRank
from rapidin.ops.matrix_sketch import matrix_sketch
from rapidin.ops.onednn import faster_linear, is_compiled, linear, matmul
from rapidin.ops.packed import Packed, pack, packed_bytes, unpack
from rapidin.ops.rotate import Cut, rotate, unit_blocks
from rapidin.ops.stack_sketch import add_at, stack_sketch
from rapidin.ops.topk_scan import ScanQueries, topk_scan, topk_scan_both_ends

__all__ = [
    "Cut",
    "LowRank",
    "Packed",
    "ScanQueries",
    "add_at",
    "embedding_sketch",
    "faster_linear",
    "flat_sketch",
    "is_compiled",
    "linear",
    "linear_sketch",
    "matmul",
    "matrix_sketch",
    "pack",
    "packed_bytes",
    "rotate",
    "stack_sketch",
    "topk_scan",
    "topk_scan_both_ends",
    "unit_blocks",
    "unpack",
]
