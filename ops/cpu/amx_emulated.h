// The instructions of AMX on tiles of bf16, emulated: for tests on CPUs without AMX. After the pseudocode of Intel's
// Software Developer's Manual, volume 2 (LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS).
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

#include "amx.h"

namespace amx {

struct Register {
    uint32_t row[16][16];
};

inline thread_local Configuration configuration;
inline thread_local Register registers[8];

// Where a CPU would raise an exception.
inline void require(bool holds) {
    if (!holds) std::abort();
}

inline void configure(const Configuration &to) {
    require(to.palette <= 1);
    for (int i = 0; i < 16; ++i)
        require(to.rows[i] <= 16 && to.row_bytes[i] <= 64 && !to.rows[i] == !to.row_bytes[i] && (i < 8 || !to.rows[i]));
    configuration = to;
    std::memset(registers, 0, sizeof registers);
}

inline void release() { configure({}); }

// Write a row of `bytes` bytes; the rest of the row becomes zero.
inline void set_row(Register &to, int row, const void *from, int bytes) {
    std::memset(to.row[row], 0, 64);
    std::memcpy(to.row[row], from, bytes);
}

template <int TO>
inline void zero() {
    require(configuration.rows[TO] > 0);
    std::memset(&registers[TO], 0, sizeof(Register));
}

template <int TO>
inline void load(const void *at, int64_t stride) {
    zero<TO>();
    for (int row = 0; row < configuration.rows[TO]; ++row)
        set_row(registers[TO], row, (const char *)at + row * stride, configuration.row_bytes[TO]);
}

template <int FROM>
inline void store(void *at, int64_t stride) {
    require(configuration.rows[FROM] > 0);
    for (int row = 0; row < configuration.rows[FROM]; ++row)
        std::memcpy((char *)at + row * stride, registers[FROM].row[row], configuration.row_bytes[FROM]);
}

inline float as_float(uint32_t word) {
    float result;
    std::memcpy(&result, &word, sizeof result);
    return result;
}

// Not inlined: it must run between the two changes of the rounding control below.
[[gnu::noinline]] inline void multiply_add_registers(int to, int left, int right) {
    const Register &a = registers[left], &b = registers[right];
    const int pairs = configuration.row_bytes[left] / 4, outputs = configuration.row_bytes[to] / 4;
    require(pairs > 0 && configuration.rows[right] == pairs && configuration.rows[left] == configuration.rows[to] &&
            configuration.row_bytes[right] == configuration.row_bytes[to]);
    for (int row = 0; row < configuration.rows[to]; ++row) {
        float sums[2][16] = {}, result[16];
        for (int pair = 0; pair < pairs; ++pair)
            for (int i = 0; i < 16; ++i) {
                const uint32_t x = a.row[row][pair], y = b.row[pair][i];
                sums[0][i] = __builtin_fmaf(as_float(x << 16), as_float(y << 16), sums[0][i]);
                sums[1][i] = __builtin_fmaf(as_float(x & 0xffff0000), as_float(y & 0xffff0000), sums[1][i]);
            }
        std::memcpy(result, registers[to].row[row], sizeof result);
        for (int i = 0; i < 16; ++i) result[i] += sums[0][i] + sums[1][i];
        set_row(registers[to], row, result, 4 * outputs);
    }
}

// TO [rows][16] float32 += LEFT [rows][pairs][2] times RIGHT [pairs][16][2], of bf16. Denormals count as zeros and
// results are rounded to the nearest: the control register has no effect.
template <int TO, int LEFT, int RIGHT>
inline void multiply_add() {
    const unsigned control = _mm_getcsr();
    _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    multiply_add_registers(TO, LEFT, RIGHT);
    _mm_setcsr(control);
}

}  // namespace amx
