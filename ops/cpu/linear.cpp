// GEMMs of a few to many rows with a weight [n, k] in tiles (tiles.h), of bf16 or int8.
//
// A tile is read from its beginning to its end, so few rows run at the speed of memory; several rows share each load,
// so many rows run at the speed of the multipliers. Each output is one chain of additions over k in order, with any
// number of rows and threads: the bits of a row do not depend on the rows beside it.
//
// The norm of the input, the gate of an MLP and the residual connection are fused, because at few rows each further
// pass over the threads costs as much as its arithmetic. Roundings to bf16 are those of the separate operations.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#ifdef DISPEC_TILES
#include "thread_pool.h"
#include "tiles.h"

namespace {

constexpr int64_t AHEAD = 2048;  // bytes of weight that are prefetched
// To norm: fewer take one thread less time than two threads take to synchronise.
constexpr int64_t MIN_PARALLEL_ELEMENTS = 16384;

std::atomic<uint64_t> next_job{1};

// Multiply ROWS rows of x by a tile. residual: null, or laid out like `out`. next: address to prefetch, a cache line
// for each pair of the tile; null prefetches this tile, `AHEAD` bytes ahead.
template <int ROWS, typename Weight>
void multiply_tile(const Input *x, int64_t x_stride, const char *packed, const uint16_t *bias, const uint16_t *residual,
                  const char *next, uint16_t *out, int64_t out_stride, int64_t k, int width) {
    const Weight *tile = (const Weight *)packed;
    Floats sums[ROWS][2];
    bfloat16 first[TILE] = {};
    if (bias) std::memcpy(first, bias, width * sizeof(bfloat16));
    for (int row = 0; row < ROWS; ++row)
        for (int half = 0; half < 2; ++half)
            sums[row][half] = FACTORS<Weight> ? splat(0.0f) : load(first + half * LANES);
    multiply_add<ROWS>(sums, x, x_stride, tile, k, [&](int64_t pair) {
        const char *at = (const char *)(tile + pair * TILE * 2);
        if (next) {
            _mm_prefetch(next + pair * 64, _MM_HINT_T1);
        } else if constexpr (ROWS <= 6) {
            for (int64_t i = 0; i < PAIR<Weight>; i += 64) _mm_prefetch(at + AHEAD + i, _MM_HINT_T0);
        }
    });
    if constexpr (FACTORS<Weight> != 0) {
        const float *factors = (const float *)(tile + (k + 1) / 2 * TILE * 2);
        for (int row = 0; row < ROWS; ++row)
            for (int half = 0; half < 2; ++half)
                sums[row][half] = sums[row][half] * load(factors + half * LANES) + load(first + half * LANES);
    }
    for (int row = 0; row < ROWS; ++row) {
        const int64_t at = row * out_stride;
        finish(sums[row][0], residual ? residual + at : nullptr, out + at, width);
        finish(sums[row][1], residual ? residual + at + LANES : nullptr, out + at + LANES, width - LANES);
    }
}

using MultiplyTile = void (*)(const Input *, int64_t, const char *, const uint16_t *, const uint16_t *, const char *,
                             uint16_t *, int64_t, int64_t, int);

template <typename Weight, int... ROWS>
constexpr std::array<MultiplyTile, 1 + sizeof...(ROWS)> multiply_tiles(std::integer_sequence<int, ROWS...>) {
    return {nullptr, multiply_tile<1 + ROWS, Weight>...};
}

template <typename Weight>
constexpr auto MULTIPLY_TILE = multiply_tiles<Weight>(std::make_integer_sequence<int, TILE_ROWS>());

// out = silu(gate) * up (arXiv:2002.05202), 32 elements; both factors are rounded before.
void silu_and_mul(const bfloat16 *gate, const bfloat16 *up, bfloat16 *out) {
    for (int64_t i = 0; i < TILE; i += LANES) {
        const Floats x = load(gate + i), e = exp_negative((Floats)((Ints)x | INT32_MIN));
        bfloat16 silu[LANES];
        store(silu, x * choose((Ints)x >> 31, e, splat(1.0f)) / (e + 1.0f));
        store(out + i, load(silu) * load(up + i));
    }
}

// Rows of x as `Input`, `stride` elements apart, in groups of up to TILE_ROWS.
struct Rows {
    const Input *x;
    int64_t stride, count;

