// Scores of a few rows of all parts for all queries. The order of additions of one score is fixed by the parts' widths
// and the blocks alone: of floats kWide lanes over each tile of up to 1,024 elements in float32, tiles in double; of
// packed rows exact integers; with blocks an integer for each piece, added in double, or floats as above, where
// Kernels::block_digits is false or a query is not finite.
#pragma once

#include "block_scan.h"
#include "kernels.h"
#include "pack.h"
#include "packed_scan.h"
#include "vec_wide.h"

#include <type_traits>

namespace rapidin {
namespace {

constexpr int64_t kFewQueries = 4;
constexpr int64_t kTogether = 4;           // rows of floats that share the loads of a few queries, where they are wide
constexpr int64_t kFloatsAhead = 8 << 10;  // how many bytes ahead of narrower rows memory is asked for, whichever rows are there

// Whether rows are of floats and so wide that a query of them may leave no room in the L1 cache.
inline bool is_wide(const ScanPart& part) { return !is_packed(part.dtype) && part.width > kScanTile; }

// Where rows of floats are that are multiplied with few queries. ahead: how many elements after a row's next ones memory is
// asked for; together: rows that are multiplied at once, 1 or kTogether. In scratch, which is in a cache, they are 0 and 1.
struct Reading {
    int64_t ahead = 0, together = 1;
};

template <class T>
inline Wide load_tail(const T* p, int64_t n) {
    T padded[kWide] = {};
    memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
    return load_wide(padded);
}

inline void widen(const Half* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kWide <= n; i += kWide) store_wide(to + i, load_wide(from + i));
    for (; i < n; ++i) to[i] = to_float(from[i]);
}

// out[r * stride_out + q] += scale[r] * <rows[r], queries[q]> over `length` elements
template <int R, int Q, bool Ask, class T>
inline void dot_tile(const T* rows, int64_t stride_row, const float* queries, int64_t stride_query, int64_t length,
                     const double* scale, int64_t ahead, double* out, int64_t stride_out) {
    Wide sum[R][Q];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) sum[r][q] = zero_wide();
    int64_t i = 0;
    for (; i + kWide <= length; i += kWide) {
        Wide x[R];
        for (int r = 0; r < R; ++r) {
            const T* row = rows + r * stride_row + i;
            if (Ask) prefetch_soon(row + ahead);
            x[r] = load_wide(row);
        }
        for (int q = 0; q < Q; ++q) {
            const Wide y = load_wide(queries + q * stride_query + i);
            for (int r = 0; r < R; ++r) sum[r][q] = fma_wide(x[r], y, sum[r][q]);
        }
    }
    if (i < length) {
        for (int q = 0; q < Q; ++q) {
            const Wide y = load_tail(queries + q * stride_query + i, length - i);
            for (int r = 0; r < R; ++r) sum[r][q] = fma_wide(load_tail(rows + r * stride_row + i, length - i), y, sum[r][q]);
        }
    }
    for (int q = 0; q < Q; ++q) {
        float of_row[R];
        if constexpr (R % 4 == 0) {
            for (int r = 0; r < R; r += 4) sums_wide(sum[r][q], sum[r + 1][q], sum[r + 2][q], sum[r + 3][q], of_row + r);
        } else {
            for (int r = 0; r < R; ++r) of_row[r] = sum_wide(sum[r][q]);
        }
        for (int r = 0; r < R; ++r) out[r * stride_out + q] += scale[r] * static_cast<double>(of_row[r]);
    }
}

// All rows of the tile for Q queries: R at a time, which keeps R * Q sums in registers.
template <int R, int Q, bool Ask, class T>
inline void dot_rows(const T* rows, int64_t count, int64_t stride_row, const float* queries, int64_t stride_query, int64_t length,
                     const double* scale, int64_t ahead, double* out, int64_t stride_out) {
    int64_t r = 0;
    for (; r + R <= count; r += R)
        dot_tile<R, Q, Ask>(rows + r * stride_row, stride_row, queries, stride_query, length, scale + r, ahead,
                            out + r * stride_out, stride_out);
    for (; r < count; ++r)
        dot_tile<1, Q, Ask>(rows + r * stride_row, stride_row, queries, stride_query, length, scale + r, ahead,
                            out + r * stride_out, stride_out);
}

