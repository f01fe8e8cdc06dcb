// Causal attention of tiles of queries over a paged KV cache, for Hopper.
//
// FlashAttention-3 (Shah et al., 2024): a warpgroup copies pages to shared memory (TMA), the others multiply (wgmma),
// and the products of one step of positions run while the softmax of the next is computed. Unlike there, warpgroups
// take no turns: named barriers that order their softmaxes made the kernel 4 % slower on an H200.
//
// Blocks are launched in clusters of two. In a launch with a long context, the blocks of a cluster share the positions
// of a tile, else each has tiles of its own.
//
// Macros: HEAD_DIM 64 or 128; GROUP: query heads of a key head; BLOCK_SIZE: positions of a page, 16, 32 or 64; FLOAT16:
// defined for float16 instead of bfloat16.
#include "hopper.cuh"

constexpr int WARPGROUPS = 2; // that multiply, 64 rows each
constexpr int STAGES = 2;     // steps in shared memory
constexpr int BLOCK_M = 64 * WARPGROUPS;
constexpr int BLOCK_N = 128;            // positions of a step
constexpr int TOKENS = BLOCK_M / GROUP; // row r of a tile is query head r % GROUP of token r / GROUP
constexpr int PAGES = BLOCK_N / BLOCK_SIZE;
constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int PAGE_BYTES = 2 * HEAD_DIM * BLOCK_SIZE;
constexpr int STEP_BYTES = PAGES * PAGE_BYTES;
constexpr int QUERY_BYTES = 2 * HEAD_DIM * BLOCK_M;
constexpr int CONSUMER_REGISTERS = 232;
constexpr int PRODUCER_REGISTERS = 40;
constexpr float LOWEST = -1e30f; // finite: the difference of two of them is 0
constexpr float LAZY = 8.0f;     // powers of two by which weights may exceed 1 before the output is rescaled
constexpr int EXCHANGE_BYTES = 128 * 4 * (HEAD_DIM / 2 + 4);
// What warpgroups give back is all that others can get: more, and they wait forever. A thread starts with a share of
// the register file that is a multiple of 8.
static_assert(WARPGROUPS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <=
                  (WARPGROUPS + 1) * (512 / (WARPGROUPS + 1) / 8 * 8),
              "registers of all warpgroups exceed those that they start with");
static_assert(BLOCK_N % BLOCK_SIZE == 0 && PAGES <= 32 && TOKENS > 0, "a step has whole pages, a tile whole tokens");

// Names of barriers, and their order in shared memory.
enum {
    QUERY_FULL,
    QUERY_EMPTY,
    KEYS_FULL,
    KEYS_EMPTY = KEYS_FULL + STAGES,
    VALUES_FULL = KEYS_EMPTY + STAGES,
    VALUES_EMPTY = VALUES_FULL + STAGES,
    EXCHANGE_FULL = VALUES_EMPTY + STAGES,
    EXCHANGE_EMPTY,
    BARRIERS
};
constexpr int ALL_CONSUMERS = 1; // a named barrier

struct Tile {
    int sequence, kv_head, first_row, first_token, query_len, context_len, prefix;
    int first_step, end_step; // those of this block
};

