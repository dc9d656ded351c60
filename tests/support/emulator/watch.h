// What a build with -fsanitize=thread tells of the kernels' reads and writes, without that sanitizer's library: this one
// is given them instead (watch.cpp). It finds races and counts bank conflicts and sectors. In other builds all of it
// is nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {
namespace watch {

enum Kind : uint8_t { kRead = 0, kWrite = 1, kAtomic = 2 };

// A thread of the block that runs: what is on its own stack, or of the emulator's, is no memory of the GPU's.
struct Thread {
    uint32_t index, warp;
    const char *stack, *stack_end, *own, *own_end;
};

// Of one place in the code and kind of memory, over a launch. A request is what a warp does at once.
struct Site {
    uint64_t place;  // offset in the library of the instruction after the access
    Kind kind;
    bool shared;
    uint32_t bytes;  // of a lane
    uint64_t requests = 0, lanes = 0;
    // shared: turns of the 32 banks of 4 bytes; global: sectors of 32 bytes. And the fewest that the bytes fit in.
    uint64_t turns = 0, least = 0;
};

struct Launch {
    std::string name;
    unsigned grid[3];
    int threads;
    size_t shared_bytes;
    uint64_t barriers = 0, exchanges = 0, products = 0;  // of a block's, of a warp's
    // Distinct sectors: of the launch, and summed over blocks
    uint64_t sectors_read = 0, sectors_written = 0, sectors_of_blocks = 0;
    std::vector<Site> sites;
};

#if defined(RAPIDIN_WATCH)
void begin_launch(const char* name, const unsigned (&grid)[3], int threads, size_t shared_bytes);
void begin_block(const unsigned (&block)[3], const unsigned char* shared, size_t shared_bytes, int threads);
void run_thread(const Thread* thread);  // null: none
void at_barrier();                      // all threads of the block have come
void at_exchange(uint32_t warp);        // all lanes have
void count_product();
void end_block();
void end_launch();  // throws std::runtime_error where there were races

// Of the thread that runs. What came before a release comes before what follows an acquire of the same object.
void touch(const void* at, size_t bytes, Kind kind, const void* place);
void release(const void* object);
void acquire(const void* object);
void fence();
void atomic(const void* at, size_t bytes, const void* place);  // after a fence a release, and always an acquire

void count(bool wanted);  // from now on; forgets what was counted
std::vector<Launch> counted();
std::vector<std::string> launched();  // names of kernels, counted or not, since the last call
#else
inline void begin_launch(const char*, const unsigned (&)[3], int, size_t) {}
inline void begin_block(const unsigned (&)[3], const unsigned char*, size_t, int) {}
inline void run_thread(const Thread*) {}
inline void at_barrier() {}
inline void at_exchange(uint32_t) {}
inline void count_product() {}
inline void end_block() {}
inline void end_launch() {}
inline void touch(const void*, size_t, Kind, const void*) {}
inline void release(const void*) {}
inline void acquire(const void*) {}
inline void fence() {}
inline void atomic(const void*, size_t, const void*) {}
#endif

}  // namespace watch
}  // namespace emulator
