// Attention of a few query tokens per sequence over a paged KV cache: decoding and verification.
//
// A task is one key head of one sequence with some of the query rows that read it (heads of the group times tokens) and
// one span of positions; it makes one pass over the span's pages with an online softmax (arXiv:2205.14135), and spans
// are put together at the end (flash decoding, arXiv:2311.01282). Spans are fixed, so that a sequence's result does not
// depend on its neighbours or on the number of threads, not in the last bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parts.h"
#include "thread_pool.h"

namespace {

constexpr int MAX_ROWS = 6;
constexpr int64_t SPAN = 512;       // positions
constexpr int64_t MAX_HEAD = 256;   // dimensions
constexpr int64_t MAX_BLOCK = 256;  // positions

struct Rows {
    float query[MAX_ROWS][MAX_HEAD];  // scaled
    float sums[MAX_ROWS][MAX_HEAD];
    float weights[MAX_ROWS][MAX_BLOCK];
    float largest[MAX_ROWS], total[MAX_ROWS];
    int64_t visible[MAX_ROWS];  // positions that a row sees
};

// Pages lie anywhere, so the hardware does not see the next one coming: `next` is fetched while this one is read.
template <typename T, int ROWS>
void score_page(Rows &rows, const T *keys, const T *next, const Shape &shape, int64_t start) {
    for (int64_t offset = 0; offset < shape.block_size; offset += LANES) {
        Floats scores[ROWS] = {};
        for (int64_t d = 0; d < shape.head_dim; ++d) {
            const Floats key = load(keys + d * shape.block_size + offset);
            __builtin_prefetch(next + d * shape.block_size + offset);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) scores[row] += rows.query[row][d] * key;
        }
        // Unrolled like the loop above, lest the scores live in memory.
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            const int32_t seen = int32_t(std::clamp<int64_t>(rows.visible[row] - start - offset, 0, LANES));
            store(rows.weights[row] + offset, lane < seen ? scores[row] : splat(-INFINITY));
        }
    }
}

template <typename T, int ROWS>
void add_page(Rows &rows, const T *keys, const T *values, const T *next_keys, const T *next_values,
              const Shape &shape, int64_t start, int64_t count) {
    score_page<T, ROWS>(rows, keys, next_keys, shape, start);
    float kept[ROWS];
    for (int row = 0; row < ROWS; ++row) {
        Floats peaks = splat(-INFINITY);
        for (int64_t i = 0; i < shape.block_size; i += LANES) peaks = larger(load(rows.weights[row] + i), peaks);
        const float peak = std::max(rows.largest[row], largest(peaks));
        // A row that has seen nothing yet stays at -infinity, and subtracting that from itself would be NaN.
        const float base = std::isinf(peak) ? 0.0f : peak;
        kept[row] = std::exp(rows.largest[row] - base);
        Floats total = {};
        for (int64_t i = 0; i < shape.block_size; i += LANES) {
            const Floats weight = exp_negative(load(rows.weights[row] + i) - base);
            store(rows.weights[row] + i, weight);
            total += weight;
        }
        rows.total[row] = rows.total[row] * kept[row] + sum(total);
        rows.largest[row] = peak;
    }
    for (int64_t d = 0; d < shape.head_dim; d += LANES) {
        Floats sums[ROWS];
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) sums[row] = load(rows.sums[row] + d) * kept[row];
        for (int64_t i = 0; i < count; ++i) {
            const Floats value = load(values + i * shape.head_dim + d);
            __builtin_prefetch(next_values + i * shape.head_dim + d);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) sums[row] += rows.weights[row][i] * value;
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) store(rows.sums[row] + d, sums[row]);
    }
}

template <typename T>
void add_pages(Rows &rows, int num_rows, const T *keys, const T *values, const int32_t *table, int64_t head,
               const Shape &shape, int64_t begin, int64_t end) {
    using AddPage = void (*)(Rows &, const T *, const T *, const T *, const T *, const Shape &, int64_t, int64_t);
    constexpr AddPage ADD[MAX_ROWS + 1] = {nullptr,         add_page<T, 1>, add_page<T, 2>, add_page<T, 3>,
                                           add_page<T, 4>, add_page<T, 5>, add_page<T, 6>};
    const int64_t size = shape.head_dim * shape.block_size;
    const auto page_of = [&](int64_t start) {
        return (table[start / shape.block_size] * shape.kv_heads + head) * size;
    };
    for (int64_t start = begin; start < end; start += shape.block_size) {
        const int64_t page = page_of(start), after = start + shape.block_size;
        const int64_t next = after < end ? page_of(after) : page;
        ADD[num_rows](rows, keys + page, values + page, keys + next, values + next, shape, start,
                      std::min(shape.block_size, end - start));
    }
}

