#include "flat_sketch.h"
#include "kernels.h"
#include "linear_sketch.h"
#include "pack.h"
#include "tensor_sketch.h"
#include "topk_scan.h"

namespace rapidin {

const Kernels kKernelsNeon = {
    "neon",   count_sketch,      count_sketch_pair,     square_sum, fold, flat_rows, flat_narrow, scan, pack, unpack,
    token_squares, sketch_of_squares, tensor_sketch_scratch, kLanes, kDigitsAreFaster};

}  // namespace rapidin
