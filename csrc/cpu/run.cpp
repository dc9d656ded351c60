#include "run.h"

#include <algorithm>
#include <stdexcept>

#include "pool.h"
#include "scratch.h"

#ifdef RAPIDIN_X86
#include <cpuid.h>
#elif defined(RAPIDIN_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(RAPIDIN_ARM64)
#include <sys/auxv.h>
#endif

namespace rapidin {

// ---- instruction sets ----

namespace {

#ifdef RAPIDIN_X86
struct Features {
    bool avx2 = false, avx512 = false;
};

Features machine_features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
    const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    const unsigned wanted = fma | osxsave | avx | f16c;
    if ((c & wanted) != wanted) return {};
    unsigned saved, high;  // registers that the operating system saves: bits 1 (SSE), 2 (AVX), 5 to 7 (AVX-512)
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 6u) != 6u || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
    const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
    Features found;
    found.avx2 = b & (1u << 5);
    found.avx512 = found.avx2 && (saved & 0xe6u) == 0xe6u && (b & (f | dq | bw | vl)) == (f | dq | bw | vl) && (c & vnni);
    return found;
}
#endif

#ifdef RAPIDIN_ARM64
// NEON itself is part of every AArch64 machine.
bool has_i8mm() {
#ifdef __APPLE__
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) == 0 && found;
#else
    return getauxval(AT_HWCAP2) & (1ul << 13);  // HWCAP2_I8MM, which older headers do not have
#endif
}
#endif

std::vector<const Kernels*> find_sets() {
    std::vector<const Kernels*> sets{&kKernelsBase};
#ifdef RAPIDIN_X86
    const Features machine = machine_features();
    if (machine.avx2) sets.push_back(&kKernelsAvx2);
    if (machine.avx512) sets.push_back(&kKernelsAvx512);
#endif
#ifdef RAPIDIN_ARM64
    sets.push_back(&kKernelsNeon);
    if (has_i8mm()) sets.push_back(&kKernelsNeonI8mm);
#endif
    return sets;
}

const std::vector<const Kernels*>& sets() {
    static const std::vector<const Kernels*> found = find_sets();
    return found;
}

const Kernels*& in_use() {
    static const Kernels* chosen = sets().back();
    return chosen;
}

}  // namespace

std::vector<std::string> supported_sets() {
    std::vector<std::string> names;
    for (const Kernels* set : sets()) names.emplace_back(set->name);
    return names;
}

const Kernels& kernels() { return *in_use(); }

void use_set(const std::string& name) {
    for (const Kernels* set : sets()) {
        if (name == set->name) {
            in_use() = set;
            return;
        }
    }
    throw std::invalid_argument("this machine has no instruction set '" + name + "'");
}

Processor processor() {
    Processor found{"", 0};
#ifdef RAPIDIN_X86
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return found;
    for (const unsigned part : {b, d, c}) found.vendor.append(reinterpret_cast<const char*>(&part), sizeof part);
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const unsigned family = a >> 8 & 15u;
    found.family = static_cast<int>(family == 15u ? family + (a >> 20 & 255u) : family);
#endif
    return found;
}

// ---- hash ----

void hash_words(uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint32_t* out) {
    const StreamKey key = stream_key(seed, stream);
    for (int64_t i = 0; i < n; ++i) out[i] = hash_word(key, first + static_cast<uint32_t>(i));
}

void permutation(uint64_t seed, uint32_t stream, uint32_t first, int64_t n, uint32_t* out) {
    const StreamKey key = stream_key(seed, stream);
    std::vector<uint64_t> order(static_cast<size_t>(n));  // word, then position: ties go to the smaller position
    for (int64_t p = 0; p < n; ++p)
        order[p] = static_cast<uint64_t>(hash_word(key, first + static_cast<uint32_t>(p))) << 32 | static_cast<uint64_t>(p);
    std::sort(order.begin(), order.end());
    for (int64_t rank = 0; rank < n; ++rank) out[static_cast<uint32_t>(order[rank])] = static_cast<uint32_t>(rank);
}

void row_table(uint64_t seed, uint32_t bins, uint32_t signs, int64_t n, int64_t k, uint32_t* out) {
    const StreamKey key = stream_key(seed, signs);
    std::vector<uint32_t> chunk(static_cast<size_t>(k));
    for (int64_t start = 0; start < n; start += k) {
        permutation(seed, bins, static_cast<uint32_t>(start), k, chunk.data());
        const int64_t end = std::min(n, start + k);
        for (int64_t i = start; i < end; ++i)
            out[i] = chunk[i - start] | (hash_word(key, static_cast<uint32_t>(i)) & kSignBit);
    }
}

