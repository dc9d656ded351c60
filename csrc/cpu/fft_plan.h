// How a Fourier transform of a power of two is cut into passes.
#pragma once

#include <cstdint>

namespace rapidin {

// The first pass takes points k / radix[0] apart and leaves radix[0] transforms of k / radix[0] neighbours, and so on.
// Nothing is put back in order: frequency w comes out at order[w].
struct FftPlan {
    static constexpr int64_t kMin = 16, kMax = 8192;
    static constexpr int kMaxPasses = 5;
    int64_t k;
    int passes;
    int radix[kMaxPasses];              // 8 or 4
    const float* twiddles[kMaxPasses];  // [n / radix, radix - 1] complex for a pass of n points; the last pass needs none
    int leg_bits;                       // log2(k / radix[0])
    const uint32_t* order;              // [k]
};

}  // namespace rapidin
