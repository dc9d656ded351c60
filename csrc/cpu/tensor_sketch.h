// TensorSketch of a linear layer's gradient by Fourier transforms: with p and q the count sketches of a token's two factors
// and Z the transform of p + i q, the sketch is the inverse transform of the cross term in the sum of Z^2. See docs/reference/sketch.md.
#pragma once

#include "kernels.h"
#include "lanes_fft.h"

namespace rapidin {
namespace {

// The rows of as many tokens as there are lanes; where there are fewer, the last one is repeated.
template <class T>
struct RowsOf {
    const T* row[kLanes];
    RowsOf(const TokenRows& x, int64_t example, int64_t first, int64_t count) {
        const T* data = static_cast<const T*>(x.data) + example * x.stride_batch;
        for (int l = 0; l < kLanes; ++l) row[l] = data + (first + (l < count ? l : count - 1)) * x.stride_token;
    }
};

constexpr uint32_t kPlain[kBlock] = {};

// Calls visit(first, x, count) for blocks of neighbouring features: x[e] = feature first + e of all tokens, its sign in `table`
// flipped in (null: as it is). Meanwhile the rows `ahead` are called for, into the L2 cache: they arrive while these are at work.
template <class T, class Visit>
inline void visit_features(const T* const* rows, int64_t n, int64_t stride, int64_t ahead, const uint32_t* table,
                           const Visit& visit) {
    const auto signs = [&](int64_t first) { return table ? table + first : kPlain; };
    Lanes x[kBlock];
    int64_t first = 0;
    for (; stride == 1 && first + kBlock <= n; first += kBlock) {
        if (first * static_cast<int64_t>(sizeof(T)) % 64 == 0)
            for (int l = 0; l < kLanes; ++l) __builtin_prefetch(rows[l] + first + ahead, 0, 2);
        transpose_block(rows, first, signs(first), x);
        visit(first, x, kBlock);
    }
    for (; stride == 1 && first + 8 <= n; first += 8) {
        transpose_eight(rows, first, signs(first), x);
        visit(first, x, 8);
    }
    for (; first < n; first += 8) {
        const int count = n - first < 8 ? static_cast<int>(n - first) : 8;
        transpose_some(rows, first, stride, signs(first), count, x);
        visit(first, x, count);
    }
}

// Adds a block's features to their bins of one half of the points. Chunk j of k neighbours puts exactly one of them in each bin, so
// the first one is stored, the others added.
inline void put_in_bins(const Lanes* x, const uint32_t* entries, int count, bool store, const FftPlan& plan, float* half) {
    uint32_t places[kBlock];
    for (int e = 0; e < count; ++e) places[e] = fft_place(plan, entries[e] & ~kSignBit);
    for (int e = 0; e < count; ++e) {
        Lanes& sum = lanes_at(half + places[e]);
        sum = store ? x[e] : sum + x[e];
    }
}

inline void clear_bins(int64_t n, const FftPlan& plan, float* half) {
    for (int64_t i = 0; n < plan.k && i < plan.k; ++i) lanes_at(half + fft_place(plan, static_cast<uint32_t>(i))) = Lanes{};
}

// Count sketches of a register of tokens -> one half of the points; returns each token's largest magnitude.
template <class T>
Lanes sketch_rows(const T* const* rows, int64_t n, int64_t stride, int64_t ahead, const uint32_t* table, const FftPlan& plan,
                  float* half) {
    clear_bins(n, plan, half);
    Lanes peak = {};
    visit_features(rows, n, stride, ahead, table, [&](int64_t first, const Lanes* x, int count) RAPIDIN_INLINE {
        if (first < plan.k) put_in_bins(x, table + first, count, true, plan, half);
        else put_in_bins(x, table + first, count, false, plan, half);
        for (int e = 0; e < count; ++e) peak = max_size(peak, x[e]);
    });
    return peak;
}

// c[j] += sum over e of basis[e][j] x[e]
inline void add_coefficients(const Lanes* x, int count, const float* basis, int64_t rank, float* c) {
    constexpr int kTogether = kLanes == 16 ? 8 : 4;  // sums that do not wait for each other; with the features all registers
    int64_t j = 0;
    for (; j + kTogether <= rank; j += kTogether) {
        Lanes sums[kTogether];
        for (int i = 0; i < kTogether; ++i) sums[i] = lanes_at(c + (j + i) * kLanes);
#pragma GCC unroll 16
        for (int e = 0; e < count; ++e)
            for (int i = 0; i < kTogether; ++i) sums[i] = fma(x[e], splat(basis[e * rank + j + i]), sums[i]);
        for (int i = 0; i < kTogether; ++i) lanes_at(c + (j + i) * kLanes) = sums[i];
    }
    for (; j < rank; ++j) {
        Lanes sum = lanes_at(c + j * kLanes);
        for (int e = 0; e < count; ++e) sum = fma(x[e], splat(basis[e * rank + j]), sum);
        lanes_at(c + j * kLanes) = sum;
    }
}

// x[e] += sum over j of rows[e][j] c[j]
inline void add_products(const float* rows, int64_t rank, const float* c, int count, Lanes* x) {
    for (int64_t j = 0; j < rank; ++j) {
        const Lanes of_direction = lanes_at(c + j * kLanes);
        for (int e = 0; e < count; ++e) x[e] = fma(of_direction, splat(rows[e * rank + j]), x[e]);
    }
}

// The same of tokens that go through a low rank first. c: scratch for a register of each of its directions.
template <class T>
Lanes sketch_low_rank(const T* const* rows, int64_t n, int64_t stride, int64_t ahead, const uint32_t* table, const FftPlan& plan,
                      const LowRankArgs& low_rank, float* c, float* half) {
    const int64_t rank = low_rank.rank;
    const auto put = [&](int64_t first, Lanes* x, int count) RAPIDIN_INLINE {
        for (int e = 0; e < count; ++e) x[e] = x[e] * splat(table[first + e] & kSignBit ? -1.0f : 1.0f);
        if (first < plan.k) put_in_bins(x, table + first, count, true, plan, half);
        else put_in_bins(x, table + first, count, false, plan, half);
    };
    clear_bins(n, plan, half);
    for (int64_t j = 0; j < rank; ++j) lanes_at(c + j * kLanes) = Lanes{};
    visit_features(rows, n, stride, ahead, nullptr, [&](int64_t first, Lanes* x, int count) RAPIDIN_INLINE {
        add_coefficients(x, count, low_rank.basis + first * rank, rank, c);
        if (low_rank.table) put(first, x, count);
    });
    for (int64_t j = 0; j < rank; ++j) lanes_at(c + j * kLanes) *= splat(low_rank.gain[j]);
    // Of what was far larger than the rest nothing may be left, so the largest magnitude is looked for afterwards.
    Lanes peak = {};
    if (low_rank.table) {
        for (int64_t b = 0; b < plan.k; b += kBlock) {
            Lanes x[kBlock];
            for (int e = 0; e < kBlock; ++e) x[e] = lanes_at(half + fft_place(plan, static_cast<uint32_t>(b + e)));
            add_products(low_rank.table + b * rank, rank, c, kBlock, x);
            for (int e = 0; e < kBlock; ++e) {
                lanes_at(half + fft_place(plan, static_cast<uint32_t>(b + e))) = x[e];
                peak = max_size(peak, x[e]);
            }
        }
        return peak;
    }
    visit_features(rows, n, stride, 0, nullptr, [&](int64_t first, Lanes* x, int count) RAPIDIN_INLINE {
        add_products(low_rank.basis + first * rank, rank, c, count, x);
        for (int e = 0; e < count; ++e) peak = max_size(peak, x[e]);
        put(first, x, count);
    });
    return peak;
}

inline Lanes sketch_tokens(const TokenRows& x, int64_t example, int64_t first, int64_t count, const uint32_t* table,
                           const FftPlan& plan, const LowRankArgs& low_rank, float* c, float* half) {
    const int64_t ahead = kLanes * x.stride_token;
    const auto sketch = [&](auto rows) {
        if (low_rank.rank) return sketch_low_rank(rows.row, x.n, x.stride_element, ahead, table, plan, low_rank, c, half);
        return sketch_rows(rows.row, x.n, x.stride_element, ahead, table, plan, half);
    };
    if (x.dtype == kFloat32) return sketch(RowsOf<float>(x, example, first, count));
    if (x.dtype == kFloat16) return sketch(RowsOf<Half>(x, example, first, count));
    return sketch(RowsOf<BHalf>(x, example, first, count));
}

// In Z^2 = P^2 - Q^2 + 2i P Q only the cross term is wanted. Output gradients are often a million times smaller than inputs, and
// P^2 would drown it; so each token's two parts are scaled to the same size by powers of two whose product is 1: exact, and
// the cross term stays as it is. Where one part is zero so is the cross term: the other's square must not leave its rounding
// there. The same zeros silence the lanes without a token.
inline Point balance(Lanes peak_p, Lanes peak_q, int64_t count) {
    Point scale = {};
    for (int l = 0; l < count; ++l) {
        const uint32_t p = float_to_bits(peak_p[l]), q = float_to_bits(peak_q[l]);
        if (p == 0 || q == 0) continue;
        const int shift = (static_cast<int>(q >> 23) - static_cast<int>(p >> 23)) / 2;
        const int within = shift < -126 ? -126 : shift > 126 ? 126 : shift;
        scale.re[l] = power_of_two(within);
        scale.im[l] = power_of_two(-within);
    }
    return scale;
}

// sums[i] = sum over the lanes of register i, in a fixed order
inline void sum_lanes(const float* registers, int64_t n, float* sums) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const float* rows[kLanes];
        for (int l = 0; l < kLanes; ++l) rows[l] = registers + (i + l) * kLanes;
        Lanes x[kLanes], total = {};
        transpose_square(rows, x);
        for (int e = 0; e < kLanes; ++e) total += x[e];
        memcpy(sums + i, &total, sizeof total);
    }
}

