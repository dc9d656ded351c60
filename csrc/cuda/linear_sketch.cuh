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
    static constexpr int kBoardBytes = kTokens * K * 4;  // sketches of one side, between those who gather and who transform
    // An operand's words (two tokens) of one polynomial: [token pair][coefficient]. The padding spreads a fragment's
    // reads over all banks.
    static constexpr int kPairStride = kResidues + 8;
    static constexpr int kPolynomialWords = kTokens / 2 * kPairStride;
    static constexpr int kSideWords = kRoots * kPolynomialWords;
};

// How a chunk of k columns is staged in shared memory: 8 bytes an element (four 16-bit or two 32-bit tokens), 16 of them a row
// of all banks. Half a warp stores elements, or reads them, at a time: without conflicts where they lie on different pairs of
// banks. The host chooses pairs so that this holds for all stores and all reads (place_columns in linear_sketch.cu), a row
// for each read.
template <int K, int Bytes>
struct Placing {
    using Sizes = LinearSizes<K>;
    static constexpr int kTokens = 8 / Bytes;   // of a slot: a token group
    static constexpr int kElements = 4;         // of a row that a thread loads at a time
    static constexpr int kWide = K / kElements;  // loads of a row
    static constexpr int kUnits = Sizes::kTokens / kTokens * kWide / Sizes::kThreads;  // of a thread: a group's elements each
    static constexpr int kBins = Sizes::kTokens / kTokens * K / Sizes::kThreads;       // of a thread: neighbours
    static constexpr int kBytes = Sizes::kTokens * K * Bytes;
    static constexpr int kLanes = K / kBins < 16 ? K / kBins : 16;  // of half a warp that read a token group
    static constexpr int kStoreLanes = kWide < 16 ? kWide : 16;
    static constexpr int kGroups = 16 / kLanes;  // token groups that share rows
    // Chunks whose rows are asked for before they are needed, in 16 registers.
    static constexpr int kSlots = 4 / (kTokens * kUnits * Bytes / 4);
    static_assert(Sizes::kThreads % kWide == 0 && kBins % 4 == 0 && K % kBins == 0 && kStoreLanes >= kLanes);

    // The place of a token group in a chunk, in bytes; an element's is joined to it by XOR.
    static __host__ __device__ __forceinline__ uint32_t group_at(int group) {
        const int shared = group % kGroups;
        return static_cast<uint32_t>(group / kGroups * kGroups * K * 8 + (shared & 1) * 64 + (shared & 2) * 16);
    }
    static __host__ __device__ __forceinline__ int row_of(int bin) { return bin / (kLanes * kBins) * kBins + bin % kBins; }
};

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

// Elements of a dtype as they are staged: tokens to an 8-byte word.
template <int Dtype>
struct Staged {
    static constexpr int kBytes = Dtype == kFloat32 ? 4 : 2;
    static constexpr int kTokens = 8 / kBytes;

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
    static constexpr int kStageBytes = Placing<K, Split ? 4 : 2>::kBytes;
    // Two stages; then the board, where there is room for it: otherwise it takes the place of stages.
    static constexpr int kBoardAt = Split ? 0 : 2 * kStageBytes;
    static constexpr int kOperandsAt = 2 * kStageBytes + (Split ? 0 : Sizes::kBoardBytes);
    static constexpr size_t kSharedBytes = kOperandsAt + kOperandWords * 4;
    static_assert(!Split || Sizes::kBoardBytes <= 2 * kStageBytes);
    // Coefficients of a LowRankTerm lie where a side's operand will be: a token's high parts, its low parts, and padding,
    // with which reads of a fragment hit all banks.
    static constexpr int kPadding = 4;
    static constexpr int kFits = (Sizes::kSideWords / Sizes::kTokens - kPadding) / 16 * 16;
    static constexpr int kMostRank = Split || kFits < 64 ? 0 : kFits;  // with room for fewer it is not worth its registers

    const LinearArgs& args;
    int64_t batch;
    int first, end;  // tokens of the example that are this block's
    int tid, warp, lane;
    unsigned char* stages;
    uint32_t* operands;  // [side][high, low][polynomial][token pair][coefficient]
    // Whether rows are asked for before the chunk that lies before them is gathered: 16 registers, where there are as many.
    static constexpr bool kAhead = K * (Split ? 2 : 1) < 1024;
    uint32_t rows[16];  // of chunks that come next, on their way
    float sums[2][4][4];                      // of the warp's plane: row tiles of 16, column tiles of 8, a fragment

