// A whole transformer layer of a decode step in one call.
#include <cstdint>
#include <vector>

#include "tiles.h"
#ifdef DISPEC_TILES
#include "entries.h"
#include "parts.h"

namespace {

struct Scratch {
    std::vector<uint16_t> normed, projected, query, attended, middle, gated;
    AttentionPlan plan;
};

}  // namespace

// x and out [tokens, hidden]; the weights as in `Product`, the rest as in `Rotation` and `Attention`. Biases and head
// norms may be null.
extern "C" void dispec_layer(const uint16_t *x, uint16_t *out, int64_t tokens, int64_t hidden, int64_t intermediate,
                             float eps, int64_t is_int8, const uint16_t *attention_norm, const void *qkv,
                             const uint16_t *qkv_bias, const uint16_t *query_norm, const uint16_t *key_norm,
                             const void *output, const uint16_t *output_bias, const uint16_t *mlp_norm,
                             const void *gate_up, const void *down, const float *cosine, const float *sine, bfloat16 *keys,
                             bfloat16 *values, const int32_t *slot_mapping, const int32_t *block_tables,
                             int64_t table_stride, const int32_t *query_start, const int32_t *context_lens,
                             int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size,
                             float scale) {
    static thread_local Scratch scratch;
    const Shape shape{heads, kv_heads, head_dim, block_size};
    const int64_t query_size = heads * head_dim, projected_size = (heads + 2 * kv_heads) * head_dim;
    scratch.normed.resize(tokens * hidden + 2);
    scratch.projected.resize(tokens * projected_size);
    scratch.query.resize(tokens * query_size);
    scratch.attended.resize(tokens * query_size);
    scratch.middle.resize(tokens * hidden);
    scratch.gated.resize(tokens * intermediate);
    AttentionPlan &plan = scratch.plan;
    plan.make(query_start, context_lens, sequences, tokens, shape);
    uint16_t *normed = scratch.normed.data(), *projected = scratch.projected.data(), *attended = scratch.attended.data();
    uint16_t *middle = scratch.middle.data(), *gated = scratch.gated.data();
    bfloat16 *query = (bfloat16 *)scratch.query.data();
    const Product project{x, hidden, attention_norm, eps, normed, qkv, is_int8 != 0, qkv_bias, nullptr, projected,
                          tokens, projected_size, hidden, false};
    const Rotation<bfloat16> rotation{(bfloat16 *)projected, projected_size, (bfloat16 *)query_norm,
                                      (bfloat16 *)key_norm, eps, cosine, sine, slot_mapping, tokens, query, keys, values};
    const Attention<bfloat16> attention{query, query_size, keys, values, block_tables, table_stride, query_start,
                                        context_lens, sequences, tokens, scale, (bfloat16 *)attended};
    const Product back{attended, query_size, nullptr, 0, nullptr, output, is_int8 != 0, output_bias, x, middle, tokens,
                       hidden, query_size, false};
    const Product widen{middle, hidden, mlp_norm, eps, normed, gate_up, is_int8 != 0, nullptr, nullptr, gated, tokens,
                        2 * intermediate, hidden, true};
    const Product narrow{gated, intermediate, nullptr, 0, nullptr, down, is_int8 != 0, nullptr, middle, out, tokens, hidden,
                         intermediate, false};
    multiply(project);
    rotate_and_write(rotation, shape);
    attend(attention, plan, shape);
    multiply(back);
    multiply(widen);
    multiply(narrow);
}
#endif
