// Head norms and rotation of the queries and keys of a step, and the write of keys and values to their slots.
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "thread_pool.h"

namespace {

// Fewer take one thread less time than two threads take to synchronise.
constexpr int64_t MIN_PARALLEL_ELEMENTS = 4096;

// Norm (where there is a weight) and rotate one head, with a rounding to T after each operation that torch rounds
// after. Dimension i rotates with dimension i + d / 2 (arXiv:2104.09864, the half-split order of Hugging Face).
template <typename T>
void rotate(const T *x, const T *norm, float eps, const float *cosine, const float *sine, int64_t d, T *out) {
    T normed[MAX_HEAD_DIM];
    if (norm) {
        rms_norm(x, norm, eps, normed, d);
        x = normed;
    }
    const int64_t half = d / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats first = load(x + i), second = load(x + half + i), c = load(cosine + i), s = load(sine + i);
        store(out + i, first * c - second * s);
        store(out + half + i, second * c + first * s);
    }
    for (; i < half; ++i) {
        const float first = scalar(x[i]), second = scalar(x[half + i]);
        T pair[2 * LANES];
        store(pair, splat(first * cosine[i] - second * sine[i]));
        store(pair + LANES, splat(second * cosine[i] + first * sine[i]));
        out[i] = pair[0];
        out[half + i] = pair[LANES];
    }
}

}  // namespace

template <typename T>
void rope_write(const RopeWrite<T> &r, const AttentionShape &shape) {
    const int64_t d = shape.head_dim, heads = shape.heads, kv_heads = shape.kv_heads;
    const int64_t page = d * shape.block_size, all = heads + 2 * kv_heads;
    // Slots are distinct, except that padding shares slots that are never read.
    const auto write = [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
            const int64_t head = index / r.tokens, token = index % r.tokens;
            const T *from = r.projected + token * r.stride + head * d;
            const float *c = r.cosine + token * (d / 2), *s = r.sine + token * (d / 2);
            if (head < heads) {
                rotate(from, r.query_norm, r.eps, c, s, d, r.query + (token * heads + head) * d);
                continue;
            }
            const bool is_key = head < heads + kv_heads;
            const int64_t kv_head = head - heads - (is_key ? 0 : kv_heads);
            const int64_t slot = r.slot_mapping[token], block = slot / shape.block_size;
            const int64_t offset = slot % shape.block_size, to = (block * kv_heads + kv_head) * page;
            if (!is_key) {
                std::memcpy(r.values + to + offset * d, from, d * sizeof(T));
                continue;
            }
            T key[MAX_HEAD_DIM];
            rotate(from, r.key_norm, r.eps, c, s, d, key);
            for (int64_t i = 0; i < d; ++i) r.keys[to + i * shape.block_size + offset] = key[i];
        }
    };
    const int64_t heads_of_tokens = all * r.tokens;
    heads_of_tokens * d > MIN_PARALLEL_ELEMENTS ? parallel_for(heads_of_tokens, write) : write(0, heads_of_tokens);
}

template void rope_write(const RopeWrite<bfloat16> &, const AttentionShape &);
template void rope_write(const RopeWrite<float> &, const AttentionShape &);

#define ROPE_WRITE(name, T)                                                                                           \
    extern "C" void name(const T *projected, int64_t stride, const T *query_norm, const T *key_norm, float eps,       \
                         const float *cosine, const float *sine, const int32_t *slot_mapping, int64_t tokens,         \
                         int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size, T *query, T *keys,    \
                         T *values) {                                                                                 \
        rope_write(RopeWrite<T>{projected, stride, query_norm, key_norm, eps, cosine, sine, slot_mapping, tokens,     \
                                query, keys, values},                                                                 \
                   AttentionShape{heads, kv_heads, head_dim, block_size});                                            \
    }

ROPE_WRITE(dispec_rope_write_bfloat16, bfloat16)
ROPE_WRITE(dispec_rope_write_float32, float)
