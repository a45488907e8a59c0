// Accesses to memory that other devices and copy engines write (PTX ISA, "memory consistency model").
#pragma once
#include <cstdint>

namespace ptx {

// Loads a word. What was written before the word, by anyone, is seen by later loads of this thread.
__device__ inline uint32_t load_acquire_system(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

}  // namespace ptx