    int64_t groups() const { return (count + TILE_ROWS - 1) / TILE_ROWS; }
    int64_t start(int64_t group) const { return count * group / groups(); }  // sizes as equal as can be
    int64_t size(int64_t group) const { return start(group + 1) - start(group); }
};

// Return `count` rows of x, normed where there is a norm. job: a different number for each set of rows.
Rows rows_of(const Linear &p, int64_t begin, int64_t count, uint64_t job) {
    const uint16_t *from = p.norm ? p.normed : p.x;
    const int64_t from_stride = p.norm ? p.k : p.x_stride;
    if constexpr (sizeof(Input) == sizeof(bfloat16))
        return {(const Input *)from + begin * from_stride, from_stride, count};
    // Each thread widens all rows for itself, once: that takes less time than waiting for the others.
    static thread_local std::vector<float> widened;
    static thread_local uint64_t widened_for = 0;
    const int64_t stride = p.k + p.k % 2;
    if (widened_for == job) return {(const Input *)widened.data(), stride, count};
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
    return {(const Input *)widened.data(), stride, count};
}

// Multiply a group of rows by a tile. The first groups prefetch a cache line of the next tile with each pair.
template <typename Weight>
void tile_as(const Linear &p, const Rows &rows, int64_t index, int64_t group, const uint16_t *residual, uint16_t *to,
             int64_t stride) {
    const int64_t pairs = (p.k + 1) / 2, bytes = pairs * PAIR<Weight> + FACTORS<Weight>;
    const char *at = (const char *)p.packed + index * bytes;
    const bool fetches = rows.groups() > 1 && group < PAIR<Weight> / 64;
    const char *next = fetches ? at + bytes + group * pairs * 64 : nullptr;
    MULTIPLY_TILE<Weight>[rows.size(group)](rows.x + rows.start(group) * rows.stride, rows.stride, at,
                                       p.bias ? p.bias + index * TILE : nullptr, residual, next, to, stride, p.k,
                                       int(std::min<int64_t>(TILE, p.n - index * TILE)));
}

void tile(const Linear &p, const Rows &rows, int64_t index, int64_t group, const uint16_t *residual, uint16_t *to,
          int64_t stride) {
    (p.is_int8 ? tile_as<int8_t> : tile_as<uint16_t>)(p, rows, index, group, residual, to, stride);
}

}  // namespace

void linear(const Linear &p) {
    if (p.norm) {
        const auto norm = [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                rms_norm((const bfloat16 *)p.x + row * p.x_stride, (const bfloat16 *)p.norm, p.eps,
                         (bfloat16 *)p.normed + row * p.k, p.k);
        };
        p.rows * p.k > MIN_PARALLEL_ELEMENTS ? parallel_for(p.rows, norm) : norm(0, p.rows);
    }
    const int64_t outputs = p.is_gated ? p.n / 2 : p.n, tiles = (outputs + TILE - 1) / TILE;
    for (int64_t first = 0; first < p.rows; first += std::min(MAX_ROWS, p.rows)) {
        const int64_t count = std::min(MAX_ROWS, p.rows - first);
        const uint64_t job = next_job.fetch_add(1);
        parallel_for(tiles, [&](int64_t begin, int64_t end) {
            const Rows rows = rows_of(p, first, count, job);
            for (int64_t index = begin; index < end; ++index)
                for (int64_t group = 0; group < rows.groups(); ++group) {
                    const int64_t at = (first + rows.start(group)) * outputs + index * TILE;
                    if (!p.is_gated) {
                        tile(p, rows, index, group, p.residual ? p.residual + at : nullptr, p.out + at, outputs);
                        continue;
                    }
                    uint16_t gates[TILE_ROWS * TILE], ups[TILE_ROWS * TILE];
                    tile(p, rows, index, group, nullptr, gates, TILE);
                    tile(p, rows, tiles + index, group, nullptr, ups, TILE);
                    for (int64_t row = 0; row < rows.size(group); ++row)
                        silu_and_mul((bfloat16 *)gates + row * TILE, (bfloat16 *)ups + row * TILE,
                                     (bfloat16 *)p.out + at + row * outputs);
                }
        });
    }
}

void unpack_rows(const uint16_t *packed, const int32_t *indices, int64_t count, int64_t k, uint16_t *out) {
    const int64_t pairs = (k + 1) / 2;
    const auto unpack = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = indices[i];
            const uint16_t *at = packed + (row / TILE * pairs * TILE + row % TILE) * 2;
            for (int64_t pair = 0; pair < pairs; ++pair)
                std::memcpy(out + i * k + 2 * pair, at + pair * TILE * 2, 2 * pair + 1 < k ? 4 : 2);
        }
    };
    count > 4 ? parallel_for(count, unpack) : unpack(0, count);
}

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

extern "C" void dispec_unpack_rows(const uint16_t *packed, const int32_t *indices, int64_t count, int64_t k,
                                   uint16_t *out) {
    unpack_rows(packed, indices, count, k, out);
}

extern "C" void dispec_linear(const uint16_t *x, int64_t x_stride, const uint16_t *norm, float eps,
                              const void *packed, int64_t is_int8, const uint16_t *bias, const uint16_t *residual,
                              uint16_t *out, int64_t rows, int64_t n, int64_t k, int64_t is_gated) {
    static thread_local std::vector<uint16_t> normed;
    if (norm) normed.resize(rows * k + 2);
    linear({x, x_stride, norm, eps, normed.data(), packed, is_int8 != 0, bias, residual, out, rows, n, k,
            is_gated != 0});
}
#endif
