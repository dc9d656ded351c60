// Integer products of packed rows and integer queries, laid out as packed.h says.
#pragma once

#include "kernels.h"
#include "packed.h"
#include "vec_bytes.h"

namespace rapidin {
namespace {

// What differs between the packed dtypes: their planes, and the shift that brings sums of plane p + 1 to those of p.
// number: of each byte the number that begins at bit `shift`.
struct Sign {
    static constexpr int kPlanes = 8, kShift = -1, kDType = kSign;
    static Bytes plane(Bytes x, int p) { return and_bytes(x, static_cast<uint8_t>(1 << p)); }
    static Bytes number(Bytes x, int shift) { return field(x, shift, 1); }
};
struct Int4 {
    static constexpr int kPlanes = 2, kShift = kNibbleShift, kDType = kInt4;
    static Bytes plane(Bytes x, int p) { return nibbles(x, p); }
    static Bytes number(Bytes x, int shift) { return field(x, shift, 15); }
};
struct Int8 {
    static constexpr int kPlanes = 2, kShift = 6, kDType = kInt8;
    static Bytes plane(Bytes x, int) { return xor_bytes(x, 128); }
    static Bytes number(Bytes x, int) { return xor_bytes(x, 128); }
};

// How many bytes ahead memory is asked for, whichever rows are there, in the order in which rows are read: of long ones a window
// each. Only of signs, whose many products leave a processor room for few loads; with other packed rows asking gains
// nothing.
constexpr int64_t kSignAhead = 16 << 10;

// For few queries: all[q], whose total is the sum of products of one row. As many planes at once as their sums fit the
// registers, so that a byte of the row is loaded once or twice.
template <class Format, int Q>
inline void multiply_row(const uint8_t* row, int64_t length, const int8_t* queries, int64_t ahead, ByteSums* all) {
    constexpr int kSums = kBytes == 64 ? 16 : 8;  // of the registers; the rest is for the row and masks
    constexpr int P = Format::kPlanes * Q <= kSums ? Format::kPlanes : kSums / Q;
    for (int q = 0; q < Q; ++q) all[q] = no_sums();
    for (int low = Format::kPlanes - P; low >= 0; low -= P) {
        ByteSums sum[P][Q];
        for (int p = 0; p < P; ++p)
            for (int q = 0; q < Q; ++q) sum[p][q] = no_sums();
        const int8_t* at = queries + low * Q * kGroup;
        const auto add_group = [&](auto load) {
            for (int64_t j = 0; j < kGroup; j += kBytes) {
                const Bytes x = load(j);
                for (int p = 0; p < P; ++p)
                    for (int q = 0; q < Q; ++q)
                        sum[p][q] = add_products(sum[p][q], Format::plane(x, low + p), load_bytes(at + (p * Q + q) * kGroup + j));
            }
        };
        int64_t i = 0;
        for (; i + kGroup <= length; i += kGroup, at += Format::kPlanes * Q * kGroup) {
            if (Format::kPlanes == 8 && low == 0) prefetch(row + i + ahead);
            add_group([&](int64_t j) { return load_row_bytes(row + i + j); });
        }
        if (i < length) add_group([&](int64_t j) { return load_first_bytes(row + i + j, length - i - j); });
        for (int q = 0; q < Q; ++q)
            for (int p = P - 1; p >= 0; --p) all[q] = add_sums(shift_sums<Format::kShift>(all[q]), sum[p][q]);
    }
}

// A function by itself, which has enough registers for its masks.
template <class Format, int Q>
__attribute__((noinline)) void multiply_each(const uint8_t* rows, int64_t count, int64_t stride_row, int64_t length,
                                             const int8_t* queries, int64_t ahead, int64_t* sums) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
        ByteSums all[4][Q];
        for (int n = 0; n < 4; ++n) multiply_row<Format, Q>(rows + (r + n) * stride_row, length, queries, ahead, all[n]);
        for (int q = 0; q < Q; ++q) {
            int32_t of_row[4];
            totals(all[0][q], all[1][q], all[2][q], all[3][q], of_row);
            for (int n = 0; n < 4; ++n) sums[(r + n) * Q + q] += of_row[n];
        }
    }
    for (; r < count; ++r) {
        ByteSums all[Q];
        multiply_row<Format, Q>(rows + r * stride_row, length, queries, ahead, all);
        for (int q = 0; q < Q; ++q) sums[r * Q + q] += total(all[q]);
    }
}

