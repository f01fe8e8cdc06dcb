// What the kernels of AVX512-BF16 and of AMX share: conversions between bf16, codes and float32.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "vectors.h"

using Input = uint16_t;  // bf16

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

// Write pairs as they are in a tile of bf16.
template <size_t PAIRS>
inline void store_pairs(const std::array<PairOfTile, PAIRS> &pairs, uint16_t *to) {
#pragma GCC unroll 2
    for (size_t pair = 0; pair < PAIRS; ++pair) {
        _mm512_store_si512(to + pair * 2 * TILE, (__m512i)pairs[pair].left);
        _mm512_store_si512(to + pair * 2 * TILE + TILE, (__m512i)pairs[pair].right);
    }
}

// Sixteen float16.
inline Floats load_halves(const uint16_t *at) {
    return (Floats)_mm512_cvtph_ps(_mm256_load_si256((const __m256i *)at));
}

// x * y + z, rounded once.
inline Floats fma(Floats x, Floats y, Floats z) { return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }

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
