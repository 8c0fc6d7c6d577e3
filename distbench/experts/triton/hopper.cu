// Instructions of Hopper GPUs as functions: barriers, copies by tensor maps, products of warpgroups, conversions.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

struct alignas(64) TensorMap {
    char bytes[128];
};

__device__ __forceinline__ u32 address_of(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void await(const u64& barrier, u32 phase) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address_of(&barrier)), "r"(phase)
                     : "memory");
    } while (!done);
}

__device__ __forceinline__ void expect(u64& barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(&barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void arrive_at(u64& barrier, u32 block) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
        " mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(address_of(&barrier)),
        "r"(block)
        : "memory");
}

__device__ __forceinline__ void load_matrix(void* to, const TensorMap& from, u64& barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            address_of(to)),
        "l"(&from), "r"(address_of(&barrier)), "r"(column), "r"(row)
        : "memory");
}

// Loads 128 rows of weights into both blocks.
__device__ __forceinline__ void load_weights(void* to, const TensorMap& from, u64& barrier, int column, int group,
                                             int matrix) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4, %4, %5, %6}], [%2], %7;" ::"r"(address_of(to)),
        "l"(&from), "r"(address_of(&barrier)), "r"(column), "r"(0), "r"(group), "r"(matrix), "h"(static_cast<u16>(3))
        : "memory");
}

template <int COUNT>
__device__ __forceinline__ void synchronize(int name) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(COUNT) : "memory");
}

__device__ __forceinline__ void synchronize_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Matrix of rows of 128 bytes with the 128-byte swizzle, 8 rows after 1024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (static_cast<u64>(1) << 62) | (static_cast<u64>(64) << 32) | (static_cast<u64>(1) << 16) |
           ((address & 0x3FFFF) >> 4);
}

template <int SIZE>
__device__ __forceinline__ void hold(float (&values)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

__device__ __forceinline__ void open_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ u32 e4m3_pair(float low, float high) {
    u16 both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
}

// Stores 8 x 8 matrices of two-byte elements transposed: lane 8 m + r has the address of column r of matrix m.
__device__ __forceinline__ void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}
