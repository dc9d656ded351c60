// The scan's driver: integer queries, rows handed to threads, the best of what they find; and packing.
#include <algorithm>
#include <cmath>
#include <limits>

#include "packed.h"
#include "pool.h"
#include "run.h"

namespace rapidin {
namespace {

// Where a vector's elements may begin so that loads do not cross cache lines, which takes twice the time; it must have
// kGroup bytes to spare.
template <class T>
T* aligned(const std::vector<T>& memory) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<T*>((at + kGroup - 1) / kGroup * kGroup);
}

// ---- integer queries ----

// The integer queries of one packed part, and the memory that its ByteQueries point to.
class QueriesOfPart {
  public:
    QueriesOfPart(const ScanArgs& args, const ScanPart& part, int threads)
        : layout_(packed_layout(part.dtype)), width_(part.width), bytes_(packed_bytes(part.width, layout_.numbers)),
          few_(one_at_a_time(args.q, layout_.planes, bytes_)), padded_(padded_bytes(bytes_)),
          memory_(static_cast<size_t>(args.q * layout_.planes * padded_ + kGroup)),
          sums_(static_cast<size_t>(args.q)), scales_(static_cast<size_t>(args.q)) {
        const int64_t tiles = query_tiles(args.q);
        parallel(tiles, threads, [&](int64_t tile, int) {
            const int64_t begin = args.q * tile / tiles, size = args.q * (tile + 1) / tiles - begin;
            for (int64_t j = 0; j < size; ++j)
                fill(args.queries + (begin + j) * args.d + part.first, begin + j, j, size,
                     planes() + begin * layout_.planes * padded_);
        });
    }

    ByteQueries view() const { return {planes(), sums_.data(), scales_.data()}; }

  private:
    int8_t* planes() const { return aligned(memory_); }

    // Query q, which is number `place` of a tile of `size` queries, whose planes begin at `to`.
    void fill(const float* query, int64_t q, int64_t place, int64_t size, int8_t* to) {
        float largest = 0.0f;
        bool finite = true;
        for (int64_t i = 0; i < width_; ++i) {
            largest = std::max(largest, std::fabs(query[i]));
            finite = finite && std::isfinite(query[i]);
        }
        scales_[q] = finite ? static_cast<double>(largest) / layout_.limit : std::numeric_limits<double>::quiet_NaN();
        if (!finite || largest == 0.0f) return;  // zeros will do
        const double inverse = layout_.limit / static_cast<double>(largest);
        for (int64_t group = 0; group < bytes_; group += kGroup) {
            const int64_t bytes = std::min(kGroup, bytes_ - group), window = group / kWindow * kWindow;
            const int64_t next_plane = (few_ ? kGroup : window_bytes(padded_, window)) * size;
            int8_t* at = to + (few_ ? group * layout_.planes : window * layout_.planes + group - window) * size + place * kGroup;
            for (int64_t number = 0; number < layout_.numbers; ++number, at += next_plane) {
                const int64_t first = group * layout_.numbers + number * bytes, count = std::min(bytes, width_ - first);
                for (int64_t i = 0; i < count; ++i) {
                    const int value = static_cast<int>(std::lrint(static_cast<double>(query[first + i]) * inverse));
                    sums_[q] += value;
                    const int high = layout_.limit > 127 ? (value + 32) >> 6 : 0;
                    if (layout_.limit > 127) at[next_plane + i] = static_cast<int8_t>(high);
                    at[i] = static_cast<int8_t>(value - 64 * high);
                }
            }
        }
    }

    PackedLayout layout_;
    int64_t width_, bytes_;
    bool few_;
    int64_t padded_;
    std::vector<int8_t> memory_;
    std::vector<int64_t> sums_;
    std::vector<double> scales_;
};

// ---- integer queries of blocks ----

// The digits of all queries for one packed part, and the memory that its BlockQueries point to. with_digits: false for floats only.
class BlockQueriesOfPart {
  public:
    BlockQueriesOfPart(const ScanArgs& args, const ScanPart& part, bool with_digits, int threads)
        : layout_(packed_layout(part.dtype)), has_digits_(static_cast<size_t>(args.q)) {
        if (!with_digits) return;
        const int64_t bytes = packed_bytes(part.width, layout_.numbers), bits = 8 / layout_.numbers;
        for (int64_t b = 0; b < args.blocks; ++b) {
            const int64_t end = std::min(args.offsets[b + 1] - part.first, part.width);
            for (int64_t n = std::max<int64_t>(args.offsets[b] - part.first, 0); n < end;) {
                const int64_t end_of_piece = std::min(end, n + kLongestPiece), first_step = static_cast<int64_t>(steps_.size());
                while (n < end_of_piece) {
                    const int64_t of_group = kGroup * layout_.numbers, byte = n / of_group * kGroup;
                    const int64_t size = std::min(kGroup, bytes - byte), plane = n % of_group / size, place = n % of_group % size;
                    const int64_t count = std::min(size - place, end_of_piece - n);
                    steps_.push_back({byte, static_cast<int>(plane * bits)});
                    runs_.push_back({n, place, count});
                    n += count;
                }
                pieces_.push_back({b, first_step, static_cast<int64_t>(steps_.size()), n == end});
            }
        }
        digits_.resize(static_cast<size_t>(args.q) * steps_.size() * kDigits * kGroup + kGroup);
        minus_.resize(static_cast<size_t>(args.q) * pieces_.size());
        units_.resize(minus_.size());
        parallel(args.q, threads, [&](int64_t q, int) { fill(args.queries + q * args.d + part.first, part.width, q); });
    }

