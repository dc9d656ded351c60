// linear_sketch for 1,024 to 8,192 numbers, by one complex Fourier transform a token: with p and q the count sketches of a
// token's two factors and Z the transform of p + i q, the sketch is the inverse transform of the cross term in the sum of
// Z^2 (docs/reference/sketch.md). All sums are float32. docs/reference/kernels.md counts what it costs; in short:
//
//   1. chunks of k neighbours of as many tokens as the block transforms at a time (4, 2 or 1) are staged in shared memory,
//      tokens of an element side by side, and each thread gathers its bins' elements: no atomics;
//   2. k / 16 threads transform a token, 16 points each in registers: DFTs of 16 points, of 16, and of the k / 256 that are
//      left. Points change hands through shared memory between them, the second time within a warp;
//   3. Z^2 is added to sums in registers, in the order in which the last DFT leaves it; this order is the same for all
//      tokens, and is resolved once, at the end, before the inverse transform.
#pragma once

#include "linear_rows.cuh"

namespace rapidin {

template <int K>
struct FourierSizes {
    static constexpr int kPoints = 16;                               // of a thread
    static constexpr int kThreads = K > 4096 ? K / kPoints : 256;
    static constexpr int kTokens = kThreads * kPoints / K;           // that are transformed at a time
    static constexpr int kOfToken = K / kPoints;                     // threads
    static constexpr int kLast = K / 256;                            // points of the last DFT
    // A token's points lie in 16 rows; the padding lets the threads of several rows read at once.
    static constexpr int kRow = kOfToken + (kLast < 32 ? kLast : 0);
    static constexpr int kPlane = 16 * kRow;                         // floats of a token's real or imaginary parts
    static constexpr size_t kPointBytes = 2 * kTokens * kPlane * sizeof(float);
    static constexpr int kPeaks = 4 * kTokens;                       // [turn][side][token]
    static constexpr int kRoots = 16 + 256;                          // of the second DFT's rows and of the last DFTs
    static constexpr size_t kFixedBytes = kPointBytes + kRoots * 8 + kPeaks * 4;  // before the stages
    static_assert(kTokens * K == kThreads * kPoints);
    static_assert(kThreads % 32 == 0 && 32 % kLast == 0 && kFixedBytes % 16 == 0);
    // A stage: a chunk of k elements of kTokens tokens. Two of them, so that one is filled while the other is read, but
    // only one where two would take more than the 99 KB that sm_86 and sm_89 have.
    static __host__ __device__ constexpr int stages(int bytes) { return K > 4096 && bytes == 4 ? 1 : 2; }
    static __host__ __device__ constexpr int stage_bytes(int bytes) { return kThreads * kPoints * bytes; }
    static constexpr size_t shared_bytes(int bytes) {
        return kFixedBytes + static_cast<size_t>(stages(bytes) * stage_bytes(bytes));
    }
};

// Where the byte `at` of a stage lies: an order of its 16-byte pieces that spreads neighbouring threads' stores, which are 16
// to 64 bytes apart, over the banks. On the host too, which makes the tables.
__host__ __device__ __forceinline__ uint32_t spread_bytes(uint32_t at) { return at ^ (at >> 7 & 3) << 4; }

// The bin of a table's entry `at`, counted from the chunk's first. A thread's entries are four neighbours at a time; the
// bins are neighbours too, unless the thread transforms the token that it gathers: then they are its own points.
template <int K>
__host__ __device__ __forceinline__ int bin_of_entry(int at) {
    using S = FourierSizes<K>;
    if (S::kTokens > 1) return at;
    const int thread = at / 4 % S::kThreads, point = at / (4 * S::kThreads) * 4 + at % 4;
    return point * S::kOfToken + thread;
}

__host__ __device__ constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// The lowest `bits` bits of i in reverse, at most four: no loop, so that the compiler knows what comes of what it knows.
__host__ __device__ constexpr int reversed_bits(int i, int bits) {
    return ((i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3) >> (4 - bits);
}

// cos and sin of 2 pi i / 32, 0 <= i <= 8
__host__ __device__ constexpr float cosine32(int i) {
    return i == 0   ? 1.0f
           : i == 1 ? 0.98078528040323044913f
           : i == 2 ? 0.92387953251128675613f
           : i == 3 ? 0.83146961230254523708f
           : i == 4 ? 0.70710678118654752440f
           : i == 5 ? 0.55557023301960222474f
           : i == 6 ? 0.38268343236508977173f
           : i == 7 ? 0.19509032201612826785f
                    : 0.0f;
}
__host__ __device__ constexpr float sine32(int i) { return cosine32(8 - i); }

struct alignas(8) Complex {
    float re, im;
};
// x w exp(-2 pi i n / 32), n from 0 to 8 known to the compiler
__device__ __forceinline__ Complex turned(Complex w, int n) {
    if (n == 0) return w;
    if (n == 8) return {w.im, -w.re};
    const float c = cosine32(n), s = sine32(n);
    return {__fmaf_rn(w.im, s, w.re * c), __fmaf_rn(-w.re, s, w.im * c)};
}
__device__ __forceinline__ Complex squared(Complex w) {
    return {__fmaf_rn(w.re, w.re, -w.im * w.im), 2.0f * w.re * w.im};
}
// exp(-2 pi i x)
__device__ __forceinline__ Complex root_of_unity(float x) { return {cospif(2.0f * x), -cospif(2.0f * x - 0.5f)}; }

// (a, b) -> (a + w b, a - w b)
__device__ __forceinline__ void butterfly(Complex& a, Complex& b, Complex w) {
    const float re = __fmaf_rn(w.re, b.re, __fmaf_rn(-w.im, b.im, a.re));
    const float im = __fmaf_rn(w.re, b.im, __fmaf_rn(w.im, b.re, a.im));
    b = {__fmaf_rn(2.0f, a.re, -re), __fmaf_rn(2.0f, a.im, -im)};
    a = {re, im};
}
__device__ __forceinline__ void butterfly(Complex& a, Complex& b) {
    const Complex x = a, y = b;
    a = {x.re + y.re, x.im + y.im};
    b = {x.re - y.re, x.im - y.im};
}

// In place: x[r] becomes number reversed_bits(r) of the DFT of the N numbers x[j] w^j. Decimation in time: w^j is no
// multiplication of its own, but goes into the butterflies' roots. w is not used where it is 1, Plain.
template <int N, bool Plain>
__device__ __forceinline__ void dft(Complex* x, Complex w) {
    constexpr int kBits = log2_of(N);
    Complex power[kBits];  // [s]: w^(N / 2^(s + 1))
    if constexpr (!Plain) {
        power[kBits - 1] = w;
#pragma unroll
        for (int s = kBits - 2; s >= 0; --s) power[s] = squared(power[s + 1]);
    }
#pragma unroll
    for (int s = 0; s < kBits; ++s) {
        const int apart = N >> (s + 1);  // of a butterfly's numbers
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            // 2^s DFTs' numbers are merged, number k of each; the bits of k lie reversed above the butterfly's own.
            const int k = reversed_bits(i / apart, s), r = i / apart * 2 * apart + i % apart;
            const int turn = k * 32 >> (s + 1), quarter = turn / 8;  // exp(-2 pi i k / 2^(s + 1))
            if constexpr (Plain) {
                if (turn % 8 == 0) {
                    if (quarter) x[r + apart] = turned(x[r + apart], 8);
                    butterfly(x[r], x[r + apart]);
                } else {
                    const Complex root = {cosine32(turn % 8), -sine32(turn % 8)};
                    butterfly(x[r], x[r + apart], quarter ? turned(root, 8) : root);
                }
            } else {
                const Complex root = turned(power[s], turn % 8);
                butterfly(x[r], x[r + apart], quarter ? turned(root, 8) : root);
            }
        }
    }
}

template <int K>
struct FourierSketch {
    using Sizes = FourierSizes<K>;
    static constexpr int kTokens = Sizes::kTokens, kOfToken = Sizes::kOfToken, kRow = Sizes::kRow, kLast = Sizes::kLast;
    static constexpr int kBins = 16 / kTokens;  // that a thread gathers, of all kTokens
    static constexpr bool kOwnPoints = kTokens == 1;

