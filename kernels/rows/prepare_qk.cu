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
// `lanes` neighbours of a warp share a head, and take the heads of a token one after the other: what
// the token's row of the tables and the weights hold is read once for them, and the elements of HEADS
// heads are under way at once. Heads are read before they are written, so both may be the same. Rows
// of dropped tokens are left alone. Arithmetic is f32, rounded once.
#include <type_traits>

#include "../common/params.cuh"
#include "../common/words.cuh"

namespace prepare_qk {

constexpr int THREADS = ROW_COPY_THREADS;
constexpr int WARP = 32;
constexpr uint32_t WHOLE_WARP = 0xffffffff;
// Elements of a lane that are neighbours.
constexpr int CHUNK = 8;

// What a call's tensors have in common.
enum class Form {
    // Words everywhere, heads of at most 256 elements, all or none of which rotate.
    WORDS,
    // Heads of at most 256 elements.
    NARROW,
    WIDE,
};

// N numbers from `position` on, which lie in words. They are f32, or of the call's element type.
template <typename T, int N>
__device__ inline void read_words(float (&to)[N], const void* at, int64_t position, bool is_f32) {
    if (sizeof(T) == 4 || is_f32) {
        const float4* const words = reinterpret_cast<const float4*>(static_cast<const float*>(at) + position);
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 four = __ldg(words + i / 4);
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    } else {
        const uint2* const halves = reinterpret_cast<const uint2*>(static_cast<const T*>(at) + position);
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint2 half = __ldg(halves + i / 4);
            float word[Word<T>::COUNT];
            Word<T>::widen(make_uint4(half.x, half.y, 0, 0), word);
#pragma unroll
            for (int j = 0; j < 4; ++j) to[i + j] = word[j];
        }
    }
}

// The same from anywhere. The first `count` of them exist; the others are 0.
template <typename T, int N>
__device__ inline void read_numbers(float (&to)[N], const void* at, int64_t position, bool is_f32, int count) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        to[i] = 0.0f;
        if (i < count) {
            to[i] = is_f32 ? __ldg(static_cast<const float*>(at) + position + i)
                           : static_cast<float>(static_cast<const T*>(at)[position + i]);
        }
    }
}

// The sum over the lanes of a head. Called by whole warps.
__device__ inline float sum_of_lanes(float own, int lanes) {
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const float other = __shfl_xor_sync(WHOLE_WARP, own, distance);
        if (distance < lanes) own += other;
    }
    return own;
}

template <typename T, Form FORM>
struct HeadsOf {
    static constexpr int CHUNKS = FORM == Form::WIDE ? 2 : 1;
    static constexpr int OWN = CHUNKS * CHUNK;
    static constexpr int HEADS = PREPARED_HEADS / CHUNKS;
    static constexpr int WORD = Word<T>::COUNT;

    const PreparedRows& rows;
    const PrepareQkParams& params;
    const int lane;
    // Of the head in shared memory.
    float* const shared;
    // What an element and the other one of its pair are multiplied by.
    float own[OWN];
    float other[OWN];

    __device__ HeadsOf(const PreparedRows& rows, const PrepareQkParams& params, float* shared)
        : rows(rows),
          params(params),
          lane(threadIdx.x % params.lanes),
          shared(shared + threadIdx.x / params.lanes * (params.lanes * OWN)) {}

    // The first element of a chunk of this lane's.
    __device__ int first_of(int chunk) const { return (chunk * params.lanes + lane) * CHUNK; }