template <class T>
inline void dot_all(const T* rows, int64_t count, int64_t stride_row, const float* queries, int64_t q, int64_t stride_query,
                    int64_t length, Reading reading, const double* scale, double* out) {
    const auto run = [&](auto dot_some, int64_t j) {
        dot_some(rows, count, stride_row, queries + j * stride_query, stride_query, length, scale, reading.ahead, out + j, q);
    };
    // With few queries memory is what counts, and a row read from end to end by itself is what processors prefetch best. Wide rows
    // are read together, since queries that come from the L2 cache take as long.
    const auto run_few = [&](auto number) {
        constexpr int Q = decltype(number)::value, R = kWide == 16 || Q <= 2 ? kTogether : kTogether / 2;
        if (reading.together > 1) run(dot_rows<R, Q, true, T>, 0);
        else if (reading.ahead) run(dot_rows<1, Q, Q <= 2, T>, 0);
        else run(dot_rows<1, Q, false, T>, 0);
    };
    if (q == 1) return run_few(std::integral_constant<int, 1>());
    if (q == 2) return run_few(std::integral_constant<int, 2>());
    if (q == 3) return run_few(std::integral_constant<int, 3>());
    if (q == 4) return run_few(std::integral_constant<int, 4>());
    // R * Q sums fit the registers: 32 with AVX-512, 16 before.
    constexpr int Q = kWide == 16 ? 6 : 4, R = kWide == 16 ? 4 : 3;
    int64_t j = 0;
    for (; j + Q <= q; j += Q) run(dot_rows<R, Q, false, T>, j);
    if (Q > 4 && q - j >= 4) {
        run(dot_rows<R, 4, false, T>, j);
        j += 4;
    }
    if (q - j == 3) run(dot_rows<R, 3, false, T>, j);
    if (q - j == 2) run(dot_rows<4, 2, false, T>, j);
    if (q - j == 1) run(dot_rows<8, 1, false, T>, j);
}

// scores += scale * <rows, queries> over elements [begin, end) of the part, which are at `rows` already
inline void scan_tile(const ScanArgs& args, const ScanPart& part, int64_t first, int64_t count, int64_t begin, int64_t length,
                      const double* scale, float* scratch, double* scores) {
    const float* queries = args.queries + part.first + begin;
    const int64_t offset = first * part.stride_row + begin;
    Reading reading{kFloatsAhead / (part.dtype == kFloat32 ? 4 : 2), 1};
    if (is_wide(part)) {  // the next tile, which is that of the next rows in the end
        const bool last = begin + kScanTile >= part.width;
        reading = {last ? kTogether * part.stride_row - part.width + kScanTile : kScanTile, kTogether};
    }
    if (part.dtype == kFloat32) {
        dot_all(static_cast<const float*>(part.rows) + offset, count, part.stride_row, queries, args.q, args.d, length, reading, scale,
                scores);
    } else if (args.q <= kFewQueries) {
        dot_all(static_cast<const Half*>(part.rows) + offset, count, part.stride_row, queries, args.q, args.d, length, reading, scale,
                scores);
    } else {  // converted once for all, where each query's tile would do it again
        for (int64_t r = 0; r < count; ++r)
            widen(static_cast<const Half*>(part.rows) + offset + r * part.stride_row, length, scratch + r * kScanTile);
        dot_all(scratch, count, kScanTile, queries, args.q, args.d, length, Reading{}, scale, scores);
    }
}

inline void set_scales(const ScanArgs& args, const ScanPart& part, int64_t first, int64_t count, int64_t block, double* scale) {
    for (int64_t r = 0; r < count; ++r) {
        scale[r] = row_scale(part, first + r);
        if (args.scales) scale[r] *= static_cast<double>(args.scales[(first + r) * args.stride_scales + block]);
    }
}