// Query row `row` of a key head: token row / group, head row % group of the group.
template <typename T>
void attend_task(const AttentionTask &task, const Attention<T> &a, const Shape &shape, float *partials) {
    static thread_local Rows rows;
    const int64_t group = shape.heads / shape.kv_heads, d = shape.head_dim, first_token = a.query_start[task.sequence];
    const int64_t num_tokens = a.query_start[task.sequence + 1] - first_token, context = a.context_lens[task.sequence];
    for (int64_t row = 0; row < task.num_rows; ++row) {
        const int64_t token = (task.first_row + row) / group, head = task.head * group + (task.first_row + row) % group;
        const T *from = a.query + (first_token + token) * a.query_stride + head * d;
        for (int64_t i = 0; i < d; ++i) {
            rows.query[row][i] = scalar(from[i]) * a.scale;
            rows.sums[row][i] = 0;
        }
        rows.visible[row] = context - num_tokens + token + 1;
        rows.largest[row] = -INFINITY;
        rows.total[row] = 0;
    }
    add_pages(rows, int(task.num_rows), a.keys, a.values, a.block_tables + task.sequence * a.table_stride, task.head,
              shape, task.begin, task.end);
    for (int64_t row = 0; row < task.num_rows; ++row) {
        if (task.partial >= 0) {
            float *at = partials + (task.partial + row) * (d + 2);
            at[0] = rows.largest[row];
            at[1] = rows.total[row];
            std::copy_n(rows.sums[row], d, at + 2);
            continue;
        }
        const int64_t token = (task.first_row + row) / group, head = task.head * group + (task.first_row + row) % group;
        const Floats factor = splat(1.0f / std::max(rows.total[row], 1e-37f));
        T *to = a.output + ((first_token + token) * shape.heads + head) * d;
        for (int64_t i = 0; i < d; i += LANES) store(to + i, load(rows.sums[row] + i) * factor);
    }
}

// A row's spans, `stride` floats apart, into its output.
template <typename T>
void combine(const float *partial, int64_t spans, int64_t stride, int64_t d, T *to) {
    float peak = -INFINITY, total = 0;
    for (int64_t span = 0; span < spans; ++span) peak = std::max(peak, partial[span * stride]);
    const float base = std::isinf(peak) ? 0.0f : peak;
    for (int64_t span = 0; span < spans; ++span)
        total += partial[span * stride + 1] * std::exp(partial[span * stride] - base);
    const float factor = 1.0f / std::max(total, 1e-37f);
    for (int64_t i = 0; i < d; i += LANES) {
        Floats sums = {};
        for (int64_t span = 0; span < spans; ++span)
            sums += load(partial + span * stride + 2 + i) * std::exp(partial[span * stride] - base);
        store(to + i, sums * factor);
    }
}

}  // namespace

void AttentionPlan::make(const int32_t *query_start, const int32_t *context_lens, int64_t sequences, int64_t longest,
                         const Shape &shape) {
    tasks.clear();
    int64_t num_partials = 0;
    const int64_t group = shape.heads / shape.kv_heads;
    for (int64_t b = 0; b < sequences; ++b) {
        const int64_t tokens = query_start[b + 1] - query_start[b], context = context_lens[b];
        if (tokens > longest) continue;  // somebody else's
        const int64_t rows = tokens * group, chunks = (rows + MAX_ROWS - 1) / MAX_ROWS;
        const int64_t spans = std::max<int64_t>(1, (context + SPAN - 1) / SPAN);
        for (int64_t head = 0; head < shape.kv_heads; ++head)
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t first = rows * chunk / chunks, last = rows * (chunk + 1) / chunks;
                const int64_t seen = std::max<int64_t>(0, context - tokens + (last - 1) / group + 1);  // by the last row
                for (int64_t span = 0; span < spans; ++span) {
                    const int64_t partial = spans > 1 ? num_partials + span * (last - first) : -1;
                    tasks.push_back({b, head, first, last - first, span * SPAN, std::min(seen, (span + 1) * SPAN),
                                     partial});
                }
                if (spans > 1) num_partials += spans * (last - first);
            }
    }
    partials.resize(num_partials * (shape.head_dim + 2));
}

template <typename T>
void attend(const Attention<T> &a, AttentionPlan &plan, const Shape &shape) {
    const AttentionTask *tasks = plan.tasks.data();
    float *scratch = plan.partials.data();
    const int64_t count = plan.tasks.size(), group = shape.heads / shape.kv_heads, size = shape.head_dim + 2;
    parallel_for(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) attend_task(tasks[i], a, shape, scratch);
    }, Order::TASKS);
    if (plan.partials.empty()) return;
    parallel_for(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const AttentionTask &task = tasks[i];
            if (task.partial < 0 || task.begin > 0) continue;
            const int64_t spans = (a.context_lens[task.sequence] + SPAN - 1) / SPAN;
            for (int64_t row = 0; row < task.num_rows; ++row) {
                const int64_t token = a.query_start[task.sequence] + (task.first_row + row) / group;
                const int64_t head = task.head * group + (task.first_row + row) % group;
                combine(scratch + (task.partial + row) * size, spans, task.num_rows * size, shape.head_dim,
                        a.output + (token * shape.heads + head) * shape.head_dim);
            }
        }
    });
}

template void attend(const Attention<bfloat16> &, AttentionPlan &, const Shape &);
template void attend(const Attention<float> &, AttentionPlan &, const Shape &);

// head_dim and block_size must be multiples of 16 up to 256.
#define PAGED_ATTENTION(name, T)                                                                                      \
    extern "C" void name(const T *query, int64_t query_stride, const T *keys, const T *values,                        \
                         const int32_t *block_tables, int64_t table_stride, const int32_t *query_start,               \
                         const int32_t *context_lens, int64_t sequences, int64_t longest, int64_t heads,              \
                         int64_t kv_heads, int64_t head_dim, int64_t block_size, float scale, T *output) {            \
        static thread_local AttentionPlan plan;                                                                       \
        const Shape shape{heads, kv_heads, head_dim, block_size};                                                     \
        const Attention<T> attention{query, query_stride, keys, values, block_tables, table_stride,                   \
                                     query_start, context_lens, sequences, longest, scale, output};                   \
        plan.make(query_start, context_lens, sequences, longest, shape);                                              \
        attend(attention, plan, shape);                                                                               \
    }

PAGED_ATTENTION(dispec_paged_attention_bfloat16, bfloat16)
PAGED_ATTENTION(dispec_paged_attention_float32, float)
