// Integer products of packed rows whose blocks have scales of their own. The sum of a piece is exact, pieces are added in double
// and in order, so the bits are the same for every instruction set with Kernels::block_digits.
#pragma once

#include "kernels.h"
#include "packed_scan.h"

namespace rapidin {
namespace {

// The steps of one piece, and the digits of a query that they are multiplied with.
struct PieceOfQuery {
    const BlockStep* steps;
    int64_t count;
    const int8_t* digits;
};

// What R rows' products with a piece sum to: high[r] * 2^(2 * digit_bits) + low[r]. Whole: whether all bytes of the piece lie in
// whole groups.
template <class Format, int R, bool Whole>
inline void multiply_piece(const PieceOfQuery& piece, const uint8_t* rows, int64_t stride_row, int64_t bytes, int32_t* low,
                           int32_t* high) {
    ByteSums sum[kDigits][R];
    for (int d = 0; d < kDigits; ++d)
        for (int r = 0; r < R; ++r) sum[d][r] = no_sums();
    const int8_t* digits = piece.digits;
    for (int64_t s = 0; s < piece.count; ++s, digits += kDigits * kGroup) {
        const BlockStep step = piece.steps[s];
        for (int64_t j = 0; j < kGroup; j += kBytes) {
            Bytes y[kDigits];
            for (int d = 0; d < kDigits; ++d) y[d] = load_bytes(digits + d * kGroup + j);
            for (int r = 0; r < R; ++r) {
                const uint8_t* at = rows + r * stride_row + step.byte + j;
                const Bytes x = Format::number(Whole ? load_bytes(at) : load_first_bytes(at, bytes - step.byte - j), step.shift);
                for (int d = 0; d < kDigits; ++d) sum[d][r] = add_products(sum[d][r], x, y[d]);
            }
        }
    }
    static_assert(kDigits == 3);
    ByteSums both[R];  // of the lower digits, which 32 bits hold
    for (int r = 0; r < R; ++r) both[r] = add_sums(sum[0][r], shift_sums<packed_layout(Format::kDType).digit_bits>(sum[1][r]));
    if constexpr (R == 4) {
        totals(both[0], both[1], both[2], both[3], low);
        totals(sum[2][0], sum[2][1], sum[2][2], sum[2][3], high);
    } else {
        for (int r = 0; r < R; ++r) low[r] = total(both[r]), high[r] = total(sum[2][r]);
    }
}

// A query and the R rows that it is multiplied with.
template <class Format, int R>
struct RowsOfQuery {
    const BlockQueries& queries;
    const int8_t* digits;
    const double *units, *minus;
    const uint8_t* rows;
    int64_t stride_row, bytes, whole;  // whole: bytes of a row in whole groups

    RowsOfQuery(const ScanPart& part, int64_t row, int64_t j)
        : queries(part.blocks), digits(queries.digits + j * queries.step_count * kDigits * kGroup),
          units(queries.units + j * queries.piece_count), minus(queries.minus + j * queries.piece_count),
          rows(static_cast<const uint8_t*>(part.rows) + row * part.stride_row), stride_row(part.stride_row),
          bytes(packed_bytes(part.width, kLayout.numbers)), whole(bytes / kGroup * kGroup) {}

    // dots[r] (+)= the products with piece p
    template <bool Add>
    void multiply(int64_t p, double* dots) const {
        const BlockPiece& at = queries.pieces[p];
        const PieceOfQuery piece{queries.steps + at.first_step, at.end_step - at.first_step,
                                 digits + at.first_step * kDigits * kGroup};
        int32_t low[R], high[R];
        if (piece.steps[piece.count - 1].byte < whole) multiply_piece<Format, R, true>(piece, rows, stride_row, bytes, low, high);
        else multiply_piece<Format, R, false>(piece, rows, stride_row, bytes, low, high);
        for (int r = 0; r < R; ++r) {
            // exact, and times a power of two: only the sum of pieces is rounded
            const double dot = kTimesHigh * static_cast<double>(high[r]) + (kTimes * static_cast<double>(low[r]) - minus[p]);
            dots[r] = (Add ? dots[r] : 0.0) + units[p] * dot;
        }
    }
    // Adds the products with the pieces of the block after piece p. Returns the last of them.
    __attribute__((noinline)) int64_t multiply_rest(int64_t p, double* dots) const {
        while (!queries.pieces[p].ends) multiply<true>(++p, dots);
        return p;
    }

  private:
    static constexpr PackedLayout kLayout = packed_layout(Format::kDType);
    static constexpr double kTimes = static_cast<double>(kLayout.times), kTimesHigh = kTimes * (1 << 2 * kLayout.digit_bits);
};

// scores[r * q] += scale * <rows[r], query j> of R rows from `row` on.
template <class Format, int R>
__attribute__((noinline)) void scan_blocks_of(const ScanArgs& args, const ScanPart& part, int64_t row, int64_t j, double* scores) {
    const RowsOfQuery<Format, R> rows(part, row, j);
    double score[R], scale[R];
    for (int r = 0; r < R; ++r) score[r] = 0.0, scale[r] = row_scale(part, row + r);
    for (int64_t p = 0; p < rows.queries.piece_count; ++p) {
        double dots[R];
        rows.template multiply<false>(p, dots);
        if (!rows.queries.pieces[p].ends) p = rows.multiply_rest(p, dots);
        const float* scales = args.scales + row * args.stride_scales + rows.queries.pieces[p].block;
        for (int r = 0; r < R; ++r) score[r] += scale[r] * static_cast<double>(scales[r * args.stride_scales]) * dots[r];
    }
    for (int r = 0; r < R; ++r) scores[r * args.q] += score[r];
}

template <class Format>
inline void scan_all_blocks(const ScanArgs& args, const ScanPart& part, int64_t first, int64_t count, double* scores) {
    constexpr int R = kBytes == 32 ? 2 : 4;  // kDigits * R sums, the rows and digits fit the registers
    for (int64_t j = 0; j < args.q; ++j) {
        if (!part.blocks.has_digits[j]) continue;
        int64_t r = 0;
        for (; r + R <= count; r += R) scan_blocks_of<Format, R>(args, part, first + r, j, scores + r * args.q + j);
        for (; r < count; ++r) scan_blocks_of<Format, 1>(args, part, first + r, j, scores + r * args.q + j);
    }
}

inline void scan_blocks(const ScanArgs& args, const ScanPart& part, int64_t first, int64_t count, double* scores) {
    if (part.dtype == kSign) scan_all_blocks<Sign>(args, part, first, count, scores);
    else if (part.dtype == kInt4) scan_all_blocks<Int4>(args, part, first, count, scores);
    else scan_all_blocks<Int8>(args, part, first, count, scores);
}

}  // namespace
}  // namespace rapidin
