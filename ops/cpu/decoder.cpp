// A decoder model in one call: all layers of a step with few query tokens per sequence, or a whole loop of decode
// steps. A small model's step takes so little time that the host's work between two layers or steps would take as long
// again: its code has left the CPU's caches each time it runs.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#ifdef DISPEC_TILES

// `Layer`, `Model` and `Step` have the fields of the structures of the same names in decoder.py.
namespace {

// The weights of a layer, as `Linear` and `RopeWrite` take them, and its KV cache. Biases and head norms may be null.
struct Layer {
    const uint16_t *attention_norm;
    Matrix qkv;
    const uint16_t *qkv_bias, *query_norm, *key_norm;
    Matrix output;
    const uint16_t *output_bias, *mlp_norm;
    Matrix gate_up, down;
    void *keys, *values;
};

// embedding: a weight [vocab, hidden], which may be plain. head: a weight [head_rows, hidden] in tiles; its first
// `columns` outputs may be sampled. head_tokens [columns]: their tokens, null where they are all tokens in order.
// cosine and sine [positions, head_dim / 2].
struct Model {
    int64_t hidden, intermediate, heads, kv_heads, head_dim, block_size;
    CacheType cache_type;
    int64_t vocab;
    Matrix embedding;
    int64_t num_layers;
    const Layer *layers;
    const uint16_t *final_norm;
    int64_t head_rows, columns;
    Matrix head;
    const int64_t *head_tokens;
    const float *cosine, *sine;
    float eps, scale;
};

// The tokens of a step, as `RopeWrite` and `Attention` take them.
struct Step {
    int64_t tokens, sequences;
    const float *cosine, *sine;
    const int32_t *slot_mapping, *block_tables;
    int64_t table_stride;
    const int32_t *query_start, *context_lens;
};

// Intermediate results of a layer, which the next one overwrites.
struct LayerScratch {
    std::vector<uint16_t> normed, projected, query, attended, middle, gated;
    std::vector<float> sums;
    DecodePlan plan;

    void resize(const Model &m, int64_t tokens) {
        normed.resize(tokens * m.hidden + 2);
        projected.resize(tokens * (m.heads + 2 * m.kv_heads) * m.head_dim);
        query.resize(tokens * m.heads * m.head_dim);
        attended.resize(tokens * m.heads * m.head_dim);
        middle.resize(tokens * m.hidden);
        gated.resize(tokens * m.intermediate);
        int64_t groups = 0;
        for (const Layer *w = m.layers; w < m.layers + m.num_layers; ++w)
            groups = std::max({groups, group_count(w->qkv, m.hidden), group_count(w->output, m.heads * m.head_dim),
                               group_count(w->gate_up, m.hidden), group_count(w->down, m.intermediate)});
        sums.resize(tokens * groups);
    }
};

// Compute one layer as `layers.model.decoder_layer` does: x and out [tokens, hidden], which may be the same.
void compute_layer(Phases &phases, const Layer &w, const Model &m, const Step &step, const AttentionShape &shape,
                   LayerScratch &s, const uint16_t *x, uint16_t *out) {
    const int64_t tokens = step.tokens, query_size = m.heads * m.head_dim;
    const int64_t qkv_size = (m.heads + 2 * m.kv_heads) * m.head_dim;
    uint16_t *normed = s.normed.data(), *middle = s.middle.data(), *gated = s.gated.data();
    bfloat16 *projected = (bfloat16 *)s.projected.data(), *query = (bfloat16 *)s.query.data();
    bfloat16 *attended = (bfloat16 *)s.attended.data();
    float *sums = s.sums.data();
    linear(phases, {x, m.hidden, w.attention_norm, m.eps, normed, sums, w.qkv, w.qkv_bias, nullptr, s.projected.data(),
                    tokens, qkv_size, m.hidden, false});
    rope_write(phases,
               RopeWrite<bfloat16>{projected, qkv_size, (bfloat16 *)w.query_norm, (bfloat16 *)w.key_norm, m.eps,
                                   step.cosine, step.sine, step.slot_mapping, tokens, query, w.keys, w.values},
               shape);
    decode_attention(phases,
                     Attention<bfloat16>{query, query_size, w.keys, w.values, step.block_tables, step.table_stride,
                                         step.query_start, step.context_lens, step.sequences, m.scale, attended},
                     s.plan, shape);
    linear(phases, {s.attended.data(), query_size, nullptr, 0, nullptr, sums, w.output, w.output_bias, x, middle,
                    tokens, m.hidden, query_size, false});
    linear(phases, {middle, m.hidden, w.mlp_norm, m.eps, normed, sums, w.gate_up, nullptr, nullptr, gated, tokens,
                    2 * m.intermediate, m.hidden, true});
    linear(phases, {gated, m.intermediate, nullptr, 0, nullptr, sums, w.down, nullptr, middle, out, tokens, m.hidden,
                    m.intermediate, false});
}

// Add the phases of all layers. They use memory of this thread: run them before the next call.
void compute_layers(Phases &phases, const Model &m, const Step &step, const uint16_t *x, uint16_t *out) {
    static thread_local LayerScratch scratch;
    const AttentionShape shape{m.heads, m.kv_heads, m.head_dim, m.block_size, m.cache_type};
    scratch.resize(m, step.tokens);
    scratch.plan.make(step.query_start, step.context_lens, step.sequences, step.tokens, shape);
    for (const Layer *layer = m.layers; layer < m.layers + m.num_layers; ++layer) {
        compute_layer(phases, *layer, m, step, shape, scratch, x, out);
        x = out;
    }
}

// Inputs and results of a step, which the next one overwrites.
struct StepScratch {
    std::vector<uint16_t> x, logits, normed;
    std::vector<float> cosine, sine, sums;
    std::vector<int32_t> token_ids, slot_mapping, query_start, context_lens;
    std::vector<int64_t> columns;

