// Pack and scatter: copies of whole rows between padded [B, S, H, D] and packed [n, H, D] tensors,
// bit for bit, in 16-byte words (the fused_pack_qkv and fused_scatter_to_padded of sglang PR
// #26318).
//
//   indices      [ 0 2 5 ]             packed row i = padded row indices[i]
//   inv_indices  [ 0 -1 1 | -1 -1 2 ]  padded row r = packed row inv_indices[r], or zeros where that is negative
//
// A warp copies one row of one tensor at a time. It starts several loads before the first store.
#include "../common/params.cuh"

namespace pack {

constexpr int THREADS = ROW_COPY_THREADS;
constexpr int WARP = 32;
// Words that a lane loads before it stores them.
constexpr int UNROLL = 4;

// Where a row of the padded tensor starts, in words.
__device__ inline int64_t padded_start(const RowTensor& tensor, uint32_t flat, int seq) {
    return flat / seq * tensor.padded_strides.batch + flat % seq * tensor.padded_strides.token;
}

// The warp's first row, and the distance to its next.
__device__ inline int64_t first_row() {
    return static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
}

__device__ inline int64_t row_step() {
    return static_cast<int64_t>(gridDim.x) * (THREADS / WARP);
}

// Where a word of a row lies.
__device__ inline int64_t word_at(int word, const RowTensor& tensor, int64_t head_stride) {
    // Contiguous heads need no division.
    if (head_stride == tensor.head_words) return word;
    return word / tensor.head_words * head_stride + word % tensor.head_words;
}

template <bool Reused>
__device__ inline void store(uint4* to, uint4 value) {
    if constexpr (Reused) {
        *to = value;
    } else {
        __stcs(to, value);
    }
}

// Copies a row. `Reused`: the copy is read soon, by the attention that follows, and should stay in
// the cache.
template <bool Reused>
__device__ inline void copy_row(const RowTensor& tensor, const uint4* from, int64_t from_head, uint4* to, int64_t to_head) {
    const int words = tensor.heads * tensor.head_words;
    for (int first = threadIdx.x % WARP; first < words; first += UNROLL * WARP) {
        uint4 held[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int word = first + i * WARP;
            if (word < words) held[i] = __ldg(from + word_at(word, tensor, from_head));
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int word = first + i * WARP;
            if (word < words) store<Reused>(to + word_at(word, tensor, to_head), held[i]);
        }
    }
}

// Grid: y tensors, x rows of a tensor (grid-stride loop).
extern "C" __global__ void __launch_bounds__(THREADS) pack_rows(const __grid_constant__ PackParams params) {
    const RowTensor& tensor = params.tensors[blockIdx.y];
    const int64_t rows = params.cu_seqlens[params.batch];
    for (int64_t row = first_row(); row < rows; row += row_step()) {
        const uint4* from = static_cast<const uint4*>(tensor.padded) + padded_start(tensor, params.indices[row], params.seq);
        uint4* to = static_cast<uint4*>(tensor.packed) + row * tensor.packed_token_stride;
        copy_row<true>(tensor, from, tensor.padded_strides.head, to, tensor.packed_head_stride);
    }
}

// Grid: x rows (grid-stride loop).
extern "C" __global__ void __launch_bounds__(THREADS) scatter_rows(const __grid_constant__ ScatterParams params) {
    const RowTensor& tensor = params.tensor;
    const int64_t rows = static_cast<int64_t>(params.batch) * params.seq;
    for (int64_t row = first_row(); row < rows; row += row_step()) {
        const int packed = params.inv_indices == nullptr ? -1 : params.inv_indices[row];
        uint4* to = static_cast<uint4*>(const_cast<void*>(tensor.padded)) + padded_start(tensor, row, params.seq);
        if (packed >= 0) {
            const uint4* from = static_cast<const uint4*>(tensor.packed) + packed * tensor.packed_token_stride;
            copy_row<false>(tensor, from, tensor.packed_head_stride, to, tensor.padded_strides.head);
        } else {
            for (int word = threadIdx.x % WARP; word < tensor.heads * tensor.head_words; word += WARP) {
                store<false>(to + word_at(word, tensor, tensor.padded_strides.head), make_uint4(0, 0, 0, 0));
            }
        }
    }
}

}  // namespace pack
