// Launches of topk_scan.cuh.
#include "topk_scan.cuh"

namespace rapidin {
namespace {

// The units of fragments that a block holds at a time, and its shared memory.
struct ScanStage {
    int64_t units;
    size_t shared_bytes;
};

template <class Format, int NT>
ScanStage stage_of(int64_t units, int64_t columns_held, int64_t capacity, int ends) {
    constexpr int kQueries = query_tile<Format, NT>();
    static_assert(scan_shared_bytes(kFragmentBytes, kMostCapacity, kQueries, 2) <= kSharedBytes, "more than every device has");
    const int64_t unit_bytes = bytes_of_unit<Format, NT>(static_cast<int>(columns_held)), fitting = kFragmentBytes / unit_bytes;
    const int64_t held = fitting < units ? fitting : units > 0 ? units : 1;
    return {held, scan_shared_bytes(held * unit_bytes, capacity, kQueries, end_count(ends))};
}

template <class Format, int NT>
struct Scan {
    static void start(const DeviceScan& args, Queue on) {
        const int64_t query_tiles = (args.q + query_tile<Format, NT>() - 1) / query_tile<Format, NT>();
        const ScanStage stage = stage_of<Format, NT>(args.units, args.columns_held, args.capacity, args.ends);
        const dim3 grid(static_cast<unsigned>(query_tiles), static_cast<unsigned>(args.row_blocks));
        launch("topk_scan", topk_scan_kernel<Format, NT>, grid, kScanThreads, stage.shared_bytes, on.handle, args,
               static_cast<int>(stage.units));
    }
    static ScanStage stage(int64_t units, int64_t columns_held, int64_t capacity, int ends) {
        return stage_of<Format, NT>(units, columns_held, capacity, ends);
    }
};

// Runs `run` with the kernel of a format and of so many tiles of columns.
template <class Run>
auto with_scan(int format, bool blocks, int tiles, Run run) {
    const bool one = tiles == 1;
    if (blocks && format == kInt8) return one ? run(Scan<ScanSteps<ScanInt8, 8>, 1>()) : run(Scan<ScanSteps<ScanInt8, 8>, 2>());
    if (blocks && format == kInt4) return one ? run(Scan<ScanSteps<ScanInt4, 4>, 1>()) : run(Scan<ScanSteps<ScanInt4, 4>, 2>());
    if (blocks && format == kSign) return one ? run(Scan<ScanSteps<ScanSign<1>, 1>, 1>()) : run(Scan<ScanSteps<ScanSign<1>, 1>, 2>());
    if (format == kFloat32) return one ? run(Scan<ScanFloat, 1>()) : run(Scan<ScanFloat, 2>());
    if (format == kFloat16) return one ? run(Scan<ScanHalf, 1>()) : run(Scan<ScanHalf, 4>());
    if (format == kBFloat16) return one ? run(Scan<ScanBFloat, 1>()) : run(Scan<ScanBFloat, 4>());
    if (format == kInt8) return one ? run(Scan<ScanInt8, 1>()) : run(Scan<ScanInt8, 4>());
    if (format == kInt4) return one ? run(Scan<ScanInt4, 1>()) : run(Scan<ScanInt4, 2>());
    return one ? run(Scan<ScanSign<4>, 1>()) : run(Scan<ScanSign<2>, 2>());
}

}  // namespace

void topk_scan(const DeviceScan& args, Queue on) {
    // Within a row bytes are counted in 32 bits; between rows in 64.
    if (args.width * 4 > INT32_MAX || args.n > INT32_MAX) throw std::runtime_error("topk_scan: a row, or the cache, is too long");
    if (args.capacity > kMostCapacity) throw std::runtime_error("topk_scan: a list is too long to be sorted");
    const OnDevice guard(on.device);
    with_scan(args.format, args.blocks, args.tiles, [&](auto scan) { scan.start(args, on); });
}

int64_t topk_scan_shared_bytes(int format, bool blocks, int tiles, int64_t units, int64_t columns_held, int64_t capacity, int ends) {
    return with_scan(format, blocks, tiles,
                     [&](auto scan) { return static_cast<int64_t>(scan.stage(units, columns_held, capacity, ends).shared_bytes); });
}

void topk_merge(const DeviceScan& args, float* const (&scores)[2], int64_t* const (&indices)[2], int64_t stride_out, int64_t* last,
                Queue on) {
    const OnDevice guard(on.device);
    const MergeOut out = {{scores[0], scores[1]}, {indices[0], indices[1]}, stride_out, last};
    launch("topk_merge", topk_merge_kernel, dim3(static_cast<unsigned>(args.q * end_count(args.ends))), kScanThreads,
           kMergeCapacity * 8 + 16, on.handle, args, out);
}

int multiprocessors_of(int device) {
    const OnDevice guard(device);
    return multiprocessors();
}

}  // namespace rapidin
