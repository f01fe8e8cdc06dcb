// Products of a few to many rows with a packed weight of bf16, or of 8 bits.
//
// A weight [N, K] is packed into tiles: see tiles.h. A tile is read from its beginning to its end, so at few rows the
// product runs at the speed of memory, and several rows share each load, so at many it runs at that of the multipliers.
//
// Each output is one chain of additions over K in order, whatever the number of rows and threads: a row's results
// do not depend on the rows beside it, not in the last bit.
//
// What surrounds a product in a transformer layer is done on the way, because at few rows each further pass over the
// threads costs as much as the arithmetic in it: the norm of the input, the gate of an MLP, the residual connection.
// Every rounding to bf16 is where the separate operations have it.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "tiles.h"
#ifdef DISPEC_TILES
#include "entries.h"
#include "parts.h"
#include "thread_pool.h"

namespace {

constexpr int64_t AHEAD = 2048;          // bytes of weight fetched before they are needed
constexpr int64_t FEW_ELEMENTS = 16384;  // that one thread norms in less time than two take to meet

std::atomic<uint64_t> next_job{1};

// x as `Rows` has it. `residual` is null or lies as
// `out` does. `next` is what to fetch meanwhile, as many cache lines as the tile has pairs; null means this very tile, a
// little ahead of its use.
template <int ROWS, typename Weight>
void tile_product(const Input *x, int64_t x_stride, const char *packed, const uint16_t *bias, const uint16_t *residual,
                  const char *next, uint16_t *out, int64_t out_stride, int64_t k, int width) {
    const Weight *tile = (const Weight *)packed;
    Floats sums[ROWS][2];
    bfloat16 first[TILE] = {};
    if (bias) std::memcpy(first, bias, width * sizeof(bfloat16));
    for (int row = 0; row < ROWS; ++row)
        for (int half = 0; half < 2; ++half)
            sums[row][half] = FACTORS<Weight> ? splat(0.0f) : load(first + half * LANES);
    add_product<ROWS>(sums, x, x_stride, tile, k, [&](int64_t pair) {
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

using TileProduct = void (*)(const Input *, int64_t, const char *, const uint16_t *, const uint16_t *, const char *,
                             uint16_t *, int64_t, int64_t, int);

template <typename Weight, int... ROWS>
constexpr std::array<TileProduct, 1 + sizeof...(ROWS)> products(std::integer_sequence<int, ROWS...>) {
    return {nullptr, tile_product<1 + ROWS, Weight>...};
}

template <typename Weight>
constexpr auto PRODUCTS = products<Weight>(std::make_integer_sequence<int, TILE_ROWS>());

// x / sqrt(mean(x^2) + eps), rounded, times weight, rounded.
void norm_row(const bfloat16 *x, const bfloat16 *weight, float eps, bfloat16 *out, int64_t k) {
    Floats squares = {};
    const int64_t whole = k / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int64_t i = whole; i < k; ++i) total += scalar(x[i]) * scalar(x[i]);
    const float factor = 1.0f / std::sqrt(total / float(k) + eps);
    for (int64_t i = 0; i < whole; i += LANES) {
        bfloat16 normed[LANES];
        store(normed, load(x + i) * factor);
        store(out + i, load(normed) * load(weight + i));
    }
    if (whole == k) return;
    bfloat16 rest[LANES] = {}, weights[LANES] = {};
    std::copy(x + whole, x + k, rest);
    std::copy(weight + whole, weight + k, weights);
    store(rest, load(rest) * factor);
    store(rest, load(rest) * load(weights));
    std::copy(rest, rest + (k - whole), out + whole);
}

// out = silu(gate) * up, 32 of each; both factors rounded before.
void gated(const bfloat16 *gate, const bfloat16 *up, bfloat16 *out) {
    for (int64_t i = 0; i < TILE; i += LANES) {
        const Floats x = load(gate + i), e = exp_negative((Floats)((Ints)x | INT32_MIN));
        bfloat16 silu[LANES];
        store(silu, x * choose((Ints)x >> 31, e, splat(1.0f)) / (e + 1.0f));
        store(out + i, load(silu) * load(up + i));
    }
}

// Rows of x, `stride` elements apart, as tiles take them.
struct Rows {
    const Input *x;
    int64_t stride, count;

    int64_t groups() const { return (count + TILE_ROWS - 1) / TILE_ROWS; }
    int64_t start(int64_t group) const { return count * group / groups(); }  // sizes as equal as can be
    int64_t size(int64_t group) const { return start(group + 1) - start(group); }
};

// job: a number of its own for each set of rows.
Rows rows_of(const Product &p, int64_t begin, int64_t count, uint64_t job) {
    const uint16_t *from = p.norm ? p.normed : p.x;
    const int64_t from_stride = p.norm ? p.k : p.x_stride;
    if constexpr (sizeof(Input) == sizeof(bfloat16))
        return {(const Input *)from + begin * from_stride, from_stride, count};
    // Each thread widens all of them for itself, once: that is quicker than to wait for the others.
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

// A group of the rows times a tile. The first groups have time to fetch a cache line of the next tile with each pair.
template <typename Weight>
void tile_of(const Product &p, const Rows &rows, int64_t index, int64_t group, const uint16_t *residual, uint16_t *to,
             int64_t stride) {
    const int64_t pairs = (p.k + 1) / 2, bytes = pairs * PAIR<Weight> + FACTORS<Weight>;
    const char *at = (const char *)p.packed + index * bytes;
    const bool fetches = rows.groups() > 1 && group < PAIR<Weight> / 64;
    const char *next = fetches ? at + bytes + group * pairs * 64 : nullptr;
    PRODUCTS<Weight>[rows.size(group)](rows.x + rows.start(group) * rows.stride, rows.stride, at,
                                       p.bias ? p.bias + index * TILE : nullptr, residual, next, to, stride, p.k,
                                       int(std::min<int64_t>(TILE, p.n - index * TILE)));
}

void tile(const Product &p, const Rows &rows, int64_t index, int64_t group, const uint16_t *residual, uint16_t *to,
          int64_t stride) {
    (p.is_int8 ? tile_of<int8_t> : tile_of<uint16_t>)(p, rows, index, group, residual, to, stride);
}

}  // namespace

void multiply(const Product &p) {
    if (p.norm) {
        const auto norm = [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                norm_row((const bfloat16 *)p.x + row * p.x_stride, (const bfloat16 *)p.norm, p.eps,
                         (bfloat16 *)p.normed + row * p.k, p.k);
        };
        p.rows * p.k > FEW_ELEMENTS ? parallel_for(p.rows, norm) : norm(0, p.rows);
    }
    const int64_t outputs = p.is_gated ? p.n / 2 : p.n, tiles = (outputs + TILE - 1) / TILE;
    for (int64_t first = 0; first < p.rows; first += std::min(ROWS_AT_ONCE, p.rows)) {
        const int64_t count = std::min(ROWS_AT_ONCE, p.rows - first);
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
                        gated((bfloat16 *)gates + row * TILE, (bfloat16 *)ups + row * TILE,
                              (bfloat16 *)p.out + at + row * outputs);
                }
        });
    }
}

// weight [n, k] row by row -> packed [ceil(n / 32), ceil(k / 2), 32, 2], zeros where there is nothing. packed must be
// aligned to 64 bytes.
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

// Rows of a packed weight [n, k] as they were: out [count, k].
extern "C" void dispec_unpack_rows(const uint16_t *packed, const int32_t *indices, int64_t count, int64_t k,
                                   uint16_t *out) {
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

extern "C" void dispec_linear(const uint16_t *x, int64_t x_stride, const uint16_t *norm, float eps,
                              const void *packed, int64_t is_int8, const uint16_t *bias, const uint16_t *residual,
                              uint16_t *out, int64_t rows, int64_t n, int64_t k, int64_t is_gated) {
    static thread_local std::vector<uint16_t> normed;
    if (norm) normed.resize(rows * k + 2);
    const Product product{x,    x_stride, norm, eps, normed.data(), packed,       is_int8 != 0, bias, residual, out,
                          rows, n,        k,    is_gated != 0};
    multiply(product);
}
#endif
