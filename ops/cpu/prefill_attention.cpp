// Attention of many query tokens per sequence over a paged KV cache, in bf16.
//
// A task is some query rows of one key head of one sequence. It runs over the positions in spans: a span's keys and
// values are copied into tiles, and each group of rows multiplies them, with an online softmax between
// (arXiv:2205.14135). Weights are rounded to `Input` before they multiply the values; sums are float32. Spans lie at
// fixed positions, so that a row's bits depend neither on the rows beside it nor on the number of threads.
#include "attention.h"
#ifdef DISPEC_TILES
#include <memory>
#include <vector>

#include "thread_pool.h"
#include "tiles.h"

namespace {

constexpr int64_t SPAN = 256;            // positions
constexpr int64_t MAX_TASK_ROWS = 192;   // which share one copy of each span into tiles
constexpr int64_t MIN_TASK_ROWS = std::max(24, TILE_ROWS);
constexpr int64_t TASKS_PER_THREAD = 4;  // several, because later rows attend to more positions

struct alignas(64) Scratch {
    uint16_t keys[SPAN * MAX_HEAD_DIM];    // [span / 32][dimensions / 2][32][2]
    uint16_t values[SPAN * MAX_HEAD_DIM];  // [dimensions / 32][span / 2][32][2]
    float sums[MAX_TASK_ROWS * MAX_HEAD_DIM];
    Input query[MAX_TASK_ROWS * MAX_HEAD_DIM];
    float scores[TILE_ROWS * SPAN];
    Input weights[TILE_ROWS * SPAN];
    float key_factors[SPAN], value_factors[SPAN];  // of each position's codes; the key's times the scale
    float maximum[MAX_TASK_ROWS], total[MAX_TASK_ROWS];
    int64_t visible[MAX_TASK_ROWS];
};

struct Task {
    int64_t sequence, head, first_row, num_rows;
};

// Store the elements of both in bf16, alternating. bf16 holds them exactly, as it does all of int8 and of e4m3.
inline void put_paired(uint16_t *to, Floats first, Floats second) {
    const Words both = (Words)first >> 16 | (Words)second;
    std::memcpy(to, &both, sizeof both);
}

inline int64_t padded(int64_t dimensions) { return (dimensions + TILE - 1) / TILE * TILE; }

// Copy positions [start, start + count) of one key head into tiles. Values and their factors past `count` are zeros: the
// page may hold NaN there, which a weight of zero does not remove.
template <typename Element>
void copy_span(Scratch &s, const Attention<bfloat16> &a, const AttentionShape &shape, const int32_t *blocks,
               int64_t head, int64_t start, int64_t count) {
    const int64_t size = shape.block_size, d = shape.head_dim;
    for (int64_t offset = 0; offset < count; offset += 16) {
        const int64_t page = (blocks[(start + offset) / size] * shape.kv_heads + head) * page_size<Element>(shape);
        const int64_t within = (start + offset) % size;
        const Element *key_page = (const Element *)a.keys + page, *value_page = (const Element *)a.values + page;
        const Element *keys = key_page + within, *values = value_page + within * d;
        uint16_t *to = s.keys + offset / TILE * d * TILE + offset % TILE * 2;
        for (int64_t i = 0; i < d; i += 2)
            put_paired(to + i * TILE, load(keys + i * size), load(keys + (i + 1) * size));
        const int64_t here = std::min<int64_t>(16, count - offset);
        store(s.key_factors + offset, code_factors(key_page, shape, within) * (a.scale * LOG2_E));
        store(s.value_factors + offset, code_factors(value_page, shape, within));
        std::fill(s.value_factors + offset + here, s.value_factors + offset + 16, 0.0f);
        for (int64_t i = 0; i < padded(d); i += 16) {
            uint16_t *at = s.values + i / TILE * SPAN * TILE + offset * TILE + i % TILE * 2;
            for (int64_t position = 0; position < 16; position += 2) {
                const Element *from = values + position * d + i;
                put_paired(at + position * TILE, i < d && position < here ? load(from) : Floats{},
                           i < d && position + 1 < here ? load(from + d) : Floats{});
            }
        }
    }
}

// Add a span to the sums of a group of rows, at least one of which attends to a position of it.
void add_span(Scratch &s, int64_t first, int64_t rows, int64_t start, int64_t count, int64_t d) {
    count = std::min(count, s.visible[first + rows - 1] - start);  // the last row attends to the most positions
    const auto put_scores = [scores = s.scores, factors = s.key_factors, visible = s.visible + first,
                             start](int64_t row, int64_t at, Floats x) {
        store(scores + row * SPAN + at, masked(x * load(factors + at), visible[row] - start - at));
    };
    multiply_rows(rows, {s.query + first * d, d, s.keys, TILE * d, count, d}, nullptr, put_scores);
    float kept[TILE_ROWS];
    for (int64_t row = 0; row < rows; ++row) {
        Input *weights = s.weights + row * SPAN;
        kept[row] = online_softmax(s.scores + row * SPAN, count, s.maximum[first + row], s.total[first + row],
                                   [&](int64_t i, Floats x) { put(weights + i, x * load(s.value_factors + i)); });
    }
    const int64_t even = count + count % 2, stride = padded(d);
    float *sums = s.sums + first * stride;
    multiply_rows(
        rows, {s.weights, SPAN, s.values, SPAN * TILE, d, even},
        [sums, stride, &kept](int64_t row, int64_t at) { return load(sums + row * stride + at) * kept[row]; },
        [sums, stride](int64_t row, int64_t at, Floats x) { store(sums + row * stride + at, x); });
}

template <typename Element>
void run_task(const Task &task, const Attention<bfloat16> &a, const AttentionShape &shape) {
    static thread_local std::unique_ptr<Scratch> scratch;
    if (!scratch) scratch.reset(new Scratch);
    Scratch &s = *scratch;
    const QueryRows<bfloat16> rows{a, shape, task.sequence, task.head, task.first_row};
    const int64_t d = shape.head_dim;
    for (int64_t row = 0; row < task.num_rows; ++row) {
        for (int64_t i = 0; i < d; i += LANES) put(s.query + row * d + i, load(rows.query(row) + i));
        s.visible[row] = rows.visible(row);
        s.maximum[row] = -INFINITY;
        s.total[row] = 0;
    }
    std::fill_n(s.sums, task.num_rows * padded(d), 0.0f);
    const int64_t visible = s.visible[task.num_rows - 1], size = rows_of_group(task.num_rows);
    for (int64_t start = 0; start < visible; start += SPAN) {
        const int64_t count = std::min(SPAN, visible - start);
        copy_span<Element>(s, a, shape, rows.blocks(), task.head, start, count);
        for (int64_t first = 0; first < task.num_rows; first += size) {
            const int64_t count_of_group = std::min(size, task.num_rows - first);
            if (s.visible[first + count_of_group - 1] > start) add_span(s, first, count_of_group, start, count, d);
        }
    }
    for (int64_t row = 0; row < task.num_rows; ++row) rows.finish(row, s.sums + row * padded(d), s.total[row]);
}

}  // namespace

