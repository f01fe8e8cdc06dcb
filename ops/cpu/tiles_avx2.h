// Tiles for AVX2, see tiles.h: the two elements of a pair are widened to float32 and multiplied one after the other.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

#include "vectors.h"

using Input = float;  // widened once, not for every tile

constexpr int TILE_ROWS = 6;          // at half a tile 12 accumulators, of 16 registers
constexpr int64_t MAX_ROWS = 48;  // few enough for the second-level cache, enough that GEMMs are no slower

// With more than 3 rows, the left half of the outputs is computed for so many pairs, then the right half: memory is
// read in order.
constexpr int64_t PART = 64;

inline void put(Input *to, Floats x) { store(to, x); }

constexpr int64_t UNPACK_AHEAD = 2048;  // bytes of codes that are prefetched

// One element of a pair of a tile, of eight outputs.
inline __m256 eight_of(const uint16_t *tile, int64_t pair, int eight, int element) {
    const __m256i both = _mm256_load_si256((const __m256i *)pair_of(tile, pair) + eight);
    return _mm256_castsi256_ps(element ? _mm256_and_si256(both, _mm256_set1_epi32(int32_t(0xffff0000)))
                                       : _mm256_slli_epi32(both, 16));
}

inline __m256 eight_of(const int8_t *tile, int64_t pair, int eight, int element) {
    const __m256i both = _mm256_cvtepi16_epi32(_mm_load_si128((const __m128i *)pair_of(tile, pair) + eight));
    return _mm256_cvtepi32_ps(element ? _mm256_srai_epi32(both, 8)
                                      : _mm256_srai_epi32(_mm256_slli_epi32(both, 24), 24));
}

inline __m256 eight_of(const Int4 *tile, int64_t pair, int eight, int element) {
    const __m256i words = _mm256_load_si256((const __m256i *)pair_of(tile, pair / 2 * 2) + eight % 2);
    const int at = 16 * element + 8 * int(pair % 2) + 4 * (eight / 2);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(words, _mm_cvtsi32_si128(28 - at)), 28));
}

// sum += x * y. As an intrinsic, GCC puts the result of some into the register of a factor and spills the sums. In int4
// it spills with the instruction: 4 rows take 1.6 times as long.
template <typename Weight>
inline void add_product(__m256 &sum, __m256 x, __m256 y) {
    if constexpr (std::is_same_v<Weight, Int4>) sum = _mm256_fmadd_ps(x, y, sum);
    else asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(y));
}

// Add to outputs 8 * FIRST to 8 * (FIRST + WIDTH) of a tile. Inlined into a loop over groups of columns, the sums would
// live in memory, which takes a quarter longer.
template <int ROWS, int FIRST, int WIDTH, typename Weight>
[[gnu::noinline]] void add_columns(Floats (&sums)[ROWS][2], const Input *x, int64_t stride, const Weight *tile,
                                   int64_t pairs) {
    // Bytes of weight to prefetch: in halves, this half of the next part.
    constexpr int64_t AHEAD = WIDTH == 4 ? 2048 : PART * PAIR<Weight>;
    __m256 found[ROWS][WIDTH];
    // Unrolled like the loops below: otherwise the sums live in memory.
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i) found[row][i] = _mm256_loadu_ps((const float *)sums[row] + 8 * (FIRST + i));
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const Weight *at = pair_of(tile, pair);
        constexpr int64_t BYTES = WIDTH * PAIR<Weight> / 4;
        for (int64_t i = 0; i < BYTES; i += 64)
            _mm_prefetch((const char *)at + FIRST * PAIR<Weight> / 4 + i + AHEAD, _MM_HINT_T0);
        // One element of all columns, then the other: the live values fit into the registers.
#pragma GCC unroll 2
        for (int element = 0; element < 2; ++element) {
            const auto column = [&](int i) { return eight_of(tile, pair, FIRST + i, element); };
            const auto spread = [&](int row) { return _mm256_broadcast_ss(x + row * stride + 2 * pair + element); };
            if constexpr (WIDTH > ROWS) {
                __m256 spreads[ROWS];
#pragma GCC unroll 6
                for (int row = 0; row < ROWS; ++row) spreads[row] = spread(row);
#pragma GCC unroll 4
                for (int i = 0; i < WIDTH; ++i) {
                    const __m256 each = column(i);
#pragma GCC unroll 6
                    for (int row = 0; row < ROWS; ++row) add_product<Weight>(found[row][i], each, spreads[row]);
                }
            } else {
                __m256 columns[WIDTH];
#pragma GCC unroll 4
                for (int i = 0; i < WIDTH; ++i) columns[i] = column(i);
#pragma GCC unroll 6
                for (int row = 0; row < ROWS; ++row) {
                    const __m256 each = spread(row);
#pragma GCC unroll 4
                    for (int i = 0; i < WIDTH; ++i) add_product<Weight>(found[row][i], columns[i], each);
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i) _mm256_storeu_ps((float *)sums[row] + 8 * (FIRST + i), found[row][i]);
}

// Write `pairs` pairs as a tile of bf16, in which integers are exact.
template <typename Weight>
inline void unpack_pairs(const Weight *codes, int64_t pairs, uint16_t *to) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
        _mm_prefetch((const char *)pair_of(codes, pair) + UNPACK_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int eight = 0; eight < 4; ++eight, to += 16) {
            const auto element = [&](int i) { return _mm256_castps_si256(eight_of(codes, pair, eight, i)); };
            _mm256_store_si256((__m256i *)to, _mm256_or_si256(_mm256_srli_epi32(element(0), 16), element(1)));
        }
    }
}

