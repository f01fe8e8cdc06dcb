// Tiles for AVX512-BF16, see tiles.h: one VDPBF16PS multiplies and adds a pair of sixteen outputs.
#pragma once
#include <array>
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

// The pairs of a cache line of a tile, or one pair of bf16.
template <typename Weight>
using PairsOfLine = std::array<PairOfTile, PAIRS_OF_LINE<Weight>>;

inline PairsOfLine<uint16_t> load_pairs(const uint16_t *at) {
    return {{{(__m512bh)_mm512_load_si512(at), (__m512bh)_mm512_load_si512(at + TILE)}}};
}

// int8 is exact in bf16.
inline PairsOfLine<int8_t> load_pairs(const int8_t *at) {
    const auto sixteen = [&](int64_t i) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)at + i)));
    };
    return {{{_mm512_cvtne2ps_pbh(sixteen(1), sixteen(0)), _mm512_cvtne2ps_pbh(sixteen(3), sixteen(2))}}};
}

// The lowest four bits of a word choose one of sixteen bf16, which the table has twice: the bit above does not matter.
inline PairsOfLine<Int4> load_pairs(const Int4 *at) {
    alignas(64) static constexpr uint16_t TABLE[] = {
        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
        0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    const __m512i table = _mm512_load_si512(TABLE), words = _mm512_load_si512(at);
    const auto values = [&](__m512i codes) { return (__m512bh)_mm512_permutexvar_epi16(codes, table); };
    return {{{values(words), values(_mm512_srli_epi16(words, 4))},
             {values(_mm512_srli_epi16(words, 8)), values(_mm512_srli_epi16(words, 12))}}};
}

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

// Write pairs as they are in a tile of bf16.
template <size_t PAIRS>
inline void store_pairs(const std::array<PairOfTile, PAIRS> &pairs, uint16_t *to) {
#pragma GCC unroll 2
    for (size_t pair = 0; pair < PAIRS; ++pair) {
        _mm512_store_si512(to + pair * 2 * TILE, (__m512i)pairs[pair].left);
        _mm512_store_si512(to + pair * 2 * TILE + TILE, (__m512i)pairs[pair].right);
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

// Sixteen float16.
inline Floats load_halves(const uint16_t *at) {
    return (Floats)_mm512_cvtph_ps(_mm256_load_si256((const __m256i *)at));
}

// x * y + z, rounded once.
inline Floats fma(Floats x, Floats y, Floats z) { return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }

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
