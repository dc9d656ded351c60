// linear_sketch by Fourier transforms: plans, threads, and sums in an order that no number of threads changes.
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "pool.h"
#include "run.h"
#include "scratch.h"

namespace rapidin {
namespace {

// A plan with the memory that it points to.
class OwnPlan {
  public:
    explicit OwnPlan(int64_t k) {
        plan_.k = k;
        plan_.passes = 0;
        int bits = 0;
        while (int64_t{1} << bits < k) ++bits;
        for (int fours = (3 - bits % 3) % 3; bits > 0;) {
            const int of_pass = fours-- > 0 ? 2 : 3;
            if (plan_.passes == 0) plan_.leg_bits = bits - of_pass;
            plan_.radix[plan_.passes++] = 1 << of_pass;
            bits -= of_pass;
        }
        int64_t n = k;
        for (int pass = 0; pass < plan_.passes; n /= plan_.radix[pass++]) twiddles_.push_back(twiddles(n, plan_.radix[pass]));
        for (int pass = 0; pass < plan_.passes; ++pass) plan_.twiddles[pass] = twiddles_[pass].data();
        for (int64_t w = 0; w < k; ++w) order_.push_back(place_of(w));
        plan_.order = order_.data();
    }
    OwnPlan(const OwnPlan&) = delete;

    const FftPlan& get() const { return plan_; }

  private:
    static std::vector<float> twiddles(int64_t n, int radix) {
        std::vector<float> table;
        for (int64_t j = 0; j < n / radix; ++j) {
            for (int64_t r = 1; r < radix; ++r) {
                const double angle = -2.0 * 3.14159265358979323846 * static_cast<double>(j * r) / static_cast<double>(n);
                table.push_back(static_cast<float>(std::cos(angle)));
                table.push_back(static_cast<float>(std::sin(angle)));
            }
        }
        return table;
    }

    // A pass of n points sends frequency w to part w mod radix, there to be frequency w div radix.
    uint32_t place_of(int64_t w) const {
        int64_t n = plan_.k, place = 0;
        for (int pass = 0; pass < plan_.passes; ++pass) {
            const int64_t radix = plan_.radix[pass];
            n /= radix;
            place += w % radix * n;
            w /= radix;
        }
        return static_cast<uint32_t>(place);
    }

    FftPlan plan_;
    std::vector<std::vector<float>> twiddles_;
    std::vector<uint32_t> order_;
};

const FftPlan& plan_of(int64_t k) {
    static std::mutex mutex;
    static std::vector<std::unique_ptr<OwnPlan>> plans;
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& plan : plans)
        if (plan->get().k == k) return plan->get();
    plans.push_back(std::make_unique<OwnPlan>(k));
    return plans.back()->get();
}

thread_local Scratch work, partial_sums;  // kept between calls

// Tokens of one example summed together. How an example is cut depends on its length alone, not on the threads nor
// on the other examples of its batch, so neither changes a bit.
constexpr int64_t kPartTokens = 128;

}  // namespace

bool has_tensor_sketch(int64_t k) { return k >= FftPlan::kMin && k <= FftPlan::kMax && (k & (k - 1)) == 0; }

void tensor_sketch(TensorSketchArgs args, int64_t batch, int64_t k, float* out, int threads) {
    const Kernels& set = kernels();
    const FftPlan& plan = plan_of(k);
    args.plan = &plan;
    const int64_t tokens = args.p.tokens, parts = (tokens + kPartTokens - 1) / kPartTokens, size = 2 * k;
    const int64_t memory = set.tensor_sketch_scratch(plan, std::max(args.low_rank_p.rank, args.low_rank_q.rank));
    float* sums = partial_sums.floats(batch * parts * size);
    parallel(batch * parts, threads, [&](int64_t i, int) {
        const int64_t begin = i % parts * kPartTokens, end = std::min(tokens, begin + kPartTokens);
        set.token_squares(args, i / parts, begin, end, work.floats(memory), sums + i * size);
    });
    for (int64_t b = 0; b < batch; ++b) {
        float* total = sums + b * size;  // of examples before it only: their parts are summed already
        for (int64_t part = 0; part < parts; ++part) {
            const float* from = sums + (b * parts + part) * size;
            if (part == 0 && from != total) std::copy(from, from + size, total);
            for (int64_t j = 0; part > 0 && j < size; ++j) total[j] += from[j];
        }
    }
    const int64_t groups = (batch + set.lanes - 1) / set.lanes;
    parallel(groups, threads, [&](int64_t group, int) {
        const int64_t first = group * set.lanes, count = std::min<int64_t>(set.lanes, batch - first);
        set.sketch_of_squares(plan, sums + first * size, count, work.floats(memory), out + first * k);
    });
}

}  // namespace rapidin
