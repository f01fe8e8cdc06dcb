// A pool of threads that share the work of a kernel.
#pragma once
#include <cstdint>

enum class Schedule {
    RANGES,  // each thread has a range of its own, in as few parts as possible, and then steals from the others
    TASKS,   // one by one in order: for few tasks of unequal length
};

// Call run(context, begin, end) for ranges that together are [0, count), on the calling thread and on those of the
// pool. Return when all calls have ended and their writes are visible to the caller. A call that begins during another
// one, or within it, runs on its own thread alone.
void run_parallel(int64_t count, Schedule schedule, void (*run)(const void *, int64_t, int64_t), const void *context);

// Call body(begin, end) likewise. The result must not depend on how the range is divided.
template <typename Body>
void parallel_for(int64_t count, const Body &body, Schedule schedule = Schedule::RANGES) {
    run_parallel(
        count, schedule, [](const void *context, int64_t begin, int64_t end) { (*(const Body *)context)(begin, end); },
        &body);
}

// Return the threads that `parallel_for` uses when called from this thread: torch.get_num_threads().
int64_t num_threads();
