// Two f32 at once, which SM100 computes at the price of one (PTX ISA, "fma.f32x2"). Elsewhere one
// after the other, with the same results.
#pragma once
#include <cstdint>

namespace ptx {

__device__ inline float2 fma_pair(float2 a, float2 b, float2 c) {
#if __CUDA_ARCH__ >= 1000
    uint64_t result;
    asm("fma.rn.f32x2 %0, %1, %2, %3;"
        : "=l"(result)
        : "l"(reinterpret_cast<uint64_t&>(a)), "l"(reinterpret_cast<uint64_t&>(b)), "l"(reinterpret_cast<uint64_t&>(c)));
    return reinterpret_cast<float2&>(result);
#else
    return {__fmaf_rn(a.x, b.x, c.x), __fmaf_rn(a.y, b.y, c.y)};
#endif
}

__device__ inline float2 add_pair(float2 a, float2 b) {
#if __CUDA_ARCH__ >= 1000
    uint64_t result;
    asm("add.rn.f32x2 %0, %1, %2;" : "=l"(result) : "l"(reinterpret_cast<uint64_t&>(a)), "l"(reinterpret_cast<uint64_t&>(b)));
    return reinterpret_cast<float2&>(result);
#else
    return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)};
#endif
}

__device__ inline float2 multiply_pair(float2 a, float2 b) {
#if __CUDA_ARCH__ >= 1000
    uint64_t result;
    asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(result) : "l"(reinterpret_cast<uint64_t&>(a)), "l"(reinterpret_cast<uint64_t&>(b)));
    return reinterpret_cast<float2&>(result);
#else
    return {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)};
#endif
}

}  // namespace ptx