void token_squares(const TensorSketchArgs& args, int64_t example, int64_t begin, int64_t end, float* scratch, float* sums) {
    const FftPlan& plan = *args.plan;
    float* squares = scratch;
    float* z = scratch + plan.k * kPoint;
    float* c = z + fft_floats(plan);
    memset(squares, 0, static_cast<size_t>(plan.k * kPoint) * sizeof(float));
    for (int64_t first = begin; first < end; first += kLanes) {
        const int64_t count = end - first < kLanes ? end - first : kLanes;
        const Lanes peak_p = sketch_tokens(args.p, example, first, count, args.table_p, plan, args.low_rank_p, c, z);
        const Lanes peak_q = sketch_tokens(args.q, example, first, count, args.table_q, plan, args.low_rank_q, c, z + kLanes);
        const Point scale = balance(peak_p, peak_q, count);
        const auto load = [&](const float* at) {
            const Point x = load_point(at);
            return Point{x.re * scale.re, x.im * scale.im};
        };
        const auto take = [&](int64_t i, Point x) {
            const Point sum = load_point(squares + i * kPoint);
            const Lanes re = fnma(x.im, x.im, fma(x.re, x.re, sum.re));
            store_point(squares + i * kPoint, {re, fma(x.re, x.im, sum.im)});  // half the imaginary part
        };
        fft(plan, z, load, take);
    }
    sum_lanes(squares, 2 * plan.k, sums);
}

