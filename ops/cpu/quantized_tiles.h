// The groups of columns of a tile of int4 or int8 (tiles.h), and of such a tile that is unpacked to bf16.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "tiles.h"

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

// Bytes of a tile of int4 or int8, or, for uint16_t, of an unpacked one.
template <typename Weight>
inline int64_t tile_bytes(const Matrix &weight, int64_t k) {
    const char *const tile = nullptr, *end = tile;
    for (int64_t column = 0; column < k; column += weight.group_size)
        end = Group<Weight>(end, std::min(weight.group_size, k - column), weight.has_offsets).end;
    return end - tile;
}

inline int64_t tile_bytes(const Matrix &weight, int64_t k) {
    switch (weight.kind) {
    case INT4: return tile_bytes<Int4>(weight, k);
    case INT8: return tile_bytes<int8_t>(weight, k);
    default: return padded_pairs<uint16_t>(k) * PAIR<uint16_t>;
    }
}
