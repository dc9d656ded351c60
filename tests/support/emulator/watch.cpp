// Races and counts from what -fsanitize=thread says of each access; see watch.h.
//
// Races. Two accesses of one byte by two threads, one of them a write, race unless one happens before the other: by the
// order of a thread, a barrier of the block, something that a warp does together, or a release and an acquire of one
// object. A warp has a clock that goes on with each of these; an access is stamped with its block, thread and warp's
// clock, and each warp knows of each other one up to which clock it comes before. So the order in which threads did run
// does not hide another in which they might have. Blocks of a launch are ordered by fences and atomics alone.
//
// Counts. Between two such points the n-th accesses of a warp's lanes at one place in the code are taken for one request.
// (Where lanes leave a loop at different turns, what follows may be counted as more requests than it is.)
#if defined(RAPIDIN_WATCH)
#include "watch.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

namespace emulator {
namespace watch {
namespace {

constexpr uint32_t kWarps = 32, kThreads = 1024;
constexpr size_t kMostRaces = 8;  // that one error tells of

struct Stamp {
    uint32_t run = 0;  // serial number of the block
    uint32_t thread = 0, clock = 0;
    uint32_t releases = 0;  // of the thread before
    uint32_t warp() const { return thread / 32; }
};

struct Access {
    Stamp stamp;
    uint32_t place = 0;
    bool lanes = false;  // others of the same warp and clock too
};

// Of the block that runs, accesses that have no order among themselves; of the blocks before, one place.
struct Accesses {
    Access last;
    uint32_t many = 0;           // 1 + index in `lists`, where there are several
    uint32_t foreign_place = 0;  // 0: none
};

struct Cell {
    Accesses reads;
    Access write;
    bool atomics = false;  // there are some, in `atomics`
};

using Clocks = std::array<uint32_t, kWarps>;

// What comes before: by block and warp all accesses of lower clocks, and what single threads did before a release.
struct Known {
    std::map<uint32_t, Clocks> clocks;
    std::map<std::pair<uint32_t, uint32_t>, uint32_t> threads;  // (run, thread): releases

