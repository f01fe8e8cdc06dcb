// GEMMs of a few to many rows with a weight [n, k] in tiles (tiles.h), of bf16, int4 or int8.
//
// A tile is read from its beginning to its end, so few rows run at the speed of memory; several rows share each load,
// so many rows run at the speed of the multipliers. Each output is the same chain of additions over k in order, with
// any number of rows and threads: the bits of a row do not depend on the rows beside it.
//
// Codes of int4 and int8 are exact in bf16. The products of a group of columns are summed in float32, multiplied by the
// scale, and added to the total. Codes are unpacked in registers. Where several groups of rows share a tile, the first
// one also stores it in bf16 for the others.
//
// The norm of the input, the gate of an MLP and the residual connection are fused, because at few rows each further
// pass over the threads costs as much as its arithmetic. Roundings to bf16 are those of the separate operations.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#ifdef DISPEC_TILES
#include "thread_pool.h"
#include "tiles.h"

namespace {

// Up to so many rows run at the speed of memory: they prefetch their tile, `AHEAD` bytes ahead. More rows prefetch the
// tile after it.
constexpr int FEW_ROWS = 6;
constexpr int64_t AHEAD = 2048;
// Rows of a group where several groups share an unpacked tile. The totals of more rows do not fit into the registers
// beside the sums of a group of columns; 12 rows take 15 % longer.
constexpr int UNPACKED_ROWS = std::min(8, TILE_ROWS);
// To norm: fewer take one thread less time than two threads take to synchronise.
constexpr int64_t MIN_PARALLEL_ELEMENTS = 2048;

std::atomic<uint64_t> next_job{1};

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

// Scales and offsets are float16, in an unpacked tile float32.
template <typename Weight>
using Scale = std::conditional_t<std::is_same_v<Weight, uint16_t>, float, uint16_t>;

inline Floats load_scales(const float *at) { return load(at); }
inline Floats load_scales(const uint16_t *at) { return load_halves(at); }

// A group in a tile: its codes, scales and offsets.
template <typename Weight>
struct Group {
    const char *codes;
    const Scale<Weight> *scales;
    const char *end;

