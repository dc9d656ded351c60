// Memory that is kept from one use to the next, aligned to the widest registers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace rapidin {

class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    // At least n floats, with whatever they held.
    float* floats(int64_t n) {
        if (n <= size_) return data_;
        std::free(data_);
        size_ = (n + 15) / 16 * 16;
        data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(size_) * sizeof(float)));
        if (data_) return data_;
        size_ = 0;
        throw std::bad_alloc();
    }

  private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace rapidin
