// topk_scan: products of a cache's rows with a few queries on the tensor cores, and the best of them.
//
// A block of 8 warps takes 256 rows at a time, a warp 32 of them, 64 bytes of each ("a unit") at a time: a lane loads 16
// bytes of each of 4 rows, and these are the words of the tensor cores' operand as they come (scan_mma.h), so that a row
// goes from memory to its product in one step, whatever it is made of:
//   float16        the query as float16 high + low in two columns, scaled by a power of two: exact products
//   bfloat16       the query as three bfloat16 in the columns of two planes
//   float32        the row as tf32 high + low, and the query too
//   int8           the query's integers as low + 64 * high in two columns
//   int4, sign     masks of the bytes' planes; the query's integers plane by plane, in one column
// The queries' words lie in shared memory in the order in which lanes take them.
//
// A score that is not finite is computed again in double, a row at a time: high and low parts are of no use with Inf.
//
// What is kept is a 63-bit key: the score's bits in ascending order, then the row's index descending. A key is better if
// it is larger, whichever end is wanted. Blocks append keys that beat the k-th to a list of their own and cut it
// to the best k when it is full. In which order keys came does not count, since no two are equal.
#pragma once

#include <type_traits>

#include "launchers.h"
#include "mma.h"

namespace rapidin {
namespace {

constexpr int kScanWarps = 8, kScanThreads = 32 * kScanWarps;
constexpr int kMTiles = 2;                 // of 16 rows, of a warp
constexpr int kWarpRows = 16 * kMTiles, kBlockRows = kScanWarps * kWarpRows;
constexpr int kUnit = 64;                  // bytes
constexpr int kSumUnits = 32;              // that are summed in 32 bits: 2048 * 128 * 4095 fits, and floats lose little
constexpr int kTotalStride = kWarpRows + 4;  // doubles: a warp's 8 rows and 4 queries fall on different banks
constexpr int kSharedBytes = 99 << 10;     // that a block may have on sm_86 and sm_89, the least of what is supported
constexpr int kFragmentBytes = 46 << 10;   // of queries in shared memory at a time
constexpr int kMostCapacity = 2048;        // of a list of keys
constexpr int kSegmentInts = 5;
constexpr int kMergeCapacity = 2048, kMergeStep = 4;

// ---- formats ----

// kColumns: of a query; low and high where there are two. kSums: kinds of sums; kPlanes: of fragments, of which `multiply`
// takes number planes + plane.
struct ScanHalf {
    using Sum = float;
    static constexpr int kPlanes = 1, kSums = 1, kElement = 2;
    static constexpr int kColumns = 2;
    static constexpr bool kFloats = true, kSteps = false;
    __device__ static __forceinline__ void multiply(Sum (&d)[kSums][4], const uint32_t (&a)[4], const uint32_t (&b)[2], int,
                                                    int) {
        mma_f16(d[0], a, b);
    }
};

struct ScanBFloat {
    using Sum = float;
    static constexpr int kPlanes = 2, kSums = 1, kElement = 2;
    static constexpr int kColumns = 2;
    static constexpr bool kFloats = true, kSteps = false;
    __device__ static __forceinline__ void multiply(Sum (&d)[kSums][4], const uint32_t (&a)[4], const uint32_t (&b)[2], int,
                                                    int) {
        mma_bf16(d[0], a, b);
    }
};

struct ScanFloat {
    using Sum = float;
    static constexpr int kPlanes = 1, kSums = 1, kElement = 4;
    static constexpr int kColumns = 2;
    static constexpr bool kFloats = true, kSteps = false;
    __device__ static __forceinline__ void multiply(Sum (&d)[kSums][4], const uint32_t (&a)[4], const uint32_t (&b)[2], int,
                                                    int) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            high[i] = (a[i] + 0x1000u) & 0xffffe000u;  // the nearest tf32; the rest is exact
            // Of its 12 bits the product takes 11: to round the last one is no nearer than to cut it off, and would carry
            // into the sign what a GPU makes of NaN, 0x7fffffff. Where `high` loses a NaN so, this still has it.
            low[i] = __float_as_uint(__uint_as_float(a[i]) - __uint_as_float(high[i]));
        }
        mma_tf32(d[0], high, b);
        mma_tf32(d[0], low, b);
    }
};

