// CUDA's names for a host compiler: a kernel's body runs on the CPU, block after block, each thread on a stack of
// its own that is left at barriers and at what a warp does together. Only what the kernels use is here.
//
// What it finds beyond wrong results: reads and writes outside shared memory (a block of the heap of just the size
// asked for, so the address sanitizer sees them), shared memory read before it was written (it begins as NaN),
// barriers that not all threads reach, and missing barriers, which show as results that change with the order in
// which threads run: set_order().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "watch.h"

#define __global__
#define __device__
#define __host__
#if defined(RAPIDIN_WATCH)
#define __forceinline__ inline __attribute__((always_inline))  // a place in the code for each call
#define WATCHED_ELSEWHERE __attribute__((noinline, no_sanitize("thread")))
// Otherwise `*at = {{..}}` would be watched word by word.
#define RAPIDIN_STORED_WHOLE(Type)                                                               \
    __forceinline__ Type& operator=(const Type& other) {                                         \
        typedef uint32_t Words __attribute__((vector_size(sizeof(w)), may_alias));               \
        *reinterpret_cast<Words*>(w) = *reinterpret_cast<const Words*>(other.w);                 \
        return *this;                                                                            \
    }
#else
#define RAPIDIN_STORED_WHOLE(Type)
#define __forceinline__ inline
#define WATCHED_ELSEWHERE inline
#endif
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n)
#define __grid_constant__
#define __CUDA_ARCH__ 900

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t code) {
    return code == cudaSuccess ? "no error" : code == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulator {

void set_arch(int arch);
void set_checked_only(bool wanted);  // launches are checked, and not run
// As cudaFuncSetAttribute for dynamic shared memory.
cudaError_t allow_shared(const void* kernel, int bytes);

struct Place {
    dim3 thread, block, block_dim, grid_dim;
};
Place& here();

enum Order { kForward = 0, kBackward = 1, kShuffled = 2 };
void set_order(int order);

void barrier();
// Deposits 16 words of each lane of the calling warp and gives those of lane `lane` once all have come; every lane
// of the warp must call it the same number of times (it counts lanes that have not returned yet).
struct Deposit {
    uint32_t words[16];
};
void exchange(const Deposit& own, Deposit (&all)[32], uint32_t& present);
void copy_async(void* to, const void* from, int bytes, int read);
void commit_async();
void wait_async(int groups_left);

}  // namespace emulator

template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    return emulator::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

#define threadIdx (emulator::here().thread)
#define blockIdx (emulator::here().block)
#define blockDim (emulator::here().block_dim)
#define gridDim (emulator::here().grid_dim)

inline void __syncthreads() { emulator::barrier(); }
inline void __threadfence() { emulator::watch::fence(); }
int __syncthreads_or(int predicate);

inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline int32_t __float_as_int(float x) { return static_cast<int32_t>(__float_as_uint(x)); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float cospif(float x) { return static_cast<float>(std::cos(3.14159265358979323846 * static_cast<double>(x))); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcs(const T* p) {
    return *p;
}
uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector);
int __dp4a(int a, int b, int c);

template <class T>
inline T emulated_shuffle(T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    emulator::Deposit own = {}, all[32];
    memcpy(own.words, &value, sizeof(T));
    uint32_t present;
    emulator::exchange(own, all, present);
    T got;
    memcpy(&got, all[source & 31].words, sizeof(T));
    return got;
}
inline int emulated_lane() { return static_cast<int>(emulator::here().thread.x % 32); }
template <class T>
inline T __shfl_sync(uint32_t, T value, int source, int width = 32) {
    return emulated_shuffle(value, (emulated_lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(uint32_t, T value, int mask, int = 32) {
    return emulated_shuffle(value, emulated_lane() ^ mask);
}
template <class T>
inline T __shfl_up_sync(uint32_t, T value, unsigned delta, int = 32) {
    const int lane = emulated_lane(), from = lane - static_cast<int>(delta);
    return emulated_shuffle(value, from < 0 ? lane : from);
}
template <class T>
inline T __shfl_down_sync(uint32_t, T value, unsigned delta, int = 32) {
    const int lane = emulated_lane(), from = lane + static_cast<int>(delta);
    return emulated_shuffle(value, from > 31 ? lane : from);
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    emulator::Deposit own = {}, all[32];
    own.words[0] = value;
    uint32_t present;
    emulator::exchange(own, all, present);
    for (int lane = 0; lane < 32; ++lane)
        if (present >> lane & 1 && all[lane].words[0] > value) value = all[lane].words[0];
    return value;
}
inline void __syncwarp(uint32_t = 0xffffffffu) { emulated_shuffle(0, 0); }
uint32_t __ballot_sync(uint32_t mask, int predicate);
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Threads run one at a time.
template <class T>
WATCHED_ELSEWHERE T atomicAdd(T* address, T value) {
    emulator::watch::atomic(address, sizeof(T), __builtin_return_address(0));
    const T before = *address;
    *address = static_cast<T>(before + value);
    return before;
}
template <class T>
WATCHED_ELSEWHERE T emulated_atomic_load(const T* address) {
    emulator::watch::atomic(address, sizeof(T), __builtin_return_address(0));
    return *address;
}
template <class T>
WATCHED_ELSEWHERE T atomicMax(T* address, T value) {
    emulator::watch::atomic(address, sizeof(T), __builtin_return_address(0));
    const T before = *address;
    if (value > before) *address = value;
    return before;
}

namespace rapidin {

float emulated_half(uint16_t bits);
unsigned char* shared_memory();
// Runs a launch to its end, or says as CUDA does that the architecture does not allow it.
cudaError_t emulate(const char* name, const void* kernel, dim3 grid, int threads, size_t shared_bytes,
                    const std::function<void()>& body);

enum MmaNumbers { kMmaF16, kMmaBF16, kMmaTF32 };
void emulated_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MmaNumbers numbers);
void emulated_mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool unsigned_a);
uint32_t emulated_pack_bf16(float low, float high);
inline float half_bits_to_float(uint16_t bits) { return emulated_half(bits); }
inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }
inline uint32_t pack_bf16(float low, float high) { return emulated_pack_bf16(low, high); }

}  // namespace rapidin
