// GEMM with tiles of 32 output features side by side. In bf16 a tile is [pairs][32][2], where a pair is two
// neighbouring elements of the summed dimension. In int8 it is [2 * pairs][32], followed by a float32 factor of each of
// the 32 outputs. There are two implementations: AVX512-BF16, which multiplies and adds two bf16 in one instruction,
// and AVX2.
//
// Each has `Input`, the element type of x in the GEMM; `put`, which stores sixteen of them; `TILE_ROWS`, the rows of x
// that share each load of a tile; `MAX_ROWS`, the rows of x that are multiplied by all tiles before the next ones; and
// `multiply_add` and `finish`.
#pragma once
#include <cstdint>

constexpr int TILE = 32;

// Bytes of a pair of a tile, and of the factors after its last pair.
template <typename Weight>
constexpr int64_t PAIR = 2 * TILE * sizeof(Weight);
template <typename Weight>
constexpr int64_t FACTORS = sizeof(Weight) == 1 ? TILE * sizeof(float) : 0;

#ifdef __AVX512BF16__
#include "tiles_avx512.h"
#else
#include "tiles_avx2.h"
#endif