    // What a stage needs to know of a dtype.
    template <int Dtype>
    struct Staged {
        static constexpr int kBytes = Dtype == kFloat32 ? 4 : 2;
        static constexpr int kWord = kBytes * kTokens;  // bytes of an element of all tokens
        // A unit is what a thread puts into the stage as one: some elements of all tokens, 8 or 16 bytes of each row.
        static constexpr int kElements = kTokens == 4 ? 4 : 16 / kBytes;
        static constexpr int kUnits = 16 / (kTokens * kElements);
        static constexpr int kUnitWords = kElements * kWord / 4, kRowWords = kUnitWords / kTokens;
        // Whether a side's first stage is asked for before the transform that comes first: 8 registers, where float32 takes
        // 16, which are not to be had.
        static constexpr bool kAhead = kBytes == 2;
    };

    const LinearArgs& args;
    const int tid, token_of_block, of_token;
    const int64_t batch;
    float* const points;  // [re, im][token]: planes
    Complex* const roots;
    uint32_t* const peaks;
    unsigned char* const stages;
    int second_stage;               // where it begins: with the first where there is but one
    int first, end;                 // tokens of the example that are this block's
    int turn = 0;                   // which of two stages is filled next
    Complex sums[16];
    uint32_t rows[16];              // of the stage that comes next, on their way

