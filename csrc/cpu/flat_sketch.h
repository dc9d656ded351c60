// Flat sketch: each row of 128 neighbouring elements goes to one group of 128 bins. Inside it element e goes to
// lane e ^ x with a sign of its own, so eight neighbours stay eight neighbours and only turn round in a register.
#pragma once

#include "kernels.h"
#include "vec8.h"

namespace rapidin {
namespace {

constexpr int64_t kRowsAhead = 6;

template <class T>
inline void flat_row(const T* x, uint32_t lanes, const uint32_t* signs, float* sums) {
    const XorLanes turn(lanes & 7u);
    const uint32_t group = lanes & ~7u;
    for (uint32_t e = 0; e < kFlatRow; e += 8) {
        float* sum = sums + (e ^ group);
        store8(sum, add8(load8(sum), turn(flip8(load8(x + e), signs[e / 32] >> (e % 32)))));
    }
}

inline void prefetch_row(const FlatRow& row) {
#if defined(__GNUC__)
    if (!row.data) return;
    const int bytes = row.length * (row.dtype == kFloat32 ? 4 : 2);
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row.data + i);
#endif
}

void flat_rows(const FlatRow* rows, int64_t count, StreamKey lane_key, const StreamKey* sign_keys, float* sums) {
    for (int64_t i = 0; i < count; ++i, sums += kFlatRow) {
        if (i + kRowsAhead < count) prefetch_row(rows[i + kRowsAhead]);
        const FlatRow& row = rows[i];
        if (!row.data) continue;
        const uint32_t lanes = hash_word(lane_key, row.index) & (kFlatRow - 1);
        uint32_t signs[kFlatRow / 32];
        for (int j = 0; j < kFlatRow / 32; ++j) signs[j] = hash_word(sign_keys[j], row.index);
        if (row.length < kFlatRow) {
            float padded[kFlatRow] = {};
            copy_floats(row.data, row.dtype, 0, 1, row.length, padded);
            flat_row(padded, lanes, signs, sums);
        } else if (row.dtype == kFloat32) {
            flat_row(reinterpret_cast<const float*>(row.data), lanes, signs, sums);
        } else if (row.dtype == kFloat16) {
            flat_row(reinterpret_cast<const Half*>(row.data), lanes, signs, sums);
        } else {
            flat_row(reinterpret_cast<const BHalf*>(row.data), lanes, signs, sums);
        }
    }
}

void flat_narrow(const FlatRow* rows, int64_t count, int64_t width, uint64_t seed, float* sums) {
    const StreamKey lane_key = stream_key(seed, kFlatLane);
    StreamKey sign_keys[2] = {stream_key(seed, kFlatSigns), stream_key(seed, kFlatSigns + 1)};
    for (const FlatRow* row = rows; row < rows + count; ++row) {
        float x[kFlatRow];
        copy_floats(row->data, row->dtype, 0, 1, row->length, x);
        const uint32_t lanes = hash_word(lane_key, row->index) & static_cast<uint32_t>(width - 1);
        for (int32_t e = 0; e < row->length; ++e) {
            const uint32_t minus = hash_word(sign_keys[e / 32], row->index) >> (e % 32) & 1u;
            sums[static_cast<uint32_t>(e) ^ lanes] += flip(x[e], minus << 31);
        }
    }
}

}  // namespace
}  // namespace rapidin
