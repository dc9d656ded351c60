// Products of unsigned and signed bytes, summed in 32-bit integers: AVX-512 VNNI, AVX2, NEON, or plain loops.
// A vector holds kBytes bytes. Sums are exact, so the bits are the same for every instruction set.
#pragma once

#include "vec8.h"

namespace rapidin {
namespace {

#if defined(RAPIDIN_AVX2) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

constexpr int kBytes = 64;
// Whether to multiply packed rows of blocks with three digits of a query's numbers, or to make floats of them first, which many
// queries share: digits take less time with blocks of a hundred numbers, one query or 64.
constexpr bool kDigitsAreFaster = true;
using Bytes = __m512i;
using ByteSums = __m512i;

inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
// The first n bytes, more than 0, and zeros; what lies behind them is not read.
inline Bytes load_first_bytes(const void* p, int64_t n) {
    return _mm512_maskz_loadu_epi8(n >= kBytes ? ~__mmask64{0} : (__mmask64{1} << n) - 1, p);
}
// Bytes of memory that is read once: two loads a cache line, which Zen 4's own prefetching follows better than one.
inline Bytes load_row_bytes(const void* p) {
    const __m256i* half = static_cast<const __m256i*>(p);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(half)), _mm256_loadu_si256(half + 1), 1);
}
inline Bytes and_bytes(Bytes x, uint8_t mask) { return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(mask))); }
// The low nibbles, or the high ones, which are left in place: their products fit the sums.
constexpr int kNibbleShift = -4;
inline Bytes nibbles(Bytes x, int p) { return and_bytes(x, static_cast<uint8_t>(15 << 4 * p)); }
// Of each byte the bits from `shift` on that fit the mask, as a number.
inline Bytes field(Bytes x, int shift, uint8_t mask) {
    return and_bytes(_mm512_srlv_epi16(x, _mm512_set1_epi16(static_cast<short>(shift))), mask);
}
inline Bytes xor_bytes(Bytes x, uint8_t mask) { return _mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(mask))); }
inline ByteSums no_sums() { return _mm512_setzero_si512(); }
// In assembler, since with the intrinsic GCC copies each register of sums twice. Clang does not, and would store each y.
inline ByteSums add_products(ByteSums sums, Bytes x, Bytes y) {
#ifdef __clang__
    return _mm512_dpbusd_epi32(sums, x, y);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "vm"(y));
    return sums;
#endif
}
inline ByteSums add_sums(ByteSums x, ByteSums y) { return _mm512_add_epi32(x, y); }
template <int Bits>
inline ByteSums shift_sums(ByteSums x) {  // left; right where Bits < 0
    if constexpr (Bits < 0) return _mm512_srai_epi32(x, -Bits);
    else return _mm512_slli_epi32(x, Bits);
}
inline int32_t total(ByteSums x) { return _mm512_reduce_add_epi32(x); }
// Four totals for little more than the price of one.
inline void totals(ByteSums a, ByteSums b, ByteSums c, ByteSums d, int32_t* out) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

#elif defined(RAPIDIN_AVX2)

constexpr int kBytes = 32;
constexpr bool kDigitsAreFaster = true;
using Bytes = __m256i;
using ByteSums = __m256i;

inline Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Bytes and_bytes(Bytes x, uint8_t mask) { return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>(mask))); }
inline Bytes xor_bytes(Bytes x, uint8_t mask) { return _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(mask))); }
inline Bytes field(Bytes x, int shift, uint8_t mask) {
    return and_bytes(_mm256_srl_epi16(x, _mm_cvtsi32_si128(shift)), mask);
}
inline ByteSums no_sums() { return _mm256_setzero_si256(); }
// Pairs are summed in 16 bits, which the largest operands in use just fit: 128 * 127, 15 * 128 and 255 * 64.
inline ByteSums add_products(ByteSums sums, Bytes x, Bytes y) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)));
}
inline ByteSums add_sums(ByteSums x, ByteSums y) { return _mm256_add_epi32(x, y); }
template <int Bits>
inline ByteSums shift_sums(ByteSums x) {
    if constexpr (Bits < 0) return _mm256_srai_epi32(x, -Bits);
    else return _mm256_slli_epi32(x, Bits);
}
inline int32_t total(ByteSums x) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

#elif defined(RAPIDIN_NEON)

