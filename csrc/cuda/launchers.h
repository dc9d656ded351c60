// What the binding calls: one function an op, each in its own .cu. All pointers are the device's; the work goes to
// the end of `on`, the caller's current stream. None waits for the device.
#pragma once

#include <cstdint>

#include "../args.h"

namespace rapidin {

struct Queue {
    int device;
    uint64_t handle;
};

void hash_words(uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint32_t* words, Queue on);

}  // namespace rapidin
