// What happens to scores beside their scale and a bias: a soft cap, ALiBi, attention sinks. Scores
// count in units of base 2.
#pragma once
#include "../../common/math.cuh"
#include "../../common/params.cuh"
#include "../../ptx/mma.cuh"

// Relative error at most 1e-6, 1 for infinity, NaN for NaN. Near 0 it is x + x^3 * P(x^2), where P
// interpolates at Chebyshev's nodes; the quotient would cancel there.
__device__ inline float hyperbolic_tangent(float x) {
    const float magnitude = fabsf(x);
    const float power = ptx::exp2_approx(-2.0f * LOG2_E * magnitude);
    const float far = __fdividef(1.0f - power, 1.0f + power);
    const float square = x * x;
    float near = __fmaf_rn(-0.006610228f, square, 0.02130939f);
    near = __fmaf_rn(near, square, -0.05390943f);
    near = __fmaf_rn(near, square, 0.13333113f);
    near = __fmaf_rn(near, square, -0.3333333f);
    near = __fmaf_rn(near * square, magnitude, magnitude);
    // A comparison that is false for NaN, which `far` keeps.
    return copysignf(magnitude < 0.55f ? near : far, x);
}

// The modifiers of one head.
struct HeadModifiers {
    const ScoreModifierParams& params;
    // Not used without any.
    float slope;
    float sink;

    __device__ HeadModifiers(const ScoreModifierParams& params, int head) : params(params), slope(0.0f), sink(-INFINITY) {
        if (params.heads == nullptr) return;
        const float4 values = __ldg(params.heads + head);
        slope = values.x;
        sink = values.y;
    }

    // A score from a product. `distance` gives that of its query and key, and is asked only with a slope.
    template <typename Distance>
    __device__ float score(float product, float score_scale, Distance distance) const {
        const float capped = params.softcap == 0.0f ? product * score_scale
                                                    : params.softcap * hyperbolic_tangent(product * params.softcap_factor);
        return slope == 0.0f ? capped : __fmaf_rn(-slope, static_cast<float>(abs(distance())), capped);
    }

    // Adds the sink's weight to the sum of a row, relative to the new largest score. Returns the
    // factor of what was added up before.
    __device__ float add_sink(float& row_max, float& row_sum) const {
        if (sink == -INFINITY) return 1.0f;
        const float largest = fmaxf(row_max, sink);
        const float factor = ptx::exp2_approx(row_max - largest);
        row_sum = row_sum * factor + ptx::exp2_approx(sink - largest);
        row_max = largest;
        return factor;
    }
};
