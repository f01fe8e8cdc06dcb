// The largest element of each row.
#include <cstdint>

#include "entries.h"
#include "largest.h"
#include "thread_pool.h"

namespace {

template <typename T>
void argmax(const T *x, int64_t stride, int64_t rows, int64_t n, int64_t *out) {
    parallel_for(rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) out[row] = largest_of(x + row * stride, n);
    });
}

}  // namespace

extern "C" void dispec_argmax_bfloat16(const bfloat16 *x, int64_t stride, int64_t rows, int64_t n, int64_t *out) {
    argmax(x, stride, rows, n, out);
}

extern "C" void dispec_argmax_float32(const float *x, int64_t stride, int64_t rows, int64_t n, int64_t *out) {
    argmax(x, stride, rows, n, out);
}