// A slot of a ring of shared memory, and the parity of the phase in which it is filled.
struct Slot {
    int index = 0;
    u32 parity = 0;
    DEVICE_MEMBER void next() {
        if (++index == STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

// What a step of the engine is made of, and the shared memory of a block.
struct Launch {
    const int *block_tables, *query_start, *context_lens;
    long long table_stride;
    int num_blocks, num_sequences, num_tiles, kv_heads;
    u32 query, keys, values, buffer, barriers;

    DEVICE_MEMBER u32 barrier(int name) const { return barriers + 8 * name; }
    DEVICE_MEMBER u32 flag() const { return barriers + 8 * BARRIERS; }
    // Whether the blocks of a cluster share tiles.
    DEVICE_MEMBER bool shares() const { return load_shared_int(flag()); }
    DEVICE_MEMBER int units() const { return shares() ? gridDim.x / 2 : gridDim.x; }
    DEVICE_MEMBER int rounds() const { return (num_tiles * kv_heads + units() - 1) / units(); }
    DEVICE_MEMBER bool find(Tile &tile, int round) const;
};

// Find this block's tile of a round; false if there is none. Every other round goes backwards, for an even share of the
// work. Sequence b's tiles of a key head are numbered from query_start[b] / TOKENS + b on, at least as many as it has.
// The last ones, which see most positions, start first.
DEVICE_MEMBER bool Launch::find(Tile &tile, int round) const {
    const bool shared = shares();
    const int count = shared ? gridDim.x / 2 : gridDim.x, unit = shared ? blockIdx.x / 2 : blockIdx.x;
    const int number = round * count + (round & 1 ? count - 1 - unit : unit);
    if (number >= num_tiles * kv_heads)
        return false;
    tile.kv_head = number % kv_heads;
    const int index = num_tiles - 1 - number / kv_heads;
    int low = 0, high = num_sequences;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (query_start[middle] / TOKENS + middle <= index)
            low = middle + 1;
        else
            high = middle;
    }
    tile.sequence = low - 1;
    tile.first_row = query_start[tile.sequence];
    tile.query_len = query_start[tile.sequence + 1] - tile.first_row;
    tile.first_token = (index - (tile.first_row / TOKENS + tile.sequence)) * TOKENS;
    if (tile.first_token >= tile.query_len)
        return false;
    tile.context_len = context_lens[tile.sequence];
    tile.prefix = tile.context_len - tile.query_len;
    const int seen = tile.prefix + min(tile.first_token + TOKENS, tile.query_len);
    const int steps = seen <= 0 ? 0 : (seen + BLOCK_N - 1) / BLOCK_N;
    tile.first_step = shared && cluster_rank() == 1 ? steps / 2 : 0;
    tile.end_step = shared && cluster_rank() == 0 ? steps / 2 : steps;
    return true;
}

// Copy the pages of one step of keys or values. All lanes of the producer call it, lane i with the block of page i.
template <bool KEYS> DEVICE void load_step(const TensorMap &map, u32 to, u32 full, int page, int lane, int kv_head) {
    if (lane == 0)
        arrive_expecting(full, STEP_BYTES);
    __syncwarp();
    if (lane < PAGES) {
        if (KEYS)
            load_box(to + lane * PAGE_BYTES, map, full, 0, 0, kv_head, page);
        else
            load_box(to + lane * PAGE_BYTES, map, full, 0, 0, 0, kv_head, page);
    }
}

// S = Q K of a warpgroup's rows. query: its first row; keys: the step's pages.
DEVICE void multiply_keys(float (&scores)[BLOCK_N / 2], u32 query, u32 keys) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k)
        wgmma(scores, matrix(query + k / 4 * (BLOCK_M * 128) + k % 4 * 32, 128, 16, 1024),
              matrix(keys + k * 32 * BLOCK_SIZE, 2 * BLOCK_SIZE, PAGE_BYTES, 16 * BLOCK_SIZE), k > 0);
}

// O += P V.
DEVICE void multiply_values(float (&output)[HEAD_DIM / 2], const u32 (&weights)[BLOCK_N / 4], u32 values) {
#pragma unroll
    for (int k = 0; k < BLOCK_N / 16; ++k)
        wgmma(
            output, weights + 4 * k,
            matrix(values + k * 16 / BLOCK_SIZE * PAGE_BYTES + k * 16 % BLOCK_SIZE * 128, 128, 128 * BLOCK_SIZE, 1024),
            1);
}

// What a thread knows of its two rows: row r / 4 of its warp (r: lane) and the row 8 below.
struct Rows {
    float maximum[2], sum[2];
    int visible[2]; // positions that the row sees
};

DEVICE void mask(float (&scores)[BLOCK_N / 2], const Rows &rows, int first_position) {
    const int low = rows.visible[0] - first_position - 2 * (threadIdx.x % 4);
    const int high = rows.visible[1] - first_position - 2 * (threadIdx.x % 4);
    const float nothing = __int_as_float(0xFF800000);
#pragma unroll
    for (int j = 0; j < BLOCK_N / 8; ++j) {
        scores[4 * j] = 8 * j < low ? scores[4 * j] : nothing;
        scores[4 * j + 1] = 8 * j + 1 < low ? scores[4 * j + 1] : nothing;
        scores[4 * j + 2] = 8 * j < high ? scores[4 * j + 2] : nothing;
        scores[4 * j + 3] = 8 * j + 1 < high ? scores[4 * j + 3] : nothing;
    }
}

