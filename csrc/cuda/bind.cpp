// Python's door to the CUDA kernels: addresses and sizes as integers, as rapidin/ops/cuda.py hands them over.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "launchers.h"

#if defined(RAPIDIN_EMULATE)
namespace emulator {
void bind(pybind11::module_& m);  // tests/support/emulator/module.cpp
}
#define RAPIDIN_ARCHS "sm_80 sm_90 sm_100 compute_100"
#elif !defined(RAPIDIN_ARCHS)
#error "RAPIDIN_ARCHS must say what the kernels are compiled for, as \"sm_80 sm_90 compute_90\""
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

using Term = std::tuple<uint64_t, uint64_t, uint64_t, int64_t>;

LowRankTerm low_rank_term(const Term& term) {
    return {at<const uint32_t>(std::get<0>(term)), at<const float>(std::get<1>(term)), at<const float>(std::get<2>(term)),
            std::get<3>(term)};
}

// What a scan takes, by name.
using ScanFields = std::unordered_map<std::string, int64_t>;

// The lists of what is kept: all that merging them needs.
DeviceScan kept_lists(const ScanFields& fields) {
    const auto address = [&fields](const char* name) { return static_cast<uint64_t>(fields.at(name)); };
    DeviceScan scan = {};
    scan.q = fields.at("q");
    scan.kept = at<int64_t>(address("kept"));
    scan.counts = at<int32_t>(address("counts"));
    scan.least = at<int64_t>(address("least"));
    scan.k = fields.at("k");
    scan.capacity = fields.at("capacity");
    scan.row_blocks = fields.at("row_blocks");
    scan.ends = static_cast<int>(fields.at("ends"));
    return scan;
}

DeviceScan device_scan(const ScanFields& fields) {
    const auto number = [&fields](const char* name) { return fields.at(name); };
    const auto address = [&fields](const char* name) { return static_cast<uint64_t>(fields.at(name)); };
    DeviceScan scan = kept_lists(fields);
    scan.rows = at<const uint8_t>(address("rows"));
    scan.format = static_cast<int>(number("format"));
    scan.n = number("n");
    scan.width = number("width");
    scan.stride_row = number("stride_row");
    scan.first = number("first");
    scan.scale = at<const void>(address("scale"));
    scan.scale_dtype = static_cast<int>(number("scale_dtype"));
    scan.stride_scale = number("stride_scale");
    scan.blocks = number("blocks") != 0;
    scan.segments = at<const int32_t>(address("segments"));
    scan.segment_count = number("segment_count");
    scan.units = number("units");
    scan.scales = at<const float>(address("scales"));
    scan.stride_scales = number("stride_scales");
    scan.fragments = at<const uint8_t>(address("fragments"));
    scan.tiles = static_cast<int>(number("tiles"));
    scan.columns_held = static_cast<int>(number("columns_held"));
    scan.queries = at<const float>(address("queries"));
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
    scan.after = at<const int64_t>(address("after"));
    return scan;
}

ScanQueries queries_of_scan(const ScanFields& fields) {
    const auto number = [&fields](const char* name) { return fields.at(name); };
    const auto address = [&fields](const char* name) { return static_cast<uint64_t>(fields.at(name)); };
    ScanQueries made = {};
    made.queries = at<const float>(address("queries"));
    made.q = number("q");
    made.stride_query = number("stride_query");
    made.width = number("width");
    made.format = static_cast<int>(number("format"));
    made.blocks = number("blocks") != 0;
    made.units = number("units");
    made.planes = static_cast<int>(number("planes"));
    made.tiles = static_cast<int>(number("tiles"));
    made.columns_held = static_cast<int>(number("columns_held"));
    made.query_tiles = number("query_tiles");
    made.places = at<const int32_t>(address("places"));
    made.place_planes = static_cast<int>(number("place_planes"));
    made.steps = at<const int32_t>(address("steps"));
    made.segments = at<const int32_t>(address("segments"));
    made.segment_count = number("segment_count");
    made.segment_ints = number("segment_ints");
    made.segment_sums = at<int32_t>(address("segment_sums"));
    made.units_of = at<double>(address("units_of"));
    made.inverse = at<double>(address("inverse"));
    made.sums = at<int64_t>(address("sums"));
    made.fragments = at<uint8_t>(address("fragments"));
    return made;
}

