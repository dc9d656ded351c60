// Compares what each instruction set of this machine computes with the portable kernels, without Python: for machines that
// are emulated. Prints the sets, then a line for each case whose results are exact, with a hash of their bits, which is
// the same on every machine and in every set. Ends with 1 and a line for each case that is wrong.
//
//   compare [threads]
//
// tests/csrc/test_instruction_sets.py builds it from csrc/cpu with the flags of csrc/build_extensions.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../../csrc/cpu/run.h"

using namespace rapidin;

namespace {

constexpr uint64_t kSeed = 0x9E3779B97F4A7C15ull;
int threads = 1;
bool failed = false;

// ---- inputs, the same on every machine ----

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
    uint32_t word() {
        state_ += 0x9E3779B97F4A7C15ull;
        uint64_t x = state_;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
        return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
    }
    int below(int n) { return static_cast<int>(word() % static_cast<uint32_t>(n)); }
    // From -3 to 3 with 20 bits, close to normal.
    float number() {
        int sum = 0;
        for (int i = 0; i < 6; ++i) sum += below(1 << 17);
        return static_cast<float>(sum - 3 * (1 << 17)) / static_cast<float>(1 << 17);
    }

  private:
    uint64_t state_;
};

// Numbers of one dtype in memory, `exact`: small integers, whose sums of products are exact in any order.
struct Numbers {
    int dtype;
    std::vector<uint8_t> bytes;
    const void* data() const { return bytes.data(); }
};

uint16_t half_of_integer(int x, int dtype) {  // |x| <= 4
    static const uint16_t half[] = {0, 0x3c00, 0x4000, 0x4200, 0x4400}, bfloat[] = {0, 0x3f80, 0x4000, 0x4040, 0x4080};
    const uint16_t size = (dtype == kFloat16 ? half : bfloat)[x < 0 ? -x : x];
    return static_cast<uint16_t>(size | (x < 0 ? 0x8000 : 0));
}

Numbers numbers(int64_t count, int dtype, bool exact, uint64_t seed) {
    Random random(seed);
    Numbers out{dtype, std::vector<uint8_t>(static_cast<size_t>(count * (dtype == kFloat32 ? 4 : 2)))};
    for (int64_t i = 0; i < count; ++i) {
        if (dtype == kFloat32) {
            const float x = exact ? static_cast<float>(random.below(9) - 4) : random.number();
            memcpy(out.bytes.data() + 4 * i, &x, 4);
            continue;
        }
        uint16_t bits = half_of_integer(random.below(9) - 4, dtype);
        if (!exact && dtype == kFloat16)  // 2^-4 to 2
            bits = static_cast<uint16_t>((random.below(2) << 15) | ((11 + random.below(5)) << 10) | random.below(1024));
        if (!exact && dtype == kBFloat16)
            bits = static_cast<uint16_t>((random.below(2) << 15) | ((123 + random.below(5)) << 7) | random.below(128));
        memcpy(out.bytes.data() + 2 * i, &bits, 2);
    }
    return out;
}

// ---- comparison ----

using Results = std::vector<float>;

uint64_t digest(const Results& results) {  // FNV-1a of the bits; all NaN are one, and so are the zeros
    uint64_t hash = 0xcbf29ce484222325ull;
    for (float x : results) {
        uint32_t bits = 0x7fc00000u;
        if (x == 0.0f) bits = 0;
        else if (!std::isnan(x)) memcpy(&bits, &x, 4);
        for (int i = 0; i < 4; ++i) hash = (hash ^ (bits >> 8 * i & 255)) * 0x100000001b3ull;
    }
    return hash;
}

// Runs a case in every set; tolerance: of the largest result of the portable kernels, 0 where bits must be equal.
void compare(const std::string& name, double tolerance, const std::function<Results()>& run) {
    use_set("base");
    const Results wanted = run();
    double largest = 0.0;
    for (float x : wanted)
        if (std::isfinite(x)) largest = std::max(largest, static_cast<double>(std::fabs(x)));
    for (const std::string& set : supported_sets()) {
        use_set(set);
        const Results found = run();
        double error = 0.0;
        for (size_t i = 0; i < wanted.size(); ++i) {
            if (std::isnan(wanted[i]) && std::isnan(found[i])) continue;
            if (wanted[i] == found[i]) continue;
            const double difference = std::fabs(static_cast<double>(wanted[i]) - static_cast<double>(found[i]));
            error = std::isfinite(difference) ? std::max(error, difference) : INFINITY;
        }
        if (!(error <= tolerance * largest)) {
            std::printf("WRONG %s in %s: error %g, largest result %g\n", name.c_str(), set.c_str(), error, largest);
            failed = true;
        }
    }
    if (tolerance == 0.0) std::printf("exact %s %016llx\n", name.c_str(), static_cast<unsigned long long>(digest(wanted)));
}

