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
int capability_of(int device);        // 90 for sm_90

// Queries as they came, and the form in which rows are multiplied with them; see scan_queries.cuh.
struct ScanQueries {
    const float* queries;  // [q, stride_query]
    int64_t q, stride_query, width;
    int format;           // the rows'
    bool blocks;          // of packed rows
    int64_t units;        // of 64 bytes of a row; with blocks steps: a plane of such, and one block
    int planes, tiles, columns_held;
    int64_t query_tiles;
    const int32_t* places;  // [units, place_planes, numbers of 64 bytes]: which number of a row, -1 for none
    int place_planes;
    // with blocks
    const int32_t* steps;     // [units, 4]: byte of the row, shift << 8 | StepFlags, column of scales, segment
    const int32_t* segments;  // [segment_count, segment_ints]: first and last number, ...
    int64_t segment_count, segment_ints;
    int32_t* segment_sums;    // [segment_count, q, digits]
    // made
    double *units_of, *inverse;  // [q]
    int64_t* sums;               // [q], of integers without blocks
    uint8_t* fragments;
};

enum StepFlags : int { kNewGroup = 1, kBegins = 2, kEnds = 4 };

void scan_queries(const ScanQueries& args, Queue on);

// One part's rows and the queries that they are multiplied with; see rapidin/ops/gpu_scan.py, which prepares them.
struct DeviceScan {
    // rows
    const uint8_t* rows;
    int format;          // any DType
    int64_t n, width;    // rows, numbers of one
    int64_t stride_row;  // bytes
    int64_t first;       // the first row's index in the cache
    const void* scale;   // [n] or null: 1
    int scale_dtype;     // kFloat32 or kFloat16
    int64_t stride_scale;
    bool blocks;         // of packed rows, which are then gone through in steps
    // blocks of a row: null = one
    const int32_t* segments;  // [segment_count, 5]: first and last number, first unit of 64 bytes, units before, column of scales;
                              // of packed rows the first two and the column count
    int64_t segment_count, units;
    const float* scales;
    int64_t stride_scales;
    // queries
    const uint8_t* fragments;  // [query tiles, units, planes, tiles of 8 columns, columns held * 4, 16 bytes], see ScanQueries
    int tiles;                 // of 8 columns, of one block
    int columns_held;          // of each tile of 8: fewer only where there is one tile
    const float* queries;      // as they came, of this part: [q, stride_query]
    int64_t q, stride_query;
    const double* units_of;    // [q]: a number of the fragments stands for so much; NaN with NaN or Inf in the query
    const int64_t* sums;       // [q] of integer queries
    // what is added
    double* partial;  // [q, stride_partial]: the sum over the parts before, and where this one is added
    int64_t stride_partial;
    bool first_part, last_part;
    const uint8_t* valid;  // [n] or null
    const float* base;     // [q, n] or null
    int64_t stride_base;
    // what is kept: keys, 0 for none, see topk_scan.cuh
    int64_t* kept;       // [row_blocks, q, ends, capacity]
    int32_t* counts;     // [row_blocks, q, ends]
    int64_t* least;      // [q, ends]: what is no better than this need not be kept
    const int64_t* after;  // [q, ends] or null: only what is worse counts
    int64_t k, capacity, row_blocks;
    int ends;  // 1: the largest, 2: the smallest, 3: both
};

// Adds one part's products to `partial`, or with the last part to `base`, and keeps the best.
void topk_scan(const DeviceScan& args, Queue on);
int64_t topk_scan_shared_bytes(int format, bool blocks, int tiles, int64_t units, int64_t columns_held, int64_t capacity, int ends);

// The best k of what all blocks kept, in order: scores[e], indices[e] [q, stride_out] of each end, and the last key of each.
void topk_merge(const DeviceScan& args, float* const (&scores)[2], int64_t* const (&indices)[2], int64_t stride_out, int64_t* last,
                Queue on);

int multiprocessors_of(int device);

void hash_words(uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint32_t* words, Queue on);

// sums: [n] of parts [count, n], on the current device, which is `on`'s.
void sum_parts(const float* parts, int64_t count, int64_t n, float* sums, Queue on);

// CS(U) c, c = gain (x U), of one side, added to the sketches of bfloat16 sides of up to 512 numbers; of_basis null: none.
struct LowRankTerm {
    const uint32_t* of_basis;  // [k / 32, rank / 16, high and low parts, 2, 32 lanes, 4]: words of two bfloat16, as mma.h has them
    const float* along;        // [batch, tokens, 2, rank]: x times U's high and low parts
    const float* gain;         // [rank]
    int64_t rank;              // a multiple of 16
};

int64_t linear_sketch_low_rank(int64_t k);  // the largest rank of a term; 0: none

// Powers of two from 32 to 8,192. Each block takes block_tokens of an example, a multiple of the tile's. `partial` is
// [splits, min(batch, 65535), k] where these are more than one. Tables are what linear_sketch_table makes of column tables
// (args.h: FoldArgs).
void linear_sketch(const TokenRows& grads, const uint32_t* grads_table, const TokenRows& inputs, const uint32_t* inputs_table,
                   const LowRankTerm& grads_term, const LowRankTerm& inputs_term, int64_t batch, int64_t k, int64_t splits,
                   int64_t block_tokens, float* partial, float* out, Queue on);
struct LinearTile {
    int64_t tokens, shared_bytes;
};
LinearTile linear_sketch_tile(int64_t k, int dtype, int other_dtype);  // of the two sides
// On the host; n: a multiple of k; bytes: of an element of the side.
void linear_sketch_table(const uint32_t* columns, int64_t n, int64_t k, int bytes, uint32_t* table);

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
