// The pieces of a linear layer's TensorSketch: count sketches of token rows, squares summed over tokens,
// and the wrapped diagonals of a matrix (which is also matrix_sketch). The host puts them together.
#pragma once

#include "kernels.h"
#include "vec8.h"

namespace rapidin {
namespace {

// out[b] (+)= sign * source[index], (index | sign) = table[b]
inline void gather_signed(const float* source, const uint32_t* table, int64_t k, bool add, float* out) {
    int64_t b = 0;
#ifdef RAPIDIN_AVX2
    const __m256i sign_bits = _mm256_set1_epi32(INT32_MIN);
    for (; b + 8 <= k; b += 8) {
        const __m256i entry = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + b));
        const __m256i sign = _mm256_and_si256(entry, sign_bits);
        const __m256 x = _mm256_i32gather_ps(source, _mm256_xor_si256(entry, sign), 4);
        const __m256 value = _mm256_xor_ps(x, _mm256_castsi256_ps(sign));
        store8(out + b, add ? add8(load8(out + b), value) : value);
    }
#endif
    for (; b < k; ++b) {
        const float value = flip(source[table[b] & ~kSignBit], table[b] & kSignBit);
        out[b] = add ? out[b] + value : value;
    }
}

// Count sketch of one row x [n] -> out [k]: chunk j of k neighbours puts exactly one of them in each bin.
inline void count_sketch_row(const void* data, int dtype, int64_t offset, int64_t stride, int64_t n, const uint32_t* table,
                             int64_t k, float* scratch, float* out) {
    if (n == 0) memset(out, 0, static_cast<size_t>(k) * sizeof(float));
    for (int64_t start = 0; start < n; start += k) {
        const int64_t length = n - start < k ? n - start : k;
        const float* source = scratch;
        if (dtype == kFloat32 && stride == 1 && length == k) {
            source = static_cast<const float*>(data) + offset + start;
        } else {
            copy_floats(data, dtype, offset + start * stride, stride, length, scratch);
            memset(scratch + length, 0, static_cast<size_t>(k - length) * sizeof(float));
        }
        gather_signed(source, table + start, k, start > 0, out);
    }
}

inline int64_t row_offset(const TokenRows& x, int64_t row) {
    return row / x.tokens * x.stride_batch + row % x.tokens * x.stride_token;
}

void count_sketch(const TokenRows& x, const uint32_t* table, int64_t first, int64_t count, int64_t k, float* scratch, float* out,
                  int64_t stride_out) {
    for (int64_t row = first; row < first + count; ++row, out += stride_out)
        count_sketch_row(x.data, x.dtype, row_offset(x, row), x.stride_element, x.n, table, k, scratch, out);
}

// The largest magnitude, by its bits: those of floats without a sign are ordered as integers are.
inline int32_t largest(const float* x, int64_t n) {
    int32_t peak = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t size = static_cast<int32_t>(float_to_bits(x[i]) & ~kSignBit);
        peak = size > peak ? size : peak;
    }
    return peak;
}

// In z^2 = a^2 - g^2 + 2i a g only the cross term is wanted. Output gradients are often a million times smaller
// than inputs, and a^2 would drown it; so each token's two parts are scaled to the same size by powers of two
// whose product is 1: exact, and the cross term stays as it is.
void count_sketch_pair(const TokenRows& a, const uint32_t* table_a, const TokenRows& g, const uint32_t* table_g, int64_t first,
                       int64_t count, int64_t k, float* scratch, float* z) {
    float* real = scratch + k;
    float* imag = scratch + 2 * k;
    for (int64_t row = first; row < first + count; ++row, z += 2 * k) {
        count_sketch_row(a.data, a.dtype, row_offset(a, row), a.stride_element, a.n, table_a, k, scratch, real);
        count_sketch_row(g.data, g.dtype, row_offset(g, row), g.stride_element, g.n, table_g, k, scratch, imag);
        const int32_t peak_a = largest(real, k), peak_g = largest(imag, k);
        int shift = peak_a && peak_g ? ((peak_g >> 23) - (peak_a >> 23)) / 2 : 0;
        shift = shift < -126 ? -126 : shift > 126 ? 126 : shift;
        // Where one part is zero so is the cross term: the other's square must not leave its rounding there.
        const float scale_a = peak_g ? power_of_two(shift) : 0.0f, scale_g = peak_a ? power_of_two(-shift) : 0.0f;
        for (int64_t b = 0; b < k; ++b) {
            z[2 * b] = real[b] * scale_a;
            z[2 * b + 1] = imag[b] * scale_g;
        }
    }
}

void square_sum(const float* z, int64_t first, int64_t count, int64_t tokens, int64_t k, int64_t begin, int64_t end, float* sum) {
    for (int64_t row = first; row < first + count; ++row, z += 2 * k) {
        float* s = sum + row / tokens * 2 * k;
        for (int64_t w = begin; w < end; ++w) {
            const float re = z[2 * w], im = z[2 * w + 1];
            s[2 * w] += re * re - im * im;
            s[2 * w + 1] += 2.0f * (re * im);
        }
    }
}

// to[i] += sign * from[i]
inline void add_signed(const float* from, int64_t n, uint32_t sign, float* to) {
    const float factor = sign ? -1.0f : 1.0f;
    for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

void fold(const FoldArgs& args, int64_t b, int64_t begin, int64_t end, float* scratch, float* out) {
    const int64_t k = args.k;
    float* copy = scratch + k;
    const int64_t length = args.column_table ? k : args.cols;
    for (int64_t r = begin; r < end; ++r) {
        const int64_t offset = b * args.stride_batch + r * args.stride_row;
        const uint32_t entry = args.row_table ? args.row_table[b * args.row_table_stride + r] : static_cast<uint32_t>(r);
        const int64_t bin = entry & ~kSignBit;
        const uint32_t sign = entry & kSignBit;
        const float* row = copy;
        if (args.column_table) {
            count_sketch_row(args.matrix, args.dtype, offset, args.stride_col, args.cols, args.column_table, k, scratch, copy);
        } else if (args.dtype == kFloat32 && args.stride_col == 1) {
            row = static_cast<const float*>(args.matrix) + offset;
        } else {
            copy_floats(args.matrix, args.dtype, offset, args.stride_col, args.cols, copy);
        }
        const int64_t unwrapped = length < k - bin ? length : k - bin;
        add_signed(row, unwrapped, sign, out + bin);
        add_signed(row + unwrapped, length - unwrapped, sign, out);
    }
}

}  // namespace
}  // namespace rapidin
