// Launches of scan_queries.cuh.
#include "scan_queries.cuh"

namespace rapidin {

void scan_queries(const ScanQueries& args, Queue on) {
    const OnDevice guard(on.device);
    launch("scan_sizes", scan_sizes_kernel, dim3(static_cast<unsigned>(args.q)), kQueryThreads, kQueryWarps * 8, on.handle, args);
    const int64_t words = args.query_tiles * args.units * (args.planes * args.tiles * args.columns_held * 4 + (args.blocks ? 1 + 2 * args.tiles : 0));
    const int64_t wanted = (words + kQueryThreads - 1) / kQueryThreads, most = 16 * multiprocessors();
    launch("scan_fragments", scan_fragments_kernel, dim3(static_cast<unsigned>(wanted < most ? wanted : most)), kQueryThreads, 0,
           on.handle, args);
}

}  // namespace rapidin
