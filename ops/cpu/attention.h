// What decode and prefill attention share: the rows of a task, and the online softmax.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.h"

// Rows first_row, first_row + 1, ... of one key head of one sequence. Query row r of a key head is token r / group and
// head r % group of its group.
template <typename T>
struct QueryRows {
    const Attention<T> &a;
    const AttentionShape &shape;
    int64_t sequence, kv_head, first_row;
    int64_t group = shape.heads / shape.kv_heads, first_token = a.query_start[sequence];

    int64_t token(int64_t row) const { return (first_row + row) / group; }
    int64_t head(int64_t row) const { return kv_head * group + (first_row + row) % group; }
    const T *query(int64_t row) const {
        return a.query + (first_token + token(row)) * a.query_stride + head(row) * shape.head_dim;
    }
    T *output(int64_t row) const {
        return a.output + ((first_token + token(row)) * shape.heads + head(row)) * shape.head_dim;
    }
    // Positions that the row attends to; 0 or less where it attends to none.
    int64_t visible(int64_t row) const {
        const int64_t num_tokens = a.query_start[sequence + 1] - first_token;
        return a.context_lens[sequence] - num_tokens + token(row) + 1;
    }
    const int32_t *blocks() const { return a.block_tables + sequence * a.table_stride; }

    // Write a row's weighted sum of values, divided by the sum of its weights.
    void finish(int64_t row, const float *sums, float total) const {
        const Floats factor = splat(1.0f / std::max(total, 1e-37f));
        T *to = output(row);
        for (int64_t i = 0; i < shape.head_dim; i += LANES) store(to + i, load(sums + i) * factor);
    }
};

// The factors of sixteen tokens' codes, from `offset` on, as `load` returns codes; 1 in a page without scales.
template <typename Element>
inline Floats code_factors(const Element *page, const AttentionShape &shape, int64_t offset) {
    if constexpr (!IS_QUANTIZED<Element>) return splat(1.0f);
    else return load(scales_of(page, shape) + offset) * (std::is_same_v<Element, e4m3> ? 256.0f : 1.0f);
}

// Scores of sixteen positions, -infinity from the `visible`-th on.
inline Floats masked(Floats scores, int64_t visible) {
    const Ints is_visible = is_less(LANE, Ints{} + int32_t(std::clamp<int64_t>(visible, 0, LANES)));
    return choose(is_visible, scores, splat(-INFINITY));
}

// A row that sees no position yet has the maximum -infinity; subtracting that from itself would be NaN.
inline float finite_or_zero(float maximum) { return std::isinf(maximum) ? 0.0f : maximum; }

// One step of a row's online softmax (arXiv:2205.14135) over `count` scores, in whole vectors. A score is a logarithm
// to base 2: the attention scale includes log2(e). put(i, weights) stores the weights of scores i to i + 15. Updates
// the row's maximum and sum of weights; returns the factor for its earlier weighted sums.
template <typename Put>
inline float online_softmax(const float *scores, int64_t count, float &maximum, float &total, const Put &put) {
    Floats peaks = splat(-INFINITY);
    for (int64_t i = 0; i < count; i += LANES) peaks = larger(load(scores + i), peaks);
    const float peak = std::max(maximum, largest(peaks)), base = finite_or_zero(peak);
    const float kept = std::exp2(maximum - base);
    Floats sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats weights = exp2_negative(load(scores + i) - base);
        put(i, weights);
        sums += weights;
    }
    total = total * kept + sum(sums);
    maximum = peak;
    return kept;
}