// sums [rows][32] += x [rows, k] times the tile; x's rows are `stride` elements apart, with a zero after an odd number.
// unpacked: where the tile is written in bf16; may be null.
template <int ROWS, typename Weight, typename Fetch>
inline void multiply_add(Floats (&sums)[ROWS][2], const Input *x, int64_t stride, const Weight *tile, int64_t k,
                        Fetch fetch, uint16_t *unpacked = nullptr) {
    const int64_t pairs = (k + 1) / 2;
    if constexpr (sizeof(Weight) == 1) {
        if (unpacked) {
            unpack_pairs(tile, pairs, unpacked);
            return multiply_add<ROWS>(sums, x, stride, (const uint16_t *)unpacked, k, fetch);
        }
    }
    if constexpr (ROWS <= 3) {
        add_columns<ROWS, 0, 4>(sums, x, stride, tile, pairs);
    } else {
        for (int64_t pair = 0; pair < pairs; pair += PART) {
            const Weight *at = pair_of(tile, pair);
            const int64_t count = std::min(PART, pairs - pair);
            add_columns<ROWS, 0, 2>(sums, x + 2 * pair, stride, at, count);
            add_columns<ROWS, 2, 2>(sums, x + 2 * pair, stride, at, count);
        }
    }
}

// Sixteen float16.
inline Floats load_halves(const uint16_t *at) {
    return {(EightFloats)_mm256_cvtph_ps(_mm_load_si128((const __m128i *)at)),
            (EightFloats)_mm256_cvtph_ps(_mm_load_si128((const __m128i *)at + 1))};
}

// x * y + z, rounded once.
inline Floats fma(Floats x, Floats y, Floats z) {
    return {(EightFloats)_mm256_fmadd_ps((__m256)x.low, (__m256)y.low, (__m256)z.low),
            (EightFloats)_mm256_fmadd_ps((__m256)x.high, (__m256)y.high, (__m256)z.high)};
}

// The next three in whole registers: GCC moves `Floats` in pieces of 16 bytes, of which loads of 32 bytes wait.
template <int ROWS>
inline void clear(Floats (&sums)[ROWS][2]) {
    for (int i = 0; i < 4 * ROWS; ++i) _mm256_storeu_ps((float *)sums + 8 * i, _mm256_setzero_ps());
}

// totals += sums * scales
template <int ROWS>
inline void add_scaled(Floats (&totals)[ROWS][2], const Floats (&sums)[ROWS][2], const Floats (&scales)[2]) {
    for (int eight = 0; eight < 4; ++eight) {
        const __m256 scale = _mm256_loadu_ps((const float *)scales + 8 * eight);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; ++row) {
            float *total = (float *)totals[row] + 8 * eight;
            const __m256 sum = _mm256_loadu_ps((const float *)sums[row] + 8 * eight);
            _mm256_storeu_ps(total, _mm256_fmadd_ps(sum, scale, _mm256_loadu_ps(total)));
        }
    }
}

// totals += offsets * x_sums, of which rows are `stride` elements apart
template <int ROWS>
inline void add_offsets(Floats (&totals)[ROWS][2], const Floats (&offsets)[2], const float *x_sums, int64_t stride) {
    for (int eight = 0; eight < 4; ++eight) {
        const __m256 offset = _mm256_loadu_ps((const float *)offsets + 8 * eight);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; ++row) {
            float *total = (float *)totals[row] + 8 * eight;
            const __m256 sum = _mm256_broadcast_ss(x_sums + row * stride);
            _mm256_storeu_ps(total, _mm256_fmadd_ps(offset, sum, _mm256_loadu_ps(total)));
        }
    }
}

// Write the first `width` of sixteen sums to `to`, rounded; with `residual`, add it and round again.
inline void finish(Floats sums, const uint16_t *residual, uint16_t *to, int64_t width) {
    if (width >= LANES) {
        if (residual) sums = (Floats)(bfloat16_bits(sums) << 16) + load((const bfloat16 *)residual);
        return store((bfloat16 *)to, sums);
    }
    if (width <= 0) return;
    bfloat16 rounded[LANES], added[LANES] = {};
    const int64_t bytes = width * sizeof(bfloat16);
    store(rounded, sums);
    if (residual) {
        std::memcpy(added, residual, bytes);
        store(rounded, load(rounded) + load(added));
    }
    std::memcpy(to, rounded, bytes);
}