constexpr int kBytes = 16;
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kDigitsAreFaster = true;  // by the number of instructions, not measured
#else
constexpr bool kDigitsAreFaster = false;
#endif
using Bytes = uint8x16_t;
using ByteSums = int32x4_t;

inline Bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
inline Bytes and_bytes(Bytes x, uint8_t mask) { return vandq_u8(x, vdupq_n_u8(mask)); }
inline Bytes xor_bytes(Bytes x, uint8_t mask) { return veorq_u8(x, vdupq_n_u8(mask)); }
inline Bytes field(Bytes x, int shift, uint8_t mask) {
    return and_bytes(vshlq_u8(x, vdupq_n_s8(static_cast<int8_t>(-shift))), mask);
}
inline ByteSums no_sums() { return vdupq_n_s32(0); }
inline ByteSums add_products(ByteSums sums, Bytes x, Bytes y) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(sums, x, vreinterpretq_s8_u8(y));
#else
    // Two products are summed in 16 bits, as with AVX2.
    const int8x16_t signed_y = vreinterpretq_s8_u8(y);
    const int16x8_t low = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vmovl_s8(vget_low_s8(signed_y)));
    return vpadalq_s16(sums, vmlaq_s16(low, vreinterpretq_s16_u16(vmovl_high_u8(x)), vmovl_high_s8(signed_y)));
#endif
}
inline ByteSums add_sums(ByteSums x, ByteSums y) { return vaddq_s32(x, y); }
template <int Bits>
inline ByteSums shift_sums(ByteSums x) {  // left; right where Bits < 0
    return vshlq_s32(x, vdupq_n_s32(Bits));
}
inline int32_t total(ByteSums x) { return vaddvq_s32(x); }
inline void totals(ByteSums a, ByteSums b, ByteSums c, ByteSums d, int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
}

#else

constexpr int kBytes = 16;
constexpr bool kDigitsAreFaster = false;
struct Bytes {
    uint8_t lane[kBytes];
};
struct ByteSums {
    int32_t lane[kBytes];
};

inline Bytes load_bytes(const void* p) {
    Bytes x;
    memcpy(x.lane, p, sizeof x.lane);
    return x;
}
inline Bytes and_bytes(Bytes x, uint8_t mask) {
    for (uint8_t& lane : x.lane) lane &= mask;
    return x;
}
inline Bytes xor_bytes(Bytes x, uint8_t mask) {
    for (uint8_t& lane : x.lane) lane ^= mask;
    return x;
}
inline Bytes field(Bytes x, int shift, uint8_t mask) {
    for (uint8_t& lane : x.lane) lane = static_cast<uint8_t>(lane >> shift & mask);
    return x;
}
inline ByteSums no_sums() { return ByteSums{}; }
inline ByteSums add_products(ByteSums sums, Bytes x, Bytes y) {
    for (int i = 0; i < kBytes; ++i)
        sums.lane[i] += static_cast<int16_t>(x.lane[i]) * static_cast<int16_t>(static_cast<int8_t>(y.lane[i]));
    return sums;
}
inline ByteSums add_sums(ByteSums x, ByteSums y) {
    for (int i = 0; i < kBytes; ++i) x.lane[i] += y.lane[i];
    return x;
}
template <int Bits>
inline ByteSums shift_sums(ByteSums x) {
    for (int32_t& lane : x.lane) {
        if constexpr (Bits < 0) lane >>= -Bits;
        else lane = static_cast<int32_t>(static_cast<uint32_t>(lane) << Bits);
    }
    return x;
}
inline int32_t total(ByteSums x) {
    int32_t sum = 0;
    for (int32_t lane : x.lane) sum += lane;
    return sum;
}

#endif

#if !defined(__AVX512VNNI__)
constexpr int kNibbleShift = 0;
inline Bytes nibbles(Bytes x, int p) { return field(x, 4 * p, 15); }
inline Bytes load_row_bytes(const void* p) { return load_bytes(p); }
inline Bytes load_first_bytes(const void* p, int64_t n) {
    uint8_t padded[kBytes] = {};
    if (n > 0) memcpy(padded, p, static_cast<size_t>(n < kBytes ? n : kBytes));
    return load_bytes(padded);
}
#endif

#if !defined(__AVX512VNNI__) && !defined(RAPIDIN_NEON)
inline void totals(ByteSums a, ByteSums b, ByteSums c, ByteSums d, int32_t* out) {
    out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
}
#endif

}  // namespace
}  // namespace rapidin
