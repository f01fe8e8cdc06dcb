// Attention of a few query tokens per sequence over a paged KV cache: decoding and verification.
//
// A task is one key head of one sequence, some of the query rows that read it (heads of the group times tokens) and one
// span of positions. It makes one pass over the span's pages with an online softmax (arXiv:2205.14135); the spans of a
// row are combined at the end (flash decoding, arXiv:2311.01282). Spans lie at fixed positions, so that the bits of a
// sequence's result depend neither on its neighbours nor on the number of threads.
#include "attention.h"

#include <vector>

namespace {

constexpr int MAX_ROWS = 6;
constexpr int64_t SPAN = 512;  // positions

struct Scratch {
    float query[MAX_ROWS][MAX_HEAD_DIM];  // scaled, see `online_softmax`
    float sums[MAX_ROWS][MAX_HEAD_DIM];
    float weights[MAX_ROWS][MAX_BLOCK_SIZE];
    float maximum[MAX_ROWS], total[MAX_ROWS];
    int64_t visible[MAX_ROWS];
};

// Add one page to the sums of ROWS rows. Pages lie anywhere, so the hardware does not prefetch the next one: it is
// fetched while this one is read. start: position of the page's first token. count: positions of the page in the span.
template <typename Element, int ROWS>
void add_page(Scratch &s, const Element *keys, const Element *values, const Element *next_keys,
              const Element *next_values, const AttentionShape &shape, int64_t start, int64_t count) {
    for (int64_t offset = 0; offset < shape.block_size; offset += LANES) {
        if constexpr (IS_QUANTIZED<Element>) {
            __builtin_prefetch(scales_of(next_keys, shape) + offset);
            __builtin_prefetch(scales_of(next_values, shape) + offset);
        }
        Floats scores[ROWS] = {};
        for (int64_t d = 0; d < shape.head_dim; ++d) {
            const Floats key = load(keys + d * shape.block_size + offset);
            __builtin_prefetch(next_keys + d * shape.block_size + offset);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) scores[row] += s.query[row][d] * key;
        }
        const Floats factors = code_factors(keys, shape, offset);
        // Unrolled like the loop above: otherwise the scores live in memory.
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row)
            store(s.weights[row] + offset, masked(scores[row] * factors, s.visible[row] - start - offset));
    }
    float kept[ROWS];
    for (int row = 0; row < ROWS; ++row) {
        float *weights = s.weights[row];
        kept[row] = online_softmax(weights, shape.block_size, s.maximum[row], s.total[row],
                                   [=](int64_t i, Floats x) {
                                       store(weights + i, x * code_factors(values, shape, i));
                                   });
    }
    for (int64_t d = 0; d < shape.head_dim; d += LANES) {
        Floats sums[ROWS];
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) sums[row] = load(s.sums[row] + d) * kept[row];
        for (int64_t i = 0; i < count; ++i) {
            const Floats value = load(values + i * shape.head_dim + d);
            __builtin_prefetch(next_values + i * shape.head_dim + d);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) sums[row] += s.weights[row][i] * value;
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) store(s.sums[row] + d, sums[row]);
    }
}

// Partial results of a row: its maximum, its sum of weights and its weighted sums.
int64_t partial_size(const AttentionShape &shape) { return shape.head_dim + 2; }

// later: the task that this thread probably runs next. Its first page is fetched during the last one of this task: a
// step of SmolLM2 takes 4 % less time at 6 to 32 sequences.
template <typename T, typename E>
void run_task(const DecodeTask &task, const DecodeTask &later, const Attention<T> &a, const AttentionShape &shape,
              float *partials) {
    using AddPage = void (*)(Scratch &, const E *, const E *, const E *, const E *, const AttentionShape &, int64_t,
                             int64_t);
    constexpr AddPage ADD[MAX_ROWS + 1] = {nullptr,        add_page<E, 1>, add_page<E, 2>, add_page<E, 3>,
                                           add_page<E, 4>, add_page<E, 5>, add_page<E, 6>};
    static thread_local Scratch s;
    const QueryRows<T> rows{a, shape, task.sequence, task.head, task.first_row};
    const E *keys = (const E *)a.keys, *values = (const E *)a.values;
    const int64_t d = shape.head_dim, size = page_size<E>(shape);
    const float scale = a.scale * LOG2_E;
    for (int64_t row = 0; row < task.num_rows; ++row) {
        const T *query = rows.query(row);
        for (int64_t i = 0; i < d; ++i) {
            s.query[row][i] = scalar(query[i]) * scale;
            s.sums[row][i] = 0;
        }
        s.visible[row] = rows.visible(row);
        s.maximum[row] = -INFINITY;
        s.total[row] = 0;
    }
    const auto page_at = [&](const DecodeTask &of, int64_t start) {
        const int32_t *blocks = a.block_tables + of.sequence * a.table_stride;
        return (blocks[start / shape.block_size] * shape.kv_heads + of.head) * size;
    };
    for (int64_t start = task.begin; start < task.end; start += shape.block_size) {
        const int64_t page = page_at(task, start), after = start + shape.block_size;
        const int64_t next = after < task.end          ? page_at(task, after)
                             : later.begin < later.end ? page_at(later, later.begin)
                                                       : page;
        ADD[task.num_rows](s, keys + page, values + page, keys + next, values + next, shape, start,
                           std::min(shape.block_size, task.end - start));
    }
    for (int64_t row = 0; row < task.num_rows; ++row) {
        if (task.partial < 0) {
            rows.finish(row, s.sums[row], s.total[row]);
            continue;
        }
        float *to = partials + (task.partial + row) * partial_size(shape);
        to[0] = s.maximum[row];
        to[1] = s.total[row];
        std::copy_n(s.sums[row], d, to + 2);
    }
}