// Turn scores into weights; fold them into maximum and sum. Returns in `factor` by what the output must be multiplied.
// The maximum only follows if weights would exceed 2 ** LAZY (FlashAttention-4): rescaling is rare, the result the
// same.
DEVICE bool softmax(float (&scores)[BLOCK_N / 2], Rows &rows, float scale, float (&factor)[2]) {
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float a = scores[2 * r], b = scores[2 * r + 1];
#pragma unroll
        for (int j = 1; j < BLOCK_N / 8; ++j) {
            a = fmaxf(a, scores[4 * j + 2 * r]);
            b = fmaxf(b, scores[4 * j + 2 * r + 1]);
        }
        a = fmaxf(a, b);
        a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
        a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
        const bool moves = (a - rows.maximum[r]) * scale > LAZY;
        const float maximum = moves ? a : rows.maximum[r];
        factor[r] = exp2_approx((rows.maximum[r] - maximum) * scale);
        rows.maximum[r] = maximum;
        moved |= moves;
        const float shift = maximum * scale;
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j) {
            float &x = scores[4 * j + 2 * r], &y = scores[4 * j + 2 * r + 1];
            x = exp2_approx(__fmaf_rn(x, scale, -shift));
            y = exp2_approx(__fmaf_rn(y, scale, -shift));
            even += x;
            odd += y;
        }
        rows.sum[r] = __fmaf_rn(rows.sum[r], factor[r], even + odd);
    }
    return __any_sync(~0u, moved);
}

// Have the sums, and so the weights, computed here. The compiler sees no reason to compute them before it waits for
// products, and moves them behind the wait but for an instruction that it must keep in order and that needs them.
DEVICE void finish(const Rows &rows) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(rows.sum[0] +
                                                                                                         rows.sum[1]),
                 "r"(0)
                 : "memory");
}

DEVICE void pack_weights(u32 (&weights)[BLOCK_N / 4], const float (&scores)[BLOCK_N / 2]) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 4; ++i)
        weights[i] = pack(scores[2 * i], scores[2 * i + 1]);
}

DEVICE void rescale(float (&output)[HEAD_DIM / 2], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i)
        output[i] *= factor[i / 2 % 2];
}

// Zero the values of positions past the context: a weight of 0 times NaN is NaN. All consumers call it.
DEVICE void clear_values(u32 values, int context_len, int first_position) {
    const int end = first_position + BLOCK_N;
    if (end <= context_len)
        return;
    constexpr int CHUNKS = HEAD_DIM / 64 * 8; // of 16 bytes
    for (int i = threadIdx.x; i < (end - context_len) * CHUNKS; i += CONSUMERS) {
        const int position = context_len - first_position + i / CHUNKS, chunk = i % CHUNKS;
        const u32 row = values + position / BLOCK_SIZE * PAGE_BYTES + position % BLOCK_SIZE * 128;
        // The order of chunks within a row does not matter: all become 0.
        asm volatile(
            "st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(row + chunk / 8 * (128 * BLOCK_SIZE) + chunk % 8 * 16),
            "r"(0)
            : "memory");
    }
    fence_async_proxy();
    sync_threads(ALL_CONSUMERS, CONSUMERS);
}

// Exchange words within groups of four lanes: word i of lane l becomes word l of lane i.
DEVICE void transpose(u32 (&words)[4]) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
        const bool upper = threadIdx.x & distance;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & distance)
                continue;
            const u32 got = __shfl_xor_sync(~0u, upper ? words[i] : words[i | distance], distance);
            if (upper)
                words[i] = got;
            else
                words[i | distance] = got;
        }
    }
}

