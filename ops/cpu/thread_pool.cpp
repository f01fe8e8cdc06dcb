// A pool of threads that share the work of a kernel, on machines where other processes use the same cores.
//
// An OpenMP region ends with a barrier: if one of its threads has no core, the others wait until it has. Here a thread
// claims a part of the work when it runs, and the caller waits only for claimed parts. A thread without a core has in
// most cases claimed nothing, and the others do its share. With a core for each, every thread works through a range of
// its own, so that one core writes neighbouring results (work stealing: Blumofe and Leiserson, 1999).
#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

extern "C" int omp_get_max_threads();  // torch's OpenMP runtime: it is what torch.set_num_threads sets

namespace {

// How long a thread polls for work, or for the end of a job, before it sleeps. Waking takes 5 to 50 us. On two cores of
// a Zen 5, 20 us cost 5 % of the speed on a quiet machine, 100 us nothing, 2,000 us a third beside two busy processes.
constexpr std::chrono::microseconds SPIN_TIME(100);

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Poll a condition for at most SPIN_TIME. Return whether it holds.
template <typename Condition>
bool spin_until(const Condition &holds) {
    using Clock = std::chrono::steady_clock;
    for (Clock::time_point end{};;) {
        for (int i = 0; i < 64; ++i) {
            if (holds()) return true;
            relax();
        }
        const Clock::time_point now = Clock::now();
        if (end == Clock::time_point{}) end = now + SPIN_TIME;
        if (now > end) return false;
    }
}

// Threads that sleep until a condition holds. The change that makes it hold happens before `notify`; both are
// sequentially consistent with the loads of the condition, so that no thread misses its wake-up.
class WaitQueue {
  public:
    template <typename Condition>
    void wait_until(const Condition &holds) {
        std::unique_lock lock(mutex);
        waiting.fetch_add(1);
        changed.wait(lock, holds);
        waiting.fetch_sub(1);
    }

    void notify() {
        if (!waiting.load()) return;
        std::lock_guard lock(mutex);
        changed.notify_all();
    }

  private:
    std::mutex mutex;
    std::condition_variable changed;
    std::atomic<int> waiting{0};
};

constexpr int64_t MAX_THREADS = 256;
constexpr int64_t MAX_UNITS = UINT16_MAX;

// The unclaimed part [begin, end) of a thread's range, in units, with the number of its job. A claim compares all
// three, so that a thread that slept through a job cannot claim a part of the next one with a stale range.
struct Range {
    uint64_t word;

    Range(uint32_t job, uint64_t begin, uint64_t end) : word(uint64_t(job) << 32 | begin << 16 | end) {}
    explicit Range(uint64_t word) : word(word) {}
    uint32_t job() const { return uint32_t(word >> 32); }
    uint32_t begin() const { return uint32_t(word >> 16) & UINT16_MAX; }
    uint32_t end() const { return uint32_t(word) & UINT16_MAX; }
    uint32_t size() const { return end() - begin(); }
};

struct ThreadPool {
    struct alignas(64) Share {
        std::atomic<uint64_t> range{0};
    };
    Share shares[MAX_THREADS];
    alignas(64) std::atomic<uint32_t> unfinished{0};  // units
    // The job. Written between two jobs, read after a claim, which keeps the job from ending.
    alignas(64) int64_t count = 0;
    int64_t unit = 1;
    std::atomic<bool> one_by_one{false};  // read before a claim too
    void (*run)(const void *, int64_t, int64_t) = nullptr;
    const void *context = nullptr;
    std::atomic<int64_t> size{1};
    int64_t num_workers = 0;
    std::atomic_flag is_taken = ATOMIC_FLAG_INIT;
    alignas(64) std::atomic<uint32_t> job{0};
    alignas(64) WaitQueue workers, caller;

    // Claim a part of a range and run it. Its owner takes from the front, others from the back. Return false if empty.
    bool run_part(Share &share, bool is_owner) {
        uint64_t seen = share.range.load();
        for (;;) {
            const Range range(seen);
            if (range.size() == 0) return false;
            // Tasks are in the first thread's range, and all threads take them from its front.
            const bool takes_one = one_by_one.load(std::memory_order_relaxed), front = is_owner || takes_one;
            const uint32_t part = takes_one ? 1 : (range.size() + 1) / 2;
            const Range rest = front ? Range(range.job(), range.begin() + part, range.end())
                                     : Range(range.job(), range.begin(), range.end() - part);
            if (!share.range.compare_exchange_weak(seen, rest.word)) continue;
            const int64_t first = front ? range.begin() : range.end() - part;
            run(context, first * unit, std::min(count, (first + part) * unit));
            if (unfinished.fetch_sub(part) == part) caller.notify();
            return true;
        }
    }

    // Run parts of the job until none is left to claim.
    void run_parts(int64_t index) {
        while (run_part(shares[index], true)) {
        }
        for (int64_t other = 1, threads = size.load(std::memory_order_relaxed); other < threads; ++other)
            while (run_part(shares[(index + other) % threads], false)) {
            }
    }

    void work(int64_t index) {
        uint32_t last = 0;
        const auto is_wanted = [&] { return job.load() != last; };
        for (;;) {
            if (!spin_until(is_wanted)) workers.wait_until(is_wanted);
            last = job.load();
            if (index < size.load(std::memory_order_relaxed)) run_parts(index);
        }
    }

    void grow(int64_t wanted) {
        while (num_workers < wanted - 1) {
            try {
                std::thread([this, index = num_workers + 1] { work(index); }).detach();
            } catch (...) {  // the system has no more threads: the others do their share
                return;
            }
            ++num_workers;
        }
    }

    void share(int64_t wanted) {
        grow(wanted);
        const int64_t units = (count + unit - 1) / unit;
        const uint32_t next = job.load() + 1;
        size.store(wanted, std::memory_order_relaxed);
        unfinished.store(uint32_t(units));
        for (int64_t i = 0; i < wanted; ++i) {
            const uint64_t begin = one_by_one ? (i ? units : 0) : units * i / wanted;
            shares[i].range.store(Range(next, begin, one_by_one ? units : units * (i + 1) / wanted).word);
        }
        job.store(next);
        workers.notify();
        run_parts(0);
        const auto is_done = [&] { return unfinished.load() == 0; };
        if (!spin_until(is_done)) caller.wait_until(is_done);
    }
};

// Never destroyed: its threads run until the process ends.
ThreadPool *pool = new ThreadPool;

// A forked process has none of the threads: it starts a new pool.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });

}  // namespace

int64_t num_threads() { return std::max(1, omp_get_max_threads()); }

void run_parallel(int64_t count, Schedule schedule, void (*run)(const void *, int64_t, int64_t), const void *context) {
    if (count <= 0) return;
    const int64_t wanted = std::min({count, num_threads(), MAX_THREADS});
    if (wanted == 1 || pool->is_taken.test_and_set(std::memory_order_acquire)) {
        run(context, 0, count);
        return;
    }
    pool->count = count;
    pool->unit = (count + MAX_UNITS - 1) / MAX_UNITS;
    pool->one_by_one = schedule == Schedule::TASKS;
    pool->run = run;
    pool->context = context;
    pool->share(wanted);
    pool->is_taken.clear(std::memory_order_release);
}