    __device__ __forceinline__ LinearSketch(const LinearArgs& a) : args(a) {
        tid = static_cast<int>(threadIdx.x);
        warp = tid / 32;
        lane = tid % 32;
        batch = blockIdx.y;
        first = static_cast<int>(blockIdx.x) * args.block_tokens;
        end = args.tokens - first < args.block_tokens ? args.tokens : first + args.block_tokens;
        stages = shared_memory();
        operands = reinterpret_cast<uint32_t*>(stages + kOperandsAt);
#pragma unroll
        for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    // Asks for a thread's part of a chunk.
    template <int Bytes>
    __device__ __forceinline__ void load(const LinearSide& side, int token, int column, int slot) {
        using P = Placing<K, Bytes>;
        constexpr int kWords = Bytes;  // four elements
        constexpr int kApart = Sizes::kThreads / P::kWide * P::kTokens;  // tokens between a thread's groups
        token += tid / P::kWide * P::kTokens;
        column += tid % P::kWide * P::kElements;
        uint32_t* words = rows + slot * P::kUnits * P::kTokens * kWords;
        if (side.aligned && column + P::kElements <= side.n && token + (P::kUnits - 1) * kApart + P::kTokens <= end) {
            const int64_t offset = batch * side.stride_batch + token * side.stride_token + column;
            const char* at = static_cast<const char*>(side.data) + offset * Bytes;
#pragma unroll
            for (int i = 0; i < P::kUnits * P::kTokens; ++i) {
                if constexpr (Bytes == 4) {
                    const Words4 row = load_streamed(at);
#pragma unroll
                    for (int w = 0; w < 4; ++w) words[i * 4 + w] = row.w[w];
                } else {
                    const Words2 row = load_streamed2(at);
                    words[i * 2] = row.w[0], words[i * 2 + 1] = row.w[1];
                }
                at += (i % P::kTokens < P::kTokens - 1 ? 1 : kApart - P::kTokens + 1) * side.stride_token * Bytes;
            }
            return;
        }
        // Rows of this kind are rare: their addresses are not kept in registers that the others need.
        compute_again(token);
        compute_again(column);
        const int64_t offset = batch * side.stride_batch + token * side.stride_token;
#pragma unroll
        for (int i = 0; i < P::kUnits * P::kTokens; ++i) {
            const int t = i / P::kTokens * kApart + i % P::kTokens;
            const Words4 row = load_row<Bytes, P::kElements>(side, offset + t * side.stride_token, column, token + t < end);
#pragma unroll
            for (int w = 0; w < kWords; ++w) words[i * kWords + w] = row.w[w];
        }
    }

    // Asks for the first chunks of a side, when `slot` of the side before has been stored.
    template <int Slots>
    __device__ __forceinline__ void load_first(int number, int token, int slot) {
        const LinearSide& side = args.sides[number];
        constexpr int kSlots = Placing<K, 2>::kSlots;
        if (Split && side.dtype == kFloat32) {
            if (slot == Slots - 1) load<4>(side, token, 0, 0);
        } else if (Slots == kSlots) {
            load<2>(side, token, slot * K, slot);
        } else {
#pragma unroll
            for (int i = 0; i < kSlots; ++i) load<2>(side, token, i * K, i);
        }
    }

    // Puts the rows that came into a stage, tokens side by side. places: of the thread's four elements
    template <int Dtype>
    __device__ __forceinline__ void store(int slot, int stage, const Words2& places) const {
        using S = Staged<Dtype>;
        using P = Placing<K, S::kBytes>;
#pragma unroll
        for (int u = 0; u < P::kUnits; ++u) {
            const uint32_t begin = static_cast<uint32_t>(stage * kStageBytes) +
                                   P::group_at((tid + u * Sizes::kThreads) / P::kWide);
            const uint32_t* of_tokens = rows + (slot * P::kUnits + u) * P::kTokens * S::kBytes;
#pragma unroll
            for (int i = 0; i < P::kElements; ++i) {
                Words2 out;
                if constexpr (Dtype == kFloat32) {
                    out = {{of_tokens[i], of_tokens[4 + i]}};
                } else {
                    const uint32_t halves = i % 2 ? 0x7632 : 0x5410;
                    out = {{__byte_perm(of_tokens[i / 2], of_tokens[2 + i / 2], halves),
                            __byte_perm(of_tokens[4 + i / 2], of_tokens[6 + i / 2], halves)}};
                }
                const uint32_t place = i % 2 ? places.w[i / 2] >> 16 : places.w[i / 2] & 0xffffu;
                *reinterpret_cast<Words2*>(stages + (begin ^ place)) = out;
            }
        }
    }

    // One side of a tile of tokens: its count sketches, their DFTs, the operand in shared memory. Its first chunks have
    // been asked for, and so will be those of the side that comes next.
    template <int Dtype>
    __device__ __forceinline__ void sketch_rows(int number, int token) {
        using S = Staged<Dtype>;
        using P = Placing<K, S::kBytes>;
        constexpr int kBins = P::kBins, kSlots = P::kSlots;
        const LinearSide& side = args.sides[number];
        const int group = tid * kBins / K;
        const int bin = tid * kBins % K;

        float bins[kBins][S::kTokens];
#pragma unroll
        for (int i = 0; i < kBins; ++i)
#pragma unroll
            for (int t = 0; t < S::kTokens; ++t) bins[i][t] = 0.0f;

        // Two bytes for the place of each element, then one for each bin: its element's pair of banks, and its sign.
        const int chunks = (side.n + K - 1) / K;
        // Offsets into the table, not pointers, which would take as many registers again.
        const int places = tid % P::kWide * 2;
        const int entries = chunks * (K / 2) + bin / 4;
        const uint32_t begin = P::group_at(group) + static_cast<uint32_t>(P::row_of(bin) * 128);
        Words2 place = *reinterpret_cast<const Words2*>(side.table + places);
        int turn = 0;
        for (int first = 0; first < chunks; first += kSlots) {
#pragma unroll
            for (int slot = 0; slot < kSlots; ++slot) {
                const int chunk = first + slot;
                const auto ask = [&] {  // for what comes next in this slot
                    if (!kAhead) return;
                    if (first + kSlots < chunks) load<S::kBytes>(side, token, (chunk + kSlots) * K, slot);
                    else load_first<kSlots>(number ^ 1, token + number * Sizes::kTokens, slot);
                };
                if (chunk >= chunks) {
                    ask();
                } else {
                    if (!kAhead) load<S::kBytes>(side, token, chunk * K, slot);
                    uint32_t four[kBins / 4];
#pragma unroll
                    for (int i = 0; i < kBins / 4; ++i) four[i] = side.table[entries + chunk * (K / 4) + i];
                    store<Dtype>(slot, turn, place);
                    if (chunk + 1 < chunks) place = *reinterpret_cast<const Words2*>(side.table + places + (chunk + 1) * (K / 2));
                    __syncthreads();
                    ask();
                    const uint32_t stage = begin + static_cast<uint32_t>(turn * kStageBytes);
#pragma unroll
                    for (int i = 0; i < kBins; i += 4) {
                        if (!kAhead) keep_order();  // loads of later bins must not take registers yet
                        Words2 words[4];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const uint32_t at = (four[i / 4] >> (j * 8) & 0x78u) ^ stage;
                            words[j] = *reinterpret_cast<const Words2*>(stages + (i + j) * 128 + at);
                        }
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            float x[S::kTokens];
                            S::unpack(words[j].w[0], words[j].w[1], x);
                            const float one = __uint_as_float(0x3f800000u | (four[i / 4] << (24 - j * 8) & kSignBit));
#pragma unroll
                            for (int t = 0; t < S::kTokens; ++t) bins[i + j][t] = __fmaf_rn(x[t], one, bins[i + j][t]);
                        }
                    }
                    turn ^= 1;
                }
            }
        }
        const bool term = kMostRank > 0 && side.of_basis != nullptr;
        if (term) put_coefficients(number, token);
        exchange<S::kTokens, kBins>(group, bin, bins);
        if (term) {
            add_low_rank(number);
            __syncthreads();
        }
        const float* board = reinterpret_cast<const float*>(stages + kBoardAt);
        for (int t = warp; t < Sizes::kTokens; t += W) transform(number, board, t);
        if (Split) __syncthreads();
    }

    // From the threads that hold bins to warps that hold a token each: [m][token][n], bin = n + 32 m.
    template <int Tokens, int Bins>
    __device__ __forceinline__ void exchange(int group, int bin, const float (&bins)[Bins][Tokens]) {
        float* board = reinterpret_cast<float*>(stages + kBoardAt);
        if (Split) __syncthreads();  // all stages have been read
#pragma unroll
        for (int t = 0; t < Tokens; ++t)
#pragma unroll
            for (int i = 0; i < Bins; i += 4) {
                const int b = bin + i;
                const int at = board_at(b / kResidues, group * Tokens + t, b % kResidues);
                *reinterpret_cast<Words4*>(board + at) = {{__float_as_uint(bins[i][t]), __float_as_uint(bins[i + 1][t]),
                                                           __float_as_uint(bins[i + 2][t]), __float_as_uint(bins[i + 3][t])}};
            }
        __syncthreads();
    }

    // A sketch's number on the board: [m][token][n]. Neighbouring tokens' n are turned, so that an accumulator's rows
    // lie in different banks.
    static __device__ __forceinline__ int board_at(int m, int token, int n) {
        return (m * Sizes::kTokens + token) * kResidues + (n ^ (token & 3) * 8);
    }

    // The coefficients c of a tile's tokens, as two bfloat16 each.
    __device__ __forceinline__ void put_coefficients(int number, int token) {
        const LinearSide& side = args.sides[number];
        const int half = side.rank / 2;
        uint32_t* words = operands + number * Sizes::kSideWords;
        int i = tid;
        compute_again(i);
        for (; i < Sizes::kTokens * half; i += Sizes::kThreads) {
            const int t = i / half, pair = i % half;
            float c[2] = {0.0f, 0.0f};
            if (token + t < end) {
                const float* row = side.along + (batch * args.tokens + token + t) * 2 * side.rank + 2 * pair;
                const Words2 high = *reinterpret_cast<const Words2*>(row);
                const Words2 low = *reinterpret_cast<const Words2*>(row + side.rank);
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    c[j] = (__uint_as_float(high.w[j]) + __uint_as_float(low.w[j])) * side.gain[2 * pair + j];
            }
            const uint32_t rounded = pack_bf16(c[0], c[1]);
            uint32_t* at = words + t * (side.rank + kPadding) + pair;
            at[0] = rounded;
            at[half] = pack_bf16(c[0] - bf16_low(rounded), c[1] - bf16_high(rounded));
        }
    }

    // Adds CS(U) c to the sketches on the board: a warp has 16 tokens and one m.
    __device__ __forceinline__ void add_low_rank(int number) {
        const LinearSide& side = args.sides[number];
        int thread = tid;
        compute_again(thread);  // addresses, which would take registers all the time
        const int at_lane = thread % 32, m = thread / 32 % R, first_token = thread / 32 / R * 16;
        const int steps = side.rank / 16, stride = side.rank + kPadding;
        const uint32_t* c = operands + number * Sizes::kSideWords + (first_token + at_lane / 4) * stride + at_lane % 4;
        const Words4* table = reinterpret_cast<const Words4*>(side.of_basis) + m * steps * 128 + at_lane;
        float terms[4][4];  // of tokens by columns of 8
#pragma unroll
        for (int i = 0; i < 16; ++i) terms[i / 4][i % 4] = 0.0f;
        for (int step = 0; step < steps; ++step, c += 8, table += 128) {
            const Words4 columns[2][2] = {{table[0], table[32]}, {table[64], table[96]}};  // high parts, low parts
            uint32_t a[2][4];
#pragma unroll
            for (int part = 0; part < 2; ++part)
#pragma unroll
                for (int i = 0; i < 4; ++i) a[part][i] = c[part * side.rank / 2 + i % 2 * 8 * stride + i / 2 * 4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint32_t* of_high = columns[0][j / 2].w + j % 2 * 2;
                const uint32_t* of_low = columns[1][j / 2].w + j % 2 * 2;
                const uint32_t high[2] = {of_high[0], of_high[1]}, low[2] = {of_low[0], of_low[1]};
                mma_bf16(terms[j], a[1], high);
                mma_bf16(terms[j], a[0], low);
                mma_bf16(terms[j], a[0], high);
            }
        }
        float* board = reinterpret_cast<float*>(stages + kBoardAt);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int at = board_at(m, first_token + at_lane / 4 + i * 4, j * 8 + at_lane % 4 * 2);
                Words2* pair = reinterpret_cast<Words2*>(board + at);
                const Words2 sum = *pair;
                *pair = {{__float_as_uint(__uint_as_float(sum.w[0]) + terms[j][i]),
                          __float_as_uint(__uint_as_float(sum.w[1]) + terms[j][i + 1])}};
            }
    }

    __device__ __forceinline__ void transform(int number, const float* board, int token) {
        // Two warps write the halves of a word; no two lanes of one share a word.
        uint16_t* high = reinterpret_cast<uint16_t*>(operands + number * (Split ? 2 : 1) * Sizes::kSideWords +
                                                     token / 2 * Sizes::kPairStride + lane) + token % 2;
        const float* at = board + board_at(0, token, lane);
        RealDft<R>::run([&](int m) { return at[m * Sizes::kTokens * kResidues]; },
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
        if (kAhead) {
            constexpr int kSlots = Placing<K, 2>::kSlots;
#pragma unroll
            for (int slot = 0; slot < kSlots; ++slot) load_first<kSlots>(0, first, slot);
        }
        for (int token = first; token < end; token += Sizes::kTokens) {
            sketch_side(0, token);
            sketch_side(1, token);
            if (!Split) __syncthreads();  // the operands are whole
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