    Group(const char *tile, int64_t columns, bool has_offsets)
        : codes(tile), scales((const Scale<Weight> *)(tile + padded_pairs<Weight>(columns) * PAIR<Weight>)),
          end((const char *)(scales + (has_offsets ? 2 : 1) * TILE)) {}
};

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

// Bytes of a tile of int4 or int8, or, for uint16_t, of an unpacked one.
template <typename Weight>
int64_t tile_bytes(const Matrix &weight, int64_t k) {
    const char *const tile = nullptr, *end = tile;
    for (int64_t column = 0; column < k; column += weight.group_size)
        end = Group<Weight>(end, std::min(weight.group_size, k - column), weight.has_offsets).end;
    return end - tile;
}

int64_t tile_bytes(const Matrix &weight, int64_t k) {
    switch (weight.kind) {
    case INT4: return tile_bytes<Int4>(weight, k);
    case INT8: return tile_bytes<int8_t>(weight, k);
    default: return padded_pairs<uint16_t>(k) * PAIR<uint16_t>;
    }
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

// out = silu(gate) * up (arXiv:2002.05202), 32 elements; both factors are rounded before.
void silu_and_mul(const bfloat16 *gate, const bfloat16 *up, bfloat16 *out) {
    for (int64_t i = 0; i < TILE; i += LANES) {
        const Floats x = load(gate + i), e = exp2_negative((Floats)((Ints)x | INT32_MIN) * LOG2_E);
        bfloat16 silu[LANES];
        finish(x * choose((Ints)x >> 31, e, splat(1.0f)) / (e + 1.0f), nullptr, (uint16_t *)silu, LANES);
        finish(load(silu) * load(up + i), nullptr, (uint16_t *)(out + i), LANES);
    }
}

// Rows of x as `Input`, `stride` elements apart, in groups of up to `most`.
struct Rows {
    const Input *x;
    int64_t stride, count, most;

    int64_t groups() const { return (count + most - 1) / most; }
    int64_t start(int64_t group) const { return count * group / groups(); }  // sizes as equal as can be
    int64_t size(int64_t group) const { return start(group + 1) - start(group); }
};

// Return `count` rows of x, normed where there is a norm. job: a different number for each set of rows.
Rows rows_of(const Linear &p, int64_t begin, int64_t count, uint64_t job) {
    const uint16_t *from = p.norm ? p.normed : p.x;
    const int64_t from_stride = p.norm ? p.k : p.x_stride;
    const int64_t most = p.weight.kind != BFLOAT16 && count > TILE_ROWS ? UNPACKED_ROWS : TILE_ROWS;
    if constexpr (sizeof(Input) == sizeof(bfloat16))
        return {(const Input *)from + begin * from_stride, from_stride, count, most};
    // Each thread widens all rows for itself, once: that takes less time than waiting for the others.
    static thread_local std::vector<float> widened;
    static thread_local uint64_t widened_for = 0;
    const int64_t stride = p.k + p.k % 2;
    if (widened_for == job) return {(const Input *)widened.data(), stride, count, most};
    widened_for = job;
    widened.resize(count * stride);
    for (int64_t row = 0; row < count; ++row) {
        const bfloat16 *at = (const bfloat16 *)from + (begin + row) * from_stride;
        float *to = widened.data() + row * stride;
        int64_t i = 0;
        for (; i + LANES <= p.k; i += LANES) store(to + i, load(at + i));
        for (; i < p.k; ++i) to[i] = scalar(at[i]);
        if (p.k % 2) to[p.k] = 0;
    }
    return {(const Input *)widened.data(), stride, count, most};
}

// p.sums [rows, groups]: the sums of each row of x over each group, for the offsets.
void sum_groups(Phases &phases, const Linear &p, int64_t groups) {
    const auto sum_rows = [=](int64_t begin, int64_t end) {
        const bfloat16 *from = (const bfloat16 *)(p.norm ? p.normed : p.x);
        const int64_t stride = p.norm ? p.k : p.x_stride;
        for (int64_t row = begin; row < end; ++row)
            for (int64_t group = 0; group < groups; ++group) {
                const bfloat16 *at = from + row * stride;
                int64_t i = group * p.weight.group_size;
                const int64_t stop = std::min(p.k, i + p.weight.group_size);
                Floats sums = {};
                for (; i + LANES <= stop; i += LANES) sums += load(at + i);
                float total = sum(sums);
                for (; i < stop; ++i) total += scalar(at[i]);
                p.sums[row * groups + group] = total;
            }
    };
    phases.add(p.rows, sum_rows, Schedule::RANGES, p.rows * p.k > MIN_PARALLEL_ELEMENTS ? num_threads() : 1);
}

// The GEMM of some rows with the tiles of a weight. The first group of rows unpacks int4 and int8 for the others.
class Tiles {
public:
    Tiles(const Linear &p, const Rows &rows, const float *x_sums, int64_t groups)
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

}  // namespace

void linear(Phases &phases, const Linear &p) {
    if (p.norm) {
        const auto norm = [=](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                rms_norm((const bfloat16 *)p.x + row * p.x_stride, (const bfloat16 *)p.norm, p.eps,
                         (bfloat16 *)p.normed + row * p.k, p.k);
        };
        phases.add(p.rows, norm, Schedule::RANGES, p.rows * p.k > MIN_PARALLEL_ELEMENTS ? num_threads() : 1);
    }
    const int64_t outputs = p.is_gated ? p.n / 2 : p.n, tiles = (outputs + TILE - 1) / TILE;
    const int64_t groups = group_count(p.weight, p.k);
    if (groups) sum_groups(phases, p, groups);
    for (int64_t first = 0; first < p.rows; first += std::min(MAX_ROWS, p.rows)) {
        const int64_t count = std::min(MAX_ROWS, p.rows - first);
        const uint64_t job = next_job.fetch_add(1);
        phases.add(tiles, [=](int64_t begin, int64_t end) {
            static thread_local std::vector<char> owners[2];
            const Rows rows = rows_of(p, first, count, job);
            const Tiles product(p, rows, groups ? p.sums + first * groups : nullptr, groups);
            char *memory = product.memory(owners[0]), *up_memory = p.is_gated ? product.memory(owners[1]) : nullptr;
            for (int64_t index = begin; index < end; ++index)
                for (int64_t group = 0; group < rows.groups(); ++group) {
                    const int64_t at = (first + rows.start(group)) * outputs + index * TILE;
                    if (!p.is_gated) {
                        product.multiply(index, group, memory, p.residual ? p.residual + at : nullptr, p.out + at,
                                         outputs);
                        continue;
                    }
                    uint16_t gates[TILE_ROWS * TILE], ups[TILE_ROWS * TILE];
                    product.multiply(index, group, memory, nullptr, gates, TILE);
                    product.multiply(tiles + index, group, up_memory, nullptr, ups, TILE);
                    for (int64_t row = 0; row < rows.size(group); ++row)
                        silu_and_mul((bfloat16 *)gates + row * TILE, (bfloat16 *)ups + row * TILE,
                                     (bfloat16 *)p.out + at + row * outputs);
                }
        });
    }
}

namespace {

// Codes of elements of a tile, as it has them in memory.
inline void put_code(int8_t *tile, int64_t output, int64_t column, int8_t code) {
    tile[(column / 2 * TILE + output) * 2 + column % 2] = code;
}

inline int8_t code_of(const int8_t *tile, int64_t output, int64_t column) {
    return tile[(column / 2 * TILE + output) * 2 + column % 2];
}

// Where a code of int4 is: the index of its word, and its lowest bit.
struct Int4Place {
    int64_t word;
    int bit;

    Int4Place(int64_t output, int64_t column)
        : word(column / 4 * TILE + output % LANES * 2 + column % 2),
          bit(int(column % 4 / 2 * 8 + output / LANES * 4)) {}
};

inline void put_code(Int4 *tile, int64_t output, int64_t column, int8_t code) {
    const Int4Place place(output, column);
    ((uint16_t *)tile)[place.word] |= (code & 15) << place.bit;
}

inline int8_t code_of(const Int4 *tile, int64_t output, int64_t column) {
    const Int4Place place(output, column);
    return int8_t(((const uint16_t *)tile)[place.word] >> place.bit << 4) >> 4;
}

inline uint16_t to_half(float x) { return uint16_t(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), 0), 0)); }

