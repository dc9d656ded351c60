// The last step of sums that were cut into parts: added in one order, whatever the machine.
#include "device.h"
#include "launchers.h"

namespace rapidin {
namespace {

// sums[n] = the parts [parts, n], added in order: each of blockDim / 32 slices of them first, then the slices.
__global__ void __launch_bounds__(1024) sum_parts_kernel(const float* parts, int64_t count, int64_t n, float* sums) {
    const int slices = static_cast<int>(blockDim.x / 32), slice = static_cast<int>(threadIdx.x / 32);
    const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
    float* const all = reinterpret_cast<float*>(shared_memory());
    float sum = 0.0f;
    if (i < n) {
        const int64_t end = count * (slice + 1) / slices;
#pragma unroll 8
        for (int64_t part = count * slice / slices; part < end; ++part) sum += parts[part * n + i];
    }
    all[threadIdx.x] = sum;
    __syncthreads();
    if (slice == 0 && i < n) {
        for (int s = 1; s < slices; ++s) sum += all[32 * s + threadIdx.x];
        sums[i] = sum;
    }
}

}  // namespace

void sum_parts(const float* parts, int64_t count, int64_t n, float* sums, Queue on) {
    const int64_t blocks = (n + 31) / 32;
    if (blocks >= int64_t{1} << 31) throw std::invalid_argument("sum_parts: more blocks than a launch may have");
    int slices = 1;
    while (slices < 32 && 4 * slices <= count) slices *= 2;
    const int threads = 32 * slices;
    launch("sum_parts", sum_parts_kernel, dim3(static_cast<unsigned>(blocks)), threads, sizeof(float) * static_cast<size_t>(threads),
           on.handle, parts, count, n, sums);
}

}  // namespace rapidin
