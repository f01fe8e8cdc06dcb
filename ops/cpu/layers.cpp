// All layers of a step with few query tokens per sequence, in one call.
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

    void make_room(const Model &m, int64_t tokens) {
        normed.resize(tokens * m.hidden + 2);
        projected.resize(tokens * (m.heads + 2 * m.kv_heads) * m.head_dim);
        query.resize(tokens * m.heads * m.head_dim);
        attended.resize(tokens * m.heads * m.head_dim);
        middle.resize(tokens * m.hidden);
        gated.resize(tokens * m.intermediate);
    }
};

// `layers.block`. out may be x.
void compute(const Layer &w, const Model &m, const Step &step, const Shape &shape, Scratch &scratch, const uint16_t *x,
             uint16_t *out) {
    const int64_t tokens = step.tokens, query_size = m.heads * m.head_dim;
    const int64_t projected_size = (m.heads + 2 * m.kv_heads) * m.head_dim;
    const bool is_int8 = m.layers_are_int8 != 0;
    uint16_t *normed = scratch.normed.data(), *projected = scratch.projected.data(), *middle = scratch.middle.data();
    uint16_t *attended = scratch.attended.data(), *gated = scratch.gated.data();
    bfloat16 *query = (bfloat16 *)scratch.query.data();
    const Product project{x, m.hidden, w.attention_norm, m.eps, normed, w.qkv, is_int8, w.qkv_bias, nullptr, projected,
                          tokens, projected_size, m.hidden, false};
    const Rotation<bfloat16> rotation{(bfloat16 *)projected, projected_size, (bfloat16 *)w.query_norm,
                                      (bfloat16 *)w.key_norm, m.eps, step.cosine, step.sine, step.slot_mapping, tokens,
                                      query, w.keys, w.values};
    const Attention<bfloat16> attention{query, query_size, w.keys, w.values, step.block_tables, step.table_stride,
                                        step.query_start, step.context_lens, step.sequences, tokens, m.scale,
                                        (bfloat16 *)attended};
    const Product back{attended, query_size, nullptr, 0, nullptr, w.output, is_int8, w.output_bias, x, middle, tokens,
                       m.hidden, query_size, false};
    const Product widen{middle, m.hidden, w.mlp_norm, m.eps, normed, w.gate_up, is_int8, nullptr, nullptr, gated, tokens,
                        2 * m.intermediate, m.hidden, true};
    const Product narrow{gated, m.intermediate, nullptr, 0, nullptr, w.down, is_int8, nullptr, middle, out, tokens,
                         m.hidden, m.intermediate, false};
    multiply(project);
    rope_write(rotation, shape);
    attend(attention, scratch.plan, shape);
    multiply(back);
    multiply(widen);
    multiply(narrow);
}

}  // namespace

// x and out [tokens, hidden], which may be the same.
extern "C" void dispec_layers(const Model *model, const Step *step, const uint16_t *x, uint16_t *out) {
    static thread_local Scratch scratch;
    const Model &m = *model;
    const Shape shape{m.heads, m.kv_heads, m.head_dim, m.block_size};
    scratch.make_room(m, step->tokens);
    scratch.plan.make(step->query_start, step->context_lens, step->sequences, step->tokens, shape);
    for (const Layer *layer = m.layers; layer < m.layers + m.num_layers; ++layer) {
        compute(*layer, m, *step, shape, scratch, x, out);
        x = out;
    }
}
#endif
