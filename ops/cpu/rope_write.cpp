// Head norms and rotation of the queries and keys of a step, and the write of keys and values to their slots.
#include <cmath>
#include <cstdint>

#include "kernels.h"

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

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The code nearest to x, ties to even: in a sum with 2^(23 - n) float32 has n places behind the point. Integer
// operations are between products and sums, so that the compiler does not fuse these to one rounding.
void encode(float x, int8_t *to) {  // |x| <= 127
    const uint32_t word = bits_of(x), magnitude = bits_of(float_of(word & 0x7fffffff) + 0x1p23f) - bits_of(0x1p23f);
    *to = int8_t(word >> 31 ? -magnitude : magnitude);
}

void encode(float x, e4m3 *to) {  // |x| <= 448
    const uint32_t word = bits_of(x), magnitude = word & 0x7fffffff;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
    const uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    to->bits = uint8_t((word >> 24 & 0x80) | (magnitude < bits_of(0x1p-6f) ? subnormal : normal));
}

// Write the codes of a token's head [d]; return their scale. See `quantize_heads` of kv_cache.py.
template <typename T, typename Element>
float quantize(const T *x, int64_t d, Element *codes) {
    constexpr float LARGEST_CODE = std::is_same_v<Element, e4m3> ? 448.0f : 127.0f;
    uint32_t largest_bits = 0;  // as integers, the magnitudes of NaN are larger than those of numbers
    for (int64_t i = 0; i < d; ++i) largest_bits = std::max(largest_bits, bits_of(scalar(x[i])) & 0x7fffffff);
    const float largest = float_of(largest_bits), inverse = 1.0f / std::max(largest, 0x1p-100f) * LARGEST_CODE;
    for (int64_t i = 0; i < d; ++i) encode(scalar(x[i]) * inverse, codes + i);
    return largest / LARGEST_CODE;
}

// Write a token's rotated key, or its value, x [d] to `offset` in a page.
template <typename T, typename Element>
void write_head(const T *x, bool is_key, const AttentionShape &shape, int64_t offset, Element *page) {
    const int64_t d = shape.head_dim;
    if constexpr (IS_QUANTIZED<Element> && !std::is_same_v<T, Element>) {
        Element codes[MAX_HEAD_DIM];
        scales_of(page, shape)[offset] = quantize(x, d, codes);
        return write_head(codes, is_key, shape, offset, page);
    } else if (is_key) {
        for (int64_t i = 0; i < d; ++i) page[i * shape.block_size + offset] = x[i];
    } else {
        std::copy_n(x, d, page + offset * d);
    }
}

template <typename T, typename Element>
void rope_write_pages(Phases &phases, const RopeWrite<T> &r, const AttentionShape &shape) {
    // Slots are distinct, except that padding shares slots that are never read.
    const auto write = [=](int64_t begin, int64_t end) {
        const int64_t d = shape.head_dim, heads = shape.heads, kv_heads = shape.kv_heads;
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
            Element *page = (Element *)(is_key ? r.keys : r.values);
            page += (block * kv_heads + kv_head) * page_size<Element>(shape);
            T key[MAX_HEAD_DIM];
            if (is_key) rotate(from, r.key_norm, r.eps, c, s, d, key);
            write_head(is_key ? key : from, is_key, shape, slot % shape.block_size, page);
        }
    };
    const int64_t heads_of_tokens = (shape.heads + 2 * shape.kv_heads) * r.tokens;
    const bool is_small = heads_of_tokens * shape.head_dim <= MIN_PARALLEL_ELEMENTS;
    phases.add(heads_of_tokens, write, Schedule::RANGES, is_small ? 1 : num_threads());
}

}  // namespace

template <typename T>
void rope_write(Phases &phases, const RopeWrite<T> &r, const AttentionShape &shape) {
    with_element<T>(shape.cache_type, [&](auto element) { rope_write_pages<T, decltype(element)>(phases, r, shape); });
}

template void rope_write(Phases &, const RopeWrite<bfloat16> &, const AttentionShape &);
template void rope_write(Phases &, const RopeWrite<float> &, const AttentionShape &);

#define ROPE_WRITE(name, T)                                                                                           \
    extern "C" void name(const T *projected, int64_t stride, const T *query_norm, const T *key_norm, float eps,       \
                         const float *cosine, const float *sine, const int32_t *slot_mapping, int64_t tokens,         \
                         int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size,                       \
                         CacheType cache_type, T *query, void *keys, void *values) {                                  \
        static thread_local Phases phases;                                                                            \
        rope_write(phases,                                                                                            \
                   RopeWrite<T>{projected, stride, query_norm, key_norm, eps, cosine, sine, slot_mapping, tokens,     \
                                query, keys, values},                                                                 \
                   AttentionShape{heads, kv_heads, head_dim, block_size, cache_type});                                \
        phases.run();                                                                                                 \
    }

ROPE_WRITE(dispec_rope_write_bfloat16, bfloat16)
ROPE_WRITE(dispec_rope_write_float32, float)
