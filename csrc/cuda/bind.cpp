// Python's door to the CUDA kernels: addresses and sizes as integers, as rapidin/ops/cuda.py hands them over.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <unordered_map>
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

// What a scan takes, by name.
using ScanFields = std::unordered_map<std::string, int64_t>;

DeviceScan device_scan(const ScanFields& fields) {
    const auto number = [&fields](const char* name) { return fields.at(name); };
    const auto address = [&fields](const char* name) { return static_cast<uint64_t>(fields.at(name)); };
    DeviceScan scan = {};
    scan.rows = at<const uint8_t>(address("rows"));
    scan.format = static_cast<int>(number("format"));
    scan.n = number("n");
    scan.width = number("width");
    scan.stride_row = number("stride_row");
    scan.first = number("first");
    scan.scale = at<const void>(address("scale"));
    scan.scale_dtype = static_cast<int>(number("scale_dtype"));
    scan.stride_scale = number("stride_scale");
    scan.segments = at<const int32_t>(address("segments"));
    scan.segment_count = number("segment_count");
    scan.units = number("units");
    scan.scales = at<const float>(address("scales"));
    scan.stride_scales = number("stride_scales");
    scan.fragments = at<const uint8_t>(address("fragments"));
    scan.tiles = static_cast<int>(number("tiles"));
    scan.columns_held = static_cast<int>(number("columns_held"));
    scan.queries = at<const float>(address("queries"));
    scan.q = number("q");
    scan.stride_query = number("stride_query");
    scan.units_of = at<const double>(address("units_of"));
    scan.sums = at<const int64_t>(address("sums"));
    scan.partial = at<double>(address("partial"));
    scan.stride_partial = number("stride_partial");
    scan.first_part = number("first_part") != 0;
    scan.last_part = number("last_part") != 0;
    scan.valid = at<const uint8_t>(address("valid"));
    scan.base = at<const float>(address("base"));
    scan.stride_base = number("stride_base");
    scan.kept = at<int64_t>(address("kept"));
    scan.counts = at<int32_t>(address("counts"));
    scan.least = at<int64_t>(address("least"));
    scan.after = at<const int64_t>(address("after"));
    scan.k = number("k");
    scan.capacity = number("capacity");
    scan.row_blocks = number("row_blocks");
    scan.ends = static_cast<int>(number("ends"));
    return scan;
}

void bind(py::module_& m) {
    m.def(
        "topk_scan", [](const ScanFields& fields, Place place) { topk_scan(device_scan(fields), queue(place)); },
        "One part of a scan; rapidin/ops/cuda.py says what each field is.");
    m.def(
        "topk_merge",
        [](const ScanFields& fields, uint64_t scores, uint64_t indices, uint64_t low_scores, uint64_t low_indices, int64_t stride,
           uint64_t last, Place place) {
            topk_merge(device_scan(fields), {at<float>(scores), at<float>(low_scores)}, {at<int64_t>(indices), at<int64_t>(low_indices)},
                       stride, at<int64_t>(last), queue(place));
        },
        "The best of what the blocks of a scan kept.");
    m.def(
        "unpack_codes",
        [](uint64_t rows, int format, int64_t n, int64_t width, int64_t stride_row, uint64_t out, Place place) {
            unpack_codes(at<const uint8_t>(rows), format, n, width, stride_row, at<uint16_t>(out), queue(place));
        },
        "Codes of packed rows as float16.");
    m.def("multiprocessors", &multiprocessors_of, "How many of them a device has.");
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
