// Parameters of the sm90 attention kernel, and the lists that its fused form reads, made once per request on the host. M and N are the
// query rows and keys of a tile (tile_shape_sm90.cuh).
//
// Groups. Query tiles and masked key tiles are made of groups: 16 consecutive rows from any start. The host covers the kept rows of
// a batch row from the left: a group starts at the first kept row that none covers yet. So groups never overlap, no cover has
// fewer, and a tile of M / 16 query groups (N / 16 key groups) may gather rows from several runs:
//
//   kept rows     ██████·······················█████████████████████ ...
//   groups        [0    ][1    ]               [2    ][3    ][4    ] ...    a group may hold dropped rows and end past the row
//
// Query side, `batches` and `query_groups`. The groups of a batch row, M / 16 at a time, are its query tiles; the last tile is filled
// up with starts of seq_q, which load zeros and store nothing. Batch rows are listed longest first (query tiles · key tiles), those
// without a kept query not at all. Rows that no group covers are written as zeros: `zero_spans` holds each maximal range of them,
// cut to at most ZERO_ROWS rows.
//
// Key side, `key_tiles` and `key_groups`. From the left, at the first kept key p that nothing covers yet: if the N keys from p on are
// all kept, they are a full tile, whose entry in `key_tiles` is p; otherwise p starts a group. Each N / 16 groups of a batch row are a
// masked tile: its entry is ~r, where r counts the masked tiles of the whole request, and `key_groups` holds its starts from
// r · N / 16 on, the last one's filled up with starts of seq_k, which load zeros. A batch row's masked tiles come first.
//
// Dense and packed calls need no lists.
#pragma once
#include <cstddef>
#include <cstdint>

#include "params.cuh"
#include "ptx/tma.cuh"

constexpr int GROUP_ROWS = 16;
constexpr int ZERO_ROWS = 64;

// A batch row with kept queries: ranges of `query_groups` (in tiles) and of `key_tiles`.
struct BatchTiles {
    int32_t batch;
    int32_t query_tiles;
    int32_t first_query_tile;
    int32_t key_tiles;
    int32_t first_key_tile;
    int32_t masked_key_tiles;
};
static_assert(sizeof(BatchTiles) == 24);

struct ZeroSpan {
    int32_t batch;
    int32_t first_query;
    int32_t rows;
    int32_t unused;
};
static_assert(sizeof(ZeroSpan) == 16);

enum AttentionForm : int32_t {
    // Padded tensors without a mask; `groups` is the number of batch rows.
    FORM_DENSE = 0,
    // Packed sequences: cu_seqlens set; `groups` is the number of sequences.
    FORM_PACKED = 1,
    // Padded tensors in place, through the lists; `groups` is the length of `batches`.
    FORM_FUSED = 2,
};

// Tensor maps have the dimensions head_dim, token, head, batch (of extent 1 if packed). A box is one panel wide (64 columns, 32
// where the compiled head dimension is no multiple of 64) and swizzled over its width (128 or 64 bytes). Its rows: N of `k` and `v`,
// GROUP_ROWS of the others.
struct AttentionParamsSm90 {
    ptx::TensorMap q_map;
    ptx::TensorMap k_map;
    ptx::TensorMap v_map;
    ptx::TensorMap k_group_map;
    ptx::TensorMap v_group_map;
    ptx::TensorMap out_map;
    void* out;
    // [H, total_q] f32, natural logarithm; null where it is not wanted. Padded tensors: [H, B·Sq].
    float* lse;
    // [sequences + 1] each, if packed.
    const int32_t* cu_seqlens_q;
    const int32_t* cu_seqlens_k;
    // The sequences in the order of work, longest first; null for their own order.
    const int32_t* order;
    // [B, words] bits, if fused; bits past the end of a row are zero. `row_bits` may be null, which keeps all.
    const uint32_t* key_bits;
    const uint32_t* row_bits;
    const BatchTiles* batches;
    const int32_t* query_groups;
    const int32_t* key_tiles;
    const int32_t* key_groups;
    const ZeroSpan* zero_spans;
    Strides out_strides;
    int64_t lse_head_stride;
    int32_t form;
    int32_t groups;
    int32_t heads;
    // Query heads of one key/value head.
    int32_t group_size;
    int32_t seq_q;
    int32_t seq_k;
    int32_t head_dim;
    int32_t key_words;
    int32_t row_words;
    int32_t zero_span_count;
    // softmax_scale · log2(e), not zero
    float score_scale;
    // B · Sq of the padded output of packed rows.
    int32_t padded_rows;
    // If packed, where the rows go in a padded output: [total_q] flat positions, batch · seq_q + token; null for a packed output.
    const uint32_t* out_rows;
    // [padded_rows], negative where that output is to be zero; null for nowhere.
    const int32_t* inv_indices;
    // Query tiles whose keys are shared out among blocks, from the item `split_from` on (schedule_sm90.cuh), each in `parts` parts. What
    // becomes of a part, as its threads hold it: [parts of all, warpgroups, D / 8 + 1, 128]. How many parts of a query tile are done,
    // zeros before the launch: [query tiles, warpgroups].
    float4* part_chunks;
    uint32_t* parts_done;
    int32_t split_from;
    int32_t parts;
    int32_t unused[10];
};
static_assert(sizeof(ptx::TensorMap) == 128 && alignof(ptx::TensorMap) == 64);
static_assert(offsetof(AttentionParamsSm90, out) == 768);
static_assert(offsetof(AttentionParamsSm90, out_strides) == 864);
static_assert(offsetof(AttentionParamsSm90, form) == 896);
static_assert(offsetof(AttentionParamsSm90, out_rows) == 944);
static_assert(offsetof(AttentionParamsSm90, split_from) == 976);
static_assert(sizeof(AttentionParamsSm90) == 1024);
