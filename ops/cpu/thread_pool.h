// A pool of threads that share the work of kernels, phase by phase.
#pragma once
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

enum class Schedule {
    RANGES,  // each thread has a range of its own, in as few parts as possible, and then steals from the others
    TASKS,   // one by one in order: for few tasks of unequal length
};

// Return the threads that a phase uses when added by this thread: torch.get_num_threads().
int64_t num_threads();

// How the work of a phase is divided: `count` elements in `units` of `unit` (the last may have fewer), for `threads`
// threads. These are the fewest whose longest range is as short as with all `most_threads`: 18 units take 16 threads
// as long as 9.
struct Division {
    static constexpr int64_t MAX_THREADS = 256, MAX_UNITS = UINT16_MAX;
    int64_t count, unit, units, threads;

    Division(int64_t count, int64_t most_threads);
};

// Return the first unit of a thread's range, which ends where the next one begins.
inline int64_t range_begin(int64_t units, int64_t thread, int64_t threads) { return units * thread / threads; }

// A body(begin, end) to call for ranges that together are [0, count).
struct Phase {
    static constexpr int64_t BODY_BYTES = 256;
    Division division;
    Schedule schedule;
    void (*call)(const void *, int64_t, int64_t);
    const void *elsewhere;  // the body, null where it is in this structure
    alignas(8) char body[BODY_BYTES];

    Phase(Division division, Schedule schedule, void (*call)(const void *, int64_t, int64_t), const void *elsewhere)
        : division(division), schedule(schedule), call(call), elsewhere(elsewhere) {}
    void run(int64_t begin, int64_t end) const { call(elsewhere ? elsewhere : body, begin, end); }
};

// Work that runs phase by phase: one begins when all calls of the one before have ended, and sees what they wrote. The
// results must not depend on how ranges are divided.
class Phases {
  public:
    // Add a phase. The body is copied: it has no references to what ends before `run`. most_threads: 1 for little work,
    // which takes one thread less time than the others take to see it.
    template <typename Body>
    void add(int64_t count, const Body &body, Schedule schedule = Schedule::RANGES,
             int64_t most_threads = num_threads()) {
        static_assert(sizeof(Body) <= Phase::BODY_BYTES && std::is_trivially_copyable_v<Body>);
        if (count <= 0) return;
        phases.emplace_back(Division(count, most_threads), schedule, call<Body>, nullptr);
        new (phases.back().body) Body(body);
    }

    // Run the phases on the calling thread and on those of the pool, and remove them. Return when all calls have ended.
    // During another run, or within a phase, the calling thread runs them alone.
    void run();

    template <typename Body>
    static void call(const void *body, int64_t begin, int64_t end) {
        (*(const Body *)body)(begin, end);
    }

  private:
    std::vector<Phase> phases;
};

void run_phases(const Phase *phases, int64_t count);

// Run a single phase.
template <typename Body>
void parallel_for(int64_t count, const Body &body, Schedule schedule = Schedule::RANGES) {
    if (count <= 0) return;
    const Phase phase(Division(count, num_threads()), schedule, Phases::call<Body>, &body);
    run_phases(&phase, 1);
}
