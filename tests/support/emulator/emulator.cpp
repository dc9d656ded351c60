// Threads of a block as coroutines; see emulator.h.
#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SWITCH_BEGIN(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define SWITCH_END(save, bottom, size) __sanitizer_finish_switch_fiber(save, bottom, size)
#else
#define SWITCH_BEGIN(save, bottom, size) static_cast<void>(save), static_cast<void>(bottom), static_cast<void>(size)
#define SWITCH_END(save, bottom, size) static_cast<void>(save), static_cast<void>(bottom), static_cast<void>(size)
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;

// What a launch may ask for: CUDA C++ Programming Guide, technical specifications by compute capability.
struct Arch {
    int number, shared_bytes;  // of a block that opts in
};
constexpr Arch kArchs[] = {{75, 64 << 10}, {80, 163 << 10}, {86, 99 << 10}, {89, 99 << 10}, {90, 227 << 10}, {100, 227 << 10}};
constexpr int kMostThreads = 1024, kSharedWithoutAsking = 48 << 10;
constexpr unsigned kMostX = 0x7fffffffu, kMostYZ = 65535;
constexpr int kMultiprocessors = 3;
Arch arch = kArchs[4];
bool checked_only = false;
std::unordered_map<const void*, int> allowed;  // shared memory that kernels have opted in to

enum State { kReady, kAtBarrier, kAtExchange, kDone };

struct AsyncCopy {
    void* to;
    const void* from;
    int bytes, read;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    watch::Thread watched;
    Place place;
    State state = kReady;
    int64_t exchanges = 0;
    Deposit deposit;
    void* fake_stack = nullptr;
    std::vector<std::vector<AsyncCopy>> groups;
    std::vector<AsyncCopy> open;
};

struct Warp {
    Deposit all[2][32];  // of this exchange and the one before, which slower lanes may still be reading
    int64_t done = 0;
};

struct Block {
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[]> shared;
    const std::function<void()>* body = nullptr;
    const char* name = "";
};

Block block;
Thread* current = nullptr;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
Place outside;
int order = kForward;

[[noreturn]] void die(const char* what) {
    std::fprintf(stderr, "emulator: %s in kernel %s, block (%u, %u, %u), thread %u\n", what, block.name, here().block.x,
                 here().block.y, here().block.z, here().thread.x);
    std::abort();
}

void to_scheduler(State state) {
    Thread* self = current;
    self->state = state;
    SWITCH_BEGIN(state == kDone ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
    swapcontext(&self->context, &scheduler);
    SWITCH_END(self->fake_stack, &scheduler_bottom, &scheduler_size);
}

void entry() {
    SWITCH_END(nullptr, &scheduler_bottom, &scheduler_size);
    (*block.body)();
    if (!current->open.empty() || !current->groups.empty()) {
        for (const auto& group : current->groups)
            if (!group.empty()) die("asynchronous copies that nobody waited for");
        if (!current->open.empty()) die("asynchronous copies that were not committed");
    }
    to_scheduler(kDone);
}

void resume(Thread& thread) {
    current = &thread;
    SWITCH_BEGIN(&scheduler_fake_stack, thread.stack.get(), kStackBytes);
    watch::run_thread(&thread.watched);
    swapcontext(&scheduler, &thread.context);
    watch::run_thread(nullptr);
    SWITCH_END(scheduler_fake_stack, nullptr, nullptr);
    current = nullptr;
}

// Apart from its caller, whose variables must not be held in registers that getcontext saves.
__attribute__((noinline)) void begin(Thread& thread) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
}

// Runs the block until all threads have ended.
void run_block(int threads) {
    std::mt19937 random(7);
    std::vector<int> turn(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) turn[static_cast<size_t>(i)] = order == kBackward ? threads - 1 - i : i;
    for (;;) {
        bool ran = false;
        int done = 0, at_barrier = 0;
        if (order == kShuffled) std::shuffle(turn.begin(), turn.end(), random);
        for (int i : turn) {
            Thread& thread = *block.threads[static_cast<size_t>(i)];
            if (thread.state != kReady) continue;
            resume(thread);
            ran = true;
        }
        // Warps whose lanes have all come to an exchange go on.
        for (size_t w = 0; w < block.warps.size(); ++w) {
            int waiting = 0, over = 0;
            const int lanes = std::min(32, threads - static_cast<int>(w) * 32);
            for (int lane = 0; lane < lanes; ++lane) {
                const State state = block.threads[w * 32 + static_cast<size_t>(lane)]->state;
                waiting += state == kAtExchange;
                over += state == kDone;
            }
            if (waiting > 0 && waiting + over == lanes) {
                Warp& warp = block.warps[w];
                Deposit* all = warp.all[++warp.done % 2];
                for (int lane = 0; lane < 32; ++lane) {
                    std::fill(std::begin(all[lane].words), std::end(all[lane].words), 0xDEADBEEFu);
                    if (lane >= lanes) continue;
                    Thread& thread = *block.threads[w * 32 + static_cast<size_t>(lane)];
                    if (thread.state != kAtExchange) continue;
                    all[lane] = thread.deposit;
                    thread.state = kReady;
                }
                watch::at_exchange(static_cast<uint32_t>(w));
                ran = true;
            }
        }
        for (const auto& thread : block.threads) {
            done += thread->state == kDone;
            at_barrier += thread->state == kAtBarrier;
        }
        if (done == threads) return;
        if (at_barrier > 0 && at_barrier + done == threads) {
            if (done > 0) die("a barrier that some threads have left behind");
            for (const auto& thread : block.threads) thread->state = kReady;
            watch::at_barrier();
            continue;
        }
        if (!ran) die("threads that wait for each other: a barrier or a warp's exchange that not all lanes reach");
    }
}

}  // namespace

