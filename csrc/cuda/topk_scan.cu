// Launches of topk_scan.cuh.
#include "topk_scan.cuh"

namespace rapidin {
namespace {

template <class Format, int NT>
void start(const DeviceScan& args, Queue on) {
    const int64_t query_tiles = (args.q + query_tile<Format, NT>() - 1) / query_tile<Format, NT>();
    const int64_t unit_bytes = Format::kPlanes * NT * args.columns_held * 64, fitting = kFragmentBytes / unit_bytes;
    const int64_t units = fitting < args.units ? fitting : args.units > 0 ? args.units : 1;
    const size_t shared = scan_shared_bytes(units * unit_bytes, args.capacity, query_tile<Format, NT>(), end_count(args.ends));
    const dim3 grid(static_cast<unsigned>(query_tiles), static_cast<unsigned>(args.row_blocks));
    launch("topk_scan", topk_scan_kernel<Format, NT>, grid, kScanThreads, shared, on.handle, args, static_cast<int>(units));
}

}  // namespace

void topk_scan(const DeviceScan& args, Queue on) {
    // Within a row bytes are counted in 32 bits; between rows in 64.
    if (args.width * 4 > INT32_MAX || args.n > INT32_MAX) throw std::runtime_error("topk_scan: a row, or the cache, is too long");
    const OnDevice guard(on.device);
    const bool one = args.tiles == 1;
    if (args.format == kFloat32) one ? start<ScanFloat, 1>(args, on) : start<ScanFloat, 2>(args, on);
    else if (args.format == kFloat16) one ? start<ScanHalf, 1>(args, on) : start<ScanHalf, 4>(args, on);
    else if (args.format == kBFloat16) one ? start<ScanBFloat, 1>(args, on) : start<ScanBFloat, 4>(args, on);
    else if (args.format == kInt8) one ? start<ScanInt8, 1>(args, on) : start<ScanInt8, 4>(args, on);
    else if (args.format == kInt4) one ? start<ScanInt4, 1>(args, on) : start<ScanInt4, 2>(args, on);
    else start<ScanSign, 1>(args, on);
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

void unpack_codes(const uint8_t* rows, int format, int64_t n, int64_t width, int64_t stride_row, uint16_t* out, Queue on) {
    const OnDevice guard(on.device);
    const int64_t wanted = (n * width + kScanThreads - 1) / kScanThreads, most = 16 * multiprocessors();
    launch("unpack_codes", unpack_codes_kernel, dim3(static_cast<unsigned>(wanted < most ? wanted : most)), kScanThreads, 0,
           on.handle, rows, format, n, width, stride_row, out);
}

}  // namespace rapidin
