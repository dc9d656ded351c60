// Flat sketch: each row of 128 neighbouring elements goes to one group of 128 bins. Inside it element e goes to lane e ^ x
// with a sign of its own, so the neighbours that fill a register stay together and only turn round in it.
#pragma once

#include "kernels.h"
#include "vec8.h"

namespace rapidin {
namespace {

constexpr int kSignWords = kFlatRow / 32;
// How many bytes ahead memory is asked for: the scattered sums throw the processor's own prefetching off. A line with each line
// that is added, not several at once, and not into the L2 cache, where the sums are.
constexpr int64_t kAheadBytes = 8 << 10;

// What the hash says of a few rows at a time: so many words in a loop are a register each.
struct RowWords {
    static constexpr int kRows = 16;
    uint32_t lanes[kRows], signs[kSignWords][kRows];

    void set(const FlatKeys& keys, uint32_t first, int64_t count) {
        if (count >= kRows) hash_all(keys, first, kRows);
        else hash_all(keys, first, static_cast<uint32_t>(count));
    }

  private:
    inline void hash_all(const FlatKeys& keys, uint32_t first, uint32_t count) {
        for (uint32_t i = 0; i < count; ++i) lanes[i] = hash_word(keys.lanes, first + i);
        for (int j = 0; j < kSignWords; ++j)
            for (uint32_t i = 0; i < count; ++i) signs[j][i] = hash_word(keys.signs[j], first + i);
    }
};

#ifdef RAPIDIN_AVX512

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
template <class T>
inline __m512 load16(const T* p) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(load8(p)), load8(p + 8), 1);
}

template <class T>
RAPIDIN_INLINE inline void flat_row(const T* x, const RowWords& words, int i, float* sums) {
    const uint32_t lanes = words.lanes[i] & (kFlatRow - 1), group = lanes & ~15u;
    const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i turn = _mm512_xor_si512(iota, _mm512_set1_epi32(static_cast<int>(lanes & 15u)));
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    const auto add = [&](uint32_t e, uint32_t bits) {
        if (e * sizeof(T) % 64 == 0) prefetch_once(x + e + kAheadBytes / sizeof(T));
        const __m512i value = _mm512_castps_si512(load16(x + e));
        const __m512i flipped = _mm512_mask_xor_epi32(value, static_cast<__mmask16>(bits), value, sign);
        float* sum = sums + (e ^ group);
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_permutexvar_ps(turn, _mm512_castsi512_ps(flipped))));
    };
    for (uint32_t j = 0; j < kSignWords; ++j) {
        add(32 * j, words.signs[j][i]);
        add(32 * j + 16, words.signs[j][i] >> 16);
    }
}

#else

template <class T>
RAPIDIN_INLINE inline void flat_row(const T* x, const RowWords& words, int i, float* sums) {
    const uint32_t lanes = words.lanes[i] & (kFlatRow - 1), group = lanes & ~7u;
    const XorLanes turn(lanes & 7u);
    const auto add = [&](uint32_t e, Vec8 signed_x) {
        if (e * sizeof(T) % 64 == 0) prefetch_once(x + e + kAheadBytes / sizeof(T));
        float* sum = sums + (e ^ group);
        store8(sum, add8(load8(sum), turn(signed_x)));
    };
    for (uint32_t e = 0; e < kFlatRow; e += 32) {
        const uint32_t bits = words.signs[e / 32][i];
        add(e, flip8<0>(load8(x + e), bits));
        add(e + 8, flip8<8>(load8(x + e + 8), bits));
        add(e + 16, flip8<16>(load8(x + e + 16), bits));
        add(e + 24, flip8<24>(load8(x + e + 24), bits));
    }
}

#endif

template <class T>
void flat_run(const FlatRun& run, const FlatGroups& groups, const FlatKeys& keys, float* sums) {
    const T* x = static_cast<const T*>(run.data);
    const auto sums_of = [&](int64_t row) {
        const uint32_t group = groups.turned[row] + groups.rotation;
        return sums + static_cast<int64_t>(group < groups.groups ? group : group - groups.groups) * kFlatRow;
    };
    RowWords words;
    const int64_t rows = (run.length + kFlatRow - 1) / kFlatRow, whole = run.length / kFlatRow;
    for (int64_t row = 0; row < rows; ++row) {
        const int i = static_cast<int>(row % RowWords::kRows);
        if (i == 0) words.set(keys, run.first_row + static_cast<uint32_t>(row), rows - row);
        if (row < whole) {
            flat_row(x + row * kFlatRow, words, i, sums_of(row));
        } else {
            float padded[kFlatRow] = {};
            copy_floats(x + row * kFlatRow, 1, run.length - row * kFlatRow, padded);
            flat_row(padded, words, i, sums_of(row));
        }
    }
}

void flat_rows(const FlatRun& run, const FlatGroups& groups, const FlatKeys& keys, float* sums) {
    if (run.dtype == kFloat32) flat_run<float>(run, groups, keys, sums);
    else if (run.dtype == kFloat16) flat_run<Half>(run, groups, keys, sums);
    else flat_run<BHalf>(run, groups, keys, sums);
}

void flat_narrow(const FlatRun& run, int64_t width, const FlatKeys& keys, float* sums) {
    for (int64_t begin = 0; begin < run.length; begin += width) {
        const int64_t length = run.length - begin < width ? run.length - begin : width;
        const uint32_t index = run.first_row + static_cast<uint32_t>(begin / width);
        float x[kFlatRow];
        copy_floats(run.data, run.dtype, begin, 1, length, x);
        const uint32_t lanes = hash_word(keys.lanes, index) & static_cast<uint32_t>(width - 1);
        for (uint32_t e = 0; e < length; ++e) {
            const uint32_t minus = hash_word(keys.signs[e / 32], index) >> (e % 32) & 1u;
            sums[e ^ lanes] += flip(x[e], minus << 31);
        }
    }
}

}  // namespace
}  // namespace rapidin