    void resize(const Model &m, int64_t sequences, int64_t tokens) {
        x.resize(tokens * m.hidden);
        logits.resize(sequences * m.head_rows);
        normed.resize(sequences * m.hidden + 2);
        sums.resize(sequences * group_count(m.head, m.hidden));
        cosine.resize(tokens * m.head_dim / 2);
        sine.resize(tokens * m.head_dim / 2);
        slot_mapping.resize(tokens);
        query_start.resize(sequences + 1);
        context_lens.resize(sequences);
        columns.resize(sequences);
    }
};

// Write the position-dependent inputs of the last `query_len` tokens of sequence b: rotation, slots, clamped token ids.
void write_inputs(const Model &m, StepScratch &s, int64_t b, int64_t query_len, const int32_t *blocks) {
    const int64_t half = m.head_dim / 2;
    for (int64_t token = b * query_len; token < (b + 1) * query_len; ++token) {
        const int64_t position = s.context_lens[b] - (b + 1) * query_len + token;
        s.slot_mapping[token] = int32_t(blocks[position / m.block_size] * m.block_size + position % m.block_size);
        std::copy_n(m.cosine + position * half, half, s.cosine.data() + token * half);
        std::copy_n(m.sine + position * half, half, s.sine.data() + token * half);
        s.token_ids[token] = std::min(s.token_ids[token], int32_t(m.vocab - 1));
    }
}

}  // namespace

// x and out [tokens, hidden], which may be the same.
extern "C" void dispec_layers(const Model *model, const Step *step, const uint16_t *x, uint16_t *out) {
    static thread_local Phases phases;
    compute_layers(phases, *model, *step, x, out);
    phases.run();
}

// counts [sequences], not rising: tokens to generate for each. token_ids [sequences, query_len]: the last tokens of
// each sequence, which are computed too. context_lens: tokens of each sequence, these included.
// temperature and seed [sequences], as `sample` takes them; temperature is null where all tokens are greedy. out
// [sequences, counts[0]]; places past a sequence's count keep their values.
extern "C" void dispec_decode(const Model *model, int64_t sequences, int64_t query_len, const int32_t *counts,
                              const int32_t *token_ids, const int32_t *block_tables, int64_t table_stride,
                              const int32_t *context_lens, const float *temperature, const int64_t *seed,
                              int64_t *out) {
    static thread_local StepScratch s;
    static thread_local Phases phases;
    const Model &m = *model;
    s.resize(m, sequences, sequences * query_len);
    s.token_ids.assign(token_ids, token_ids + sequences * query_len);
    for (int64_t place = 0; place < counts[0]; ++place) {
        const int64_t q = place ? 1 : query_len;
        int64_t active = 0;
        for (; active < sequences && counts[active] > place; ++active) {
            s.context_lens[active] = int32_t(context_lens[active] + place);
            s.query_start[active] = int32_t(active * q);
            write_inputs(m, s, active, q, block_tables + active * table_stride);
        }
        const int64_t tokens = active * q;
        s.query_start[active] = int32_t(tokens);
        uint16_t *x = s.x.data(), *logits = s.logits.data();
        read_rows(phases, m.embedding, s.token_ids.data(), tokens, m.hidden, x);
        compute_layers(phases, m,
                       {tokens, active, s.cosine.data(), s.sine.data(), s.slot_mapping.data(), block_tables,
                        table_stride, s.query_start.data(), s.context_lens.data()}, x, x);
        // The head reads the last token of each sequence.
        linear(phases, {x + (q - 1) * m.hidden, q * m.hidden, m.final_norm, m.eps, s.normed.data(), s.sums.data(),
                        m.head, nullptr, nullptr, logits, active, m.head_rows, m.hidden, false});
        phases.run();
        int64_t *columns = s.columns.data();
        if (temperature)
            sample((bfloat16 *)logits, m.head_rows, active, m.columns, temperature, seed, s.context_lens.data(),
                   m.head_tokens, nullptr, columns);
        else
            argmax((bfloat16 *)logits, m.head_rows, active, m.columns, nullptr, columns);
        for (int64_t b = 0; b < active; ++b) {
            const int64_t token = m.head_tokens ? m.head_tokens[columns[b]] : columns[b];
            out[b * counts[0] + place] = token;
            s.token_ids[b] = int32_t(token);
        }
    }
}
#endif
