// How numbers lie in packed rows, shared by the driver and all units.
//
// A row of kSign or kInt4 is groups of 64 bytes, the last one shorter: a group of B bytes holds P * B numbers, number
// p * B + j being bits [p * bits, (p + 1) * bits) of byte j. So "plane" p of a vector of bytes is consecutive numbers.
//
// Rows are multiplied with integers: sum over planes p and bytes j of plane_p(row[j]) * queries[p][j], all exact.
//   kSign: 8 planes, each a bit left where it is, so that its sums are multiples of 2^p; queries in +-127
//   kInt4: 2 planes, the nibbles; queries in +-127
//   kInt8: the bytes + 128 twice, with the low and the high part of queries in +-4095: query = 64 * high + low
// The integer queries of a tile of T queries lie together, zero where a row has no number: for each window of a row's
// bytes [plane][group][T][64], which is one piece of memory however long rows are. Where rows are
// multiplied one at a time queries lie so: [group][plane][T][64].
#pragma once

#include <cstdint>

#include "../args.h"

namespace rapidin {
namespace {

constexpr int64_t kGroup = 64;            // bytes
constexpr int64_t kWindow = 32 * kGroup;  // bytes of a row summed in 32 bits: 255 * 4095 * 2048 still fits
constexpr int64_t kFewPacked = 2;         // queries that are multiplied a row at a time
constexpr int64_t kQueryTile = 4;         // the most queries whose sums are in registers together; the sums of six leave too few

// Blocks have scales that may differ by orders of magnitude, so small numbers of a query may count as much as large ones: there its
// numbers are integers of kDigits digits, the highest within +-64. 32 bits hold the sums of a piece of kLongestPiece numbers and the
// two lower digits together: these are at most 64 * 129 with base 128, times codes of at most 255, and 128 * 257 with base 256, times 15.
constexpr int kDigits = 3;
constexpr int64_t kLongestPiece = 512;
static_assert(255 * 64 * 129 * kLongestPiece <= INT32_MAX && 15 * 128 * 257 * kLongestPiece <= INT32_MAX);

struct PackedLayout {
    int64_t planes;        // of integer queries
    int64_t numbers;       // a byte
    int limit;             // of an integer query
    int64_t times, minus;  // <row, query> = unit * (times * sum of products - minus * sum of the query)
    double unit;
    int digit_bits;        // of a digit with blocks, so few that two products of a code and a digit fit 16 bits
};

inline bool is_packed(int dtype) { return dtype == kInt8 || dtype == kInt4 || dtype == kSign; }

constexpr PackedLayout packed_layout(int dtype) {
    if (dtype == kSign) return {8, 8, 127, 2, 1, 1.0, 8};
    if (dtype == kInt4) return {2, 2, 127, 2, 15, 0.5, 8};
    return {2, 1, 4095, 1, 128, 1.0, 7};
}

// Bytes of a row.
inline int64_t packed_bytes(int64_t width, int64_t numbers) {
    const int64_t whole = width / (kGroup * numbers), rest = width % (kGroup * numbers);
    return whole * kGroup + (rest + numbers - 1) / numbers;
}

// A row's bytes with the last group filled up.
inline int64_t padded_bytes(int64_t bytes) { return (bytes + kGroup - 1) / kGroup * kGroup; }

// Bytes of the window that begins at byte `begin` of a padded row.
inline int64_t window_bytes(int64_t padded, int64_t begin) { return padded - begin < kWindow ? padded - begin : kWindow; }

// Whether rows are multiplied one at a time, with all planes: with few queries. Rows of several windows are only where they
// have many planes: others share the loads of queries, which come from the L2 cache then.
inline bool one_at_a_time(int64_t q, int64_t planes, int64_t bytes) {
    return q <= kFewPacked && (planes == 8 || bytes <= kWindow);
}

// As even as can be: sizes differ by one at most, and a tile begins at query q * tile / tiles.
inline int64_t query_tiles(int64_t q) { return (q + kQueryTile - 1) / kQueryTile; }

}  // namespace
}  // namespace rapidin
