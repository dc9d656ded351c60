// The CPU ops as Python calls them: one kernel table, threads, and sums in an order that no number of threads changes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace rapidin {

std::vector<std::string> supported_sets();       // best last
const Kernels& kernels();                        // the set in use
void use_set(const std::string& name);           // throws std::invalid_argument where this machine lacks it

// As the processor names itself; "" and 0 where it is not x86.
struct Processor {
    std::string vendor;
    int family;
};
Processor processor();

void hash_words(uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint32_t* out);
void permutation(uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint32_t* out);
// [n]: bin | sign of each index
void row_table(uint64_t seed, uint32_t bins, uint32_t signs, int64_t n, int64_t k, uint32_t* out);
// [ceil(n / k) * k]: by (chunk, bin), the index in the chunk | its sign
void column_table(uint64_t seed, uint32_t bins, uint32_t signs, int64_t n, int64_t k, uint32_t* out);

void count_sketch_tokens(const TokenRows& x, const uint32_t* table, int64_t batch, int64_t k, float* out, int threads);
void count_sketch_pairs(const TokenRows& a, const uint32_t* table_a, const TokenRows& g, const uint32_t* table_g, int64_t first,
                        int64_t count, int64_t k, float* z, int threads);
void square_sums(const float* z, int64_t first, int64_t count, int64_t tokens, int64_t k, float* sum, int threads);
bool has_tensor_sketch(int64_t k);
// args.plan is filled in here.
void tensor_sketch(TensorSketchArgs args, int64_t batch, int64_t k, float* out, int threads);
void fold_matrices(const FoldArgs& args, float* out, int threads);
void flat_sketch(const std::vector<FlatTensor>& tensors, int64_t batch, uint64_t seed, int64_t dim, float* out, int threads);

struct ScanResult {
    float* scores;     // [q, k], NaN where there are fewer rows
    int64_t* indices;  // [q, k], -1 there
};
struct AllScores {
    float* scores;   // [q, n] of the first q queries, NaN for rows that are not valid
    int64_t q, stride;
};
// Fills in the parts' integer queries itself. Either end may have null pointers: not wanted.
void topk_scan(ScanArgs args, std::vector<ScanPart> parts, int64_t k, ScanResult top, ScanResult bottom, AllScores every,
               int threads);
void pack_rows(const PackArgs& args, int threads);
void unpack_rows(const ScanPart& part, int64_t n, float* out, int threads);

}  // namespace rapidin
