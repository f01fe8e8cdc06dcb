// Products by a tile of bf16 whose sums are in vector registers (AVX512-BF16 and AVX2), see tiles.h.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

using RowsProduct = RowsProductOf<Input>;

// AMX has registers to configure.
struct TileState {
    explicit TileState(int64_t) {}
};

template <int ROWS, typename Start, typename Finish>
void multiply_rows_of(const RowsProduct &p, const Start &start, const Finish &finish) {
    for (int64_t output = 0; output < p.outputs; output += TILE) {
        Floats sums[ROWS][2] = {};
        if constexpr (!std::is_same_v<Start, std::nullptr_t>)
#pragma GCC unroll 12
            for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) sums[row][half] = start(row, output + half * LANES);
        multiply_add<ROWS>(sums, p.x, p.stride, p.tiles + output / TILE * p.tile_stride, p.columns, [](int64_t) {});
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) finish(row, output + half * LANES, sums[row][half]);
    }
}

template <typename Start, typename Finish, int... ROWS>
constexpr auto multiply_rows_table(std::integer_sequence<int, ROWS...>) {
    using Multiply = void (*)(const RowsProduct &, const Start &, const Finish &);
    return std::array<Multiply, 1 + sizeof...(ROWS)>{nullptr, multiply_rows_of<1 + ROWS, Start, Finish>...};
}

// Multiply up to TILE_ROWS rows. Sums begin with start(row, output), of sixteen outputs, or with zeros for a nullptr;
// finish(row, output, sums) takes them. In AVX2, a zero follows an odd number of columns.
template <typename Start, typename Finish>
inline void multiply_rows(int64_t rows, const RowsProduct &p, const Start &start, const Finish &finish) {
    static constexpr auto TABLE = multiply_rows_table<Start, Finish>(std::make_integer_sequence<int, TILE_ROWS>());
    TABLE[rows](p, start, finish);
}

// Rows of a group where `rows` rows are multiplied in groups of nearly equal size.
inline int64_t rows_of_group(int64_t rows) {
    const int64_t groups = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return (rows + groups - 1) / groups;
}
