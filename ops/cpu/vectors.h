// Sixteen floats at a time, in GCC's vector types: the compiler makes AVX-512, AVX2 or NEON of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector_types.h"

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

struct bfloat16 {
    uint16_t bits;
};

// An 8-bit float of 4 exponent bits with bias 7 and 3 mantissa bits (arXiv:2209.05433).
struct e4m3 {
    uint8_t bits;
};

inline Floats load(const bfloat16 *at) {
#ifdef DISPEC_HALVES
    const auto eight = [at](int64_t i) {
        return (EightFloats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(at + i))), 16);
    };
    return {eight(0), eight(8)};
#else
    Halves x;
    std::memcpy(&x, at, sizeof x);
    return (Floats)(__builtin_convertvector(x, Words) << 16);
#endif
}

// GCC converts vectors of bytes to longer ones piece by piece; these instructions convert them at once.
inline Floats load(const int8_t *at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
#elif defined(DISPEC_HALVES)
    const auto eight = [at](int64_t i) {
        return (EightFloats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(at + i))));
    };
    return {eight(0), eight(8)};
#else
    Bytes x;
    std::memcpy(&x, at, sizeof x);
    return to_floats(__builtin_convertvector(x, Ints));
#endif
}

// A 256th of each value: sign, exponent and mantissa moved to their places in float16, whose bias is larger by 8.
inline Floats load(const e4m3 *at) {
#if defined(__AVX512F__) || defined(DISPEC_HALVES)
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(int16_t(0xbfff)));
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(halves);
#else
    return {(EightFloats)_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
            (EightFloats)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#endif
#else
    Bytes x;
    std::memcpy(&x, at, sizeof x);
    const Words codes = (Words)__builtin_convertvector(x, Ints);
    return (Floats)((codes & 0x7f) << 20 | (codes & 0x80000000)) * 0x1p112f;  // in float32 the bias is larger by 120
#endif
}

inline float scalar(float x) { return x; }

inline float scalar(bfloat16 x) {
    const uint32_t word = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &word, sizeof result);
    return result;
}

// All ones where x is NaN: the exponent's bits are all set, and some of the mantissa's.
inline Ints is_nan(Floats x) { return (0x7f800000 - ((Ints)x & 0x7fffffff)) >> 31; }

// The nearest bf16, ties to even, as torch rounds, in the lower halves of the words; NaN stays NaN.
inline Words bfloat16_bits(Floats x) {
    const Words word = (Words)x;
    const Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const Words nan = (Words)is_nan(x);
    return (rounded & ~nan) | (0x7fc0 & nan);
}

inline void store(bfloat16 *at, Floats x) {
    const Words bits = bfloat16_bits(x);
#ifdef DISPEC_HALVES
    const __m256i packed = _mm256_packus_epi32((__m256i)bits.low, (__m256i)bits.high);  // in each half of the register
    _mm256_storeu_si256((__m256i *)at, _mm256_permute4x64_epi64(packed, 0xd8));
#else
    const Halves result = __builtin_convertvector(bits, Halves);
    std::memcpy(at, &result, sizeof result);
#endif
}

inline float largest(Floats x) {
    const EightFloats a = low_half(x), b = high_half(x);
    const EightFloats eight = a > b ? a : b;
    const FourFloats c = __builtin_shufflevector(eight, eight, 0, 1, 2, 3);
    const FourFloats d = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    const FourFloats four = c > d ? c : d;
    const float e = four[0] > four[1] ? four[0] : four[1], f = four[2] > four[3] ? four[2] : four[3];
    return e > f ? e : f;
}

inline float sum(Floats x) {
    const EightFloats eight = low_half(x) + high_half(x);
    const FourFloats four =
        __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 0, to two units in the last place; 0 below -126 (in AVX-512 -149) and for -infinity. 2^f for |f| <= 1/2
// is a polynomial of least relative error that is 1 at 0; 2^n is written into the exponent.
inline Floats exp2_negative(Floats x) {
#ifdef __AVX512F__
    x = larger(splat(-200.0f), x);  // NaN stays NaN
    const Floats n = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Floats lowest = splat(-126.0f);
    const Ints too_low = is_less(x, lowest);
    x = choose(too_low, lowest, x);
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats n = (x + shift) - shift;
#endif
    const Floats f = x - n;
    Floats p = splat(1.32647005e-3f);
    p = p * f + 9.67151485e-3f;
    p = p * f + 5.55073395e-2f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const Ints exponent = (to_ints(n) + 127) << 23;
    return choose(too_low, splat(0.0f), p * (Floats)exponent);
#endif
}

// out = x / sqrt(mean(x^2) + eps) * weight, n elements (arXiv:1910.07467), rounded to T before and after the weight, as
// in torch. out may be x.
template <typename T>
inline void rms_norm(const T *x, const T *weight, float eps, T *out, int64_t n) {
    Floats squares = {};
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int64_t i = whole; i < n; ++i) total += scalar(x[i]) * scalar(x[i]);
    const float factor = 1.0f / std::sqrt(total / float(n) + eps);
    const auto norm = [=](const T *from, const T *weights, T *to) {
        T normed[LANES];
        store(normed, load(from) * factor);
        store(to, load(normed) * load(weights));
    };
    for (int64_t i = 0; i < whole; i += LANES) norm(x + i, weight + i, out + i);
    if (whole == n) return;
    T rest[LANES] = {}, weights[LANES] = {};
    std::copy(x + whole, x + n, rest);
    std::copy(weight + whole, weight + n, weights);
    norm(rest, weights, rest);
    std::copy(rest, rest + (n - whole), out + whole);
}