    __device__ __forceinline__ FourierSketch(const LinearArgs& a)
        : args(a),
          tid(static_cast<int>(threadIdx.x)),
          token_of_block(tid / kOfToken),
          of_token(tid % kOfToken),
          batch(blockIdx.y),
          points(reinterpret_cast<float*>(shared_memory())),
          roots(reinterpret_cast<Complex*>(shared_memory() + Sizes::kPointBytes)),
          peaks(reinterpret_cast<uint32_t*>(roots + Sizes::kRoots)),
          stages(shared_memory() + Sizes::kFixedBytes) {
        const int bytes = args.sides[0].dtype == kFloat32 || args.sides[1].dtype == kFloat32 ? 4 : 2;
        second_stage = Sizes::stages(bytes) == 2 ? Sizes::stage_bytes(bytes) : 0;
        first = static_cast<int>(blockIdx.x) * args.block_tokens;
        end = args.tokens - first < args.block_tokens ? args.tokens : first + args.block_tokens;
#pragma unroll
        for (int i = 0; i < 16; ++i) sums[i] = {0.0f, 0.0f};
    }

    // -------------------------------------------------------------------------------------------- transform
    // Input n = n1 k/16 + n2 is point n1 of thread n2; output w = k1 + 16 k21 + 256 k22.

    // Where number k21 of the second DFT of column m2 lies in its row, so that neither who writes the numbers of a column
    // nor who reads those of a number meets another on a bank.
    static __device__ __forceinline__ int crossing(int k21, int m2) {
        return k21 * kLast + (m2 ^ (kLast == 32 ? 2 * k21 : k21 & (kLast - 1)));
    }

    // k1 + 16 k21 of a thread's DFT i of the last ones
    static __device__ __forceinline__ int last_number(int row, int place, int i) {
        return row + 16 * (kLast == 32 ? place / 2 : place + kLast * i);
    }

    // The number w that register i holds after the transform.
    __device__ __forceinline__ int frequency(int i) const {
        const int row = of_token / kLast, place = of_token % kLast;
        const int number = kLast == 32 ? reversed_bits(i & ~1, 4) + 8 * (place & 1) + 16 * (i & 1)
                                       : reversed_bits(i % kLast, log2_of(kLast));
        return last_number(row, place, i / kLast) + 256 * number;
    }

    // Where number w lies in a token's planes before the transform.
    static __device__ __forceinline__ int place_of(int w) { return w / kOfToken * kRow + w % kOfToken; }

