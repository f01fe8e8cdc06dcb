// A pool of threads that share the work of kernels, on machines where other processes use the same cores.
//
// An OpenMP region ends with a barrier: if one of its threads has no core, the others wait until it has. Here a thread
// claims a part of the work when it runs, and a phase ends with its work: a thread without a core has in most cases
// claimed nothing, and the others do its share. With a core for each, every thread works through a range of its own, so
// that one core writes neighbouring results (work stealing: Blumofe and Leiserson, 1999).
//
// The thread that ends the last part of a phase opens the next one, so that a run goes on without the thread that began
// it. All threads poll one word, the gate, which says which phase runs, and compute their ranges from its division.
// Between two phases one cache line goes once from the last thread to the others.
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

// How long a thread polls for work, or for the end of a run, before it sleeps. Waking takes 5 to 50 us. On two cores of
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

// Phases are numbered from one run to the next. Numbers wrap around, so they are compared by their difference. The
// first ones wrap soon, so that each process does it.
constexpr uint32_t FIRST_NUMBER = -1000;

bool is_before(uint32_t number, uint32_t other) { return int32_t(number - other) < 0; }

// The phase that runs, and the end of its run; the same between two runs.
struct Gate {
    uint32_t number, end;

    Gate(uint32_t number, uint32_t end) : number(number), end(end) {}
    explicit Gate(uint64_t word) : number(uint32_t(word >> 32)), end(uint32_t(word)) {}
    uint64_t word() const { return uint64_t(number) << 32 | end; }
    bool is_open() const { return number != end; }
};

// What a thread reads of a phase before it claims a part of it, with its number.
struct Heading {
    uint64_t word;

    Heading(uint32_t number, const Phase &phase)
        : word(uint64_t(number) << 32 | uint64_t(phase.division.units) << 16 | uint64_t(phase.division.threads) << 1 |
               (phase.schedule == Schedule::TASKS)) {}
    explicit Heading(uint64_t word) : word(word) {}
    uint32_t number() const { return uint32_t(word >> 32); }
    int64_t units() const { return word >> 16 & UINT16_MAX; }
    int64_t threads() const { return (word & UINT16_MAX) >> 1; }
    bool is_one_by_one() const { return word & 1; }
};

// The unclaimed part [begin, end) of a thread's range, in units, with the number of its phase. A claim compares all
// three, so that a thread that slept through a phase cannot claim a part of a later one.
struct Range {
    uint64_t word;

    Range(uint32_t number, uint64_t begin, uint64_t end) : word(uint64_t(number) << 32 | begin << 16 | end) {}
    explicit Range(uint64_t word) : word(word) {}
    uint32_t number() const { return uint32_t(word >> 32); }
    uint32_t begin() const { return uint32_t(word >> 16) & UINT16_MAX; }
    uint32_t end() const { return uint32_t(word) & UINT16_MAX; }
    uint32_t size() const { return end() - begin(); }
};

constexpr uint32_t MAX_PHASES = 256;  // of a run
// Phases between two renewals of all shares: less than 2^31, where the order of two numbers turns around.
constexpr uint32_t REFRESH = 1u << 30;

struct ThreadPool {
    struct alignas(64) Share {
        std::atomic<uint64_t> range{Range(FIRST_NUMBER - 1, 0, 0).word};
    };
    Share shares[Division::MAX_THREADS];
    alignas(64) std::atomic<uint64_t> gate{Gate(FIRST_NUMBER, FIRST_NUMBER).word()};
    alignas(64) std::atomic<uint32_t> unfinished{0};  // units
    // The run. Headings may be read at any time, the rest after a claim, which keeps the phase from ending.
    alignas(64) std::atomic<uint64_t> headings[MAX_PHASES] = {};
    const Phase *phases = nullptr;
    uint32_t first = FIRST_NUMBER;
    int64_t num_workers = 0;
    std::atomic_flag is_taken = ATOMIC_FLAG_INIT;
    alignas(64) WaitQueue waiting;

    const Phase &phase(uint32_t number) const { return phases[number - first]; }

    // Claim a part of a thread's range and run it; return its units, 0 if none is left. The range's owner takes half of
    // it from the front, others from the back. Tasks are in the first thread's range; all take them from the front.
    uint32_t run_part(Heading heading, int64_t owner, bool is_owner) {
        const uint32_t number = heading.number();
        const int64_t units = heading.units(), threads = heading.threads();
        const bool takes_one = heading.is_one_by_one(), takes_front = is_owner || takes_one;
        std::atomic<uint64_t> &share = shares[owner].range;
        uint64_t seen = share.load();
        for (;;) {
            Range range(seen);
            // Before the first claim the share has the number of an earlier phase.
            if (is_before(range.number(), number))
                range = takes_one ? Range(number, 0, units)
                                  : Range(number, range_begin(units, owner, threads),
                                          range_begin(units, owner + 1, threads));
            if (range.number() != number || range.size() == 0) return 0;
            const uint32_t part = takes_one ? 1 : (range.size() + 1) / 2;
            const Range rest = takes_front ? Range(number, range.begin() + part, range.end())
                                           : Range(number, range.begin(), range.end() - part);
            if (!share.compare_exchange_weak(seen, rest.word)) continue;
            const int64_t begin = takes_front ? range.begin() : range.end() - part;
            const Phase &claimed = phase(number);
            const int64_t unit = claimed.division.unit;
            claimed.run(begin * unit, std::min(claimed.division.count, (begin + part) * unit));
            return part;
        }
    }

