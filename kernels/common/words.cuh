// Words of 16 bytes, as elements of every type lie in them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// A word of 16 bytes as floats, and back.
template <typename T>
struct Word;

template <>
struct Word<float> {
    static constexpr int COUNT = 4;
    static __device__ void widen(uint4 word, float (&values)[COUNT]) {
        values[0] = __uint_as_float(word.x);
        values[1] = __uint_as_float(word.y);
        values[2] = __uint_as_float(word.z);
        values[3] = __uint_as_float(word.w);
    }
    static __device__ uint4 narrow(const float (&values)[COUNT]) {
        return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]), __float_as_uint(values[3]));
    }
};

template <typename Pair>
struct WordOfPairs {
    static constexpr int COUNT = 8;
    static __device__ void widen(uint4 word, float (&values)[COUNT]) {
        const uint32_t bits[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = Pair::widen(bits[i]);
            values[2 * i] = pair.x;
            values[2 * i + 1] = pair.y;
        }
    }
    static __device__ uint4 narrow(const float (&values)[COUNT]) {
        uint32_t bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) bits[i] = Pair::narrow(values[2 * i], values[2 * i + 1]);
        return make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
};

struct HalfPair {
    static __device__ float2 widen(uint32_t bits) { return __half22float2(*reinterpret_cast<const __half2*>(&bits)); }
    static __device__ uint32_t narrow(float low, float high) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
};

struct Bfloat16Pair {
    static __device__ float2 widen(uint32_t bits) { return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000)); }
    static __device__ uint32_t narrow(float low, float high) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
};

template <>
struct Word<__half> : WordOfPairs<HalfPair> {};
template <>
struct Word<__nv_bfloat16> : WordOfPairs<Bfloat16Pair> {};