struct ScanInt8 {
    using Sum = int32_t;
    static constexpr int kPlanes = 1, kSums = 1, kElement = 1, kNumbers = 1;
    static constexpr int kColumns = 2;
    static constexpr bool kFloats = false, kSteps = false;
    static constexpr double kUnitOf = 1.0;
    static constexpr int kTimes = 1, kMinus = 0;
    __device__ static __forceinline__ void multiply(Sum (&d)[kSums][4], const uint32_t (&a)[4], const uint32_t (&b)[2], int,
                                                    int) {
        mma_s8(d[0], a, b);
    }
};

struct ScanInt4 {
    using Sum = int32_t;
    static constexpr int kPlanes = 2, kSums = 1, kElement = 1, kNumbers = 2;
    static constexpr int kColumns = 1;
    static constexpr bool kFloats = false, kSteps = false;
    static constexpr double kUnitOf = 0.5;
    static constexpr int kTimes = 2, kMinus = 15;
    __device__ static __forceinline__ void multiply(Sum (&d)[kSums][4], const uint32_t (&a)[4], const uint32_t (&b)[2], int plane,
                                                    int) {
        uint32_t nibbles[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) nibbles[i] = a[i] >> (4 * plane) & 0x0f0f0f0fu;
        mma_u8(d[0], nibbles, b);
    }
};

// A bit stays where it is among `kinds` of its byte, so that sums of kind i are multiples of 2^i: fewer shifts for more sums.
template <int kinds>
struct ScanSign {
    using Sum = int32_t;
    static constexpr int kPlanes = 8, kSums = kinds, kElement = 1, kNumbers = 8;
    static constexpr int kColumns = 1;
    static constexpr bool kFloats = false, kSteps = false;
    static constexpr double kUnitOf = 1.0;
    static constexpr int kTimes = 2, kMinus = 1;
    __device__ static __forceinline__ void multiply(Sum (&d)[kSums][4], const uint32_t (&a)[4], const uint32_t (&b)[2], int plane,
                                                    int planes) {
        uint32_t bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) bits[i] = a[i] >> planes & 0x01010101u << plane;
        mma_u8(d[plane], bits, b);
    }
};

// Packed rows with blocks: a step is a plane of 64 bytes and one block, whose query is zero outside of it and has three digits
// of base 128 as its columns, which is as exact as float32.
template <class Codes, int bits>
struct ScanSteps : Codes {
    using Sum = int32_t;
    static constexpr int kPlanes = 1, kSums = 1, kColumns = 3;
    static constexpr bool kSteps = true;
    __device__ static __forceinline__ uint32_t codes(uint32_t word, int shift) {
        return bits == 8 ? word : word >> shift & (bits == 4 ? 0x0f0f0f0fu : 0x01010101u);
    }
    __device__ static __forceinline__ void multiply(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        if constexpr (bits == 8) mma_s8(d, a, b);
        else mma_u8(d, a, b);
    }
};

// ---- keys ----

__device__ __forceinline__ int64_t key_of(float score, int64_t row, bool smallest) {
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 is 0
    const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<int64_t>(smallest ? ~ascending : ascending) << 31 | (0x7fffffff - row);
}

__device__ __forceinline__ float score_of(int64_t key, bool smallest) {
    const uint32_t found = static_cast<uint32_t>(key >> 31), ascending = smallest ? ~found : found;
    return __uint_as_float(ascending & 0x80000000u ? ascending & 0x7fffffffu : ~ascending);
}

// The block's threads put keys [0, count) in shared memory in order, the best first; there must be room for the next
// power of two.
__device__ __forceinline__ void sort_keys(int64_t* keys, int count) {
    int size = 2;
    while (size < count) size *= 2;
    for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kScanThreads) keys[i] = 0;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            for (int i = static_cast<int>(threadIdx.x); i < size / 2; i += kScanThreads) {
                const int low = 2 * i - (i & (step - 1)), high = low + step;
                const int64_t x = keys[low], y = keys[high];
                if ((x < y) == ((low & run) == 0)) {
                    keys[low] = y;
                    keys[high] = x;
                }
            }
            __syncthreads();
        }
    }
}

__host__ __device__ constexpr int end_count(int ends) { return ends == 3 ? 2 : 1; }
__device__ __forceinline__ bool is_smallest(int ends, int end) { return ends == 2 || end == 1; }

// ---- products ----

template <class Format, int NT>
__host__ __device__ constexpr int query_tile() {
    return NT * 8 / Format::kColumns;
}

// Bytes of a unit's fragments; a step has 4 ints of its own besides, and one a column.
template <class Format, int NT>
__host__ __device__ constexpr int bytes_of_unit(int columns_held) {
    return Format::kPlanes * NT * columns_held * 64 + (Format::kSteps ? 16 + NT * 32 : 0);
}

