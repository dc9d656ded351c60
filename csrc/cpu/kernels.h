// What a unit of one instruction set offers: loops over a range of work, no threads, no memory of their own.
#pragma once

#include <cstdint>

#include "../args.h"
#include "../sketch_hash.h"
#include "fft_plan.h"

namespace rapidin {

constexpr int64_t kScanRows = 48;    // rows scanned together: as float32 they stay in the L2 cache
constexpr int64_t kScanTile = 1024;  // elements summed in float32 before they join a double
constexpr int64_t kPackTile = 1024;  // elements packed at a time: whole groups of any packed dtype

struct FlatKeys {
    StreamKey lanes, signs[kFlatRow / 32];
};

// What is done to the tokens x of a side before they are sketched: x + basis diag(gain) basis^T x. Rank 0: nothing.
struct LowRankArgs {
    const float* basis;  // [n, rank]
    const float* gain;   // [rank]
    const float* table;  // [k, rank], count sketches of the basis' columns: added to x's; null: features are added up first
    int64_t rank;
};

// The two factors of a linear layer's gradients, their bins and signs by element.
struct TensorSketchArgs {
    TokenRows p, q;
    const uint32_t *table_p, *table_q;
    LowRankArgs low_rank_p, low_rank_q;
    const FftPlan* plan;
};

struct Kernels {
    const char* name;
    // Tokens [first, first + count) of the flattened (batch, token) axis -> out [count, stride_out]; scratch: [k].
    void (*count_sketch)(const TokenRows& x, const uint32_t* table, int64_t first, int64_t count, int64_t k, float* scratch,
                         float* out, int64_t stride_out);
    // The same tokens of two factors -> z [count, k] complex: real part a, imaginary part g; scratch: [3 * k].
    void (*count_sketch_pair)(const TokenRows& a, const uint32_t* table_a, const TokenRows& g, const uint32_t* table_g,
                              int64_t first, int64_t count, int64_t k, float* scratch, float* z);
    // sum [batch, k] complex += z [count, k] squared, tokens in ascending order, frequencies [begin, end) only.
    void (*square_sum)(const float* z, int64_t first, int64_t count, int64_t tokens, int64_t k, int64_t begin, int64_t end,
                       float* sum);
    // Rows [begin, end) of matrix `b` added to out [k]; scratch: [2 * k].
    void (*fold)(const FoldArgs& args, int64_t b, int64_t begin, int64_t end, float* scratch, float* out);
    // Rows of kFlatRow elements added, in order, to their groups of sums [groups, kFlatRow].
    void (*flat_rows)(const FlatRun& run, const FlatGroups& groups, const FlatKeys& keys, float* sums);
    // The same for one narrow group: all rows added to sums [width], width < kFlatRow.
    void (*flat_narrow)(const FlatRun& run, int64_t width, const FlatKeys& keys, float* sums);
    // Scores of `count` <= kScanRows rows, base left out -> scores [count, q];
    // scratch: [kScanRows * kScanTile]; sums: [kScanRows * q].
    void (*scan)(const ScanArgs& args, int64_t first, int64_t count, float* scratch, int64_t* sums, double* scores);
    // Rows [begin, end) packed; scratch: [kPackTile].
    void (*pack)(const PackArgs& args, int64_t begin, int64_t end, float* scratch);
    // Row `row` of a packed part -> out [width].
    void (*unpack)(const ScanPart& part, int64_t row, float* out);
    // Tokens [begin, end) of an example -> sums [k] complex, as the plan orders them: their squared spectra, half the
    // imaginary part.
    void (*token_squares)(const TensorSketchArgs& args, int64_t example, int64_t begin, int64_t end, float* scratch, float* sums);
    // sums [count, k] complex of count <= lanes examples -> out [count, k], their sketches.
    void (*sketch_of_squares)(const FftPlan& plan, const float* sums, int64_t count, float* scratch, float* out);
    // Floats that either needs, aligned to 64 bytes; rank: the larger one.
    int64_t (*tensor_sketch_scratch)(const FftPlan& plan, int64_t rank);
    int lanes;
    bool block_digits;  // whether packed rows with blocks are multiplied with digits of finite queries, or become floats
};

extern const Kernels kKernelsBase;
#ifdef RAPIDIN_X86
extern const Kernels kKernelsAvx2, kKernelsAvx512;  // the second with F, BW, DQ, VL and VNNI
#endif
#ifdef RAPIDIN_ARM64
extern const Kernels kKernelsNeon, kKernelsNeonI8mm;  // the second with products of unsigned and signed bytes
#endif

}  // namespace rapidin
