// Tiles for AVX512-BF16, see tiles.h: one VDPBF16PS multiplies and adds a pair of sixteen outputs.
#pragma once
#include "bfloat16_avx512.h"

constexpr int TILE_ROWS = 12;  // 24 accumulators, 2 registers of the tile, the rest for broadcasts
constexpr int64_t MAX_ROWS = INT64_MAX;

// spread(pair, row): the two elements of x that multiply a pair, as 32 bits.
template <int ROWS, size_t PAIRS, typename Spread>
inline void add_pairs(Floats (&sums)[ROWS][2], const std::array<PairOfTile, PAIRS> &pairs, const Spread &spread) {
#pragma GCC unroll 2
    for (size_t pair = 0; pair < PAIRS; ++pair) {
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(spread(pair, row));
            sums[row][0] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][0], pairs[pair].left, both);
            sums[row][1] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][1], pairs[pair].right, both);
        }
    }
}

// sums [rows][32] += x [rows, k] times the tile; x's rows are `stride` elements apart. `fetch(pair)` is called before a
// pair is read, in int4 before two are. unpacked: where the tile is written in bf16, in whole cache lines of codes; may
// be null.
template <int ROWS, typename Weight, typename Fetch>
inline void multiply_add(Floats (&sums)[ROWS][2], const Input *x, int64_t stride, const Weight *tile, int64_t k,
                        Fetch fetch, uint16_t *unpacked = nullptr) {
    constexpr int64_t PAIRS = PAIRS_OF_LINE<Weight>;
    // One pointer to three rows: an address can have a register times 1 or 2. The compiler would keep a pointer to each
    // row, most of them in memory, if the empty assembly did not hide what they have in common.
    const int64_t bytes = stride * sizeof(Input);
    const char *first = (const char *)x, *second = first + 3 * bytes, *third = second + 3 * bytes;
    const char *fourth = third + 3 * bytes;
    int64_t pair = 0;
    for (; pair < k / (2 * PAIRS) * PAIRS; pair += PAIRS) {
        fetch(pair);
        const auto pairs = load_pairs(pair_of(tile, pair));
        if (unpacked) store_pairs(pairs, unpacked + pair * 2 * TILE);
        add_pairs<ROWS>(sums, pairs, [&](int64_t i, int row) {
            int32_t both;
            const char *rows = row < 3 ? first : row < 6 ? second : row < 9 ? third : fourth;
            std::memcpy(&both, rows + row % 3 * bytes + i * 4, 4);
            return both;
        });
        first += 4 * PAIRS, second += 4 * PAIRS, third += 4 * PAIRS, fourth += 4 * PAIRS;
        asm("" : "+r"(first));
        asm("" : "+r"(second));
        asm("" : "+r"(third));
        asm("" : "+r"(fourth));
    }
    if (const int64_t rest = k - 2 * pair) {
        const auto pairs = load_pairs(pair_of(tile, pair));
        if (unpacked) store_pairs(pairs, unpacked + pair * 2 * TILE);
        add_pairs<ROWS>(sums, pairs, [&](int64_t i, int row) {
            const Input *at = x + row * stride + 2 * (pair + i);
            return (2 * i < rest ? at[0] : 0) | (2 * i + 1 < rest ? at[1] << 16 : 0);
        });
    }
}

template <int ROWS>
inline void clear(Floats (&sums)[ROWS][2]) {
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) sums[row][0] = sums[row][1] = Floats{};
}

// totals += sums * scales
template <int ROWS>
inline void add_scaled(Floats (&totals)[ROWS][2], const Floats (&sums)[ROWS][2], const Floats (&scales)[2]) {
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
            totals[row][half] = fma(sums[row][half], scales[half], totals[row][half]);
}

// totals += offsets * x_sums, of which rows are `stride` elements apart
template <int ROWS>
inline void add_offsets(Floats (&totals)[ROWS][2], const Floats (&offsets)[2], const float *x_sums, int64_t stride) {
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
            totals[row][half] = fma(offsets[half], splat(x_sums[row * stride]), totals[row][half]);
}
