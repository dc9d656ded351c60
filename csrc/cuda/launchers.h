// What the binding calls: one function an op, each in its own .cu. All pointers are the device's; the work goes to
// the end of `on`, the caller's current stream. None waits for the device.
#pragma once

#include <cstdint>

#include "../args.h"

namespace rapidin {

struct Queue {
    int device;
    uint64_t handle;
};

int shared_memory_limit(int device);  // bytes that a block may ask for

void hash_words(uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint32_t* words, Queue on);

// Widths 32, 64, .. 1024 (512 where a side is not bfloat16). Each block takes block_tokens of an example, a multiple of the
// tile's. `partial` is [splits * parts, min(batch, 65535), k] where these are more than one. Tables are what
// linear_sketch_table makes of column tables (args.h: FoldArgs).
void linear_sketch(const TokenRows& grads, const uint32_t* grads_table, const TokenRows& inputs, const uint32_t* inputs_table,
                   int64_t batch, int64_t k, int64_t splits, int64_t block_tokens, float* partial, float* out, Queue on);
struct LinearTile {
    int64_t tokens, parts, shared_bytes;
};
LinearTile linear_sketch_tile(int64_t k, bool split);  // split: unless both sides are bfloat16; 1,024 wide it has no kernel
void linear_sketch_table(const uint32_t* columns, int64_t n, uint32_t* table);  // on the host

// The tensors of a flat sketch, [batch, numel] each, and how their rows are cut into parts: at[5 tensors + parts + 2], as
// FlatLaunch in flat_sketch.cuh names its pieces.
struct FlatTable {
    const int64_t* at;
    int64_t tensors, batch, rows, parts, chunks_of_part;
};

// Where squared lengths go: of_rows [batch, rows], partial [slices, batch, tensors], of_tensors [batch, tensors]; null and 0
// where none are wanted.
struct FlatSquares {
    float *of_rows, *partial, *of_tensors;
    int64_t slices;
};

// places: [16, groups]; scales: [tensors] or null; partial: [parts, batch, dim], unused for one part; sketch: [batch, dim].
void flat_sketch(const FlatTable& table, uint64_t seed, int64_t dim, const uint32_t* places, const float* scales, float* partial,
                 float* sketch, const FlatSquares& squares, Queue on);

}  // namespace rapidin
