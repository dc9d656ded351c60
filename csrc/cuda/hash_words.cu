// The keyed hash on the device: what tests hold the other backends' bins and signs to.
#include "device.h"
#include "launchers.h"

namespace rapidin {
namespace {

__global__ void hash_words_kernel(StreamKey key, uint32_t first, int64_t n, uint32_t* words) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) words[i] = hash_word(key, first + static_cast<uint32_t>(i));
}

}  // namespace

void hash_words(uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint32_t* words, Queue on) {
    const OnDevice guard(on.device);
    const int64_t blocks = (n + 255) / 256;
    launch("hash_words", hash_words_kernel, dim3(static_cast<unsigned>(blocks)), 256, 0, on.handle, stream_key(seed, stream),
           first, n, words);
}

}  // namespace rapidin