    // And after it, in the end: so that neither the threads that have the numbers nor those that read neighbours meet more
    // than another one on a bank.
    static __device__ __forceinline__ int place_in_the_end(int w) {
        return w / 256 * 256 + w % 16 * 16 + (w / 16 % 16 ^ w % 16);
    }

    __device__ __forceinline__ float* plane(int token, int imaginary) const {
        return points + (imaginary * kTokens + token) * Sizes::kPlane;
    }

    // x: the thread's 16 points -> 16 of the numbers of the transform. All threads of the block take part.
    __device__ __forceinline__ void transform(Complex (&x)[16]) const {
        float* re = plane(token_of_block, 0);
        float* im = plane(token_of_block, 1);
        int thread = of_token;
        compute_again(thread);  // from which addresses are made: they are many
        const int row = thread / kLast, place = thread % kLast;  // row: k1 of the second and the last DFT
        dft<16, true>(x, {1.0f, 0.0f});
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int at = reversed_bits(i, 4) * kRow + thread;
            re[at] = x[i].re;
            im[at] = x[i].im;
        }
        __syncthreads();
        re += row * kRow;  // this row is the warp's alone from here on
        im += row * kRow;
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] = {re[i * kLast + place], im[i * kLast + place]};
        __syncwarp();
        dft<16, false>(x, roots[row]);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int at = crossing(reversed_bits(i, 4), place);
            re[at] = x[i].re;
            im[at] = x[i].im;
        }
        __syncwarp();
        const Complex root_last = roots[16 + row * 16 + last_number(0, place, 0) / 16];
        if constexpr (kLast == 32) {
            const int odd = place & 1;  // which of a DFT's odd or even numbers this thread has
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int at = crossing(place / 2, 2 * i + odd);
                x[i] = {re[at], im[at]};
            }
            dft<16, false>(x, squared(root_last));
            // Merged by pairs of threads, half of the numbers by each.
            const Complex root = odd ? turned(root_last, 8) : root_last;
#pragma unroll
            for (int i = 0; i < 16; i += 2) {
                const Complex other = odd ? x[i] : x[i + 1];
                const Complex come = {__shfl_xor_sync(0xffffffffu, other.re, 1), __shfl_xor_sync(0xffffffffu, other.im, 1)};
                if (odd) x[i] = come;
                else x[i + 1] = come;
                butterfly(x[i], x[i + 1], turned(root, reversed_bits(i, 4)));
            }
        } else {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int at = crossing(place + i / kLast * kLast, i % kLast);
                x[i] = {re[at], im[at]};
            }
