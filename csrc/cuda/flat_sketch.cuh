// Flat sketch on the device: a block owns one group of bins for some of the chunks, and gathers from each chunk the one
// row that goes there, by the inverse of the chunk's permutation. So sums live in registers and nothing is added
// atomically; each element is read once, from where it lies.
//
// What limits it: memory wants 2.1e12 bfloat16 a second of an H200 (4.3 TB/s), which leaves its 132 multiprocessors 14
// instructions an element, of which 7 may be the integer unit's. In whole rows of bfloat16 an element costs 8.5 (counted in
// the machine code for sm_90), 4.4 of them the integer unit's:
//   the row's place, tensor, address, lanes and signs, worked out once a row by one lane     2.6
//   8 elements' address and signs, read from shared memory, and the load                     1.9
//   sign: a multiplication and a LOP3 on a word of two elements                              1
//   lanes: a select and a byte_perm on such a word                                           1
//   to float: a multiplication or an and                                                     1
//   into the sum: a fused multiply-add (the tensor's scale is free)                          1
// and of float32 11.3, at half as many elements a second.
#pragma once

#include "device.h"

namespace rapidin {

constexpr int kFlatWarps = 8, kFlatThreads = 32 * kFlatWarps;
constexpr int kFlatAtATime = 4;  // rows that a half warp has on their way: 64 bytes a thread of bfloat16

// Everything about a launch that is the same for all its threads. The table is one array of 64-bit integers.
struct FlatLaunch {
    const int64_t* data;          // [tensors] addresses
    const int64_t* strides;       // [tensors] of the batch, in elements
    const int64_t* numels;        // [tensors] of one example
    const int64_t* dtypes;        // [tensors]
    const int64_t* firsts;        // [tensors + 1] first rows, at the end the number of rows
    const int64_t* part_tensors;  // [parts + 1] the tensor of a part's first row, at the end the last tensor
    const float* scales;          // [tensors] or null
    const uint32_t* places;       // [16, groups]: by permutation and group, the place in the chunk
    StreamKey turn, rotation, lane, signs[kFlatRow / 32];
    int64_t rows, chunks, chunks_of_part, parts, batch;
    uint32_t groups;
    float* sums;         // [parts, batch, dim], or the sketch itself where there is one part
    float* row_squares;  // [batch, rows] or null
};

// A row that is to be added, as the lane that looked it up tells the others.
// bits: 0-15 the selector that turns four halves by lane bits 0 and 1; 16-19 lane bits 3 to 6; 20-27 the elements of the row (0: no
// row); 28-29 its dtype; 31 lane bit 2.
struct alignas(16) FlatRowPlan {
    uint64_t address;
    uint32_t bits;
    float scale;
    uint32_t signs[4];
};

__device__ __forceinline__ uint32_t plan_eighth(uint32_t bits, uint32_t lane) { return (bits >> 16 & 15u) ^ lane; }
__device__ __forceinline__ int plan_length(uint32_t bits) { return static_cast<int>(bits >> 20 & 255u); }
__device__ __forceinline__ int plan_dtype(uint32_t bits) { return static_cast<int>(bits >> 28 & 3u); }
__device__ __forceinline__ uint32_t plan_low_lanes(uint32_t bits) { return (bits & 15u) >> 1 | (bits >> 31) << 2; }

// The last of tensors low .. high whose first row is not after `row`; tensors without elements come before the row's own.
__device__ __forceinline__ int64_t tensor_of_row(const int64_t* firsts, int64_t low, int64_t high, int64_t row) {
    while (low < high) {
        const int64_t middle = (low + high + 1) >> 1;
        if (firsts[middle] <= row) low = middle;
        else high = middle - 1;
    }
    return low;
}

// `tensor` is where the search begins; it is left at the row's tensor, as the rows that a lane looks up ascend.
__device__ __forceinline__ FlatRowPlan plan_row(const FlatLaunch& launch, int64_t row, int64_t example, int64_t& tensor,
                                                int64_t last_tensor, int& fast_dtype) {
    FlatRowPlan plan = {};
    tensor = tensor_of_row(launch.firsts, tensor, last_tensor, row);
    const int64_t begin = (row - launch.firsts[tensor]) * kFlatRow, left = launch.numels[tensor] - begin;
    const uint32_t length = left < kFlatRow ? static_cast<uint32_t>(left) : kFlatRow;
    const int dtype = static_cast<int>(launch.dtypes[tensor]);
    plan.address = static_cast<uint64_t>(launch.data[tensor]) +
                   static_cast<uint64_t>((example * launch.strides[tensor] + begin) * dtype_bytes(dtype));
    plan.scale = launch.scales ? launch.scales[tensor] : 1.0f;
    const uint32_t index = static_cast<uint32_t>(row), lanes = hash_word(launch.lane, index) & (kFlatRow - 1);
    plan.bits = (0x3210u ^ (lanes & 3u) * 0x2222u) | (lanes >> 3) << 16 | length << 20 | static_cast<uint32_t>(dtype) << 28 |
                (lanes >> 2 & 1u) << 31;
#pragma unroll
    for (int j = 0; j < kFlatRow / 32; ++j) plan.signs[j] = hash_word(launch.signs[j], index);
    fast_dtype = length == kFlatRow && plan.address % 16 == 0 ? dtype : -1;
    return plan;
}

template <int kDtype>
struct FlatRaw {
    Words4 part[kDtype == kFloat32 ? 2 : 1];
};

// The 8 elements of a row that belong in this thread's bins 8 lane .. 8 lane + 7, as they lie in memory.
template <int kDtype>
__device__ __forceinline__ FlatRaw<kDtype> load_eighth(const FlatRowPlan& plan, uint32_t lane) {
    const uint32_t eighth = plan_eighth(plan.bits, lane);
    FlatRaw<kDtype> raw;
    if constexpr (kDtype == kFloat32) {
        const uint32_t turned = plan.bits >> 31;  // lane bit 2 turns the address too
        raw.part[0] = load_words4(plan.address + 16 * (2 * eighth + turned));
        raw.part[1] = load_words4(plan.address + 16 * (2 * eighth + (turned ^ 1u)));
    } else {
        raw.part[0] = load_words4(plan.address + 16 * eighth);
    }
    return raw;
}

__device__ __forceinline__ void swap_if(bool yes, uint32_t& a, uint32_t& b) {
    const uint32_t first = yes ? b : a, second = yes ? a : b;
    a = first;
    b = second;
}

// Adds them, with signs, in the order of the bins; `minus` holds the signs of the 8 elements in memory order.
template <int kDtype>
__device__ __forceinline__ void add_eighth(FlatRaw<kDtype> raw, uint32_t bits, uint32_t minus, float scale, float (&sums)[8],
                                           float& squares) {
    if constexpr (kDtype == kFloat32) {
        minus = minus * 0x101u >> (bits >> 31) * 4u;  // in the order in which the two halves were loaded
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t(&w)[4] = raw.part[h].w;
#pragma unroll
            for (int j = 0; j < 4; ++j) w[j] ^= minus << (31 - 4 * h - j) & 0x80000000u;
            swap_if(bits & 4u, w[0], w[2]);
            swap_if(bits & 4u, w[1], w[3]);
            swap_if(bits & 2u, w[0], w[1]);
            swap_if(bits & 2u, w[2], w[3]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float value = __uint_as_float(w[j]);
                sums[4 * h + j] = __fmaf_rn(value, scale, sums[4 * h + j]);
                squares = __fmaf_rn(value, value, squares);
            }
        }
    } else {
        uint32_t(&w)[4] = raw.part[0].w;
        minus *= 0x8001u;  // sign 2i to bit 15 and sign 2i + 1 to bit 31 of word i, both by one shift
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] ^= minus << (15 - 2 * i) & 0x80008000u;
        const bool turned = static_cast<int32_t>(bits) < 0;
        swap_if(turned, w[0], w[2]);
        swap_if(turned, w[1], w[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t pair = select_bytes(w[i / 2 * 2], w[i / 2 * 2 + 1], i % 2 ? bits ^ 0x4444u : bits);
            const float low = kDtype == kFloat16 ? half_low(pair) : bf16_low(pair);
            const float high = kDtype == kFloat16 ? half_high(pair) : bf16_high(pair);
            sums[2 * i] = __fmaf_rn(low, scale, sums[2 * i]);
            sums[2 * i + 1] = __fmaf_rn(high, scale, sums[2 * i + 1]);
            squares = __fmaf_rn(low, low, squares);
            squares = __fmaf_rn(high, high, squares);
        }
    }
}