    void join(const Known& other) {
        for (const auto& [run, theirs] : other.clocks) {
            Clocks& own = clocks[run];
            for (size_t w = 0; w < kWarps; ++w) own[w] = std::max(own[w], theirs[w]);
        }
        for (const auto& [thread, releases] : other.threads) {
            uint32_t& own = threads[thread];
            own = std::max(own, releases);
        }
    }
    bool covers(const Access& x) const {
        if (const auto found = clocks.find(x.stamp.run); found != clocks.end() && x.stamp.clock < found->second[x.stamp.warp()]) return true;
        const auto found = x.lanes ? threads.end() : threads.find({x.stamp.run, x.stamp.thread});
        return found != threads.end() && x.stamp.releases < found->second;
    }
};

struct Record {
    uintptr_t at;
    uint32_t site;
};

struct Race {
    Access other;
    Kind kind, other_kind;
    Stamp stamp;
    uint32_t place;
    uintptr_t at;
    bool shared;
};

// The block that runs
const Thread* now = nullptr;
uint32_t run = 0, first_run = 1;  // first_run: of this launch
uint32_t clocks[kWarps];
uint32_t known[kWarps][kWarps];  // known[w][v]: what warp v did at lower clocks comes before what w does now
Known acquired_by_warp[kWarps];
std::vector<Known> acquired(kThreads);  // not yet by the thread's warp
std::vector<uint32_t> releases(kThreads);
std::vector<char> fenced(kThreads);
std::unordered_map<const void*, Known> released;  // in this launch
std::vector<std::vector<Access>> lists;
uintptr_t shared_at = 0;
size_t shared_size = 0;
uint32_t warps = 0;
std::vector<std::array<unsigned, 3>> blocks;  // of this launch

std::vector<Cell> shared_cells;
constexpr uintptr_t kPage = 256;
std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
std::unordered_map<uintptr_t, Accesses> atomics;

std::vector<Race> races;
std::set<std::pair<uint32_t, uint32_t>> told;

// Counting
bool counting = false;
Launch launch;
std::vector<Launch> launches;
std::set<std::string> names;
std::vector<std::vector<Record>> records(kThreads);
std::map<std::tuple<uint32_t, Kind, bool, uint32_t>, uint32_t> site_numbers;
std::unordered_set<uintptr_t> sectors_read, sectors_written, sectors_of_block;

// This library and the stack that launched: no memory of the GPU's.
struct Range {
    uintptr_t begin = 0, end = 0;
    bool has(uintptr_t at) const { return at >= begin && at < end; }
};
Range host_stack;

const Range& library() {
    static const Range found = [] {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&begin_launch), &info);
        Range range;
        range.begin = reinterpret_cast<uintptr_t>(info.dli_fbase);
        dl_iterate_phdr(
            [](dl_phdr_info* of, size_t, void* data) {
                Range& range = *static_cast<Range*>(data);
                if (of->dlpi_addr != range.begin) return 0;
                for (int i = 0; i < of->dlpi_phnum; ++i)
                    if (of->dlpi_phdr[i].p_type == PT_LOAD)
                        range.end = std::max<uintptr_t>(range.end, range.begin + of->dlpi_phdr[i].p_vaddr + of->dlpi_phdr[i].p_memsz);
                return 1;
            },
            &range);
        return range;
    }();
    return found;
}

// ---- order ----

Stamp stamp_now() { return {run, now->index, clocks[now->warp], releases[now->index]}; }

bool same_moment(const Stamp& a, const Stamp& b) { return a.run == b.run && a.clock == b.clock && a.warp() == b.warp(); }

// Whether it comes before what the running thread does now. Accesses of blocks before `floor` always do.
bool before(const Access& x, uint32_t floor) {
    const Stamp& stamp = x.stamp;
    if (stamp.run < floor) return true;
    if (stamp.run == run) {
        const uint32_t v = stamp.warp(), w = now->warp;
        if (v != w ? stamp.clock < known[w][v] : stamp.clock < clocks[w] || (stamp.thread == now->index && !x.lanes)) return true;
    }
    return acquired_by_warp[now->warp].covers(x) || acquired[now->index].covers(x);
}

bool knows_all_blocks() {
    const size_t others = run - first_run;
    return acquired_by_warp[now->warp].clocks.size() >= others || acquired[now->index].clocks.size() >= others;
}

void add(Accesses& to, const Access& x, uint32_t floor) {
    Access& last = to.last;
    if (last.stamp.run != run) {
        if (last.stamp.run >= floor) to.foreign_place = last.place;
        else to.foreign_place = 0;
        to.many = 0;
        last = x;
        return;
    }
    const auto merge = [&](Access& old) {
        if (!same_moment(old.stamp, x.stamp)) return false;
        if (old.stamp.thread != x.stamp.thread) old.lanes = true;
        else old.stamp.releases = x.stamp.releases;
        return true;
    };
    if (to.many == 0) {
        if (merge(last)) return;
        if (before(last, floor)) {
            last = x;
            return;
        }
        lists.push_back({last});
        to.many = static_cast<uint32_t>(lists.size());
    }
    auto& list = lists[to.many - 1];
    for (Access& old : list)
        if (merge(old)) return;
    list.erase(std::remove_if(list.begin(), list.end(), [&](const Access& old) { return before(old, floor); }), list.end());
    list.push_back(x);
}

void race(const Access& other, Kind other_kind, Kind kind, uint32_t place, uintptr_t at, bool shared) {
    if (races.size() >= kMostRaces || !told.insert({place, other.place}).second) return;
    races.push_back({other, kind, other_kind, stamp_now(), place, shared ? at - shared_at : at, shared});
}

void check(const Accesses& of, Kind their_kind, Kind kind, uint32_t place, uintptr_t at, bool shared, uint32_t floor) {
    if (of.last.stamp.run < floor) return;
    if (of.foreign_place != 0 && of.last.stamp.run >= floor && !knows_all_blocks()) {
        Access other;
        other.place = of.foreign_place;
        race(other, their_kind, kind, place, at, shared);
    }
    if (of.last.stamp.run == run && of.many != 0) {
        for (const Access& x : lists[of.many - 1])
            if (!before(x, floor)) race(x, their_kind, kind, place, at, shared);
    } else if (!before(of.last, floor)) {
        race(of.last, their_kind, kind, place, at, shared);
    }
}

void look(uintptr_t at, size_t bytes, Kind kind, uint32_t place, bool shared) {
    const uint32_t floor = shared ? run : first_run;
    const Access x = {stamp_now(), place, false};
    Cell* cells = nullptr;
    for (size_t i = 0; i < bytes; ++i) {
        const uintptr_t byte = at + i;
        if (shared) {
            cells = &shared_cells[byte - shared_at];
        } else if (i == 0 || byte % kPage == 0) {
            auto& page = pages[byte / kPage];
            if (!page) page = std::make_unique<Cell[]>(kPage);
            cells = &page[byte % kPage];
        } else {
            ++cells;
        }
        Cell& cell = *cells;
        if (!before(cell.write, floor)) race(cell.write, kWrite, kind, place, at, shared);
        if (kind != kRead) check(cell.reads, kRead, kind, place, at, shared, floor);
        if (kind != kAtomic && cell.atomics) check(atomics[byte], kAtomic, kind, place, at, shared, floor);
        if (kind == kRead) {
            add(cell.reads, x, floor);
        } else if (kind == kWrite) {
            cell.write = x;
        } else {
            cell.atomics = true;
            add(atomics[byte], x, floor);
        }
    }
}

// Warps' accesses of one moment are over.
void next_moment(uint32_t warp) {
    ++clocks[warp];
    for (uint32_t lane = 0; lane < 32; ++lane) {
        Known& of = acquired[warp * 32 + lane];
        if (of.clocks.empty() && of.threads.empty()) continue;
        acquired_by_warp[warp].join(of);
        of = {};
    }
}

// ---- counts ----

uint32_t site_of(uint32_t place, Kind kind, bool shared, uint32_t bytes) {
    const auto [found, is_new] = site_numbers.try_emplace({place, kind, shared, bytes}, static_cast<uint32_t>(launch.sites.size()));
    if (is_new) launch.sites.push_back({place, kind, shared, bytes});
    return found->second;
}

struct Request {
    uint32_t lanes = 0;
    uintptr_t at[32];
};

void count_request(Site& site, const Request& request) {
    ++site.requests;
    site.lanes += static_cast<uint64_t>(__builtin_popcount(request.lanes));
    if (site.shared) {
        // Half and quarter warps take turns where a lane has 8 and 16 bytes.
        const int together = site.bytes <= 4 ? 32 : site.bytes <= 8 ? 16 : 8;
        std::set<uintptr_t> all;
        for (int begin = 0; begin < 32; begin += together) {
            std::set<uintptr_t> words;
            uint32_t in_bank[32] = {}, most = 0;
            for (int lane = begin; lane < begin + together; ++lane) {
                if (!(request.lanes >> lane & 1)) continue;
                for (uintptr_t word = request.at[lane] / 4; word <= (request.at[lane] + site.bytes - 1) / 4; ++word)
                    if (words.insert(word).second || site.kind == kAtomic) most = std::max(most, ++in_bank[word % 32]);
            }
            site.turns += most;
            all.insert(words.begin(), words.end());
        }
        site.least += (all.size() + 31) / 32;
        return;
    }
    std::set<uintptr_t> sectors, bytes;
    for (int lane = 0; lane < 32; ++lane) {
        if (!(request.lanes >> lane & 1)) continue;
        for (uintptr_t byte = request.at[lane]; byte < request.at[lane] + site.bytes; ++byte) {
            bytes.insert(byte);
            sectors.insert(byte / 32);
        }
    }
    site.turns += sectors.size();
    site.least += (bytes.size() + 31) / 32;
    for (const uintptr_t sector : sectors) {
        (site.kind == kRead ? sectors_read : sectors_written).insert(sector);
        sectors_of_block.insert(sector);
    }
}

// Requests of a warp since the last moment.
void count_records(uint32_t warp) {
    if (!counting) return;
    static std::vector<std::vector<Request>> requests;
    static std::vector<uint32_t> turn, met;
    requests.resize(std::max(requests.size(), launch.sites.size()));
    turn.resize(requests.size());
    met.clear();
    for (uint32_t lane = 0; lane < 32; ++lane) {
        auto& own = records[warp * 32 + lane];
        for (const Record& record : own) {
            auto& of_site = requests[record.site];
            const uint32_t n = turn[record.site]++;
            if (of_site.empty()) met.push_back(record.site);
            if (n >= of_site.size()) of_site.emplace_back();
            of_site[n].at[lane] = record.at;
            of_site[n].lanes |= 1u << lane;
        }
        for (const Record& record : own) turn[record.site] = 0;
        own.clear();
    }
    for (const uint32_t site : met) {
        for (const Request& request : requests[site]) count_request(launch.sites[site], request);
        requests[site].clear();
    }
}

void access(uintptr_t at, size_t bytes, Kind kind, const void* place) {
    if (now == nullptr) return;
    const Range stack = {reinterpret_cast<uintptr_t>(now->stack), reinterpret_cast<uintptr_t>(now->stack_end)};
    const Range own = {reinterpret_cast<uintptr_t>(now->own), reinterpret_cast<uintptr_t>(now->own_end)};
    if (stack.has(at) || own.has(at) || host_stack.has(at) || library().has(at)) return;
    const bool shared = at >= shared_at && at < shared_at + shared_size;
    if (shared && at + bytes > shared_at + shared_size) {
        std::fprintf(stderr, "emulator: an access beyond the end of shared memory in kernel %s\n", launch.name.c_str());
        std::abort();
    }
    const uint32_t offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(place) - library().begin);
    look(at, bytes, kind, offset, shared);
    if (!shared && kind == kWrite) fenced[now->index] = false;
    if (counting)
        records[now->index].push_back({shared ? at - shared_at : at, site_of(offset, kind, shared, static_cast<uint32_t>(bytes))});
}

