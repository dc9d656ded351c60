// The widest vector of floats of a unit: sixteen with AVX-512, else the eight of vec8.h.
#pragma once

#include "vec8.h"

namespace rapidin {
namespace {

#if defined(RAPIDIN_AVX2) && defined(__AVX512F__) && defined(__AVX512DQ__)

constexpr int kWide = 16;
using Wide = __m512;

inline Wide zero_wide() { return _mm512_setzero_ps(); }
inline Wide load_wide(const float* p) { return _mm512_loadu_ps(p); }
inline Wide load_wide(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_wide(float* p, Wide x) { _mm512_storeu_ps(p, x); }
inline Wide fma_wide(Wide x, Wide y, Wide z) { return _mm512_fmadd_ps(x, y, z); }
// Four sums for little more than the price of one. A fixed order of addition: in each quarter (0 + 2) + (1 + 3), then
// the quarters likewise.
inline void sums_wide(Wide a, Wide b, Wide c, Wide d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline float sum_wide(Wide x) {
    float sums[4];
    sums_wide(x, x, x, x, sums);
    return sums[0];
}

#else

constexpr int kWide = 8;
using Wide = Vec8;

inline Wide zero_wide() { return zero8(); }
template <class T>
inline Wide load_wide(const T* p) {
    return load8(p);
}
inline void store_wide(float* p, Wide x) { store8(p, x); }
inline Wide fma_wide(Wide x, Wide y, Wide z) { return fma8(x, y, z); }
inline float sum_wide(Wide x) { return sum8(x); }
inline void sums_wide(Wide a, Wide b, Wide c, Wide d, float* out) {
    out[0] = sum8(a), out[1] = sum8(b), out[2] = sum8(c), out[3] = sum8(d);
}

#endif

}  // namespace
}  // namespace rapidin
