// For tests: waits of random length, so that warps meet in unusual orders. VARLEN_FA_JITTER is the
// seed; without it there are no waits.
#pragma once
#include <cstdint>

namespace ptx {

__device__ inline void jitter() {
#ifdef VARLEN_FA_JITTER
    // The clock moves on between calls; mixed as by SplitMix64.
    uint64_t x = static_cast<uint64_t>(clock64() >> 4) + (threadIdx.x / 32 + 1) * 0x9e3779b97f4a7c15u + VARLEN_FA_JITTER;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    const uint32_t active = __activemask();
    const uint32_t drawn = __shfl_sync(active, static_cast<uint32_t>(x >> 32), __ffs(active) - 1);
    // Mostly none; sometimes longer than a product or a softmax takes.
    if (drawn % 4 == 0) __nanosleep(drawn / 4 % (drawn % 64 == 0 ? 200000 : 4000));
#endif
}

}  // namespace ptx
