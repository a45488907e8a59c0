// The online softmax of FlashAttention-2 (Dao, 2023) on the score fragments of one warp.
//
// A warp holds M_TILES x N_TILES fragments of 16 x 8 scores. In each, a lane holds two neighbouring
// scores of row lane / 4 and two of row lane / 4 + 8; the four lanes of a quad share their rows.
#pragma once
#include "../../common/math.cuh"
#include "../../ptx/mma.cuh"

template <int M_TILES>
struct OnlineSoftmax {
    // Not scaled. Sums are over this lane's keys until `finish`.
    float row_max[M_TILES][2];
    float row_sum[M_TILES][2];

    __device__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            row_max[m][0] = row_max[m][1] = -INFINITY;
            row_sum[m][0] = row_sum[m][1] = 0.0f;
        }
    }

    // Scores become probabilities exp2(score · scale - max · scale); the output so far is rescaled
    // to the new maximum.
    template <int N_TILES, int O_TILES>
    __device__ void step(float (&scores)[M_TILES][N_TILES][4], float (&acc)[M_TILES][O_TILES][4], float scale) {
        float factor[M_TILES][2];
        bool is_coarse = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float before = row_max[m][half];
                float largest = before;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
                    largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
                row_max[m][half] = largest;
                factor[m][half] = ptx::exp2_approx((before - finite_max(m, half)) * scale);
                is_coarse |= fabsf(finite_max(m, half) * scale) > COARSE;
            }
        }
        // With few keys a step, scaling many columns of output takes long, and mostly by 1.
        constexpr bool SCALES_SELDOM = 8 * N_TILES < O_TILES;
        bool scales = true;
        if constexpr (SCALES_SELDOM) {
            bool is_scaled = false;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                // A comparison that is true for NaN.
                is_scaled |= factor[m][0] != 1.0f || factor[m][1] != 1.0f;
            }
            scales = __any_sync(0xffffffff, is_scaled);
        }
        // One FFMA is fast, but rounds the product. Here, rarely, scores are subtracted first, for
        // the whole warp.
        is_coarse = __any_sync(0xffffffff, is_coarse);
        if (is_coarse) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) scores[m][n][i] -= finite_max(m, i / 2);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float subtrahend = is_coarse ? 0.0f : finite_max(m, half) * scale;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        scores[m][n][i] = ptx::exp2_approx(__fmaf_rn(scores[m][n][i], scale, -subtrahend));
                        sum += scores[m][n][i];
                    }
                }
                row_sum[m][half] = row_sum[m][half] * factor[m][half] + sum;
                if (SCALES_SELDOM && !scales) continue;
#pragma unroll
                for (int o = 0; o < O_TILES; ++o) {
                    acc[m][o][2 * half] *= factor[m][half];
                    acc[m][o][2 * half + 1] *= factor[m][half];
                }
            }
        }
    }

    // A row with no key so far: any finite number in place of the maximum makes exp2(-inf) zero.
    __device__ float finite_max(int m, int half) const {
        return row_max[m][half] == -INFINITY ? 0.0f : row_max[m][half];
    }

    // Adds up the sums of the lanes that share a row.
    __device__ void finish() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row_sum[m][half] += __shfl_xor_sync(0xffffffff, row_sum[m][half], 1);
                row_sum[m][half] += __shfl_xor_sync(0xffffffff, row_sum[m][half], 2);
            }
        }
    }
};
