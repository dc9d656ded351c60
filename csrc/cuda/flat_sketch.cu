// Launches the flat sketch: its rows, the sums of its parts, and the tensors' squared lengths.
#include "flat_sketch.cuh"

#include "launchers.h"

namespace rapidin {
namespace {

unsigned blocks(int64_t count) {
    if (count >= int64_t{1} << 31) throw std::invalid_argument("flat_sketch: more blocks than a launch may have");
    return static_cast<unsigned>(count);
}

}  // namespace

void flat_sketch(const FlatTable& table, uint64_t seed, int64_t dim, const uint32_t* places, const float* scales, float* partial,
                 float* sketch, const FlatSquares& squares, Queue on) {
    const OnDevice guard(on.device);
    const int64_t n = table.tensors;
    FlatLaunch with = {};
    with.data = table.at;
    with.strides = with.data + n;
    with.numels = with.strides + n;
    with.dtypes = with.numels + n;
    with.firsts = with.dtypes + n;
    with.part_tensors = with.firsts + n + 1;
    with.scales = scales;
    with.places = places;
    with.turn = stream_key(seed, kFlatTurn);
    with.rotation = stream_key(seed, kFlatRotation);
    with.lane = stream_key(seed, kFlatLane);
    for (uint32_t j = 0; j < kFlatRow / 32; ++j) with.signs[j] = stream_key(seed, kFlatSigns + j);
    const int64_t width = dim < kFlatRow ? dim : kFlatRow;
    with.groups = static_cast<uint32_t>(dim / width);
    with.rows = table.rows;
    with.chunks = (table.rows + with.groups - 1) / with.groups;
    with.chunks_of_part = table.chunks_of_part;
    with.parts = table.parts;
    with.batch = table.batch;
    with.sums = table.parts == 1 ? sketch : partial;
    with.row_squares = squares.of_rows;

    const dim3 grid(blocks(with.groups * with.parts * with.batch));
    const bool squared = squares.of_rows != nullptr;
    if (width < kFlatRow) {
        const size_t shared = sizeof(float) * 64 * kFlatWarps;
        const auto kernel = squared ? flat_narrow_kernel<true> : flat_narrow_kernel<false>;
        launch("flat_sketch", kernel, grid, kFlatThreads, shared, on.handle, with, static_cast<int>(width));
    } else {
        const auto kernel = squared ? flat_sketch_kernel<true> : flat_sketch_kernel<false>;
        launch("flat_sketch", kernel, grid, kFlatThreads, flat_shared_bytes(squared), on.handle, with);
    }
    if (table.parts > 1) sum_parts(partial, table.parts, table.batch * dim, sketch, on);
    if (!squared) return;
    launch("flat_squares", flat_squares_kernel, dim3(blocks(squares.slices * n * table.batch)), kFlatThreads,
           sizeof(float) * kFlatWarps, on.handle, with.firsts, squares.of_rows, n, table.batch, table.rows, squares.slices,
           squares.slices == 1 ? squares.of_tensors : squares.partial);
    if (squares.slices > 1) sum_parts(squares.partial, squares.slices, n * table.batch, squares.of_tensors, on);
}

}  // namespace rapidin
