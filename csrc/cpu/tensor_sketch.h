// TensorSketch of a linear layer's gradient by Fourier transforms: with p and q the count sketches of a token's two factors
// and Z the transform of p + i q, the sketch is the inverse transform of the cross term in the sum of Z^2. See docs/sketch.md.
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

// Count sketches of a register of tokens -> one half of the points; returns each token's largest magnitude.
// Chunk j of k neighbours puts exactly one of them in each bin, so the first one is stored, the others added.
// Meanwhile the rows `ahead` are called for, into the L2 cache: they arrive while these are transformed.
template <class T>
Lanes sketch_rows(const T* const* rows, int64_t n, int64_t stride, int64_t ahead, const uint32_t* table, const FftPlan& plan,
                  float* half) {
    if (n < plan.k)
        for (int64_t i = 0; i < plan.k; ++i) lanes_at(half + fft_place(plan, static_cast<uint32_t>(i))) = Lanes{};
    Lanes peak = {};
    const auto put = [&](const Lanes* x, const uint32_t* entries, int count, bool store) {
        uint32_t places[kBlock];
        for (int e = 0; e < count; ++e) places[e] = fft_place(plan, entries[e] & ~kSignBit);
        for (int e = 0; e < count; ++e) {
            Lanes& sum = lanes_at(half + places[e]);
            sum = store ? x[e] : sum + x[e];
            peak = max_size(peak, x[e]);
        }
    };
    int64_t first = 0;
    for (; stride == 1 && first + kBlock <= n; first += kBlock) {
        Lanes x[kBlock];
        if (first * static_cast<int64_t>(sizeof(T)) % 64 == 0)
            for (int l = 0; l < kLanes; ++l) __builtin_prefetch(rows[l] + first + ahead, 0, 2);
        transpose_block(rows, first, table + first, x);
        if (first < plan.k) put(x, table + first, kBlock, true);
        else put(x, table + first, kBlock, false);
    }
    for (; stride == 1 && first + 8 <= n; first += 8) {
        Lanes x[8];
        transpose_eight(rows, first, table + first, x);
        put(x, table + first, 8, first < plan.k);
    }
    for (; first < n; first += 8) {
        Lanes x[8];
        const int count = n - first < 8 ? static_cast<int>(n - first) : 8;
        transpose_some(rows, first, stride, table + first, count, x);
        put(x, table + first, count, first < plan.k);
    }
    return peak;
}

inline Lanes sketch_tokens(const TokenRows& x, int64_t example, int64_t first, int64_t count, const uint32_t* table,
                           const FftPlan& plan, float* half) {
    const int64_t ahead = kLanes * x.stride_token;
    const auto sketch = [&](auto rows) { return sketch_rows(rows.row, x.n, x.stride_element, ahead, table, plan, half); };
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
    memset(squares, 0, static_cast<size_t>(plan.k * kPoint) * sizeof(float));
    for (int64_t first = begin; first < end; first += kLanes) {
        const int64_t count = end - first < kLanes ? end - first : kLanes;
        const Lanes peak_p = sketch_tokens(args.p, example, first, count, args.table_p, plan, z);
        const Lanes peak_q = sketch_tokens(args.q, example, first, count, args.table_q, plan, z + kLanes);
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

int64_t tensor_sketch_scratch(const FftPlan& plan) { return plan.k * kPoint + fft_floats(plan); }

}  // namespace
}  // namespace rapidin
