// GEMMs on AMX tiles, see linear.h.
//
// 32 rows and 32 outputs take 64 cycles for each step of 32 columns, in which 2 KiB of x and 2 KiB of the tile are
// read. The second-level cache gives about 48 bytes a cycle, so one of the two must come from the first one: some tiles
// are multiplied in blocks of 512 columns, of which a group of rows has 32 KiB. A group's block is read once from the
// second level and then from the first, for `BLOCK_TILES` tiles; their 32 KiB each come from the second level. Memory
// gives less than 10 bytes a cycle: it is read ahead by one block, in equal parts by all groups of rows. Between two
// blocks of columns the sums are in memory, for which a group and tile take about 100 of 1,024 cycles. Up to 32 rows
// are limited by memory and run over all columns at once.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "linear.h"
#include "quantized_tiles.h"

constexpr int64_t BLOCK_COLUMNS = 512;
constexpr int64_t BLOCK_TILES = 4;         // sums of 512 rows take 256 KiB
constexpr int64_t UNPACKED_COLUMNS = 128;  // of codes that are unpacked at once: 8 KiB
constexpr int64_t AHEAD = 2048;  // bytes of a tile that are prefetched where rows are limited by memory
constexpr int64_t GROUP_SUMS = TILE_ROWS * TILE;

// Groups of equally many rows, so that the tile registers are configured once. The last group overlaps with the one
// before it: the results of rows that are in both are the same.
struct RowGroups {
    int64_t rows, count, size;

    explicit RowGroups(int64_t rows)
        : rows(rows), count((rows + TILE_ROWS - 1) / TILE_ROWS), size((rows + count - 1) / count) {}
    int64_t start(int64_t group) const { return std::min(group * size, rows - size); }
};

// Memory aligned to cache lines.
template <typename T>
T *aligned(std::vector<char> &owner, int64_t count) {
    if (int64_t(owner.size()) < count * int64_t(sizeof(T)) + 64) owner.resize(count * sizeof(T) + 64);
    return (T *)(owner.data() + (-(uintptr_t)owner.data() & 63));
}

// Write `columns` columns of codes as bf16, in whole cache lines of codes.
template <typename Weight>
inline void unpack(const Weight *codes, int64_t columns, uint16_t *to, int64_t ahead) {
    constexpr int64_t PAIRS = PAIRS_OF_LINE<Weight>;
    for (int64_t pair = 0; 2 * pair < columns; pair += PAIRS) {
        const Weight *at = pair_of(codes, pair);
        __builtin_prefetch((const char *)at + ahead);
        store_pairs(load_pairs(at), to + pair * 2 * TILE);
    }
}

// totals [rows][32] += sums * scales + offsets * x_sums, of which rows are `stride` apart. offsets may be null.
inline void add_scaled(float *totals, const float *sums, int64_t rows, const Floats (&scales)[2],
                       const Floats *offsets, const float *x_sums, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
        for (int half = 0; half < 2; ++half) {
            float *total = totals + row * TILE + half * LANES;
            Floats found = fma(load(sums + row * TILE + half * LANES), scales[half], load(total));
            if (offsets) found = fma(offsets[half], splat(x_sums[row * stride]), found);
            store(total, found);
        }
}

// Multiplies groups of rows by tiles.
class GroupProducts {
public:
    GroupProducts(const RowBlock &b, const RowGroups &groups)
        : b(b), p(b.p), groups(groups), bytes(tile_bytes(p.weight, p.k)) {}

    // sums [tiles][groups][32][32] = all rows times some tiles.
    void multiply(const int64_t *tiles, int64_t count, float *sums) const {
        if (p.weight.kind == BFLOAT16) return multiply_bfloat16(tiles, count, sums);
        for (int64_t i = 0; i < count; ++i) {
            float *totals = sums + i * groups.count * GROUP_SUMS;
            p.weight.kind == INT4 ? multiply_codes<Int4>(tiles[i], totals) : multiply_codes<int8_t>(tiles[i], totals);
        }
    }

private:
    const RowBlock &b;
    const Linear &p;
    const RowGroups &groups;
    int64_t bytes;

