// Python's door to the CUDA kernels: addresses and sizes as integers, as rapidin/ops/cuda.py hands them over.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