inline float from_half(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }

template <typename Weight>
void pack_tile(const Matrix &weight, const int8_t *codes, int64_t codes_stride, const float *scales,
               const float *offsets, char *tile, int64_t outputs, int64_t k) {
    const int64_t groups = (k + weight.group_size - 1) / weight.group_size;
    for (int64_t index = 0; index < groups; ++index) {
        const int64_t first = index * weight.group_size, columns = std::min(weight.group_size, k - first);
        const Group<Weight> group(tile, columns, weight.has_offsets);
        std::memset(tile, 0, group.end - tile);
        uint16_t *to = (uint16_t *)group.scales;
        for (int64_t i = 0; i < outputs; ++i) {
            for (int64_t column = 0; column < columns; ++column)
                put_code((Weight *)tile, i, column, codes[i * codes_stride + first + column]);
            to[i] = to_half(scales[i * groups + index]);
            if (offsets) to[TILE + i] = to_half(offsets[i * groups + index]);
        }
        tile = (char *)group.end;
    }
}

template <typename Weight>
void read_row(const Matrix &weight, const char *tile, int64_t output, int64_t k, bfloat16 *out) {
    for (int64_t first = 0; first < k; first += weight.group_size) {
        const int64_t columns = std::min(weight.group_size, k - first);
        const Group<Weight> group(tile, columns, weight.has_offsets);
        const float scale = from_half(group.scales[output]);
        const float offset = weight.has_offsets ? from_half(group.scales[TILE + output]) : 0.0f;
        for (int64_t column = 0; column < columns; column += LANES) {
            const int64_t count = std::min<int64_t>(LANES, columns - column);
            float values[LANES] = {};
            bfloat16 rounded[LANES];
            for (int64_t i = 0; i < count; ++i) values[i] = code_of((const Weight *)tile, output, column + i);
            store(rounded, load(values) * scale + offset);
            std::copy_n(rounded, count, out + first + column);
        }
        tile = group.end;
    }
}

}  // namespace