// ---- what is said of a race ----

// Lines of the kernels' sources; addr2line comes with the compiler.
std::string line_of(uint32_t place) {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&begin_launch), &info);
    char command[4096], line[4096];
    std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x 2>/dev/null", info.dli_fname, place - 1);
    std::string first, found;
    if (FILE* pipe = popen(command, "r")) {
        while (std::fgets(line, sizeof line, pipe) != nullptr) {
            std::string text = line;
            text.erase(text.find_last_not_of(" \n") + 1);
            text.erase(std::min(text.find(" (discriminator"), text.size()));
            text.erase(0, text.rfind('/') + 1);
            if (first.empty()) first = text;
            // What helpers do is said where they were called.
            if (found.empty() && text.rfind("device.h", 0) != 0 && text.rfind("emulator.h", 0) != 0) found = text;
        }
        pclose(pipe);
    }
    return found.empty() ? first : found;
}

std::string thread_of(const Stamp& stamp) {
    if (stamp.run < first_run) return "another block";
    const auto& at = blocks[stamp.run - first_run];
    char text[128];
    std::snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", stamp.thread, at[0], at[1], at[2]);
    return text;
}

std::string told_of(const Race& race) {
    static const char* const kinds[] = {"a read", "a write", "an atomic operation"};
    std::string text = std::string("\n  ") + kinds[race.other_kind] + " at " + line_of(race.other.place) + " by " +
                       thread_of(race.other.stamp) + ", and " + kinds[race.kind] + " at " + line_of(race.place) + " by " +
                       thread_of(race.stamp) + ": ";
    char where[64];
    if (race.shared) std::snprintf(where, sizeof where, "byte %zu of shared memory", static_cast<size_t>(race.at));
    else std::snprintf(where, sizeof where, "global memory at 0x%zx", static_cast<size_t>(race.at));
    return text + where;
}

}  // namespace

