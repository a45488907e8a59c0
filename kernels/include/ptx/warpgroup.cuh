// Registers and barriers of warpgroups: four warps each (PTX ISA, "setmaxnreg" and "bar").
#pragma once
#include <cstdint>

namespace ptx {

// A warpgroup gives back registers, or takes some of those given back. Not where functions are emulated, which need more than their
// instructions.
template <int REGISTERS>
__device__ inline void release_registers() {
#ifndef VARLEN_FA_EMULATE_TCGEN05
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

template <int REGISTERS>
__device__ inline void take_registers() {
#ifndef VARLEN_FA_EMULATE_TCGEN05
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// Named barriers: `threads` of those that arrive and those that wait open it.
__device__ inline void barrier_sync(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

__device__ inline void barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace ptx
