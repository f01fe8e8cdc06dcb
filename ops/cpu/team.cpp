// Threads that share the work of a kernel, on machines where other processes want the same cores.
//
// An OpenMP region ends with a barrier: if one of its threads has no core, the others spin or sleep until it has. Here a
// thread claims a part of the work when it runs, and a caller waits only for parts that were claimed. A thread that has no
// core has claimed nothing, in most cases, and the others do its share. With a core for each, every thread works through a
// range of its own, so that neighbouring results are written by one core (work stealing: Blumofe and Leiserson, 1999).
#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>

extern "C" int omp_get_max_threads();  // torch's OpenMP runtime: it is what torch.set_num_threads sets

namespace {

// How long a thread looks out for work, or for the end of it, before it sleeps. Waking takes 5 to 50 us; on two cores
// of a Zen 5, 20 us cost 5 % of the speed when quiet, 100 us nothing, 2,000 us a third of it beside two busy processes.
constexpr int64_t SPIN_NANOSECONDS = 100'000;

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin until it holds, for a limited time. Returns whether it does.
template <typename Condition>
bool spin_until(const Condition &holds) {
    for (int64_t started = 0;;) {
        for (int i = 0; i < 64; ++i) {
            if (holds()) return true;
            relax();
        }
        const int64_t time = now();
        if (!started) started = time;
        if (time - started > SPIN_NANOSECONDS) return false;
    }
}

void sleep_while(std::atomic<uint32_t> &word, uint32_t value) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake(std::atomic<uint32_t> &word, int threads) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
}

constexpr int64_t MAX_THREADS = 256;
constexpr int64_t MAX_UNITS = UINT16_MAX;

// What is unclaimed of a thread's range, in units: [begin, end) of a job's number. A claim compares all three, so a thread
// that slept through a job cannot claim anything of the next by what it saw of the last.
struct Range {
    uint64_t word;

    Range(uint32_t job, uint64_t begin, uint64_t end) : word(uint64_t(job) << 32 | begin << 16 | end) {}
    explicit Range(uint64_t word) : word(word) {}
    uint32_t job() const { return uint32_t(word >> 32); }
    uint32_t begin() const { return uint32_t(word >> 16) & UINT16_MAX; }
    uint32_t end() const { return uint32_t(word) & UINT16_MAX; }
    uint32_t size() const { return end() - begin(); }
};

struct Team {
    struct alignas(64) Share {
        std::atomic<uint64_t> range{0};
    };
    Share shares[MAX_THREADS];
    alignas(64) std::atomic<uint32_t> unfinished{0};  // units
    std::atomic<bool> caller_sleeps{false};
    // What the job is. Written between two jobs, read after a claim, which keeps the job from ending.
    alignas(64) int64_t count = 0;
    int64_t unit = 1;
    std::atomic<bool> one_by_one{false};  // read before a claim too
    void (*run)(const void *, int64_t, int64_t) = nullptr;
    const void *context = nullptr;
    std::atomic<int64_t> size{1};
    alignas(64) std::atomic<uint32_t> job{0};
    std::atomic<uint32_t> bell{0};
    std::atomic<int> sleepers{0};
    std::atomic_flag is_taken = ATOMIC_FLAG_INIT;
    int64_t num_workers = 0;

    // Claim a part of a range and do it. Its owner takes from the front, others from the back.
    bool do_part(Share &share, bool is_owner) {
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
            if (unfinished.fetch_sub(part) == part && caller_sleeps.load()) wake(unfinished, 1);
            return true;
        }
    }

    // Do parts of the job until none is left to claim.
    void help(int64_t index) {
        while (do_part(shares[index], true)) {
        }
        for (int64_t other = 1, threads = size.load(std::memory_order_relaxed); other < threads; ++other)
            while (do_part(shares[(index + other) % threads], false)) {
            }
    }

    void work(int64_t index) {
        uint32_t last = 0;
        const auto is_wanted = [&] { return job.load() != last; };
        for (;;) {
            if (spin_until(is_wanted)) {
                last = job.load();
                if (index < size.load(std::memory_order_relaxed)) help(index);
                continue;
            }
            const uint32_t rung = bell.load();
            sleepers.fetch_add(1);
            if (!is_wanted()) sleep_while(bell, rung);
            sleepers.fetch_sub(1);
        }
    }

    void grow(int64_t wanted) {
        while (num_workers < wanted - 1) {
            try {
                std::thread([this, index = num_workers + 1] { work(index); }).detach();
            } catch (...) {  // no more threads to be had: the others do their share
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
        if (sleepers.load()) {
            bell.fetch_add(1);
            wake(bell, int(num_workers));
        }
        help(0);
        const auto is_done = [&] { return unfinished.load() == 0; };
        while (!spin_until(is_done)) {
            caller_sleeps.store(true);
            if (const uint32_t left = unfinished.load()) sleep_while(unfinished, left);
            caller_sleeps.store(false);
        }
    }
};

// Never destroyed: its threads run until the process ends.
Team *team = new Team;

// A forked process has none of the threads.
[[maybe_unused]] const int forgets_in_child = pthread_atfork(nullptr, nullptr, [] { team = new Team; });

}  // namespace

int64_t num_threads() { return std::max(1, omp_get_max_threads()); }

void share_work(int64_t count, Order order, void (*run)(const void *, int64_t, int64_t), const void *context) {
    if (count <= 0) return;
    const int64_t wanted = std::min({count, num_threads(), MAX_THREADS});
    if (wanted == 1 || team->is_taken.test_and_set(std::memory_order_acquire)) {
        run(context, 0, count);
        return;
    }
    team->count = count;
    team->unit = (count + MAX_UNITS - 1) / MAX_UNITS;
    team->one_by_one = order == Order::TASKS;
    team->run = run;
    team->context = context;
    team->share(wanted);
    team->is_taken.clear(std::memory_order_release);
}
