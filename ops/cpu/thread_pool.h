// Threads that share the work of a kernel.
#pragma once
#include <cstdint>

enum class Order {
    SHARES,  // each thread has a range of its own, in as few parts as can be, and then takes from those of others
    TASKS,   // one after another, the first ones first: for few tasks of unequal length
};

// Call run(context, begin, end) for ranges that together are [0, count), on the calling thread and on those of the team.
// Return when all of it is done, by then visible to the caller. From two threads at once, or from within, the later call
// runs on its own thread alone.
void share_work(int64_t count, Order order, void (*run)(const void *, int64_t, int64_t), const void *context);

// The same for body(begin, end), which must not care how the range is cut.
template <typename Body>
void parallel_for(int64_t count, const Body &body, Order order = Order::SHARES) {
    share_work(
        count, order, [](const void *context, int64_t begin, int64_t end) { (*(const Body *)context)(begin, end); },
        &body);
}

// Threads that `parallel_for` uses when called from this thread: torch.get_num_threads().
int64_t num_threads();