void begin_launch(const char* name, const unsigned (&grid)[3], int threads, size_t shared_bytes) {
    pthread_attr_t attributes;
    void* stack = nullptr;
    size_t size = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &size);
    pthread_attr_destroy(&attributes);
    host_stack = {reinterpret_cast<uintptr_t>(stack), reinterpret_cast<uintptr_t>(stack) + size};
    first_run = run + 1;
    blocks.clear();
    pages.clear();
    atomics.clear();
    released.clear();
    races.clear();
    told.clear();
    site_numbers.clear();
    sectors_read.clear();
    sectors_written.clear();
    launch = {};
    launch.name = name;
    names.insert(name);
    std::copy(std::begin(grid), std::end(grid), std::begin(launch.grid));
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
}

void begin_block(const unsigned (&block)[3], const unsigned char* shared, size_t shared_bytes, int threads) {
    ++run;
    warps = static_cast<uint32_t>((threads + 31) / 32);
    blocks.push_back({block[0], block[1], block[2]});
    std::fill(std::begin(clocks), std::end(clocks), 1);
    for (auto& row : known) std::fill(std::begin(row), std::end(row), 0);
    for (Known& of : acquired_by_warp) of = {};
    for (Known& of : acquired) of = {};
    std::fill(releases.begin(), releases.end(), 0);
    std::fill(fenced.begin(), fenced.end(), false);
    lists.clear();
    shared_at = reinterpret_cast<uintptr_t>(shared);
    shared_size = shared_bytes;
    shared_cells.resize(std::max(shared_cells.size(), shared_bytes));
    sectors_of_block.clear();
}