void prefill_attention(const Attention<bfloat16> &a, const AttentionShape &shape, int64_t max_decode_len) {
    const auto rows_of = [&](int64_t b) {
        const int64_t tokens = a.query_start[b + 1] - a.query_start[b];
        return tokens > max_decode_len ? tokens * (shape.heads / shape.kv_heads) : 0;
    };
    int64_t total = 0;
    for (int64_t b = 0; b < a.sequences; ++b) total += rows_of(b) * shape.kv_heads;
    if (total == 0) return;
    const int64_t fair = total / (TASKS_PER_THREAD * num_threads()) / TILE_ROWS * TILE_ROWS;
    const int64_t size = std::clamp(fair, MIN_TASK_ROWS, MAX_TASK_ROWS);
    std::vector<Task> tasks;
    for (int64_t b = 0; b < a.sequences; ++b) {
        const int64_t rows = rows_of(b), chunks = (rows + size - 1) / size;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk)  // the longest ones first
            for (int64_t head = 0; head < shape.kv_heads; ++head) {
                const int64_t first = rows * chunk / chunks;
                tasks.push_back({b, head, first, rows * (chunk + 1) / chunks - first});
            }
    }
    with_element<bfloat16>(shape.cache_type, [&](auto element) {
        parallel_for(tasks.size(), [&](int64_t begin, int64_t end) {
            const TileState state(TILE_ROWS);
            for (int64_t i = begin; i < end; ++i) run_task<decltype(element)>(tasks[i], a, shape);
        }, Schedule::TASKS);
    });
}
#endif