void read_rows(Phases &phases, const Matrix &weight, const int32_t *indices, int64_t count, int64_t k, uint16_t *out) {
    const int64_t bytes = weight.kind == PLAIN ? 0 : tile_bytes(weight, k);
    const auto read = [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = indices[i];
            const char *tile = (const char *)weight.data + row / TILE * bytes;
            uint16_t *to = out + i * k;
            if (weight.kind == PLAIN) {
                std::copy_n((const uint16_t *)weight.data + row * k, k, to);
            } else if (weight.kind == BFLOAT16) {
                const uint16_t *at = (const uint16_t *)tile + row % TILE * 2;
                for (int64_t column = 0; column < k; column += 2)
                    std::memcpy(to + column, at + column * TILE, column + 1 < k ? 4 : 2);
            } else {
                (weight.kind == INT4 ? read_row<Int4> : read_row<int8_t>)(weight, tile, row % TILE, k, (bfloat16 *)to);
            }
        }
    };
    phases.add(count, read, Schedule::RANGES, count > 4 ? num_threads() : 1);
}

// The row of the table in instruction_sets.py that this library was built for.
extern "C" const char *dispec_instruction_set() { return INSTRUCTION_SET; }

// Pack a weight [n, k] into [ceil(n / 32), ceil(k / 2), 32, 2], padded with zeros and aligned to 64 bytes.
extern "C" void dispec_pack(const uint16_t *weight, uint16_t *packed, int64_t n, int64_t k) {
    const int64_t pairs = (k + 1) / 2, tiles = (n + TILE - 1) / TILE;
    parallel_for(tiles, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile)
            for (int64_t pair = 0; pair < pairs; ++pair) {
                uint16_t *at = packed + (tile * pairs + pair) * TILE * 2;
                for (int64_t i = 0; i < TILE; ++i)
                    for (int64_t j = 0; j < 2; ++j) {
                        const int64_t row = tile * TILE + i, column = 2 * pair + j;
                        at[2 * i + j] = row < n && column < k ? weight[row * k + column] : 0;
                    }
            }
    });
}

// Pack codes [n, k], rows `codes_stride` apart, scales and offsets (which may be null) [n, groups] into
// [ceil(n / 32), tile_bytes].
extern "C" void dispec_pack_quantized(const int8_t *codes, int64_t codes_stride, const float *scales,
                                      const float *offsets, char *packed, int64_t n, int64_t k, int64_t kind,
                                      int64_t group_size) {
    const Matrix weight{packed, kind, group_size, offsets != nullptr};
    const int64_t bytes = tile_bytes(weight, k), groups = (k + group_size - 1) / group_size;
    parallel_for((n + TILE - 1) / TILE, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * TILE;
            (kind == INT4 ? pack_tile<Int4> : pack_tile<int8_t>)(
                weight, codes + first * codes_stride, codes_stride, scales + first * groups,
                offsets ? offsets + first * groups : nullptr, packed + tile * bytes, std::min<int64_t>(TILE, n - first),
                k);
        }
    });
}

extern "C" void dispec_read_rows(const Matrix *weight, const int32_t *indices, int64_t count, int64_t k,
                                 uint16_t *out) {
    static thread_local Phases phases;
    read_rows(phases, *weight, indices, count, k, out);
    phases.run();
}

extern "C" void dispec_linear(const uint16_t *x, int64_t x_stride, const uint16_t *norm, float eps,
                              const Matrix *weight, const uint16_t *bias, const uint16_t *residual, uint16_t *out,
                              int64_t rows, int64_t n, int64_t k, int64_t is_gated) {
    static thread_local std::vector<uint16_t> normed;
    static thread_local std::vector<float> sums;
    static thread_local Phases phases;
    if (norm) normed.resize(rows * k + 2);
    sums.resize(rows * group_count(*weight, k));
    linear(phases, {x, x_stride, norm, eps, normed.data(), sums.data(), *weight, bias, residual, out, rows, n, k,
                    is_gated != 0});
    phases.run();
}
#endif
