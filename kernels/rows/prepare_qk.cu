// RMSNorm and rotary embedding of the heads of q and k, [B, S, H, D], of every segment in one launch:
//
//   y = x * weight / sqrt(mean(x^2) + eps)
//   (y[a], y[b]) -> (y[a] cos - y[b] sin, y[b] cos + y[a] sin)    for each pair (a, b) of the first
//                                                                 2 * half elements
//
//   a head       |0 .. 7|8 .. 15|16 .. 23| ...                   8 elements a lane; 16 from D = 257 on,
//   lanes         0      1       2                                and then 8 of each half of the head
//
//   blocks       q of segment 0 | k of segment 0 | q of segment 1 | ...
//
// `lanes` neighbours of a warp share a head, and take HEADS heads of a token one after the other:
// what the token's row of the tables and the weights hold is read once for them, and their elements
// are all under way at once. Heads are read before they are written, so both may be the same. Rows of
// dropped tokens are left alone. Arithmetic is f32, rounded once.
#include "../common/params.cuh"
#include "../common/words.cuh"

namespace prepare_qk {

constexpr int THREADS = ROW_COPY_THREADS;
constexpr int WARP = 32;
constexpr uint32_t WHOLE_WARP = 0xffffffff;
// Elements of a lane that are neighbours.
constexpr int CHUNK = 8;

// Tensors of f32, or of the call's element type.
template <typename T>
__device__ inline float number(const void* at, int64_t position, bool is_f32) {
    if (is_f32) return __ldg(static_cast<const float*>(at) + position);
    return static_cast<float>(static_cast<const T*>(at)[position]);
}

// `IS_WIDE`: heads of more than 256 elements.
template <typename T, bool IS_WIDE>
struct HeadsOf {
    static constexpr int CHUNKS = IS_WIDE ? 2 : 1;
    static constexpr int OWN = CHUNKS * CHUNK;
    static constexpr int HEADS = PREPARED_HEADS / CHUNKS;
    static constexpr int WORD = Word<T>::COUNT;

    const PreparedRows& rows;
    const int head_dim;
    const int lanes;
    const int lane;
    // Of the head in shared memory.
    float* const shared;

    __device__ HeadsOf(const PreparedRows& rows, const PrepareQkParams& params, float* shared)
        : rows(rows),
          head_dim(params.head_dim),
          lanes(params.lanes),
          lane(threadIdx.x % params.lanes),
          shared(shared + threadIdx.x / params.lanes * (params.lanes * OWN)) {}

    // The first element of a chunk of this lane's.
    __device__ int first_of(int chunk) const { return (chunk * lanes + lane) * CHUNK; }

    __device__ void load(float (&x)[OWN], const T* head) const {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int first = first_of(chunk);
            if (rows.has_words && first < head_dim) {
#pragma unroll
                for (int at = 0; at < CHUNK; at += WORD) {
                    float word[WORD];
                    Word<T>::widen(*reinterpret_cast<const uint4*>(head + first + at), word);
#pragma unroll
                    for (int i = 0; i < WORD; ++i) x[chunk * CHUNK + at + i] = word[i];
                }
            } else {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) {
                    x[chunk * CHUNK + i] = first + i < head_dim ? static_cast<float>(head[first + i]) : 0.0f;
                }
            }
        }
    }

    __device__ void store(const float (&x)[OWN], T* head) const {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int first = first_of(chunk);
            if (rows.has_words && first < head_dim) {
#pragma unroll
                for (int at = 0; at < CHUNK; at += WORD) {
                    float word[WORD];
#pragma unroll
                    for (int i = 0; i < WORD; ++i) word[i] = x[chunk * CHUNK + at + i];
                    *reinterpret_cast<uint4*>(head + first + at) = Word<T>::narrow(word);
                }
            } else {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) {
                    if (first + i < head_dim) head[first + i] = T(x[chunk * CHUNK + i]);
                }
            }
        }
    }

    // Called by whole warps.
    __device__ void normalise(float (&x)[OWN], const float (&weights)[OWN]) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < OWN; ++i) sum = __fmaf_rn(x[i], x[i], sum);
        for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, distance);
        const float factor = 1.0f / sqrtf(sum / static_cast<float>(head_dim) + rows.eps);
