// Keys and values that other GPUs' memory holds when the kernel starts, and that copy engines bring
// while it runs. A word counts the heads that are there, modulo 2^32:
//
//   batch row      0                   1
//   head           0   1  ...  H - 1   0   1  ...
//   word - before  1   2  ...  H       H+1 ...        once it has come
//
// All copies are under way before the kernel starts, and need no multiprocessor: the wait ends.
#pragma once
#include "../common/params.cuh"
#include "../ptx/system.cuh"
#include "../ptx/tma.cuh"

// Waits until keys and values of a head of a batch row are there, for the copy engine's loads of this
// thread that come later. `place` counts heads of keys, of one batch row after another.
__device__ inline void wait_for_arrival(const SegmentTable& segments, int place) {
    if (segments.arrived == nullptr) return;
    while (static_cast<int32_t>(ptx::load_acquire_system(segments.arrived) - segments.arrived_before) <= place) __nanosleep(100);
    ptx::fence_async_proxy_global();
}
