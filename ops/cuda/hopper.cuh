// Instructions of Hopper (sm_90a) as functions: mbarriers, the tensor memory accelerator (TMA), warpgroup matrix
// products (wgmma), register reallocation, named barriers. Semantics: PTX ISA 8.0 and later.
#pragma once

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

typedef unsigned int u32;
typedef unsigned long long u64;

// What `library.tensor_map` encodes. Kernels take it as `const __grid_constant__ TensorMap`.
struct __align__(64) TensorMap {
    char bytes[128];
};

DEVICE u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// One thread initialises barriers; then fence_barriers, then a barrier of the block.
DEVICE void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

DEVICE void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and have the phase also wait for `bytes` of copies.
DEVICE void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

DEVICE bool try_wait(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

// Wait for the end of the phase of this parity. With the macro SPIN_LIMIT, a wait of that many tries ends the kernel
// with a message instead of hanging; `name` tells the barrier.
DEVICE void wait(u32 barrier, u32 parity, int name) {
#ifdef SPIN_LIMIT
    for (int i = 0; !try_wait(barrier, parity); ++i)
        if (i > SPIN_LIMIT) {
            printf("block %d thread %d waits for barrier %d parity %d\n", blockIdx.x, threadIdx.x, name, parity);
            asm volatile("trap;");
        }
#else
    while (!try_wait(barrier, parity)) {
    }
#endif
}

// Clusters: the rank of this block, the address of the same variable in another block, a barrier of all threads.
DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

DEVICE u32 address_in(u32 rank, u32 address) {
    u32 mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

DEVICE void arrive_remote(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// `wait` for arrivals of other blocks.
DEVICE void wait_remote(u32 barrier, u32 parity, int name) {
    wait(barrier, parity, name);
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
}

DEVICE void store_remote(u32 to, float a, float b, float c, float d) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

DEVICE void store_shared(u32 to, int x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

DEVICE int load_shared_int(u32 from) {
    int x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}

DEVICE float4 load_shared(u32 from) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}

DEVICE void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Make this thread's writes to shared memory visible to TMA and wgmma.
DEVICE void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void prefetch(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

DEVICE void load_box(u32 to, const TensorMap &map, u32 barrier, int a, int b, int c, int d) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

DEVICE void load_box(u32 to, const TensorMap &map, u32 barrier, int a, int b, int c, int d, int e) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e)
                 : "memory");
}

template <int REGISTERS> DEVICE void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> DEVICE void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most PENDING groups of products are unfinished.
template <int PENDING> DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keep the compiler from moving reads of an accumulator over a wait.
template <int COUNT> DEVICE void pin(float (&accumulator)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        asm volatile("" : "+f"(accumulator[i])::"memory");
}

// A matrix in shared memory as wgmma reads it. swizzle: bytes, as in the tensor map. leading, stride: bytes, "leading
// dimension byte offset" and "stride dimension byte offset" of the PTX ISA.
DEVICE u64 matrix(u32 address, int swizzle, u32 leading, u32 stride) {
    const u64 layout = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
    return layout << 62 | static_cast<u64>(stride >> 4) << 32 | static_cast<u64>(leading >> 4) << 16 |
           (address & 0x3FFFF) >> 4;
}

#ifdef FLOAT16
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

// Round two numbers to the 16-bit type; `low` comes first in memory.
DEVICE u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#define R8_0 "%0, %1, %2, %3, %4, %5, %6, %7, "
#define R8_1 "%8, %9, %10, %11, %12, %13, %14, %15, "
#define R8_2 "%16, %17, %18, %19, %20, %21, %22, %23, "
#define R8_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define R8_4 ", %32, %33, %34, %35, %36, %37, %38, %39, "
#define R8_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define R8_6 ", %48, %49, %50, %51, %52, %53, %54, %55, "
#define R8_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define R32 R8_0 R8_1 R8_2 R8_3
#define R64 R32 R8_4 R8_5 R8_6 R8_7
#define D8(i)                                                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define D32 D8(0), D8(8), D8(16), D8(24)
#define D64 D32, D8(32), D8(40), D8(48), D8(56)

// d = d * accumulate + A B for 64 rows, 16 columns of A. A: K-major, in shared memory, or in registers as PTX lays out
// A fragments; B: MN-major ("transposed"), in shared memory.
#define WGMMA(N, REGISTERS, OPERANDS, A0, B0, P0, A1, A2, A3, B1, P1)                                                  \
    DEVICE void wgmma(float (&d)[N / 2], u64 a, u64 b, int accumulate) {                                               \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P0 ", 0;\n"                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A0 ", " B0   \
                     ", p, 1, 1, 0, 1;\n}"                                                                             \
                     : OPERANDS                                                                                        \
                     : "l"(a), "l"(b), "r"(accumulate));                                                               \
    }                                                                                                                  \
    DEVICE void wgmma(float (&d)[N / 2], const u32 *a, u64 b, int accumulate) {                                        \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P1 ", 0;\n"                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A0 ", " A1  \
                     ", " A2 ", " A3 "}, " B1 ", p, 1, 1, 1;\n}"                                                       \
                     : OPERANDS                                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                           \
    }
WGMMA(64, R32, D32, "%32", "%33", "%34", "%33", "%34", "%35", "%36", "%37")
WGMMA(128, R64, D64, "%64", "%65", "%66", "%65", "%66", "%67", "%68", "%69")
