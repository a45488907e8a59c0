// Masks on the score fragments of one warp: keys past the end, masked keys, bias.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "seqlen.cuh"

// Visits each score of the fragments: visit(score, row in the warp's rows, key in the tile).
template <int M_TILES, int N_TILES, typename Visit>
__device__ inline void for_each_score(float (&scores)[M_TILES][N_TILES][4], Visit visit) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                visit(scores[m][n][i], m * 16 + (i / 2) * 8 + lane / 4, n * 8 + (lane % 4) * 2 + i % 2);
            }
        }
    }
}

template <typename T>
__device__ inline float bias_at(const AttentionParams& params, int64_t position) {
    if (params.bias_is_f32) return static_cast<const float*>(params.bias)[position];
    return static_cast<float>(static_cast<const T*>(params.bias)[position]);
}