// sums[r * stride_sums + q] += products of R rows and Q queries, over whole groups or over a shorter one. A plane at a time,
// so that one register a row and query is enough: sums of higher planes are shifted to those of the next.
template <class Format, int R, int Q, bool Whole>
inline void multiply_tile(const uint8_t* rows, int64_t stride_row, int64_t length, const int8_t* queries, int64_t plane,
                          int64_t* sums, int64_t stride_sums) {
    ByteSums sum[R][Q];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) sum[r][q] = no_sums();
    for (int p = Format::kPlanes - 1; p >= 0; --p) {
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; ++q) sum[r][q] = shift_sums<Format::kShift>(sum[r][q]);
        // Each plane calls for some of the next rows meanwhile. Where they have come for another tile of queries already,
        // asking again costs little beside this many products.
        constexpr int kAsked = (R + Format::kPlanes - 1) / Format::kPlanes;
        const uint8_t* next = rows + (p * kAsked < R ? R + p * kAsked : 0) * stride_row;
        const int8_t* at = queries + p * plane;
        for (int64_t i = 0; i < length; i += kGroup, at += Q * kGroup) {
            for (int n = 0; Whole && n < kAsked; ++n) prefetch(next + n * stride_row + i);
            for (int64_t j = 0; j < kGroup; j += kBytes) {
                Bytes x[R];
                for (int r = 0; r < R; ++r) {
                    const uint8_t* row = rows + r * stride_row + i + j;
                    x[r] = Format::plane(Whole ? load_bytes(row) : load_first_bytes(row, length - j), p);
                }
                for (int q = 0; q < Q; ++q) {
                    const Bytes y = load_bytes(at + q * kGroup + j);
                    for (int r = 0; r < R; ++r) sum[r][q] = add_products(sum[r][q], x[r], y);
                }
            }
        }
    }
    for (int q = 0; q < Q; ++q) {
        int32_t of_row[R];
        constexpr int kFours = R / 4 * 4;
        for (int r = 0; r < kFours; r += 4) totals(sum[r][q], sum[r + 1][q], sum[r + 2][q], sum[r + 3][q], of_row + r);
        for (int r = kFours; r < R; ++r) of_row[r] = total(sum[r][q]);
        for (int r = 0; r < R; ++r) sums[r * stride_sums + q] += of_row[r];
    }
}

template <class Format, int Q>
inline void multiply_rows(const uint8_t* rows, int64_t count, int64_t stride_row, int64_t length, const int8_t* queries,
                          int64_t plane, int64_t* sums, int64_t stride_sums) {
    constexpr int R = kBytes == 64 ? 6 : 3;  // R * Q sums, the rows and a query fit the registers: 32 with AVX-512, 16 before
    const int64_t whole = length / kGroup * kGroup;
    int64_t r = 0;
    const auto run = [&](auto tile, auto rest) {
        const uint8_t* from = rows + r * stride_row;
        if (whole) tile(from, stride_row, whole, queries, plane, sums + r * stride_sums, stride_sums);
        if (whole < length)
            rest(from + whole, stride_row, length - whole, queries + whole * Q, plane, sums + r * stride_sums, stride_sums);
    };
    for (; r + R <= count; r += R) run(multiply_tile<Format, R, Q, true>, multiply_tile<Format, R, Q, false>);
    for (; r < count; ++r) run(multiply_tile<Format, 1, Q, true>, multiply_tile<Format, 1, Q, false>);
}

