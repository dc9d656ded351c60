// Eight floats at a time: AVX2 or NEON where the unit is built for it, plain loops elsewhere (compilers turn those into SSE or
// NEON, but do not fuse products and sums). RAPIDIN_NEON is set for the NEON units alone: every AArch64 compiler has NEON.
// Everything is in an anonymous namespace: each instruction set's unit has its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "../args.h"
#include "../sketch_hash.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define RAPIDIN_AVX2 1
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define RAPIDIN_AVX512 1
#endif
#elif defined(RAPIDIN_NEON)
#include <arm_neon.h>
#endif

// Of lambdas and functions that are called at several places, so that each call knows its count, or has its constants in registers.
#define RAPIDIN_INLINE __attribute__((always_inline))

namespace rapidin {
namespace {

struct Half {
    uint16_t bits;
};
struct BHalf {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BHalf x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
#ifdef RAPIDIN_AVX2
    return _cvtsh_ss(x.bits);
#elif defined(RAPIDIN_NEON)
    __fp16 half;
    memcpy(&half, &x.bits, 2);
    return half;
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return bits_to_float(sign | rest | 0x7f800000u);  // Inf and NaN
    // 2^112 moves the exponent's bias from 15 to 127, and makes subnormal halves normal floats.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
#endif
}

inline float power_of_two(int e) { return bits_to_float(static_cast<uint32_t>(e + 127) << 23); }
inline float flip(float x, uint32_t sign) { return bits_to_float(float_to_bits(x) ^ sign); }

#ifdef RAPIDIN_AVX2

using Vec8 = __m256;

inline Vec8 zero8() { return _mm256_setzero_ps(); }
inline Vec8 load8(const float* p) { return _mm256_loadu_ps(p); }
inline Vec8 load8(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec8 load8(const BHalf* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store8(float* p, Vec8 x) { _mm256_storeu_ps(p, x); }
inline Vec8 add8(Vec8 x, Vec8 y) { return _mm256_add_ps(x, y); }
inline Vec8 fma8(Vec8 x, Vec8 y, Vec8 z) { return _mm256_fmadd_ps(x, y, z); }
// Lane l gets its sign flipped where bit First + l of `bits` is set.
template <int First>
inline Vec8 flip8(Vec8 x, uint32_t bits) {
    const __m256i shift = _mm256_setr_epi32(31 - First, 30 - First, 29 - First, 28 - First, 27 - First, 26 - First, 25 - First, 24 - First);
    const __m256i mask = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), shift);
    return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_and_si256(mask, _mm256_set1_epi32(INT32_MIN))));
}
// A fixed order of addition: pairs at distance 4, then 2, then 1.
inline float sum8(Vec8 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Lane l of the result is lane l ^ lanes of x; lanes < 8.
struct XorLanes {
    __m256i index;
    explicit XorLanes(uint32_t lanes)
        : index(_mm256_xor_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int>(lanes)))) {}
    Vec8 operator()(Vec8 x) const { return _mm256_permutevar8x32_ps(x, index); }
};

#elif defined(RAPIDIN_NEON)

struct Vec8 {
    float32x4_t low, high;
};