// Shared memory of a block, after the fragments.
struct ScanShared {
    uint8_t* fragments;
    double* totals;   // [warps, queries, kTotalStride]
    int64_t* sorted;  // [capacity]
    int64_t* least;   // [queries * ends]
    int32_t* counts;  // [queries * ends]
};

__host__ __device__ constexpr size_t scan_shared_bytes(int64_t fragment_bytes, int64_t capacity, int queries, int ends) {
    return static_cast<size_t>(fragment_bytes + (kScanWarps * queries * kTotalStride + capacity) * 8 + queries * ends * 12);
}

__device__ __forceinline__ ScanShared scan_shared(unsigned char* memory, int64_t fragment_bytes, int64_t capacity, int queries,
                                                  int ends) {
    ScanShared shared;
    shared.fragments = memory;
    shared.totals = reinterpret_cast<double*>(memory + fragment_bytes);
    shared.sorted = reinterpret_cast<int64_t*>(shared.totals + kScanWarps * queries * kTotalStride);
    shared.least = shared.sorted + capacity;
    shared.counts = reinterpret_cast<int32_t*>(shared.least + queries * ends);
    return shared;
}

template <class Element>
__device__ __forceinline__ Words4 load_elements(const uint8_t* at, int left) {
    constexpr int kEach = static_cast<int>(sizeof(Element));
    Words4 x = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll 1
        for (int byte = 0; byte < 4 && 4 * w + byte < left; byte += kEach)
            x.w[w] |= static_cast<uint32_t>(*reinterpret_cast<const Element*>(at + 4 * w + byte)) << (8 * byte);
    }
    return x;
}

// 16 bytes of a row of which `left` are there, an element at a time.
template <class Format>
__device__ __forceinline__ Words4 load_narrow(const uint8_t* at, int left) {
    if constexpr (Format::kElement == 4) return load_elements<uint32_t>(at, left);
    else if constexpr (Format::kElement == 2) return load_elements<uint16_t>(at, left);
    else return load_elements<uint8_t>(at, left);
}

// 16 bytes from any address, of two aligned loads: both are of memory that the tensor's own lies in as long as 32 bytes of a
// row are left. The second load finds in L1 what the next lane's first has asked for.
__device__ __forceinline__ Words4 load_shifted(const uint8_t* at) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(at);
    const uint64_t aligned = address & ~static_cast<uintptr_t>(15);
    const Words4 low = load_words4(aligned), high = load_words4(aligned + 16);
    const bool by_two = address & 8, by_one = address & 4;
    const uint32_t selector = 0x3210u + 0x1111u * (static_cast<uint32_t>(address) & 3);
    uint32_t pairs[6], words[5];
#pragma unroll
    for (int i = 0; i < 6; ++i) pairs[i] = by_two ? (i < 2 ? low.w[i + 2] : high.w[i - 2]) : (i < 4 ? low.w[i] : high.w[i - 4]);
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = by_one ? pairs[i + 1] : pairs[i];
    Words4 x;
#pragma unroll
    for (int i = 0; i < 4; ++i) x.w[i] = select_bytes(words[i], words[i + 1], selector);
    return x;
}

__device__ __forceinline__ double scale_at(const void* scale, int dtype, int64_t i) {
    return scale ? static_cast<double>(load_element(scale, dtype, i)) : 1.0;
}

// Number i of a packed row with so many numbers a byte, without its scale.
template <int numbers>
__device__ __forceinline__ double number_of(const uint8_t* row, int width, int i) {
    if constexpr (numbers == 1) return static_cast<double>(static_cast<int8_t>(row[i]));
    constexpr int kGroup = kUnit * numbers;
    const int begin = i / kGroup * kGroup, left = width - begin < kGroup ? width - begin : kGroup;
    const int size = (left + numbers - 1) / numbers, plane = (i - begin) / size;
    const int code = row[begin / numbers + (i - begin) - plane * size];
    return numbers == 8 ? static_cast<double>(2 * (code >> plane & 1) - 1) : static_cast<double>(code >> (4 * plane) & 15) - 7.5;
}

