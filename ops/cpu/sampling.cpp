// A token of each row, drawn: the largest of logits / temperature + Gumbel noise, as `layers.sampling.draw` defines it.
//
// Nothing that is as long as the vocabulary is written: noise is made for a part of a row at a time, and of each part
// only the largest is kept.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "entries.h"
#include "largest.h"
#include "thread_pool.h"

namespace {

typedef int64_t Longs __attribute__((vector_size(128), aligned(8), may_alias));

constexpr int64_t SHARE = 4096;  // columns that a thread takes at a time
constexpr float BELOW_ONE = 1.0f - 0x1p-24f;

// As `layers.sampling._mix`.
template <typename T>
inline T mix(T x) {
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0x735A2D97u;
    return x ^ (x >> 15);
}

// x = 2^n * m, m around 1.
struct Parts {
    Floats n, m;

    explicit Parts(Floats x) {
        const Ints exponent = ((Ints)x - 0x3f3504f3) >> 23;  // counted from the square root of 1/2
        n = __builtin_convertvector(exponent, Floats);
        m = (Floats)((Ints)x - (exponent << 23));
    }
};

// n log 2 + log m, to a few units in the last place, from s = (m - 1) / (m + 1): log m is 2 s (1 + s^2/3 + s^4/5 + ...).
inline Floats logarithm(Floats n, Floats s) {
    const Floats z = s * s;
    Floats p = splat(1.0f / 9);
    p = p * z + 1.0f / 7;
    p = p * z + 1.0f / 5;
    p = p * z + 1.0f / 3;
    p = p * z + 1.0f;
    return n * 0.693359375f + (n * -2.12194440e-4f + 2.0f * s * p);  // log 2 in two parts
}

// For positive normal numbers.
inline Floats logarithm(Floats x) {
    const Parts parts(x);
    return logarithm(parts.n, (parts.m - 1.0f) / (parts.m + 1.0f));
}

// log(1 - u) for u in (0, 1); for a small u without the difference, which would lose most of it.
inline Floats log_one_less(Floats u) {
    const Parts parts(1.0f - u);
    const Ints is_small = is_less(u, splat(0.29f));
    const Floats above = choose(is_small, -u, parts.m - 1.0f), below = choose(is_small, 2.0f - u, parts.m + 1.0f);
    return logarithm(choose(is_small, splat(0.0f), parts.n), above / below);
}

struct Noise {
    uint32_t row, again;

    // As `layers.sampling.uniform_noise` makes them.
    Noise(int64_t seed, int32_t position) {
        row = mix(mix(uint32_t(seed)) ^ mix(uint32_t(seed >> 32) ^ 0x9E3779B9u) ^ uint32_t(position));
        again = mix(row ^ 0x5BD1E995u);
    }

    Floats of(Words tokens) const {
        const Words mixed = mix(mix(tokens ^ row) + again);
        const Floats u = (__builtin_convertvector(mixed, Floats) + 0.5f) * 0x1p-32f;
        return -logarithm(-log_one_less(-larger(-u, splat(-BELOW_ONE))));
    }
};

struct Found {
    float value;
    int64_t column;
};

// Of the shares of a row, in order.
Found best(const Found *found, int64_t shares) {
    Found result = found[0];
    for (int64_t share = 1; share < shares && !std::isnan(result.value); ++share)
        if (found[share].value > result.value || std::isnan(found[share].value)) result = found[share];
    return result;
}

template <typename T>
Found largest_logit(const T *row, int64_t begin, int64_t end) {
    const int64_t at = begin + largest_of(row + begin, end - begin);
    return {scalar(row[at]), at};
}

// token_ids null: the columns are the tokens in order.
template <typename T>
Found largest_drawn(const T *row, const int64_t *token_ids, int64_t begin, int64_t end, float most, float temperature,
                    const Noise &noise) {
    constexpr Words ORDER = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    alignas(64) float values[SHARE];
    const auto names = [&](int64_t i) {
        return token_ids ? __builtin_convertvector(*(const Longs *)(token_ids + i), Words) : ORDER + uint32_t(i);
    };
    const auto drawn_by = [&](Floats x, Words tokens) { return (x - most) / temperature + noise.of(tokens); };
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) store(values + (i - begin), drawn_by(load(row + i), names(i)));
    if (i < end) {
        T rest[LANES] = {};
        Words tokens = {};
        std::copy(row + i, row + end, rest);
        for (int64_t lane = 0; i + lane < end; ++lane)
            tokens[lane] = uint32_t(token_ids ? token_ids[i + lane] : i + lane);
        store(values + (i - begin), drawn_by(load(rest), tokens));
    }
    const int64_t at = largest_of(values, end - begin);
    return {values[at], begin + at};
}

template <typename T>
void draw(const T *logits, int64_t stride, int64_t rows, int64_t n, const float *temperature, const int64_t *seed,
          const int32_t *position, const int64_t *token_ids, int64_t *out) {
    const int64_t shares = (n + SHARE - 1) / SHARE, tasks = rows * shares;
    static thread_local std::vector<Found> kept;
    kept.resize(2 * tasks);
    Found *plain = kept.data(), *drawn = plain + tasks;
    parallel_for(tasks, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t row = task / shares, begin = task % shares * SHARE;
            plain[task] = largest_logit(logits + row * stride, begin, std::min(n, begin + SHARE));
        }
    });
    parallel_for(tasks, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t row = task / shares, begin = task % shares * SHARE;
            if (temperature[row] == 0.0f) continue;
            const float most = best(plain + row * shares, shares).value;
            drawn[task] = largest_drawn(logits + row * stride, token_ids, begin, std::min(n, begin + SHARE), most,
                                        temperature[row], Noise(seed[row], position[row]));
        }
    });
    for (int64_t row = 0; row < rows; ++row)
        out[row] = best((temperature[row] == 0.0f ? plain : drawn) + row * shares, shares).column;
}

}  // namespace

extern "C" void dispec_sample_bfloat16(const bfloat16 *logits, int64_t stride, int64_t rows, int64_t n,
                                     const float *temperature, const int64_t *seed, const int32_t *position,
                                     const int64_t *token_ids, int64_t *out) {
    draw(logits, stride, rows, n, temperature, seed, position, token_ids, out);
}

extern "C" void dispec_sample_float32(const float *logits, int64_t stride, int64_t rows, int64_t n,
                                    const float *temperature, const int64_t *seed, const int32_t *position,
                                    const int64_t *token_ids, int64_t *out) {
    draw(logits, stride, rows, n, temperature, seed, position, token_ids, out);
}
