// The instructions of AMX on tiles of bf16. GCC's intrinsics do not say which memory they read: a store before one may
// be moved behind it. These do.
#pragma once
#include <cstdint>

namespace amx {

// The operand of LDTILECFG.
struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

}  // namespace amx

#ifdef DISPEC_AMX_EMULATED
#include "amx_emulated.h"
#else
namespace amx {

inline void configure(const Configuration &to) { asm volatile("ldtilecfg %0" ::"m"(to)); }

inline void release() { asm volatile("tilerelease"); }

template <int TO>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TO));
}

// Rows of 64 bytes, `stride` bytes apart.
template <int TO>
inline void load(const void *at, int64_t stride) {
    asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(TO) : "memory");
}

template <int FROM>
inline void store(void *at, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(at), "r"(stride), "i"(FROM) : "memory");
}

// TO [rows][16] float32 += LEFT [rows][pairs][2] times RIGHT [pairs][16][2], of bf16.
template <int TO, int LEFT, int RIGHT>
inline void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TO), "i"(LEFT), "i"(RIGHT));
}

}  // namespace amx
#endif
