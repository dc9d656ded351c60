"""The ops on the CUDA C++ kernels of rapidin.ops._cuda. Arguments have been checked; each function is one
op."""

from rapidin.ops.cuda.devices import excludes
from rapidin.ops.cuda.extension import device_and_stream, emulated, extension, installed, use, using
from rapidin.ops.cuda.scan import topk_scan, topk_scan_both_ends
from rapidin.ops.cuda.sketches import flat_sketch, linear_sketch, supports

__all__ = [
    "device_and_stream",
    "emulated",
    "excludes",
    "extension",
    "flat_sketch",
    "installed",
    "linear_sketch",
    "supports",
    "topk_scan",
    "topk_scan_both_ends",
    "use",
    "using",
]