    const char *tile(int64_t index) const { return (const char *)p.weight.data + index * bytes; }
    const Input *x(int64_t group) const { return b.x + groups.start(group) * b.stride; }

    void multiply_bfloat16(const int64_t *tiles, int64_t count, float *sums) const {
        const int64_t blocks = groups.count == 1 ? 1 : (p.k + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
        const int64_t block = (p.k + blocks * STEP - 1) / (blocks * STEP) * STEP;  // nearly equal, in whole steps
        const int64_t next_tile = p.is_gated ? count / 2 : count;
        const int64_t lines = (STEP + groups.count - 1) / groups.count;  // of a step to prefetch
        for (int64_t column = 0; column < p.k; column += block) {
            const int64_t columns = std::min(block, p.k - column);
            for (int64_t group = 0; group < groups.count; ++group)
                for (int64_t i = 0; i < count; ++i) {
                    const uint16_t *from = (const uint16_t *)tile(tiles[i]) + column * TILE;
                    const bool is_last = column + block >= p.k;
                    const char *next = is_last ? tile(tiles[i] + next_tile) : (const char *)(from + block * TILE);
                    next += group * lines * (columns / STEP) * 64;
                    const auto fetch_ahead = [from](int64_t step) {
#pragma GCC unroll 32
                        for (int64_t line = 0; line < STEP; ++line)
                            _mm_prefetch((const char *)(from + step * STEP * TILE) + AHEAD + line * 64, _MM_HINT_T0);
                    };
                    const auto fetch_next = [next, lines](int64_t step) {
                        for (int64_t line = 0; line < lines; ++line)
                            _mm_prefetch(next + (step * lines + line) * 64, _MM_HINT_T1);
                    };
                    const auto run = [&](const auto &fetch) {
                        multiply_into(groups.size, x(group) + column, b.stride, from, columns,
                                      sums + (i * groups.count + group) * GROUP_SUMS, column > 0, fetch);
                    };
                    groups.count == 1 ? run(fetch_ahead) : run(fetch_next);
                }
        }
    }

    // totals [groups][32][32]: the first group of rows unpacks the tile for the others.
    template <typename Weight>
    void multiply_codes(int64_t index, float *totals) const {
        static thread_local std::vector<char> owner;
        const bool is_only = groups.count == 1;
        const int64_t size = is_only ? UNPACKED_COLUMNS * TILE * 2 : tile_bytes<uint16_t>(p.weight, p.k);
        char *unpacked = aligned<char>(owner, size + 2 * PAIR<uint16_t>);  // a pair too much in int4
        for (int64_t group = 0; group < groups.count; ++group) {
            float *to = totals + group * GROUP_SUMS;
            if (group > 0) multiply_groups<uint16_t>(group, unpacked, nullptr, to);
            else multiply_groups<Weight>(group, tile(index), unpacked, to);
        }
    }

    // Weight: int4, int8, or uint16_t for an unpacked tile. unpacked: where the tile is unpacked, if there are several
    // groups of rows; else the columns that are unpacked at once.
    template <typename Weight>
    void multiply_groups(int64_t group, const char *tile, char *unpacked, float *totals) const {
        alignas(64) float sums[GROUP_SUMS];
        const Input *from = x(group);
        const float *x_sums = b.x_sums ? b.x_sums + groups.start(group) * b.groups : nullptr;
        std::memset(totals, 0, groups.size * TILE * sizeof(float));
        for (int64_t column = 0, i = 0; column < p.k; column += p.weight.group_size, ++i) {
            const int64_t columns = std::min(p.weight.group_size, p.k - column);
            const Group<Weight> codes(tile, columns, p.weight.has_offsets);
            multiply_group(from + column, (const Weight *)codes.codes, columns, (uint16_t *)unpacked, sums);
            const Floats scales[] = {load_scales(codes.scales), load_scales(codes.scales + LANES)};
            const bool has_offsets = p.weight.has_offsets;
            Floats offsets[2];
            if (has_offsets)
                for (int half = 0; half < 2; ++half) offsets[half] = load_scales(codes.scales + TILE + half * LANES);
            add_scaled(totals, sums, groups.size, scales, has_offsets ? offsets : nullptr, x_sums + i, b.groups);
            if (!std::is_same_v<Weight, uint16_t> && groups.count > 1) {
                const Group<uint16_t> copy(unpacked, columns, has_offsets);
                for (int half = 0; half < 2; ++half) {
                    store((float *)copy.scales + half * LANES, scales[half]);
                    if (has_offsets) store((float *)copy.scales + TILE + half * LANES, offsets[half]);
                }
                unpacked = (char *)copy.end;
            }
            tile = codes.end;
        }
    }

    // sums [rows][32] = rows of x times the codes of one group of columns.
    template <typename Weight>
    void multiply_group(const Input *from, const Weight *codes, int64_t columns, uint16_t *unpacked,
                        float *sums) const {
        const auto nothing = [](int64_t) {};
        if constexpr (std::is_same_v<Weight, uint16_t>) {
            multiply_into(groups.size, from, b.stride, codes, columns, sums, false, nothing);
        } else {
            const bool is_only = groups.count == 1;
            for (int64_t column = 0; column < columns; column += UNPACKED_COLUMNS) {
                const int64_t part = std::min(UNPACKED_COLUMNS, columns - column);
                uint16_t *to = is_only ? unpacked : unpacked + column * TILE;
                unpack(pair_of(codes, column / 2), part, to, is_only ? AHEAD : bytes);
                multiply_into(groups.size, from + column, b.stride, to, part, sums, column > 0, nothing);
            }
        }
    }
};

// Write the sums of a group of rows and a tile as bf16.
inline void write_sums(const Linear &p, int64_t tile, const float *sums, int64_t rows, const uint16_t *residual,
                       uint16_t *out, int64_t stride) {
    const int64_t width = std::min<int64_t>(TILE, p.n - tile * TILE);
    bfloat16 bias[TILE] = {};
    if (p.bias) std::memcpy(bias, p.bias + tile * TILE, width * sizeof(bfloat16));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t half = 0; half < TILE; half += LANES) {
            const int64_t at = row * stride + half;
            finish(load(sums + row * TILE + half) + load(bias + half), residual ? residual + at : nullptr, out + at,
                   width - half);
        }
}

