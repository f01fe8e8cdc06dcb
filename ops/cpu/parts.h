// The parts of a transformer layer. Each shares its work among the threads of `thread_pool.h` and returns when all is done.
#pragma once
#include <cstdint>
#include <vector>

#include "vectors.h"

// out [rows, n] = norm(x) [rows, k] @ weight.T + bias + residual [rows, n]. Strides in elements. norm [k], bias and
// residual may be null. If `is_gated`, n is a multiple of 64, the first half of the features gates the second, there is
// no residual, and out is [rows, n / 2]. normed: room for rows * k + 2 elements, if there is a norm.
struct Product {
    const uint16_t *x;
    int64_t x_stride;
    const uint16_t *norm;
    float eps;
    uint16_t *normed;
    const void *packed;
    bool is_int8;
    const uint16_t *bias, *residual;
    uint16_t *out;
    int64_t rows, n, k;
    bool is_gated;
};

void multiply(const Product &product);

struct Shape {
    int64_t heads, kv_heads, head_dim, block_size;
};

// projected: queries, keys and values of all heads side by side, tokens `stride` elements apart. cosine and sine
// [tokens, head_dim / 2]. query [tokens, heads, head_dim]. query_norm and key_norm [head_dim] may be null.
template <typename T>
struct Rotation {
    const T *projected;
    int64_t stride;
    const T *query_norm, *key_norm;
    float eps;
    const float *cosine, *sine;
    const int32_t *slot_mapping;
    int64_t tokens;
    T *query, *keys, *values;
};

template <typename T>
void rope_write(const Rotation<T> &rotation, const Shape &shape);

// A task of one thread: rows of one key head over one span. partial: where its result waits, or -1.
struct AttentionTask {
    int64_t sequence, head, first_row, num_rows, begin, end, partial;
};

// query [tokens, heads, head_dim], its tokens `query_stride` elements apart; output likewise, dense. Only sequences of
// at most `longest` query tokens are computed.
template <typename T>
struct Attention {
    const T *query;
    int64_t query_stride;
    const T *keys, *values;
    const int32_t *block_tables;
    int64_t table_stride;
    const int32_t *query_start, *context_lens;
    int64_t sequences, longest;
    float scale;
    T *output;
};

// The tasks of a step, the same in every layer. One thread makes it.
struct AttentionPlan {
    std::vector<AttentionTask> tasks;
    std::vector<float> partials;

    void make(const int32_t *query_start, const int32_t *context_lens, int64_t sequences, int64_t longest,
              const Shape &shape);
};

template <typename T>
void attend(const Attention<T> &attention, AttentionPlan &plan, const Shape &shape);
