// rapidin.ops._cpu: addresses come as integers, strides in elements. rapidin.ops has checked everything before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "run.h"

namespace py = pybind11;
using namespace rapidin;

namespace {

using Address = uintptr_t;
using Strides = std::tuple<int64_t, int64_t, int64_t>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

TokenRows token_rows(Address data, int dtype, int64_t tokens, int64_t n, Strides strides) {
    const auto [batch, token, element] = strides;
    return {at<const void>(data), dtype, tokens, n, batch, token, element};
}

// basis, gain, table, rank
using LowRankTuple = std::tuple<Address, Address, Address, int64_t>;

LowRankArgs low_rank_args(const LowRankTuple& given) {
    const auto& [basis, gain, table, rank] = given;
    return {at<const float>(basis), at<const float>(gain), at<const float>(table), rank};
}

// rows, dtype, width, stride_row, scale, scale_dtype, stride_scale
using PartTuple = std::tuple<Address, int, int64_t, int64_t, Address, int, int64_t>;

ScanPart scan_part(const PartTuple& given) {
    const auto& [rows, dtype, width, stride_row, scale, scale_dtype, stride_scale] = given;
    return {at<const void>(rows), dtype, width, 0, stride_row, at<const void>(scale), scale_dtype, stride_scale, {}};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of rapidin; call them through rapidin.ops.";
    const auto release = py::call_guard<py::gil_scoped_release>();

    m.def("supported_sets", &supported_sets, "Instruction sets of this machine, the best last.");
    m.def("current_set", [] { return std::string(kernels().name); });
    m.def("processor", [] {
        const Processor found = processor();
        return py::make_tuple(found.vendor, found.family);
    });
    m.def("use_set", &use_set, py::arg("name"), "Force an instruction set (for tests).");

    m.def(
        "hash_words",
        [](uint64_t seed, uint32_t stream, uint32_t first, int64_t n, Address out) {
            hash_words(seed, stream, first, n, at<uint32_t>(out));
        },
        release);
    m.def(
        "permutation",
        [](uint64_t seed, uint32_t stream, uint32_t first, int64_t n, Address out) {
            permutation(seed, stream, first, n, at<uint32_t>(out));
        },
        release);
    m.def(
        "row_table",
        [](uint64_t seed, uint32_t bins, uint32_t signs, int64_t n, int64_t k, Address out) {
            row_table(seed, bins, signs, n, k, at<uint32_t>(out));
        },
        release);
    m.def(
        "column_table",
        [](uint64_t seed, uint32_t bins, uint32_t signs, int64_t n, int64_t k, Address out) {
            column_table(seed, bins, signs, n, k, at<uint32_t>(out));
        },
        release);
    m.def(
        "count_sketch",
        [](Address x, int dtype, int64_t batch, int64_t tokens, int64_t n, Strides strides, Address table, int64_t k, Address out,
           int threads) {
            count_sketch_tokens(token_rows(x, dtype, tokens, n, strides), at<const uint32_t>(table), batch, k, at<float>(out), threads);
        },
        release);
    m.def(
        "count_sketch_pairs",
        [](Address a, int dtype_a, int64_t n_a, Strides strides_a, Address table_a, Address g, int dtype_g, int64_t n_g,
           Strides strides_g, Address table_g, int64_t tokens, int64_t first, int64_t count, int64_t k, Address z, int threads) {
            count_sketch_pairs(token_rows(a, dtype_a, tokens, n_a, strides_a), at<const uint32_t>(table_a),
                               token_rows(g, dtype_g, tokens, n_g, strides_g), at<const uint32_t>(table_g), first, count, k,
                               at<float>(z), threads);
        },
        release);
    m.def("has_tensor_sketch", &has_tensor_sketch, py::arg("k"), "Whether tensor_sketch knows this width.");
    m.def(
        "tensor_sketch",
        [](Address a, int dtype_a, int64_t n_a, Strides strides_a, Address table_a, const LowRankTuple& low_rank_a, Address g,
           int dtype_g, int64_t n_g, Strides strides_g, Address table_g, const LowRankTuple& low_rank_g, int64_t batch,
           int64_t tokens, int64_t k, Address out, int threads) {
            const TensorSketchArgs args{token_rows(a, dtype_a, tokens, n_a, strides_a), token_rows(g, dtype_g, tokens, n_g, strides_g),
                                        at<const uint32_t>(table_a), at<const uint32_t>(table_g),
                                        low_rank_args(low_rank_a), low_rank_args(low_rank_g), nullptr};
            tensor_sketch(args, batch, k, at<float>(out), threads);
        },
        release);
    m.def(
        "square_sums",
        [](Address z, int64_t first, int64_t count, int64_t tokens, int64_t k, Address sum, int threads) {
            square_sums(at<const float>(z), first, count, tokens, k, at<float>(sum), threads);
        },
        release);
    m.def(
        "fold",
        [](Address matrix, int dtype, int64_t batch, int64_t rows, int64_t cols, Strides strides, Address row_table,
           int64_t row_table_stride, Address column_table, int64_t k, Address out, int threads) {
            const auto [stride_batch, stride_row, stride_col] = strides;
            const FoldArgs args{at<const void>(matrix), dtype,      batch,      rows,
                                cols,                   stride_batch, stride_row, stride_col,
                                at<const uint32_t>(row_table), row_table_stride, at<const uint32_t>(column_table), k};
            fold_matrices(args, at<float>(out), threads);
        },
        release);
    m.def(
        "flat_sketch",
        [](const std::vector<std::tuple<Address, int, int64_t, int64_t, int64_t>>& list, int64_t batch, uint64_t seed, int64_t dim,
           Address out, int threads) {
            std::vector<FlatTensor> tensors;
            tensors.reserve(list.size());
            for (const auto& [data, dtype, numel, stride_batch, first_row] : list)
                tensors.push_back({at<const char>(data), dtype, numel, stride_batch, first_row});
            flat_sketch(tensors, batch, seed, dim, at<float>(out), threads);
        },
        release);
    m.def(
        "topk_scan",
        [](const std::vector<PartTuple>& list, int64_t n, int64_t d, Address queries, int64_t q, const std::vector<int64_t>& offsets,
           Address scales, int64_t stride_scales, Address valid, Address base, int64_t stride_base, int64_t k, Address top_scores,
           Address top_indices, Address bottom_scores, Address bottom_indices, Address scores, int64_t scored, int64_t stride_scores,
           int threads) {
            std::vector<ScanPart> parts;
            int64_t width = 0;
            for (const PartTuple& each : list) {
                parts.push_back(scan_part(each));
                parts.back().first = width;
                width += parts.back().width;
            }
            ScanArgs args{};
            args.n = n, args.d = d, args.q = q;
            args.queries = at<const float>(queries);
            args.offsets = offsets.data(), args.blocks = static_cast<int64_t>(offsets.size()) - 1;
            args.scales = at<const float>(scales), args.stride_scales = stride_scales;
            args.valid = at<const uint8_t>(valid);
            args.base = at<const float>(base), args.stride_base = stride_base;
            topk_scan(args, std::move(parts), k, {at<float>(top_scores), at<int64_t>(top_indices)},
                      {at<float>(bottom_scores), at<int64_t>(bottom_indices)}, {at<float>(scores), scored, stride_scores}, threads);
        },
        release);
    m.def(
        "pack",
        [](Address rows, int from, int64_t n, int64_t width, int64_t stride_row, int to, Address codes, Address scale, int threads) {
            pack_rows({at<const void>(rows), from, n, width, stride_row, to, at<uint8_t>(codes), at<float>(scale)}, threads);
        },
        release);
    m.def(
        "unpack",
        [](const PartTuple& part, int64_t n, Address out, int threads) { unpack_rows(scan_part(part), n, at<float>(out), threads); },
        release);
}
