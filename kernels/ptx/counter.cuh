// Counters in shared memory, which order what comes before an addition and after a read that sees it.
#pragma once
#include <cstdint>

namespace ptx {

__device__ inline void add_release(uint32_t counter, uint32_t number) {
    asm volatile("red.release.cta.shared::cta.add.u32 [%0], %1;" ::"r"(counter), "r"(number) : "memory");
}

__device__ inline uint32_t read_acquire(uint32_t counter) {
    uint32_t number;
    asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(number) : "r"(counter) : "memory");
    return number;
}

}  // namespace ptx
