#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace rapidin {
namespace {

using Task = std::function<void(int64_t, int)>;

class Pool {
  public:
    void run(int64_t tasks, int threads, const Task& task) {
        std::lock_guard<std::mutex> one_call_at_a_time(calls_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < threads - 1) {
                const int worker = static_cast<int>(workers_.size()) + 1;
                workers_.emplace_back([this, worker, seen = round_] { wait_for_work(worker, seen); });
            }
            task_ = &task;
            tasks_ = tasks;
            next_ = 0;
            error_ = nullptr;
            helpers_ = running_ = threads - 1;
            ++round_;
        }
        wake_.notify_all();
        work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        if (error_) std::rethrow_exception(error_);
    }

  private:
    void wait_for_work(int worker, uint64_t seen) {
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                if (worker > helpers_) continue;
            }
            work(worker);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    void work(int worker) {
        try {
            for (int64_t i = next_++; i < tasks_; i = next_++) (*task_)(i, worker);
        } catch (...) {
            next_ = tasks_;
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    std::mutex calls_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    std::atomic<int64_t> next_{0};
    const Task* task_ = nullptr;
    int64_t tasks_ = 0;
    int helpers_ = 0, running_ = 0;
    uint64_t round_ = 0;
    std::exception_ptr error_;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and starts afresh.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    Pool* found = current.load();
    if (!found) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(found, fresh)) {
            found = fresh;
#if defined(__unix__) || defined(__APPLE__)
            static std::once_flag once;
            std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); }); });
#endif
        } else {
            delete fresh;
        }
    }
    return *found;
}

}  // namespace

void parallel(int64_t tasks, int threads, const Task& task) {
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads > 1) {
        pool().run(tasks, threads, task);
    } else {
        for (int64_t i = 0; i < tasks; ++i) task(i, 0);
    }
}

}  // namespace rapidin
