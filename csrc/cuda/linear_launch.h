// linear_sketch by Fourier transforms (fourier_sketch.cu), as linear_sketch.cu calls it.
#pragma once

#include "launchers.h"
#include "linear_rows.cuh"

namespace rapidin {

LinearTile fourier_sketch_tile(int64_t k, int bytes);  // bytes: of the wider dtype
void fourier_sketch_table(const uint32_t* columns, int64_t n, int64_t k, int bytes, uint32_t* table);
void fourier_sketch(const LinearArgs& args, int64_t k, int64_t splits, int64_t batch, Queue on);

}  // namespace rapidin