// Spectra of real rows have X[-w] = conj(X[w]), so F[w] = (S[w] - conj(S[-w])) / 4i is that of the sketch. The inverse
// transform is taken as the forward one of the conjugate.
void sketch_of_squares(const FftPlan& plan, const float* sums, int64_t count, float* scratch, float* out) {
    const int64_t k = plan.k;
    float* squares = scratch;
    float* z = scratch + k * kPoint;
    const float* rows[kLanes];
    for (int l = 0; l < kLanes; ++l) rows[l] = sums + (l < count ? l : count - 1) * 2 * k;
    for (int64_t i = 0; i < 2 * k; i += 8) transpose_eight(rows, i, kNoSigns, &lanes_at(squares + i * kLanes));
    const Lanes half = splat(0.5f / static_cast<float>(k)), quarter = splat(0.25f / static_cast<float>(k));
    for (int64_t w = 0; w < k; ++w) {
        const Point s = load_point(squares + plan.order[w] * kPoint);
        const Point mirrored = load_point(squares + plan.order[w ? k - w : 0] * kPoint);
        store_point(z + fft_place(plan, static_cast<uint32_t>(w)), {(s.im + mirrored.im) * half, (s.re - mirrored.re) * quarter});
    }
    fft(plan, z, load_point, [&](int64_t i, Point x) { lanes_at(squares + i * kLanes) = x.re; });
    for (int64_t b = 0; b < k; b += kLanes) {
        for (int l = 0; l < kLanes; ++l) rows[l] = squares + plan.order[b + l] * kLanes;
        Lanes of_example[kLanes];
        transpose_square(rows, of_example);
        for (int64_t l = 0; l < count; ++l) memcpy(out + l * k + b, &of_example[l], sizeof(Lanes));
    }
}

int64_t tensor_sketch_scratch(const FftPlan& plan, int64_t rank) { return plan.k * kPoint + fft_floats(plan) + rank * kLanes; }

}  // namespace
}  // namespace rapidin
