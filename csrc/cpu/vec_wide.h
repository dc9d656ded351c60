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
inline float sum_wide(Wide x) {
    return sum8(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
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

#endif

}  // namespace
}  // namespace rapidin