// Combine the results of a cluster's two blocks: each sends the rows that the other finishes. Returns whether this
// warpgroup finishes its rows here. buffer: EXCHANGE_BYTES at the same place of both blocks.
DEVICE bool exchange(float (&output)[HEAD_DIM / 2], Rows &rows, u32 buffer, u32 barriers, u32 parity, float scale) {
    const u32 rank = cluster_rank(), thread = threadIdx.x % 128;
    buffer += 16 * thread;
    if (threadIdx.x / 128 != rank) {
        const u32 to = address_in(rank ^ 1, buffer);
        wait_remote(barriers + 8 * EXCHANGE_EMPTY, parity ^ 1, EXCHANGE_EMPTY);
        store_remote(to, rows.maximum[0], rows.maximum[1], rows.sum[0], rows.sum[1]);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; ++i)
            store_remote(to + 2048 * (i + 1), output[4 * i], output[4 * i + 1], output[4 * i + 2], output[4 * i + 3]);
        arrive_remote(address_in(rank ^ 1, barriers + 8 * EXCHANGE_FULL));
        return false;
    }
    wait_remote(barriers + 8 * EXCHANGE_FULL, parity, EXCHANGE_FULL);
    const float4 other = load_shared(buffer);
    const float maxima[2] = {other.x, other.y}, sums[2] = {other.z, other.w};
    float own[2], theirs[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float maximum = fmaxf(rows.maximum[r], maxima[r]);
        own[r] = exp2_approx((rows.maximum[r] - maximum) * scale);
        theirs[r] = exp2_approx((maxima[r] - maximum) * scale);
        rows.sum[r] = rows.sum[r] * own[r] + sums[r] * theirs[r];
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
        const float4 x = load_shared(buffer + 2048 * (i + 1));
        output[4 * i] = output[4 * i] * own[0] + x.x * theirs[0];
        output[4 * i + 1] = output[4 * i + 1] * own[0] + x.y * theirs[0];
        output[4 * i + 2] = output[4 * i + 2] * own[1] + x.z * theirs[1];
        output[4 * i + 3] = output[4 * i + 3] * own[1] + x.w * theirs[1];
    }
    arrive_remote(address_in(rank ^ 1, barriers + 8 * EXCHANGE_EMPTY));
    return true;
}

// Write the output of a thread's two rows, 16 bytes a store. row: the first one's in the tile.
DEVICE void store(void *to, float (&output)[HEAD_DIM / 2], const Rows &rows, const Tile &tile, int row, int heads) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = rows.sum[r] + __shfl_xor_sync(~0u, rows.sum[r], 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
        const int tile_row = row + 8 * r, token = tile.first_token + tile_row / GROUP;
        const bool stored = tile_row < TOKENS * GROUP && token < tile.query_len;
        const long long head =
            static_cast<long long>(tile.first_row + token) * heads + tile.kv_head * GROUP + tile_row % GROUP;
        char *target = static_cast<char *>(to) + head * (2 * HEAD_DIM) + threadIdx.x % 4 * 16;
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 32; ++j) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i] = pack(output[16 * j + 4 * i + 2 * r] * inverse, output[16 * j + 4 * i + 2 * r + 1] * inverse);
            transpose(words);
            if (stored)
                asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target + 64 * j), "r"(words[0]),
                             "r"(words[1]), "r"(words[2]), "r"(words[3])
                             : "memory");
        }
    }
}

// Copy queries, keys and values of all tiles of a block. One warp runs this.
DEVICE void produce(const Launch &launch, const TensorMap &query_map, const TensorMap &key_map,
                    const TensorMap &value_map) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) {
        prefetch(query_map);
        prefetch(key_map);
        prefetch(value_map);
    }
    Slot slot;
    u32 query_parity = 0;
    Tile tile;
    for (int round = 0; round < launch.rounds(); ++round) {
        if (!launch.find(tile, round) || tile.first_step == tile.end_step)
            continue;
        wait(launch.barrier(QUERY_EMPTY), query_parity ^ 1, QUERY_EMPTY);
        query_parity ^= 1;
        if (lane == 0) {
            arrive_expecting(launch.barrier(QUERY_FULL), 2 * HEAD_DIM * TOKENS * GROUP);
            for (int half = 0; half < HEAD_DIM / 64; ++half)
                load_box(launch.query + half * (BLOCK_M * 128), query_map, launch.barrier(QUERY_FULL), 64 * half, 0,
                         tile.first_row + tile.first_token, tile.kv_head);
        }
        // Each lane reads the block of one page, for as many steps at a time as fit. Pages past the context get a
        // number out of bounds, which reads as zeros.
        constexpr int STEPS = 32 / PAGES;
        const int *table = launch.block_tables + tile.sequence * launch.table_stride;
        int next = 0;
        const auto read_ahead = [&](int last_step) {
            const int page = (last_step - lane / PAGES) * PAGES + lane % PAGES;
            const bool exists = lane < STEPS * PAGES && page >= 0 && page * BLOCK_SIZE < tile.context_len;
            next = exists ? table[page] : launch.num_blocks;
        };
        read_ahead(tile.end_step - 1);
        for (int last = tile.end_step - 1; last >= tile.first_step; last -= STEPS) {
            const int pages = next;
            read_ahead(last - STEPS);
            for (int i = 0; i < STEPS && last - i >= tile.first_step; ++i) {
                const int page = __shfl_sync(~0u, pages, (i * PAGES + lane) % 32);
                wait(launch.barrier(KEYS_EMPTY + slot.index), slot.parity ^ 1, KEYS_EMPTY);
                load_step<true>(key_map, launch.keys + slot.index * STEP_BYTES, launch.barrier(KEYS_FULL + slot.index),
                                page, lane, tile.kv_head);
                wait(launch.barrier(VALUES_EMPTY + slot.index), slot.parity ^ 1, VALUES_EMPTY);
                load_step<false>(value_map, launch.values + slot.index * STEP_BYTES,
                                 launch.barrier(VALUES_FULL + slot.index), page, lane, tile.kv_head);
                slot.next();
            }
        }
    }
}