void bind(py::module_& m) {
    m.def(
        "linear_sketch",
        [](uint64_t inputs, int inputs_dtype, int64_t n_in, const Strides& inputs_strides, uint64_t inputs_table,
           const Term& inputs_term, uint64_t grads, int grads_dtype, int64_t n_out, const Strides& grads_strides,
           uint64_t grads_table, const Term& grads_term, int64_t batch, int64_t tokens, int64_t k, int64_t splits,
           int64_t block_tokens, uint64_t partial, uint64_t out, Place place) {
            linear_sketch(token_rows(grads, grads_dtype, tokens, n_out, grads_strides), at<const uint32_t>(grads_table),
                          token_rows(inputs, inputs_dtype, tokens, n_in, inputs_strides), at<const uint32_t>(inputs_table),
                          low_rank_term(grads_term), low_rank_term(inputs_term), batch, k, splits, block_tokens,
                          at<float>(partial), at<float>(out), queue(place));
        },
        "TensorSketches [batch, k] float32 of sum_t grads_t inputs_t^T.");
    m.def("linear_sketch_low_rank", &linear_sketch_low_rank, "The largest rank that it adds by itself, 0 for none.");
    m.def("shared_bytes", &shared_memory_limit, "Bytes of shared memory that a block of a device may have.");
    m.def(
        "linear_sketch_tile",
        [](int64_t k, int dtype, int other_dtype) {
            const LinearTile tile = linear_sketch_tile(k, dtype, other_dtype);
            return std::make_tuple(tile.tokens, tile.shared_bytes);
        },
        "Of a block: tokens of which its share is a multiple, bytes of shared memory.");
    m.def(
        "linear_sketch_table",
        [](uint64_t columns, int64_t n, int64_t k, int bytes, uint64_t table) {
            linear_sketch_table(at<const uint32_t>(columns), n, k, bytes, at<uint32_t>(table));
        },
        "The kernel's table from a column table; both in the host's memory.");
    m.def(
        "topk_scan", [](const ScanFields& fields, Place place) { topk_scan(device_scan(fields), queue(place)); },
        "One part of a scan; rapidin/ops/cuda/scan.py says what each field is.");
    m.def("topk_scan_shared_bytes", &topk_scan_shared_bytes, "Bytes of shared memory of a block of a scan.");
    m.def(
        "topk_merge",
        [](const ScanFields& fields, uint64_t scores, uint64_t indices, uint64_t low_scores, uint64_t low_indices, int64_t stride,
           uint64_t last, Place place) {
            topk_merge(kept_lists(fields), {at<float>(scores), at<float>(low_scores)}, {at<int64_t>(indices), at<int64_t>(low_indices)},
                       stride, at<int64_t>(last), queue(place));
        },
        "The best of what the blocks of a scan kept.");
    m.def(
        "scan_queries", [](const ScanFields& fields, Place place) { scan_queries(queries_of_scan(fields), queue(place)); },
        "Queries as a scan takes them; rapidin/ops/cuda/scan.py says what each field is.");
    m.def("multiprocessors", &multiprocessors_of, "How many of them a device has.");
    m.def("capability", &capability_of, "A device's compute capability, 10 major + minor.");
    m.attr("architectures") = RAPIDIN_ARCHS;
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
    emulator::bind(m);
#else
    m.attr("emulated") = false;
#endif
}

}  // namespace
}  // namespace rapidin

PYBIND11_MODULE(RAPIDIN_MODULE, m) { rapidin::bind(m); }
