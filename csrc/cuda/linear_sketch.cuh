// linear_sketch of 32 to 512 numbers: TensorSketch of sum_t g_t a_t^T from the factors, each read once, nothing of size tokens x k leaving the
// chip. docs/reference/kernels.md derives the method; in short, with k = 32 R:
//
//   1. rows of a tile of tokens are staged in shared memory, tokens interleaved so that one 8-byte read gives an element
//      of four 16-bit (two 32-bit) tokens, and each thread gathers its bins' elements: the count sketch, no atomics;
//   2. the k numbers p of a token are taken modulo x^32 - w for each R-th root of unity w, which is an R-point DFT along
//      p[n], p[n + 32], ...: R / 2 - 1 complex and two real polynomials of 32 coefficients;
//   3. products of polynomials are summed over tokens before they are multiplied out: an outer product of 32 x 32 for
//      each root on the tensor cores, R planes of 32 x 32 sums in registers;
//   4. at the end of a block's tokens the planes are folded along their diagonals, the wrapped part times w, and an
//      inverse DFT gives the k numbers. Blocks that share an example are added in order by a second kernel.
//
// R = 1 is the product of whole count sketches, R = k would be the Fourier way, which more than 512 numbers take
// (fourier_sketch.cuh); 32 is what a tensor core's tile wants.
#pragma once

#include "linear_rows.cuh"
#include "mma.h"

namespace rapidin {

constexpr int kResidues = 32;  // coefficients of a polynomial modulo x^32 - w; a lane each

template <int K>
struct LinearSizes {
    static constexpr int kRoots = K / kResidues;  // R, and as many planes
    static constexpr int kWarps = K >= 512 ? 16 : 8;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kSteps = kRoots < kWarps ? kWarps / kRoots : 1;  // of 16 tokens in a tile, each for other warps
    static constexpr int kTokens = 16 * kSteps;                              // of a tile
    static constexpr int kStageBytes = kThreads * 64;                        // of a stage: 4 loads of 16 bytes a thread
    // Columns of a stage: rows are cut into stages of whole chunks of k.
    template <int Bytes>
    static constexpr int kColumns = kStageBytes / (kTokens * Bytes);
    // Sketches of one side on their way from the threads that gathered them to those that transform them
    static constexpr int kRounds = kTokens * K * 4 > kStageBytes ? kTokens * K * 4 / kStageBytes : 1;
    static constexpr int kRoundTokens = kTokens / kRounds;
    // An operand's words (two tokens) of one polynomial: [token pair][coefficient]. The padding spreads a fragment's
    // reads over all banks.
    static constexpr int kPairStride = kResidues + 8;
    static constexpr int kPolynomialWords = kTokens / 2 * kPairStride;
    static constexpr int kSideWords = kRoots * kPolynomialWords;
};

// Where an element of a chunk is staged, in bytes: 8 an element, in an order that spreads neighbours' 16-byte stores over
// the banks. On the host too, which makes the tables.
__host__ __device__ __forceinline__ uint32_t staged_at(uint32_t element) {
    const uint32_t slot = element >> 1;
    return (slot ^ (slot >> 3 & 3)) * 16 + (element & 1) * 8;
}

// cos(2 pi i / 32)
template <int I>
struct Cosine {
    static constexpr int kFolded = I % 32 <= 16 ? I % 32 : 32 - I % 32;  // 0 .. 16
    static constexpr int kQuarter = kFolded <= 8 ? kFolded : 16 - kFolded;
    static constexpr float kSize = kQuarter == 0   ? 1.0f
                                   : kQuarter == 1 ? 0.98078528040323044913f
                                   : kQuarter == 2 ? 0.92387953251128675613f
                                   : kQuarter == 3 ? 0.83146961230254523708f
                                   : kQuarter == 4 ? 0.70710678118654752440f
                                   : kQuarter == 5 ? 0.55557023301960222474f
                                   : kQuarter == 6 ? 0.38268343236508977173f
                                   : kQuarter == 7 ? 0.19509032201612826785f
                                                   : 0.0f;
    static constexpr float value = kFolded <= 8 ? kSize : -kSize;
};
template <int I>
struct Sine {
    static constexpr float value = Cosine<I + 24>::value;  // cos(x - pi / 2)
};

// DFT of R real numbers get(0) .. get(R - 1). Gives to put(i, y), in no order, y = X[0], X[R/2], then re and im of X[1] ..
// X[R/2 - 1]. Functions, so that few of the numbers need registers at a time.
template <int R>
struct RealDft {
    static constexpr int H = R / 2;