const std::map<int, const char*> kNames = {{kFloat32, "float32"}, {kFloat16, "float16"}, {kBFloat16, "bfloat16"},
                                           {kInt8, "int8"},       {kInt4, "int4"},       {kSign, "sign"}};

std::string label(const char* op, int dtype, bool exact, std::vector<int64_t> sizes) {
    std::string name = std::string(op) + "-" + kNames.at(dtype) + (exact ? "" : "-rounded");
    for (int64_t size : sizes) name += "-" + std::to_string(size);
    return name;
}

double tolerance_of(bool exact) { return exact ? 0.0 : 4e-6; }

// ---- the ops ----

std::vector<uint32_t> columns(int64_t n, int64_t k) {
    std::vector<uint32_t> table(static_cast<size_t>((n + k - 1) / k * k));
    column_table(kSeed, kInBins, kInSigns, n, k, table.data());
    return table;
}

std::vector<uint32_t> rows(uint32_t bins, uint32_t signs, int64_t n, int64_t k) {
    std::vector<uint32_t> table(static_cast<size_t>(n));
    row_table(kSeed, bins, signs, n, k, table.data());
    return table;
}

void compare_conversions() {  // every float16, subnormals and NaN too, by loads of whole vectors
    Numbers x{kFloat16, std::vector<uint8_t>(2 << 16)};
    for (int bits = 0; bits < 1 << 16; ++bits) memcpy(x.bytes.data() + 2 * bits, &bits, 2);
    const auto table = columns(16, 16);
    compare("float16-values", 0.0, [&] {
        Results out(1 << 16);
        count_sketch_tokens({x.data(), kFloat16, 1 << 12, 16, 1 << 16, 16, 1}, table.data(), 1, 16, out.data(), threads);
        return out;
    });
}

void compare_count_sketch(int dtype, bool exact, int64_t n, int64_t k) {
    const int64_t batch = 2, tokens = 5;
    const Numbers x = numbers(batch * tokens * n, dtype, exact, 1), g = numbers(batch * tokens * n, dtype, exact, 2);
    const auto table = columns(n, k);
    const TokenRows of_x{x.data(), dtype, tokens, n, tokens * n, n, 1}, of_g{g.data(), dtype, tokens, n, tokens * n, n, 1};
    compare(label("count_sketch", dtype, exact, {n, k}), tolerance_of(exact), [&] {
        Results out(static_cast<size_t>(batch * tokens * k));
        count_sketch_tokens(of_x, table.data(), batch, k, out.data(), threads);
        return out;
    });
    compare(label("square_sums", dtype, exact, {n, k}), tolerance_of(exact), [&] {
        Results z(static_cast<size_t>(batch * tokens * 2 * k)), out(static_cast<size_t>(batch * 2 * k));
        count_sketch_pairs(of_x, table.data(), of_g, table.data(), 0, batch * tokens, k, z.data(), threads);
        square_sums(z.data(), 0, batch * tokens, tokens, k, out.data(), threads);
        return out;
    });
}

void compare_fold(int dtype, bool exact, int64_t n_out, int64_t n_in, int64_t k) {
    const int64_t batch = 3;
    const Numbers matrix = numbers(batch * n_out * n_in, dtype, exact, 3);
    const auto row = rows(kOutBins, kOutSigns, n_out, k), column = columns(n_in, k);
    const FoldArgs args{matrix.data(), dtype, batch, n_out, n_in, n_out * n_in, n_in, 1, row.data(), 0, column.data(), k};
    compare(label("fold", dtype, exact, {n_out, n_in, k}), tolerance_of(exact), [&] {
        Results out(static_cast<size_t>(batch * k));
        fold_matrices(args, out.data(), threads);
        return out;
    });
}