// The steps of keys, or of values, that the producer fills one after the other.
template <int FULL, int EMPTY> struct Ring {
    u32 memory, barriers;
    Slot slot;

    DEVICE_MEMBER u32 await() const {
        wait(barriers + 8 * (FULL + slot.index), slot.parity, FULL);
        return memory + slot.index * STEP_BYTES;
    }
    DEVICE_MEMBER void release() {
        if (threadIdx.x % 32 == 0)
            arrive(barriers + 8 * (EMPTY + slot.index));
        slot.next();
    }
};

using KeyRing = Ring<KEYS_FULL, KEYS_EMPTY>;
using ValueRing = Ring<VALUES_FULL, VALUES_EMPTY>;

// Wait for the whole output of a step, and give its values' memory back.
DEVICE void finish_output(float (&out)[HEAD_DIM / 2], ValueRing &values) {
    wgmma_wait<0>();
    pin(out);
    values.release();
}

DEVICE void start_output(float (&out)[HEAD_DIM / 2], const u32 (&weights)[BLOCK_N / 4], const ValueRing &values) {
    const u32 memory = values.await();
    wgmma_fence();
    multiply_values(out, weights, memory);
    wgmma_commit();
}

DEVICE void start_scores(float (&scores)[BLOCK_N / 2], u32 query, const KeyRing &keys) {
    const u32 memory = keys.await();
    wgmma_fence();
    multiply_keys(scores, query, memory);
    wgmma_commit();
}

// The attention of a warpgroup's rows to the steps of a tile, of which there must be one. query: its first row.
// query_empty: the barrier that gives the queries' memory back.
DEVICE void attend(float (&out)[HEAD_DIM / 2], Rows &rows, const Tile &tile, u32 query, u32 query_empty, KeyRing &keys,
                   ValueRing &values, float scale) {
    const int unmasked = max(tile.prefix + tile.first_token + 1, 0) / BLOCK_N; // steps that all rows see
    float scores[BLOCK_N / 2], factor[2];
    u32 weights[BLOCK_N / 4];
    int step = tile.end_step - 1;
    start_scores(scores, query, keys);
    wgmma_wait<0>();
    pin(scores);
    keys.release();
    if (step >= unmasked)
        mask(scores, rows, step * BLOCK_N);
    softmax(scores, rows, scale, factor);
    pack_weights(weights, scores);
    clear_values(values.await(), tile.context_len, step * BLOCK_N);
    while (--step >= tile.first_step) {
        start_scores(scores, query, keys);
        start_output(out, weights, values);
        wgmma_wait<1>();
        pin(scores);
        keys.release();
        if (step >= unmasked)
            mask(scores, rows, step * BLOCK_N);
        const bool moved = softmax(scores, rows, scale, factor);
        finish(rows);
        finish_output(out, values);
        if (moved)
            rescale(out, factor);
        pack_weights(weights, scores);
    }
    if (threadIdx.x % 32 == 0)
        arrive(query_empty);
    start_output(out, weights, values);
    finish_output(out, values);
}

// Take part in the steps of a tile for a warpgroup that has no rows in it.
DEVICE void skip(const Tile &tile, u32 query_empty, KeyRing &keys, ValueRing &values) {
    for (int step = tile.end_step - 1; step >= tile.first_step; --step) {
        keys.await();
        keys.release();
        const u32 memory = values.await();
        if (step == tile.end_step - 1)
            clear_values(memory, tile.context_len, step * BLOCK_N);
        values.release();
    }
    if (threadIdx.x % 32 == 0)
        arrive(query_empty);
}

