// Clusters of blocks that reach one another's shared memory (PTX ISA, "barrier.cluster", "mapa" and
// ".multicast::cluster").
#pragma once
#include <cstdint>

#include "tma.cuh"

namespace ptx {

// The block's number in its cluster.
__device__ inline uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Waits until every thread of the cluster that has not ended is here, and sees what they wrote.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where another block of the cluster has what this one has at an address of its shared memory.
__device__ inline uint32_t address_in(uint32_t shared, uint32_t rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared), "r"(rank));
    return mapped;
}

// Arrives at a barrier of any block of the cluster.
__device__ inline void mbarrier_arrive_mapped(uint32_t mapped) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

__device__ inline void store_mapped(uint32_t mapped, uint32_t value) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(mapped), "r"(value) : "memory");
}

// Copies a box to the same place in each block of the cluster that `ranks` has a bit for; its bytes count
// towards the barrier in the same place there.
__device__ inline void tma_load_multicast(uint32_t shared, const TensorMap* map, uint32_t barrier, uint64_t policy, uint16_t ranks, int column,
                                          int token, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%5, %6, %7, %8}], [%2], %4, %3;" ::"r"(shared),
        "l"(map), "r"(barrier), "l"(policy), "h"(ranks), "r"(column), "r"(token), "r"(head), "r"(batch)
        : "memory");
}

}  // namespace ptx
