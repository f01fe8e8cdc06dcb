// Tokens of a model, one after another, in one call. A small model's step takes so little that what a host does between
// two of them, and between two layers, would take as long again: its code has left the caches each time it is run.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tiles.h"
#ifdef DISPEC_TILES
#include "entries.h"

namespace {

// Inputs and results of a step, which the next one overwrites.
struct Scratch {
    std::vector<uint16_t> x, logits;
    std::vector<float> cosine, sine;
    std::vector<int32_t> token_ids, slot_mapping, query_start, context_lens;
    std::vector<int64_t> columns;
};

}  // namespace

// counts [sequences], falling: how many tokens of each are wanted. token_ids [sequences, query_len]: the last of each
// sequence, whose keys and values are to be computed. context_lens: tokens of each sequence with these. temperature and
// seed [sequences], as `dispec_sample_bfloat16` takes them; temperature null where nothing is drawn. out [sequences,
// counts[0]]; what is not wanted stays as it was.
extern "C" void dispec_decode(const Model *model, int64_t sequences, int64_t query_len, const int32_t *counts,
                              const int32_t *token_ids, const int32_t *block_tables, int64_t table_stride,
                              const int32_t *context_lens, const float *temperature, const int64_t *seed,
                              int64_t *out) {
    static thread_local Scratch scratch;
    const Model &m = *model;
    const int64_t most = sequences * query_len, half = m.head_dim / 2;
    scratch.x.resize(most * m.hidden);
    scratch.logits.resize(sequences * m.head_rows);
    scratch.cosine.resize(most * half);
    scratch.sine.resize(most * half);
    scratch.token_ids.assign(token_ids, token_ids + most);
    scratch.slot_mapping.resize(most);
    scratch.query_start.resize(sequences + 1);
    scratch.context_lens.resize(sequences);
    scratch.columns.resize(sequences);
    int32_t *ids = scratch.token_ids.data(), *ends = scratch.context_lens.data(), *starts = scratch.query_start.data();
    for (int64_t place = 0; place < counts[0]; ++place) {
        const int64_t q = place ? 1 : query_len;
        int64_t active = 0;
        for (; active < sequences && counts[active] > place; ++active) {
            ends[active] = int32_t(context_lens[active] + place);
            starts[active] = int32_t(active * q);
            const int32_t *table = block_tables + active * table_stride;
            for (int64_t token = active * q; token < (active + 1) * q; ++token) {
                const int64_t position = ends[active] - (active + 1) * q + token;
                scratch.slot_mapping[token] =
                    int32_t(table[position / m.block_size] * m.block_size + position % m.block_size);
                std::copy_n(m.cosine + position * half, half, scratch.cosine.data() + token * half);
                std::copy_n(m.sine + position * half, half, scratch.sine.data() + token * half);
                ids[token] = std::min(ids[token], int32_t(m.vocab - 1));
            }
        }
        const int64_t tokens = active * q;
        starts[active] = int32_t(tokens);
        uint16_t *x = scratch.x.data();
        if (m.embedding_is_tiled) {
            dispec_unpack_rows(m.embedding, ids, tokens, m.hidden, x);
        } else {
            for (int64_t i = 0; i < tokens; ++i)
                std::copy_n(m.embedding + ids[i] * m.hidden, m.hidden, x + i * m.hidden);
        }
        const Step step{tokens, active, scratch.cosine.data(), scratch.sine.data(), scratch.slot_mapping.data(),
                        block_tables, table_stride, starts, ends};
        dispec_layers(model, &step, x, x);
        // The last token of each sequence.
        uint16_t *logits = scratch.logits.data();
        dispec_linear(x + (q - 1) * m.hidden, q * m.hidden, m.final_norm, m.eps, m.head, m.head_is_int8, nullptr,
                      nullptr, logits, active, m.head_rows, m.hidden, false);
        int64_t *columns = scratch.columns.data();
        if (temperature)
            dispec_sample_bfloat16((bfloat16 *)logits, m.head_rows, active, m.columns, temperature, seed, ends,
                                 m.head_tokens, columns);
        else
            dispec_argmax_bfloat16((bfloat16 *)logits, m.head_rows, active, m.columns, columns);
        for (int64_t b = 0; b < active; ++b) {
            const int64_t token = m.head_tokens ? m.head_tokens[columns[b]] : columns[b];
            out[b * counts[0] + place] = token;
            ids[b] = int32_t(token);
        }
    }
}
#endif