// A score as the reference has it, by all lanes of a warp: for rows and queries with NaN, Inf or sums beyond float32.
template <class Format>
__device__ __forceinline__ double exact_product(const DeviceScan& args, int64_t row, int64_t query) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint8_t* numbers = args.rows + row * args.stride_row;
    const float* q = args.queries + query * args.stride_query;
    double total = 0.0;
    for (int64_t s = 0; s < args.segment_count; ++s) {
        const int32_t* segment = args.segments ? args.segments + s * kSegmentInts : nullptr;
        const int64_t begin = segment ? segment[0] : 0, end = segment ? segment[1] : args.width;
        double sum = 0.0;
        for (int64_t i = begin + lane; i < end; i += 32) {
            double x;
            if constexpr (Format::kFloats) x = static_cast<double>(load_element(numbers, args.format, i));
            else x = number_of<Format::kNumbers>(numbers, static_cast<int>(args.width), static_cast<int>(i));
            sum += x * static_cast<double>(q[i]);
        }
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        total += segment && args.scales ? sum * static_cast<double>(args.scales[row * args.stride_scales + segment[4]]) : sum;
    }
    return total;
}

// A warp's rows: where a lane's 16 bytes of the first unit are, and the sums so far, which lie in shared memory
// [queries, kTotalStride] since they are touched once in kSumUnits units.
template <class Format, int NT>
struct WarpTile {
    static constexpr int kQueries = query_tile<Format, NT>();
    static constexpr int kValues = Format::kColumns == 2 ? 1 : 2;  // of a lane, a row and 8 columns
    static constexpr int kAhead = NT * Format::kSums == 1 ? 2 : 1;  // units loaded at once
    static constexpr bool kShifts = NT < (Format::kSteps ? 2 : 4);  // where registers are left
    const uint8_t* rows[kMTiles][2];
    double* totals;
    int64_t first;  // row

    using Sums = typename Format::Sum[kMTiles][NT][Format::kSums][4];

    __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }

    // Rows past the end are the last one again, and not kept.
    __device__ __forceinline__ static int64_t within(const DeviceScan& args, int64_t row) { return row < args.n ? row : args.n - 1; }

    __device__ __forceinline__ void begin(const DeviceScan& args, int64_t first_row) {
        first = first_row;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                rows[m][h] = args.rows + within(args, first + 16 * m + 8 * h + lane() / 4) * args.stride_row + lane() % 4 * 16;
        for (int q = 0; q < kQueries; ++q) totals[q * kTotalStride + lane()] = 0.0;
        __syncwarp();
    }

    // The unit at byte `at` of rows of so many bytes, zeros where they end.
    __device__ __forceinline__ void load(Words4 (&x)[kMTiles][2], int at, int bytes, bool wide) const {
        const int left = bytes - at - lane() % 4 * 16;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (wide && left >= 16) x[m][h] = load_streamed(rows[m][h] + at);
                else if (kShifts && left >= 32) x[m][h] = load_shifted(rows[m][h] + at);
                else x[m][h] = load_narrow<Format>(rows[m][h] + at, left);
            }
    }

    __device__ __forceinline__ static void multiply(const Words4 (&x)[kMTiles][2], const uint8_t* fragments, int held, Sums& sums) {
        constexpr int kAtOnce = Format::kSums > 1 ? Format::kSums : Format::kPlanes;  // planes
#pragma unroll 1
        for (int planes = 0; planes < Format::kPlanes; planes += kAtOnce)
#pragma unroll
            for (int i = 0; i < kAtOnce * NT; ++i) {
                const int j = i % NT, p = i / NT;
                Words4 y = {};
                if (NT > 1) y = *reinterpret_cast<const Words4*>(fragments + (planes * NT + i) * 512 + lane() * 16);
                else if (lane() < held * 4) y = *reinterpret_cast<const Words4*>(fragments + (planes + p) * held * 64 + lane() * 16);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t b[2] = {y.w[2 * half], y.w[2 * half + 1]};
#pragma unroll
                    for (int m = 0; m < kMTiles; ++m) {
                        const uint32_t a[4] = {x[m][0].w[2 * half], x[m][1].w[2 * half], x[m][0].w[2 * half + 1],
                                               x[m][1].w[2 * half + 1]};
                        Format::multiply(sums[m][j], a, b, p, planes);
                    }
                }
            }
    }

    __device__ __forceinline__ static double sum_of(const typename Format::Sum (&d)[Format::kSums][4], int h, int v) {
        if constexpr (Format::kFloats) return static_cast<double>(d[0][2 * h] + d[0][2 * h + 1]);
        else if constexpr (Format::kColumns == 2) return static_cast<double>(d[0][2 * h] + 64 * d[0][2 * h + 1]);
        else {
            int32_t sum = d[0][2 * h + v];
#pragma unroll
            for (int kind = 1; kind < Format::kSums; ++kind) sum += d[kind][2 * h + v] >> kind;
            return static_cast<double>(sum);
        }
    }

    // totals += coefficient * <row, queries> over `count` units from byte `at` of the row on
    __device__ __forceinline__ void add(const DeviceScan& args, int bytes, bool wide, int at, int count, const uint8_t* fragments,
                                        int unit_bytes, int column) const {
        Sums sums = {};
        const int held = args.columns_held;
        int i = 0;
        const int left_here = wide ? bytes - at : bytes - at - 16, whole = left_here / kUnit < count ? left_here / kUnit : count;
        if (!wide) {
#pragma unroll 1
            for (; kShifts && i < whole; ++i) {
                Words4 x[kMTiles][2];
#pragma unroll
                for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h) x[m][h] = load_shifted(rows[m][h] + at + i * kUnit);
                multiply(x, fragments + i * unit_bytes, held, sums);
            }
        } else {
#pragma unroll 1
            for (; i + kAhead <= whole; i += kAhead) {
                Words4 x[kAhead][kMTiles][2];
#pragma unroll
                for (int u = 0; u < kAhead; ++u)
#pragma unroll
                    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                        for (int h = 0; h < 2; ++h) x[u][m][h] = load_streamed(rows[m][h] + at + (i + u) * kUnit);
#pragma unroll
                for (int u = 0; u < kAhead; ++u) multiply(x[u], fragments + (i + u) * unit_bytes, held, sums);
            }
        }
