// Tiles for AVX512-BF16, see tiles.h: one VDPBF16PS multiplies and adds a pair of sixteen outputs.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "vectors.h"

using Input = uint16_t;  // bf16

constexpr int TILE_ROWS = 12;  // 24 accumulators, 2 registers of the tile, the rest for broadcasts
constexpr int64_t MAX_ROWS = INT64_MAX;

inline void put(Input *to, Floats x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }

struct PairOfTile {
    __m512bh left, right;
};

inline PairOfTile load_pair(const uint16_t *at) {
    return {(__m512bh)_mm512_load_si512(at), (__m512bh)_mm512_load_si512(at + TILE)};
}

// int8 is exact in bf16: the lower half of each float32 is zero.
inline PairOfTile load_pair(const int8_t *at) {
    const auto sixteen = [&](int64_t i) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(at + i));
        return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    };
    const auto both = [](__m512i first, __m512i second) {
        return (__m512bh)_mm512_or_si512(second, _mm512_srli_epi32(first, 16));
    };
    return {both(sixteen(0), sixteen(TILE)), both(sixteen(LANES), sixteen(TILE + LANES))};
}

template <int ROWS, typename Weight>
inline void add_pair(Floats (&sums)[ROWS][2], const Weight *at, const int32_t (&both)[ROWS]) {
    const auto [left, right] = load_pair(at);
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
        const __m512bh spread = (__m512bh)_mm512_set1_epi32(both[row]);
        sums[row][0] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][0], left, spread);
        sums[row][1] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][1], right, spread);
    }
}

// sums [rows][32] += x [rows, k] times the tile; x's rows are `stride` elements apart. `fetch(pair)` is called before a
// pair is read.
template <int ROWS, typename Weight, typename Fetch>
inline void multiply_add(Floats (&sums)[ROWS][2], const Input *x, int64_t stride, const Weight *tile, int64_t k,
                        Fetch fetch) {
    int32_t both[ROWS];
    for (int64_t pair = 0; pair < k / 2; ++pair) {
        fetch(pair);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) std::memcpy(&both[row], x + row * stride + 2 * pair, 4);
        add_pair<ROWS>(sums, tile + pair * TILE * 2, both);
    }
    if (k % 2) {
        for (int row = 0; row < ROWS; ++row) both[row] = x[row * stride + k - 1];
        add_pair<ROWS>(sums, tile + k / 2 * TILE * 2, both);
    }
}

// Write the first `width` of sixteen sums to `to`, rounded; with `residual`, add it and round again.
inline void finish(Floats sums, const uint16_t *residual, uint16_t *to, int64_t width) {
    const __mmask16 mask = _cvtu32_mask16(width >= 16 ? 0xffff : width > 0 ? (1u << width) - 1 : 0);
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)sums);
    if (residual) {
        const auto widened = [](__m256i x) {
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
        };
        rounded = (__m256i)_mm512_cvtneps_pbh(widened(rounded) + widened(_mm256_maskz_loadu_epi16(mask, residual)));
    }
    _mm256_mask_storeu_epi16(to, mask, rounded);
}
