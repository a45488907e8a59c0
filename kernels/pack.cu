// Pack and scatter: copies of whole rows between padded [B, S, H, D] and packed [n, H, D] tensors, bit for bit, in 16-byte words
// (the fused_pack_qkv and fused_scatter_to_padded of sglang PR #26318).
//
//   indices      [ 0 2 5 ]             packed row i = padded row indices[i]
//   inv_indices  [ 0 -1 1 | -1 -1 2 ]  padded row r = packed row inv_indices[r], or zeros where that is negative
//
// A warp takes one row of one tensor at a time, strided over the grid, with several loads under way before the first store.
#include "include/params.cuh"

namespace pack {

constexpr int THREADS = 256;
constexpr int WARP = 32;
// Words that a lane has under way.
constexpr int UNROLL = 4;

// Where a row of the padded tensor starts, in words as all strides here.
__device__ inline int64_t padded_start(const RowTensor& tensor, uint32_t flat, int seq) {
    return flat / seq * tensor.padded_strides.batch + flat % seq * tensor.padded_strides.token;
}

// Where a word of a row lies.
__device__ inline int64_t word_at(int word, const RowTensor& tensor, int64_t head_stride) {
    // Heads that follow one another need no division.
    if (head_stride == tensor.head_words) return word;
    return word / tensor.head_words * head_stride + word % tensor.head_words;
}

__device__ inline void copy_row(const RowTensor& tensor, const uint4* from, int64_t from_head, uint4* to, int64_t to_head) {
    const int words = tensor.heads * tensor.head_words;
    int word = threadIdx.x % WARP;
    for (; word + (UNROLL - 1) * WARP < words; word += UNROLL * WARP) {
        uint4 held[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) held[i] = __ldcs(from + word_at(word + i * WARP, tensor, from_head));
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) to[word_at(word + i * WARP, tensor, to_head)] = held[i];
    }
    for (; word < words; word += WARP) to[word_at(word, tensor, to_head)] = __ldcs(from + word_at(word, tensor, from_head));
}


extern "C" __global__ void __launch_bounds__(THREADS) pack_rows(const __grid_constant__ PackParams params) {
    const int64_t tasks = static_cast<int64_t>(params.cu_seqlens[params.batch]) * params.tensor_count;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (THREADS / WARP);
    for (int64_t task = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP; task < tasks; task += warps) {
        const int64_t row = task / params.tensor_count;
        const RowTensor& tensor = params.tensors[task % params.tensor_count];
        const uint4* from = static_cast<const uint4*>(tensor.padded) + padded_start(tensor, params.indices[row], params.seq);
        uint4* to = static_cast<uint4*>(tensor.packed) + row * tensor.packed_token_stride;
        copy_row(tensor, from, tensor.padded_strides.head, to, tensor.packed_head_stride);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter_rows(const __grid_constant__ ScatterParams params) {
    const RowTensor& tensor = params.tensor;
    const int64_t rows = static_cast<int64_t>(params.batch) * params.seq;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (THREADS / WARP);
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP; row < rows; row += warps) {
        const int packed = params.inv_indices == nullptr ? -1 : params.inv_indices[row];
        uint4* to = static_cast<uint4*>(const_cast<void*>(tensor.padded)) + padded_start(tensor, row, params.seq);
        if (packed >= 0) {
            const uint4* from = static_cast<const uint4*>(tensor.packed) + packed * tensor.packed_token_stride;
            copy_row(tensor, from, tensor.packed_head_stride, to, tensor.padded_strides.head);
        } else {
            for (int word = threadIdx.x % WARP; word < tensor.heads * tensor.head_words; word += WARP) {
                to[word_at(word, tensor, tensor.padded_strides.head)] = make_uint4(0, 0, 0, 0);
            }
        }
    }
}

}  // namespace pack
