// What one entry of the library calls of others. Each is described where it is defined.
#pragma once
#include <cstdint>

#include "vectors.h"

extern "C" {
void dispec_unpack_rows(const uint16_t *packed, const int32_t *indices, int64_t count, int64_t k, uint16_t *out);
void dispec_linear(const uint16_t *x, int64_t x_stride, const uint16_t *norm, float eps, const void *packed,
                   int64_t is_int8, const uint16_t *bias, const uint16_t *residual, uint16_t *out, int64_t rows,
                   int64_t n, int64_t k, int64_t is_gated);
void dispec_layer(const uint16_t *x, uint16_t *out, int64_t tokens, int64_t hidden, int64_t intermediate, float eps,
                  int64_t is_int8, const uint16_t *attention_norm, const void *qkv, const uint16_t *qkv_bias,
                  const uint16_t *query_norm, const uint16_t *key_norm, const void *output,
                  const uint16_t *output_bias, const uint16_t *mlp_norm, const void *gate_up, const void *down,
                  const float *cosine, const float *sine, bfloat16 *keys, bfloat16 *values,
                  const int32_t *slot_mapping, const int32_t *block_tables, int64_t table_stride,
                  const int32_t *query_start, const int32_t *context_lens, int64_t sequences, int64_t heads,
                  int64_t kv_heads, int64_t head_dim, int64_t block_size, float scale);
void dispec_argmax_bfloat16(const bfloat16 *x, int64_t stride, int64_t rows, int64_t n, int64_t *out);
void dispec_draw_bfloat16(const bfloat16 *logits, int64_t stride, int64_t rows, int64_t n, const float *temperature,
                          const int64_t *seed, const int32_t *position, const int64_t *token_ids, int64_t *out);
}