inline void scan_floats(const ScanArgs& args, const ScanPart& part, int64_t first, int64_t count, float* scratch, double* scores) {
    double scale[kScanRows];
    const int64_t whole[] = {part.first, part.first + part.width};
    const int64_t* offsets = args.scales ? args.offsets : whole;
    for (int64_t b = 0; b < (args.scales ? args.blocks : 1); ++b) {
        // the block's share of this part
        const int64_t from = (offsets[b] > part.first ? offsets[b] : part.first) - part.first;
        const int64_t to = (offsets[b + 1] < part.first + part.width ? offsets[b + 1] : part.first + part.width) - part.first;
        if (from >= to) continue;
        set_scales(args, part, first, count, b, scale);
        for (int64_t begin = from; begin < to; begin += kScanTile)
            scan_tile(args, part, first, count, begin, to - begin < kScanTile ? to - begin : kScanTile, scale, scratch, scores);
    }
}

// Packed rows with blocks and the queries without digits: windows of rows become floats, which blocks then cut.
inline void scan_decoded(const ScanArgs& args, const ScanPart& part, int64_t first, int64_t count, float* scratch, double* scores) {
    double scale[kScanRows];
    int64_t b = 0;
    for (int64_t begin = 0; begin < part.width; begin += kScanTile) {
        const int64_t end = part.width - begin < kScanTile ? part.width : begin + kScanTile;
        for (int64_t r = 0; r < count; ++r) decode(part, first + r, begin, end - begin, scratch + r * kScanTile);
        for (int64_t from = begin; from < end;) {
            while (args.offsets[b + 1] <= part.first + from) ++b;
            const int64_t to = args.offsets[b + 1] - part.first < end ? args.offsets[b + 1] - part.first : end;
            set_scales(args, part, first, count, b, scale);
            const float *rows = scratch + (from - begin), *queries = args.queries + part.first + from;
            if (!part.blocks.any_digits) {
                dot_all(rows, count, kScanTile, queries, args.q, args.d, to - from, Reading{}, scale, scores);
            } else {
                for (int64_t j = 0; j < args.q; ++j)
                    if (!part.blocks.has_digits[j])
                        dot_rows<kTogether, 1, false>(rows, count, kScanTile, queries + j * args.d, args.d, to - from, scale, 0,
                                                      scores + j, args.q);
            }
            from = to;
        }
    }
}

void scan(const ScanArgs& args, int64_t first, int64_t count, float* scratch, int64_t* sums, double* scores) {
    // With few queries memory is what counts: a few rows of floats are read from end to end. With many, arithmetic does: all rows
    // of a tile, for each of the queries' tiles, which are then read from memory less often.
    bool wide = false;
    for (int64_t p = 0; p < args.part_count; ++p) wide = wide || is_wide(args.parts[p]);
    const int64_t step = args.q <= kFewQueries && wide ? kTogether : count;
    for (int64_t i = 0; i < count; i += step) {
        const int64_t rows = count - i < step ? count - i : step;
        double* found = scores + i * args.q;
        for (int64_t j = 0; j < rows * args.q; ++j) found[j] = 0.0;
        for (int64_t p = 0; p < args.part_count; ++p) {
            const ScanPart& part = args.parts[p];
            if (!is_packed(part.dtype)) {
                scan_floats(args, part, first + i, rows, scratch, found);
            } else if (args.scales) {
                if (part.blocks.any_digits) scan_blocks(args, part, first + i, rows, found);
                if (!part.blocks.all_digits) scan_decoded(args, part, first + i, rows, scratch, found);
            } else {
                scan_packed(part, first + i, rows, args.q, sums, found);
            }
        }
    }
}

void unpack(const ScanPart& part, int64_t row, float* out) {
    decode(part, row, 0, part.width, out);
    const float scale = static_cast<float>(row_scale(part, row));
    for (int64_t i = 0; i < part.width; ++i) out[i] *= scale;
}

}  // namespace
}  // namespace rapidin
