// Flat sketch: each row of 128 neighbouring elements goes to one group of 128 bins. Inside it element e goes to
// lane e ^ x with a sign of its own, so eight neighbours stay eight neighbours and only turn round in a register.
#pragma once

#include "kernels.h"
#include "vec8.h"

namespace rapidin {
namespace {

template <class T>
inline void flat_row(const T* x, uint32_t lanes, const uint32_t* signs, float* sums) {
    const XorLanes turn(lanes & 7u);
    const uint32_t group = lanes & ~7u;
    const auto add = [&](uint32_t e, Vec8 signed_x) {
        float* sum = sums + (e ^ group);
        store8(sum, add8(load8(sum), turn(signed_x)));
    };
    for (uint32_t e = 0; e < kFlatRow; e += 32) {
        const uint32_t bits = signs[e / 32];
        add(e, flip8<0>(load8(x + e), bits));
        add(e + 8, flip8<8>(load8(x + e + 8), bits));
        add(e + 16, flip8<16>(load8(x + e + 16), bits));
        add(e + 24, flip8<24>(load8(x + e + 24), bits));
    }
}

void flat_rows(const FlatRow* rows, int64_t count, uint64_t seed, float* sums) {
    uint32_t key_a[8] = {}, key_b[8] = {};  // streams kFlatLane, kFlatSigns, ... + 3
    for (uint32_t i = 0; i < 1 + kFlatRow / 32; ++i) {
        const StreamKey key = stream_key(seed, kFlatLane + i);
        key_a[i] = key.a;
        key_b[i] = key.b;
    }
    for (int64_t i = 0; i < count; ++i) {
        const FlatRow& row = rows[i];
        float* sum = sums + static_cast<int64_t>(row.group) * kFlatRow;
        uint32_t words[8];
        hash8(key_a, key_b, row.index, words);
        const uint32_t lanes = words[0] & (kFlatRow - 1);
        const uint32_t* signs = words + 1;
        if (row.length < kFlatRow) {
            float padded[kFlatRow] = {};
            copy_floats(row.data, row.dtype, 0, 1, row.length, padded);
            flat_row(padded, lanes, signs, sum);
        } else if (row.dtype == kFloat32) {
            flat_row(reinterpret_cast<const float*>(row.data), lanes, signs, sum);
        } else if (row.dtype == kFloat16) {
            flat_row(reinterpret_cast<const Half*>(row.data), lanes, signs, sum);
        } else {
            flat_row(reinterpret_cast<const BHalf*>(row.data), lanes, signs, sum);
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
