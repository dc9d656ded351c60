// What linear_sketch's two kernels share: the rows of a side and how they are read.
#pragma once

#include "device.h"

namespace rapidin {

// One side: rows [batch, tokens, n] and where their elements go.
struct LinearSide {
    const void* data;
    int dtype;
    int aligned;  // 16-byte loads may be used
    int n;
    int64_t stride_batch, stride_token, stride_element;
    const uint32_t* table;  // where elements are staged, and whence bins read them: what linear_sketch_table made
    // A preconditioner's term CS(U) c, which the kernel up to 512 adds: null where there is none.
    const uint32_t* of_basis;  // CS(U) as operands, see LowRankTerm in launchers.h
    const float *along, *gain;
    int rank;
};

struct LinearArgs {
    LinearSide sides[2];  // grads (rows of a plane), inputs (its columns)
    int tokens;
    int block_tokens;  // a multiple of a tile's
    float* partial;        // [splits, batch, k]
};

// Some elements of a row (8 or 16 bytes) from element `element` on, zeros beyond its end.
template <int Bytes, int Elements = 16 / Bytes>
__device__ __forceinline__ Words4 load_row(const LinearSide& side, int64_t offset, int element, bool live) {
    static_assert(Bytes * Elements == 8 || Bytes * Elements == 16);
    Words4 words = {{0, 0, 0, 0}};
    if (!live || element >= side.n) return words;
    if (side.aligned && element + Elements <= side.n) {
        const char* at = static_cast<const char*>(side.data) + (offset + element) * Bytes;
        if constexpr (Bytes * Elements == 16) return load_streamed(at);
        const Words2 half = load_streamed2(at);
        return {{half.w[0], half.w[1], 0, 0}};
    }
#pragma unroll
    for (int i = 0; i < Elements; ++i) {
        if (element + i >= side.n) break;
        const int64_t at = offset + (element + i) * side.stride_element;
        if constexpr (Bytes == 4) words.w[i] = static_cast<const uint32_t*>(side.data)[at];
        else words.w[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(side.data)[at]) << (i % 2 * 16);
    }
    return words;
}

}  // namespace rapidin
