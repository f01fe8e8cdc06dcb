// Sampling from logits: the column of each row's largest logit, or of its largest logit / temperature + Gumbel noise
// (Gumbel, 1954), as `layers.sampling.sample` defines it. A mask of allowed tokens costs no pass of its own: of a grammar's
// masks most words are zero or full, and columns of the former are not read.
//
// Nothing as long as the vocabulary is written: noise is made for a share of a row at a time, and only the largest
// value of each share is kept.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace {

// Words of a row of bits.
constexpr int64_t words_of(int64_t columns) { return (columns + 31) / 32; }

constexpr int64_t PART = 4096;  // elements: the maximum is computed by parts, then located in its part

// The logits of a row, or other values of its columns. allowed: bit i % 32 of word i / 32 is set if column i may be
// sampled; the others count as -inf. Null where all may be.
template <typename T>
struct Row {
    const T *values;
    const uint32_t *allowed;

    // The row from column `begin` on, a multiple of 32.
    Row from(int64_t begin) const { return {values + begin, allowed ? allowed + begin / 32 : nullptr}; }

    // The bits of LANES columns.
    uint32_t bits(int64_t i) const { return allowed ? allowed[i / 32] >> i % 32 & 0xffff : 0xffff; }

    Floats vector(int64_t i) const { return keep(bits(i), load(values + i)); }

    float at(int64_t i) const { return bits(i) & 1 ? scalar(values[i]) : -INFINITY; }

    static Floats keep(uint32_t bits, Floats x) {
        return bits == 0xffff ? x : choose(-((Ints{} + int32_t(bits)) >> LANE & 1), x, splat(-INFINITY));
    }
};

// Return the index of the largest of n elements, the first of several; NaN counts as the largest, as in torch.
template <typename T>
int64_t index_of_largest(const Row<T> row, int64_t n) {
    const int64_t whole = n / LANES * LANES;
    float peak = -INFINITY;
    int64_t part = 0;
    for (int64_t begin = 0; begin < whole; begin += PART) {
        const int64_t end = std::min(whole, begin + PART);
        Floats found = splat(-INFINITY);
        Ints has_nan = {};
        for (int64_t i = begin; i < end; i += LANES) {
            if (!row.bits(i)) continue;
            const Floats x = row.vector(i);
            found = larger(x, found);
            has_nan |= is_nan(x);
        }
        if (any(has_nan)) {
            for (int64_t i = begin; i < end; ++i)
                if (std::isnan(row.at(i))) return i;
        }
        if (const float most = largest(found); most > peak) {
            peak = most;
            part = begin;
        }
    }
    int64_t at = part;
    if (whole)
        while (row.at(at) != peak) ++at;
    for (int64_t i = whole; i < n; ++i) {
        const float x = row.at(i);
        if (std::isnan(x)) return i;
        if (x > peak) {
            peak = x;
            at = i;
        }
    }
    return at;
}

constexpr int64_t SHARE = 4096;  // columns of a task
template <typename T>
constexpr T LOWEST = -INFINITY;
template <>
constexpr bfloat16 LOWEST<bfloat16> = {0xff80};
constexpr float BELOW_ONE = 1.0f - 0x1p-24f;

// A bijection of 32-bit integers, as in `layers.sampling`.
template <typename T>
inline T mix(T x) {
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0x735A2D97u;
    return x ^ (x >> 15);
}

// x = 2^n * m with m in [sqrt(1/2), sqrt(2)).
struct Parts {
    Floats n, m;

    explicit Parts(Floats x) {
        const Ints exponent = ((Ints)x - 0x3f3504f3) >> 23;  // 0 from the square root of 1/2 on
        n = to_floats(exponent);
        m = (Floats)((Ints)x - (exponent << 23));
    }
};

// n log 2 + log m, to a few units in the last place, from s = (m - 1) / (m + 1): log m is 2 s (1 + s^2/3 + s^4/5 +
// ...).
inline Floats logarithm(Floats n, Floats s) {
    const Floats z = s * s;
    Floats p = splat(1.0f / 9);
    p = p * z + 1.0f / 7;
    p = p * z + 1.0f / 5;
    p = p * z + 1.0f / 3;
    p = p * z + 1.0f;
    return n * 0.693359375f + (n * -2.12194440e-4f + 2.0f * s * p);  // log 2 in two parts
}

// log x of positive normal numbers.
inline Floats logarithm(Floats x) {
    const Parts parts(x);
    return logarithm(parts.n, (parts.m - 1.0f) / (parts.m + 1.0f));
}

// log(1 - u) for u in (0, 1). For a small u the difference would lose most bits, so it is not computed.
inline Floats log_one_less(Floats u) {
    const Parts parts(1.0f - u);
    const Ints is_small = is_less(u, splat(0.29f));
    const Floats above = choose(is_small, -u, parts.m - 1.0f), below = choose(is_small, 2.0f - u, parts.m + 1.0f);
    return logarithm(choose(is_small, splat(0.0f), parts.n), above / below);
}

struct Noise {
    uint32_t row, again;

    // The hashes of a row's counter (seed, position), as in `ops.noise.uniform_noise`.
    Noise(int64_t seed, int32_t position) {
        row = mix(mix(uint32_t(seed)) ^ mix(uint32_t(seed >> 32) ^ 0x9E3779B9u) ^ uint32_t(position));
        again = mix(row ^ 0x5BD1E995u);
    }

    Floats of(Words tokens) const {
        const Words mixed = mix(mix(tokens ^ row) + again);
        const Floats u = (to_floats(mixed) + 0.5f) * 0x1p-32f;
        return -logarithm(-log_one_less(-larger(-u, splat(-BELOW_ONE))));
    }
};

struct Candidate {
    float value;
    int64_t column;
};