void compare_tensor_sketch(int dtype, int64_t tokens, int64_t n_in, int64_t n_out, int64_t k, int64_t rank, int64_t stride) {
    const int64_t batch = 6;
    const Numbers x = numbers(batch * tokens * n_in * stride, dtype, false, 4), g = numbers(batch * tokens * n_out, dtype, false, 5);
    const Numbers basis = numbers(n_in * rank, kFloat32, false, 6), gain = numbers(rank, kFloat32, false, 7);
    const auto in = rows(kInBins, kInSigns, n_in, k), out_rows = rows(kOutBins, kOutSigns, n_out, k);
    TensorSketchArgs args{{x.data(), dtype, tokens, n_in, tokens * n_in * stride, n_in * stride, stride},
                          {g.data(), dtype, tokens, n_out, tokens * n_out, n_out, 1},
                          in.data(), out_rows.data(), {}, {}, nullptr};
    if (rank) args.low_rank_p = {static_cast<const float*>(basis.data()), static_cast<const float*>(gain.data()), nullptr, rank};
    compare(label("tensor_sketch", dtype, false, {tokens, n_in, n_out, k, rank, stride}), 1e-5, [&] {
        Results out(static_cast<size_t>(batch * k));
        tensor_sketch(args, batch, k, out.data(), threads);
        return out;
    });
}

void compare_flat_sketch(int dtype, bool exact, int64_t dim) {
    const int64_t batch = 2, sizes[] = {1, 127, 128, 129, 3 * 50, 70000};
    std::vector<Numbers> memory;
    std::vector<FlatTensor> tensors;
    const int64_t width = std::min<int64_t>(dim, kFlatRow);
    int64_t row = 0;
    for (int64_t size : sizes) memory.push_back(numbers(batch * size, dtype, exact, 8 + static_cast<uint64_t>(size)));
    for (size_t i = 0; i < memory.size(); ++i) {
        tensors.push_back({static_cast<const char*>(memory[i].data()), dtype, sizes[i], sizes[i], row});
        row += (sizes[i] + width - 1) / width;
    }
    compare(label("flat_sketch", dtype, exact, {dim}), tolerance_of(exact), [&] {
        Results out(static_cast<size_t>(batch * dim));
        flat_sketch(tensors, batch, kSeed, dim, out.data(), threads);
        return out;
    });
}

Results best(const ScanArgs& args, const std::vector<ScanPart>& parts, int64_t k, bool with_indices) {
    const size_t size = static_cast<size_t>(args.q * k);
    Results top(size), bottom(size);
    std::vector<int64_t> top_indices(size), bottom_indices(size);
    topk_scan(args, parts, k, {top.data(), top_indices.data()}, {bottom.data(), bottom_indices.data()}, {nullptr, 0, 0}, threads);
    top.insert(top.end(), bottom.begin(), bottom.end());
    for (size_t i = 0; with_indices && i < size; ++i) {
        top.push_back(static_cast<float>(top_indices[i]));
        top.push_back(static_cast<float>(bottom_indices[i]));
    }
    return top;
}

void compare_scan(int dtype, bool exact, int64_t n, int64_t width, int64_t q) {
    const Numbers x = numbers(n * width, dtype, exact, 20), y = numbers(q * width, kFloat32, exact, 21);
    ScanArgs args{};
    args.n = n, args.d = width, args.q = q;
    args.queries = static_cast<const float*>(y.data());
    const std::vector<int64_t> offsets{0, width};
    args.offsets = offsets.data(), args.blocks = 1;
    const std::vector<ScanPart> parts{{x.data(), dtype, width, 0, width, nullptr, kFloat32, 0, {}}};
    compare(label("topk_scan", dtype, exact, {n, width, q}), tolerance_of(exact), [&] { return best(args, parts, 9, exact); });
}

