// The online softmax of softmax.cuh for a warp of a warpgroup: 16 rows, of which a lane holds parts of two. The output is rescaled
// apart, since the products before this step's are still being added to it while the exponentials are computed.
#pragma once
#include "ptx/mma.cuh"

struct WarpgroupSoftmax {
    // Products of maximum and scale past this are rounded by more than an exponent may be off, 2^-8.
    static constexpr float COARSE = 65536.0f;

    // log2(e) times the caller's, not negative.
    float scale;
    // In the scores' own units; sums are over this lane's keys until `finish`.
    float row_max[2] = {-INFINITY, -INFINITY};
    float row_sum[2] = {0.0f, 0.0f};
    // By which what came before the latest scores must be multiplied.
    float factor[2];

    __device__ explicit WarpgroupSoftmax(float scale) : scale(scale) {}

    // Takes the scores into the maxima.
    template <int TILES>
    __device__ void raise_max(float (&scores)[TILES][4]) {
        float largest[2] = {largest_of_lane(scores, 0), largest_of_lane(scores, 1)};
        // Differences of the scores themselves are exact where they count. Rare. Nothing moves across a branch: before the lanes have
        // exchanged their maxima there is the least to be kept apart.
        const bool is_coarse = __any_sync(0xffffffff, fmaxf(fabsf(largest[0]), fabsf(largest[1])) * scale > COARSE);
        if (is_coarse) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float row_largest = finite(largest_of_row(largest[half]));
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    scores[tile][2 * half] -= row_largest;
                    scores[tile][2 * half + 1] -= row_largest;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            largest[half] = largest_of_row(largest[half]);
            factor[half] = ptx::exp2_approx((row_max[half] - finite(largest[half])) * scale);
            subtrahend[half] = is_coarse ? 0.0f : finite(largest[half]) * scale;
            row_max[half] = largest[half];
        }
    }

    // Scores become probabilities exp2(score · scale - max · scale).
    template <int TILES>
    __device__ void exponentiate(float (&scores)[TILES][4]) {
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

    // Adds up the sums of the lanes that share a row.
    __device__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            row_sum[half] += __shfl_xor_sync(0xffffffff, row_sum[half], 1);
            row_sum[half] += __shfl_xor_sync(0xffffffff, row_sum[half], 2);
        }
    }

private:
    // Of the latest scores.
    float subtrahend[2];

    // A row with no key so far: any finite number in place of the maximum makes exp2(-inf) zero.
    __device__ static float finite(float largest) { return largest == -INFINITY ? 0.0f : largest; }

    // Of this lane's scores in half the rows, the upper or the lower eight, and of what came before.
    template <int TILES>
    __device__ float largest_of_lane(const float (&scores)[TILES][4], int half) const {
        // Two chains, since the latency of one is not hidden.
        float even = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
        float odd = fmaxf(scores[1][2 * half], scores[1][2 * half + 1]);
#pragma unroll
        for (int tile = 2; tile < TILES; tile += 2) {
            even = fmaxf(even, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
            odd = fmaxf(odd, fmaxf(scores[tile + 1][2 * half], scores[tile + 1][2 * half + 1]));
        }
        return fmaxf(row_max[half], fmaxf(even, odd));
    }

    __device__ static float largest_of_row(float of_lane) {
        const float of_two = fmaxf(of_lane, __shfl_xor_sync(0xffffffff, of_lane, 1));
        return fmaxf(of_two, __shfl_xor_sync(0xffffffff, of_two, 2));
    }
};