void run_thread(const Thread* thread) { now = thread; }

void at_exchange(uint32_t warp) {
    ++launch.exchanges;
    count_records(warp);
    next_moment(warp);
}

void at_barrier() {
    ++launch.barriers;
    Known all;
    for (uint32_t w = 0; w < warps; ++w) {
        count_records(w);
        next_moment(w);
        all.join(acquired_by_warp[w]);
    }
    for (uint32_t w = 0; w < warps; ++w) {
        std::copy(std::begin(clocks), std::end(clocks), std::begin(known[w]));
        acquired_by_warp[w] = all;
    }
}

void count_product() { ++launch.products; }

void end_block() {
    for (uint32_t w = 0; w < warps; ++w) count_records(w);
    launch.sectors_of_blocks += sectors_of_block.size();
}

void end_launch() {
    now = nullptr;
    if (counting) {
        launch.sectors_read = sectors_read.size();
        launch.sectors_written = sectors_written.size();
        launches.push_back(launch);
    }
    if (races.empty()) return;
    std::string text = "emulator: races in kernel " + launch.name + ":";
    for (const Race& race : races) text += told_of(race);
    races.clear();
    throw std::runtime_error(text);
}

void touch(const void* at, size_t bytes, Kind kind, const void* place) { access(reinterpret_cast<uintptr_t>(at), bytes, kind, place); }

void release(const void* object) {
    if (now == nullptr) return;
    Known& of = released[object];
    of.join(acquired_by_warp[now->warp]);
    of.join(acquired[now->index]);
    Clocks& own = of.clocks[run];
    for (uint32_t v = 0; v < warps; ++v) own[v] = std::max(own[v], v == now->warp ? clocks[v] : known[now->warp][v]);
    of.threads[{run, now->index}] = ++releases[now->index];
}

void acquire(const void* object) {
    if (now == nullptr) return;
    if (const auto found = released.find(object); found != released.end()) acquired[now->index].join(found->second);
}

void fence() {
    if (now != nullptr) fenced[now->index] = true;
}

void atomic(const void* at, size_t bytes, const void* place) {
    if (now == nullptr) return;
    access(reinterpret_cast<uintptr_t>(at), bytes, kAtomic, place);
    acquire(at);
    if (fenced[now->index]) release(at);
}

void count(bool wanted) {
    counting = wanted;
    launches.clear();
    for (auto& of : records) of.clear();
}

std::vector<Launch> counted() { return launches; }

std::vector<std::string> launched() {
    std::vector<std::string> found(names.begin(), names.end());
    names.clear();
    return found;
}

}  // namespace watch
}  // namespace emulator

// What the compiler calls at each access.
using emulator::watch::kRead;
using emulator::watch::kWrite;
#define WATCHED(name, bytes, kind) \
    void __tsan_##name(void* at) { emulator::watch::access(reinterpret_cast<uintptr_t>(at), bytes, kind, __builtin_return_address(0)); }
extern "C" {
WATCHED(read1, 1, kRead)
WATCHED(read2, 2, kRead)
WATCHED(read4, 4, kRead)
WATCHED(read8, 8, kRead)
WATCHED(read16, 16, kRead)
WATCHED(write1, 1, kWrite)
WATCHED(write2, 2, kWrite)
WATCHED(write4, 4, kWrite)
WATCHED(write8, 8, kWrite)
WATCHED(write16, 16, kWrite)
WATCHED(unaligned_read2, 2, kRead)
WATCHED(unaligned_read4, 4, kRead)
WATCHED(unaligned_read8, 8, kRead)
WATCHED(unaligned_read16, 16, kRead)
WATCHED(unaligned_write2, 2, kWrite)
WATCHED(unaligned_write4, 4, kWrite)
WATCHED(unaligned_write8, 8, kWrite)
WATCHED(unaligned_write16, 16, kWrite)
void __tsan_read_range(void* at, long bytes) {
    emulator::watch::access(reinterpret_cast<uintptr_t>(at), static_cast<size_t>(bytes), kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* at, long bytes) {
    emulator::watch::access(reinterpret_cast<uintptr_t>(at), static_cast<size_t>(bytes), kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
}
#endif