    BlockQueries view() const {
        return {steps_.data(), pieces_.data(), static_cast<int64_t>(steps_.size()), static_cast<int64_t>(pieces_.size()),
                aligned(digits_), minus_.data(), units_.data(), has_digits_.data(),
                std::count(has_digits_.begin(), has_digits_.end(), 1) > 0, std::count(has_digits_.begin(), has_digits_.end(), 0) == 0};
    }

  private:
    // Neighbouring numbers of a row from `number` on, which begin at byte `place` of their group.
    struct Run {
        int64_t number, place, count;
    };

    void fill(const float* query, int64_t width, int64_t q) {
        has_digits_[q] = std::all_of(query, query + width, [](float x) { return std::isfinite(x); });
        if (!has_digits_[q]) return;
        for (size_t p = 0; p < pieces_.size(); ++p) {
            const BlockPiece& piece = pieces_[p];
            float largest = 0.0f;
            for (int64_t s = piece.first_step; s < piece.end_step; ++s)
                for (int64_t i = 0; i < runs_[s].count; ++i) largest = std::max(largest, std::fabs(query[runs_[s].number + i]));
            int exponent = 0;
            std::frexp(largest, &exponent);
            const int bits = (kDigits - 1) * layout_.digit_bits + 6 - exponent;  // so that the highest digit is within +-64
            const size_t at = static_cast<size_t>(q) * pieces_.size() + p;
            units_[at] = std::ldexp(layout_.unit, -bits);
            int64_t sum = 0;
            for (int64_t s = piece.first_step; s < piece.end_step; ++s)
                sum += write_digits(query + runs_[s].number, runs_[s], std::ldexp(1.0, bits),
                                    aligned(digits_) + (q * static_cast<int64_t>(steps_.size()) + s) * kDigits * kGroup);
            minus_[at] = static_cast<double>(layout_.minus * sum);
        }
    }

    // Digits of the numbers of a step. Returns the sum of their integers.
    int64_t write_digits(const float* query, const Run& run, double lift, int8_t* to) const {
        const int64_t base = int64_t{1} << layout_.digit_bits;
        int64_t sum = 0;
        for (int64_t i = 0; i < run.count; ++i) {
            int64_t value = std::lrint(static_cast<double>(query[i]) * lift);
            sum += value;
            for (int d = 0; d < kDigits; ++d) {
                const int64_t rest = (value + base / 2) >> layout_.digit_bits;
                to[d * kGroup + run.place + i] = static_cast<int8_t>(d + 1 < kDigits ? value - rest * base : value);
                value = rest;
            }
        }
        return sum;
    }

    PackedLayout layout_;
    std::vector<BlockStep> steps_;
    std::vector<Run> runs_;
    std::vector<BlockPiece> pieces_;
    std::vector<int8_t> digits_;
    std::vector<double> minus_, units_;
    std::vector<uint8_t> has_digits_;
};

// ---- the best ----

struct Candidate {
    float key;  // the score, or minus the score where the smallest are wanted
    int64_t index;
};

bool better(const Candidate& x, const Candidate& y) { return x.key > y.key || (x.key == y.key && x.index < y.index); }

// The best k candidates of rows seen in ascending order. Up to twice as many are kept between clearings, so that a row
// costs a comparison, and one that is kept a few, whatever k is.
class Best {
  public:
    void add(float key, int64_t index, size_t k) {
        if (!(key > least_)) {  // nor NaN; a later row of the same score is no better
            if (kept_.size() >= k || std::isnan(key)) return;
        }
        kept_.push_back({key, index});
        if (kept_.size() >= 2 * k + 64) clear(k);
    }
    // Leaves the best k, in no order.
    std::vector<Candidate>& clear(size_t k) {
        if (kept_.size() > k) {
            std::nth_element(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(k), kept_.end(), better);
            kept_.resize(k);
            least_ = std::numeric_limits<float>::infinity();
            for (const Candidate& each : kept_) least_ = std::min(least_, each.key);
        }
        return kept_;
    }

