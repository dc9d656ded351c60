// linear_sketch's launches from 1,024 numbers on; the kernel is in fourier_sketch.cuh.
#include "fourier_sketch.cuh"

#include <stdexcept>
#include <type_traits>

#include "linear_launch.h"

namespace rapidin {
namespace {

template <class Body>
void with_width(int64_t k, Body body) {
    if (k == 1024) body(std::integral_constant<int, 1024>());
    else if (k == 2048) body(std::integral_constant<int, 2048>());
    else if (k == 4096) body(std::integral_constant<int, 4096>());
    else if (k == 8192) body(std::integral_constant<int, 8192>());
    else throw std::invalid_argument("linear_sketch: no kernel for this width");
}

}  // namespace

LinearTile fourier_sketch_tile(int64_t k, int bytes) {
    LinearTile tile = {};
    with_width(k, [&](auto width) {
        using Sizes = FourierSizes<decltype(width)::value>;
        tile = {Sizes::kTokens, static_cast<int64_t>(Sizes::shared_bytes(bytes))};
    });
    return tile;
}

void fourier_sketch_table(const uint32_t* columns, int64_t n, int64_t k, int bytes, uint32_t* table) {
    with_width(k, [&](auto width) {
        constexpr int K = decltype(width)::value;
        const uint32_t word = static_cast<uint32_t>(FourierSizes<K>::kTokens * bytes);
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t entry = columns[i / K * K + bin_of_entry<K>(static_cast<int>(i % K))];
            table[i] = spread_bytes((entry & ~kSignBit) * word) | (entry & kSignBit);
        }
    });
}

void fourier_sketch(const LinearArgs& args, int64_t k, int64_t splits, int64_t batch, Queue on) {
    const int bytes = args.sides[0].dtype == kFloat32 || args.sides[1].dtype == kFloat32 ? 4 : 2;
    with_width(k, [&](auto width) {
        constexpr int K = decltype(width)::value;
        launch("linear_sketch", fourier_sketch_kernel<K>, dim3(static_cast<unsigned>(splits), static_cast<unsigned>(batch)),
               FourierSizes<K>::kThreads, FourierSizes<K>::shared_bytes(bytes), on.handle, args);
    });
}

}  // namespace rapidin