#pragma unroll 1
        for (; i < count; ++i) {
            Words4 x[kMTiles][2];
            load(x, at + i * kUnit, bytes, wide);
            multiply(x, fragments + i * unit_bytes, held, sums);
        }
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = 16 * m + 8 * h + lane() / 4, t = lane() % 4;
                const double coefficient =
                    args.scales ? static_cast<double>(args.scales[within(args, first + row) * args.stride_scales + column]) : 1.0;
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int v = 0; v < kValues; ++v) {
                        const int q = Format::kColumns == 2 ? 4 * j + t : 8 * j + 2 * t + v;
                        double& total = totals[q * kTotalStride + row];
                        total = __dadd_rn(total, __dmul_rn(coefficient, sum_of(sums[m][j], h, v)));
                    }
            }
    }

    // Totals become scores of this part, a row a lane, which are added to `partial` or, of the last part, kept where they
    // beat the k-th. Returns whether a list may not hold the next tile's.
    __device__ __forceinline__ bool finish(const DeviceScan& args, int64_t first_query, int queries, const ScanShared& shared,
                                           int64_t* kept) const {
        __syncwarp();
        const int ends = end_count(args.ends);
        const int64_t row = first + lane();
        const bool there = row < args.n, wanted = there && (!args.valid || args.valid[row]);
        const double scale = there ? scale_at(args.scale, args.scale_dtype, row * args.stride_scale) : 0.0;
        bool full = false;
#pragma unroll 1
        for (int number = 0; number < queries; ++number) {
            const int64_t q = first_query + number;
            double x = totals[number * kTotalStride + lane()];
            if constexpr (Format::kFloats || Format::kSteps) {
                x *= args.units_of[q];
                if constexpr (Format::kSteps) x *= Format::kUnitOf;
                uint32_t broken = __ballot_sync(0xffffffffu, there && !(fabs(x) <= 1e300));
                while (broken) {
                    const int of = __ffs(static_cast<int>(broken)) - 1;
                    broken &= broken - 1;
                    const double exact = exact_product<Format>(args, first + of, q);
                    if (lane() == of) x = exact;
                }
                x = __dmul_rn(scale, x);
            } else {  // in the order of csrc/cpu/packed_scan.h: the same bits
                const double dot = Format::kTimes * x - Format::kMinus * static_cast<double>(args.sums[q]);
                x = __dmul_rn(__dmul_rn(scale, Format::kUnitOf), __dmul_rn(args.units_of[q], dot));
            }
            double* partial = args.partial + q * args.stride_partial + row;
            if (there && !args.first_part) x = __dadd_rn(*partial, x);
            if (there && !args.last_part) *partial = x;
            if (!wanted || !args.last_part) continue;
            if (args.base) x = __dadd_rn(static_cast<double>(args.base[q * args.stride_base + row]), x);
            const float score = static_cast<float>(x);
            if (score != score) continue;
#pragma unroll 1
            for (int end = 0; end < ends; ++end) {
                const int list = number * ends + end;
                const int64_t key = key_of(score, args.first + row, is_smallest(args.ends, end));
                if (key <= shared.least[list] || (args.after && key >= args.after[q * ends + end])) continue;
                const int32_t place = atomicAdd(&shared.counts[list], 1);
                kept[list * args.capacity + place] = key;
                full = full || place + 1 + kBlockRows > args.capacity;
            }
        }
        return full;
    }
};