Place& here() { return current ? current->place : outside; }

void set_order(int wanted) { order = wanted; }

void set_arch(int wanted) {
    for (const Arch& known : kArchs) {
        if (known.number != wanted) continue;
        arch = known;
        allowed.clear();
        return;
    }
    throw std::invalid_argument("set_arch: known are 75, 80, 86, 89, 90 and 100, got " + std::to_string(wanted));
}

void set_checked_only(bool wanted) { checked_only = wanted; }

cudaError_t allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || bytes > arch.shared_bytes) return cudaErrorInvalidValue;
    allowed[kernel] = bytes;
    return cudaSuccess;
}

void barrier() { to_scheduler(kAtBarrier); }

void exchange(const Deposit& own, Deposit (&all)[32], uint32_t& present) {
    Thread* self = current;
    self->deposit = own;
    to_scheduler(kAtExchange);
    const size_t w = self->place.thread.x / 32;
    const Warp& warp = block.warps[w];
    std::copy(std::begin(warp.all[warp.done % 2]), std::end(warp.all[warp.done % 2]), std::begin(all));
    present = 0;
    for (size_t lane = 0; lane < 32 && w * 32 + lane < block.threads.size(); ++lane)
        if (block.threads[w * 32 + lane]->state != kDone) present |= 1u << lane;
}

// The running thread may neither read nor write there before it has waited; others only after a barrier besides.
void copy_async(void* to, const void* from, int bytes, int read) {
    const void* place = __builtin_return_address(0);
    if (read > 0) watch::touch(from, static_cast<size_t>(read), watch::kRead, place);
    watch::touch(to, static_cast<size_t>(bytes), watch::kWrite, place);
    current->open.push_back({to, from, bytes, read});
}

void commit_async() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}

void wait_async(int groups_left) {
    auto& groups = current->groups;
    while (static_cast<int>(groups.size()) > groups_left) {
        for (const AsyncCopy& copy : groups.front()) {
            memset(copy.to, 0, static_cast<size_t>(copy.bytes));
            if (copy.read > 0) memcpy(copy.to, copy.from, static_cast<size_t>(copy.read));
        }
        groups.erase(groups.begin());
    }
}

}  // namespace emulator

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = emulator::kMultiprocessors; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::arch.shared_bytes; break;
        case cudaDevAttrComputeCapabilityMajor: *value = emulator::arch.number / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = emulator::arch.number % 10; break;
    }
    return cudaSuccess;
}

uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t pick = selector >> (4 * i) & 0xf;
        uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (pick & 7))) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= byte << (8 * i);
    }
    return out;
}

int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i)
        c += static_cast<int>(static_cast<int8_t>(a >> (8 * i))) * static_cast<int>(static_cast<int8_t>(b >> (8 * i)));
    return c;
}

uint32_t __ballot_sync(uint32_t, int predicate) {
    emulator::Deposit own = {}, all[32];
    own.words[0] = predicate != 0;
    uint32_t present, votes = 0;
    emulator::exchange(own, all, present);
    for (int lane = 0; lane < 32; ++lane)
        if (present >> lane & 1) votes |= (all[lane].words[0] & 1) << lane;
    return votes;
}

int __syncthreads_or(int predicate) {
    static int votes = 0;
    emulator::barrier();
    votes |= predicate != 0;
    emulator::barrier();
    const int found = votes;
    emulator::barrier();
    votes = 0;  // nobody votes before all have left the next call's first barrier
    return found;
}