    template <class Get, class Put>
    static __device__ __forceinline__ void run(Get get, Put put) {
        float e[H], o[H];
        RealDft<H>::run([&](int i) { return get(2 * i); }, [&](int i, float y) { e[i] = y; });
        RealDft<H>::run([&](int i) { return get(2 * i + 1); }, [&](int i, float y) { o[i] = y; });
        put(0, e[0] + o[0]);
        put(1, e[0] - o[0]);
        put(H, e[1]);  // X[R/4] = E[R/4] - i O[R/4]
        put(H + 1, -o[1]);
        join<1>(e, o, put);
    }

    template <int J, class Put>
    static __device__ __forceinline__ void join(const float (&e)[H], const float (&o)[H], Put put) {
        if constexpr (J < H / 2) {
            constexpr float c = Cosine<J * 32 / R>::value, s = Sine<J * 32 / R>::value;
            const float re = __fmaf_rn(c, o[2 * J], s * o[2 * J + 1]);  // w^J O[J], w = exp(-2 pi i / R)
            const float im = __fmaf_rn(c, o[2 * J + 1], -s * o[2 * J]);
            put(2 * J, e[2 * J] + re);
            put(2 * J + 1, e[2 * J + 1] + im);
            put(2 * (H - J), e[2 * J] - re);
            put(2 * (H - J) + 1, im - e[2 * J + 1]);
            join<J + 1>(e, o, put);
        }
    }
};
template <>
struct RealDft<1> {
    template <class Get, class Put>
    static __device__ __forceinline__ void run(Get get, Put put) {
        put(0, get(0));
    }
};
template <>
struct RealDft<2> {
    template <class Get, class Put>
    static __device__ __forceinline__ void run(Get get, Put put) {
        const float even = get(0), odd = get(1);
        put(0, even + odd);
        put(1, even - odd);
    }
};

// Elements of a dtype as they are staged: tokens to an 8-byte word, elements to a 16-byte load.
template <int Dtype>
struct Staged {
    static constexpr int kBytes = Dtype == kFloat32 ? 4 : 2;
    static constexpr int kTokens = 8 / kBytes;
    static constexpr int kElements = 16 / kBytes;
    static constexpr int kUnits = 4 / kTokens;  // of a thread in a stage: one token group's kElements neighbours

    static __device__ __forceinline__ void unpack(uint32_t low, uint32_t high, float (&x)[kTokens]) {
        if constexpr (Dtype == kFloat32) {
            x[0] = __uint_as_float(low);
            x[1] = __uint_as_float(high);
        } else if constexpr (Dtype == kBFloat16) {
            x[0] = bf16_low(low), x[1] = bf16_high(low);
            x[2] = bf16_low(high), x[3] = bf16_high(high);
        } else {
            x[0] = half_low(low), x[1] = half_high(low);
            x[2] = half_low(high), x[3] = half_high(high);
        }
    }
};

template <int K, bool Split>
struct LinearSketch {
    using Sizes = LinearSizes<K>;
    static constexpr int R = Sizes::kRoots, W = Sizes::kWarps;
    static_assert(W == R * Sizes::kSteps);
    static constexpr int kOperandWords = 2 * Sizes::kSideWords * (Split ? 2 : 1);
    static constexpr size_t kSharedBytes = 2 * Sizes::kStageBytes + kOperandWords * 4;

