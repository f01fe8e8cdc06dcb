// Attention of many query tokens per sequence over a paged KV cache.
//
// A task is some query rows of one key head of one sequence. It goes over the positions in spans: a span's keys and
// values are brought into tiles, and each group of rows multiplies them, with an online softmax between
// (arXiv:2205.14135). Weights are rounded to bf16 before they meet the values where `Input` is; sums are float32. Spans lie at
// fixed positions, so that a row's result depends neither on the rows beside it nor on the number of threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "tiles.h"
#ifdef DISPEC_TILES
#include "parts.h"
#include "thread_pool.h"

namespace {

constexpr int64_t SPAN = 256;             // positions
constexpr int64_t MAX_HEAD = 256;         // dimensions
constexpr int64_t MAX_TASK_ROWS = 192;    // of which each brings every span into tiles once
constexpr int64_t MIN_TASK_ROWS = 24;
constexpr int64_t TASKS_PER_THREAD = 4;   // the last of them see more positions than the first

struct alignas(64) Scratch {
    uint16_t keys[SPAN * MAX_HEAD];    // [span / 32][dimensions / 2][32][2]
    uint16_t values[SPAN * MAX_HEAD];  // [dimensions / 32][span / 2][32][2]
    float sums[MAX_TASK_ROWS * MAX_HEAD];
    Input query[MAX_TASK_ROWS * MAX_HEAD];
    float scores[TILE_ROWS * SPAN];
    Input weights[TILE_ROWS * SPAN];
    float largest[MAX_TASK_ROWS], total[MAX_TASK_ROWS];
    int64_t visible[MAX_TASK_ROWS];  // positions that a row sees
};

struct Task {
    int64_t sequence, head, first_row, num_rows;
};

// Elements of both, alternating.
inline void put_paired(uint16_t *to, Halves first, Halves second) {
    const Words both = __builtin_convertvector(first, Words) | (__builtin_convertvector(second, Words) << 16);
    std::memcpy(to, &both, sizeof both);
}

inline Halves sixteen(const bfloat16 *at) {
    Halves x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline int64_t padded(int64_t dimensions) { return (dimensions + TILE - 1) / TILE * TILE; }

// Positions [start, start + count) of one key head into tiles. Values past `count` are zeros, for what lies there may be
// anything and a weight of zero would not make it go away.
void bring(Scratch &s, const Attention<bfloat16> &a, const Shape &shape, const int32_t *table, int64_t head,
           int64_t start, int64_t count) {
    const int64_t size = shape.block_size, d = shape.head_dim;
    for (int64_t offset = 0; offset < count; offset += 16) {
        const int64_t page = (table[(start + offset) / size] * shape.kv_heads + head) * size * d;
        const int64_t within = (start + offset) % size;
        const bfloat16 *keys = a.keys + page + within, *values = a.values + page + within * d;
        uint16_t *to = s.keys + offset / TILE * d * TILE + offset % TILE * 2;
        for (int64_t i = 0; i < d; i += 2)
            put_paired(to + i * TILE, sixteen(keys + i * size), sixteen(keys + (i + 1) * size));
        const int64_t here = std::min<int64_t>(16, count - offset);
        for (int64_t i = 0; i < padded(d); i += 16) {
            uint16_t *at = s.values + i / TILE * SPAN * TILE + offset * TILE + i % TILE * 2;
            for (int64_t position = 0; position < 16; position += 2) {
                const bfloat16 *from = values + position * d + i;
                put_paired(at + position * TILE, i < d && position < here ? sixteen(from) : Halves{},
                           i < d && position + 1 < here ? sixteen(from + d) : Halves{});
            }
        }
    }
}

// One group of a task's rows over a span of which at least one of them sees something.
template <int ROWS>
void add_span(Scratch &s, int64_t first, int64_t start, int64_t count, int64_t d, float scale) {
    const auto nothing = [](int64_t) {};
    count = std::min(count, s.visible[first + ROWS - 1] - start);  // the last row sees the most
    for (int64_t at = 0; at < count; at += TILE) {
        Floats scores[ROWS][2] = {};
        add_product<ROWS>(scores, s.query + first * d, d, s.keys + at * d, d, nothing);
        for (int row = 0; row < ROWS; ++row) {
            const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            const int32_t seen = int32_t(std::clamp<int64_t>(s.visible[first + row] - start - at, 0, TILE));
            const Floats hidden = splat(-INFINITY);
            float *to = s.scores + row * SPAN + at;
            store(to, lane < seen ? scores[row][0] * scale : hidden);
            store(to + LANES, lane < seen - LANES ? scores[row][1] * scale : hidden);
        }
    }
    float kept[ROWS];
    for (int row = 0; row < ROWS; ++row) {
        const float *scores = s.scores + row * SPAN;
        Floats peaks = load(scores);
        for (int64_t i = LANES; i < count; i += LANES) peaks = larger(load(scores + i), peaks);
        const float peak = std::max(s.largest[first + row], largest(peaks));
        // A row that has seen nothing yet stays at -infinity, and subtracting that from itself would be NaN.
        const float base = std::isinf(peak) ? 0.0f : peak;
        kept[row] = std::exp(s.largest[first + row] - base);
        Floats total = {};
        for (int64_t i = 0; i < count; i += LANES) {
            const Floats weight = exp_negative(load(scores + i) - base);
            total += weight;
            put(s.weights + row * SPAN + i, weight);
        }
        s.total[first + row] = s.total[first + row] * kept[row] + sum(total);
        s.largest[first + row] = peak;
    }
    const int64_t even = count + count % 2, stride = padded(d);
    for (int64_t at = 0; at < stride; at += TILE) {
        Floats sums[ROWS][2];
        float *to = s.sums + first * stride + at;
        for (int row = 0; row < ROWS; ++row) {
            sums[row][0] = load(to + row * stride) * kept[row];
            sums[row][1] = load(to + row * stride + LANES) * kept[row];
        }
        add_product<ROWS>(sums, s.weights, SPAN, s.values + at * SPAN, even, nothing);
        for (int row = 0; row < ROWS; ++row) {
            store(to + row * stride, sums[row][0]);
            store(to + row * stride + LANES, sums[row][1]);
        }
    }
}

using AddSpan = void (*)(Scratch &, int64_t, int64_t, int64_t, int64_t, float);

template <int... ROWS>
constexpr std::array<AddSpan, 1 + sizeof...(ROWS)> spans(std::integer_sequence<int, ROWS...>) {
    return {nullptr, add_span<1 + ROWS>...};
}

constexpr auto ADD = spans(std::make_integer_sequence<int, TILE_ROWS>());

// Query row `row` of a key head: token row / group, head row % group of the group.
void attend_task(const Task &task, const Attention<bfloat16> &a, const Shape &shape) {
    static thread_local std::unique_ptr<Scratch> scratch;
    if (!scratch) scratch.reset(new Scratch);
    Scratch &s = *scratch;
    const int64_t group = shape.heads / shape.kv_heads, d = shape.head_dim, first_token = a.query_start[task.sequence];
    const int64_t num_tokens = a.query_start[task.sequence + 1] - first_token, context = a.context_lens[task.sequence];
    const auto token_of = [&](int64_t row) { return (task.first_row + row) / group; };
    const auto head_of = [&](int64_t row) { return task.head * group + (task.first_row + row) % group; };
    for (int64_t row = 0; row < task.num_rows; ++row) {
        const bfloat16 *from = a.query + (first_token + token_of(row)) * a.query_stride + head_of(row) * d;
        for (int64_t i = 0; i < d; i += LANES) put(s.query + row * d + i, load(from + i));
        s.visible[row] = context == 0 ? 0 : context - num_tokens + token_of(row) + 1;
        s.largest[row] = -INFINITY;
        s.total[row] = 0;
    }
    std::fill_n(s.sums, task.num_rows * padded(d), 0.0f);
    const int64_t seen = s.visible[task.num_rows - 1], groups = (task.num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t start = 0; start < seen; start += SPAN) {
        const int64_t count = std::min(SPAN, seen - start);
        bring(s, a, shape, a.block_tables + task.sequence * a.table_stride, task.head, start, count);
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t first = task.num_rows * i / groups, last = task.num_rows * (i + 1) / groups;
            if (s.visible[last - 1] > start) ADD[last - first](s, first, start, count, d, a.scale);
        }
    }
    for (int64_t row = 0; row < task.num_rows; ++row) {
        const Floats factor = splat(1.0f / std::max(s.total[row], 1e-37f));
        bfloat16 *to = a.output + ((first_token + token_of(row)) * shape.heads + head_of(row)) * d;
        for (int64_t i = 0; i < d; i += LANES) store(to + i, load(s.sums + row * padded(d) + i) * factor);
    }
}

}  // namespace