  private:
    std::vector<Candidate> kept_;
    float least_ = -std::numeric_limits<float>::infinity();  // what a row must be better than
};

using BestOfThreads = std::vector<std::vector<Best>>;  // [threads][q]

void merge(BestOfThreads& found, int64_t q, int64_t k, float sign, ScanResult out) {
    if (!out.scores) return;
    std::vector<Candidate> all;
    for (auto& of_thread : found) {
        const std::vector<Candidate>& kept = of_thread[q].clear(static_cast<size_t>(k));
        all.insert(all.end(), kept.begin(), kept.end());
    }
    std::sort(all.begin(), all.end(), better);
    for (int64_t i = 0; i < k; ++i) {
        const bool there = i < static_cast<int64_t>(all.size());
        out.scores[q * k + i] = there ? sign * all[i].key : std::numeric_limits<float>::quiet_NaN();
        out.indices[q * k + i] = there ? all[i].index : -1;
    }
}

}  // namespace

void topk_scan(ScanArgs args, std::vector<ScanPart> parts, int64_t k, ScanResult top, ScanResult bottom, AllScores every,
               int threads) {
    if (args.q == 0) return;
    const Kernels& set = kernels();
    std::vector<QueriesOfPart> queries;
    std::vector<BlockQueriesOfPart> of_blocks;
    queries.reserve(parts.size());
    of_blocks.reserve(parts.size());
    for (ScanPart& part : parts) {
        if (!is_packed(part.dtype)) continue;
        if (args.scales) part.blocks = of_blocks.emplace_back(args, part, set.block_digits, threads).view();
        else part.queries = queries.emplace_back(args, part, threads).view();
    }
    args.parts = parts.data();
    args.part_count = static_cast<int64_t>(parts.size());

    struct Worker {
        std::vector<float> floats;
        std::vector<int64_t> sums;
        std::vector<double> scores;
    };
    const size_t pairs = static_cast<size_t>(kScanRows * args.q);
    std::vector<Worker> workers(static_cast<size_t>(threads));
    for (Worker& worker : workers) {
        worker.floats.resize(kScanRows * kScanTile + kGroup);
        worker.sums.resize(pairs);
        worker.scores.resize(pairs);
    }
    BestOfThreads highest(threads, std::vector<Best>(args.q)), lowest = highest;
    const size_t wanted = static_cast<size_t>(k);

    parallel((args.n + kScanRows - 1) / kScanRows, threads, [&](int64_t block, int number) {
        const int64_t first = block * kScanRows, count = std::min(kScanRows, args.n - first);
        const auto valid = [&](int64_t row) { return !args.valid || args.valid[row]; };
        bool any = false;
        for (int64_t row = first; row < first + count; ++row) any = any || valid(row);
        for (int64_t q = 0; q < every.q; ++q)
            std::fill_n(every.scores + q * every.stride + first, count, std::numeric_limits<float>::quiet_NaN());
        if (!any) return;
        Worker& worker = workers[number];
        const double* scores = worker.scores.data();
        set.scan(args, first, count, aligned(worker.floats), worker.sums.data(), worker.scores.data());
        for (int64_t q = 0; q < args.q; ++q) {
            const float* base = args.base ? args.base + q * args.stride_base + first : nullptr;
            float* kept = q < every.q ? every.scores + q * every.stride + first : nullptr;
            for (int64_t r = 0; r < count; ++r) {
                if (!valid(first + r)) continue;
                const double sum = scores[r * args.q + q];
                const float score = static_cast<float>(base ? static_cast<double>(base[r]) + sum : sum);
                if (kept) kept[r] = score;
                if (top.scores) highest[number][q].add(score, first + r, wanted);
                if (bottom.scores) lowest[number][q].add(-score, first + r, wanted);
            }
        }
    });
    for (int64_t q = 0; q < args.q; ++q) {
        merge(highest, q, k, 1.0f, top);
        merge(lowest, q, k, -1.0f, bottom);
    }
}

// ---- packing ----

void pack_rows(const PackArgs& args, int threads) {
    const Kernels& set = kernels();
    std::vector<std::vector<float>> scratch(static_cast<size_t>(threads), std::vector<float>(kPackTile));
    const int64_t rows = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(args.width, 1));  // worth a thread's while
    parallel((args.n + rows - 1) / rows, threads, [&](int64_t i, int worker) {
        set.pack(args, i * rows, std::min(args.n, (i + 1) * rows), scratch[worker].data());
    });
}

void unpack_rows(const ScanPart& part, int64_t n, float* out, int threads) {
    const Kernels& set = kernels();
    parallel(n, threads, [&](int64_t row, int) { set.unpack(part, row, out + row * part.width); });
}

}  // namespace rapidin
