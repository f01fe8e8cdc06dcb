// Tiles for AMX, see tiles.h: one TDPBF16PS multiplies 16 rows of 32 columns by 16 pairs of 16 outputs. 16 pairs of a
// tile are rows of 64 bytes of two tile registers, 128 bytes apart. The products of 32 columns are summed, then added.
#pragma once
#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "amx.h"
#include "bfloat16_avx512.h"

constexpr int TILE_ROWS = 32;      // 2 x 2 registers of sums, 2 of x, 2 of the tile: all eight
constexpr int64_t MAX_ROWS = 512;  // of 1,536 columns 1.5 MiB, which fit into a second-level cache of 2 MiB
constexpr int64_t STEP = 32;       // columns of a register

// Tile registers: sums of rows 0 to 15 and of rows 16 to 31, of outputs 0 to 15 and 16 to 31; x; pairs of the tile.
enum { TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT, TOP, BOTTOM, LEFT, RIGHT };

// The tile registers of this thread, configured for products of `rows` rows. Configuring takes some hundred cycles:
// once for all tiles that a thread claimed. Released after them: a thread with live tile registers has 8 KiB more to
// save at each switch, and keeps its core from sleeping deeply.
class TileState {
public:
    explicit TileState(int64_t rows) {
        amx::Configuration to{};
        to.palette = 1;
        const auto set = [&](int index, int64_t count) {
            to.rows[index] = count;
            to.row_bytes[index] = count ? 64 : 0;
        };
        for (int index : {TOP_LEFT, TOP_RIGHT, TOP}) set(index, std::min<int64_t>(rows, 16));
        for (int index : {BOTTOM_LEFT, BOTTOM_RIGHT, BOTTOM}) set(index, std::max<int64_t>(rows - 16, 0));
        for (int index : {LEFT, RIGHT}) set(index, 16);
        amx::configure(to);
    }
    TileState(const TileState &) = delete;
    ~TileState() { amx::release(); }
};

// x: rows `stride` bytes apart.
template <bool HAS_BOTTOM>
inline void multiply_step(const void *x, int64_t stride, const uint16_t *pairs) {
    constexpr int64_t PAIR_BYTES = PAIR<uint16_t>;
    amx::load<LEFT>(pairs, PAIR_BYTES);
    amx::load<TOP>(x, stride);
    amx::multiply_add<TOP_LEFT, TOP, LEFT>();
    amx::load<RIGHT>(pairs + TILE, PAIR_BYTES);
    amx::multiply_add<TOP_RIGHT, TOP, RIGHT>();
    if constexpr (HAS_BOTTOM) {
        amx::load<BOTTOM>((const char *)x + 16 * stride, stride);
        amx::multiply_add<BOTTOM_LEFT, BOTTOM, LEFT>();
        amx::multiply_add<BOTTOM_RIGHT, BOTTOM, RIGHT>();
    }
}

// The sums in registers += x [rows, columns] times the tile; x's rows are `stride` elements apart. Columns in excess of
// a multiple of 32 are copied between zeros: what lies behind them may be NaN. `fetch(step)` is called for each 32.
template <bool HAS_BOTTOM, typename Fetch>
inline void multiply_columns(int64_t rows, const Input *x, int64_t stride, const uint16_t *tile, int64_t columns,
                             const Fetch &fetch) {
    const int64_t steps = columns / STEP, rest = columns % STEP;
    for (int64_t step = 0; step < steps; ++step) {
        fetch(step);
        multiply_step<HAS_BOTTOM>(x + step * STEP, stride * sizeof(Input), tile + step * STEP * TILE);
    }
    if (!rest) return;
    alignas(64) Input x_rest[TILE_ROWS][STEP];
    alignas(64) uint16_t tile_rest[STEP * TILE] = {};
    for (int64_t row = 0; row < rows; ++row)
        _mm512_store_si512(x_rest[row], _mm512_maskz_loadu_epi16(_cvtu32_mask32((1u << rest) - 1),
                                                                 x + row * stride + steps * STEP));
    std::copy_n(tile + steps * STEP * TILE, (rest + 1) / 2 * 2 * TILE, tile_rest);
    multiply_step<HAS_BOTTOM>(x_rest, sizeof x_rest[0], tile_rest);
}

