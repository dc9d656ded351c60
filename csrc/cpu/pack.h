// Rows of floats to packed rows and back. The layout is in packed.h; how codes and scales are chosen, in rapidin/ops/packed.py.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"
#include "packed.h"
#include "vec8.h"

namespace rapidin {
namespace {

constexpr int kPackLanes = 16;  // sums in a fixed order, which the compiler can make vectors of

// Calls body(numbers, begin, length) for each tile of a row, as float32.
template <class Body>
inline void for_tiles(const PackArgs& args, int64_t row, float* scratch, Body body) {
    for (int64_t begin = 0; begin < args.width; begin += kPackTile) {
        const int64_t length = args.width - begin < kPackTile ? args.width - begin : kPackTile;
        copy_floats(args.rows, args.from, row * args.stride_row + begin, 1, length, scratch);
        for (int64_t i = length; i < (length + kPackLanes - 1) / kPackLanes * kPackLanes; ++i) scratch[i] = 0.0f;
        body(scratch, begin, length);
    }
}

struct RowFacts {
    double squares = 0.0, sizes = 0.0;  // sum of x * x, of |x|
    float largest = 0.0f;               // |x|
};

inline RowFacts row_facts(const PackArgs& args, int64_t row, float* scratch) {
    double squares[kPackLanes] = {}, sizes[kPackLanes] = {};
    float largest[kPackLanes] = {};
    for_tiles(args, row, scratch, [&](const float* x, int64_t, int64_t length) {
        for (int64_t i = 0; i < length; i += kPackLanes) {
            for (int lane = 0; lane < kPackLanes; ++lane) {
                const float size = std::fabs(x[i + lane]);
                squares[lane] += static_cast<double>(size) * static_cast<double>(size);
                sizes[lane] += static_cast<double>(size);
                largest[lane] = size > largest[lane] ? size : largest[lane];
            }
        }
    });
    RowFacts facts;
    for (int lane = 0; lane < kPackLanes; ++lane) {
        facts.squares += squares[lane];
        facts.sizes += sizes[lane];
        facts.largest = largest[lane] > facts.largest ? largest[lane] : facts.largest;
    }
    return facts;
}

// Codes of numbers x [count], count <= kGroup * 8, one group. Returns the sum of x * code in lanes[].
inline void pack_sign(const float* x, int64_t bytes, int64_t count, uint8_t* codes) {
    for (int64_t j = 0; j < bytes; ++j) codes[j] = 0;
    for (int64_t p = 0; p * bytes < count; ++p) {
        const int64_t rest = count - p * bytes < bytes ? count - p * bytes : bytes;
        for (int64_t j = 0; j < rest; ++j) codes[j] = static_cast<uint8_t>(codes[j] | (x[p * bytes + j] >= 0.0f) << p);
    }
}

inline void pack_int4(const uint8_t* nibbles, int64_t bytes, int64_t count, uint8_t* codes) {
    for (int64_t j = 0; j < bytes; ++j) {
        const int high = j + bytes < count ? nibbles[j + bytes] : 0;
        codes[j] = static_cast<uint8_t>(nibbles[j] | high << 4);
    }
}

// Numbers are divided by `step` after they were multiplied with `lift`, a power of two that makes tiny rows normal.
struct Step {
    float lift = 1.0f, inverse = 0.0f;
};

inline Step find_step(double step) {
    Step found;
    if (step < 0x1p-100) found.lift = 0x1p100f;
    found.inverse = static_cast<float>(1.0 / (step * static_cast<double>(found.lift)));
    return found;
}

// Codes of a row by steps, its sum of x * code.
inline double pack_steps(const PackArgs& args, int64_t row, Step step, float* scratch, uint8_t* codes) {
    double dots[kPackLanes] = {};
    const int64_t numbers = packed_layout(args.to).numbers;
    for_tiles(args, row, scratch, [&](const float* x, int64_t begin, int64_t length) {
        uint8_t values[kPackTile];
        for (int64_t i = 0; i < length; i += kPackLanes) {
            for (int lane = 0; lane < kPackLanes; ++lane) {
                const float y = x[i + lane] * step.lift * step.inverse;
                float code;
                if (args.to == kInt4) {
                    const float floor = std::floor(y);
                    const float low = floor < -8.0f ? -8.0f : floor > 7.0f ? 7.0f : floor;
                    code = low + 0.5f;
                    values[i + lane] = static_cast<uint8_t>(static_cast<int>(low) + 8);
                } else {
                    const float near = std::nearbyint(y);
                    code = near < -127.0f ? -127.0f : near > 127.0f ? 127.0f : near;
                    values[i + lane] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int>(code)));
                }
                dots[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(code);
            }
        }
        uint8_t* to = codes + begin / numbers;
        if (args.to == kInt8) {
            memcpy(to, values, static_cast<size_t>(length));
            return;
        }
        for (int64_t i = 0; i < length; i += kGroup * numbers) {
            const int64_t count = length - i < kGroup * numbers ? length - i : kGroup * numbers;
            pack_int4(values + i, (count + numbers - 1) / numbers, count, to + i / numbers);
        }
    });
    double dot = 0.0;
    for (double lane : dots) dot += lane;
    return dot;
}

inline double pack_signs(const PackArgs& args, int64_t row, double sizes, float* scratch, uint8_t* codes) {
    const int64_t numbers = packed_layout(args.to).numbers;
    for_tiles(args, row, scratch, [&](const float* x, int64_t begin, int64_t length) {
        for (int64_t i = 0; i < length; i += kGroup * numbers) {
            const int64_t count = length - i < kGroup * numbers ? length - i : kGroup * numbers;
            pack_sign(x + i, (count + numbers - 1) / numbers, count, codes + (begin + i) / numbers);
        }
    });
    return sizes;
}

void pack(const PackArgs& args, int64_t begin, int64_t end, float* scratch) {
    const int64_t bytes = packed_bytes(args.width, packed_layout(args.to).numbers);
    for (int64_t row = begin; row < end; ++row) {
        uint8_t* codes = args.codes + row * bytes;
        const RowFacts facts = row_facts(args, row, scratch);
        if (!std::isfinite(facts.squares)) {
            memset(codes, 0, static_cast<size_t>(bytes));
            args.scale[row] = std::numeric_limits<float>::quiet_NaN();
            continue;
        }
        double dot;  // <row, codes>
        if (args.to == kSign) {
            dot = pack_signs(args, row, facts.sizes, scratch, codes);
        } else {
            const double step = args.to == kInt8 ? static_cast<double>(facts.largest) / 127.0
                                                 : 0.3352 * std::sqrt(facts.squares / static_cast<double>(args.width));
            dot = pack_steps(args, row, step > 0.0 ? find_step(step) : Step{}, scratch, codes);
        }
        args.scale[row] = facts.squares > 0.0 ? static_cast<float>(facts.squares / dot) : 0.0f;
    }
}

// Numbers [first, first + count) of a packed row, not scaled yet; first is a multiple of a group's numbers.
inline void decode(const ScanPart& part, int64_t row, int64_t first, int64_t count, float* out) {
    const int64_t numbers = packed_layout(part.dtype).numbers;
    const uint8_t* codes = static_cast<const uint8_t*>(part.rows) + row * part.stride_row + first / numbers;
    if (part.dtype == kInt8) {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<int8_t>(codes[i]));
        return;
    }
    for (int64_t i = 0; i < count; i += kGroup * numbers, codes += kGroup) {
        // The row may go on where this piece of it ends: only a group at the row's end is short.
        const int64_t in_row = part.width - first - i, in_group = in_row < kGroup * numbers ? in_row : kGroup * numbers;
        const int64_t bytes = (in_group + numbers - 1) / numbers;
        for (int64_t p = 0; p * bytes < count - i && p < numbers; ++p) {
            const int64_t rest = count - i - p * bytes, length = rest < bytes ? rest : bytes;
            float* to = out + i + p * bytes;
            if (part.dtype == kSign)
                for (int64_t j = 0; j < length; ++j) to[j] = static_cast<float>((codes[j] >> p & 1) * 2 - 1);
            else
                for (int64_t j = 0; j < length; ++j) to[j] = static_cast<float>(codes[j] >> 4 * p & 15) - 7.5f;
        }
    }
}

}  // namespace
}  // namespace rapidin
