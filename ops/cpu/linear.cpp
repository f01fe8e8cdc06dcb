// Products of a few to many rows with a packed bf16 weight, on AVX512-BF16.
//
// A weight [N, K] is packed as [tiles][pairs][32][2]: 32 outputs side by side, two neighbouring elements of K together,
// which is what one VDPBF16PS multiplies and adds. A tile is read from its beginning to its end, so at few rows the
// product runs at the speed of memory, and up to 12 rows share each load, so at many it runs at that of the multipliers.
//
// Each output is one chain of additions over K in order, whatever the number of rows and threads: a row's results
// do not depend on the rows beside it, not in the last bit.
#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__  // elsewhere the library lacks these functions, and whoever loads it sees that
#include <immintrin.h>
#include <omp.h>

namespace {

constexpr int TILE = 32;
constexpr int MAX_ROWS = 12;     // 24 accumulators, 2 registers of weights, the rest for broadcasts
constexpr int64_t AHEAD = 2048;  // bytes of weight fetched before they are needed

inline __m512bh as_bf16(__m512i x) { return (__m512bh)x; }

inline int32_t pair_of(const uint16_t *x, int64_t pair, int64_t k) {
    int32_t both = 0;
    std::memcpy(&both, x + 2 * pair, 2 * pair + 1 < k ? 4 : 2);
    return both;
}

template <int ROWS>
void tile_product(const uint16_t *x, int64_t x_stride, const uint16_t *tile, const uint16_t *bias, uint16_t *out,
                  int64_t out_stride, int64_t k, int width) {
    __m512 sums[ROWS][2];
    const __mmask16 low = _cvtu32_mask16(width >= 16 ? 0xffff : (1u << width) - 1);
    const __mmask16 high = _cvtu32_mask16(width >= 32 ? 0xffff : width > 16 ? (1u << (width - 16)) - 1 : 0);
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    if (bias) {
        first = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, bias)), 16));
        second =
            _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, bias + 16)), 16));
    }
    for (int row = 0; row < ROWS; ++row) {
        sums[row][0] = first;
        sums[row][1] = second;
    }
    const int64_t whole = k / 2;
    for (int64_t pair = 0; pair < whole; ++pair) {
        const uint16_t *at = tile + pair * TILE * 2;
        if constexpr (ROWS <= 6) {
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)at + AHEAD + 64, _MM_HINT_T0);
        }
        const __m512bh left = as_bf16(_mm512_load_si512(at)), right = as_bf16(_mm512_load_si512(at + TILE));
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; ++row) {
            int32_t both;
            std::memcpy(&both, x + row * x_stride + 2 * pair, 4);
            const __m512bh spread = as_bf16(_mm512_set1_epi32(both));
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], left, spread);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], right, spread);
        }
    }
    if (k % 2) {
        const uint16_t *at = tile + whole * TILE * 2;
        const __m512bh left = as_bf16(_mm512_load_si512(at)), right = as_bf16(_mm512_load_si512(at + TILE));
        for (int row = 0; row < ROWS; ++row) {
            const __m512bh spread = as_bf16(_mm512_set1_epi32(pair_of(x + row * x_stride, whole, k)));
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], left, spread);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], right, spread);
        }
    }
    for (int row = 0; row < ROWS; ++row) {
        _mm256_mask_storeu_epi16(out + row * out_stride, low, (__m256i)_mm512_cvtneps_pbh(sums[row][0]));
        _mm256_mask_storeu_epi16(out + row * out_stride + 16, high, (__m256i)_mm512_cvtneps_pbh(sums[row][1]));
    }
}

using TileProduct = void (*)(const uint16_t *, int64_t, const uint16_t *, const uint16_t *, uint16_t *, int64_t,
                             int64_t, int);
constexpr TileProduct PRODUCTS[MAX_ROWS + 1] = {
    nullptr,         tile_product<1>, tile_product<2>, tile_product<3>,  tile_product<4>,  tile_product<5>,  tile_product<6>,
    tile_product<7>, tile_product<8>, tile_product<9>, tile_product<10>, tile_product<11>, tile_product<12>,
};

}  // namespace

// weight [n, k] row by row -> packed [ceil(n / 32), ceil(k / 2), 32, 2], zeros where there is nothing. packed must be
// aligned to 64 bytes.
extern "C" void dispec_pack(const uint16_t *weight, uint16_t *packed, int64_t n, int64_t k) {
    const int64_t pairs = (k + 1) / 2, tiles = (n + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t pair = 0; pair < pairs; ++pair) {
            uint16_t *at = packed + (tile * pairs + pair) * TILE * 2;
            for (int64_t i = 0; i < TILE; ++i)
                for (int64_t j = 0; j < 2; ++j) {
                    const int64_t row = tile * TILE + i, column = 2 * pair + j;
                    at[2 * i + j] = row < n && column < k ? weight[row * k + column] : 0;
                }
        }
}

// out [rows, n] = x [rows, k] @ weight.T + bias. Strides in elements; bias may be null.
extern "C" void dispec_linear(const uint16_t *x, int64_t x_stride, const uint16_t *packed, const uint16_t *bias,
                              uint16_t *out, int64_t rows, int64_t n, int64_t k) {
    const int64_t pairs = (k + 1) / 2, tiles = (n + TILE - 1) / TILE;
    const int64_t groups = (rows + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
        for (int64_t tile = first; tile < last; ++tile) {
            const int width = int(std::min<int64_t>(TILE, n - tile * TILE));
            const uint16_t *at = packed + tile * pairs * TILE * 2;
            const uint16_t *tile_bias = bias ? bias + tile * TILE : nullptr;
            for (int64_t group = 0; group < groups; ++group) {  // sizes as equal as can be
                const int64_t begin = rows * group / groups, end = rows * (group + 1) / groups;
                PRODUCTS[end - begin](x + begin * x_stride, x_stride, at, tile_bias, out + begin * n + tile * TILE, n, k,
                                      width);
            }
        }
    }
}
#endif