// The same for any row, element by element.
__device__ __forceinline__ void add_eighth_of_any(const FlatRowPlan& plan, uint32_t lane, uint32_t minus, float (&sums)[8],
                                                  float& squares) {
    const int length = plan_length(plan.bits), dtype = plan_dtype(plan.bits);
    const uint32_t eighth = plan_eighth(plan.bits, lane), turn = plan_low_lanes(plan.bits);
    const void* const row = reinterpret_cast<const void*>(plan.address);
#pragma unroll
    for (uint32_t k = 0; k < 8; ++k) {
        const uint32_t at = k ^ turn;
        const int e = static_cast<int>(8 * eighth + at);
        if (e >= length) continue;
        const float value = load_element(row, dtype, e);
        sums[k] = __fmaf_rn(flip_sign(value, minus << (31 - at) & kSignBit), plan.scale, sums[k]);
        squares = __fmaf_rn(value, value, squares);
    }
}

// A half warp's sum of a row's squares, written by its first lane.
__device__ __forceinline__ void store_row_square(float squares, int64_t row, float* row_squares) {
#pragma unroll
    for (int step = 8; step > 0; step >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    if (threadIdx.x % 16 == 0 && row >= 0) row_squares[row] = squares;
}

__device__ __forceinline__ uint32_t plan_signs(const FlatRowPlan& plan, uint32_t lane) {
    return reinterpret_cast<const uint8_t*>(plan.signs)[plan_eighth(plan.bits, lane)];  // bit e of them all, little end first
}

// 2 * kFlatAtATime whole, aligned rows of one dtype: the even ones for the lower half warp.
template <int kDtype, bool kSquares>
__device__ __forceinline__ void add_fast_rows(const FlatRowPlan* plans, const int64_t* rows, float (&sums)[8], float* row_squares) {
    const uint32_t lane = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
    FlatRaw<kDtype> raw[kFlatAtATime];
#pragma unroll
    for (int u = 0; u < kFlatAtATime; ++u) raw[u] = load_eighth<kDtype>(plans[2 * u + half], lane);
#pragma unroll
    for (int u = 0; u < kFlatAtATime; ++u) {
        const FlatRowPlan& plan = plans[2 * u + half];
        float squares = 0.0f;
        add_eighth<kDtype>(raw[u], plan.bits, plan_signs(plan, lane), plan.scale, sums, squares);
        if constexpr (kSquares) store_row_square(squares, rows[2 * u + half], row_squares);
    }
}

template <bool kSquares>
__device__ __forceinline__ void add_any_rows(const FlatRowPlan* plans, const int64_t* rows, float (&sums)[8], float* row_squares) {
    const uint32_t lane = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
#pragma unroll 1
    for (int u = 0; u < kFlatAtATime; ++u) {
        const FlatRowPlan& plan = plans[2 * u + half];
        float squares = 0.0f;
        add_eighth_of_any(plan, lane, plan_signs(plan, lane), sums, squares);
        if constexpr (kSquares) store_row_square(squares, rows[2 * u + half], row_squares);
    }
}

// Shared memory: the plans of each warp's 32 rows, with squares their numbers; at the end the warps' sums.
constexpr size_t kFlatPlanBytes = 32 * sizeof(FlatRowPlan), kFlatNumberBytes = 32 * sizeof(int64_t);
constexpr size_t flat_shared_bytes(bool squares) { return kFlatWarps * (kFlatPlanBytes + (squares ? kFlatNumberBytes : 0)); }

template <bool kSquares>
__global__ void __launch_bounds__(kFlatThreads, kSquares ? 3 : 4) flat_sketch_kernel(const FlatLaunch launch) {
    const uint32_t group = blockIdx.x % launch.groups;
    const int64_t part = blockIdx.x / launch.groups % launch.parts, example = blockIdx.x / launch.groups / launch.parts;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    unsigned char* const shared = shared_memory();
    FlatRowPlan* const plans = reinterpret_cast<FlatRowPlan*>(shared) + 32 * warp;
    int64_t* const numbers = reinterpret_cast<int64_t*>(shared + kFlatWarps * kFlatPlanBytes) + 32 * warp;
    float* const row_squares = kSquares ? launch.row_squares + example * launch.rows : nullptr;

    float sums[8] = {};
    int64_t tensor = launch.part_tensors[part];
    const int64_t last_tensor = launch.part_tensors[part + 1];
    const int64_t first = part * launch.chunks_of_part, past = first + launch.chunks_of_part;
    const int64_t end = past < launch.chunks ? past : launch.chunks;
#pragma unroll 1
    for (int64_t begin = first + 32 * warp; begin < end; begin += 32 * kFlatWarps) {
        // Each lane looks up one chunk's row.
        FlatRowPlan plan = {};
        int64_t row = -1;
        int fast = -1;
        if (const int64_t chunk = begin + lane; chunk < end) {
            const uint32_t index = static_cast<uint32_t>(chunk);
            const uint32_t turn = hash_word(launch.turn, index) & (kFlatPoolSize - 1);
            const uint32_t rotation = hash_word(launch.rotation, index) % launch.groups;
            const uint32_t at = group >= rotation ? group - rotation : group + launch.groups - rotation;
            row = chunk * launch.groups + launch.places[static_cast<int64_t>(turn) * launch.groups + at];
            if (row < launch.rows) plan = plan_row(launch, row, example, tensor, last_tensor, fast);
            else row = -1;
        }
        __syncwarp();  // the rows before have been read
        plans[lane] = plan;
        if constexpr (kSquares) numbers[lane] = row;
        const uint32_t there = __ballot_sync(0xffffffffu, row >= 0);
        const uint32_t float32 = __ballot_sync(0xffffffffu, fast == kFloat32);
        const uint32_t float16 = __ballot_sync(0xffffffffu, fast == kFloat16);
        const uint32_t bfloat16 = __ballot_sync(0xffffffffu, fast == kBFloat16);
        __syncwarp();
        constexpr int kRound = 2 * kFlatAtATime;
        constexpr uint32_t kAll = (1u << kRound) - 1;
#pragma unroll 1
        for (int i = 0; i < 32; i += kRound) {
            if ((bfloat16 >> i & kAll) == kAll) add_fast_rows<kBFloat16, kSquares>(plans + i, numbers + i, sums, row_squares);
            else if ((float32 >> i & kAll) == kAll) add_fast_rows<kFloat32, kSquares>(plans + i, numbers + i, sums, row_squares);
            else if ((float16 >> i & kAll) == kAll) add_fast_rows<kFloat16, kSquares>(plans + i, numbers + i, sums, row_squares);
            else if ((there >> i & kAll) != 0) add_any_rows<kSquares>(plans + i, numbers + i, sums, row_squares);
        }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], 16);

    __syncthreads();  // the plans have been read
    float* const all = reinterpret_cast<float*>(shared);
    if (lane < 16)
#pragma unroll
        for (int k = 0; k < 8; ++k) all[kFlatRow * warp + 8 * lane + k] = sums[k];
    __syncthreads();
    if (threadIdx.x < kFlatRow) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kFlatWarps; ++w) sum += all[kFlatRow * w + threadIdx.x];
        launch.sums[((part * launch.batch + example) * launch.groups + group) * kFlatRow + threadIdx.x] = sum;
    }
}

