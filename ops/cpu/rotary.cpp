// The queries of a step, rotated, and its keys and values into their pages, from one pass over what was projected.
#include <cmath>
#include <cstdint>

#include "parts.h"
#include "thread_pool.h"

namespace {

constexpr int64_t MAX_HEAD_DIM = 256;
constexpr int64_t FEW_ELEMENTS = 4096;  // that one thread rotates in less time than two take to meet

// Norm (where there is a weight) and rotation of one head, with a rounding to T after each step that has one in torch.
template <typename T>
void rotate(const T *x, const T *norm, float eps, const float *cosine, const float *sine, int64_t d, T *out) {
    T normed[MAX_HEAD_DIM];
    if (norm) {
        Floats squares = {};
        for (int64_t i = 0; i < d; i += LANES) squares += load(x + i) * load(x + i);
        const float factor = 1.0f / std::sqrt(sum(squares) / float(d) + eps);
        for (int64_t i = 0; i < d; i += LANES) {
            store(normed + i, load(x + i) * factor);
            store(normed + i, load(normed + i) * load(norm + i));
        }
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
void rope_write(const Rotation<T> &r, const Shape &shape) {
    const int64_t d = shape.head_dim, heads = shape.heads, kv_heads = shape.kv_heads;
    const int64_t page = d * shape.block_size, all = heads + 2 * kv_heads;
    // Slots are distinct but for padding's, and what lies there is never read.
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
    heads_of_tokens * d > FEW_ELEMENTS ? parallel_for(heads_of_tokens, write) : write(0, heads_of_tokens);
}

template void rope_write(const Rotation<bfloat16> &, const Shape &);
template void rope_write(const Rotation<float> &, const Shape &);

// head_dim is a multiple of 16 up to 256.
#define ROTATE_AND_WRITE(name, T)                                                                                      \
    extern "C" void name(const T *projected, int64_t stride, const T *query_norm, const T *key_norm, float eps,        \
                         const float *cosine, const float *sine, const int32_t *slot_mapping, int64_t tokens,          \
                         int64_t heads, int64_t kv_heads, int64_t d, int64_t block_size, T *query, T *keys, T *values) { \
        const Rotation<T> rotation{projected, stride, query_norm, key_norm, eps, cosine, sine, slot_mapping, tokens,    \
                                   query, keys, values};                                                               \
        rope_write(rotation, Shape{heads, kv_heads, d, block_size});                                             \
    }

ROTATE_AND_WRITE(dispec_rotate_and_write_bfloat16, bfloat16)
ROTATE_AND_WRITE(dispec_rotate_and_write_float32, float)
