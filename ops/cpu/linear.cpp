// GEMMs of a few to many rows with a weight [n, k] in tiles (tiles.h), of bf16, int4 or int8.
//
// Each output is the same chain of additions over k in order, with any number of rows and threads: the bits of a row do
// not depend on the rows beside it. Codes of int4 and int8 are exact in bf16. The products of a group of columns are
// summed in float32, multiplied by the scale, and added to the total.
//
// The norm of the input, the gate of an MLP and the residual connection are fused, because at few rows each further
// pass over the threads costs as much as its arithmetic. Roundings to bf16 are those of the separate operations.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"
#ifdef DISPEC_TILES
#include "thread_pool.h"
#include "tiles.h"
#ifdef DISPEC_AMX_TILES
#include "linear_amx.h"
#else
#include "linear_registers.h"
#endif

namespace {

// To norm: fewer take one thread less time than two threads take to synchronise.
constexpr int64_t MIN_PARALLEL_ELEMENTS = 2048;

std::atomic<uint64_t> next_job{1};

// Return `count` rows of x, normed where there is a norm. job: a different number for each set of rows.
RowBlock rows_of(const Linear &p, int64_t first, int64_t count, int64_t groups, uint64_t job) {
    const uint16_t *from = p.norm ? p.normed : p.x;
    const int64_t from_stride = p.norm ? p.k : p.x_stride;
    const float *x_sums = groups ? p.sums + first * groups : nullptr;
    if constexpr (sizeof(Input) == sizeof(bfloat16))
        return {p, (const Input *)from + first * from_stride, from_stride, first, count, x_sums, groups};
    // Each thread widens all rows for itself, once: that takes less time than waiting for the others.
    static thread_local std::vector<float> widened;
    static thread_local uint64_t widened_for = 0;
    const int64_t stride = p.k + p.k % 2;
    const auto found = [&] { return RowBlock{p, (const Input *)widened.data(), stride, first, count, x_sums, groups}; };
    if (widened_for == job) return found();
    widened_for = job;
    widened.resize(count * stride);
    for (int64_t row = 0; row < count; ++row) {
        const bfloat16 *at = (const bfloat16 *)from + (first + row) * from_stride;
        float *to = widened.data() + row * stride;
        int64_t i = 0;
        for (; i + LANES <= p.k; i += LANES) store(to + i, load(at + i));
        for (; i < p.k; ++i) to[i] = scalar(at[i]);
        if (p.k % 2) to[p.k] = 0;
    }
    return found();
}

// p.sums [rows, groups]: the sums of each row of x over each group, for the offsets.
void sum_groups(Phases &phases, const Linear &p, int64_t groups) {
    const auto sum_rows = [=](int64_t begin, int64_t end) {
        const bfloat16 *from = (const bfloat16 *)(p.norm ? p.normed : p.x);
        const int64_t stride = p.norm ? p.k : p.x_stride;
        for (int64_t row = begin; row < end; ++row)
            for (int64_t group = 0; group < groups; ++group) {
                const bfloat16 *at = from + row * stride;
                int64_t i = group * p.weight.group_size;
                const int64_t stop = std::min(p.k, i + p.weight.group_size);
                Floats sums = {};
                for (; i + LANES <= stop; i += LANES) sums += load(at + i);
                float total = sum(sums);
                for (; i < stop; ++i) total += scalar(at[i]);
                p.sums[row * groups + group] = total;
            }
    };
    phases.add(p.rows, sum_rows, Schedule::RANGES, p.rows * p.k > MIN_PARALLEL_ELEMENTS ? num_threads() : 1);
}

}  // namespace

void linear(Phases &phases, const Linear &p) {
    if (p.norm) {
        const auto norm = [=](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                rms_norm((const bfloat16 *)p.x + row * p.x_stride, (const bfloat16 *)p.norm, p.eps,
                         (bfloat16 *)p.normed + row * p.k, p.k);
        };
        phases.add(p.rows, norm, Schedule::RANGES, p.rows * p.k > MIN_PARALLEL_ELEMENTS ? num_threads() : 1);
    }
    const int64_t groups = group_count(p.weight, p.k);
    if (groups) sum_groups(phases, p, groups);
    for (int64_t first = 0; first < p.rows; first += std::min(MAX_ROWS, p.rows)) {
        const int64_t count = std::min(MAX_ROWS, p.rows - first);
        const uint64_t job = next_job.fetch_add(1);
        phases.add(p.tiles(), [=](int64_t begin, int64_t end) {
            multiply_tiles(rows_of(p, first, count, groups, job), begin, end);
        });
    }
}

// The row of the table in instruction_sets.py that this library was built for.
extern "C" const char *dispec_instruction_set() { return INSTRUCTION_SET; }

extern "C" void dispec_linear(const uint16_t *x, int64_t x_stride, const uint16_t *norm, float eps,
                              const Matrix *weight, const uint16_t *bias, const uint16_t *residual, uint16_t *out,
                              int64_t rows, int64_t n, int64_t k, int64_t is_gated) {
    static thread_local std::vector<uint16_t> normed;
    static thread_local std::vector<float> sums;
    static thread_local Phases phases;
    if (norm) normed.resize(rows * k + 2);
    sums.resize(rows * group_count(*weight, k));
    linear(phases, {x, x_stride, norm, eps, normed.data(), sums.data(), *weight, bias, residual, out, rows, n, k,
                    is_gated != 0});
    phases.run();
}
#endif
