// Plain arguments of the kernels: pointers, sizes, and strides in elements (not bytes).
#pragma once

#include <cstdint>

namespace rapidin {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kInt4 = 4, kSign = 5 };

// x: [batch, tokens, n] of any dtype and strides.
struct TokenRows {
    const void* data;
    int dtype;
    int64_t tokens, n;
    int64_t stride_batch, stride_token, stride_element;
};

// Sums the wrapped diagonals of matrices [batch, rows, cols]:
//   out[batch, (row_bin(r) + col_bin(c)) mod k] += row_sign(r) * col_sign(c) * matrix[batch, r, c]
struct FoldArgs {
    const void* matrix;
    int dtype;
    int64_t batch, rows, cols;
    int64_t stride_batch, stride_row, stride_col;
    const uint32_t* row_table;      // [rows] or [batch, rows]: bin | sign; null = row r has bin r
    int64_t row_table_stride;       // 0 where all matrices share it
    const uint32_t* column_table;   // [ceil(cols / k) * k]: by (chunk, bin), index in the chunk | sign; null = as they stand
    int64_t k;
};

// One tensor of a flat sketch: [batch, numel], elements contiguous; first_row = its first row in the whole list.
struct FlatTensor {
    const char* data;
    int dtype;
    int64_t numel, stride_batch, first_row;
};

// Neighbouring rows of one tensor, all in one chunk; the last may be short.
struct FlatRun {
    const void* data;
    int dtype;
    int64_t length;      // elements
    uint32_t first_row;  // in the whole list
};

// Which group of bins each row of a run goes to: turned[row] + rotation, modulo groups.
struct FlatGroups {
    const uint32_t* turned;  // the chunk's permutation, from the run's first row on
    uint32_t rotation, groups;
};

// Queries as the integers that packed rows are multiplied with (see csrc/cpu/packed.h).
struct ByteQueries {
    const int8_t* planes;
    const int64_t* sums;  // [q] of the integers
    const double* scales;  // [q]: a query's numbers are scale * integers; NaN for a query with NaN or Inf
};

// Queries as the integers that packed rows with blocks are multiplied with. A piece is a block, or as much of it as 32 bits hold
// the sum of; a step is what a piece has in one plane of a group of bytes.
struct BlockStep {
    int64_t byte;  // where the group begins in a row
    int shift;     // of the plane's bits
};
struct BlockPiece {
    int64_t block, first_step, end_step;
    bool ends;  // whether the block's share of this part does
};
struct BlockQueries {
    const BlockStep* steps;
    const BlockPiece* pieces;
    int64_t step_count, piece_count;
    const int8_t* digits;       // [q, steps, kDigits (lowest first), kGroup], 0 at bytes without a number of the piece
    const double* minus;        // [q, pieces]: taken from PackedLayout::times * the sum of products, since codes are not negative
    const double* units;        // [q, pieces]: what 1 of the difference stands for, a power of two
    const uint8_t* has_digits;  // [q]: 0 for a query that is multiplied in floats
    bool any_digits, all_digits;  // of the queries
};

// One part of a cache's rows, [n, width] of any DType but kBFloat16; parts lie side by side.
struct ScanPart {
    const void* rows;
    int dtype;
    int64_t width, first;  // of the d numbers of a row, this part's are [first, first + width)
    int64_t stride_row;    // in elements, of packed rows in bytes
    const void* scale;     // [n] or null: 1
    int scale_dtype;       // kFloat32 or kFloat16
    int64_t stride_scale;
    ByteQueries queries;   // of a packed part without blocks
    BlockQueries blocks;   // with blocks
};

// score[q, n] = base[q, n] + sum over parts p of scale[p, n] * sum over blocks b of scales[n, b] * <queries[q], part p>
struct ScanArgs {
    const ScanPart* parts;
    int64_t part_count;
    int64_t n, d;
    const float* queries;  // [q, d], contiguous
    int64_t q;
    const int64_t* offsets;  // [blocks + 1]; null without scales
    int64_t blocks;
    const float* scales;  // [n, blocks] or null
    int64_t stride_scales;
    const uint8_t* valid;  // [n] or null
    const float* base;     // [q, n] or null
    int64_t stride_base;
};

// Rows [n, width] of floats to pack.
struct PackArgs {
    const void* rows;
    int from;  // kFloat32, kFloat16 or kBFloat16
    int64_t n, width, stride_row;
    int to;  // kInt8, kInt4 or kSign
    uint8_t* codes;  // [n, bytes], contiguous
    float* scale;    // [n]
};

}  // namespace rapidin
