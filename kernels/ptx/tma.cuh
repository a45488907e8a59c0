// Tensor copies between global and shared memory by the copy engine (PTX ISA,
// "cp.async.bulk.tensor"). Positions outside the tensor are read as zeros and not written.
#pragma once
#include <cstdint>

namespace ptx {

// What the driver's cuTensorMapEncodeTiled writes.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

// L2 policies: data that will be read again by other blocks, and data that will not.
__device__ inline uint64_t policy_evict_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline uint64_t policy_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Copies a box to shared memory; its bytes count towards the barrier's phase.
__device__ inline void tma_load(uint32_t shared, const TensorMap* map, uint32_t barrier, uint64_t policy, int column, int token, int head,
                                int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared),
        "l"(map), "r"(barrier), "l"(policy), "r"(column), "r"(token), "r"(head), "r"(batch)
        : "memory");
}

// Copies a box from shared memory, as part of this thread's current group.
__device__ inline void tma_store(const TensorMap* map, uint32_t shared, int column, int token, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(shared), "r"(column),
                 "r"(token), "r"(head), "r"(batch)
                 : "memory");
}

// Copies bytes in a row, sixteen or a multiple of it, from shared memory, as part of this thread's current group.
__device__ inline void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)), "r"(shared), "r"(bytes)
                 : "memory");
}

__device__ inline void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read their shared memory.
__device__ inline void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Waits until this thread's stores are done.
__device__ inline void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and
// the tensor cores.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders what this thread knows of global memory before later loads of the copy engine.
__device__ inline void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace ptx
