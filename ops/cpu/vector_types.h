// Sixteen floats or 32-bit integers: GCC's vector types, or two of their halves on CPUs of AVX2.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

constexpr int LANES = 16;

typedef float EightFloats __attribute__((vector_size(32)));
typedef float FourFloats __attribute__((vector_size(16)));

#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
#define DISPEC_HALVES
// GCC keeps its own vectors in memory where they are longer than the CPU's, and copies them in pieces of 16 bytes.
// Halves stay in registers: decode attention takes half the time.
template <typename T>
struct alignas(64) Sixteen {
    typedef T Half __attribute__((vector_size(32)));
    Half low, high;

    constexpr Sixteen() : low{}, high{} {}
    constexpr Sixteen(Half low, Half high) : low(low), high(high) {}
    constexpr Sixteen(T x) : low{x, x, x, x, x, x, x, x}, high(low) {}
    // The same bits.
    template <typename U>
    explicit Sixteen(Sixteen<U> x) : low((Half)x.low), high((Half)x.high) {}

    friend Sixteen operator+(Sixteen x, Sixteen y) { return {x.low + y.low, x.high + y.high}; }
    friend Sixteen operator-(Sixteen x, Sixteen y) { return {x.low - y.low, x.high - y.high}; }
    friend Sixteen operator*(Sixteen x, Sixteen y) { return {x.low * y.low, x.high * y.high}; }
    friend Sixteen operator/(Sixteen x, Sixteen y) { return {x.low / y.low, x.high / y.high}; }
    friend Sixteen operator&(Sixteen x, Sixteen y) { return {x.low & y.low, x.high & y.high}; }
    friend Sixteen operator|(Sixteen x, Sixteen y) { return {x.low | y.low, x.high | y.high}; }
    friend Sixteen operator^(Sixteen x, Sixteen y) { return {x.low ^ y.low, x.high ^ y.high}; }
    friend Sixteen operator<<(Sixteen x, Sixteen y) { return {x.low << y.low, x.high << y.high}; }
    friend Sixteen operator>>(Sixteen x, Sixteen y) { return {x.low >> y.low, x.high >> y.high}; }
    Sixteen operator-() const { return {-low, -high}; }
    Sixteen operator~() const { return {~low, ~high}; }
    Sixteen &operator+=(Sixteen x) { return *this = *this + x; }
    Sixteen &operator|=(Sixteen x) { return *this = *this | x; }
};

using Floats = Sixteen<float>;
using Ints = Sixteen<int32_t>;
using Words = Sixteen<uint32_t>;

constexpr Ints LANE(Ints::Half{0, 1, 2, 3, 4, 5, 6, 7}, Ints::Half{8, 9, 10, 11, 12, 13, 14, 15});

inline Floats splat(float x) { return x; }

inline Floats load(const float *at) {
    return {(EightFloats)_mm256_loadu_ps(at), (EightFloats)_mm256_loadu_ps(at + 8)};
}

inline void store(float *at, Floats x) {
    _mm256_storeu_ps(at, (__m256)x.low);
    _mm256_storeu_ps(at + 8, (__m256)x.high);
}

inline EightFloats low_half(Floats x) { return x.low; }
inline EightFloats high_half(Floats x) { return x.high; }

inline Ints to_ints(Floats x) {
    return {__builtin_convertvector(x.low, Ints::Half), __builtin_convertvector(x.high, Ints::Half)};
}

inline Floats to_floats(Ints x) {
    return {__builtin_convertvector(x.low, EightFloats), __builtin_convertvector(x.high, EightFloats)};
}

inline Floats to_floats(Words x) {
    return {__builtin_convertvector(x.low, EightFloats), __builtin_convertvector(x.high, EightFloats)};
}

template <typename T>
inline Ints is_less(Sixteen<T> x, Sixteen<T> y) {
    return {x.low < y.low, x.high < y.high};
}

// x where the mask is all ones, y where it is zero.
inline Floats choose(Ints mask, Floats x, Floats y) {
    return {(EightFloats)_mm256_blendv_ps((__m256)y.low, (__m256)x.low, (__m256)mask.low),
            (EightFloats)_mm256_blendv_ps((__m256)y.high, (__m256)x.high, (__m256)mask.high)};
}

// y where either is NaN.
inline Floats larger(Floats x, Floats y) {
    return {(EightFloats)_mm256_max_ps((__m256)x.low, (__m256)y.low),
            (EightFloats)_mm256_max_ps((__m256)x.high, (__m256)y.high)};
}

// The lower 32 bits of sixteen integers.
inline Words load_words(const int64_t *at) {
    const auto four = [at](int64_t i) { return _mm256_loadu_ps((const float *)(at + i)); };
    const auto eight = [four](int64_t i) {
        const __m256 words = _mm256_shuffle_ps(four(i), four(i + 4), 0x88);  // two of each four by turns
        return (Words::Half)_mm256_permute4x64_epi64((__m256i)words, 0xd8);
    };
    return {eight(0), eight(8)};
}

inline bool any(Ints mask) {
    const __m256i either = (__m256i)(mask.low | mask.high);
    return !_mm256_testz_si256(either, either);
}
#else
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats splat(float x) { return Floats{} + x; }

inline Floats load(const float *at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline void store(float *at, Floats x) { std::memcpy(at, &x, sizeof x); }

inline EightFloats low_half(Floats x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
inline EightFloats high_half(Floats x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }

inline Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats to_floats(Words x) { return __builtin_convertvector(x, Floats); }

inline Ints is_less(Floats x, Floats y) { return x < y; }
inline Ints is_less(Ints x, Ints y) { return x < y; }

// x where the mask is all ones, y where it is zero.
inline Floats choose(Ints mask, Floats x, Floats y) { return mask ? x : y; }

// y where either is NaN.
inline Floats larger(Floats x, Floats y) { return x > y ? x : y; }

// The lower 32 bits of sixteen integers.
inline Words load_words(const int64_t *at) {
    typedef int64_t Longs __attribute__((vector_size(128), aligned(8), may_alias));
    return __builtin_convertvector(*(const Longs *)at, Words);
}

inline bool any(Ints mask) {
    bool found = false;
    for (int lane = 0; lane < LANES; ++lane) found |= mask[lane] != 0;
    return found;
}
#endif
