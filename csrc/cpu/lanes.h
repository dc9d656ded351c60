// As many floats as the widest register holds, one token (or one example) in each lane. Nothing below moves values between
// lanes, but for the transposition of rows on their way in. Everything is in an anonymous namespace: see vec8.h.
#pragma once

#include "vec8.h"

namespace rapidin {
namespace {

#if defined(RAPIDIN_AVX512)
constexpr int kLanes = 16;
#elif defined(RAPIDIN_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes), may_alias));

// Scratch is aligned to whole registers, what the caller hands over is not.
inline Lanes& lanes_at(float* aligned) { return *reinterpret_cast<Lanes*>(aligned); }
inline const Lanes& lanes_at(const float* aligned) { return *reinterpret_cast<const Lanes*>(aligned); }

inline Lanes splat(float x) { return x - Lanes{}; }

#if defined(RAPIDIN_AVX512)

inline Lanes fma(Lanes x, Lanes y, Lanes z) { return _mm512_fmadd_ps(x, y, z); }
inline Lanes fnma(Lanes x, Lanes y, Lanes z) { return _mm512_fnmadd_ps(x, y, z); }
inline Lanes max_size(Lanes peak, Lanes x) { return _mm512_range_ps(peak, x, 0x0b); }  // the greater magnitude, without its sign

// (p[0..8), q[0..8)), with signs flipped
inline __m512 two_halves(const float* p, const float* q, __m512 signs) {
    const __m512 x = _mm512_castps256_ps512(_mm256_loadu_ps(p));
    return _mm512_xor_ps(_mm512_mask_broadcast_f32x8(x, 0xff00, _mm256_loadu_ps(q)), signs);
}
template <class T>
inline __m512 two_halves(const T* p, const T* q, __m512 signs) {
    return _mm512_xor_ps(_mm512_insertf32x8(_mm512_castps256_ps512(load8(p)), load8(q), 1), signs);
}

// to[e] = element e of four rows in each quarter: x[r] = (row r of the first four, row r of the second four)[0..8)
inline void transpose_quarters(__m512 x0, __m512 x1, __m512 x2, __m512 x3, __m512* to) {
    const __m512 low01 = _mm512_unpacklo_ps(x0, x1), high01 = _mm512_unpackhi_ps(x0, x1);
    const __m512 low23 = _mm512_unpacklo_ps(x2, x3), high23 = _mm512_unpackhi_ps(x2, x3);
    to[0] = _mm512_shuffle_ps(low01, low23, 0x44);
    to[1] = _mm512_shuffle_ps(low01, low23, 0xee);
    to[2] = _mm512_shuffle_ps(high01, high23, 0x44);
    to[3] = _mm512_shuffle_ps(high01, high23, 0xee);
}

// Rows 0 to 7 (of = 0) or 8 to 15 (of = 8): to[e] = element e in the first and third quarter, e + 4 in the others
template <class T>
inline void transpose_half(const T* const* rows, int of, int64_t first, const uint32_t* signs, __m512* to) {
    const __m512i entries = _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(signs)));
    const __m512 flips = _mm512_castsi512_ps(_mm512_and_si512(entries, _mm512_set1_epi32(INT32_MIN)));
    const auto pair = [&](int r) { return two_halves(rows[of + r] + first, rows[of + r + 4] + first, flips); };
    transpose_quarters(pair(0), pair(1), pair(2), pair(3), to);
}

inline void join_halves(const __m512* low, const __m512* high, Lanes* x) {
    for (int e = 0; e < 4; ++e) {
        x[e] = _mm512_shuffle_f32x4(low[e], high[e], 0x88);
        x[e + 4] = _mm512_shuffle_f32x4(low[e], high[e], 0xdd);
    }
}

// x[e] = elements `first + e` of all rows, e < 8, each with the sign of signs[e] flipped in
template <class T>
inline void transpose_eight(const T* const* rows, int64_t first, const uint32_t* signs, Lanes* x) {
    __m512 low[4], high[4];
    transpose_half(rows, 0, first, signs, low);
    transpose_half(rows, 8, first, signs, high);
    join_halves(low, high, x);
}

// The same, e < 16. Eight rows at a time, since where rows are a power of two apart the L1 cache holds no more of them.
template <class T>
inline void transpose_block(const T* const* rows, int64_t first, const uint32_t* signs, Lanes* x) {
    __m512 low[8], high[8];
    transpose_half(rows, 0, first, signs, low);
    transpose_half(rows, 0, first + 8, signs + 8, low + 4);
    transpose_half(rows, 8, first, signs, high);
    transpose_half(rows, 8, first + 8, signs + 8, high + 4);
    join_halves(low, high, x);
    join_halves(low + 4, high + 4, x + 8);
}

#elif defined(RAPIDIN_AVX2)

inline Lanes fma(Lanes x, Lanes y, Lanes z) { return _mm256_fmadd_ps(x, y, z); }
inline Lanes fnma(Lanes x, Lanes y, Lanes z) { return _mm256_fnmadd_ps(x, y, z); }
inline Lanes max_size(Lanes peak, Lanes x) { return _mm256_max_ps(peak, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x)); }

inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load4(const Half* p) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline __m128 load4(const BHalf* p) {
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
}

