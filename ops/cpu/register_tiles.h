// Products by a tile of bf16 whose sums are in vector registers (AVX512-BF16 and AVX2), see tiles.h.
#pragma once
#include <array>
#include <cstdint>
#include <utility>

// AMX has registers to configure.
struct TileState {
    explicit TileState(int64_t) {}
};

template <int ROWS>
void multiply_rows_of(const Input *x, int64_t stride, const uint16_t *tile, int64_t columns, float *sums,
                      int64_t sums_stride, bool adds) {
    Floats found[ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
            found[row][half] = adds ? load(sums + row * sums_stride + half * LANES) : Floats{};
    multiply_add<ROWS>(found, x, stride, tile, columns, [](int64_t) {});
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) store(sums + row * sums_stride + half * LANES, found[row][half]);
}

using MultiplyRows = void (*)(const Input *, int64_t, const uint16_t *, int64_t, float *, int64_t, bool);

template <int... ROWS>
constexpr std::array<MultiplyRows, 1 + sizeof...(ROWS)> multiply_rows_table(std::integer_sequence<int, ROWS...>) {
    return {nullptr, multiply_rows_of<1 + ROWS>...};
}

// sums [rows][32] = x [rows, columns] times a tile of bf16, or += that. rows: at most TILE_ROWS. The rows of the sums
// are `sums_stride` elements apart. In AVX2, a zero follows an odd number of columns.
inline void multiply_rows(int64_t rows, const Input *x, int64_t stride, const uint16_t *tile, int64_t columns,
                          float *sums, int64_t sums_stride, bool adds) {
    constexpr auto TABLE = multiply_rows_table(std::make_integer_sequence<int, TILE_ROWS>());
    TABLE[rows](x, stride, tile, columns, sums, sums_stride, adds);
}

// Rows of a group where `rows` rows are multiplied in groups of nearly equal size.
inline int64_t rows_of_group(int64_t rows) {
    const int64_t groups = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return (rows + groups - 1) / groups;
}
