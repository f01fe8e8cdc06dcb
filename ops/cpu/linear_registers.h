// GEMMs whose sums are in vector registers (AVX512-BF16 and AVX2), see linear.h.
//
// A tile is read from its beginning to its end, so few rows run at the speed of memory; several rows share each load,
// so many rows run at the speed of the multipliers. Codes of int4 and int8 are unpacked in registers. Where several
// groups of rows share a tile, the first one also stores it in bf16 for the others.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "linear.h"
#include "quantized_tiles.h"

// Up to so many rows run at the speed of memory: they prefetch their tile, `AHEAD` bytes ahead. More rows prefetch the
// tile after it.
constexpr int FEW_ROWS = 6;
constexpr int64_t AHEAD = 2048;
// Rows of a group where several groups share an unpacked tile. The totals of more rows do not fit into the registers
// beside the sums of a group of columns; 12 rows take 15 % longer.
constexpr int UNPACKED_ROWS = std::min(8, TILE_ROWS);

// Some rows of x times a tile. x: rows `x_stride` elements apart. bias, residual: null, or those of the tile's outputs,
// the residual laid out like `out`. ahead: the distance in bytes from the tile to what is prefetched. fetched: how much
// is with each pair, 0, 64 or 128 bytes. width: outputs. group_size, has_offsets: of int4 and int8. x_sums: null, or
// the sums of x over each group of columns, rows `groups` apart. unpacked: null, or where int4 and int8 are written as
// bf16, with scales and offsets in float32.
struct TileProduct {
    const Input *x;
    int64_t x_stride;
    const char *tile;
    const uint16_t *bias, *residual;
    int64_t ahead, fetched;
    uint16_t *out;
    int64_t out_stride, k;
    int width;
    int64_t group_size, has_offsets;
    const float *x_sums;
    int64_t groups;
    char *unpacked;
};

template <int ROWS, typename Weight>
inline void add_columns_of(const TileProduct &t, Floats (&sums)[ROWS][2], const char *tile, int64_t column,
                           int64_t columns, uint16_t *unpacked) {
    const auto fetch = [&](int64_t pair) {
        constexpr auto HINT = ROWS <= FEW_ROWS ? _MM_HINT_T0 : _MM_HINT_T1;
        const char *at = tile + t.ahead + pair * (PAIR<Weight> > 64 ? t.fetched : PAIR<Weight>);
        if (t.fetched > 0) _mm_prefetch(at, HINT);
        if (PAIR<Weight> > 64 && t.fetched > 64) _mm_prefetch(at + 64, HINT);
    };
    multiply_add<ROWS>(sums, t.x + column, t.x_stride, (const Weight *)tile, columns, fetch, unpacked);
}

template <int ROWS>
inline void start(const TileProduct &t, Floats (&sums)[ROWS][2]) {
    bfloat16 first[TILE] = {};
    if (t.bias) std::memcpy(first, t.bias, t.width * sizeof(bfloat16));
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) sums[row][half] = load(first + half * LANES);
}

template <int ROWS>
inline void write(const TileProduct &t, const Floats (&sums)[ROWS][2]) {
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const int64_t at = row * t.out_stride + half * LANES;
            finish(sums[row][half], t.residual ? t.residual + at : nullptr, t.out + at, t.width - half * LANES);
        }
}

template <int ROWS>
void multiply_tile(const TileProduct &t) {
    Floats sums[ROWS][2];
    start(t, sums);
    add_columns_of<ROWS, uint16_t>(t, sums, t.tile, 0, t.k, nullptr);
    write(t, sums);
}

// Weight: int4, int8, or uint16_t for an unpacked tile.
template <int ROWS, typename Weight>
void multiply_groups(const TileProduct &t) {
    Floats totals[ROWS][2];
    start(t, totals);
    const char *tile = t.tile;
    char *unpacked = t.unpacked;
    for (int64_t column = 0, index = 0; column < t.k; column += t.group_size, ++index) {
        const int64_t columns = std::min(t.group_size, t.k - column);
        const Group<Weight> group(tile, columns, t.has_offsets);
        Floats sums[ROWS][2];
        clear(sums);
        add_columns_of<ROWS, Weight>(t, sums, group.codes, column, columns, (uint16_t *)unpacked);
        const Floats scales[] = {load_scales(group.scales), load_scales(group.scales + LANES)};
        add_scaled(totals, sums, scales);
        if (t.has_offsets) {
            const Floats offsets[] = {load_scales(group.scales + TILE), load_scales(group.scales + TILE + LANES)};
            add_offsets(totals, offsets, t.x_sums + index, t.groups);
        }
        if (t.fetched) _mm_prefetch((const char *)group.scales + t.ahead, _MM_HINT_T1);
        if (unpacked) {
            const Group<uint16_t> copy(unpacked, columns, t.has_offsets);
            for (int64_t i = 0; (const char *)(group.scales + i) < group.end; i += LANES)
                store((float *)copy.scales + i, load_scales(group.scales + i));
            unpacked = (char *)copy.end;
        }
        tile = group.end;
    }
    write(t, totals);
}

using Multiply = void (*)(const TileProduct &);

template <int... ROWS>
constexpr std::array<Multiply, 1 + sizeof...(ROWS)> multiply_tiles(std::integer_sequence<int, ROWS...>) {
    return {nullptr, multiply_tile<1 + ROWS>...};
}

