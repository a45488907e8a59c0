// Registers and barriers of warpgroups: four warps each (PTX ISA, "setmaxnreg" and "bar"); values that
// are the same in all lanes of a warp ("redux"); and one lane of them ("elect").
#pragma once
#include <cstdint>

namespace ptx {

// A warpgroup gives back registers, or takes some of those given back. Not where tcgen05 is
// emulated: the emulation needs more registers than the instructions.
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

// A value that is the same in all lanes, such that the compiler knows it. It keeps what is computed
// from such values alone in uniform registers, which wgmma takes its descriptors from, as long as
// every loop around it ends for all lanes at once: one that waits for a barrier whose address it
// does not know to be uniform may not.
template <typename T>
__device__ inline T uniform(T value) {
    return __reduce_max_sync(0xffffffff, value);
}

// True in one lane of a warp, all of whose lanes call it. The compiler knows that it is one: elsewhere it
// makes a loop over the lanes of everything that the copy engine is told.
__device__ inline bool elect_lane() {
    uint32_t elected;
    asm volatile(
        "{.reg .pred one;\n"
        "elect.sync _|one, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, one;}"
        : "=r"(elected));
    return elected != 0;
}

// Named barriers: `threads` of those that arrive and those that wait open it.
__device__ inline void barrier_sync(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

__device__ inline void barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace ptx
