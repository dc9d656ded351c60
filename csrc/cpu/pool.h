// A small pool of threads that wait between calls. A task's result must not depend on which thread runs it.
#pragma once

#include <cstdint>
#include <functional>

namespace rapidin {

// Runs task(i, worker) for each i < tasks on at most `threads` threads, the caller among them; worker < threads.
// Tasks are handed out in ascending order. An exception of a task is thrown again here, after all have ended.
void parallel(int64_t tasks, int threads, const std::function<void(int64_t task, int worker)>& task);

}  // namespace rapidin