template <class T>
inline void transpose_four(const T* const* rows, int64_t first, const uint32_t* signs, Lanes* x) {
    const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(signs)));
    const __m256 flips = _mm256_castsi256_ps(_mm256_and_si256(entries, _mm256_set1_epi32(INT32_MIN)));
    const auto pair = [&](int r) {
        const __m256 both = _mm256_insertf128_ps(_mm256_castps128_ps256(load4(rows[r] + first)), load4(rows[r + 4] + first), 1);
        return _mm256_xor_ps(both, flips);
    };
    const __m256 x0 = pair(0), x1 = pair(1), x2 = pair(2), x3 = pair(3);
    const __m256 low01 = _mm256_unpacklo_ps(x0, x1), high01 = _mm256_unpackhi_ps(x0, x1);
    const __m256 low23 = _mm256_unpacklo_ps(x2, x3), high23 = _mm256_unpackhi_ps(x2, x3);
    x[0] = _mm256_shuffle_ps(low01, low23, 0x44);
    x[1] = _mm256_shuffle_ps(low01, low23, 0xee);
    x[2] = _mm256_shuffle_ps(high01, high23, 0x44);
    x[3] = _mm256_shuffle_ps(high01, high23, 0xee);
}

// x[e] = elements `first + e` of all rows, e < 8, each with the sign of signs[e] flipped in
template <class T>
inline void transpose_eight(const T* const* rows, int64_t first, const uint32_t* signs, Lanes* x) {
    transpose_four(rows, first, signs, x);
    transpose_four(rows, first + 4, signs + 4, x + 4);
}

#elif defined(RAPIDIN_NEON)

inline float32x4_t neon(Lanes x) { return reinterpret_cast<float32x4_t>(x); }
inline Lanes lanes(float32x4_t x) { return reinterpret_cast<Lanes>(x); }
inline Lanes fma(Lanes x, Lanes y, Lanes z) { return lanes(vfmaq_f32(neon(z), neon(x), neon(y))); }
inline Lanes fnma(Lanes x, Lanes y, Lanes z) { return lanes(vfmsq_f32(neon(z), neon(x), neon(y))); }
inline Lanes max_size(Lanes peak, Lanes x) { return lanes(vmaxnmq_f32(neon(peak), vabsq_f32(neon(x)))); }

template <class T>
inline void transpose_four(const T* const* rows, int64_t first, const uint32_t* signs, Lanes* x) {
    const uint32x4_t flips = vld1q_u32(signs);
    const auto row = [&](int r) { return flip4(load4(rows[r] + first), flips); };
    const float32x4_t x0 = row(0), x1 = row(1), x2 = row(2), x3 = row(3);
    const float64x2_t even01 = vreinterpretq_f64_f32(vtrn1q_f32(x0, x1)), odd01 = vreinterpretq_f64_f32(vtrn2q_f32(x0, x1));
    const float64x2_t even23 = vreinterpretq_f64_f32(vtrn1q_f32(x2, x3)), odd23 = vreinterpretq_f64_f32(vtrn2q_f32(x2, x3));
    x[0] = lanes(vreinterpretq_f32_f64(vtrn1q_f64(even01, even23)));
    x[1] = lanes(vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23)));
    x[2] = lanes(vreinterpretq_f32_f64(vtrn2q_f64(even01, even23)));
    x[3] = lanes(vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23)));
}

// x[e] = elements `first + e` of all rows, e < 8, each with the sign of signs[e] flipped in
template <class T>
inline void transpose_eight(const T* const* rows, int64_t first, const uint32_t* signs, Lanes* x) {
    transpose_four(rows, first, signs, x);
    transpose_four(rows, first + 4, signs + 4, x + 4);
}

#else

inline Lanes fma(Lanes x, Lanes y, Lanes z) { return x * y + z; }
inline Lanes fnma(Lanes x, Lanes y, Lanes z) { return z - x * y; }
inline Lanes max_size(Lanes peak, Lanes x) {
    const Lanes size = x < 0.0f ? -x : x;
    return size > peak ? size : peak;
}

// x[e] = elements `first + e` of all rows, e < 8, each with the sign of signs[e] flipped in
template <class T>
inline void transpose_eight(const T* const* rows, int64_t first, const uint32_t* signs, Lanes* x) {
    for (int e = 0; e < 8; ++e) {
        const auto value = [&](int l) { return to_float(rows[l][first + e]); };
        x[e] = Lanes{value(0), value(1), value(2), value(3)} * bits_to_float(float_to_bits(1.0f) | (signs[e] & kSignBit));
    }
}

#endif

constexpr uint32_t kNoSigns[8] = {};

// x[e] = element e of all rows, e < kLanes
inline void transpose_square(const float* const* rows, Lanes* x) {
#if defined(RAPIDIN_AVX2)
    for (int first = 0; first < kLanes; first += 8) transpose_eight(rows, first, kNoSigns, x + first);
#elif defined(RAPIDIN_NEON)
    transpose_four(rows, 0, kNoSigns, x);
#else
    for (int e = 0; e < kLanes; ++e) x[e] = Lanes{rows[0][e], rows[1][e], rows[2][e], rows[3][e]};
#endif
}

#ifdef RAPIDIN_AVX512
constexpr int kBlock = 16;
#else
constexpr int kBlock = 8;
template <class T>
inline void transpose_block(const T* const* rows, int64_t first, const uint32_t* signs, Lanes* x) {
    transpose_eight(rows, first, signs, x);
}
#endif

// The same for rows whose elements do not lie side by side, or of which fewer than eight are left.
template <class T>
inline void transpose_some(const T* const* rows, int64_t first, int64_t stride, const uint32_t* signs, int64_t count, Lanes* x) {
    for (int64_t e = 0; e < count; ++e)
        for (int l = 0; l < kLanes; ++l) x[e][l] = flip(to_float(rows[l][(first + e) * stride]), signs[e] & kSignBit);
}

}  // namespace
}  // namespace rapidin