// Packed rows and the integer queries that they are multiplied with.
struct Product {
    int64_t count;
    const int8_t* queries;  // of all tiles
    int64_t q, bytes, padded;  // bytes: of a row; padded: of one plane of one query
    int64_t* sums;          // [count, q]
};

// Bytes of the rows from `begin` on, which lie in one window.
template <class Format>
inline void multiply_groups(const Product& at, const uint8_t* rows, int64_t stride_row, int64_t begin, int64_t length) {
    if (one_at_a_time(at.q, Format::kPlanes, at.bytes)) {
        const int8_t* queries = at.queries + begin * Format::kPlanes * at.q;
        const int64_t ahead = at.bytes > kWindow ? kSignAhead / kWindow * stride_row : kSignAhead;
        if (at.q == 1) multiply_each<Format, 1>(rows, at.count, stride_row, length, queries, ahead, at.sums);
        else multiply_each<Format, 2>(rows, at.count, stride_row, length, queries, ahead, at.sums);
        return;
    }
    const int64_t window = begin / kWindow * kWindow, plane = window_bytes(at.padded, window);
    const int64_t offset = window * Format::kPlanes + (begin - window);  // of a single query
    const int64_t tiles = query_tiles(at.q);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t j = at.q * tile / tiles, size = at.q * (tile + 1) / tiles - j;
        const int8_t* queries = at.queries + j * Format::kPlanes * at.padded + offset * size;
        const auto run = [&](auto multiply_some) {
            multiply_some(rows, at.count, stride_row, length, queries, plane * size, at.sums + j, at.q);
        };
        if (size == 1) run(multiply_rows<Format, 1>);
        else if (size == 2) run(multiply_rows<Format, 2>);
        else if (size == 3) run(multiply_rows<Format, 3>);
        else run(multiply_rows<Format, 4>);
    }
}

template <class Format>
inline void multiply(const Product& at, const uint8_t* rows, int64_t stride_row, int64_t bytes) {
    for (int64_t i = 0; i < at.count * at.q; ++i) at.sums[i] = 0;
    for (int64_t begin = 0; begin < bytes; begin += kWindow)
        multiply_groups<Format>(at, rows + begin, stride_row, begin, window_bytes(bytes, begin));
}

inline double row_scale(const ScanPart& part, int64_t row) {
    if (!part.scale) return 1.0;
    if (part.scale_dtype == kFloat32) return static_cast<double>(static_cast<const float*>(part.scale)[row * part.stride_scale]);
    return static_cast<double>(to_float(static_cast<const Half*>(part.scale)[row * part.stride_scale]));
}

// scores[r * q + j] += row scale * <rows[r], queries[j]>
inline void scan_packed(const ScanPart& part, int64_t first, int64_t count, int64_t q, int64_t* sums, double* scores) {
    const PackedLayout layout = packed_layout(part.dtype);
    const int64_t bytes = packed_bytes(part.width, layout.numbers);
    const Product at{count, part.queries.planes, q, bytes, padded_bytes(bytes), sums};
    const uint8_t* rows = static_cast<const uint8_t*>(part.rows) + first * part.stride_row;
    if (part.dtype == kSign) multiply<Sign>(at, rows, part.stride_row, bytes);
    else if (part.dtype == kInt4) multiply<Int4>(at, rows, part.stride_row, bytes);
    else multiply<Int8>(at, rows, part.stride_row, bytes);
    for (int64_t r = 0; r < count; ++r) {
        const double scale = row_scale(part, first + r) * layout.unit;
        for (int64_t j = 0; j < q; ++j) {
            const int64_t dot = layout.times * sums[r * q + j] - layout.minus * part.queries.sums[j];
            scores[r * q + j] += scale * (part.queries.scales[j] * static_cast<double>(dot));
        }
    }
}

}  // namespace
}  // namespace rapidin
