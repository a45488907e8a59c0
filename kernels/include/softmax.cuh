// The online softmax of FlashAttention-2 (Dao, 2023) on the score fragments of one warp.
//
// A warp holds M_TILES x N_TILES fragments of 16 x 8 scores. In each, a lane holds two neighbouring scores of row lane / 4 and
// two of row lane / 4 + 8; the four lanes of a quad share their rows.
#pragma once
#include "ptx/mma.cuh"

template <int M_TILES>
struct OnlineSoftmax {
    // How far, in log2, a row's maximum may grow past its reference before the output is rescaled (FlashAttention-4's rule).
    // Probabilities stay below 2^8, which every 16-bit type holds without loss of precision.
    static constexpr float SLACK = 8.0f;
    // Products of reference and scale past this are rounded by more than an exponent may be off, 2^-8.
    static constexpr float COARSE = 65536.0f;

    // What probabilities are relative to, in the scores' own units; sums are over this lane's keys until `finish`.
    float reference[M_TILES][2];
    float row_sum[M_TILES][2];

    __device__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            reference[m][0] = reference[m][1] = -INFINITY;
            row_sum[m][0] = row_sum[m][1] = 0.0f;
        }
    }

    // Scores become probabilities exp2(score · scale - reference · scale), the reference being near the row's maximum so far.
    template <int N_TILES, int O_TILES>
    __device__ void step(float (&scores)[M_TILES][N_TILES][4], float (&acc)[M_TILES][O_TILES][4], float scale) {
        float row_max[M_TILES][2];
        bool outgrown = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float largest = -INFINITY;
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
                    largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
                row_max[m][half] = largest;
                outgrown |= largest * scale > reference[m][half] * scale + SLACK;
            }
        }
        // One vote a warp: with a key or two of head start it is rare.
        if (__any_sync(0xffffffff, outgrown)) rescale(row_max, acc, scale);
        const bool is_coarse = subtract_if_coarse(scores, scale);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float subtrahend = is_coarse ? 0.0f : scaled_reference(m, half, scale);
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        scores[m][n][i] = ptx::exp2_approx(__fmaf_rn(scores[m][n][i], scale, -subtrahend));
                        row_sum[m][half] += scores[m][n][i];
                    }
                }
            }
        }
    }

    // Where products with the scale are too coarse, scores become differences to the reference, which are exact where they count.
    // Rare, and then true of the whole warp.
    template <int N_TILES>
    __device__ bool subtract_if_coarse(float (&scores)[M_TILES][N_TILES][4], float scale) const {
        bool is_coarse = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            is_coarse |= fabsf(scaled_reference(m, 0, scale)) > COARSE || fabsf(scaled_reference(m, 1, scale)) > COARSE;
        }
        is_coarse = __any_sync(0xffffffff, is_coarse);
        if (is_coarse) {
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
                for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float first = reference[m][i / 2] == -INFINITY ? 0.0f : reference[m][i / 2];
                        scores[m][n][i] -= first;
                    }
                }
            }
        }
        return is_coarse;
    }

    // A row with no key so far: any finite reference makes exp2(-inf) zero.
    __device__ float scaled_reference(int m, int half, float scale) const {
        return reference[m][half] == -INFINITY ? 0.0f : reference[m][half] * scale;
    }

    template <int O_TILES>
    __device__ void rescale(const float (&row_max)[M_TILES][2], float (&acc)[M_TILES][O_TILES][4], float scale) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float before = reference[m][half];
                reference[m][half] = fmaxf(before, row_max[m][half]);
                // Nothing was summed up before a first key.
                const float factor = before == -INFINITY ? 0.0f : ptx::exp2_approx((before - reference[m][half]) * scale);
                row_sum[m][half] *= factor;
#pragma unroll
                for (int o = 0; o < O_TILES; ++o) {
                    acc[m][o][2 * half] *= factor;
                    acc[m][o][2 * half + 1] *= factor;
                }
            }
        }
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