// Compute the outputs of tiles [begin, end) for the rows of a block.
inline void multiply_tiles(const RowBlock &b, int64_t begin, int64_t end) {
    static thread_local std::vector<char> owner;
    const Linear &p = b.p;
    const RowGroups groups(b.count);
    const TileState state(groups.size);
    const GroupProducts products(b, groups);
    float *sums = aligned<float>(owner, BLOCK_TILES * groups.count * GROUP_SUMS);
    const int64_t step = p.is_gated ? BLOCK_TILES / 2 : BLOCK_TILES;
    for (int64_t first = begin; first < end; first += step) {
        const int64_t count = std::min(step, end - first);
        int64_t tiles[BLOCK_TILES];
        for (int64_t i = 0; i < count; ++i) {
            tiles[i] = first + i;
            if (p.is_gated) tiles[count + i] = p.tiles() + first + i;
        }
        products.multiply(tiles, p.is_gated ? 2 * count : count, sums);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t group = 0; group < groups.count; ++group) {
                const float *found = sums + (i * groups.count + group) * GROUP_SUMS;
                const int64_t at = b.output(groups.start(group), first + i);
                if (!p.is_gated) {
                    write_sums(p, first + i, found, groups.size, p.residual ? p.residual + at : nullptr, p.out + at,
                               p.outputs());
                    continue;
                }
                uint16_t gates[GROUP_SUMS], ups[GROUP_SUMS];
                write_sums(p, first + i, found, groups.size, nullptr, gates, TILE);
                write_sums(p, p.tiles() + first + i, found + count * groups.count * GROUP_SUMS, groups.size, nullptr,
                           ups, TILE);
                gate_rows(gates, ups, groups.size, p.out + at, p.outputs());
            }
    }
}