// As dispec_paged_attention_bfloat16, but for the sequences of more than `longest` query tokens.
extern "C" void dispec_prefill_attention(const bfloat16 *query, int64_t query_stride, const bfloat16 *keys,
                                         const bfloat16 *values, const int32_t *block_tables, int64_t table_stride,
                                         const int32_t *query_start, const int32_t *context_lens, int64_t sequences,
                                         int64_t longest, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                         int64_t block_size, float scale, bfloat16 *output) {
    const Shape shape{heads, kv_heads, head_dim, block_size};
    const Attention<bfloat16> attention{query,       query_stride, keys,      values,  block_tables, table_stride,
                                        query_start, context_lens, sequences, longest, scale,        output};
    const auto rows_of = [&](int64_t b) {
        const int64_t tokens = query_start[b + 1] - query_start[b];
        return tokens > longest ? tokens * (heads / kv_heads) : 0;
    };
    int64_t total = 0;
    for (int64_t b = 0; b < sequences; ++b) total += rows_of(b) * kv_heads;
    if (total == 0) return;
    const int64_t fair = total / (TASKS_PER_THREAD * num_threads()) / TILE_ROWS * TILE_ROWS;
    const int64_t size = std::clamp(fair, MIN_TASK_ROWS, MAX_TASK_ROWS);
    std::vector<Task> tasks;
    for (int64_t b = 0; b < sequences; ++b) {
        const int64_t rows = rows_of(b), chunks = (rows + size - 1) / size;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk)  // those that see the most first
            for (int64_t head = 0; head < kv_heads; ++head) {
                const int64_t first = rows * chunk / chunks;
                tasks.push_back({b, head, first, rows * (chunk + 1) / chunks - first});
            }
    }
    const int64_t count = tasks.size();
    parallel_for(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) attend_task(tasks[i], attention, shape);
    }, Order::TASKS);
}
#endif