void column_table(uint64_t seed, uint32_t bins, uint32_t signs, int64_t n, int64_t k, uint32_t* out) {
    const StreamKey key = stream_key(seed, signs);
    std::vector<uint32_t> chunk(static_cast<size_t>(k));
    for (int64_t start = 0; start < n; start += k) {
        permutation(seed, bins, static_cast<uint32_t>(start), k, chunk.data());
        for (int64_t i = 0; i < k; ++i)
            out[start + chunk[i]] = static_cast<uint32_t>(i) | (hash_word(key, static_cast<uint32_t>(start + i)) & kSignBit);
    }
}

// ---- linear_sketch ----

namespace {

// Work in pieces of about this many elements: enough to be worth waking a thread for.
constexpr int64_t kPiece = 1 << 15;

int64_t pieces(int64_t items, int64_t elements_each) {
    return std::max<int64_t>(1, std::min(items, items * std::max<int64_t>(elements_each, 1) / kPiece));
}

std::vector<std::vector<float>> scratch(int threads, int64_t size) {
    return std::vector<std::vector<float>>(static_cast<size_t>(threads), std::vector<float>(static_cast<size_t>(size)));
}

}  // namespace

void count_sketch_tokens(const TokenRows& x, const uint32_t* table, int64_t batch, int64_t k, float* out, int threads) {
    const Kernels& set = kernels();
    const int64_t count = batch * x.tokens, parts = pieces(count, x.n + k);
    auto memory = scratch(threads, k);
    parallel(parts, threads, [&](int64_t i, int worker) {
        const int64_t begin = count * i / parts, end = count * (i + 1) / parts;
        set.count_sketch(x, table, begin, end - begin, k, memory[worker].data(), out + begin * k, k);
    });
}

void count_sketch_pairs(const TokenRows& a, const uint32_t* table_a, const TokenRows& g, const uint32_t* table_g, int64_t first,
                        int64_t count, int64_t k, float* z, int threads) {
    const Kernels& set = kernels();
    const int64_t parts = pieces(count, a.n + g.n + 2 * k);
    auto memory = scratch(threads, 3 * k);
    parallel(parts, threads, [&](int64_t i, int worker) {
        const int64_t begin = count * i / parts, end = count * (i + 1) / parts;
        set.count_sketch_pair(a, table_a, g, table_g, first + begin, end - begin, k, memory[worker].data(), z + begin * 2 * k);
    });
}

void square_sums(const float* z, int64_t first, int64_t count, int64_t tokens, int64_t k, float* sum, int threads) {
    const Kernels& set = kernels();
    const int64_t parts = pieces(std::max<int64_t>(k / 16, 1), 16 * count);  // a thread's own frequencies, all tokens in order
    parallel(parts, threads, [&](int64_t i, int) {
        set.square_sum(z, first, count, tokens, k, k * i / parts, k * (i + 1) / parts, sum);
    });
}

void fold_matrices(const FoldArgs& args, float* out, int threads) {
    const Kernels& set = kernels();
    // How rows are cut depends on the shape alone, and parts are added in order: the same bits for any number of threads.
    const int64_t row_work = args.k + args.cols;
    const int64_t wanted = std::max<int64_t>(1, args.rows * row_work / (1 << 18));
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({wanted, args.rows, 64}));
    auto memory = scratch(threads, args.k + std::max(args.k, args.cols));
    std::vector<float> partial(parts > 1 ? static_cast<size_t>(args.batch * parts * args.k) : 0);
    parallel(args.batch * parts, threads, [&](int64_t i, int worker) {
        const int64_t b = i / parts, part = i % parts;
        float* to = parts > 1 ? partial.data() + i * args.k : out + b * args.k;
        std::fill(to, to + args.k, 0.0f);
        set.fold(args, b, args.rows * part / parts, args.rows * (part + 1) / parts, memory[worker].data(), to);
    });
    if (parts == 1) return;
    for (int64_t b = 0; b < args.batch; ++b) {
        float* to = out + b * args.k;
        std::fill(to, to + args.k, 0.0f);
        for (int64_t part = 0; part < parts; ++part) {
            const float* from = partial.data() + (b * parts + part) * args.k;
            for (int64_t i = 0; i < args.k; ++i) to[i] += from[i];
        }
    }
}

// ---- flat_sketch ----

namespace {

constexpr int64_t kFlatParts = 32, kChunksOfPart = 32;  // so adding the parts is a small share of the work

// The whole list as runs of neighbouring rows.
class RunReader {
  public:
    RunReader(const std::vector<FlatTensor>& tensors, int64_t width, int64_t item) : tensors_(tensors), width_(width), item_(item) {}

