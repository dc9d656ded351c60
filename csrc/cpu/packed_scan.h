// Integer products of packed rows and integer queries, laid out as packed.h says.
#pragma once

#include "kernels.h"
#include "packed.h"
#include "vec_bytes.h"

namespace rapidin {
namespace {

// What differs between the packed dtypes: their planes, and the shift that brings sums of plane p + 1 to those of p.
struct Sign {
    static constexpr int kPlanes = 8, kShift = -1;
    template <int P>
    static Bytes plane(Bytes x) {
        return and_bytes(x, 1 << P);
    }
};
struct Int4 {
    static constexpr int kPlanes = 2, kShift = 0;
    template <int P>
    static Bytes plane(Bytes x) {
        return P == 0 ? and_bytes(x, 15) : high_nibbles(x);
    }
};
struct Int8 {
    static constexpr int kPlanes = 2, kShift = 6;
    template <int P>
    static Bytes plane(Bytes x) {
        return xor_bytes(x, 128);
    }
};

// Calls body(bytes, i) for the groups of `length` bytes at `row`; the last one padded with zeros.
template <class Body>
inline void for_groups(const uint8_t* row, int64_t length, Body body) {
    int64_t i = 0;
    for (; i + kGroup <= length; i += kGroup) body(row + i, i);
    if (i < length) {
        uint8_t padded[kGroup] = {};
        memcpy(padded, row + i, static_cast<size_t>(length - i));
        body(padded, i);
    }
}

// sums[p][q] += products of plane p, for planes P and above.
template <class Format, int Q, int P = 0>
inline void add_planes(Bytes x, const int8_t* queries, int64_t plane, ByteSums (*sums)[Q]) {
    if constexpr (P < Format::kPlanes) {
        const Bytes y = Format::template plane<P>(x);
        for (int q = 0; q < Q; ++q) sums[P][q] = add_products(sums[P][q], y, load_bytes(queries + P * plane + q * kGroup));
        add_planes<Format, Q, P + 1>(x, queries, plane, sums);
    }
}

// One row, all planes at once: each byte of the row is loaded once. sums[q] += products over at most kWindow bytes.
template <class Format, int Q>
inline void multiply_row(const uint8_t* row, int64_t length, const int8_t* queries, int64_t plane, int64_t* sums) {
    ByteSums of_plane[Format::kPlanes][Q];
    for (auto& each : of_plane)
        for (ByteSums& sum : each) sum = no_sums();
    for_groups(row, length, [&](const uint8_t* group, int64_t i) {
        for (int j = 0; j < kGroup; j += kBytes)
            add_planes<Format, Q>(load_bytes(group + j), queries + i * Q + j, plane, of_plane);
    });
    for (int q = 0; q < Q; ++q) {
        ByteSums sum = of_plane[Format::kPlanes - 1][q];
        for (int p = Format::kPlanes - 2; p >= 0; --p) sum = add_sums(shift_sums<Format::kShift>(sum), of_plane[p][q]);
        sums[q] += total(sum);
    }
}

// sum[r][q], shifted, += products of plane P
template <class Format, int R, int Q, int P>
inline void add_plane(const uint8_t* rows, int64_t stride_row, int64_t length, const int8_t* queries, ByteSums (*sum)[Q]) {
    const auto add = [&](const uint8_t* const* group, int64_t i) {
        for (int j = 0; j < kGroup; j += kBytes) {
            Bytes x[R];
            for (int r = 0; r < R; ++r) x[r] = Format::template plane<P>(load_bytes(group[r] + j));
            for (int q = 0; q < Q; ++q) {
                const Bytes y = load_bytes(queries + i * Q + q * kGroup + j);
                for (int r = 0; r < R; ++r) sum[r][q] = add_products(sum[r][q], x[r], y);
            }
        }
    };
    const uint8_t* group[R];
    int64_t i = 0;
    for (; i + kGroup <= length; i += kGroup) {
        for (int r = 0; r < R; ++r) group[r] = rows + r * stride_row + i;
        add(group, i);
    }
    if (i < length) {
        uint8_t padded[R][kGroup] = {};
        for (int r = 0; r < R; ++r) {
            memcpy(padded[r], rows + r * stride_row + i, static_cast<size_t>(length - i));
            group[r] = padded[r];
        }
        add(group, i);
    }
}

template <class Format, int R, int Q, int P = Format::kPlanes - 1>
inline void add_planes_down(const uint8_t* rows, int64_t stride_row, int64_t length, const int8_t* queries, int64_t plane,
                            ByteSums (*sum)[Q]) {
    add_plane<Format, R, Q, P>(rows, stride_row, length, queries + P * plane, sum);
    if constexpr (P > 0) {
        for (int r = 0; r < R; ++r)
            for (int q = 0; q < Q; ++q) sum[r][q] = shift_sums<Format::kShift>(sum[r][q]);
        add_planes_down<Format, R, Q, P - 1>(rows, stride_row, length, queries, plane, sum);
    }
}

// sums[r * stride_sums + q] += products of R rows and Q queries over at most kWindow bytes. A plane at a time, so that
// one register a row and query is enough: sums of higher planes are shifted to those of the next.
template <class Format, int R, int Q>
inline void multiply_tile(const uint8_t* rows, int64_t stride_row, int64_t length, const int8_t* queries, int64_t plane,
                          int64_t* sums, int64_t stride_sums) {
    ByteSums sum[R][Q];
    for (auto& each : sum)
        for (ByteSums& one : each) one = no_sums();
    add_planes_down<Format, R, Q>(rows, stride_row, length, queries, plane, sum);
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) sums[r * stride_sums + q] += total(sum[r][q]);
}

template <class Format, int Q>
inline void multiply_rows(const uint8_t* rows, int64_t count, int64_t stride_row, int64_t length, const int8_t* queries,
                          int64_t plane, int64_t* sums, int64_t stride_sums) {
    constexpr int R = kBytes == 64 ? 4 : 2;  // sums that fit the registers: 32 with AVX-512, 16 before
    int64_t r = 0;
    for (; r + R <= count; r += R)
        multiply_tile<Format, R, Q>(rows + r * stride_row, stride_row, length, queries, plane, sums + r * stride_sums, stride_sums);
    for (; r < count; ++r)
        multiply_tile<Format, 1, Q>(rows + r * stride_row, stride_row, length, queries, plane, sums + r * stride_sums, stride_sums);
}

// sums [count, q] of products over the whole rows
template <class Format>
inline void multiply(const ScanPart& part, int64_t first, int64_t count, int64_t q, int64_t* sums) {
    const int64_t bytes = packed_bytes(part.width, packed_layout(part.dtype).numbers);
    const int64_t plane_bytes = (bytes + kGroup - 1) / kGroup * kGroup;
    const uint8_t* rows = static_cast<const uint8_t*>(part.rows) + first * part.stride_row;
    for (int64_t i = 0; i < count * q; ++i) sums[i] = 0;
    if (q <= 2) {
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t begin = 0; begin < bytes; begin += kWindow) {
                const int64_t length = bytes - begin < kWindow ? bytes - begin : kWindow;
                const uint8_t* row = rows + r * part.stride_row + begin;
                const int8_t* queries = part.queries.planes + begin * q;
                if (q == 1) multiply_row<Format, 1>(row, length, queries, plane_bytes, sums + r);
                else multiply_row<Format, 2>(row, length, queries, 2 * plane_bytes, sums + 2 * r);
            }
        }
        return;
    }
    const int64_t tiles = query_tiles(q);
    for (int64_t begin = 0; begin < bytes; begin += kWindow) {
        const int64_t length = bytes - begin < kWindow ? bytes - begin : kWindow;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t j = q * tile / tiles, size = q * (tile + 1) / tiles - j, plane = size * plane_bytes;
            const int8_t* queries = part.queries.planes + j * Format::kPlanes * plane_bytes + begin * size;
            switch (size) {
                case 1: multiply_rows<Format, 1>(rows + begin, count, part.stride_row, length, queries, plane, sums + j, q); break;
                case 2: multiply_rows<Format, 2>(rows + begin, count, part.stride_row, length, queries, plane, sums + j, q); break;
                case 3: multiply_rows<Format, 3>(rows + begin, count, part.stride_row, length, queries, plane, sums + j, q); break;
                case 4: multiply_rows<Format, 4>(rows + begin, count, part.stride_row, length, queries, plane, sums + j, q); break;
                case 5: multiply_rows<Format, 5>(rows + begin, count, part.stride_row, length, queries, plane, sums + j, q); break;
                default: multiply_rows<Format, 6>(rows + begin, count, part.stride_row, length, queries, plane, sums + j, q);
            }
        }
    }
}

inline double row_scale(const ScanPart& part, int64_t row) {
    if (!part.scale) return 1.0;
    if (part.scale_dtype == kFloat32) return static_cast<double>(static_cast<const float*>(part.scale)[row * part.stride_scale]);
    return static_cast<double>(to_float(static_cast<const Half*>(part.scale)[row * part.stride_scale]));
}

// scores[r * q + j] += row scale * <rows[r], queries[j]>
inline void scan_packed(const ScanPart& part, int64_t first, int64_t count, int64_t q, int64_t* sums, double* scores) {
    if (part.dtype == kSign) multiply<Sign>(part, first, count, q, sums);
    else if (part.dtype == kInt4) multiply<Int4>(part, first, count, q, sums);
    else multiply<Int8>(part, first, count, q, sums);
    const PackedLayout layout = packed_layout(part.dtype);
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
