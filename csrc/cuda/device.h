// What the CUDA kernels use of CUDA, and a few names for it. A host compiler gets the same names from
// tests/support/emulator/emulator.h, so that a kernel's body, its launcher and the binding run on the CPU in tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../args.h"
#include "../sketch_hash.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define RAPIDIN_STORED_WHOLE(Type)
#else
#include "emulator.h"
#endif

#include <stdexcept>
#include <string>

namespace rapidin {

// ------------------------------------------------------------------------------------------------- numbers

// 16 bytes, the widest load there is. (Stored by one instruction; the emulator must be told to count it so.)
struct alignas(16) Words4 {
    uint32_t w[4];
    RAPIDIN_STORED_WHOLE(Words4)
};

struct alignas(8) Words2 {
    uint32_t w[2];
    RAPIDIN_STORED_WHOLE(Words2)
};

// A load of what is read once: it leaves the L1 cache to what is read again.
__device__ __forceinline__ Words4 load_streamed(const void* at);
__device__ __forceinline__ Words2 load_streamed2(const void* at);

// A number that other blocks change by atomic operations meanwhile: what it was at some time, whole.
__device__ __forceinline__ int64_t load_relaxed(const int64_t* at);

// Read from an address in a table: of global memory, which the compiler could not know, and never written by the kernel.
__device__ __forceinline__ Words4 load_words4(uint64_t address);

__device__ __forceinline__ float half_bits_to_float(uint16_t bits);

// The two bfloat16 of a word, and the two float16 of one.
__device__ __forceinline__ float bf16_low(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float bf16_high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ float half_low(uint32_t word) { return half_bits_to_float(static_cast<uint16_t>(word)); }
__device__ __forceinline__ float half_high(uint32_t word) { return half_bits_to_float(static_cast<uint16_t>(word >> 16)); }

// One element of any dtype that is sketched; `dtype` is the same for a whole warp.
__device__ __forceinline__ float load_element(const void* data, int dtype, int64_t i) {
    if (dtype == kFloat32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return dtype == kFloat16 ? half_bits_to_float(bits) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__host__ __device__ __forceinline__ int dtype_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// The word with its sign turned where `sign` (0 or 1 << 31) says so.
__device__ __forceinline__ float flip_sign(float x, uint32_t sign) { return __uint_as_float(__float_as_uint(x) ^ sign); }

// Four bytes of the eight of (high, low), by the nibbles of `selector`, whose upper half does not count.
__device__ __forceinline__ uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector);

// Two floats as a word of two bfloat16, nearest even; `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high);

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ Words4 load_words4(uint64_t address) {
    Words4 x;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3]) : "l"(address));
    return x;
}

__device__ __forceinline__ uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t word;  // __byte_perm clears the nibbles' top bits first, which costs an instruction
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(low), "r"(high), "r"(selector));
    return word;
}

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ Words4 load_streamed(const void* at) {
    Words4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
                 : "l"(at));
    return x;
}

__device__ __forceinline__ int64_t load_relaxed(const int64_t* at) {
    int64_t x;
    asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(x) : "l"(at) : "memory");
    return x;
}

__device__ __forceinline__ Words2 load_streamed2(const void* at) {
    Words2 x;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.w[0]), "=r"(x.w[1]) : "l"(at));
    return x;
}

// The compiler moves no access to memory across it.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// What the compiler makes of x is made anew after this point, and not kept from before a loop, in registers that are then
// missing in it.
__device__ __forceinline__ void compute_again(int& x) { asm volatile("" : "+r"(x)); }

// The block's dynamic shared memory, 16-byte aligned. Kernels take all of theirs from here.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char rapidin_shared[];
    return rapidin_shared;
}

#else

__device__ __forceinline__ Words4 load_streamed(const void* at) { return *static_cast<const Words4*>(at); }
__device__ __forceinline__ int64_t load_relaxed(const int64_t* at) { return emulated_atomic_load(at); }
__device__ __forceinline__ Words2 load_streamed2(const void* at) { return *static_cast<const Words2*>(at); }
__device__ __forceinline__ void keep_order() {}
__device__ __forceinline__ void compute_again(int&) {}

inline Words4 load_words4(uint64_t address) { return *reinterpret_cast<const Words4*>(address); }

#endif

// ------------------------------------------------------------------------------------------------- launching

inline void check(cudaError_t code, const char* what) {
    if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

// Makes `device` current while it lives; the caller's tensors and stream are on it.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = before_ != device;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// Bytes that a block may have once its kernel asks for more than 48 KB.
inline int shared_bytes(int device) {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return bytes;
}

// Starts a kernel on a stream (as an integer, the way Python hands it over) and says so if that failed. It does not
// wait, so it may be called while a graph is captured.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, uint64_t stream,
            Args... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
#if defined(__CUDACC__)
    kernel<<<grid, threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(static_cast<Params>(args)...);
    check(cudaGetLastError(), name);
#else
    static_cast<void>(stream);
    const auto body = [&] { kernel(static_cast<Params>(args)...); };
    check(emulate(name, reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, std::cref(body)), name);
#endif
}

}  // namespace rapidin
