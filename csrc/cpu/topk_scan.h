// Scores of a few cache rows for all queries. The order of additions of one score is fixed by D and the blocks
// alone: eight lanes over each tile of up to 1,024 elements of a block in float32, tiles in double.
#pragma once

#include "kernels.h"
#include "vec8.h"

namespace rapidin {
namespace {

constexpr int64_t kFewQueries = 4;

template <class T>
inline Vec8 load_tail(const T* p, int64_t n) {
    T padded[8] = {};
    memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
    return load8(padded);
}

// out[r * stride_out + q] += scale[r] * <rows[r], queries[q]> over `length` elements
template <int R, int Q, class T>
inline void dot_tile(const T* rows, int64_t stride_row, const float* queries, int64_t stride_query, int64_t length,
                     const double* scale, double* out, int64_t stride_out) {
    Vec8 sum[R][Q];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) sum[r][q] = zero8();
    int64_t i = 0;
    for (; i + 8 <= length; i += 8) {
        Vec8 x[R];
        for (int r = 0; r < R; ++r) x[r] = load8(rows + r * stride_row + i);
        for (int q = 0; q < Q; ++q) {
            const Vec8 y = load8(queries + q * stride_query + i);
            for (int r = 0; r < R; ++r) sum[r][q] = fma8(x[r], y, sum[r][q]);
        }
    }
    if (i < length) {
        for (int q = 0; q < Q; ++q) {
            const Vec8 y = load_tail(queries + q * stride_query + i, length - i);
            for (int r = 0; r < R; ++r) sum[r][q] = fma8(load_tail(rows + r * stride_row + i, length - i), y, sum[r][q]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) out[r * stride_out + q] += scale[r] * static_cast<double>(sum8(sum[r][q]));
}

// All rows of the tile for Q queries: R at a time, which keeps R * Q sums in registers.
template <int R, int Q, class T>
inline void dot_rows(const T* rows, int64_t count, int64_t stride_row, const float* queries, int64_t stride_query, int64_t length,
                     const double* scale, double* out, int64_t stride_out) {
    int64_t r = 0;
    for (; r + R <= count; r += R)
        dot_tile<R, Q>(rows + r * stride_row, stride_row, queries, stride_query, length, scale + r, out + r * stride_out, stride_out);
    for (; r < count; ++r)
        dot_tile<1, Q>(rows + r * stride_row, stride_row, queries, stride_query, length, scale + r, out + r * stride_out, stride_out);
}

template <class T>
inline void dot_all(const T* rows, int64_t count, int64_t stride_row, const float* queries, int64_t q, int64_t stride_query,
                    int64_t length, const double* scale, double* out) {
    int64_t j = 0;
    for (; j + 4 <= q; j += 4)
        dot_rows<3, 4>(rows, count, stride_row, queries + j * stride_query, stride_query, length, scale, out + j, q);
    if (q - j == 3) dot_rows<3, 3>(rows, count, stride_row, queries + j * stride_query, stride_query, length, scale, out + j, q);
    if (q - j == 2) dot_rows<4, 2>(rows, count, stride_row, queries + j * stride_query, stride_query, length, scale, out + j, q);
    if (q - j == 1) dot_rows<8, 1>(rows, count, stride_row, queries + j * stride_query, stride_query, length, scale, out + j, q);
}

template <class T>
inline void scan_rows(const ScanArgs& args, int64_t first, int64_t count, float* scratch, double* scores) {
    const T* rows = static_cast<const T*>(args.cache) + first * args.stride_row;
    double scale[kScanRows];
    for (int64_t r = 0; r < count; ++r) scale[r] = 1.0;
    for (int64_t i = 0; i < count * args.q; ++i) scores[i] = 0.0;
    const bool convert = sizeof(T) != sizeof(float) && args.q > kFewQueries;  // once for all, where each would do it again
    for (int64_t b = 0; b < args.blocks; ++b) {
        if (args.scales)
            for (int64_t r = 0; r < count; ++r) scale[r] = static_cast<double>(args.scales[(first + r) * args.stride_scales + b]);
        for (int64_t begin = args.offsets[b]; begin < args.offsets[b + 1]; begin += kScanTile) {
            const int64_t rest = args.offsets[b + 1] - begin;
            const int64_t length = rest < kScanTile ? rest : kScanTile;
            const float* queries = args.queries + begin;
            if (convert) {
                for (int64_t r = 0; r < count; ++r) copy_floats(rows + r * args.stride_row + begin, 1, length, scratch + r * kScanTile);
                dot_all(scratch, count, kScanTile, queries, args.q, args.d, length, scale, scores);
            } else {
                dot_all(rows + begin, count, args.stride_row, queries, args.q, args.d, length, scale, scores);
            }
        }
    }
}

void scan(const ScanArgs& args, int64_t first, int64_t count, float* scratch, double* scores) {
    // With few queries memory is what counts: a few rows are read from end to end. With many, arithmetic does:
    // all rows of a tile, for each of the queries' tiles, which are then read from memory less often.
    const int64_t step = args.q <= kFewQueries ? 8 : count;
    for (int64_t i = 0; i < count; i += step) {
        const int64_t rows = count - i < step ? count - i : step;
        if (args.dtype == kFloat32) scan_rows<float>(args, first + i, rows, scratch, scores + i * args.q);
        else scan_rows<Half>(args, first + i, rows, scratch, scores + i * args.q);
    }
}

}  // namespace
}  // namespace rapidin