    // Run parts of a phase until none is left to claim.
    void run_parts(int64_t index, uint32_t number) {
        const Heading heading(headings[number % MAX_PHASES].load());
        const int64_t threads = heading.threads();
        if (heading.number() != number || index >= threads) return;
        const int64_t own = heading.is_one_by_one() ? 0 : index;
        // The parts of the own range are reported at once: the counter's cache line is the one that all threads write.
        uint32_t finished = 0;
        while (const uint32_t part = run_part(heading, own, true)) finished += part;
        report(number, finished);
        for (int64_t other = 1; other < threads && !heading.is_one_by_one(); ++other)
            while (const uint32_t part = run_part(heading, (index + other) % threads, false)) report(number, part);
    }

    void report(uint32_t number, uint32_t finished) {
        if (finished && unfinished.fetch_sub(finished) == finished) open(number + 1, Gate(gate.load()).end);
    }

    // Run phases for one thread, and open the next one for several.
    void open(uint32_t number, uint32_t end) {
        for (; number != end && phase(number).division.threads == 1; ++number)
            phase(number).run(0, phase(number).division.count);
        if (number != end) unfinished.store(uint32_t(phase(number).division.units));
        gate.store(Gate(number, end).word());
        waiting.notify();
    }

    // Take part in the phases until `ends(gate)`.
    template <typename Ends>
    void work(int64_t index, const Ends &ends) {
        Gate seen(gate.load());
        for (uint32_t last = seen.number - 1;;) {
            const auto has_changed = [&] {
                seen = Gate(gate.load());
                return ends(seen) || (seen.is_open() && seen.number != last);
            };
            if (!spin_until(has_changed)) waiting.wait_until(has_changed);
            if (ends(seen)) return;
            last = seen.number;
            run_parts(index, last);
        }
    }

    void grow(int64_t wanted) {
        while (num_workers < wanted - 1) {
            try {
                std::thread([this, index = num_workers + 1] { work(index, [](Gate) { return false; }); }).detach();
            } catch (...) {  // the system has no more threads: the others do their share
                return;
            }
            ++num_workers;
        }
    }

    // Run at most MAX_PHASES phases.
    void run(const Phase *given, uint32_t count) {
        int64_t threads = 1;
        phases = given;
        first = Gate(gate.load()).end;
        const uint32_t end = first + count;
        for (uint32_t number = first; number != end; ++number) {
            headings[number % MAX_PHASES].store(Heading(number, phase(number)).word, std::memory_order_relaxed);
            threads = std::max(threads, phase(number).division.threads);
        }
        // A share that no phase used for long must not come to look like one of a later phase.
        if ((first - 1) / REFRESH != (end - 1) / REFRESH)
            for (Share &share : shares) share.range.store(Range(first - 1, 0, 0).word);
        grow(threads);
        open(first, end);
        work(0, [](Gate seen) { return !seen.is_open(); });
    }
};

// Never destroyed: its threads run until the process ends.
ThreadPool *pool = new ThreadPool;

// A forked process has none of the threads: it starts a new pool.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });

}  // namespace

int64_t num_threads() { return std::max(1, omp_get_max_threads()); }

Division::Division(int64_t count, int64_t most_threads)
    : count(count), unit((count + MAX_UNITS - 1) / MAX_UNITS), units((count + unit - 1) / unit) {
    most_threads = std::min(most_threads, MAX_THREADS);
    const int64_t longest = (units + most_threads - 1) / most_threads;
    threads = (units + longest - 1) / longest;
}

// How `count` elements are divided for at most `most_threads` threads. out: the threads, then the first element of each
// one's range, then `count`.
extern "C" void dispec_divide(int64_t count, int64_t most_threads, int64_t *out) {
    const Division division(count, most_threads);
    *out = division.threads;
    for (int64_t thread = 0; thread <= division.threads; ++thread)
        out[1 + thread] = std::min(count, range_begin(division.units, thread, division.threads) * division.unit);
}

void run_phases(const Phase *phases, int64_t count) {
    const bool is_alone = std::all_of(phases, phases + count, [](const Phase &p) { return p.division.threads == 1; });
    if (is_alone || pool->is_taken.test_and_set(std::memory_order_acquire)) {
        for (const Phase *phase = phases; phase < phases + count; ++phase) phase->run(0, phase->division.count);
        return;
    }
    for (int64_t begin = 0; begin < count; begin += MAX_PHASES)
        pool->run(phases + begin, uint32_t(std::min<int64_t>(MAX_PHASES, count - begin)));
    pool->is_taken.clear(std::memory_order_release);
}

void Phases::run() {
    run_phases(phases.data(), int64_t(phases.size()));
    phases.clear();
}