// Of a warp, packed rows with blocks: their codes, and sums of the block and over blocks.
template <class Format, int NT>
struct StepSums {
    using Tile = WarpTile<Format, NT>;
    Words4 x[kMTiles][2];
    int32_t sums[kMTiles][NT][4];
    float totals[kMTiles][NT][4];

    __device__ __forceinline__ void add(const Tile& tile, const DeviceScan& args, int bytes, bool wide, int count, const uint8_t* units,
                                        int unit_bytes) {
        const int held = args.columns_held, lane = Tile::lane();
#pragma unroll 1
        for (int i = 0; i < count; ++i, units += unit_bytes) {
            const int32_t* step = reinterpret_cast<const int32_t*>(units + NT * held * 64);
            const int flags = step[1];
            if (flags & kNewGroup) tile.load(x, step[0], bytes, wide);
            if (flags & kBegins) {
#pragma unroll
                for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                    for (int j = 0; j < NT; ++j)
#pragma unroll
                        for (int v = 0; v < 4; ++v) sums[m][j][v] = 0;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t a[kMTiles][4];
#pragma unroll
                for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                    for (int w = 0; w < 4; ++w) a[m][w] = Format::codes(x[m][w % 2].w[2 * half + w / 2], flags >> 8);
#pragma unroll
                for (int j = 0; j < NT; ++j) {
                    Words2 y = {};
                    if (NT > 1 || lane < held * 4)
                        y = *reinterpret_cast<const Words2*>(units + (NT > 1 ? j * 512 : 0) + lane * 16 + 8 * half);
                    const uint32_t b[2] = {y.w[0], y.w[1]};
#pragma unroll
                    for (int m = 0; m < kMTiles; ++m) Format::multiply(sums[m][j], a[m], b);
                }
            }
            if (!(flags & kEnds)) continue;
            const int32_t* minus = step + 4 + 2 * (lane % 4);
#pragma unroll
            for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int64_t row = Tile::within(args, tile.first + 16 * m + 8 * h + lane / 4);
                    const float of_block = args.scales[row * args.stride_scales + step[2]];
#pragma unroll
                    for (int j = 0; j < NT; ++j)
#pragma unroll
                        for (int v = 0; v < 2; ++v) {
                            const int32_t sum = Format::kTimes * sums[m][j][2 * h + v] - minus[8 * j + v];
                            float& total = totals[m][j][2 * h + v];
                            total = __fmaf_rn(of_block, static_cast<float>(sum), total);
                        }
                }
        }
    }

    // The tile's totals += these, which begin anew. A query's digits are in different lanes.
    __device__ __forceinline__ void flush(const Tile& tile) {
        const int lane = Tile::lane();
#pragma unroll 1
        for (int digit = 0; digit < Format::kColumns; ++digit) {
            const double weight = static_cast<double>(1 << (7 * digit));
#pragma unroll
            for (int m = 0; m < kMTiles; ++m)
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int v = 0; v < 4; ++v) {
                        const int column = 8 * j + 2 * (lane % 4) + v % 2, row = 16 * m + 8 * (v / 2) + lane / 4;
                        if (column % Format::kColumns == digit && column / Format::kColumns < Tile::kQueries)
                            tile.totals[column / Format::kColumns * kTotalStride + row] += weight * static_cast<double>(totals[m][j][v]);
                    }
            __syncwarp();
        }
        clear();
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int v = 0; v < 4; ++v) totals[m][j][v] = 0.0f;
    }
};

struct NoSums {};