    const LinearArgs& args;
    int64_t batch;
    int first, end;  // tokens of the example that are this block's
    int tid, warp, lane;
    unsigned char* stages;
    uint32_t* operands;  // [side][high, low][polynomial][token pair][coefficient]
    // Whether the next stage's rows are asked for before this one is gathered: 16 registers, where there are as many.
    static constexpr bool kAhead = K * (Split ? 2 : 1) < 1024;
    Words4 rows[4];                           // of the stage that comes next, on their way
    float sums[2][4][4];                      // of the warp's plane: row tiles of 16, column tiles of 8, a fragment

    __device__ __forceinline__ LinearSketch(const LinearArgs& a) : args(a) {
        tid = static_cast<int>(threadIdx.x);
        warp = tid / 32;
        lane = tid % 32;
        batch = blockIdx.y;
        first = static_cast<int>(blockIdx.x) * args.block_tokens;
        end = args.tokens - first < args.block_tokens ? args.tokens : first + args.block_tokens;
        stages = shared_memory();
        operands = reinterpret_cast<uint32_t*>(stages + 2 * Sizes::kStageBytes);
#pragma unroll
        for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    template <int Bytes>
    __device__ __forceinline__ void load(const LinearSide& side, int token, int column) {
        constexpr int kGroup = 8 / Bytes, kElements = 16 / Bytes;
        constexpr int kWide = Sizes::kStageBytes / (Sizes::kTokens * 16);  // loads of a row
        static_assert(Sizes::kThreads % kWide == 0);
        token += tid / kWide * kGroup;
        column += tid % kWide * kElements;
        const int64_t offset = batch * side.stride_batch + token * side.stride_token;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int t = i / kGroup * (Sizes::kThreads / kWide * kGroup) + i % kGroup;
            rows[i] = load_row<Bytes>(side, offset + t * side.stride_token, column, token + t < end);
        }
    }

    // Asks for the first stage of a side.
    __device__ __forceinline__ void load_first(int number, int token) {
        const LinearSide& side = args.sides[number];
        if (Split && side.dtype == kFloat32) load<4>(side, token, 0);
        else load<2>(side, token, 0);
    }

    // Puts the rows that came into a stage, tokens side by side.
    template <int Dtype>
    __device__ __forceinline__ void store(unsigned char* stage) const {
        using S = Staged<Dtype>;
        constexpr int kColumns = Sizes::template kColumns<S::kBytes>, kWide = kColumns / S::kElements;
#pragma unroll
        for (int u = 0; u < S::kUnits; ++u) {
            const int unit = tid + u * Sizes::kThreads;
            const uint32_t element = static_cast<uint32_t>(unit % kWide * S::kElements);
            unsigned char* group = stage + (unit / kWide * kColumns + element / K * K) * 8;
#pragma unroll
            for (int pair = 0; pair < S::kElements / 2; ++pair) {
                Words4 out;
                if constexpr (Dtype == kFloat32) {
                    const Words4 &x = rows[2 * u], &y = rows[2 * u + 1];
                    out = {{x.w[2 * pair], y.w[2 * pair], x.w[2 * pair + 1], y.w[2 * pair + 1]}};
                } else {
                    out = {{__byte_perm(rows[0].w[pair], rows[1].w[pair], 0x5410),
                            __byte_perm(rows[2].w[pair], rows[3].w[pair], 0x5410),
                            __byte_perm(rows[0].w[pair], rows[1].w[pair], 0x7632),
                            __byte_perm(rows[2].w[pair], rows[3].w[pair], 0x7632)}};
                }
                const uint32_t at = staged_at(element % K + 2 * static_cast<uint32_t>(pair));
                *reinterpret_cast<Words4*>(group + at) = out;
            }
        }
    }

