// A model and a step of it, as the structures of the same names in decoder.py fill them in.
#pragma once
#include <cstdint>

#include "vectors.h"

// The weights of a layer, as in `Product` and `Rotation`, and its pages. Biases and head norms may be null.
struct Layer {
    const uint16_t *attention_norm;
    const void *qkv;
    const uint16_t *qkv_bias, *query_norm, *key_norm;
    const void *output;
    const uint16_t *output_bias, *mlp_norm;
    const void *gate_up, *down;
    bfloat16 *keys, *values;
};

// embedding [vocab, hidden] in bf16, plain or in tiles. head: a weight [head_rows, hidden], of whose outputs the first
// `columns` may be chosen; head_tokens: the tokens that these stand for, null where they are all tokens in order. cosine
// and sine [positions, head_dim / 2].
struct Model {
    int64_t hidden, intermediate, heads, kv_heads, head_dim, block_size, vocab, embedding_is_tiled;
    const uint16_t *embedding;
    int64_t num_layers, layers_are_int8;
    const Layer *layers;
    const uint16_t *final_norm;
    int64_t head_rows, head_is_int8, columns;
    const void *head;
    const int64_t *head_tokens;
    const float *cosine, *sine;
    float eps, scale;
};

// The tokens of a step and where they stand, as in `Rotation` and `Attention`.
struct Step {
    int64_t tokens, sequences;
    const float *cosine, *sine;
    const int32_t *slot_mapping, *block_tables;
    int64_t table_stride;
    const int32_t *query_start, *context_lens;
};
