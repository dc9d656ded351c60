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

void bind(py::module_& m) {
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
