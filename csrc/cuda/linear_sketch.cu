// linear_sketch's launches; the kernels are in linear_sketch.cuh, and from 1,024 numbers on in fourier_sketch.cuh.
#include "linear_sketch.cuh"

#include <stdexcept>
#include <type_traits>

#include "linear_launch.h"

namespace rapidin {
namespace {

template <int K>
using Width = std::integral_constant<int, K>;

constexpr int64_t kFourierFrom = 1024;

// Calls body(Width<k>, split or not).
template <class Body>
void with_width(int64_t k, bool split, Body body) {
    const auto either = [&](auto width) {
        if (split) body(width, std::true_type());
        else body(width, std::false_type());
    };
    if (k == 32) either(Width<32>());
    else if (k == 64) either(Width<64>());
    else if (k == 128) either(Width<128>());
    else if (k == 256) either(Width<256>());
    else if (k == 512) either(Width<512>());
    else throw std::invalid_argument("linear_sketch: no kernel for this width");
}

LinearSide side_of(const TokenRows& x, const uint32_t* table) {
    const int64_t bytes = dtype_bytes(x.dtype);
    const bool aligned = x.stride_element == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
                         x.stride_token * bytes % 16 == 0 && x.stride_batch * bytes % 16 == 0;
    return {x.data, x.dtype, aligned, static_cast<int>(x.n), x.stride_batch, x.stride_token, x.stride_element, table};
}

template <int K, bool Split>
void launch_sketch(const LinearArgs& args, int64_t splits, int64_t batch, Queue on) {
    launch("linear_sketch", linear_sketch_kernel<K, Split>,
           dim3(static_cast<unsigned>(splits), static_cast<unsigned>(batch)), LinearSizes<K>::kThreads,
           LinearSketch<K, Split>::kSharedBytes, on.handle, args);
}

}  // namespace

LinearTile linear_sketch_tile(int64_t k, int dtype, int other_dtype) {
    if (k >= kFourierFrom) return fourier_sketch_tile(k, dtype == kFloat32 || other_dtype == kFloat32 ? 4 : 2);
    LinearTile tile = {};
    with_width(k, dtype != kBFloat16 || other_dtype != kBFloat16, [&](auto width, auto split) {
        constexpr int K = decltype(width)::value;
        tile = {LinearSizes<K>::kTokens, static_cast<int64_t>(LinearSketch<K, decltype(split)::value>::kSharedBytes)};
    });
    return tile;
}

int shared_memory_limit(int device) { return shared_bytes(device); }

void linear_sketch_table(const uint32_t* columns, int64_t n, int64_t k, int bytes, uint32_t* table) {
    if (k >= kFourierFrom) return fourier_sketch_table(columns, n, k, bytes, table);
    for (int64_t i = 0; i < n; ++i) table[i] = staged_at(columns[i] & ~kSignBit) | (columns[i] & kSignBit);
}

void linear_sketch(const TokenRows& grads, const uint32_t* grads_table, const TokenRows& inputs, const uint32_t* inputs_table,
                   int64_t batch, int64_t k, int64_t splits, int64_t block_tokens, float* partial, float* out, Queue on) {
    const OnDevice guard(on.device);
    const bool split = grads.dtype != kBFloat16 || inputs.dtype != kBFloat16;
    // A grid's second axis ends at 65,535.
    for (int64_t first = 0; first < batch; first += 65535) {
        const int64_t some = batch - first < 65535 ? batch - first : 65535;
        LinearArgs args = {{side_of(grads, grads_table), side_of(inputs, inputs_table)}, static_cast<int>(grads.tokens),
                           static_cast<int>(block_tokens), splits > 1 ? partial : out + first * k};
        for (LinearSide& side : args.sides)
            side.data = static_cast<const char*>(side.data) + first * side.stride_batch * dtype_bytes(side.dtype);
        if (k >= kFourierFrom) {
            fourier_sketch(args, k, splits, some, on);
        } else {
            with_width(k, split, [&](auto width, auto is_split) {
                launch_sketch<decltype(width)::value, decltype(is_split)::value>(args, splits, some, on);
            });
        }
        if (splits > 1) sum_parts(partial, splits, some * k, out + first * k, on);
    }
}

}  // namespace rapidin