// Rows of random bytes: their sums with queries that are integers after scaling are exact in every set.
void compare_packed_scan(int dtype, int64_t n, int64_t width, int64_t q, bool blocks) {
    Random random(30);
    const int64_t per_byte = dtype == kSign ? 8 : dtype == kInt4 ? 2 : 1;
    const int64_t group = 64 * per_byte, rest = width % group;
    const int64_t bytes = width / group * 64 + (rest + per_byte - 1) / per_byte;
    std::vector<uint8_t> rows(static_cast<size_t>(n * bytes));
    for (uint8_t& each : rows) each = static_cast<uint8_t>(random.below(256));
    for (uint8_t& each : rows) each = dtype == kInt8 && each == 128 ? 0 : each;  // codes are from -127 to 127
    const Numbers y = numbers(q * width, kFloat32, false, 31), scale = numbers(n, kFloat16, false, 32);
    const Numbers weights = numbers(2 * n, kFloat32, false, 33);
    ScanArgs args{};
    args.n = n, args.d = width, args.q = q;
    args.queries = static_cast<const float*>(y.data());
    const std::vector<int64_t> offsets = blocks ? std::vector<int64_t>{0, width / 3, width} : std::vector<int64_t>{0, width};
    args.offsets = offsets.data(), args.blocks = static_cast<int64_t>(offsets.size()) - 1;
    if (blocks) args.scales = static_cast<const float*>(weights.data()), args.stride_scales = 2;
    const std::vector<ScanPart> parts{{rows.data(), dtype, width, 0, bytes, scale.data(), kFloat16, 1, {}}};
    compare(label(blocks ? "topk_scan_blocks" : "topk_scan", dtype, !blocks, {n, width, q}), tolerance_of(!blocks),
            [&] { return best(args, parts, 9, !blocks); });
    if (q > 1 || blocks) return;
    compare(label("unpack", dtype, true, {n, width}), 0.0, [&] {
        Results out(static_cast<size_t>(n * width));
        unpack_rows(parts[0], n, out.data(), threads);
        return out;
    });
}

void compare_pack(int from, int to, int64_t width) {
    const int64_t n = 7, per_byte = to == kSign ? 8 : to == kInt4 ? 2 : 1, group = 64 * per_byte;
    const int64_t bytes = width / group * 64 + (width % group + per_byte - 1) / per_byte;
    const Numbers x = numbers(n * width, from, false, 40);
    compare(label("pack", to, true, {from, width}), 0.0, [&] {
        std::vector<uint8_t> codes(static_cast<size_t>(n * bytes));
        Results out(static_cast<size_t>(n));
        pack_rows({x.data(), from, n, width, width, to, codes.data(), out.data()}, threads);
        for (uint8_t code : codes) out.push_back(static_cast<float>(code));
        return out;
    });
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) threads = std::max(1, std::atoi(argv[1]));
    std::printf("sets");
    for (const std::string& set : supported_sets()) std::printf(" %s", set.c_str());
    std::printf("\n");
    compare_conversions();
    for (int dtype : {kFloat32, kFloat16, kBFloat16}) {
        for (bool exact : {true, false}) {
            for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {33, 7}, {130, 64}, {300, 100}}) {
                compare_count_sketch(dtype, exact, n, k);
                compare_fold(dtype, exact, 70, n, k);
            }
            for (int64_t dim : {1, 16, 64, 128, 384, 2048}) compare_flat_sketch(dtype, exact, dim);
        }
        for (int64_t k : {16, 32, 64, 128, 256, 512}) {
            for (int64_t stride : {1, 2}) {
                compare_tensor_sketch(dtype, 1, 5, 3, k, 0, stride);
                compare_tensor_sketch(dtype, 150, 257, 129, k, 0, stride);
                compare_tensor_sketch(dtype, 9, 70, 33, k, 6, stride);
            }
        }
        for (int to : {kInt8, kInt4, kSign})
            for (int64_t width : {1, 127, 1024, 1500}) compare_pack(dtype, to, width);
    }
    for (int64_t q : {1, 2, 3, 4, 5, 7, 13}) {
        for (int64_t width : {1, 7, 64, 1030}) {
            for (int dtype : {kFloat32, kFloat16})
                for (bool exact : {true, false}) compare_scan(dtype, exact, 101, width, q);
        }
        for (int64_t width : {1, 130, 1030, 5000}) {
            for (int dtype : {kInt8, kInt4, kSign}) {
                compare_packed_scan(dtype, 53, width, q, false);
                if (width >= 130) compare_packed_scan(dtype, 53, width, q, true);
            }
        }
    }
    return failed;
}