// Multiply, and write the output of all tiles of a block. The consumers run this.
DEVICE void consume(const Launch &launch, void *output, float scale) {
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 * 16 + lane / 4;
    u32 query_parity = 0, exchange_parity = 0;
    KeyRing keys{launch.keys, launch.barriers};
    ValueRing values{launch.values, launch.barriers};
    Tile tile;
    for (int round = 0; round < launch.rounds(); ++round) {
        if (!launch.find(tile, round))
            continue;
        float out[HEAD_DIM / 2];
        Rows rows;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i)
            out[i] = 0.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            rows.maximum[r] = LOWEST;
            rows.sum[r] = 0.0f;
            rows.visible[r] = min(tile.prefix + tile.first_token + (row + 8 * r) / GROUP + 1, tile.context_len);
        }
        if (tile.first_step < tile.end_step) {
            wait(launch.barrier(QUERY_FULL), query_parity, QUERY_FULL);
            query_parity ^= 1;
            if (warpgroup * 64 < (tile.query_len - tile.first_token) * GROUP)
                attend(out, rows, tile, launch.query + warpgroup * (64 * 128), launch.barrier(QUERY_EMPTY), keys,
                       values, scale);
            else
                skip(tile, launch.barrier(QUERY_EMPTY), keys, values);
        }
        if (launch.shares()) {
            const bool finishes = exchange(out, rows, launch.buffer, launch.barriers, exchange_parity, scale);
            exchange_parity ^= 1;
            if (!finishes)
                continue;
        }
        store(output, out, rows, tile, row, GROUP * launch.kv_heads);
    }
}

// The longest context, by one warp.
DEVICE int longest_context(const int *context_lens, int num_sequences) {
    int longest = 0;
    for (int i = threadIdx.x % 32; i < num_sequences; i += 32)
        longest = max(longest, context_lens[i]);
    return __reduce_max_sync(~0u, longest);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(CONSUMERS + 128, 1)
    prefill_attention(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap key_map,
                      const __grid_constant__ TensorMap value_map, void *output, const int *block_tables,
                      const int *query_start, const int *context_lens, long long table_stride, long long num_blocks,
                      long long num_sequences, long long num_tiles, long long kv_heads, long long min_shared_context,
                      float scale) {
    extern __shared__ char dynamic[];
    Launch launch{block_tables,
                  query_start,
                  context_lens,
                  table_stride,
                  static_cast<int>(num_blocks),
                  static_cast<int>(num_sequences),
                  static_cast<int>(num_tiles),
                  static_cast<int>(kv_heads)};
    launch.query = (shared_address(dynamic) + 1023) & ~1023u; // swizzles repeat every 1024 bytes
    launch.keys = launch.query + QUERY_BYTES;
    launch.values = launch.keys + STAGES * STEP_BYTES;
    launch.buffer = launch.values + STAGES * STEP_BYTES;
    launch.barriers = launch.buffer + EXCHANGE_BYTES;
    if (threadIdx.x == 0) {
        init_barrier(launch.barrier(QUERY_FULL), 1);
        init_barrier(launch.barrier(QUERY_EMPTY), CONSUMERS / 32);
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(launch.barrier(KEYS_FULL + i), 1);
            init_barrier(launch.barrier(VALUES_FULL + i), 1);
            init_barrier(launch.barrier(KEYS_EMPTY + i), CONSUMERS / 32);
            init_barrier(launch.barrier(VALUES_EMPTY + i), CONSUMERS / 32);
        }
        init_barrier(launch.barrier(EXCHANGE_FULL), 128);
        init_barrier(launch.barrier(EXCHANGE_EMPTY), 128);
        fence_barriers();
    } else if (threadIdx.x / 32 == 1)
        store_shared(launch.flag(), longest_context(context_lens, launch.num_sequences) >= min_shared_context);
    sync_cluster();
    if (threadIdx.x >= CONSUMERS) {
        lower_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < CONSUMERS + 32)
            produce(launch, query_map, key_map, value_map);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume(launch, output, scale);
    }
    sync_cluster(); // the other block may still write to this one's memory
}
