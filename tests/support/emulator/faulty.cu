// Kernels with and without what keeps their threads in order, for tests of what watch.cpp sees.
#include "faulty.h"

#include "../../../csrc/cuda/device.h"

namespace emulator {
namespace {

using rapidin::launch;
using rapidin::shared_memory;

__global__ void shift_kernel(const float* in, float* out, int barrier) {
    float* const all = reinterpret_cast<float*>(shared_memory());
    const unsigned i = threadIdx.x;
    all[i] = in[i];
    if (barrier) __syncthreads();
    out[i] = all[(i + 32) % blockDim.x];
}

// A stage is filled again: a barrier before and one after.
__global__ void stage_kernel(const float* in, float* out, int barrier) {
    float* const all = reinterpret_cast<float*>(shared_memory());
    const unsigned i = threadIdx.x, n = blockDim.x;
    float sum = 0.0f;
    for (unsigned stage = 0; stage < 2; ++stage) {
        if (stage > 0 && barrier) __syncthreads();
        all[i] = in[stage * n + i];
        __syncthreads();
        sum += all[n - 1 - i];
    }
    out[i] = sum;
}

__global__ void turn_kernel(const float* in, float* out, int synced) {
    float* const all = reinterpret_cast<float*>(shared_memory());
    const unsigned i = threadIdx.x;
    all[i] = in[i];
    if (synced) __syncwarp();
    out[i] = all[i ^ 1];
}

// Blocks add to one number, apart or by atomics.
__global__ void total_kernel(float* out, int atomic) {
    if (threadIdx.x != 0) return;
    if (atomic) atomicAdd(out, 1.0f);
    else *out = *out + 1.0f;
}

// The last block adds what all left, where they fenced it.
__global__ void last_block_kernel(const float* in, float* parts, unsigned* tickets, float* out, int fenced) {
    unsigned* const last = reinterpret_cast<unsigned*>(shared_memory());
    if (threadIdx.x == 0) parts[blockIdx.x] = in[blockIdx.x];
    if (fenced) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(tickets, 1u) == gridDim.x - 1;
    __syncthreads();
    if (threadIdx.x != 0 || !*last) return;
    float sum = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += parts[block];
    *out = sum;
}

// Column `column` of a matrix of 32 floats a row and `gap` besides, by a warp.
__global__ void column_kernel(const float* in, float* out, int gap) {
    float* const all = reinterpret_cast<float*>(shared_memory());
    const unsigned lane = threadIdx.x;
    for (unsigned row = 0; row < 32; ++row) all[row * (32 + gap) + lane] = in[row * 32 + lane];
    __syncwarp();
    out[lane] = all[lane * (32 + gap)];
}

struct alignas(16) Four {
    float x[4];
};
__global__ void wide_kernel(const float* in, float* out, int step) {
    const Four x = *reinterpret_cast<const Four*>(in + threadIdx.x * static_cast<unsigned>(step));
    out[threadIdx.x] = x.x[0] + x.x[3];
}

__global__ void empty_kernel() {}

}  // namespace

void faulty(Fault fault, const float* in, float* out, int option) {
    if (fault == kShift) launch("shift", shift_kernel, dim3(1), 64, 256, 0, in, out, option);
    if (fault == kStage) launch("stage", stage_kernel, dim3(1), 64, 256, 0, in, out, option);
    if (fault == kTurn) launch("turn", turn_kernel, dim3(1), 64, 256, 0, in, out, option);
    if (fault == kTotal) launch("total", total_kernel, dim3(3), 64, 0, 0, out, option);
    if (fault == kColumn) launch("column", column_kernel, dim3(1), 32, 32 * 64 * 4, 0, in, out, option);
    if (fault == kWide) launch("wide", wide_kernel, dim3(1), 32, 0, 0, in, out, option);
}

void faulty_last_block(const float* in, float* parts, unsigned* tickets, float* out, int fenced) {
    launch("last_block", last_block_kernel, dim3(3), 64, 4, 0, in, parts, tickets, out, fenced);
}

void faulty_launch(unsigned x, unsigned y, unsigned z, int threads, unsigned shared_bytes) {
    launch("empty", empty_kernel, dim3(x, y, z), threads, shared_bytes, 0);
}

}  // namespace emulator