    // Calls use(run) for the rows [first, last), in order; calls must come in ascending order.
    template <class Use>
    void read(int64_t first, int64_t last, const Use& use) {
        while (first < last) {
            while (first >= end(tensors_[at_])) ++at_;
            const FlatTensor& tensor = tensors_[at_];
            const int64_t bytes = tensor.dtype == kFloat32 ? 4 : 2;
            const int64_t begin = (first - tensor.first_row) * width_;
            const int64_t length = std::min(tensor.numel - begin, (last - first) * width_);
            use(FlatRun{tensor.data + (item_ * tensor.stride_batch + begin) * bytes, tensor.dtype, length, static_cast<uint32_t>(first)});
            first += (length + width_ - 1) / width_;
        }
    }

    int64_t end(const FlatTensor& tensor) const { return tensor.first_row + (tensor.numel + width_ - 1) / width_; }

  private:
    const std::vector<FlatTensor>& tensors_;
    int64_t width_, item_;
    size_t at_ = 0;
};

// Which group each row of a chunk goes to.
class GroupOrder {
  public:
    GroupOrder(uint64_t seed, int64_t groups)
        : groups_(groups), turn_(stream_key(seed, kFlatTurn)), rotation_(stream_key(seed, kFlatRotation)),
          pool_(static_cast<size_t>(kFlatPoolSize * groups)) {
        for (int64_t t = 0; t < kFlatPoolSize; ++t)
            permutation(seed, kFlatPool, static_cast<uint32_t>(t * groups), groups, pool_.data() + t * groups);
    }

    FlatGroups of_chunk(int64_t chunk) const {
        const uint32_t c = static_cast<uint32_t>(chunk), groups = static_cast<uint32_t>(groups_);
        return {pool_.data() + (hash_word(turn_, c) & (kFlatPoolSize - 1)) * groups_, hash_word(rotation_, c) % groups, groups};
    }

  private:
    int64_t groups_;
    StreamKey turn_, rotation_;
    std::vector<uint32_t> pool_;
};

FlatKeys flat_keys(uint64_t seed) {
    FlatKeys keys{stream_key(seed, kFlatLane), {}};
    for (uint32_t i = 0; i < kFlatRow / 32; ++i) keys.signs[i] = stream_key(seed, kFlatSigns + i);
    return keys;
}

thread_local Scratch flat_partial;  // new memory at every call would cost as much as a tenth of the sketch

}  // namespace

void flat_sketch(const std::vector<FlatTensor>& tensors, int64_t batch, uint64_t seed, int64_t dim, float* out, int threads) {
    const Kernels& set = kernels();
    const int64_t width = std::min<int64_t>(dim, kFlatRow), groups = dim / width;
    std::fill(out, out + batch * dim, 0.0f);
    if (tensors.empty()) return;
    const int64_t rows = RunReader(tensors, width, 0).end(tensors.back());
    const int64_t chunks = (rows + groups - 1) / groups;
    const GroupOrder order(seed, groups);
    const FlatKeys keys = flat_keys(seed);

    const auto add_chunks = [&](int64_t item, int64_t begin, int64_t end, float* sums) {
        RunReader reader(tensors, width, item);
        for (int64_t c = begin; c < end; ++c) {
            FlatGroups places = order.of_chunk(c);
            reader.read(c * groups, std::min(rows, (c + 1) * groups), [&](const FlatRun& run) {
                if (width < kFlatRow) return set.flat_narrow(run, width, keys, sums);
                set.flat_rows(run, places, keys, sums);
                places.turned += (run.length + kFlatRow - 1) / kFlatRow;
            });
        }
    };
    // Each part of the list has sums of its own, and these are added in order: how it is cut depends on the sizes
    // alone, so the bits are the same for any number of threads. Rows are read as they lie in memory.
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(kFlatParts, chunks / kChunksOfPart));
    if (parts == 1) {
        parallel(batch, threads, [&](int64_t item, int) { add_chunks(item, 0, chunks, out + item * dim); });
        return;
    }
    // One thread adds each part as it is done, from the cache.
    const int64_t at_once = threads > 1 ? parts : 1;
    float* partial = flat_partial.floats(at_once * dim);
    const int64_t slices = pieces(dim, at_once);
    for (int64_t item = 0; item < batch; ++item) {
        for (int64_t first = 0; first < parts; first += at_once) {
            parallel(at_once, threads, [&](int64_t n, int) {
                float* sums = partial + n * dim;
                std::fill(sums, sums + dim, 0.0f);
                add_chunks(item, chunks * (first + n) / parts, chunks * (first + n + 1) / parts, sums);
            });
            parallel(slices, threads, [&](int64_t slice, int) {
                const int64_t begin = dim * slice / slices, end = dim * (slice + 1) / slices;
                for (int64_t n = 0; n < at_once; ++n)
                    for (int64_t i = begin; i < end; ++i) out[item * dim + i] += partial[n * dim + i];
            });
        }
    }
}

}  // namespace rapidin
