// Parameters of the kernels, laid out as in src/cuda/params.rs; sizes and offsets are asserted on both sides.
#pragma once
#include <cstddef>
#include <cstdint>

// Distances in elements between neighbours of each dimension. A packed tensor has no batch rows.
struct Strides {
    int64_t batch;
    int64_t token;
    int64_t head;
};

struct AttentionParams {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    // [H, total_q] f32, natural logarithm; null where it is not wanted.
    float* lse;
    // [B + 1] each; null for padded tensors.
    const int32_t* cu_seqlens_q;
    const int32_t* cu_seqlens_k;
    // [B]: the batch row or sequence that each step of the grid takes, the longest first; null for the order they have.
    const int32_t* batch_order;
    // [B, words] bits of padded tensors: kept keys, and query rows that are not written as zeros; null keeps all.
    const uint32_t* key_bits;
    const uint32_t* row_bits;
    // Additive, any strides; null for none.
    const void* bias;
    Strides q_strides;
    Strides k_strides;
    Strides v_strides;
    Strides out_strides;
    // Batch row, head, query, key.
    int64_t bias_strides[4];
    int64_t lse_head_stride;
    int32_t seq_q;
    int32_t seq_k;
    // Query heads of one key/value head.
    int32_t group_size;
    int32_t head_dim;
    int32_t key_words;
    int32_t row_words;
    // softmax_scale · log2(e)
    float score_scale;
    int32_t bias_is_f32;
};
static_assert(sizeof(Strides) == 24);
static_assert(offsetof(AttentionParams, q_strides) == 88);
static_assert(offsetof(AttentionParams, bias_strides) == 184);
static_assert(offsetof(AttentionParams, seq_q) == 224);
static_assert(sizeof(AttentionParams) == 256);

// Which rows of padded tensors the fused form takes: the tables that pack and scatter go by. `cu_seqlens` of the call are set.
struct RowLists {
    // Flat positions of the valid tokens of each side.
    const uint32_t* indices_q;
    const uint32_t* indices_k;
    // [B·Sq], negative where a query is masked; null where none is.
    const int32_t* inv_indices;
    // The batch row of the grid's first.
    int32_t first_batch;
    int32_t unused;
};
static_assert(sizeof(RowLists) == 32);

struct FusedAttentionParams {
    AttentionParams attention;
    RowLists lists;
};
static_assert(offsetof(FusedAttentionParams, lists) == 256);
static_assert(sizeof(FusedAttentionParams) == 288);

// Rows move as 16-byte words: H heads of `head_words` words each. All strides count words.
struct RowTensor {
    const void* padded;
    void* packed;
    Strides padded_strides;
    int64_t packed_token_stride;
    int64_t packed_head_stride;
    int32_t heads;
    int32_t head_words;
};
static_assert(sizeof(RowTensor) == 64);

struct PackParams {
    RowTensor tensors[3];
    // [total] flat positions of the valid tokens.
    const uint32_t* indices;
    // [B + 1]; the last value is the number of packed rows, so that it may be known to the device alone.
    const int32_t* cu_seqlens;
    int32_t batch;
    int32_t seq;
};
static_assert(offsetof(PackParams, indices) == 192);
static_assert(sizeof(PackParams) == 216);

struct ScatterParams {
    // `padded` is written, `packed` read.
    RowTensor tensor;
    // [B·S] packed row of each token, negative where it is masked; null writes zeros everywhere.
    const int32_t* inv_indices;
    int32_t batch;
    int32_t seq;
};
static_assert(sizeof(ScatterParams) == 80);

// Tokens that one block of the metadata kernels reads of a row.
constexpr int METADATA_CHUNK = 2048;

struct MetadataParams {
    // [B, S] integers of `mask_bytes` bytes each; any that is not 0 keeps its token. Strides in elements.
    const void* mask;
    int64_t mask_batch_stride;
    int64_t mask_token_stride;
    // [B + 1], [B], [B·S], [B·S]: as src/meta.rs has them.
    int32_t* cu_seqlens;
    int32_t* batch_order;
    uint32_t* indices;
    int32_t* inv_indices;
    // [B, row_words] bits of kept tokens.
    uint32_t* bits;
    // [B, chunks]: kept tokens, then the packed row of the first of them.
    int32_t* chunk_starts;
    int32_t batch;
    int32_t seq;
    int32_t chunks;
    int32_t row_words;
    int32_t mask_bytes;
    int32_t unused;
};
static_assert(offsetof(MetadataParams, batch) == 72);
static_assert(sizeof(MetadataParams) == 96);
