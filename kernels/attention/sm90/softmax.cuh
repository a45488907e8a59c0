// The online softmax of FlashAttention-2 (Dao, 2023) for a warp of a warpgroup: 16 rows, of which a
// lane holds parts of two ("halves": the upper and the lower eight rows). The output is rescaled
// separately, since the product of the step before is still being added to it while the
// exponentials are computed.
//
// Two forms with the same functions. `WarpgroupSoftmax` takes one FFMA a score, and is right as
// long as a row's maximum, times the scale, stays within ±RANGE. `ExactSoftmax` subtracts first,
// which is right for all scores; it recomputes what is out of that range.
#pragma once
#include "../../ptx/mma.cuh"

// The largest score of a row: of this lane's scores in one half, and of the lanes that share the
// row.
template <int TILES>
__device__ inline float largest_of_row(const float (&scores)[TILES][4], int half) {
    // Two chains, since the latency of one is not hidden.
    float even = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
    float odd = fmaxf(scores[1][2 * half], scores[1][2 * half + 1]);
#pragma unroll
    for (int tile = 2; tile < TILES; tile += 2) {
        even = fmaxf(even, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
        odd = fmaxf(odd, fmaxf(scores[tile + 1][2 * half], scores[tile + 1][2 * half + 1]));
    }
    float largest = fmaxf(even, odd);
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
}

// Adds up the sums of the lanes that share a row.
__device__ inline void add_over_lanes(float (&row_sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        row_sum[half] += __shfl_xor_sync(0xffffffff, row_sum[half], 1);
        row_sum[half] += __shfl_xor_sync(0xffffffff, row_sum[half], 2);
    }
}

// Probabilities are exp2(score · scale - top), where `top` is the maximum times the scale, rounded.
// The same number is used for all that is added up, so its rounding cancels out; it only shifts
// exponents, by less than 2^4 within the range, which is harmless in f16.
struct WarpgroupSoftmax {
    static constexpr float RANGE = 134217728.0f;  // 2^27

    // softmax_scale · log2(e), not negative.
    float scale;
    // A row whose scores are all below -RANGE keeps a sum of zero.
    float top[2] = {-RANGE, -RANGE};
    // Over this lane's keys until `finish`.
    float row_sum[2] = {0.0f, 0.0f};
    // What came before the latest scores must be multiplied by this.
    float factor[2];

    __device__ explicit WarpgroupSoftmax(float scale) : scale(scale) {}

    template <int TILES>
    __device__ void raise_max(const float (&scores)[TILES][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float before = top[half];
            top[half] = fmaxf(before, largest_of_row(scores, half) * scale);
            factor[half] = ptx::exp2_approx(before - top[half]);
        }
    }

    // Scores become probabilities.
    template <int TILES>
    __device__ void exponentiate(float (&scores)[TILES][4]) {
        float sum[2][2] = {};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[tile][i] = ptx::exp2_approx(__fmaf_rn(scores[tile][i], scale, -top[i / 2]));
                sum[i / 2][i % 2] += scores[tile][i];
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) row_sum[half] = row_sum[half] * factor[half] + (sum[half][0] + sum[half][1]);
    }

    __device__ void finish() { add_over_lanes(row_sum); }

    // After `finish`: whether this half's row may be wrong.
    __device__ bool out_of_range(int half) const { return top[half] > RANGE || row_sum[half] == 0.0f; }

    // Log2 of what the sum of exponentials is divided by.
    __device__ float log2_factor(int half) const { return top[half]; }
};

struct ExactSoftmax {
    // Below any score, but above the maximum of no keys.
    static constexpr float LOWEST = -3.402823466e38f;

    float scale;
    // Not scaled: -inf without any key so far, else LOWEST or more.
    float row_max[2] = {-INFINITY, -INFINITY};
    float row_sum[2] = {0.0f, 0.0f};
    float factor[2];

    __device__ explicit ExactSoftmax(float scale) : scale(scale) {}

    template <int TILES>
    __device__ void raise_max(float (&scores)[TILES][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float before = row_max[half];
            row_max[half] = fmaxf(fmaxf(before, LOWEST), largest_of_row(scores, half));
            factor[half] = weight(before, row_max[half]);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                scores[tile][2 * half] -= row_max[half];
                scores[tile][2 * half + 1] -= row_max[half];
            }
        }
    }

    template <int TILES>
    __device__ void exponentiate(float (&scores)[TILES][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = 0.0f;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[tile][i] = ptx::exp2_approx(scores[tile][i] * scale);
                    sum += scores[tile][i];
                }
            }
            row_sum[half] = row_sum[half] * factor[half] + sum;
        }
    }

    __device__ void finish() { add_over_lanes(row_sum); }

    // After all keys: rows that have keys, all of whose scores are below every float, become NaN.
    __device__ void spread_overflow() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row_sum[half] == 0.0f && row_max[half] != -INFINITY) row_sum[half] = NAN;
        }
    }

    // The factor from sums relative to a maximum of `before` to sums relative to `largest`.
    __device__ float weight(float before, float largest) const { return ptx::exp2_approx((before - finite(largest)) * scale); }

    __device__ static bool out_of_range(int) { return false; }

    __device__ float log2_factor(int half) const { return row_max[half] * scale; }

private:
    // A row with no key so far: any finite number in place of the maximum makes exp2(-inf) zero.
    __device__ static float finite(float largest) { return largest == -INFINITY ? 0.0f : largest; }
};