// Return the largest of a row's shares, the first of several; NaN counts as the largest.
Candidate best(const Candidate *found, int64_t shares) {
    Candidate result = found[0];
    for (int64_t share = 1; share < shares && !std::isnan(result.value); ++share)
        if (found[share].value > result.value || std::isnan(found[share].value)) result = found[share];
    return result;
}

template <typename T>
Candidate largest_logit(const Row<T> row, int64_t begin, int64_t end) {
    const int64_t at = begin + index_of_largest(row.from(begin), end - begin);
    return {row.at(at), at};
}

// token_ids: the tokens of the columns; null where they are all tokens in order.
template <typename T>
Candidate largest_sample(const Row<T> row, const int64_t *token_ids, int64_t begin, int64_t end, float most,
                         float temperature, const Noise &noise) {
    alignas(64) float values[SHARE];
    const auto tokens_at = [&](int64_t i) {
        return token_ids ? load_words(token_ids + i) : (Words)LANE + uint32_t(i);
    };
    const auto value_of = [&](Floats x, Words tokens) { return (x - most) / temperature + noise.of(tokens); };
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES)
        store(values + (i - begin), row.bits(i) ? value_of(row.vector(i), tokens_at(i)) : splat(-INFINITY));
    if (i < end) {
        float rest[LANES];
        int64_t tokens[LANES] = {};
        std::fill_n(rest, LANES, -INFINITY);
        for (int64_t lane = 0; i + lane < end; ++lane) {
            rest[lane] = row.at(i + lane);
            tokens[lane] = token_ids ? token_ids[i + lane] : i + lane;
        }
        store(values + (i - begin), value_of(load(rest), load_words(tokens)));
    }
    const int64_t at = index_of_largest(Row<float>{values, nullptr}, end - begin);
    return {values[at], begin + at};
}

}  // namespace

template <typename T>
void argmax(const T *logits, int64_t stride, int64_t rows, int64_t n, const uint32_t *allowed, int64_t *out) {
    parallel_for(rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const uint32_t *own = allowed ? allowed + row * words_of(n) : nullptr;
            out[row] = index_of_largest(Row<T>{logits + row * stride, own}, n);
        }
    });
}

template <typename T>
void sample(const T *logits, int64_t stride, int64_t rows, int64_t n, const float *temperature, const int64_t *seed,
            const int32_t *position, const int64_t *token_ids, const uint32_t *allowed, int64_t *out) {
    const int64_t shares = (n + SHARE - 1) / SHARE, tasks = rows * shares;
    const auto row_of = [&](int64_t row) {
        return Row<T>{logits + row * stride, allowed ? allowed + row * words_of(n) : nullptr};
    };
    static thread_local std::vector<Candidate> kept;
    kept.resize(2 * tasks);
    Candidate *greedy = kept.data(), *sampled = greedy + tasks;
    parallel_for(tasks, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t row = task / shares, begin = task % shares * SHARE;
            greedy[task] = largest_logit(row_of(row), begin, std::min(n, begin + SHARE));
        }
    });
    parallel_for(tasks, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t row = task / shares, begin = task % shares * SHARE;
            if (temperature[row] == 0.0f) continue;
            const float most = best(greedy + row * shares, shares).value;
            sampled[task] = largest_sample(row_of(row), token_ids, begin, std::min(n, begin + SHARE), most,
                                        temperature[row], Noise(seed[row], position[row]));
        }
    });
    for (int64_t row = 0; row < rows; ++row)
        out[row] = best((temperature[row] == 0.0f ? greedy : sampled) + row * shares, shares).column;
}

// Set the logits of columns that are not allowed to -inf. Words of which all bits are set are read and passed over.
template <typename T>
void mask_tokens(T *logits, int64_t stride, int64_t rows, int64_t n, const uint32_t *allowed) {
    const int64_t words = words_of(n);
    parallel_for(rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            T *at = logits + row * stride;
            for (int64_t word = 0; word < words; ++word, at += 32) {
                const uint32_t bits = allowed[row * words + word];
                if (bits == ~0u) continue;
                const int64_t count = std::min<int64_t>(32, n - word * 32);
                for (int64_t i = 0; i < count; ++i)
                    if (!(bits >> i & 1)) at[i] = LOWEST<T>;
            }
        }
    });
}

template void argmax(const bfloat16 *, int64_t, int64_t, int64_t, const uint32_t *, int64_t *);
template void sample(const bfloat16 *, int64_t, int64_t, int64_t, const float *, const int64_t *, const int32_t *,
                     const int64_t *, const uint32_t *, int64_t *);

#define SAMPLING(argmax_name, sample_name, mask_name, T)                                                              \
    extern "C" void argmax_name(const T *logits, int64_t stride, int64_t rows, int64_t n, const uint32_t *allowed,    \
                                int64_t *out) {                                                                       \
        argmax(logits, stride, rows, n, allowed, out);                                                                \
    }                                                                                                                 \
    extern "C" void sample_name(const T *logits, int64_t stride, int64_t rows, int64_t n, const float *temperature,   \
                                const int64_t *seed, const int32_t *position, const int64_t *token_ids,               \
                                const uint32_t *allowed, int64_t *out) {                                              \
        sample(logits, stride, rows, n, temperature, seed, position, token_ids, allowed, out);                        \
    }                                                                                                                 \
    extern "C" void mask_name(T *logits, int64_t stride, int64_t rows, int64_t n, const uint32_t *allowed) {          \
        mask_tokens(logits, stride, rows, n, allowed);                                                                \
    }

SAMPLING(dispec_argmax_bfloat16, dispec_sample_bfloat16, dispec_mask_tokens_bfloat16, bfloat16)
SAMPLING(dispec_argmax_float32, dispec_sample_float32, dispec_mask_tokens_float32, float)
