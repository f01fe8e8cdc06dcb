// Kernels that call one another. Each shares its work among the threads of `thread_pool.h`. Those that take `Phases`
// add their work to them, so that a model's step is one run; the others return when all is done.
#pragma once
#include <cstdint>
#include <type_traits>
#include <vector>

#include "thread_pool.h"
#include "vectors.h"

#if defined(__AVX512BF16__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#define DISPEC_TILES  // packed weights and prefill attention; on other CPUs the library lacks them
#endif

enum WeightKind : int64_t { PLAIN, BFLOAT16, INT4, INT8 };

// A weight [n, k]. PLAIN: bf16, row by row. All others: in tiles, see tiles.h. group_size: columns that share a scale,
// and has_offsets, both of int4 and int8. It has the fields of the structure of the same name in library.py.
struct Matrix {
    const void *data;
    int64_t kind, group_size, has_offsets;
};

// out [rows, n] = norm(x) [rows, k] @ weight.T + bias + residual [rows, n], in bf16. x: rows `x_stride` elements apart.
// norm [k], bias [n] and residual may be null. weight: in tiles. normed: room for rows * k + 2 elements where there is
// a norm. sums: room for rows * group_count(weight, k) elements. If `is_gated`, n is a multiple of 64, the first half
// of the features gates the second, there is no residual, and out is [rows, n / 2].
struct Linear {
    const uint16_t *x;
    int64_t x_stride;
    const uint16_t *norm;
    float eps;
    uint16_t *normed;
    float *sums;
    Matrix weight;
    const uint16_t *bias, *residual;
    uint16_t *out;
    int64_t rows, n, k;
    bool is_gated;

    int64_t outputs() const { return is_gated ? n / 2 : n; }
    int64_t tiles() const { return (outputs() + 31) / 32; }  // of them; those of the second half follow
};

void linear(Phases &phases, const Linear &linear);

// Return the groups of a row whose offsets are multiplied by sums of x: 0 without offsets.
inline int64_t group_count(const Matrix &weight, int64_t k) {
    return weight.has_offsets ? (k + weight.group_size - 1) / weight.group_size : 0;
}

// Read rows of a weight [n, k]: out [count, k] in bf16.
void read_rows(Phases &phases, const Matrix &weight, const int32_t *indices, int64_t count, int64_t k, uint16_t *out);

// The elements of the KV cache: those of the activations, or codes with a scale for each token of each head.
enum class CacheType : int64_t { ACTIVATIONS, INT8, E4M3 };

// head_dim and block_size are multiples of 16 up to 256.
struct AttentionShape {
    int64_t heads, kv_heads, head_dim, block_size;
    CacheType cache_type;
};

// Call f with an element of the KV cache; T is the type of the activations.
template <typename T, typename Function>
void with_element(CacheType type, const Function &f) {
    switch (type) {
        case CacheType::ACTIVATIONS: return f(T{});
        case CacheType::INT8: return f(int8_t{});
        case CacheType::E4M3: return f(e4m3{});
    }
}

// Element is quantised if a byte. A page [head_dim, block_size] or [block_size, head_dim] of a key head is then followed
// by the scales of its tokens, float32 [block_size].
template <typename Element>
constexpr bool IS_QUANTIZED = sizeof(Element) == 1;

template <typename Element>
int64_t page_size(const AttentionShape &shape) {
    return (shape.head_dim + (IS_QUANTIZED<Element> ? sizeof(float) : 0)) * shape.block_size;
}

template <typename Element>
auto scales_of(Element *page, const AttentionShape &shape) {
    return (std::conditional_t<std::is_const_v<Element>, const float, float> *)(page +
                                                                               shape.head_dim * shape.block_size);
}

constexpr int64_t MAX_HEAD_DIM = 256;
constexpr int64_t MAX_BLOCK_SIZE = 256;

// projected: queries, keys and values of all heads side by side, tokens `stride` elements apart. query_norm and
// key_norm [head_dim] may be null. cosine and sine [tokens, head_dim / 2]. query [tokens, heads, head_dim] receives the
// queries, the pages of keys [blocks, kv_heads, head_dim, block_size] and values [blocks, kv_heads, block_size, head_dim]
// the rest.
template <typename T>
struct RopeWrite {
    const T *projected;
    int64_t stride;
    const T *query_norm, *key_norm;
    float eps;
    const float *cosine, *sine;
    const int32_t *slot_mapping;
    int64_t tokens;
    T *query;
    void *keys, *values;
};

template <typename T>
void rope_write(Phases &phases, const RopeWrite<T> &rope_write, const AttentionShape &shape);

// query [tokens, heads, head_dim], tokens `query_stride` elements apart; output likewise, dense. Sequence b has query
// tokens query_start[b] : query_start[b + 1], the last ones of context_lens[b], and blocks block_tables[b, :], rows
// `table_stride` apart.
template <typename T>
struct Attention {
    const T *query;
    int64_t query_stride;
    const void *keys, *values;
    const int32_t *block_tables;
    int64_t table_stride;
    const int32_t *query_start, *context_lens;
    int64_t sequences;
    float scale;
    T *output;
};

// A part of a thread's work in decode attention: query rows of one key head over one span of positions. partial: index
// of its result among the partial results, or -1 where the span is the whole context.
struct DecodeTask {
    int64_t sequence, head, first_row, num_rows, begin, end, partial;
};

// The tasks of a step, the same in every layer, for sequences of at most `max_query_len` query tokens.
struct DecodePlan {
    std::vector<DecodeTask> tasks;
    std::vector<float> partials;

    void make(const int32_t *query_start, const int32_t *context_lens, int64_t sequences, int64_t max_query_len,
              const AttentionShape &shape);
};

template <typename T>
void decode_attention(Phases &phases, const Attention<T> &attention, DecodePlan &plan, const AttentionShape &shape);

// Attention of the sequences of more than `max_decode_len` query tokens.
void prefill_attention(const Attention<bfloat16> &attention, const AttentionShape &shape, int64_t max_decode_len);

// out [rows]: the column of the largest of n logits; rows `stride` elements apart. allowed [rows, ceil(n / 32)]: bit v %
// 32 of word v / 32 is set if column v may be the result. Null where all may be.
template <typename T>
void argmax(const T *logits, int64_t stride, int64_t rows, int64_t n, const uint32_t *allowed, int64_t *out);

// out [rows]: the sampled column, see sampling.cpp. token_ids [n] may be null. allowed: as in `argmax`.
template <typename T>
void sample(const T *logits, int64_t stride, int64_t rows, int64_t n, const float *temperature, const int64_t *seed,
            const int32_t *position, const int64_t *token_ids, const uint32_t *allowed, int64_t *out);
