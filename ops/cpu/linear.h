// What the GEMMs of linear.cpp share with all instruction sets, see there.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "tiles.h"

// Some rows of x of a GEMM, which are multiplied by all tiles before the next ones: `count` from row `first` of the
// output on. x: normed if there is a norm, rows `stride` elements apart. x_sums: null, or the sums of x over each group
// of columns [count, groups].
struct RowBlock {
    const Linear &p;
    const Input *x;
    int64_t stride, first, count;
    const float *x_sums;
    int64_t groups;

    // Return the place of the first of a tile's outputs for a row.
    int64_t output(int64_t row, int64_t tile) const { return (first + row) * p.outputs() + tile * TILE; }
};

// out = silu(gate) * up (arXiv:2002.05202), 32 elements; both factors are rounded before.
inline void silu_and_mul(const bfloat16 *gate, const bfloat16 *up, bfloat16 *out) {
    for (int64_t i = 0; i < TILE; i += LANES) {
        const Floats x = load(gate + i), e = exp2_negative((Floats)((Ints)x | INT32_MIN) * LOG2_E);
        bfloat16 silu[LANES];
        finish(x * choose((Ints)x >> 31, e, splat(1.0f)) / (e + 1.0f), nullptr, (uint16_t *)silu, LANES);
        finish(load(silu) * load(up + i), nullptr, (uint16_t *)(out + i), LANES);
    }
}

// The same for rows of 32 elements [rows, 32], of which `out` has each `stride` elements apart.
inline void gate_rows(const uint16_t *gates, const uint16_t *ups, int64_t rows, uint16_t *out, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
        silu_and_mul((const bfloat16 *)gates + row * TILE, (const bfloat16 *)ups + row * TILE,
                     (bfloat16 *)out + row * stride);
}
