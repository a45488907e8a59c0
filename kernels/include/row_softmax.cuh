// The online softmax for a thread that owns a row: 128 scores at a time in registers.
//
// Two things are FlashAttention-4's. The maximum that is subtracted follows the true one only when that has grown by more than 8 (in
// powers of two): probabilities up to 256 do no harm, and the output is hardly ever rescaled. And a part of the exponentials is
// computed by a polynomial on the FMA units, since the special-function unit is what a step waits for.
#pragma once
#include "ptx/mma.cuh"
#include "ptx/packed_f32.cuh"

// Of each so many pairs of scores, one goes to the FMA units.
constexpr int POLYNOMIAL_PAIRS = 4;

// 2^x, x at most 127: 2^round(x) by adding to the exponent, the rest by a polynomial whose relative error is at most 1.02e-4 on
// [-1/2, 1/2] (minimax among those that are 1 at 0, so that 2^-127 and all below come out as +0).
__device__ inline float2 exp2_polynomial(float2 x) {
    constexpr float ROUNDING = 12582912.0f;  // 1.5 · 2^23: what is added to it is rounded to an integer, in the lowest bits
    x = {fmaxf(x.x, -127.0f), fmaxf(x.y, -127.0f)};
    const float2 shifted = ptx::add_pair(x, {ROUNDING, ROUNDING});
    const float2 whole = ptx::add_pair(shifted, {-ROUNDING, -ROUNDING});
    const float2 rest = ptx::fma_pair(whole, {-1.0f, -1.0f}, x);
    float2 y = ptx::fma_pair(rest, {0.05500829f, 0.05500829f}, {0.24221106f, 0.24221106f});
    y = ptx::fma_pair(y, rest, {0.693283f, 0.693283f});
    y = ptx::fma_pair(y, rest, {1.0f, 1.0f});
    return {__uint_as_float(__float_as_uint(y.x) + (__float_as_uint(shifted.x) << 23)),
            __uint_as_float(__float_as_uint(y.y) + (__float_as_uint(shifted.y) << 23))};
}

// NaN where either is.
__device__ inline float max_or_nan(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}

struct RowSoftmax {
    // Products of maximum and scale past this are rounded by more than an exponent may be off, 2^-8.
    static constexpr float COARSE = 65536.0f;
    // How far, in powers of two, the true maximum may be above the one that is subtracted.
    static constexpr float SLACK = 8.0f;

    // What is subtracted, in the scores' own units: -inf without any key so far, NaN for a row that holds NaN or +inf.
    float reference = -INFINITY;
    float sum = 0.0f;
    // Of the latest scores. What came before must be multiplied by `factor`.
    float factor = 1.0f;
    float subtrahend;

    __device__ float finite_reference() const { return reference == -INFINITY ? 0.0f : reference; }

    // Takes the scores into the maximum; `scale` is not negative.
    __device__ void raise(uint32_t (&scores)[4][32], float scale) {
        // Several chains, since the latency of one is not hidden.
        float largest[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            largest[part] = __uint_as_float(scores[part][0]);
#pragma unroll
            for (int i = 1; i < 32; ++i) largest[part] = max_or_nan(largest[part], __uint_as_float(scores[part][i]));
        }
        float top = max_or_nan(max_or_nan(largest[0], largest[1]), max_or_nan(largest[2], largest[3]));
        top = top == INFINITY ? NAN : top;
        factor = 1.0f;
        // True as well where either is NaN, and where there was no key.
        if (!((top - reference) * scale <= SLACK)) {
            const float before = reference;
            reference = max_or_nan(before, top);
            factor = ptx::exp2_approx((before - finite_reference()) * scale);
        }
        subtrahend = finite_reference() * scale;
        // Differences of the scores themselves are exact where they count. Rare.
        if (fabsf(subtrahend) > COARSE) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
#pragma unroll
                for (int i = 0; i < 32; ++i) scores[part][i] = __float_as_uint(__uint_as_float(scores[part][i]) - finite_reference());
            }
            subtrahend = 0.0f;
        }
        sum *= factor;
    }

    // Scores become probabilities exp2(score · scale - subtrahend), two of type T a word.
    template <typename T>
    __device__ void exponentiate(uint32_t (&probs)[16], const uint32_t (&scores)[32], float scale) {
        // Two chains, for the latency of an addition.
        float2 sums[2] = {{sum, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) {
            float2 x = {__uint_as_float(scores[2 * pair]), __uint_as_float(scores[2 * pair + 1])};
            x = ptx::fma_pair(x, {scale, scale}, {-subtrahend, -subtrahend});
            const float2 y = pair % POLYNOMIAL_PAIRS == POLYNOMIAL_PAIRS - 1 ? exp2_polynomial(x)
                                                                             : float2{ptx::exp2_approx(x.x), ptx::exp2_approx(x.y)};
            sums[pair % 2] = ptx::add_pair(sums[pair % 2], y);
            probs[pair] = ptx::pack_pair<T>(y.x, y.y);
        }
        sums[0] = ptx::add_pair(sums[0], sums[1]);
        sum = sums[0].x + sums[0].y;
    }
};
