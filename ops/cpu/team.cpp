// Threads that share the work of a kernel, on machines where other processes want the same cores.
//
// An OpenMP region ends with a barrier: if one of its threads has no core, the others spin or sleep until it has. Here a
// thread claims a part of the work when it runs, and a caller waits only for parts that were claimed. A thread that has no
// core has claimed nothing, in most cases, and the others do its share.
//
// Parts are guided (Polychronopoulos and Kuck, 1987): large at first, so that there are few claims, and small at the end,
// so that all threads end together.
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

struct Team {
    // The job's number in the upper half and how much of it is unclaimed in the lower: a thread that slept through a job
    // fails to claim anything of the next.
    alignas(64) std::atomic<uint64_t> unclaimed{0};
    alignas(64) std::atomic<uint32_t> unfinished{0};
    // What the job is. Written between two jobs, read after a claim, which keeps the job from ending.
    alignas(64) int64_t count = 0;
    void (*run)(const void *, int64_t, int64_t) = nullptr;
    const void *context = nullptr;
    std::atomic<int64_t> size{1};
    std::atomic<bool> caller_sleeps{false};
    alignas(64) std::atomic<uint32_t> bell{0};
    std::atomic<int> sleepers{0};
    std::atomic_flag is_taken = ATOMIC_FLAG_INIT;
    int64_t num_workers = 0;

    bool has_work() const { return uint32_t(unclaimed.load()) != 0; }

    // Do parts of the job until none is left to claim.
    void help() {
        uint64_t seen = unclaimed.load();
        while (const uint32_t left = uint32_t(seen)) {
            const uint32_t part = std::max<uint32_t>(1, left / uint32_t(2 * size.load(std::memory_order_relaxed)));
            if (!unclaimed.compare_exchange_weak(seen, seen - part)) continue;
            const int64_t begin = count - left;
            run(context, begin, begin + part);
            if (unfinished.fetch_sub(part) == part && caller_sleeps.load()) wake(unfinished, 1);
            seen = unclaimed.load();
        }
    }

    void work(int64_t index) {
        const auto is_wanted = [&] { return has_work() && index < size.load(std::memory_order_relaxed); };
        for (;;) {
            if (spin_until(is_wanted)) {
                help();
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
            } catch (...) {  // no more threads to be had: the caller does their share
                return;
            }
            ++num_workers;
        }
    }

    void share(int64_t wanted) {
        grow(wanted);
        size.store(wanted, std::memory_order_relaxed);
        unfinished.store(uint32_t(count));
        unclaimed.store(((unclaimed.load() >> 32) + 1) << 32 | uint64_t(count));
        if (sleepers.load()) {
            bell.fetch_add(1);
            wake(bell, int(num_workers));
        }
        help();
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

void share_work(int64_t count, void (*run)(const void *, int64_t, int64_t), const void *context) {
    if (count <= 0) return;
    const int64_t wanted = std::min(count, num_threads());
    if (wanted == 1 || count > UINT32_MAX || team->is_taken.test_and_set(std::memory_order_acquire)) {
        run(context, 0, count);
        return;
    }
    team->count = count;
    team->run = run;
    team->context = context;
    team->share(wanted);
    team->is_taken.clear(std::memory_order_release);
}