#pragma unroll
        for (int i = 0; i < OWN; ++i) x[i] = x[i] * factor * weights[i];
    }

    // Called by whole warps. `sin` has the sign that it has for the element.
    __device__ void rotate(float (&x)[OWN], const float (&cos)[OWN], const float (&sin)[OWN]) const {
        const int half = rows.half;
        float others[OWN];
        if (rows.is_interleaved) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) others[i] = x[i ^ 1];
        } else {
            // Through shared memory, since the other one is another lane's.
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                float4* const to = reinterpret_cast<float4*>(shared + first_of(chunk));
#pragma unroll
                for (int at = 0; at < CHUNK; at += 4) {
                    const float* const own = x + chunk * CHUNK + at;
                    to[at / 4] = make_float4(own[0], own[1], own[2], own[3]);
                }
            }
            __syncwarp();
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                const int first = first_of(chunk);
                if (half % CHUNK == 0) {
                    const int from = first < half ? first + half : first < 2 * half ? first - half : first;
#pragma unroll
                    for (int at = 0; at < CHUNK; at += 4) {
                        const float4 four = *reinterpret_cast<const float4*>(shared + from + at);
                        float* const own = others + chunk * CHUNK + at;
                        own[0] = four.x, own[1] = four.y, own[2] = four.z, own[3] = four.w;
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < CHUNK; ++i) {
                        const int element = first + i;
                        const int from = element < half ? element + half : element < 2 * half ? element - half : element;
                        others[chunk * CHUNK + i] = shared[from];
                    }
                }
            }
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            // Selected: what does not rotate may be infinite.
            const float rotated = __fmaf_rn(x[i], cos[i], others[i] * sin[i]);
            if (first_of(i / CHUNK) + i % CHUNK < 2 * half) x[i] = rotated;
        }
    }

    // What a token's row of the tables holds for this lane's elements.
    __device__ void read_tables(float (&cos)[OWN], float (&sin)[OWN], int64_t cos_row, int64_t sin_row) const {
        const int half = rows.half;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int element = first_of(i / CHUNK) + i % CHUNK;
            const bool is_second = rows.is_interleaved ? element % 2 == 1 : element >= half;
            const int pair = rows.is_interleaved ? element / 2 : is_second ? element - half : element;
            cos[i] = 1.0f;
            sin[i] = 0.0f;
            if (element < 2 * half) {
                cos[i] = number<T>(rows.cos, cos_row + pair, rows.table_is_f32);
                const float value = number<T>(rows.sin, sin_row + pair, rows.table_is_f32);
                sin[i] = is_second ? value : -value;
            }
        }
    }

    // The heads from `first_head` on of a token, as many as there are; none if it does not exist.
    __device__ void run(int batch, int token, int first_head, int count) const {
        const auto start = [&](const Strides& strides) {
            return batch * strides.batch + token * strides.token + first_head * strides.head;
        };
        const T* const from = static_cast<const T*>(rows.from) + start(rows.from_strides);
        T* const to = static_cast<T*>(rows.to) + start(rows.to_strides);
        float x[HEADS][OWN];
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) x[head][i] = 0.0f;
            if (head < count) load(x[head], from + head * rows.from_strides.head);
        }
        if (rows.weight != nullptr) {
            float weights[OWN];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int element = first_of(i / CHUNK) + i % CHUNK;
                weights[i] = element < head_dim ? number<T>(rows.weight, element, rows.weight_is_f32) : 0.0f;
            }
#pragma unroll
            for (int head = 0; head < HEADS; ++head) normalise(x[head], weights);
        }
        if (rows.half > 0) {
            float cos[OWN], sin[OWN];
            const int64_t cos_row = batch * rows.cos_batch_stride + token * rows.cos_token_stride;
            const int64_t sin_row = batch * rows.sin_batch_stride + token * rows.sin_token_stride;
            read_tables(cos, sin, count > 0 ? cos_row : 0, count > 0 ? sin_row : 0);
#pragma unroll
            for (int head = 0; head < HEADS; ++head) rotate(x[head], cos, sin);
        }
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
            if (head < count) store(x[head], to + head * rows.to_strides.head);
        }
    }
};

// Grid: x the tensors' blocks, one tensor after the other.
template <typename T, bool IS_WIDE>
__device__ inline void prepare(const PrepareQkParams& params) {
    using Heads = HeadsOf<T, IS_WIDE>;
    __shared__ __align__(16) float shared[THREADS * Heads::OWN];
    int tensor = 0;
    while (tensor + 1 < params.count && params.tensors[tensor + 1].first_block <= static_cast<int>(blockIdx.x)) ++tensor;
    const PreparedRows& rows = params.tensors[tensor];
    const Heads heads(rows, params, shared);
    const int64_t block = static_cast<int>(blockIdx.x) - rows.first_block;
    const int64_t item = block * (THREADS / params.lanes) + threadIdx.x / params.lanes;
    const int groups = (rows.heads + Heads::HEADS - 1) / Heads::HEADS;
    const int64_t row = item / groups;
    const int first_head = static_cast<int>(item % groups) * Heads::HEADS;
    int count = row < rows.rows ? min(rows.heads - first_head, Heads::HEADS) : 0;
    // Both fit: rows do.
    const int batch = static_cast<int>(row / rows.seq);
    const int token = static_cast<int>(row % rows.seq);
    if (count > 0 && params.kept_bits != nullptr) {
        const int at = rows.first_token + token;
        const uint32_t word = params.kept_bits[static_cast<int64_t>(batch) * params.mask_words + at / WARP];
        if ((word >> (at % WARP) & 1) == 0) count = 0;
    }
    // Lanes of heads that do not exist compute with the others.
    heads.run(count > 0 ? batch : 0, count > 0 ? token : 0, count > 0 ? first_head : 0, count);
}

#define VARLEN_FA_PREPARE_QK(NAME, T, IS_WIDE)                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ PrepareQkParams params) { \
        prepare<T, IS_WIDE>(params);                                                                   \
    }
VARLEN_FA_PREPARE_QK(prepare_qk_f32, float, false)
VARLEN_FA_PREPARE_QK(prepare_qk_f16, __half, false)
VARLEN_FA_PREPARE_QK(prepare_qk_bf16, __nv_bfloat16, false)
VARLEN_FA_PREPARE_QK(prepare_qk_f32_wide, float, true)
VARLEN_FA_PREPARE_QK(prepare_qk_f16_wide, __half, true)
VARLEN_FA_PREPARE_QK(prepare_qk_bf16_wide, __nv_bfloat16, true)

}  // namespace prepare_qk