// The block's threads cut lists that are longer than `limit` to their best k. Between barriers.
__device__ __forceinline__ void cut_lists(const DeviceScan& args, int64_t first_query, const ScanShared& shared, int64_t* kept, int lists,
                                          int64_t limit) {
    const int ends = end_count(args.ends);
#pragma unroll 1
    for (int list = 0; list < lists; ++list) {
        const int count = shared.counts[list];
        if (count <= limit) continue;
        int64_t* keys = kept + list * args.capacity;
        for (int i = static_cast<int>(threadIdx.x); i < count; i += kScanThreads) shared.sorted[i] = keys[i];
        sort_keys(shared.sorted, count);
        const int left = count < args.k ? count : static_cast<int>(args.k);
        for (int i = static_cast<int>(threadIdx.x); i < left; i += kScanThreads) keys[i] = shared.sorted[i];
        if (threadIdx.x == 0) {
            shared.counts[list] = left;
            // The k-th best of some rows bounds the k-th best of all, so blocks may tell each other.
            if (left == args.k) {
                auto* of_all = reinterpret_cast<unsigned long long*>(args.least + first_query * ends + list);
                const int64_t own = shared.sorted[left - 1];
                const int64_t others = static_cast<int64_t>(atomicMax(of_all, static_cast<unsigned long long>(own)));
                shared.least[list] = others > own ? others : own;
            }
        }
        __syncthreads();
    }
}

template <class Format, int NT>
__global__ __launch_bounds__(kScanThreads, 2) void topk_scan_kernel(DeviceScan args, int fragment_units) {
    const int ends = end_count(args.ends), warp = static_cast<int>(threadIdx.x) / 32;
    const int64_t first_query = static_cast<int64_t>(blockIdx.x) * query_tile<Format, NT>();
    const int64_t rest = args.q - first_query;
    const int queries = rest < query_tile<Format, NT>() ? static_cast<int>(rest) : query_tile<Format, NT>(), lists = queries * ends;
    const int unit_bytes = bytes_of_unit<Format, NT>(args.columns_held), units = static_cast<int>(args.units);
    const ScanShared shared = scan_shared(shared_memory(), fragment_units * unit_bytes, args.capacity, query_tile<Format, NT>(), ends);
    const uint8_t* fragments = args.fragments + static_cast<int64_t>(blockIdx.x) * units * unit_bytes;
    const int64_t first_list = (static_cast<int64_t>(blockIdx.y) * args.q + first_query) * ends;
    int64_t* kept = args.kept + first_list * args.capacity;

    if (args.last_part) {
        for (int i = static_cast<int>(threadIdx.x); i < lists; i += kScanThreads) {
            shared.counts[i] = args.counts[first_list + i];
            shared.least[i] = load_relaxed(args.least + first_query * ends + i);
        }
    }
    __syncthreads();
    if (args.last_part) cut_lists(args, first_query, shared, kept, lists, args.capacity - kBlockRows);
    __syncthreads();

    int bytes = static_cast<int>(args.width) * Format::kElement;
    if constexpr (!Format::kFloats) {
        const int width = static_cast<int>(args.width), numbers = Format::kNumbers, group = kUnit * numbers;
        bytes = width / group * kUnit + (width % group + numbers - 1) / numbers;
    }
    const bool wide = ((reinterpret_cast<uintptr_t>(args.rows) | static_cast<uintptr_t>(args.stride_row)) & 15) == 0;
    const int tiles = static_cast<int>((args.n + kBlockRows - 1) / kBlockRows);
    bool loaded = false;
    for (int number = static_cast<int>(blockIdx.y); number < tiles; number += static_cast<int>(gridDim.y)) {
        WarpTile<Format, NT> tile;
        tile.totals = shared.totals + warp * query_tile<Format, NT>() * kTotalStride;
        tile.begin(args, static_cast<int64_t>(number) * kBlockRows + warp * kWarpRows);
        int segment = 0;
        using Steps = std::conditional_t<Format::kSteps, StepSums<Format, NT>, NoSums>;
        [[maybe_unused]] Steps steps;
        if constexpr (Format::kSteps) steps.clear();
        for (int chunk = 0; chunk < units; chunk += fragment_units) {
            const int chunk_end = chunk + fragment_units < units ? chunk + fragment_units : units;
            if (!loaded || fragment_units < units) {
                __syncthreads();
                const Words4* from = reinterpret_cast<const Words4*>(fragments + static_cast<int64_t>(chunk) * unit_bytes);
                Words4* to = reinterpret_cast<Words4*>(shared.fragments);
                const int words = (chunk_end - chunk) * unit_bytes / 16;
                for (int i = static_cast<int>(threadIdx.x); i < words; i += kScanThreads) to[i] = from[i];
                __syncthreads();
                loaded = true;
            }
            if constexpr (Format::kSteps) {
                steps.add(tile, args, bytes, wide, chunk_end - chunk, shared.fragments, unit_bytes);
                steps.flush(tile);
            } else {
                for (int unit = chunk; unit < chunk_end;) {
                    int first = 0, before = 0, end = units, column = 0;
                    if (args.segments) {
                        const int32_t* at = args.segments + segment * kSegmentInts;
                        first = at[2], before = at[3], column = at[4];
                        end = segment + 1 < args.segment_count ? at[kSegmentInts + 3] : units;
                    }
                    const int stop = end < chunk_end ? end : chunk_end, count = stop - unit < kSumUnits ? stop - unit : kSumUnits;
                    tile.add(args, bytes, wide, (first + unit - before) * kUnit, count, shared.fragments + (unit - chunk) * unit_bytes,
                             unit_bytes, column);
                    unit += count;
                    segment += unit == end;
                }
            }
        }
        const bool full = tile.finish(args, first_query, queries, shared, kept);
        if (args.last_part && __syncthreads_or(full)) {
            cut_lists(args, first_query, shared, kept, lists, args.capacity - kBlockRows);
            __syncthreads();
        }
    }
    if (!args.last_part) return;
    __syncthreads();
    // Short lists spare topk_merge more than they cost here.
    cut_lists(args, first_query, shared, kept, lists, 4 * args.k);
    for (int i = static_cast<int>(threadIdx.x); i < lists; i += kScanThreads) args.counts[first_list + i] = shared.counts[i];
}

