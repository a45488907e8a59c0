// The online softmax of softmax.cuh for a warp of a warpgroup: 16 rows, of which a lane holds parts of two. The output is rescaled
// apart, since the products before this step's are still being added to it while the exponentials are computed.
#pragma once
#include "ptx/mma.cuh"

struct WarpgroupSoftmax {
    // Products of maximum and scale past this are rounded by more than an exponent may be off, 2^-8.
    static constexpr float COARSE = 65536.0f;

    // In the scores' own units; sums are over this lane's keys until `finish`.
    float row_max[2] = {-INFINITY, -INFINITY};
    float row_sum[2] = {0.0f, 0.0f};
    // Of the latest scores.
    float factor[2];
    float subtrahend[2];

    // Takes the scores into the maximum. What came before must be multiplied by `factor`.
    template <int TILES>
    __device__ void raise_max(float (&scores)[TILES][4], float scale) {
        bool is_coarse = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // Two chains, since the latency of one is not hidden.
            float largest = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
            float largest_odd = fmaxf(scores[1][2 * half], scores[1][2 * half + 1]);
#pragma unroll
            for (int tile = 2; tile < TILES; tile += 2) {
                largest = fmaxf(largest, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
                largest_odd = fmaxf(largest_odd, fmaxf(scores[tile + 1][2 * half], scores[tile + 1][2 * half + 1]));
            }
            const float before = row_max[half];
            largest = fmaxf(before, fmaxf(largest, largest_odd));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
            row_max[half] = largest;
            factor[half] = ptx::exp2_approx((before - finite_max(half)) * scale);
            subtrahend[half] = finite_max(half) * scale;
            is_coarse |= fabsf(subtrahend[half]) > COARSE;
        }
        // Differences of the scores themselves are exact where they count. Rare.
        if (is_coarse) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[tile][i] -= finite_max(i / 2);
            }
            subtrahend[0] = subtrahend[1] = 0.0f;
        }
    }

    // Scores become probabilities exp2(score · scale - max · scale).
    template <int TILES>
    __device__ void exponentiate(float (&scores)[TILES][4], float scale) {
        float sum[2][2] = {};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[tile][i] = ptx::exp2_approx(__fmaf_rn(scores[tile][i], scale, -subtrahend[i / 2]));
                sum[i / 2][i % 2] += scores[tile][i];
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) row_sum[half] = row_sum[half] * factor[half] + (sum[half][0] + sum[half][1]);
    }

    // A row with no key so far: any finite number in place of the maximum makes exp2(-inf) zero.
    __device__ float finite_max(int half) const { return row_max[half] == -INFINITY ? 0.0f : row_max[half]; }

    // Adds up the sums of the lanes that share a row.
    __device__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            row_sum[half] += __shfl_xor_sync(0xffffffff, row_sum[half], 1);
            row_sum[half] += __shfl_xor_sync(0xffffffff, row_sum[half], 2);
        }
    }
};