    // One side of a tile of tokens: its count sketches, their DFTs, the operand in shared memory. Its first stage has
    // been asked for, and so will be that of the side that comes next.
    template <int Dtype>
    __device__ __forceinline__ void sketch_rows(int number, int token) {
        using S = Staged<Dtype>;
        constexpr int kColumns = Sizes::template kColumns<S::kBytes>, kGroups = Sizes::kTokens / S::kTokens;
        constexpr int kBins = kGroups * K / Sizes::kThreads;  // of a thread: neighbours
        static_assert(kColumns % K == 0 && kBins % 4 == 0 && K % kBins == 0);
        const LinearSide& side = args.sides[number];
        const int group = tid * kBins / K;
        const int bin = tid * kBins % K;

        float bins[kBins][S::kTokens];
#pragma unroll
        for (int i = 0; i < kBins; ++i)
#pragma unroll
            for (int t = 0; t < S::kTokens; ++t) bins[i][t] = 0.0f;

        int turn = 0;
        if (!kAhead) load<S::kBytes>(side, token, 0);
        store<Dtype>(stages);
        __syncthreads();
        for (int column = 0; column < side.n; column += kColumns, turn ^= 1) {
            const bool more = column + kColumns < side.n;
            if (kAhead && more) load<S::kBytes>(side, token, column + kColumns);
            else if (kAhead) load_first(number ^ 1, token + number * Sizes::kTokens);
            const unsigned char* stage = stages + turn * Sizes::kStageBytes + group * kColumns * 8;
#pragma unroll
            for (int chunk = 0; chunk < kColumns; chunk += K) {
                if (column + chunk >= side.n) break;
                const uint32_t* entries = side.table + column + chunk + bin;
#pragma unroll
                for (int i = 0; i < kBins; i += 4) {
                    if (!kAhead) keep_order();  // loads of later bins must not take registers yet
                    const Words4 four = *reinterpret_cast<const Words4*>(entries + i);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const uint32_t sign = four.w[j] & kSignBit;
                        const Words2 word = *reinterpret_cast<const Words2*>(stage + chunk * 8 + (four.w[j] ^ sign));
                        float x[S::kTokens];
                        S::unpack(word.w[0], word.w[1], x);
                        const float one = __uint_as_float(0x3f800000u | sign);
#pragma unroll
                        for (int t = 0; t < S::kTokens; ++t) bins[i + j][t] = __fmaf_rn(x[t], one, bins[i + j][t]);
                    }
                }
            }
            if (!kAhead && more) load<S::kBytes>(side, token, column + kColumns);
            if (more) store<Dtype>(stages + (turn ^ 1) * Sizes::kStageBytes);
            __syncthreads();
        }
        exchange<S::kTokens, kBins>(number, group, bin, bins);
    }

    // From the threads that hold bins to warps that hold a token each: [m][token][n], bin = n + 32 m.
    template <int Tokens, int Bins>
    __device__ __forceinline__ void exchange(int number, int group, int bin, const float (&bins)[Bins][Tokens]) {
        float* board = reinterpret_cast<float*>(stages);  // all stages have been read
#pragma unroll
        for (int round = 0; round < Sizes::kRounds; ++round) {
            if (round > 0) __syncthreads();
            const int token = group * Tokens - round * Sizes::kRoundTokens;
            if (token >= 0 && token < Sizes::kRoundTokens) {
#pragma unroll
                for (int t = 0; t < Tokens; ++t)
#pragma unroll
                    for (int i = 0; i < Bins; i += 4) {
                        const int b = bin + i;
                        const int at = (b / kResidues * Sizes::kRoundTokens + token + t) * kResidues + b % kResidues;
                        *reinterpret_cast<Words4*>(board + at) = {{__float_as_uint(bins[i][t]), __float_as_uint(bins[i + 1][t]),
                                                                   __float_as_uint(bins[i + 2][t]),
                                                                   __float_as_uint(bins[i + 3][t])}};
                    }
            }
            __syncthreads();
            for (int t = warp; t < Sizes::kRoundTokens; t += W) transform(number, board, t, round * Sizes::kRoundTokens + t);
        }
        __syncthreads();
    }

