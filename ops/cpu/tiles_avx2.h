// Tiles for AVX2, see tiles.h: the two elements of a pair are widened to float32 and multiplied one after the other.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "vectors.h"

using Input = float;  // widened once, not for every tile

constexpr int TILE_ROWS = 6;          // at half a tile 12 accumulators, of 16 registers
constexpr int64_t MAX_ROWS = 48;  // few enough for the second-level cache, enough that GEMMs are no slower

// With more than 3 rows, the left half of the outputs is computed for so many pairs, then the right half: memory is
// read in order.
constexpr int64_t PART = 16;

inline void put(Input *to, Floats x) { store(to, x); }

// One element of a pair, of eight outputs.
inline __m256 eight_of(const uint16_t *pair, int eight, int element) {
    const __m256i both = _mm256_load_si256((const __m256i *)pair + eight);
    return _mm256_castsi256_ps(element ? _mm256_and_si256(both, _mm256_set1_epi32(int32_t(0xffff0000)))
                                       : _mm256_slli_epi32(both, 16));
}

inline __m256 eight_of(const int8_t *pair, int eight, int element) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(pair + element * TILE + 8 * eight));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

// Add to outputs 8 * FIRST to 8 * (FIRST + WIDTH) of a tile.
template <int ROWS, int FIRST, int WIDTH, typename Weight>
inline void add_columns(Floats (&sums)[ROWS][2], const Input *x, int64_t stride, const Weight *tile, int64_t pairs) {
    // Bytes of weight to prefetch: in halves, this half of the next part.
    constexpr int64_t AHEAD = WIDTH == 4 ? 2048 : PART * PAIR<Weight>;
    __m256 found[ROWS][WIDTH];
    // Unrolled like the loops below: otherwise the sums live in memory.
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i) found[row][i] = _mm256_loadu_ps((const float *)sums[row] + 8 * (FIRST + i));
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const Weight *at = tile + pair * TILE * 2;
        constexpr int64_t BYTES = WIDTH * PAIR<Weight> / 4;
        for (int64_t i = 0; i < BYTES; i += 64)
            _mm_prefetch((const char *)at + FIRST * PAIR<Weight> / 4 + i + AHEAD, _MM_HINT_T0);
        // One element of all columns, then the other: the live values fit into the registers.
#pragma GCC unroll 2
        for (int element = 0; element < 2; ++element) {
            const auto column = [&](int i) { return eight_of(at, FIRST + i, element); };
            const auto spread = [&](int row) { return _mm256_broadcast_ss(x + row * stride + 2 * pair + element); };
            if constexpr (WIDTH > ROWS) {
                __m256 spreads[ROWS];
#pragma GCC unroll 6
                for (int row = 0; row < ROWS; ++row) spreads[row] = spread(row);
#pragma GCC unroll 4
                for (int i = 0; i < WIDTH; ++i) {
                    const __m256 each = column(i);
#pragma GCC unroll 6
                    for (int row = 0; row < ROWS; ++row)
                        found[row][i] = _mm256_fmadd_ps(each, spreads[row], found[row][i]);
                }
            } else {
                __m256 columns[WIDTH];
#pragma GCC unroll 4
                for (int i = 0; i < WIDTH; ++i) columns[i] = column(i);
#pragma GCC unroll 6
                for (int row = 0; row < ROWS; ++row) {
                    const __m256 each = spread(row);
#pragma GCC unroll 4
                    for (int i = 0; i < WIDTH; ++i) found[row][i] = _mm256_fmadd_ps(columns[i], each, found[row][i]);
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i) _mm256_storeu_ps((float *)sums[row] + 8 * (FIRST + i), found[row][i]);
}

// sums [rows][32] += x [rows, k] times the tile; x's rows are `stride` elements apart, with a zero after an odd number.
template <int ROWS, typename Weight, typename Fetch>
inline void multiply_add(Floats (&sums)[ROWS][2], const Input *x, int64_t stride, const Weight *tile, int64_t k,
                        Fetch) {
    const int64_t pairs = (k + 1) / 2;
    if constexpr (ROWS <= 3) {
        add_columns<ROWS, 0, 4>(sums, x, stride, tile, pairs);
    } else {
        for (int64_t pair = 0; pair < pairs; pair += PART) {
            const Weight *at = tile + pair * TILE * 2;
            const int64_t count = std::min(PART, pairs - pair);
            add_columns<ROWS, 0, 2>(sums, x + 2 * pair, stride, at, count);
            add_columns<ROWS, 2, 2>(sums, x + 2 * pair, stride, at, count);
        }
    }
}

// Write the first `width` of sixteen sums to `to`, rounded; with `residual`, add it and round again.
inline void finish(Floats sums, const uint16_t *residual, uint16_t *to, int64_t width) {
    if (width <= 0) return;
    bfloat16 rounded[LANES], added[LANES] = {};
    const int64_t bytes = std::min<int64_t>(width, LANES) * sizeof(bfloat16);
    store(rounded, sums);
    if (residual) {
        std::memcpy(added, residual, bytes);
        store(rounded, load(rounded) + load(added));
    }
    std::memcpy(to, rounded, bytes);
}
