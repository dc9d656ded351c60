// linear_sketch's launches; the kernels are in linear_sketch.cuh, and from 1,024 numbers on in fourier_sketch.cuh.
#include "linear_sketch.cuh"

#include <stdexcept>
#include <type_traits>
#include <vector>

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

LinearSide side_of(const TokenRows& x, const uint32_t* table, const LowRankTerm& term) {
    const int64_t bytes = dtype_bytes(x.dtype);
    const bool aligned = x.stride_element == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
                         x.stride_token * bytes % 16 == 0 && x.stride_batch * bytes % 16 == 0;
    return {x.data, x.dtype, aligned, static_cast<int>(x.n), x.stride_batch, x.stride_token, x.stride_element, table,
            term.of_basis, term.along, term.gain, static_cast<int>(term.rank)};
}

// Numbers 0 .. 15 (fewer with small groups) for edges between two kinds of vertices, so that those of any one vertex have each
// number equally often, or different ones. A bit at a time: edges that share a number so far are paired at each vertex, and the
// two of a pair get different bits. Pairs of both kinds form paths and circles of even length, so this can always be done.
std::vector<uint8_t> even_numbers(const std::vector<int>& from, const std::vector<int>& to, int bits) {
    const int edges = static_cast<int>(from.size());
    std::vector<uint8_t> numbers(from.size(), 0);
    std::vector<int> partners[2], waiting, open;
    for (int bit = 0; bit < bits; ++bit) {
        const std::vector<int>* ends[2] = {&from, &to};
        for (int end = 0; end < 2; ++end) {
            partners[end].assign(from.size(), -1);
            open.assign(from.size() << bits, -1);
            for (int e = 0; e < edges; ++e) {
                int& other = open[static_cast<size_t>((*ends[end])[e] << bits | numbers[e])];
                if (other >= 0) {
                    partners[end][e] = other;
                    partners[end][other] = e;
                    other = -1;
                } else {
                    other = e;
                }
            }
        }
        std::vector<int8_t> side(from.size(), -1);
        for (int first = 0; first < edges; ++first) {
            if (side[first] >= 0) continue;
            side[first] = 0;
            waiting.assign(1, first);
            while (!waiting.empty()) {
                const int e = waiting.back();
                waiting.pop_back();
                for (const std::vector<int>& of : partners) {
                    const int other = of[e];
                    if (other < 0 || side[other] >= 0) continue;
                    side[other] = static_cast<int8_t>(1 - side[e]);
                    waiting.push_back(other);
                }
            }
        }
        for (int e = 0; e < edges; ++e) numbers[e] = static_cast<uint8_t>(numbers[e] | side[e] << bit);
    }
    return numbers;
}

// Places of elements in their stages, and the pairs of banks that bins read from, for the columns of one side.
template <int K, int Bytes>
void place_columns(const uint32_t* columns, int64_t n, uint32_t* table) {
    using P = Placing<K, Bytes>;
    uint16_t* places = reinterpret_cast<uint16_t*>(table);
    uint8_t* entries = reinterpret_cast<uint8_t*>(table + n / 2);
    constexpr int kBits = P::kStoreLanes == 16 ? 4 : 3;
    std::vector<int> stores(K), reads(K);
    for (int64_t chunk = 0; chunk < n; chunk += K) {
        for (int bin = 0; bin < K; ++bin) {
            const int element = static_cast<int>(columns[chunk + bin] & ~kSignBit);
            reads[element] = P::row_of(bin);
            stores[element] = element / (P::kStoreLanes * P::kElements) * P::kElements + element % P::kElements;
        }
        const std::vector<uint8_t> pairs = even_numbers(stores, reads, kBits);
        for (int bin = 0; bin < K; ++bin) {
            const uint32_t element = columns[chunk + bin] & ~kSignBit;
            places[chunk + element] = static_cast<uint16_t>(P::row_of(bin) * 128 + pairs[element] * 8);
            entries[chunk + bin] = static_cast<uint8_t>(pairs[element] * 8 | (columns[chunk + bin] & kSignBit) >> 24);
        }
    }
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

int64_t linear_sketch_low_rank(int64_t k) {
    int64_t most = 0;
    if (k < kFourierFrom)
        with_width(k, false, [&](auto width, auto) { most = LinearSketch<decltype(width)::value, false>::kMostRank; });
    return most;
}

int shared_memory_limit(int device) { return shared_bytes(device); }

void linear_sketch_table(const uint32_t* columns, int64_t n, int64_t k, int bytes, uint32_t* table) {
    if (k >= kFourierFrom) return fourier_sketch_table(columns, n, k, bytes, table);
    with_width(k, false, [&](auto width, auto) {
        constexpr int K = decltype(width)::value;
        if (bytes == 4) place_columns<K, 4>(columns, n, table);
        else place_columns<K, 2>(columns, n, table);
    });
}

void linear_sketch(const TokenRows& grads, const uint32_t* grads_table, const TokenRows& inputs, const uint32_t* inputs_table,
                   const LowRankTerm& grads_term, const LowRankTerm& inputs_term, int64_t batch, int64_t k, int64_t splits,
                   int64_t block_tokens, float* partial, float* out, Queue on) {
    const OnDevice guard(on.device);
    const bool split = grads.dtype != kBFloat16 || inputs.dtype != kBFloat16;
    const int64_t most = split ? 0 : linear_sketch_low_rank(k);
    for (const LowRankTerm* term : {&grads_term, &inputs_term})
        if (term->of_basis != nullptr && (term->rank > most || term->rank % 16 != 0))
            throw std::invalid_argument("linear_sketch: the kernel cannot add a term of this rank");
    // A grid's second axis ends at 65,535.
    for (int64_t first = 0; first < batch; first += 65535) {
        const int64_t some = batch - first < 65535 ? batch - first : 65535;
        LinearArgs args = {{side_of(grads, grads_table, grads_term), side_of(inputs, inputs_table, inputs_term)},
                           static_cast<int>(grads.tokens),
                           static_cast<int>(block_tokens),
                           splits > 1 ? partial : out + first * k};
        for (LinearSide& side : args.sides) {
            side.data = static_cast<const char*>(side.data) + first * side.stride_batch * dtype_bytes(side.dtype);
            if (side.of_basis != nullptr) side.along += first * grads.tokens * 2 * side.rank;
        }
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
