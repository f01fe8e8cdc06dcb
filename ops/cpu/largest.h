// Where the largest of a row is.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

constexpr int64_t PART = 4096;  // elements whose largest is found before anyone asks where it is

// The first of several; NaN counts as the largest, as in torch.
template <typename T>
inline int64_t largest_of(const T *row, int64_t n) {
    const int64_t whole = n / LANES * LANES;
    float peak = -INFINITY;
    int64_t part = 0;
    for (int64_t begin = 0; begin < whole; begin += PART) {
        const int64_t end = std::min(whole, begin + PART);
        Floats found = splat(-INFINITY);
        Ints has_nan = {};
        for (int64_t i = begin; i < end; i += LANES) {
            const Floats x = load(row + i);
            found = larger(x, found);
            has_nan |= is_nan(x);
        }
        bool is_nan = false;
        for (int lane = 0; lane < LANES; ++lane) is_nan |= has_nan[lane] != 0;
        if (is_nan) {
            for (int64_t i = begin; i < end; ++i)
                if (std::isnan(scalar(row[i]))) return i;
        }
        if (const float most = largest(found); most > peak) {
            peak = most;
            part = begin;
        }
    }
    int64_t at = part;
    if (whole)
        while (scalar(row[at]) != peak) ++at;
    for (int64_t i = whole; i < n; ++i) {
        const float x = scalar(row[i]);
        if (std::isnan(x)) return i;
        if (x > peak) {
            peak = x;
            at = i;
        }
    }
    return at;
}