namespace rapidin {

unsigned char* shared_memory() { return emulator::block.shared.get(); }

float emulated_half(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    const float size = exponent ? std::ldexp(static_cast<float>(mantissa + 1024), static_cast<int>(exponent) - 25)
                                : std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -size : size;
}

uint32_t emulated_pack_bf16(float low, float high) {
    const auto round = [](float x) {
        const uint32_t bits = __float_as_uint(x);
        if (std::isnan(x)) return 0x7fffu;
        return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

// The 16 x 8 products of rows and columns of 8 words each; `dot` multiplies two words.
template <class T, class Dot>
static void emulated_mma_words(T (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Dot dot) {
    emulator::Deposit own = {}, all[32];
    if (emulated_lane() == 0) emulator::watch::count_product();
    std::copy(std::begin(a), std::end(a), own.words);
    std::copy(std::begin(b), std::end(b), own.words + 4);
    uint32_t present;
    emulator::exchange(own, all, present);
    const int lane = emulated_lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        decltype(dot(0u, 0u)) sum = 0;
        for (int word = 0; word < 8; ++word)
            sum += dot(all[row % 8 * 4 + word % 4].words[row / 8 + word / 4 * 2], all[column * 4 + word % 4].words[4 + word / 4]);
        d[i] = static_cast<T>(d[i] + sum);
    }
}

void emulated_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MmaNumbers numbers) {
    emulated_mma_words(d, a, b, [numbers](uint32_t x, uint32_t y) {
        const auto number = [numbers](uint32_t word, int half) {
            if (numbers == kMmaTF32) return static_cast<double>(__uint_as_float(word & 0xffffe000u));
            if (numbers == kMmaBF16) return static_cast<double>(__uint_as_float(half ? word & 0xffff0000u : word << 16));
            return static_cast<double>(emulated_half(static_cast<uint16_t>(half ? word >> 16 : word)));
        };
        const double low = number(x, 0) * number(y, 0);
        return numbers == kMmaTF32 ? low : low + number(x, 1) * number(y, 1);
    });
}

void emulated_mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool unsigned_a) {
    emulated_mma_words(d, a, b, [unsigned_a](uint32_t x, uint32_t y) {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) {
            const uint8_t byte = static_cast<uint8_t>(x >> (8 * i));
            sum += (unsigned_a ? static_cast<int>(byte) : static_cast<int>(static_cast<int8_t>(byte))) *
                   static_cast<int>(static_cast<int8_t>(y >> (8 * i)));
        }
        return sum;
    });
}

cudaError_t emulate(const char* name, const void* kernel, dim3 grid, int threads, size_t shared_bytes,
                    const std::function<void()>& body) {
    using namespace emulator;
    if (threads < 1 || threads > kMostThreads || grid.x > kMostX || grid.y > kMostYZ || grid.z > kMostYZ)
        return cudaErrorInvalidConfiguration;
    const auto asked = allowed.find(kernel);
    const int most = asked == allowed.end() ? kSharedWithoutAsking : std::max(asked->second, kSharedWithoutAsking);
    if (shared_bytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
    if (checked_only) return cudaSuccess;
    block.name = name;
    block.body = &body;
    while (static_cast<int>(block.threads.size()) < threads) {
        block.threads.push_back(std::make_unique<Thread>());
        block.threads.back()->stack = std::make_unique<char[]>(kStackBytes);
    }
    block.threads.resize(static_cast<size_t>(threads));
    watch::begin_launch(name, {grid.x, grid.y, grid.z}, threads, shared_bytes);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block.shared = std::make_unique<unsigned char[]>(std::max<size_t>(shared_bytes, 1));
                std::fill_n(block.shared.get(), shared_bytes, static_cast<unsigned char>(0xff));  // NaN
                block.warps.assign(static_cast<size_t>((threads + 31) / 32), Warp{});
                for (int i = 0; i < threads; ++i) {
                    Thread& thread = *block.threads[static_cast<size_t>(i)];
                    thread.state = kReady;
                    thread.groups.clear();
                    thread.open.clear();
                    thread.place = {dim3(static_cast<unsigned>(i), 0, 0), dim3(x, y, z),
                                    dim3(static_cast<unsigned>(threads)), grid};
                    const auto* own = reinterpret_cast<const char*>(&thread);
                    thread.watched = {static_cast<uint32_t>(i), static_cast<uint32_t>(i / 32), thread.stack.get(),
                                      thread.stack.get() + kStackBytes, own, own + sizeof thread};
                    begin(thread);
                }
                watch::begin_block({x, y, z}, block.shared.get(), shared_bytes, threads);
                run_block(threads);
                watch::end_block();
            }
    watch::end_launch();
    block.shared.reset();
    return cudaSuccess;
}

}  // namespace rapidin
