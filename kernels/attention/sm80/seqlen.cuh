// Which rows a thread block works on: batch row (or packed sequence), head and query tile, and
// where its tensors start.
#pragma once
#include "../../common/params.cuh"

struct BlockRows {
    // Query rows of the tile, from `first_query` on among the sequence's `queries`.
    int first_query;
    int queries;
    int keys;
    int head;
    int kv_head;
    int batch;
    // Rows before the sequence in packed tensors; 0 in padded ones.
    int q_base;
    int k_base;

    BlockRows() = default;

    // Grid: x query tiles, of which this block has number `query_tile`, y query heads, z batch rows
    // from `first_batch` on.
    __device__ BlockRows(const AttentionParams& params, int tile_rows, int query_tile, int first_batch) {
        batch = params.batch_order == nullptr ? first_batch + blockIdx.z : params.batch_order[blockIdx.z];
        head = blockIdx.y;
        kv_head = head / params.group_size;
        first_query = query_tile * tile_rows;
        queries = params.seq_q;
        keys = params.seq_k;
        q_base = 0;
        k_base = 0;
        if (params.cu_seqlens_q != nullptr) {
            q_base = params.cu_seqlens_q[batch];
            queries = params.cu_seqlens_q[batch + 1] - q_base;
        }
        if (params.cu_seqlens_k != nullptr) {
            k_base = params.cu_seqlens_k[batch];
            keys = params.cu_seqlens_k[batch + 1] - k_base;
        }
    }

    // The element offset of a row of this block's batch row, or of a packed row, at a head.
    __device__ int64_t start(const Strides& strides, int row, int at_head) const {
        return batch * strides.batch + row * strides.token + at_head * strides.head;
    }

    // The offset to which a row's flat position, batch · seq + token, times the token stride is
    // added.
    __device__ int64_t listed_start(const Strides& strides, int seq, int at_head) const {
        return batch * (strides.batch - seq * strides.token) + at_head * strides.head;
    }
};

__device__ inline bool bit_at(const uint32_t* bits, int64_t row_words, int row, int position) {
    return (bits[row * row_words + (position >> 5)] >> (position & 31)) & 1;
}
