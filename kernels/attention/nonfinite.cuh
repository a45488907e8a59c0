// NaN and infinities among 16-bit floats, two at a time. Where some queries of a tile see a key and
// others do not, such values are added by ordinary arithmetic: a weight of 0 times NaN is NaN.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Two 16-bit floats in a register, each of which is NaN or infinite if its exponent is all ones.
template <typename T>
struct Pair;

template <>
struct Pair<__half> {
    static constexpr uint32_t EXPONENTS = 0x7c007c00;
    static constexpr uint32_t LOWEST_BITS = 0x04000400;
    __device__ static float low(uint32_t pair) { return __half2float(__ushort_as_half(pair & 0xffff)); }
    __device__ static float high(uint32_t pair) { return low(pair >> 16); }
};

template <>
struct Pair<__nv_bfloat16> {
    static constexpr uint32_t EXPONENTS = 0x7f807f80;
    static constexpr uint32_t LOWEST_BITS = 0x00800080;
    __device__ static float low(uint32_t pair) { return __uint_as_float(pair << 16); }
    __device__ static float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }
};

// The sign bits of the halves that are NaN or infinite: one more carries into them.
template <typename T>
__device__ inline uint32_t nonfinite(uint32_t pair) {
    return ((pair & Pair<T>::EXPONENTS) + Pair<T>::LOWEST_BITS) & 0x80008000;
}
