// The softmax warpgroups of the sm100 kernel, and their online softmax: a thread owns a row, with
// 128 scores at a time in registers.
//
// Two ideas are FlashAttention-4's. The maximum that is subtracted follows the true one only when
// that has grown by more than 8 (in powers of two): probabilities up to 256 do no harm, and the
// output is hardly ever rescaled. And some of the exponentials are computed by a polynomial on the
// FMA units, since a step would otherwise wait for the special-function units.
#pragma once
#include "../../common/math.cuh"
#include "../../ptx/mma.cuh"
#include "../../ptx/packed_f32.cuh"
#include "../../ptx/tcgen05.cuh"
#include "block.cuh"
#include "unseen.cuh"

namespace sm100 {

// One pair of scores in this many is computed by the polynomial.
constexpr int POLYNOMIAL_PAIRS = 4;

// 2^x, x at most 127: 2^round(x) by adding to the exponent, the rest by a polynomial on [-1/2, 1/2]
// (minimax among those that are 1 at 0, so that 2^-127 and all below come out as +0). Its relative error
// is at most 1.02e-4 at degree 3, and 2.9e-6 at degree 4. With key ranges, rows with few keys are
// common, whose errors do not cancel out in the log-sum-exp.
template <int DEGREE>
__device__ inline float2 exp2_polynomial(float2 x) {
    static_assert(DEGREE == 3 || DEGREE == 4);
    constexpr float ROUNDING = 12582912.0f;  // 1.5 · 2^23: what is added to it is rounded to an integer, in the lowest bits
    x = {fmaxf(x.x, -127.0f), fmaxf(x.y, -127.0f)};
    const float2 shifted = ptx::add_pair(x, {ROUNDING, ROUNDING});
    const float2 whole = ptx::add_pair(shifted, {-ROUNDING, -ROUNDING});
    const float2 rest = ptx::fma_pair(whole, {-1.0f, -1.0f}, x);
    float2 y;
    if constexpr (DEGREE == 3) {
        y = ptx::fma_pair(rest, {0.05500829f, 0.05500829f}, {0.24221106f, 0.24221106f});
        y = ptx::fma_pair(y, rest, {0.693283f, 0.693283f});
    } else {
        y = ptx::fma_pair(rest, {0.009582853f, 0.009582853f}, {0.055906426f, 0.055906426f});
        y = ptx::fma_pair(y, rest, {0.24024099f, 0.24024099f});
        y = ptx::fma_pair(y, rest, {0.6931242f, 0.6931242f});
    }
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
    // How far, in powers of two, the true maximum may be above the one that is subtracted.
    static constexpr float SLACK = 8.0f;

    // What is subtracted, not scaled: -inf without any key so far, NaN for a row that holds NaN or
    // +inf.
    float reference = -INFINITY;
    float sum = 0.0f;
    // For the latest scores. What came before must be multiplied by `factor`.
    float factor = 1.0f;
    float subtrahend;

    __device__ float finite_reference() const { return reference == -INFINITY ? 0.0f : reference; }

    // Raises the maximum to that of the scores; `scale` is not negative.
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
        // Also true where either is NaN, and where there was no key.
        if (!((top - reference) * scale <= SLACK)) {
            const float before = reference;
            reference = max_or_nan(before, top);
            factor = ptx::exp2_approx((before - finite_reference()) * scale);
        }
        subtrahend = finite_reference() * scale;
        // Rare: the product would be rounded too much, so scores are subtracted first.
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
    template <typename T, int DEGREE>
    __device__ void exponentiate(uint32_t (&probs)[16], const uint32_t (&scores)[32], float scale) {
        // Two chains, for the latency of an addition.
        float2 sums[2] = {{sum, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) {
            float2 x = {__uint_as_float(scores[2 * pair]), __uint_as_float(scores[2 * pair + 1])};
            x = ptx::fma_pair(x, {scale, scale}, {-subtrahend, -subtrahend});
            const float2 y = pair % POLYNOMIAL_PAIRS == POLYNOMIAL_PAIRS - 1 ? exp2_polynomial<DEGREE>(x)
                                                                             : float2{ptx::exp2_approx(x.x), ptx::exp2_approx(x.y)};
            sums[pair % 2] = ptx::add_pair(sums[pair % 2], y);
            probs[pair] = ptx::pack_pair<T>(y.x, y.y);
        }
        sums[0] = ptx::add_pair(sums[0], sums[1]);
        sum = sums[0].x + sums[0].y;
    }
};

// The softmax of one tile, a row for each thread of a warpgroup.
template <typename S>
struct SoftmaxWarpgroup {
    Block<S> block;
    // The scores of this thread's warp in tensor memory.
    uint32_t tensor;
    int tile;
    int row;
    float scale;
    // Key tiles, steps with products and work items with products so far.
    uint32_t count = 0;
    uint32_t steps = 0;
    uint32_t uses = 0;

    using T = typename S::T;

    __device__ SoftmaxWarpgroup(const Block<S>& block, uint32_t tensor, int tile)
        : block(block), tile(tile), row(threadIdx.x % WARPGROUP), scale(fabsf(block.params.score_scale)) {
        this->tensor = tensor + (static_cast<uint32_t>(row / 32 * 32) << 16) + S::SCORES_COLUMN + tile * TILE_N;
    }

    __device__ void run() {
        for (uint32_t work_index = 0;; ++work_index) {
            const volatile auto& rows = block.wait_rows(work_index);
            const int key_tiles = rows.key_tiles;
            if (key_tiles < 0) return;
            const int tiles = rows.tiles;
            RowSoftmax softmax;
            if (tile < tiles) {
                attend(softmax, key_tiles, rows);
            } else {
                // A tile without rows keeps pace with the other.
                for (int i = 0; i < key_tiles && tiles > 0; ++i, ++count) {
                    block.wait_keys(count);
                    block.leave_keys(count);
                }
            }
            if (block.params.lse != nullptr) write_lse(softmax, rows);
            block.leave_rows(work_index);
        }
    }

    __device__ void attend(RowSoftmax& softmax, int key_tiles, const volatile typename S::Rows& rows) {
        float* const factors = reinterpret_cast<float*>(block.shared + S::FACTORS) + tile * TILE_M;
        float* const inverses = reinterpret_cast<float*>(block.shared + S::INVERSES) + tile * TILE_M;
        // Whether the row has a key.
        bool sees_some = !S::RANGED;
        for (int i = 0; i < key_tiles; ++i, ++count, ++steps) {
            uint32_t scores[4][32];
            const volatile auto& info = block.wait_keys(count);
            const bool masked = info.masked;
            uint32_t seen[4];
            if constexpr (S::RANGED) {
                if (masked) seen_keys(block, rows, tile * TILE_GROUPS, info, seen);
                sees_some = sees_some || !masked || (seen[0] | seen[1] | seen[2] | seen[3]) != 0;
            }
            block.wait_full(S::SCORES + 8 * tile, steps);
            ptx::tensor_fence_after();
#pragma unroll
            for (int part = 0; part < 4; ++part) ptx::tensor_load(scores[part], tensor + part * 32);
            ptx::tensor_wait_load(scores[0], scores[1], scores[2], scores[3]);
            if (masked) mask(scores, info, seen);
            block.leave_keys(count);
            softmax.raise(scores, scale);
            if (i > 0) {
                // The correction relies on the product before these scores being done, too.
                factors[row] = softmax.factor;
                ptx::tensor_fence_before();
                block.arrive(S::FACTORS_FULL + 8 * tile);
            }
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                uint32_t probs[16];
                softmax.template exponentiate<T, S::RANGED ? 4 : 3>(probs, scores[part], scale);
                ptx::tensor_store(tensor + part * 16, probs);
            }
            ptx::tensor_wait_store();
            ptx::tensor_fence_before();
            block.arrive(S::PROBS + 8 * tile);
        }
        // Every kept score is below every float.
        if (key_tiles > 0 && sees_some && softmax.sum == 0.0f) softmax.sum = NAN;
        // Read this late, since registers are scarce before.
        const uint32_t kept = rows.groups[tile * TILE_GROUPS + row / GROUP_ROWS].kept;
        const bool zero = softmax.sum == 0.0f || (kept >> (row % GROUP_ROWS) & 1) == 0;
        block.wait_free(S::FREE_SUMS + 8 * tile, uses);
        inverses[row] = zero ? 0.0f : 1.0f / softmax.sum;
        block.arrive(S::SUMS + 8 * tile);
        ++uses;
    }

    // `seen` is of the row's keys, with key ranges.
    __device__ void mask(uint32_t (&scores)[4][32], const volatile TileKeys& info, const uint32_t (&seen)[4]) const {
        // The maximum is taken before scaling, so the sign of the scale goes to the scores.
        if (block.params.score_scale < 0.0f) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
#pragma unroll
                for (int i = 0; i < 32; ++i) scores[part][i] ^= 0x80000000;
            }
        }
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const uint32_t kept = S::RANGED ? seen[part] : info.kept[part];
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                if ((kept >> i & 1) == 0) scores[part][i] = __float_as_uint(-INFINITY);
            }
        }
    }

    __device__ void write_lse(const RowSoftmax& softmax, const volatile TileRows& rows) const {
        const volatile auto& group = rows.groups[tile * TILE_GROUPS + row / GROUP_ROWS];
        if (row % GROUP_ROWS >= group.rows) return;
        const bool zero = softmax.sum == 0.0f || (group.kept >> (row % GROUP_ROWS) & 1) == 0;
        const float lse = zero ? -INFINITY : (softmax.finite_reference() * scale + log2f(softmax.sum)) * LN_2;
        block.params.lse[rows.batch * block.params.lse_batch_stride + rows.head * block.params.lse_head_stride + group.first_row +
                         row % GROUP_ROWS] = lse;
    }
};

}  // namespace sm100
