// What kernels with tile lists (params_sm90.cuh) do with them, whatever their tiles.
#pragma once
#include "params_sm90.cuh"

// Bits of 16 positions from `first` on; none past the end. Without bits, all.
__device__ inline uint32_t group_bits(const uint32_t* bits, int words, int64_t row, int first) {
    if (bits == nullptr) return 0xffff;
    const int word = first / 32;
    const uint32_t low = word < words ? bits[row * words + word] : 0;
    const uint32_t high = word + 1 < words ? bits[row * words + word + 1] : 0;
    return __funnelshift_r(low, high, first % 32) & 0xffff;
}

// Writes the rows that no group covers as zeros, by threads with nothing else to do.
template <typename T>
__device__ inline void write_zero_spans(const AttentionParamsSm90& params, int thread, int threads) {
    const int chunks = params.head_dim / 8;
    for (int item = blockIdx.x; item < params.zero_span_count * params.heads; item += gridDim.x) {
        const ZeroSpan span = params.zero_spans[item / params.heads];
        const int head = item % params.heads;
        T* const out = static_cast<T*>(params.out) + span.batch * params.out_strides.batch + span.first_query * params.out_strides.token +
                       head * params.out_strides.head;
        for (int index = thread; index < span.rows * chunks; index += threads) {
            *reinterpret_cast<uint4*>(out + index / chunks * params.out_strides.token + index % chunks * 8) = uint4{0, 0, 0, 0};
        }
        if (params.lse != nullptr) {
            float* const lse = params.lse + head * params.lse_head_stride + static_cast<int64_t>(span.batch) * params.seq_q + span.first_query;
            for (int row = thread; row < span.rows; row += threads) lse[row] = -INFINITY;
        }
    }
}
