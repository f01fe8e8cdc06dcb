// Products with tiles of 32 outputs side by side. In bf16 they are [pairs][32][2], two neighbouring elements of what is
// summed over together; in 8 bits [2 * pairs][32], of numbers that a factor for each output follows, 32 of float32.
// They are made for AVX512-BF16, which multiplies and adds two bf16 in one instruction, and for AVX2.
//
// Each has `Input`, what it takes rows of x as, made by `put`; `TILE_ROWS`, how many rows share what is read of a tile;
// `ROWS_AT_ONCE`, how many are taken before the first of them meets a tile; and `add_product`, for both kinds of tile.
#pragma once
#if defined(__AVX512BF16__) || (defined(__AVX2__) && defined(__FMA__))
#define DISPEC_TILES  // elsewhere the library lacks what needs them, and whoever loads it sees that
#include <cstdint>

constexpr int TILE = 32;

// Bytes of a tile's pair, and of what follows its last.
template <typename Weight>
constexpr int64_t PAIR = 2 * TILE * sizeof(Weight);
template <typename Weight>
constexpr int64_t FACTORS = sizeof(Weight) == 1 ? TILE * sizeof(float) : 0;

#ifdef __AVX512BF16__
#include "tiles_avx512.h"
#else
#include "tiles_avx2.h"
#endif
#endif
