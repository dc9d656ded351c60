// Python's door to the CUDA kernels: addresses and sizes as integers, as rapidin/ops/cuda.py hands them over.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>

#include "launchers.h"

#if defined(RAPIDIN_EMULATE)
#include "emulator.h"
#endif

namespace py = pybind11;

namespace rapidin {
namespace {

using Place = std::pair<int, uint64_t>;  // device index and stream

Queue queue(Place place) { return {place.first, place.second}; }

template <class T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;

TokenRows token_rows(uint64_t data, int dtype, int64_t tokens, int64_t n, const Strides& strides) {
    return {at<const void>(data), dtype, tokens, n, std::get<0>(strides), std::get<1>(strides), std::get<2>(strides)};
}

void bind(py::module_& m) {
    m.def(
        "linear_sketch",
        [](uint64_t inputs, int inputs_dtype, int64_t n_in, const Strides& inputs_strides, uint64_t inputs_table,
           uint64_t grads, int grads_dtype, int64_t n_out, const Strides& grads_strides, uint64_t grads_table, int64_t batch,
           int64_t tokens, int64_t k, int64_t splits, int64_t block_tokens, uint64_t partial, uint64_t out, Place place) {
            linear_sketch(token_rows(grads, grads_dtype, tokens, n_out, grads_strides), at<const uint32_t>(grads_table),
                          token_rows(inputs, inputs_dtype, tokens, n_in, inputs_strides), at<const uint32_t>(inputs_table),
                          batch, k, splits, block_tokens, at<float>(partial), at<float>(out), queue(place));
        },
        "TensorSketches [batch, k] float32 of sum_t grads_t inputs_t^T.");
    m.def("shared_bytes", &shared_memory_limit, "Bytes of shared memory that a block of a device may have.");
    m.def(
        "linear_sketch_tile",
        [](int64_t k, bool split) {
            const LinearTile tile = linear_sketch_tile(k, split);
            return std::make_tuple(tile.tokens, tile.parts, tile.shared_bytes);
        },
        "Of a block: tokens of which its share is a multiple, blocks that share planes, bytes of shared memory.");
    m.def(
        "linear_sketch_table",
        [](uint64_t columns, int64_t n, uint64_t table) {
            linear_sketch_table(at<const uint32_t>(columns), n, at<uint32_t>(table));
        },
        "The kernel's table from a column table; both in the host's memory.");

    m.def(
        "hash_words",
        [](uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint64_t words, Place place) {
            hash_words(seed, stream, first, n, at<uint32_t>(words), queue(place));
        },
        "The keyed hash's words of first, first + 1, ...: [n] int32.");
    m.def(
        "flat_sketch",
        [](uint64_t table, int64_t tensors, int64_t batch, int64_t rows, int64_t parts, int64_t chunks_of_part, uint64_t seed,
           int64_t dim, uint64_t places, uint64_t scales, uint64_t partial, uint64_t sketch,
           std::tuple<uint64_t, uint64_t, uint64_t, int64_t> squares, Place place) {
            const auto [of_rows, partial_squares, of_tensors, slices] = squares;
            flat_sketch({at<int64_t>(table), tensors, batch, rows, parts, chunks_of_part}, seed, dim, at<uint32_t>(places),
                        at<float>(scales), at<float>(partial), at<float>(sketch),
                        {at<float>(of_rows), at<float>(partial_squares), at<float>(of_tensors), slices}, queue(place));
        },
        "Sketches of lists of tensors; launchers.h says what the arguments are.");

#if defined(RAPIDIN_EMULATE)
    m.attr("emulated") = true;
    m.def("set_order", &emulator::set_order, "Order in which a block's threads run: 0, 1 or 2.");
#else
    m.attr("emulated") = false;
#endif
}

}  // namespace
}  // namespace rapidin

PYBIND11_MODULE(RAPIDIN_MODULE, m) { rapidin::bind(m); }