#pragma unroll
            for (int i = 0; i < 16 / kLast; ++i)  // their numbers are 16 kLast apart, so their roots 16 kLast / k = 1/16 of a turn
                dft<kLast, false>(x + i * kLast, turned(root_last, 2 * i));
        }
    }

    // ---------------------------------------------------------------------------------------- count sketches

    template <int Dtype>
    __device__ __forceinline__ void load(const LinearSide& side, int token, int column) {
        using S = Staged<Dtype>;
#pragma unroll
        for (int unit = 0; unit < S::kUnits; ++unit) {
            const int element = (tid + unit * Sizes::kThreads) * S::kElements;  // of the chunk
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const Words4 row = load_row<S::kBytes, S::kElements>(
                    side, batch * side.stride_batch + (token + t) * side.stride_token, column + element, token + t < end);
#pragma unroll
                for (int i = 0; i < S::kRowWords; ++i) rows[(unit * kTokens + t) * S::kRowWords + i] = row.w[i];
            }
        }
    }

    // Asks for the first stage of a side, unless that has to wait.
    __device__ __forceinline__ void load_first(int number, int token) {
        const LinearSide& side = args.sides[number];
        if (side.dtype != kFloat32) load<kFloat16>(side, token, 0);
    }

    // Bytes of a stage that hold elements of rows of which `elements` are left, and zeros up to a whole spread.
    template <int Dtype>
    static __device__ __forceinline__ uint32_t used_bytes(int elements) {
        return (static_cast<uint32_t>(elements < K ? elements : K) * Staged<Dtype>::kWord + 63) / 64 * 64;
    }

    // Puts the rows that came into a stage.
    template <int Dtype>
    __device__ __forceinline__ void store(unsigned char* stage, uint32_t used) const {
        using S = Staged<Dtype>;
#pragma unroll
        for (int unit = 0; unit < S::kUnits; ++unit) {
            const auto row = [&](int t, int i) { return rows[(unit * kTokens + t) * S::kRowWords + i]; };
            uint32_t words[S::kUnitWords];
#pragma unroll
            for (int e = 0; e < S::kElements; ++e) {
                if constexpr (S::kBytes == 4) {
#pragma unroll
                    for (int t = 0; t < kTokens; ++t) words[e * kTokens + t] = row(t, e);
                } else if constexpr (kTokens == 1) {
                    words[e / 2] = row(0, e / 2);
                } else {
#pragma unroll
                    for (int t = 0; t < kTokens; t += 2)
                        words[(e * kTokens + t) / 2] = __byte_perm(row(t, e / 2), row(t + 1, e / 2), e % 2 ? 0x7632 : 0x5410);
                }
            }
            const uint32_t begin = static_cast<uint32_t>((tid + unit * Sizes::kThreads) * S::kUnitWords * 4);
            if (begin >= used) return;
#pragma unroll
            for (int i = 0; i < S::kUnitWords; i += 4)
                *reinterpret_cast<Words4*>(stage + spread_bytes(begin + 4 * static_cast<uint32_t>(i))) = {
                    {words[i], words[i + 1], words[i + 2], words[i + 3]}};
        }
    }

    // Adds a chunk's elements to the thread's bins, each with its sign. Whole: all bins have an element.
    template <int Dtype, bool Whole>
    static __device__ __forceinline__ void gather(const unsigned char* stage, const uint32_t* entries, uint32_t used,
                                                  float (&bins)[kBins][kTokens]) {
#pragma unroll
        for (int j = 0; j < kBins / 4; ++j) {
            const Words4 four = *reinterpret_cast<const Words4*>(entries + j * 4 * Sizes::kThreads);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t sign = four.w[i] & kSignBit, at = four.w[i] ^ sign;
                if (!Whole && at >= used) continue;
                float x[kTokens];
                read_word<Dtype>(stage + at, x);
                const float one = __uint_as_float(0x3f800000u | sign);
                float(&bin)[kTokens] = bins[j * 4 + i];
#pragma unroll
                for (int t = 0; t < kTokens; ++t) bin[t] = __fmaf_rn(x[t], one, bin[t]);
            }
        }
    }

    // An element of all tokens.
    template <int Dtype>
    static __device__ __forceinline__ void read_word(const unsigned char* at, float (&x)[kTokens]) {
        if constexpr (Dtype == kFloat32) {
            if constexpr (kTokens == 4) {
                const Words4 word = *reinterpret_cast<const Words4*>(at);
#pragma unroll
                for (int t = 0; t < 4; ++t) x[t] = __uint_as_float(word.w[t]);
            } else if constexpr (kTokens == 2) {
                const Words2 word = *reinterpret_cast<const Words2*>(at);
                x[0] = __uint_as_float(word.w[0]), x[1] = __uint_as_float(word.w[1]);
            } else {
                x[0] = *reinterpret_cast<const float*>(at);
            }
        } else {
            uint32_t words[(kTokens + 1) / 2];
            if constexpr (kTokens == 4) {
                const Words2 word = *reinterpret_cast<const Words2*>(at);
                words[0] = word.w[0], words[1] = word.w[1];
            } else if constexpr (kTokens == 2) {
                words[0] = *reinterpret_cast<const uint32_t*>(at);
            } else {
                words[0] = *reinterpret_cast<const uint16_t*>(at);
            }
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const uint32_t word = words[t / 2];
                if constexpr (Dtype == kBFloat16) x[t] = t % 2 ? bf16_high(word) : bf16_low(word);
                else x[t] = t % 2 ? half_high(word) : half_low(word);
            }
        }
    }

    // The count sketches of one side of the block's next tokens, in registers. Its first stage has been asked for (kAhead),
    // and so will be that of the side that comes next.
    template <int Dtype>
    __device__ __forceinline__ void sketch_rows(int number, int token, float (&bins)[kBins][kTokens]) {
        using S = Staged<Dtype>;
        const LinearSide& side = args.sides[number];
#pragma unroll
        for (int i = 0; i < kBins; ++i)
#pragma unroll
            for (int t = 0; t < kTokens; ++t) bins[i][t] = 0.0f;
        if (!S::kAhead) load<Dtype>(side, token, 0);
        for (int column = 0; column < side.n; column += K) {
            const uint32_t used = used_bytes<Dtype>(side.n - column);
            unsigned char* stage = stages + (turn ? second_stage : 0);
            if (second_stage == 0) __syncthreads();  // the stage may still be read
            store<Dtype>(stage, used);
            __syncthreads();
            if (column + K < side.n) load<Dtype>(side, token, column + K);
            else load_first(number ^ 1, token + number * kTokens);
            const uint32_t* entries = side.table + column + 4 * tid;
            if (column + K <= side.n) gather<Dtype, true>(stage, entries, used, bins);
            else gather<Dtype, false>(stage, entries, used, bins);
            turn ^= 1;
        }
    }

    __device__ __forceinline__ void sketch_side(int number, int token, float (&bins)[kBins][kTokens]) {
        const int dtype = args.sides[number].dtype;
        if (dtype == kBFloat16) sketch_rows<kBFloat16>(number, token, bins);
        else if (dtype == kFloat32) sketch_rows<kFloat32>(number, token, bins);
        else sketch_rows<kFloat16>(number, token, bins);
    }

    // The largest magnitude of each token's bins, of all threads, as bits: they are in the order of the numbers.
    __device__ __forceinline__ void note_peaks(uint32_t* of_side, const float (&bins)[kBins][kTokens]) const {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            uint32_t peak = 0;
#pragma unroll
            for (int i = 0; i < kBins; ++i) {
                const uint32_t size = __float_as_uint(bins[i][t]) & ~kSignBit;
                peak = size > peak ? size : peak;
            }
            peak = __reduce_max_sync(0xffffffffu, peak);
            if (tid % 32 == 0) atomicMax(of_side + t, peak);
        }
    }

    // The bins to where the threads that transform their tokens read them.
    __device__ __forceinline__ void put(int number, const float (&bins)[kBins][kTokens]) const {
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
            for (int i = 0; i < kBins; i += 4) {
                const int bin = i * Sizes::kThreads + 4 * tid;
                *reinterpret_cast<Words4*>(plane(t, number) + place_of(bin)) = {
                    {__float_as_uint(bins[i][t]), __float_as_uint(bins[i + 1][t]), __float_as_uint(bins[i + 2][t]),
                     __float_as_uint(bins[i + 3][t])}};
            }
    }

    // Only the cross term of Z^2 = P^2 - Q^2 + 2i P Q is wanted, and output gradients are often a millionth of the inputs: so
    // each token's two parts are scaled to about the same length by powers of two whose product is 1: the length is taken
    // as that of as many numbers as the side has, all as large as the largest. Where one part is zero so is the cross term,
    // and the other's square must not leave its rounding there.
    __device__ __forceinline__ Complex balance(uint32_t p, uint32_t q) const {
        if (p == 0 || q == 0) return {0.0f, 0.0f};
        const int larger = static_cast<int>(q >> 23) - static_cast<int>(p >> 23);  // twofold, in bits
        const int shift = (2 * larger + bits_of_bins(1) - bits_of_bins(0)) / 4;
        const int within = shift < -126 ? -126 : shift > 126 ? 126 : shift;
        return {__uint_as_float(static_cast<uint32_t>(127 + within) << 23), __uint_as_float(static_cast<uint32_t>(127 - within) << 23)};
    }

    // floor(log2) of the bins that a side's elements may reach
    __device__ __forceinline__ int bits_of_bins(int number) const {
        const int n = args.sides[number].n;
        return 31 - __clz(static_cast<unsigned>(n < K ? n : K));
    }

    __device__ __forceinline__ void add_tokens(int token, int peak_turn) {
        uint32_t* peak = peaks + peak_turn * 2 * kTokens;
        Complex x[16];
        {
            float bins[kBins][kTokens];
            sketch_side(0, token, bins);
            note_peaks(peak, bins);
            if constexpr (kOwnPoints) {
#pragma unroll
                for (int i = 0; i < 16; ++i) x[i].re = bins[i][0];
            } else {
                put(0, bins);
            }
        }
        {
            float bins[kBins][kTokens];
            sketch_side(1, token, bins);
            note_peaks(peak + kTokens, bins);
            if constexpr (kOwnPoints) {
#pragma unroll
                for (int i = 0; i < 16; ++i) x[i].im = bins[i][0];
            } else {
                put(1, bins);
            }
        }
        __syncthreads();
        const Complex scale = balance(peak[token_of_block], peak[kTokens + token_of_block]);
        if (tid < 2 * kTokens) peaks[(peak_turn ^ 1) * 2 * kTokens + tid] = 0;  // all have read those of the tokens before
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if constexpr (!kOwnPoints) {
                const int at = i * kRow + of_token;
                x[i] = {plane(token_of_block, 0)[at], plane(token_of_block, 1)[at]};
            }
            x[i].re *= scale.re;
            x[i].im *= scale.im;
        }
        transform(x);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            sums[i].re = __fmaf_rn(-x[i].im, x[i].im, __fmaf_rn(x[i].re, x[i].re, sums[i].re));
            sums[i].im = __fmaf_rn(x[i].re, x[i].im, sums[i].im);  // half the imaginary part
        }
    }

    // Spectra of real rows have X[-w] = conj(X[w]), so F[w] = (S[w] - conj(S[-w])) / 4i is that of the sketch. The inverse
    // transform is taken as the forward one of the conjugate, by the first token's threads; the others transform zeros.
    __device__ __forceinline__ void finish() {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int at = place_in_the_end(frequency(i));
            plane(token_of_block, 0)[at] = sums[i].re;
            plane(token_of_block, 1)[at] = sums[i].im;
        }
        __syncthreads();
        Complex x[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int w = i * kOfToken + of_token;
            const int at = place_in_the_end(w), mirrored = place_in_the_end((K - w) % K);
            x[i] = {0.0f, 0.0f};
            if (token_of_block > 0) continue;
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                x[i].re += plane(t, 1)[at] + plane(t, 1)[mirrored];
                x[i].im += plane(t, 0)[at] - plane(t, 0)[mirrored];
            }
            x[i].re *= 0.5f / K;
            x[i].im *= 0.25f / K;
        }
        __syncthreads();
        transform(x);
        __syncthreads();
        if (token_of_block == 0) {
#pragma unroll
            for (int i = 0; i < 16; ++i) points[place_in_the_end(frequency(i))] = x[i].re;
        }
        __syncthreads();
        float* out = args.partial + (static_cast<int64_t>(blockIdx.x) * gridDim.y + batch) * K;
        for (int w = tid; w < K; w += Sizes::kThreads) out[w] = points[place_in_the_end(w)];
    }

    __device__ __forceinline__ void run() {
        // A stage's barrier comes before these are used.
        if (tid < 2 * kTokens) peaks[tid] = 0;
        for (int i = tid; i < Sizes::kRoots; i += Sizes::kThreads)
            roots[i] = i < 16 ? root_of_unity(static_cast<float>(i) / 256.0f)
                              : root_of_unity(static_cast<float>(i / 16 - 1 + i % 16 * 16) / K);  // [k1][k21]
        load_first(0, first);
        int peak_turn = 0;
        for (int token = first; token < end; token += kTokens, peak_turn ^= 1) add_tokens(token, peak_turn);
        finish();
    }
};

template <int K>
__global__ void __launch_bounds__(FourierSizes<K>::kThreads, K > 4096 ? 1 : 2) fourier_sketch_kernel(LinearArgs args) {
    FourierSketch<K>(args).run();
}

}  // namespace rapidin
