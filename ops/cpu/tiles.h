// Products with tiles: [pairs][32][2] elements of bf16, 32 outputs side by side, two neighbouring elements of what is
// summed over together, which is what one VDPBF16PS multiplies and adds.
#pragma once
#ifdef __AVX512BF16__
#include <cstdint>
#include <cstring>
#include <immintrin.h>

constexpr int TILE = 32;
constexpr int TILE_ROWS = 12;  // 24 accumulators, 2 registers of the tile, the rest for broadcasts

inline __m512bh as_bf16(__m512i x) { return (__m512bh)x; }

// sums [rows][32] += x [rows, 2 * pairs] times the tile; x's rows are `stride` elements apart. `fetch(pair)` is called
// before a pair is read.
template <int ROWS, typename Fetch>
inline void add_product(__m512 (&sums)[ROWS][2], const uint16_t *x, int64_t stride, const uint16_t *tile, int64_t pairs,
                        Fetch fetch) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint16_t *at = tile + pair * TILE * 2;
        fetch(pair);
        const __m512bh left = as_bf16(_mm512_load_si512(at)), right = as_bf16(_mm512_load_si512(at + TILE));
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            int32_t both;
            std::memcpy(&both, x + row * stride + 2 * pair, 4);
            const __m512bh spread = as_bf16(_mm512_set1_epi32(both));
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], left, spread);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], right, spread);
        }
    }
}
#endif
