// The log-sum-exp of rows: its way from packed to padded rows, and attention over all keys from
// attention over two parts of them.
#include "../common/math.cuh"
#include "../common/params.cuh"
#include "../common/words.cuh"

namespace lse {

constexpr int THREADS = ROW_COPY_THREADS;
constexpr int WARP = 32;

// Copies the packed log-sum-exp, [H, total], to the valid rows of a padded one, [B, H, S], and writes
// -inf to the others. Grid: x elements (grid-stride loop).
extern "C" __global__ void __launch_bounds__(THREADS) scatter_lse(const __grid_constant__ ScatterLseParams params) {
    const int64_t rows = static_cast<int64_t>(params.batch) * params.seq;
    const int64_t count = rows * params.heads;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; at < count; at += static_cast<int64_t>(gridDim.x) * THREADS) {
        // Fits: batch * seq does.
        const int row = static_cast<int>(at % rows);
        const int64_t head = at / rows;
        const int packed = params.inv_indices == nullptr ? -1 : params.inv_indices[row];
        const float value = packed < 0 ? -INFINITY : params.packed[head * params.packed_head_stride + packed];
        params.padded[row / params.seq * params.batch_stride + head * params.head_stride + row % params.seq] = value;
    }
}

// How much the rows of two parts count, and the log-sum-exp of both:
//
//   m = max(lse1, lse2)    w1 = exp(lse1 - m)    w2 = exp(lse2 - m)
//   out = (w1 out1 + w2 out2) / (w1 + w2)        lse = m + ln(w1 + w2)
struct Weights {
    float factors[2];
    // Parts without keys do not count, whatever they hold.
    bool counts[2];
    float lse;

    __device__ Weights(float lse1, float lse2) : counts{lse1 != -INFINITY, lse2 != -INFINITY} {
        if (!counts[0] || !counts[1]) {
            // NaN is what the other part is then, as any number would be.
            lse = counts[0] ? lse1 : lse2;
            factors[0] = factors[1] = lse == INFINITY || isnan(lse) ? NAN : 1.0f;
            if (lse == INFINITY) lse = NAN;
            return;
        }
        // `fmaxf` drops NaN, the differences keep it. The difference of +inf with itself is NaN too.
        const float largest = fmaxf(lse1, lse2);
        const float weight1 = exp2f((lse1 - largest) * LOG2_E);
        const float weight2 = exp2f((lse2 - largest) * LOG2_E);
        const float sum = weight1 + weight2;
        factors[0] = weight1 / sum;
        factors[1] = weight2 / sum;
        lse = largest + log2f(sum) * LN_2;
    }
};

// A warp merges one row at a time, [H, D] of a token.
template <typename T>
__device__ inline void merge(const MergeParams& params) {
    constexpr int COUNT = Word<T>::COUNT;
    const int words = params.heads * params.head_words;
    const int64_t rows = static_cast<int64_t>(params.batch) * params.seq;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
    for (int64_t row = first; row < rows; row += static_cast<int64_t>(gridDim.x) * (THREADS / WARP)) {
        const int64_t batch = row / params.seq;
        const int64_t token = row % params.seq;
        for (int word = threadIdx.x % WARP; word < words; word += WARP) {
            const int head = word / params.head_words;
            const int in_head = word % params.head_words;
            const auto start = [&](const Strides& strides) {
                return batch * strides.batch + token * strides.token + head * strides.head + in_head;
            };
            const Weights weights(params.lse1[batch * params.lse1_batch_stride + head * params.lse1_head_stride + token],
                                  params.lse2[batch * params.lse2_batch_stride + head * params.lse2_head_stride + token]);
            float values1[COUNT], values2[COUNT], merged[COUNT];
            Word<T>::widen(static_cast<const uint4*>(params.out1)[start(params.out1_strides)], values1);
            Word<T>::widen(static_cast<const uint4*>(params.out2)[start(params.out2_strides)], values2);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const float first = weights.counts[0] ? weights.factors[0] * values1[i] : 0.0f;
                const float second = weights.counts[1] ? weights.factors[1] * values2[i] : 0.0f;
                merged[i] = first + second;
            }
            static_cast<uint4*>(params.out)[start(params.out_strides)] = Word<T>::narrow(merged);
            if (in_head == 0 && params.lse != nullptr) {
                params.lse[batch * params.lse_batch_stride + head * params.lse_head_stride + token] = weights.lse;
            }
        }
    }
}

// Grid: x rows (grid-stride loop).
#define VARLEN_FA_MERGE(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) merge_##NAME(const __grid_constant__ MergeParams params) { \
        merge<T>(params);                                                                                            \
    }
VARLEN_FA_MERGE(f32, float)
VARLEN_FA_MERGE(f16, __half)
VARLEN_FA_MERGE(bf16, __nv_bfloat16)

}  // namespace lse