    __device__ void load(float (&x)[OWN], const T* head) const {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int first = first_of(chunk);
            if (rows.has_words && first < params.head_dim) {
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
                    x[chunk * CHUNK + i] = first + i < params.head_dim ? static_cast<float>(head[first + i]) : 0.0f;
                }
            }
        }
    }

    __device__ void store(const float (&x)[OWN], T* head) const {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int first = first_of(chunk);
            if (rows.has_words && first < params.head_dim) {
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
                    if (first + i < params.head_dim) head[first + i] = T(x[chunk * CHUNK + i]);
                }
            }
        }
    }

    // Some of a chunk's numbers.
    template <int N>
    __device__ static void read(float (&to)[N], const void* at, int64_t position, bool is_f32, int count) {
        if (FORM == Form::WORDS && count > 0) {
            read_words<T>(to, at, position, is_f32);
        } else {
            read_numbers<T>(to, at, position, is_f32, FORM == Form::WORDS ? 0 : count);
        }
    }

    // Weights of a chunk from an element on.
    __device__ void read_weights(float (&weights)[CHUNK], int first) const {
        if (rows.weight == nullptr) {
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) weights[i] = 1.0f;
        } else {
            read(weights, rows.weight, first, rows.weight_is_f32, params.head_dim - first);
        }
    }

    // The other one of an element's pair.
    __device__ int partner(int element) const {
        if (element >= 2 * rows.half) return element;
        if (rows.is_interleaved) return element ^ 1;
        return element < rows.half ? element + rows.half : element - rows.half;
    }

    // Chunks are halves of the head, or lie in one.
    __device__ bool has_whole_chunks() const { return FORM == Form::WORDS || rows.half % CHUNK == 0; }

    // What this lane's elements of a token are multiplied by.
    __device__ void read_factors(int64_t cos_row, int64_t sin_row) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int first = first_of(chunk);
            float weights[CHUNK];
            read_weights(weights, first);
            float cos[CHUNK], sin[CHUNK], weights_of_others[CHUNK];
            if (rows.is_interleaved) {
                float cos_of_pairs[CHUNK / 2], sin_of_pairs[CHUNK / 2];
                const int count = rows.half - first / 2;
                read(cos_of_pairs, rows.cos, cos_row + first / 2, rows.table_is_f32, count);
                read(sin_of_pairs, rows.sin, sin_row + first / 2, rows.table_is_f32, count);
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) {
                    cos[i] = cos_of_pairs[i / 2];
                    sin[i] = i % 2 == 1 ? sin_of_pairs[i / 2] : -sin_of_pairs[i / 2];
                    weights_of_others[i] = weights[i ^ 1];
                }
            } else if (has_whole_chunks()) {
                const bool is_second = first >= rows.half;
                const int pair = is_second ? first - rows.half : first;
                const int count = rows.half - pair;
                read(cos, rows.cos, cos_row + pair, rows.table_is_f32, count);
                read(sin, rows.sin, sin_row + pair, rows.table_is_f32, count);
                read_weights(weights_of_others, partner(first));
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) sin[i] = is_second ? sin[i] : -sin[i];
            } else {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) {
                    const int element = first + i;
                    const bool rotates = element < 2 * rows.half;
                    const bool is_second = element >= rows.half;
                    const int pair = is_second ? element - rows.half : element;
                    float one[1];
                    read_numbers<T>(one, rows.cos, cos_row + pair, rows.table_is_f32, rotates);
                    cos[i] = one[0];
                    read_numbers<T>(one, rows.sin, sin_row + pair, rows.table_is_f32, rotates);
                    sin[i] = is_second ? one[0] : -one[0];
                    one[0] = 1.0f;
                    if (rows.weight != nullptr) {
                        const int from = partner(element);
                        read_numbers<T>(one, rows.weight, from, rows.weight_is_f32, from < params.head_dim);
                    }
                    weights_of_others[i] = one[0];
                }
            }
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                const bool rotates = first + i < 2 * rows.half;
                own[chunk * CHUNK + i] = rotates ? weights[i] * cos[i] : weights[i];
                other[chunk * CHUNK + i] = rotates ? weights_of_others[i] * sin[i] : 0.0f;
            }
        }
    }

    // Divides by the root of the mean square. Called by whole warps.
    __device__ void normalise(float (&x)[OWN]) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < OWN; ++i) sum = __fmaf_rn(x[i], x[i], sum);
        sum = sum_of_lanes(sum, params.lanes);
        const float factor = rsqrtf(__fmaf_rn(sum, params.inverse_head_dim, rows.eps));
#pragma unroll
        for (int i = 0; i < OWN; ++i) x[i] *= factor;
    }

    // The others of the pairs, which are other lanes' where pairs are of halves. Called by whole warps.
    __device__ void read_others(float (&others)[OWN], const float (&x)[OWN]) const {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            float4* const to = reinterpret_cast<float4*>(shared + first_of(chunk));
#pragma unroll
            for (int at = 0; at < CHUNK; at += 4) {
                const float* const four = x + chunk * CHUNK + at;
                to[at / 4] = make_float4(four[0], four[1], four[2], four[3]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int first = first_of(chunk);
            if (has_whole_chunks()) {
                const int from = partner(first);
#pragma unroll
                for (int at = 0; at < CHUNK; at += 4) {
                    const float4 four = *reinterpret_cast<const float4*>(shared + from + at);
                    float* const to = others + chunk * CHUNK + at;
                    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
                }
            } else {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) others[chunk * CHUNK + i] = shared[partner(first + i)];
            }
        }
        __syncwarp();
    }

    // Multiplies by the weights, and rotates. Called by whole warps.
    __device__ void rotate(float (&x)[OWN]) const {
        float others[OWN];
        if (rows.half == 0) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) x[i] *= own[i];
            return;
        }
        if (rows.is_interleaved) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) others[i] = x[i ^ 1];
        } else {
            read_others(others, x);
        }
        const bool all_rotate = 2 * rows.half == params.head_dim;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const float turned = x[i] * own[i];
            // Selected: what does not rotate may be infinite.
            if (all_rotate) {
                x[i] = __fmaf_rn(others[i], other[i], turned);
            } else {
                x[i] = first_of(i / CHUNK) + i % CHUNK < 2 * rows.half ? __fmaf_rn(others[i], other[i], turned) : turned;
            }
        }
    }

    // The heads of a token from `first_head` to `end_head`. A token that does not exist is computed
    // like another, from nothing, and not written.
    __device__ void run(bool exists, int batch, int token, int first_head, int end_head) {
        read_factors(batch * rows.cos_batch_stride + token * rows.cos_token_stride,
                     batch * rows.sin_batch_stride + token * rows.sin_token_stride);
        const T* from = static_cast<const T*>(rows.from) + batch * rows.from_strides.batch + token * rows.from_strides.token +
                        first_head * rows.from_strides.head;
        T* to = static_cast<T*>(rows.to) + batch * rows.to_strides.batch + token * rows.to_strides.token +
                first_head * rows.to_strides.head;
#pragma unroll 1
        for (int left = end_head - first_head; left > 0; left -= HEADS) {
            float x[HEADS][OWN];
#pragma unroll
            for (int head = 0; head < HEADS; ++head) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) x[head][i] = 0.0f;
                if (exists && head < left) load(x[head], from + head * rows.from_strides.head);
            }
