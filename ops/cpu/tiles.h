// GEMM with tiles of 32 output features side by side. A pair is two neighbouring elements of the summed dimension. In
// bf16 a tile is [pairs][32][2]. In int4 and int8 it is a sequence of groups of columns: the codes of a group, 32
// float16 scales, and 32 float16 offsets where the weight has offsets. Codes of int8 are [pairs][32][2] bytes. Codes of
// int4 are [pairs / 2][32] words of 16 bits. Word i has element i % 2 of output i / 2 of the first pair in its lowest
// four bits, then that of output 16 + i / 2, then both of the second pair. Missing outputs and columns are zeros.
//
// There are three implementations: AMX, which multiplies 16 rows by a tile in one instruction; AVX512-BF16, which
// multiplies and adds two bf16 in one instruction; and AVX2.
//
// Each has `Input`, the element type of x in the GEMM; `put`, which stores sixteen of them; `TILE_ROWS`, the rows of x
// that share each load of a tile; `MAX_ROWS`, the rows of x that are multiplied by all tiles before the next ones;
// `multiply_rows`, `rows_of_group` and `TileState`; and `load_halves`, `fma` and `finish`. Those whose sums are in
// vector registers have `multiply_add` and what register_tiles.h and linear_registers.h use beside it.
#pragma once
#include <cstdint>

constexpr int TILE = 32;

// A byte with two codes of int4.
struct Int4 {
    uint8_t codes;
};

// Bytes of a pair of a tile.
template <typename Weight>
constexpr int64_t PAIR = 2 * TILE * sizeof(Weight);
template <>
constexpr int64_t PAIR<Int4> = TILE;

// Pairs that a cache line of a tile has, or 1 where they are longer.
template <typename Weight>
constexpr int64_t PAIRS_OF_LINE = PAIR<Weight> < 64 ? 64 / PAIR<Weight> : 1;

// Pairs of `columns` columns, in whole cache lines.
template <typename Weight>
constexpr int64_t padded_pairs(int64_t columns) {
    constexpr int64_t COLUMNS = 2 * PAIRS_OF_LINE<Weight>;
    return (columns + COLUMNS - 1) / COLUMNS * PAIRS_OF_LINE<Weight>;
}

template <typename Weight>
inline const Weight *pair_of(const Weight *tile, int64_t pair) {
    return (const Weight *)((const char *)tile + pair * PAIR<Weight>);
}

// A product of multiply_rows: x [rows, columns] times tiles of bf16, `tile_stride` elements apart, for all outputs
// below `outputs`.
template <typename Input>
struct RowsProductOf {
    const Input *x;
    int64_t stride;
    const uint16_t *tiles;
    int64_t tile_stride, outputs, columns;
};

#if defined(DISPEC_AMX) && (defined(__AMX_BF16__) || defined(DISPEC_AMX_EMULATED))
#define DISPEC_AMX_TILES
#include "tiles_amx.h"
constexpr const char *INSTRUCTION_SET = "amx";
#elif defined(__AVX512BF16__)
#include "tiles_avx512.h"
constexpr const char *INSTRUCTION_SET = "avx512";
#else
#include "tiles_avx2.h"
constexpr const char *INSTRUCTION_SET = "avx2";
#endif
#ifndef DISPEC_AMX_TILES
#include "register_tiles.h"
#endif