// Sketches of fewer than 128 numbers: rows of `width` elements, a power of two, and one group. Width is at most 64, so a
// lane holds at most two bins; narrow rows lie side by side in a warp.
template <bool kSquares>
__global__ void __launch_bounds__(kFlatThreads) flat_narrow_kernel(const FlatLaunch launch, int width) {
    const int64_t part = blockIdx.x % launch.parts, example = blockIdx.x / launch.parts;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int lanes = width < 32 ? width : 32, at_a_time = 32 / lanes;
    const int bin = lane % lanes;
    float sums[2] = {0.0f, 0.0f};
    int64_t tensor = launch.part_tensors[part];
    const int64_t last_tensor = launch.part_tensors[part + 1];
    const int64_t first = part * launch.chunks_of_part, past = first + launch.chunks_of_part;
    const int64_t end = past < launch.chunks ? past : launch.chunks;
    for (int64_t begin = first + at_a_time * warp; begin < end; begin += at_a_time * kFlatWarps) {
        const int64_t row = begin + lane / lanes;
        float squares = 0.0f;
        if (row < end) {
            tensor = tensor_of_row(launch.firsts, tensor, last_tensor, row);
            const int64_t start = (row - launch.firsts[tensor]) * width, left = launch.numels[tensor] - start;
            const void* const data = reinterpret_cast<const void*>(launch.data[tensor]);
            const int dtype = static_cast<int>(launch.dtypes[tensor]);
            const float scale = launch.scales ? launch.scales[tensor] : 1.0f;
            const uint32_t index = static_cast<uint32_t>(row);
            const int turn = static_cast<int>(hash_word(launch.lane, index) & static_cast<uint32_t>(width - 1));
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int e = (bin + 32 * k) ^ turn;
                if (bin + 32 * k >= width || e >= left) continue;
                const uint32_t minus = hash_word(launch.signs[e / 32], index) >> (e % 32) & 1u;
                const float value = load_element(data, dtype, example * launch.strides[tensor] + start + e);
                sums[k] = __fmaf_rn(flip_sign(value, minus << 31), scale, sums[k]);
                squares = __fmaf_rn(value, value, squares);
            }
        }
        if constexpr (kSquares) {
            for (int step = lanes / 2; step > 0; step >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, step);
            if (bin == 0 && row < end) launch.row_squares[example * launch.rows + row] = squares;
        }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k)
        for (int step = 16; step >= lanes; step >>= 1) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], step);
    float* const all = reinterpret_cast<float*>(shared_memory());  // [warps, 64]
    if (lane < lanes)
        for (int k = 0; k < 2; ++k) all[64 * warp + 32 * k + lane] = sums[k];
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(width)) {
        float sum = 0.0f;
        for (int w = 0; w < kFlatWarps; ++w) sum += all[64 * w + threadIdx.x];
        launch.sums[(part * launch.batch + example) * width + threadIdx.x] = sum;
    }
}

// The squares of each tensor's rows, summed in `slices`: block (slice, tensor, example) -> squares[slice, example, tensor].
__global__ void __launch_bounds__(kFlatThreads) flat_squares_kernel(const int64_t* firsts, const float* row_squares, int64_t tensors,
                                                                    int64_t batch, int64_t rows, int64_t slices, float* squares) {
    const int64_t slice = blockIdx.x % slices, tensor = blockIdx.x / slices % tensors, example = blockIdx.x / slices / tensors;
    const int64_t first = firsts[tensor], count = firsts[tensor + 1] - first;
    const int64_t begin = first + count * slice / slices, end = first + count * (slice + 1) / slices;
    float sum = 0.0f;
    for (int64_t row = begin + threadIdx.x; row < end; row += kFlatThreads) sum += row_squares[example * rows + row];
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    float* const all = reinterpret_cast<float*>(shared_memory());
    if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (int w = 0; w < kFlatWarps; ++w) total += all[w];
        squares[(slice * batch + example) * tensors + tensor] = total;
    }
}

}  // namespace rapidin
