// The tensor cores' products. In all of them a lane 4 g + t of a warp holds words of 4 bytes:
//   a[0], a[2] of row g and a[1], a[3] of row g + 8 (16 rows); b[0], b[1] of column g (8 columns);
//   d[0], d[1] = columns 2t, 2t + 1 of row g; d[2], d[3] = the same of row g + 8.
// a[0], a[1] and b[0] are the numbers at word t of the first half, a[2], a[3] and b[1] at word t of the second. As a sum
// may take its numbers in any order, any words will do as long as a's and b's are of the same numbers.
#pragma once

#include "device.h"

namespace rapidin {
namespace {

#if defined(__CUDACC__)

#define RAPIDIN_MMA(name, sum, constraint, shape, types)                                                                     \
    __device__ __forceinline__ void name(sum(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {                         \
        asm volatile("mma.sync.aligned." shape ".row.col." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "           \
                     "{%0, %1, %2, %3};"                                                                                     \
                     : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                    \
    }

RAPIDIN_MMA(mma_f16, float, "f", "m16n8k16", "f32.f16.f16.f32")
RAPIDIN_MMA(mma_bf16, float, "f", "m16n8k16", "f32.bf16.bf16.f32")
RAPIDIN_MMA(mma_tf32, float, "f", "m16n8k8", "f32.tf32.tf32.f32")
RAPIDIN_MMA(mma_s8, int32_t, "r", "m16n8k32", "s32.s8.s8.s32")
RAPIDIN_MMA(mma_u8, int32_t, "r", "m16n8k32", "s32.u8.s8.s32")
#undef RAPIDIN_MMA

#else

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulated_mma(d, a, b, kMmaF16); }
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulated_mma(d, a, b, kMmaBF16); }
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulated_mma(d, a, b, kMmaTF32); }
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulated_mma(d, a, b, false); }
inline void mma_u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulated_mma(d, a, b, true); }

#endif

}  // namespace
}  // namespace rapidin