#pragma unroll
            for (int head = 0; head < HEADS; ++head) {
                if (rows.weight != nullptr) normalise(x[head]);
                rotate(x[head]);
                if (exists && head < left) store(x[head], to + head * rows.to_strides.head);
            }
            from += HEADS * rows.from_strides.head;
            to += HEADS * rows.to_strides.head;
        }
    }
};

// How the elements of a head rotate.
enum class Turn { NONE, INTERLEAVED, HALVES };

// Heads of words. The next ones are read while one is computed.
template <typename T, Turn TURN, bool HAS_NORM>
__device__ inline void prepare_words(const PreparedRows& rows, const PrepareQkParams& params, float* shared, bool exists, int batch, int token,
                                     int first_head, int end_head) {
    constexpr int WORDS = CHUNK / Word<T>::COUNT;
    const int lanes = params.lanes;
    const int first = threadIdx.x % lanes * CHUNK;
    const float inverse_head_dim = params.inverse_head_dim;
    const float eps = rows.eps;
    const int64_t from_step = rows.from_strides.head;
    const int64_t to_step = rows.to_strides.head;
    exists = exists && first < params.head_dim;
    const T* from = static_cast<const T*>(rows.from) + batch * rows.from_strides.batch + token * rows.from_strides.token +
                    first_head * from_step + first;
    T* to = static_cast<T*>(rows.to) + batch * rows.to_strides.batch + token * rows.to_strides.token + first_head * to_step + first;
    // Heads that are not read, and not written, yet.
    int unread = exists ? end_head - first_head : 0;
    int unwritten = unread;

    uint4 raw[PREPARED_HEADS][WORDS];
    const auto read_next = [&](uint4(&words)[WORDS]) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = unread > 0 ? reinterpret_cast<const uint4*>(from)[i] : uint4{0, 0, 0, 0};
        from += from_step;
        --unread;
    };
#pragma unroll
    for (int at = 0; at < PREPARED_HEADS; ++at) read_next(raw[at]);

    HeadsOf<T, Form::WORDS> heads(rows, params, shared);
    heads.read_factors(batch * rows.cos_batch_stride + token * rows.cos_token_stride,
                       batch * rows.sin_batch_stride + token * rows.sin_token_stride);
    float* const own_place = shared + threadIdx.x * CHUNK;
    const float* const others_place = shared + threadIdx.x / lanes * (lanes * CHUNK) + heads.partner(first);

