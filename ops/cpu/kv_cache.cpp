// Keys and values of a step's tokens into their pages.
#include <cstdint>

#include "thread_pool.h"

namespace {

template <typename T>
void write_kv(T *keys, T *values, const T *key, int64_t key_stride, const T *value, int64_t value_stride,
              const int32_t *slot_mapping, int64_t tokens, int64_t kv_heads, int64_t head_dim, int64_t block_size) {
    const int64_t page = head_dim * block_size;
    // Slots are distinct but for padding's, and what lies there is never read.
    const auto write = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t head = i / tokens, token = i % tokens;
            const int64_t slot = slot_mapping[token], block = slot / block_size, offset = slot % block_size;
            T *key_page = keys + (block * kv_heads + head) * page + offset;
            T *value_row = values + (block * kv_heads + head) * page + offset * head_dim;
            const T *from_key = key + token * key_stride + head * head_dim;
            const T *from_value = value + token * value_stride + head * head_dim;
            for (int64_t d = 0; d < head_dim; ++d) {
                key_page[d * block_size] = from_key[d];
                value_row[d] = from_value[d];
            }
        }
    };
    const int64_t all = kv_heads * tokens;
    all * head_dim > 1024 ? parallel_for(all, write) : write(0, all);
}

}  // namespace

// key and value [tokens, kv_heads, head_dim], tokens `key_stride` and `value_stride` elements apart.
#define WRITE_KV(name, T)                                                                                            \
    extern "C" void name(T *keys, T *values, const T *key, int64_t key_stride, const T *value, int64_t value_stride, \
                         const int32_t *slot_mapping, int64_t tokens, int64_t kv_heads, int64_t head_dim,            \
                         int64_t block_size) {                                                                       \
        write_kv(keys, values, key, key_stride, value, value_stride, slot_mapping, tokens, kv_heads, head_dim,       \
                 block_size);                                                                                        \
    }

WRITE_KV(dispec_write_kv_bfloat16, uint16_t)
WRITE_KV(dispec_write_kv_float32, float)