// Combine the partial results of a row's spans, `stride` floats apart, into its output [d].
template <typename T>
void combine(const float *partial, int64_t spans, int64_t stride, int64_t d, T *to) {
    float peak = -INFINITY, total = 0;
    for (int64_t span = 0; span < spans; ++span) peak = std::max(peak, partial[span * stride]);
    const float base = finite_or_zero(peak);
    for (int64_t span = 0; span < spans; ++span)
        total += partial[span * stride + 1] * std::exp2(partial[span * stride] - base);
    const float factor = 1.0f / std::max(total, 1e-37f);
    for (int64_t i = 0; i < d; i += LANES) {
        Floats sums = {};
        for (int64_t span = 0; span < spans; ++span)
            sums += load(partial + span * stride + 2 + i) * std::exp2(partial[span * stride] - base);
        store(to + i, sums * factor);
    }
}

}  // namespace

void DecodePlan::make(const int32_t *query_start, const int32_t *context_lens, int64_t sequences,
                      int64_t max_query_len, const AttentionShape &shape) {
    tasks.clear();
    int64_t num_partials = 0;
    const int64_t group = shape.heads / shape.kv_heads;
    for (int64_t b = 0; b < sequences; ++b) {
        const int64_t tokens = query_start[b + 1] - query_start[b], context = context_lens[b];
        if (tokens > max_query_len) continue;
        const int64_t rows = tokens * group, chunks = (rows + MAX_ROWS - 1) / MAX_ROWS;
        const int64_t spans = std::max<int64_t>(1, (context + SPAN - 1) / SPAN);
        for (int64_t head = 0; head < shape.kv_heads; ++head)
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t first = rows * chunk / chunks, last = rows * (chunk + 1) / chunks;
                // Positions that the chunk's last row attends to.
                const int64_t visible = std::max<int64_t>(0, context - tokens + (last - 1) / group + 1);
                for (int64_t span = 0; span < spans; ++span) {
                    const int64_t partial = spans > 1 ? num_partials + span * (last - first) : -1;
                    tasks.push_back({b, head, first, last - first, span * SPAN, std::min(visible, (span + 1) * SPAN),
                                     partial});
                }
                if (spans > 1) num_partials += spans * (last - first);
            }
    }
    partials.resize(num_partials * partial_size(shape));
}

template <typename T>
void decode_attention(Phases &phases, const Attention<T> &a, DecodePlan &plan, const AttentionShape &shape) {
    const DecodeTask *tasks = plan.tasks.data();
    float *partials = plan.partials.data();
    const int64_t count = plan.tasks.size(), size = partial_size(shape), threads = num_threads();
    with_element<T>(shape.cache_type, [&](auto element) {
        phases.add(count, [=](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                run_task<T, decltype(element)>(tasks[i], tasks[std::min(count - 1, i + threads)], a, shape, partials);
        }, Schedule::TASKS);
    });
    if (plan.partials.empty()) return;
    phases.add(count, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const DecodeTask &task = tasks[i];
            if (task.partial < 0 || task.begin > 0) continue;
            const QueryRows<T> rows{a, shape, task.sequence, task.head, task.first_row};
            const int64_t spans = (a.context_lens[task.sequence] + SPAN - 1) / SPAN;
            for (int64_t row = 0; row < task.num_rows; ++row)
                combine(partials + (task.partial + row) * size, spans, task.num_rows * size, shape.head_dim,
                        rows.output(row));
        }
    });
}

template void decode_attention(Phases &, const Attention<bfloat16> &, DecodePlan &, const AttentionShape &);
template void decode_attention(Phases &, const Attention<float> &, DecodePlan &, const AttentionShape &);

namespace {

// Sequences of at most `max_decode_len` query tokens; in bf16, where the CPU has tiles, all the others too.
template <typename T>
void paged_attention(const Attention<T> &attention, const AttentionShape &shape, int64_t max_decode_len) {
    static thread_local DecodePlan plan;
    static thread_local Phases phases;
    plan.make(attention.query_start, attention.context_lens, attention.sequences, max_decode_len, shape);
    decode_attention(phases, attention, plan, shape);
    phases.run();
#ifdef DISPEC_TILES
    if constexpr (std::is_same_v<T, bfloat16>) prefill_attention(attention, shape, max_decode_len);
#endif
}

}  // namespace

#define PAGED_ATTENTION(name, T)                                                                                      \
    extern "C" void name(const T *query, int64_t query_stride, const void *keys, const void *values,                  \
                         const int32_t *block_tables, int64_t table_stride, const int32_t *query_start,               \
                         const int32_t *context_lens, int64_t sequences, int64_t max_decode_len, int64_t heads,       \
                         int64_t kv_heads, int64_t head_dim, int64_t block_size, CacheType cache_type, float scale,   \
                         T *output) {                                                                                 \
        paged_attention(Attention<T>{query, query_stride, keys, values, block_tables, table_stride, query_start,      \
                                     context_lens, sequences, scale, output},                                         \
                        AttentionShape{heads, kv_heads, head_dim, block_size, cache_type}, max_decode_len);           \
    }

PAGED_ATTENTION(dispec_paged_attention_bfloat16, bfloat16)
PAGED_ATTENTION(dispec_paged_attention_float32, float)
