// Barriers in shared memory that count threads and the bytes of asynchronous copies (PTX ISA,
// "mbarrier").
#pragma once
#include <cstdint>

#include "jitter.cuh"

namespace ptx {

__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and holds the phase open until `bytes` more have been copied.
__device__ inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}

// Waits for the end of the phase of this parity. A fresh barrier is in phase 0, and counts as past
// a phase of parity 1.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    jitter();
#ifdef VARLEN_FA_SPIN_LIMIT
    // For tests: a lost arrival gives wrong results instead of hanging the device. (A trap would
    // keep wgmma from overlapping.)
    for (int spins = 0; !mbarrier_try_wait(barrier, parity) && spins < VARLEN_FA_SPIN_LIMIT; ++spins) {
    }
#else
    while (!mbarrier_try_wait(barrier, parity)) {
    }
#endif
}

}  // namespace ptx