inline Vec8 zero8() { return {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
inline float32x4_t load4(const float* p) { return vld1q_f32(p); }
inline float32x4_t load4(const Half* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
inline float32x4_t load4(const BHalf* p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))), 16));
}
template <class T>
inline Vec8 load8(const T* p) {
    return {load4(p), load4(p + 4)};
}
inline void store8(float* p, Vec8 x) {
    vst1q_f32(p, x.low);
    vst1q_f32(p + 4, x.high);
}
inline Vec8 add8(Vec8 x, Vec8 y) { return {vaddq_f32(x.low, y.low), vaddq_f32(x.high, y.high)}; }
inline Vec8 fma8(Vec8 x, Vec8 y, Vec8 z) { return {vfmaq_f32(z.low, x.low, y.low), vfmaq_f32(z.high, x.high, y.high)}; }
inline float32x4_t flip4(float32x4_t x, uint32x4_t signs) {
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), vandq_u32(signs, vdupq_n_u32(kSignBit))));
}
// Lane l gets its sign flipped where bit First + l of `bits` is set.
template <int First>
inline Vec8 flip8(Vec8 x, uint32_t bits) {
    const int32x4_t shift = {31 - First, 30 - First, 29 - First, 28 - First};
    const uint32x4_t all = vdupq_n_u32(bits);
    return {flip4(x.low, vshlq_u32(all, shift)), flip4(x.high, vshlq_u32(all, vsubq_s32(shift, vdupq_n_s32(4))))};
}
// A fixed order of addition: pairs at distance 4, then 2, then 1.
inline float sum8(Vec8 x) {
    const float32x4_t four = vaddq_f32(x.low, x.high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
// Lane l of the result is lane l ^ lanes of x; lanes < 8.
struct XorLanes {
    uint8x16_t low, high;  // of the result's bytes, their places among the 32 of x
    explicit XorLanes(uint32_t lanes) {
        const uint8x16_t iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        low = veorq_u8(iota, vdupq_n_u8(static_cast<uint8_t>(4 * lanes)));
        high = veorq_u8(low, vdupq_n_u8(16));
    }
    Vec8 operator()(Vec8 x) const {
        const uint8x16x2_t bytes = {{vreinterpretq_u8_f32(x.low), vreinterpretq_u8_f32(x.high)}};
        return {vreinterpretq_f32_u8(vqtbl2q_u8(bytes, low)), vreinterpretq_f32_u8(vqtbl2q_u8(bytes, high))};
    }
};

#else

struct Vec8 {
    float lane[8];
};

inline Vec8 zero8() { return Vec8{}; }
template <class T>
inline Vec8 load8(const T* p) {
    Vec8 x;
    for (int i = 0; i < 8; ++i) x.lane[i] = to_float(p[i]);
    return x;
}
inline void store8(float* p, Vec8 x) { memcpy(p, x.lane, sizeof x.lane); }
inline Vec8 add8(Vec8 x, Vec8 y) {
    for (int i = 0; i < 8; ++i) x.lane[i] += y.lane[i];
    return x;
}
inline Vec8 fma8(Vec8 x, Vec8 y, Vec8 z) {
    for (int i = 0; i < 8; ++i) z.lane[i] += x.lane[i] * y.lane[i];
    return z;
}
template <int First>
inline Vec8 flip8(Vec8 x, uint32_t bits) {
    for (int i = 0; i < 8; ++i) x.lane[i] = flip(x.lane[i], (bits << (31 - First - i)) & kSignBit);
    return x;
}
inline float sum8(Vec8 x) {
    const float* lane = x.lane;
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}
struct XorLanes {
    uint32_t lanes;
    explicit XorLanes(uint32_t lanes_) : lanes(lanes_) {}
    Vec8 operator()(Vec8 x) const {
        Vec8 y;
        for (uint32_t i = 0; i < 8; ++i) y.lane[i] = x.lane[i ^ lanes];
        return y;
    }
};

#endif

// Each asks for the memory at `p`, which need not be the program's own: into the L2 cache, since rows at the same places of pages
// push each other out of L1;
inline void prefetch(const void* p) {
#ifdef __GNUC__
    __builtin_prefetch(p, 0, 2);
#endif
}
// into L1, for few such rows;
inline void prefetch_soon(const void* p) {
#ifdef __GNUC__
    __builtin_prefetch(p, 0, 3);
#endif
}
// into L1 alone, for memory that is read once.
inline void prefetch_once(const void* p) {
#ifdef __GNUC__
    __builtin_prefetch(p, 0, 0);
#endif
}

// to[i] = from[i * stride], i < n
template <class T>
void copy_floats(const T* from, int64_t stride, int64_t n, float* to) {
    int64_t i = 0;
    if (stride == 1) {
        for (; i + 8 <= n; i += 8) store8(to + i, load8(from + i));
    }
    for (; i < n; ++i) to[i] = to_float(from[i * stride]);
}

inline void copy_floats(const void* data, int dtype, int64_t offset, int64_t stride, int64_t n, float* to) {
    if (dtype == kFloat32) copy_floats(static_cast<const float*>(data) + offset, stride, n, to);
    else if (dtype == kFloat16) copy_floats(static_cast<const Half*>(data) + offset, stride, n, to);
    else copy_floats(static_cast<const BHalf*>(data) + offset, stride, n, to);
}

}  // namespace
}  // namespace rapidin