template <typename Weight, int... ROWS>
constexpr std::array<Multiply, 1 + sizeof...(ROWS)> multiply_groups_of(std::integer_sequence<int, ROWS...>) {
    return {nullptr, multiply_groups<1 + ROWS, Weight>...};
}

constexpr auto MULTIPLY_BFLOAT16 = multiply_tiles(std::make_integer_sequence<int, TILE_ROWS>());
constexpr auto MULTIPLY_INT4 = multiply_groups_of<Int4>(std::make_integer_sequence<int, TILE_ROWS>());
constexpr auto MULTIPLY_INT8 = multiply_groups_of<int8_t>(std::make_integer_sequence<int, TILE_ROWS>());
constexpr auto MULTIPLY_UNPACKED = multiply_groups_of<uint16_t>(std::make_integer_sequence<int, UNPACKED_ROWS>());

// Rows of x as `Input`, `stride` elements apart, in groups of up to `most`.
struct Rows {
    const Input *x;
    int64_t stride, count, most;

    int64_t groups() const { return (count + most - 1) / most; }
    int64_t start(int64_t group) const { return count * group / groups(); }  // sizes as equal as can be
    int64_t size(int64_t group) const { return start(group + 1) - start(group); }
};

// The GEMM of some rows with the tiles of a weight. The first group of rows unpacks int4 and int8 for the others.
class TileProducts {
public:
    TileProducts(const Linear &p, const Rows &rows, const float *x_sums, int64_t groups)
        : p(p), rows(rows), x_sums(x_sums), groups(groups), bytes(tile_bytes(p.weight, p.k)),
          unpacks(p.weight.kind != BFLOAT16 && rows.groups() > 1) {}

    // Return memory for an unpacked tile, null where there is none.
    char *memory(std::vector<char> &owner) const {
        if (!unpacks) return nullptr;
        const int64_t size = tile_bytes<uint16_t>(p.weight, p.k) + 3 * 64;  // alignment, and a pair too much in int4
        if (int64_t(owner.size()) < size) owner.resize(size);
        return owner.data() + (-(uintptr_t)owner.data() & 63);
    }

    // Multiply a group of rows by a tile, for which the groups before it were called. The first groups prefetch
    // the next tile.
    void multiply(int64_t index, int64_t group, char *unpacked, const uint16_t *residual, uint16_t *to,
                  int64_t stride) const {
        const int64_t start = rows.start(group), size = rows.size(group);
        const char *packed = (const char *)p.weight.data + index * bytes;
        const bool is_first = group == 0, is_only = rows.groups() == 1;
        // In bf16 with several groups of rows, each of the first two prefetches half of the next tile.
        const int64_t pair_bytes = p.weight.kind == BFLOAT16 ? PAIR<uint16_t> : 64;
        const int64_t next = bytes + group * (p.k + 1) / 2 * 64;
        const bool is_fetched = group * 64 >= pair_bytes;
        const auto multiply = p.weight.kind == BFLOAT16 ? MULTIPLY_BFLOAT16[size]
                              : !is_first               ? MULTIPLY_UNPACKED[size]
                              : p.weight.kind == INT4   ? MULTIPLY_INT4[size]
                                                        : MULTIPLY_INT8[size];
        multiply({rows.x + start * rows.stride,
                  rows.stride,
                  unpacks && !is_first ? unpacked : packed,
                  p.bias ? p.bias + index * TILE : nullptr,
                  residual,
                  is_only && size <= FEW_ROWS ? AHEAD : next,
                  is_only ? pair_bytes : is_fetched ? 0 : 64,
                  to,
                  stride,
                  p.k,
                  int(std::min<int64_t>(TILE, p.n - index * TILE)),
                  p.weight.group_size,
                  p.weight.has_offsets,
                  x_sums ? x_sums + start * groups : nullptr,
                  groups,
                  unpacks && is_first ? unpacked : nullptr});
    }

private:
    const Linear &p;
    const Rows &rows;
    const float *x_sums;
    int64_t groups, bytes;
    bool unpacks;
};

// Compute the outputs of tiles [begin, end) for the rows of a block.
inline void multiply_tiles(const RowBlock &b, int64_t begin, int64_t end) {
    static thread_local std::vector<char> owners[2];
    const Linear &p = b.p;
    const int64_t most = p.weight.kind != BFLOAT16 && b.count > TILE_ROWS ? UNPACKED_ROWS : TILE_ROWS;
    const Rows rows{b.x, b.stride, b.count, most};
    const TileProducts products(p, rows, b.x_sums, b.groups);
    char *memory = products.memory(owners[0]), *up_memory = p.is_gated ? products.memory(owners[1]) : nullptr;
    for (int64_t index = begin; index < end; ++index)
        for (int64_t group = 0; group < rows.groups(); ++group) {
            const int64_t at = b.output(rows.start(group), index);
            if (!p.is_gated) {
                products.multiply(index, group, memory, p.residual ? p.residual + at : nullptr, p.out + at,
                                  p.outputs());
                continue;
            }
            uint16_t gates[TILE_ROWS * TILE], ups[TILE_ROWS * TILE];
            products.multiply(index, group, memory, nullptr, gates, TILE);
            products.multiply(p.tiles() + index, group, up_memory, nullptr, ups, TILE);
            gate_rows(gates, ups, rows.size(group), p.out + at, p.outputs());
        }
}
