// Products with tiles: [pairs][32][2] elements of bf16, 32 outputs side by side, two neighbouring elements of what is
// summed over together. They are made for AVX512-BF16, which multiplies and adds both in one instruction, and for AVX2.
//
// Each has `Input`, what it takes rows of x as, made by `put`; `TILE_ROWS`, how many rows share what is read of a tile;
// `ROWS_AT_ONCE`, how many are taken before the first of them meets a tile; and `add_product`.
#pragma once
#if defined(__AVX512BF16__) || (defined(__AVX2__) && defined(__FMA__))
#define DISPEC_TILES  // elsewhere the library lacks what needs them, and whoever loads it sees that
#include <cstdint>

constexpr int TILE = 32;

#ifdef __AVX512BF16__
#include "tiles_avx512.h"
#else
#include "tiles_avx2.h"
#endif
#endif
