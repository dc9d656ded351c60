// Queries in the form that topk_scan multiplies rows with: two launches, a block a query for its largest magnitude and its
// integers' sums, then a thread for each 16 bytes of what lanes load. rapidin/ops/cuda/scan.py says which number of a row
// each place of a unit is multiplied with.
#pragma once

#include "device.h"
#include "launchers.h"

namespace rapidin {
namespace {

constexpr int kQueryThreads = 256, kQueryWarps = kQueryThreads / 32;
constexpr int kUnitBytes = 64;
constexpr int kDigits = 3, kDigitBits = 7;  // of a query beside packed rows with blocks

// The largest integer of a query beside packed rows: rapidin/ops/gpu_scan.py has the same.
__host__ __device__ constexpr int integer_limit(int format, bool blocks) {
    return blocks ? 1 << 20 : format == kInt8 ? 4095 : 127;
}

__host__ __device__ constexpr int columns_of_query(int format, bool blocks) {
    return blocks ? kDigits : format == kInt4 || format == kSign ? 1 : 2;
}

__device__ __forceinline__ bool is_packed(int format) { return format == kInt8 || format == kInt4 || format == kSign; }

__device__ __forceinline__ int integer_of(float x, double inverse) {
    return static_cast<int>(rint(static_cast<double>(x) * inverse));
}

// Digit d of base 128, from -64 to 63; the last one is what is left.
__device__ __forceinline__ int digit_of(int integer, int d) {
    for (int i = 0; i < d; ++i) integer = (integer + 64) >> kDigitBits;
    return d == kDigits - 1 ? integer : ((integer + 64) & 127) - 64;
}

// The nearest float16, ties to even, of a number below 65,520.
__device__ __forceinline__ uint16_t half_bits(float x) {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size < 0x38800000u) {  // below 2^-14 a number is so many times 2^-24
        const float steps = rintf(__uint_as_float(size) * 16777216.0f);
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(steps));
    }
    return static_cast<uint16_t>(sign | (size + 0xfffu + (size >> 13 & 1) - 0x38000000u) >> 13);
}

__device__ __forceinline__ uint32_t bf16_bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

// The two terms of a float32 that a tensor core takes, the upper 19 bits of each.
__device__ __forceinline__ float tf32_of(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000u) & ~0x1fffu); }

template <class Combine, class T>
__device__ __forceinline__ T of_block(T value, T* shared, Combine combine) {
    for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
    for (int warp = 1; warp < kQueryWarps; ++warp) value = combine(value, shared[warp]);
    __syncthreads();
    return value;
}

// units_of, inverse and sums of a query. Integers: its numbers are units_of * integers; floats: they are scaled by a power of
// two, so that the largest is in [2^13, 2^14).
__global__ __launch_bounds__(kQueryThreads) void scan_sizes_kernel(ScanQueries args) {
    const int64_t query = blockIdx.x;
    const int thread = static_cast<int>(threadIdx.x);
    const float* x = args.queries + query * args.stride_query;
    auto* shared = reinterpret_cast<int64_t*>(shared_memory());
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = thread; i < args.width; i += kQueryThreads) {
        const float size = fabsf(x[i]);
        finite = finite && size <= 3.4028234663852886e38f;
        largest = size > largest ? size : largest;
    }
    // A float that is not negative is as large as its bits; what is not finite is larger than all.
    const int64_t own = finite ? static_cast<int64_t>(__float_as_uint(largest)) : 0x7fffffff;
    const int64_t found = of_block(own, shared, [](int64_t a, int64_t b) { return a > b ? a : b; });
    finite = found != 0x7fffffff;
    const double most = finite ? static_cast<double>(__uint_as_float(static_cast<uint32_t>(found))) : 0.0;
    double unit = 1.0, inverse = 0.0;
    if (is_packed(args.format)) {
        const double limit = integer_limit(args.format, args.blocks);
        inverse = most > 0.0 ? limit / most : 0.0;
        unit = most / limit;
    } else if (most > 0.0) {
        int exponent;
        frexp(most, &exponent);
        unit = ldexp(1.0, exponent - 14);
        inverse = ldexp(1.0, 14 - exponent);
    }
    if (thread == 0) {
        args.units_of[query] = finite ? unit : static_cast<double>(__uint_as_float(0x7fc00000u));
        args.inverse[query] = finite ? inverse : 0.0;
    }
    if (!is_packed(args.format)) return;
    if (!finite) inverse = 0.0;
    const auto value = [&](int64_t i) { return finite ? integer_of(x[i], inverse) : 0; };
    if (!args.blocks) {
        int64_t sum = 0;
        for (int64_t i = thread; i < args.width; i += kQueryThreads) sum += value(i);
        sum = of_block(sum, shared, [](int64_t a, int64_t b) { return a + b; });
        if (thread == 0) args.sums[query] = sum;
        return;
    }
    for (int64_t s = thread / 32; s < args.segment_count; s += kQueryWarps) {
        const int32_t* segment = args.segments + s * args.segment_ints;
        int32_t sum[kDigits] = {};
        for (int64_t i = segment[0] + thread % 32; i < segment[1]; i += 32)
            for (int d = 0; d < kDigits; ++d) sum[d] += digit_of(value(i), d);
        for (int d = 0; d < kDigits; ++d) {
            for (int step = 16; step > 0; step /= 2) sum[d] += __shfl_xor_sync(0xffffffffu, sum[d], step);
            if (thread % 32 == 0) args.segment_sums[(s * args.q + query) * kDigits + d] = sum[d];
        }
    }
}