#pragma unroll 1
    for (int done = 0; done < end_head - first_head; done += PREPARED_HEADS) {
#pragma unroll
        for (int at = 0; at < PREPARED_HEADS; ++at) {
            float x[CHUNK];
#pragma unroll
            for (int i = 0; i < WORDS; ++i) {
                float word[Word<T>::COUNT];
                Word<T>::widen(raw[at][i], word);
#pragma unroll
                for (int j = 0; j < Word<T>::COUNT; ++j) x[i * Word<T>::COUNT + j] = word[j];
            }
            read_next(raw[at]);
            if constexpr (HAS_NORM) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) sum = __fmaf_rn(x[i], x[i], sum);
                sum = sum_of_lanes(sum, lanes);
                const float factor = rsqrtf(__fmaf_rn(sum, inverse_head_dim, eps));
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) x[i] *= factor;
            }
            float y[CHUNK];
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) y[i] = HAS_NORM || TURN != Turn::NONE ? x[i] * heads.own[i] : x[i];
            if constexpr (TURN == Turn::INTERLEAVED) {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) y[i] = __fmaf_rn(x[i ^ 1], heads.other[i], y[i]);
            } else if constexpr (TURN == Turn::HALVES) {
#pragma unroll
                for (int i = 0; i < CHUNK; i += 4) *reinterpret_cast<float4*>(own_place + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
                __syncwarp();
#pragma unroll
                for (int i = 0; i < CHUNK; i += 4) {
                    const float4 four = *reinterpret_cast<const float4*>(others_place + i);
                    y[i] = __fmaf_rn(four.x, heads.other[i], y[i]);
                    y[i + 1] = __fmaf_rn(four.y, heads.other[i + 1], y[i + 1]);
                    y[i + 2] = __fmaf_rn(four.z, heads.other[i + 2], y[i + 2]);
                    y[i + 3] = __fmaf_rn(four.w, heads.other[i + 3], y[i + 3]);
                }
                __syncwarp();
            }
            if (unwritten > 0) {
#pragma unroll
                for (int i = 0; i < WORDS; ++i) {
                    float word[Word<T>::COUNT];
#pragma unroll
                    for (int j = 0; j < Word<T>::COUNT; ++j) word[j] = y[i * Word<T>::COUNT + j];
                    reinterpret_cast<uint4*>(to)[i] = Word<T>::narrow(word);
                }
            }
            to += to_step;
            --unwritten;
        }
    }
}

// Grid: x the tensors' blocks, one tensor after the other; y their heads, `params.heads_of_block` in
// each.
template <typename T, Form FORM>
__device__ inline void prepare(const PrepareQkParams& params) {
    using Heads = HeadsOf<T, FORM>;
    __shared__ __align__(16) float shared[THREADS * Heads::OWN];
    int tensor = 0;
    while (tensor + 1 < params.count && params.tensors[tensor + 1].first_block <= static_cast<int>(blockIdx.x)) ++tensor;
    const PreparedRows& rows = params.tensors[tensor];
    const int first_head = static_cast<int>(blockIdx.y) * params.heads_of_block;
    if (first_head >= rows.heads) return;
    const int64_t block = static_cast<int>(blockIdx.x) - rows.first_block;
    const int64_t row = block * (THREADS / params.lanes) + threadIdx.x / params.lanes;
    bool exists = row < rows.rows;
    // Fits: rows do.
    const uint32_t at = exists ? static_cast<uint32_t>(row) : 0;
    const int batch = static_cast<int>(at / static_cast<uint32_t>(rows.seq));
    const int token = static_cast<int>(at % static_cast<uint32_t>(rows.seq));
    if (exists && params.kept_bits != nullptr) {
        const int place = rows.first_token + token;
        const uint32_t word = params.kept_bits[static_cast<int64_t>(batch) * params.mask_words + place / WARP];
        exists = (word >> (place % WARP) & 1) != 0;
    }
    const int end_head = min(first_head + params.heads_of_block, rows.heads);
    if constexpr (FORM == Form::WORDS) {
        const auto words = [&](auto turn, auto has_norm) {
            prepare_words<T, turn.value, has_norm.value>(rows, params, shared, exists, batch, token, first_head, end_head);
        };
        const auto with_norm = [&](auto has_norm) {
            if (rows.half == 0) {
                words(std::integral_constant<Turn, Turn::NONE>{}, has_norm);
            } else if (rows.is_interleaved) {
                words(std::integral_constant<Turn, Turn::INTERLEAVED>{}, has_norm);
            } else {
                words(std::integral_constant<Turn, Turn::HALVES>{}, has_norm);
            }
        };
        if (rows.weight != nullptr) {
            with_norm(std::true_type{});
        } else {
            with_norm(std::false_type{});
        }
    } else {
        Heads(rows, params, shared).run(exists, batch, token, first_head, end_head);
    }
}

// Blocks that a multiprocessor runs at once: more would have too few registers, fewer too few loads
// under way.
constexpr int BLOCKS = 3;

#define VARLEN_FA_PREPARE_QK(NAME, T, FORM)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, FORM == Form::WORDS ? BLOCKS : 1) NAME(                         \
        const __grid_constant__ PrepareQkParams params) {                                                        \
        prepare<T, FORM>(params);                                                                                \
    }
#define VARLEN_FA_PREPARE_QK_FORMS(T_NAME, T)                          \
    VARLEN_FA_PREPARE_QK(prepare_qk_##T_NAME##_words, T, Form::WORDS)  \
    VARLEN_FA_PREPARE_QK(prepare_qk_##T_NAME##_narrow, T, Form::NARROW) \
    VARLEN_FA_PREPARE_QK(prepare_qk_##T_NAME##_wide, T, Form::WIDE)
VARLEN_FA_PREPARE_QK_FORMS(f32, float)
VARLEN_FA_PREPARE_QK_FORMS(f16, __half)
VARLEN_FA_PREPARE_QK_FORMS(bf16, __nv_bfloat16)

}  // namespace prepare_qk
