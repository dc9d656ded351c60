// Complex Fourier transforms in place, one in each lane: point i is a register of real parts, then one of imaginary parts.
// The passes go depth first: a part that fits the L1 cache is finished before the next is begun.
#pragma once

#include "fft_plan.h"
#include "lanes.h"

namespace rapidin {
namespace {

constexpr int64_t kPoint = 2 * kLanes;  // floats of a point

struct Point {
    Lanes re, im;
};

inline Point load_point(const float* z) { return {lanes_at(z), lanes_at(z + kLanes)}; }
inline void store_point(float* z, Point x) {
    lanes_at(z) = x.re;
    lanes_at(z + kLanes) = x.im;
}

inline Point operator+(Point x, Point y) { return {x.re + y.re, x.im + y.im}; }
inline Point operator-(Point x, Point y) { return {x.re - y.re, x.im - y.im}; }
inline Point minus_i(Point x) { return {x.im, -x.re}; }  // the minus goes into the sum that follows
inline Point times(Point x, const float* w) {
    const Lanes re = splat(w[0]), im = splat(w[1]);
    return {fnma(x.im, im, x.re * re), fma(x.im, re, x.re * im)};
}

inline void dft4(Point& x0, Point& x1, Point& x2, Point& x3) {
    const Point sum02 = x0 + x2, difference02 = x0 - x2, sum13 = x1 + x3, difference13 = x1 - x3;
    x0 = sum02 + sum13;
    x2 = sum02 - sum13;
    x1 = {difference02.re + difference13.im, difference02.im - difference13.re};
    x3 = {difference02.re - difference13.im, difference02.im + difference13.re};
}

inline void dft(Point (&x)[4]) { dft4(x[0], x[1], x[2], x[3]); }

inline void dft(Point (&x)[8]) {
    const Point d0 = x[0] - x[4], d1 = x[1] - x[5], d2 = x[2] - x[6], d3 = x[3] - x[7];
    Point even[4] = {x[0] + x[4], x[1] + x[5], x[2] + x[6], x[3] + x[7]};
    dft(even);
    // The odd half times the eighth roots: d1 (1 - i) / sqrt 2, - i d2, d3 (-1 - i) / sqrt 2, the root taken into the last sums
    const Lanes root = splat(0.70710678118654752f);
    const Point u1 = {d1.re + d1.im, d1.im - d1.re}, u3 = {d3.im - d3.re, d3.re + d3.im};  // the second: imaginary part negated
    const Point s0 = {d0.re + d2.im, d0.im - d2.re}, s1 = {d0.re - d2.im, d0.im + d2.re};
    const Point t0 = {u1.re + u3.re, u1.im - u3.im}, t1 = {u1.re - u3.re, u1.im + u3.im};
    x[0] = even[0];
    x[2] = even[1];
    x[4] = even[2];
    x[6] = even[3];
    x[1] = {fma(root, t0.re, s0.re), fma(root, t0.im, s0.im)};
    x[5] = {fnma(root, t0.re, s0.re), fnma(root, t0.im, s0.im)};
    x[3] = {fma(root, t1.im, s1.re), fnma(root, t1.re, s1.im)};
    x[7] = {fnma(root, t1.im, s1.re), fma(root, t1.re, s1.im)};
}

// One pass over Radix * count points, `step` floats from one leg to the next.
template <int Radix, class Load>
inline void fft_pass(float* z, int64_t count, int64_t step, const float* twiddles, const Load& load) {
    for (int64_t j = 0; j < count; ++j, z += kPoint, twiddles += 2 * (Radix - 1)) {
        Point x[Radix];
        for (int r = 0; r < Radix; ++r) x[r] = load(z + r * step);
        dft(x);
        store_point(z, x[0]);
        for (int r = 1; r < Radix; ++r) store_point(z + r * step, times(x[r], twiddles + 2 * (r - 1)));
    }
}

template <class Load>
inline void fft_pass(int radix, float* z, int64_t count, int64_t step, const float* twiddles, const Load& load) {
    if (radix == 8) fft_pass<8>(z, count, step, twiddles, load);
    else fft_pass<4>(z, count, step, twiddles, load);
}

// The last pass: take(i, value) gets the points at first, first + 1, ...
template <int Radix, class Take>
inline void fft_leaves(const float* z, int64_t count, int64_t first, const Take& take) {
    for (int64_t j = 0; j < count; ++j, z += Radix * kPoint, first += Radix) {
        Point x[Radix];
        for (int r = 0; r < Radix; ++r) x[r] = load_point(z + r * kPoint);
        dft(x);
        for (int r = 0; r < Radix; ++r) take(first + r, x[r]);
    }
}

// All passes from `pass` on, over n neighbours.
template <class Take>
void fft_part(const FftPlan& plan, int pass, float* z, int64_t n, int64_t first, const Take& take) {
    const int radix = plan.radix[pass];
    if (pass == plan.passes - 1) {
        if (radix == 8) fft_leaves<8>(z, n / 8, first, take);
        else fft_leaves<4>(z, n / 4, first, take);
        return;
    }
    const int64_t m = n / radix;
    fft_pass(radix, z, m, m * kPoint, plan.twiddles[pass], load_point);
    if (pass == plan.passes - 2) return fft_part(plan, pass + 1, z, n, first, take);
    for (int r = 0; r < radix; ++r) fft_part(plan, pass + 1, z + r * m * kPoint, m, first + r * m, take);
}

// The legs of the first pass are a large power of two apart; without a gap they would share one set of the L1 cache.
inline int64_t fft_leg(const FftPlan& plan) { return (plan.k / plan.radix[0] + 1) * kPoint; }
inline int64_t fft_floats(const FftPlan& plan) { return fft_leg(plan) * plan.radix[0]; }
// Where point i lies, in floats.
inline uint32_t fft_place(const FftPlan& plan, uint32_t i) { return (i + (i >> plan.leg_bits)) * static_cast<uint32_t>(kPoint); }

// Transform of the points at fft_place(0), fft_place(1), ..., each read through `load`; take(order[w], value) gets frequency w.
template <class Load, class Take>
inline void fft(const FftPlan& plan, float* z, const Load& load, const Take& take) {
    const int64_t m = plan.k / plan.radix[0], leg = fft_leg(plan);
    fft_pass(plan.radix[0], z, m, leg, plan.twiddles[0], load);
    for (int r = 0; r < plan.radix[0]; ++r) fft_part(plan, 1, z + r * leg, m, r * m, take);
}

}  // namespace
}  // namespace rapidin
