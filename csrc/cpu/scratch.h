// Memory that is kept from one use to the next, aligned to the widest registers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef _WIN32
#include <malloc.h>
#endif

namespace rapidin {

class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { release(data_); }

    // At least n floats, with whatever they held.
    float* floats(int64_t n) {
        if (n <= size_) return data_;
        release(data_);
        size_ = (n + 15) / 16 * 16;
        data_ = static_cast<float*>(allocate(static_cast<size_t>(size_) * sizeof(float)));
        if (data_) return data_;
        size_ = 0;
        throw std::bad_alloc();
    }

  private:
#ifdef _WIN32  // whose C library has no aligned_alloc
    static void* allocate(size_t bytes) { return _aligned_malloc(bytes, 64); }
    static void release(void* data) { _aligned_free(data); }
#else
    static void* allocate(size_t bytes) { return std::aligned_alloc(64, bytes); }
    static void release(void* data) { std::free(data); }
#endif

    float* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace rapidin
