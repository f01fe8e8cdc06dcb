// What one entry of the library calls of others. Each is described where it is defined.
#pragma once
#include <cstdint>

#include "model.h"
#include "vectors.h"

extern "C" {
void dispec_unpack_rows(const uint16_t *packed, const int32_t *indices, int64_t count, int64_t k, uint16_t *out);
void dispec_linear(const uint16_t *x, int64_t x_stride, const uint16_t *norm, float eps, const void *packed,
                   int64_t is_int8, const uint16_t *bias, const uint16_t *residual, uint16_t *out, int64_t rows,
                   int64_t n, int64_t k, int64_t is_gated);
void dispec_layers(const Model *model, const Step *step, const uint16_t *x, uint16_t *out);
void dispec_argmax_bfloat16(const bfloat16 *x, int64_t stride, int64_t rows, int64_t n, int64_t *out);
void dispec_sample_bfloat16(const bfloat16 *logits, int64_t stride, int64_t rows, int64_t n, const float *temperature,
                          const int64_t *seed, const int32_t *position, const int64_t *token_ids, int64_t *out);
}