// Four bytes of a column: number `column` of those that a query's numbers `at` have in plane `plane`.
__device__ __forceinline__ uint32_t word_of(const ScanQueries& args, const float* x, double inverse, const int32_t* at, int column,
                                            int plane) {
    const bool none = inverse == 0.0;  // all are zeros, or not finite
    if (is_packed(args.format)) {
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i) {
            int value = none || at[i] < 0 ? 0 : integer_of(x[at[i]], inverse);
            if (args.blocks) value = digit_of(value, column);
            else if (args.format == kInt8) value = column ? (value + 32) >> 6 : value - 64 * ((value + 32) >> 6);
            word |= (static_cast<uint32_t>(value) & 0xffu) << (8 * i);
        }
        return word;
    }
    const auto scaled = [&](int i) { return none || at[i] < 0 ? 0.0f : static_cast<float>(static_cast<double>(x[at[i]]) * inverse); };
    if (args.format == kFloat32) {
        const float all = scaled(0), high = tf32_of(all);
        return __float_as_uint(column ? tf32_of(all - high) : high);
    }
    uint32_t word = 0;
    for (int i = 0; i < 2; ++i) {
        float left = scaled(i);
        uint32_t bits = 0;
        if (args.format == kFloat16) {
            bits = half_bits(left);
            if (column) bits = half_bits(left - half_bits_to_float(static_cast<uint16_t>(bits)));
        } else {
            const int term = 2 * plane + column;  // of three, and zero
            for (int j = 0; j <= term && term < 3; ++j) {
                bits = bf16_bits(left);
                left -= __uint_as_float(bits << 16);
            }
        }
        word |= bits << (16 * i);
    }
    return word;
}

// A thread 16 bytes of fragments: [query tiles, units, planes, tiles, columns held, 4]. With blocks each unit ends in 4 ints
// of its step and, a column, what the block's sum is less.
__global__ __launch_bounds__(kQueryThreads) void scan_fragments_kernel(ScanQueries args) {
    const int each = columns_of_query(args.format, args.blocks);
    const int queries = args.tiles * 8 / each;  // of a tile of columns
    const int words = args.planes * args.tiles * args.columns_held * 4;  // of 16 bytes, in a unit
    const int extra = args.blocks ? 1 + 2 * args.tiles : 0;
    const int64_t total = args.query_tiles * args.units * (words + extra);
    auto* out = reinterpret_cast<Words4*>(args.fragments);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kQueryThreads + threadIdx.x; i < total;
         i += static_cast<int64_t>(gridDim.x) * kQueryThreads) {
        const int64_t unit_of_all = i / (words + extra), unit = unit_of_all % args.units, tile = unit_of_all / args.units;
        const int at = static_cast<int>(i - unit_of_all * (words + extra));
        Words4 made = {};
        if (at < words) {
            const int lane = at % 4, column = at / 4 % args.columns_held, rest = at / 4 / args.columns_held;
            const int place = rest % args.tiles * 8 + column, plane = rest / args.tiles;
            const int64_t query = tile * queries + place / each;
            if (place < queries * each && query < args.q) {
                const int element = is_packed(args.format) ? 1 : dtype_bytes(args.format), numbers = 16 / element;
                const int64_t row = args.place_planes > 1 ? unit * args.place_planes + plane : unit;
                const int32_t* places = args.places + row * (kUnitBytes / element) + lane * numbers;
                const float* x = args.queries + query * args.stride_query;
                for (int w = 0; w < 4; ++w)
                    made.w[w] = word_of(args, x, args.inverse[query], places + w * numbers / 4, place % each, plane);
            }
        } else if (at == words) {
            const int32_t* step = args.steps + unit * 4;
            for (int w = 0; w < 4; ++w) made.w[w] = static_cast<uint32_t>(step[w]);
        } else {
            const int64_t segment = args.steps[unit * 4 + 3];
            const int minus = args.format == kSign ? 1 : args.format == kInt4 ? 15 : 0;
            for (int w = 0; w < 4; ++w) {
                const int place = (at - words - 1) * 4 + w;
                const int64_t query = tile * queries + place / each;
                if (place < queries * each && query < args.q)
                    made.w[w] = static_cast<uint32_t>(minus * args.segment_sums[(segment * args.q + query) * kDigits + place % each]);
            }
        }
        out[i] = made;
    }
}

}  // namespace
}  // namespace rapidin