template <bool HAS_BOTTOM>
inline void clear_sums() {
    amx::zero<TOP_LEFT>();
    amx::zero<TOP_RIGHT>();
    if constexpr (HAS_BOTTOM) amx::zero<BOTTOM_LEFT>(), amx::zero<BOTTOM_RIGHT>();
}

// sums [rows][32]
template <bool HAS_BOTTOM>
inline void load_sums(const float *sums) {
    constexpr int64_t STRIDE = TILE * sizeof(float);
    amx::load<TOP_LEFT>(sums, STRIDE);
    amx::load<TOP_RIGHT>(sums + LANES, STRIDE);
    if constexpr (HAS_BOTTOM) {
        amx::load<BOTTOM_LEFT>(sums + 16 * TILE, STRIDE);
        amx::load<BOTTOM_RIGHT>(sums + 16 * TILE + LANES, STRIDE);
    }
}

template <bool HAS_BOTTOM>
inline void store_sums(float *sums) {
    constexpr int64_t STRIDE = TILE * sizeof(float);
    amx::store<TOP_LEFT>(sums, STRIDE);
    amx::store<TOP_RIGHT>(sums + LANES, STRIDE);
    if constexpr (HAS_BOTTOM) {
        amx::store<BOTTOM_LEFT>(sums + 16 * TILE, STRIDE);
        amx::store<BOTTOM_RIGHT>(sums + 16 * TILE + LANES, STRIDE);
    }
}

template <bool HAS_BOTTOM, typename Fetch>
inline void multiply_into_with(int64_t rows, const Input *x, int64_t stride, const uint16_t *tile, int64_t columns,
                               float *sums, bool adds, const Fetch &fetch) {
    if (adds) load_sums<HAS_BOTTOM>(sums);
    else clear_sums<HAS_BOTTOM>();
    multiply_columns<HAS_BOTTOM>(rows, x, stride, tile, columns, fetch);
    store_sums<HAS_BOTTOM>(sums);
}

// sums [rows][32] = x [rows, columns] times a tile of bf16, or += that. All rows of the `TileState`, of the first 16 if
// `rows` is not larger, are read and written.
template <typename Fetch>
inline void multiply_into(int64_t rows, const Input *x, int64_t stride, const uint16_t *tile, int64_t columns,
                          float *sums, bool adds, const Fetch &fetch) {
    (rows > 16 ? multiply_into_with<true, Fetch> : multiply_into_with<false, Fetch>)(rows, x, stride, tile, columns,
                                                                                     sums, adds, fetch);
}

using RowsProduct = RowsProductOf<Input>;

// Multiply up to TILE_ROWS rows. Sums begin with start(row, output), of sixteen outputs, or with zeros for a nullptr;
// finish(row, output, sums) takes them. Of x, so many rows are read as `multiply_into` reads.
template <typename Start, typename Finish>
inline void multiply_rows(int64_t rows, const RowsProduct &p, const Start &start, const Finish &finish) {
    alignas(64) float sums[TILE_ROWS * TILE];
    constexpr bool ADDS = !std::is_same_v<Start, std::nullptr_t>;
    for (int64_t first = 0; first < p.outputs; first += TILE) {
        if constexpr (ADDS)
            for (int64_t i = 0; i < rows * TILE; i += LANES) store(sums + i, start(i / TILE, first + i % TILE));
        multiply_into(rows, p.x, p.stride, p.tiles + first / TILE * p.tile_stride, p.columns, sums, ADDS,
                      [](int64_t) {});
        for (int64_t i = 0; i < rows * TILE; i += LANES) finish(i / TILE, first + i % TILE, load(sums + i));
    }
}

// Rows of a group where `rows` rows are multiplied in groups.
inline int64_t rows_of_group(int64_t) { return TILE_ROWS; }
