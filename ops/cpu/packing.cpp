// Weights into tiles (tiles.h), and rows of weights out of tiles.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#ifdef DISPEC_TILES
#include "quantized_tiles.h"
#include "thread_pool.h"

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
#endif