// ---- merging ----

struct MergeOut {
    float* scores[2];
    int64_t* indices[2];
    int64_t stride;
    int64_t* last;  // [q, ends]
};

// A block a query and end: kMergeStep keys a thread at a time, those that beat the k-th appended, cut when full.
__global__ __launch_bounds__(kScanThreads) void topk_merge_kernel(DeviceScan args, MergeOut out) {
    const int ends = end_count(args.ends), end = static_cast<int>(blockIdx.x) % ends;
    const bool smallest = is_smallest(args.ends, end);
    const int64_t list = blockIdx.x, q = list / ends, lists = args.q * ends;
    int64_t* keys = reinterpret_cast<int64_t*>(shared_memory());
    int32_t* state = reinterpret_cast<int32_t*>(keys + kMergeCapacity);  // how many there are, the longest list
    if (threadIdx.x == 0) state[0] = state[1] = 0;
    __syncthreads();
    int longest = 0;
    for (int64_t b = threadIdx.x; b < args.row_blocks; b += kScanThreads) {
        const int count = args.counts[b * lists + list];
        longest = count > longest ? count : longest;
    }
    atomicMax(&state[1], longest);
    __syncthreads();
    const int64_t slots = static_cast<int64_t>(state[1]) * args.row_blocks;
    int64_t least = args.least[list] - 1;  // that key itself is one of the k
    for (int64_t begin = 0; begin < slots; begin += kMergeStep * kScanThreads) {
        int64_t found[kMergeStep];
#pragma unroll
        for (int i = 0; i < kMergeStep; ++i) {
            const int64_t slot = begin + i * kScanThreads + threadIdx.x;
            const int64_t at = slot / args.row_blocks, block = slot - at * args.row_blocks;
            found[i] = 0;
            if (slot < slots && at < args.counts[block * lists + list]) found[i] = args.kept[(block * lists + list) * args.capacity + at];
        }
#pragma unroll
        for (int i = 0; i < kMergeStep; ++i)
            if (found[i] > least && found[i] > 0) keys[atomicAdd(&state[0], 1)] = found[i];
        __syncthreads();
        const int count = state[0];
        __syncthreads();
        if (count + kMergeStep * kScanThreads <= kMergeCapacity) continue;
        sort_keys(keys, count);
        if (count >= args.k && keys[args.k - 1] > least) least = keys[args.k - 1];
        if (threadIdx.x == 0) state[0] = count < args.k ? count : static_cast<int>(args.k);
        __syncthreads();
    }
    const int count = state[0];
    sort_keys(keys, count);
    float* scores = (end == 0 ? out.scores[0] : out.scores[1]) + q * out.stride;
    int64_t* indices = (end == 0 ? out.indices[0] : out.indices[1]) + q * out.stride;
    for (int i = static_cast<int>(threadIdx.x); i < args.k; i += kScanThreads) {
        scores[i] = i < count ? score_of(keys[i], smallest) : __uint_as_float(0x7fc00000u);
        indices[i] = i < count ? 0x7fffffff - (keys[i] & 0x7fffffff) : -1;
    }
    if (threadIdx.x == 0) out.last[list] = count >= args.k ? keys[args.k - 1] : 1;  // no key is as bad as 1
}

}  // namespace
}  // namespace rapidin
