// Plain arguments of the kernels: pointers, sizes, and strides in elements (not bytes).
#pragma once

#include <cstdint>

namespace rapidin {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

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

// score[q, n] = sum over blocks b of scales[n, b] * <queries[q, b], cache[n, b]>
struct ScanArgs {
    const void* cache;
    int dtype;  // kFloat32 or kFloat16
    int64_t n, d, stride_row;
    const float* queries;  // [q, d], contiguous
    int64_t q;
    const int64_t* offsets;  // [blocks + 1]
    int64_t blocks;
    const float* scales;  // [n, blocks] or null
    int64_t stride_scales;
    const uint8_t* valid;  // [n] or null
};

}  // namespace rapidin