    __device__ __forceinline__ void transform(int number, const float* board, int t, int token) {
        // Two warps write the halves of a word; no two lanes of one share a word.
        uint16_t* high = reinterpret_cast<uint16_t*>(operands + number * (Split ? 2 : 1) * Sizes::kSideWords +
                                                     token / 2 * Sizes::kPairStride + lane) + token % 2;
        const float* at = board + t * kResidues + lane;
        RealDft<R>::run([&](int m) { return at[m * Sizes::kRoundTokens * kResidues]; },
                        [&](int r, float y) {
                            const uint32_t rounded = pack_bf16(y, 0.0f) & 0xffffu;
                            high[2 * r * Sizes::kPolynomialWords] = static_cast<uint16_t>(rounded);
                            if constexpr (Split) {
                                const float left = y - __uint_as_float(rounded << 16);
                                high[2 * (Sizes::kSideWords + r * Sizes::kPolynomialWords)] =
                                    static_cast<uint16_t>(pack_bf16(left, 0.0f));
                            }
                        });
    }

    // The rows' operand of 16 tokens: two tiles of 16 coefficients.
    __device__ __forceinline__ void rows_of(const uint32_t* polynomial, uint32_t minus, uint32_t (&a)[2][4]) const {
        const uint32_t* at = polynomial + lane % 4 * Sizes::kPairStride + lane / 4;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[tile][i] = at[i / 2 * 4 * Sizes::kPairStride + tile * 16 + i % 2 * 8] ^ minus;
    }

