// The keyed hash behind every sketch: words, signs and permutations from (seed, stream, index).
// One definition for host and device; docs/reference/sketch.md states it in words, tests/ops/vectors/hash.json in numbers.
// Functions are `static`: a unit built for AVX2 must not lend its copy to the portable one.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RAPIDIN_HD __host__ __device__ __forceinline__
#else
#define RAPIDIN_HD inline
#endif

namespace rapidin {

// Streams of a TensorSketch (matrix gradient) and of a flat sketch.
enum Stream : uint32_t {
    kOutBins = 0,
    kOutSigns = 1,
    kInBins = 2,
    kInSigns = 3,
    kFlatPool = 8,
    kFlatTurn = 9,
    kFlatRotation = 10,
    kFlatLane = 11,
    kFlatSigns = 12,  // and the streams after it: one for each 32 elements of a row
};

constexpr int kFlatRow = 128;  // elements of a flat sketch's row, where dim is a multiple of it
constexpr int kFlatPoolSize = 16;

// "lowbias32" (Chris Wellons): a bijection of 32-bit words.
static RAPIDIN_HD uint32_t mix32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

// What (seed, stream) contribute to a word, so that a loop over indices pays for it once.
struct StreamKey {
    uint32_t a, b;
};

static RAPIDIN_HD StreamKey stream_key(uint64_t seed, uint32_t stream) {
    const uint32_t s0 = static_cast<uint32_t>(seed), s1 = static_cast<uint32_t>(seed >> 32);
    const uint32_t a = mix32(s0 + 0x9E3779B9u * (2u * stream + 1u));
    return {a, mix32((s1 ^ a) + 0x85EBCA6Bu)};
}

static RAPIDIN_HD uint32_t hash_word(StreamKey key, uint32_t index) {
    return mix32(mix32(index ^ key.a) + key.b);
}

// A table entry: a bin (or an index within a chunk) with the sign in the top bit, 1 = minus.
constexpr uint32_t kSignBit = 0x80000000u;

}  // namespace rapidin