    // The columns' operand: four tiles of 8 coefficients.
    __device__ __forceinline__ void columns_of(const uint32_t* polynomial, uint32_t (&b)[4][2]) const {
        const uint32_t* at = polynomial + lane % 4 * Sizes::kPairStride + lane / 4;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i) b[tile][i] = at[i * 4 * Sizes::kPairStride + tile * 8];
    }

    // sums += rows' polynomial r times columns' polynomial c, over the tokens of a step; minus: sign bits to turn
    __device__ __forceinline__ void multiply(int r, int c, int step, uint32_t minus) {
        const int offset = step * 8 * Sizes::kPairStride;
        const uint32_t* of_rows = operands + r * Sizes::kPolynomialWords + offset;
        const uint32_t* of_columns = operands + Sizes::kSideWords * (Split ? 2 : 1) + c * Sizes::kPolynomialWords + offset;
        uint32_t a[2][4], b[4][2];
        rows_of(of_rows, minus, a);
        columns_of(of_columns, b);
        add(a, b);
        if constexpr (Split) {
            uint32_t low[4][2];
            columns_of(of_columns + Sizes::kSideWords, low);
            add(a, low);
            rows_of(of_rows + Sizes::kSideWords, minus, a);
            add(a, b);
        }
    }

    __device__ __forceinline__ void add(const uint32_t (&a)[2][4], const uint32_t (&b)[4][2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_bf16(sums[i][j], a[i], b[j]);
    }

    __device__ __forceinline__ void multiply_planes() {
        const int step = warp / R, plane = warp % R, re = plane & ~1;
        if (plane < 2) {
            multiply(plane, plane, step, 0);
            return;
        }
        // re: re re - im im; im: re im + im re
        multiply(re, plane, step, 0);
        multiply(re + 1, plane ^ 1, step, plane == re ? 0x80008000u : 0);
    }

    // Diagonals of a plane, not wrapped and wrapped, summed by a lane each: [plane][2][n], of each step's warps.
    __device__ __forceinline__ float* fold_planes() {
        // Half a warp's stores, four columns' pairs of four rows, then hit all banks, and so do a diagonal's reads.
        constexpr int kStride = kResidues + 8;
        static_assert(W * kResidues * (kStride + 2) * 4 <= kSharedBytes);
        // After the last tile nobody reads stages or operands any more.
        float* matrix = reinterpret_cast<float*>(stages) + warp * kResidues * kStride;
        float* diagonals = reinterpret_cast<float*>(stages) + W * kResidues * kStride;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 32; i += 2) {
            const int row = i / 16 * 16 + i % 4 / 2 * 8 + lane / 4, column = i / 4 % 4 * 8 + lane % 4 * 2;
            const float* pair = sums[i / 16][i / 4 % 4] + i % 4;
            *reinterpret_cast<Words2*>(matrix + row * kStride + column) = {{__float_as_uint(pair[0]), __float_as_uint(pair[1])}};
        }
        __syncwarp();
        float straight = 0.0f, wrapped = 0.0f;
        for (int row = 0; row < kResidues; ++row) {
            const float x = matrix[row * kStride + ((lane - row) & (kResidues - 1))];
            if (row <= lane) straight += x;
            else wrapped += x;
        }
        float* at = diagonals + warp * 2 * kResidues;
        at[lane] = straight;
        at[kResidues + lane] = wrapped;
        __syncthreads();
        return diagonals;
    }

    __device__ __forceinline__ void finish() {
        float* diagonals = fold_planes();
        // cos(2 pi i / R), i < R, where the first warps' matrices were
        float* cosines = reinterpret_cast<float*>(stages);
        if (tid < R) cosines[tid] = cospif(2.0f * static_cast<float>(tid) / R);
        if constexpr (Sizes::kSteps > 1) {
            for (int i = tid; i < R * 2 * kResidues; i += Sizes::kThreads) {
                float sum = diagonals[i];
                for (int step = 1; step < Sizes::kSteps; ++step) sum += diagonals[step * R * 2 * kResidues + i];
                diagonals[i] = sum;
            }
        }
        __syncthreads();
        // Modulo x^32 - w: the wrapped diagonals count w times. In place, by the thread that reads them.
        const auto cosine = [&](int i) { return cosines[i % R]; };
        const auto sine = [&](int i) { return cosines[(i + 3 * R / 4) % R]; };  // R = 1, 2: never asked for
        for (int i = tid; i < (R + 1) / 2 * kResidues; i += Sizes::kThreads) {
            const int j = i / kResidues;  // of the complex roots; 0 stands for the two real ones
            float* re = diagonals + i / kResidues * 4 * kResidues + i % kResidues;
            float* im = re + 2 * kResidues;
            if (j == 0) {
                re[0] += re[kResidues];
                if (R > 1) im[0] -= im[kResidues];
            } else {
                const float c = cosine(j), s = -sine(j);  // w = exp(-2 pi i j / R)
                const float wrapped_re = re[kResidues], wrapped_im = im[kResidues];
                re[0] += c * wrapped_re - s * wrapped_im;
                im[0] += c * wrapped_im + s * wrapped_re;
            }
        }
        __syncthreads();
        float* out = args.partial + (static_cast<int64_t>(blockIdx.x) * gridDim.y + batch) * K;
        for (int b = tid; b < K; b += Sizes::kThreads) {
            const int m = b / kResidues;
            const float* at = diagonals + b % kResidues;
            float sum = 0.0f;
            for (int j = 0; j < (R + 1) / 2; ++j, at += 4 * kResidues) {
                if (j > 0) sum += 2.0f * (at[0] * cosine(j * m) - at[2 * kResidues] * sine(j * m));
                else if (R > 1) sum += m % 2 ? at[0] - at[2 * kResidues] : at[0] + at[2 * kResidues];
                else sum += at[0];
            }
            out[b] = sum / R;
        }
    }

    __device__ __forceinline__ void sketch_side(int number, int token) {
        const int dtype = args.sides[number].dtype;
        if (dtype == kBFloat16) sketch_rows<kBFloat16>(number, token);
        else if constexpr (Split) {
            if (dtype == kFloat32) sketch_rows<kFloat32>(number, token);
            else sketch_rows<kFloat16>(number, token);
        }
    }

    __device__ __forceinline__ void run() {
        if (kAhead) load_first(0, first);
        for (int token = first; token < end; token += Sizes::kTokens) {
            sketch_side(0, token);
            sketch_side(1, token);
            multiply_planes();
        }
        finish();
    }
};

template <int K, bool Split>
__global__ void __launch_bounds__(LinearSizes<K>::kThreads, Split || K >= 512 ? 1 : 2) linear_sketch_kernel(LinearArgs args) {
    LinearSketch<K, Split>(args).run();
}

}  // namespace rapidin
