// The lists by which the sm90 and the sm100 kernel read padded tensors under a mask. The host makes
// them once per request (src/backends/cuda/attention/tile_lists.rs), or the device where it alone knows
// the mask (../rows/tile_lists.cu). M and N are the query rows and keys of a tile.
//
// Groups. Query tiles and masked key tiles are made of groups: 16 consecutive rows from any start.
// The host covers the kept rows of a batch row from the left: a group starts at the first kept row
// that no group covers yet. So groups never overlap, there is no cover with fewer groups, and a
// tile of M / 16 query groups (N / 16 key groups) may gather rows from several runs:
//
//   kept rows     ██████·······················█████████████████████ ...
//   groups        [0    ][1    ]               [2    ][3    ][4    ] ...    a group may hold masked rows and end past the row
//
// Query side, `batches` and `query_groups`. The groups of a batch row, M / 16 at a time, are its
// query tiles; the last tile is filled up with starts of seq_q, which load zeros and store nothing.
// Batch rows are listed longest first (query tiles · key tiles), those without a kept query not at
// all. Rows that no group covers are written as zeros: `zero_spans` lists them in pieces of at most
// 64 rows. Where heads share query tiles (schedule.cuh), each group is a query tile of the lists.
//
// Key side, `key_tiles` and `key_groups`. From the left, at the first kept key p that nothing
// covers yet: if the N keys from p on are all kept, they are a full tile, whose entry in
// `key_tiles` is p; otherwise p starts a group. Each N / 16 groups of a batch row are a masked
// tile: its entry is ~r, where r counts the masked tiles of the whole request, and `key_groups`
// holds its starts from r · N / 16 on, the last one's filled up with starts of seq_k, which load
// zeros. A batch row's masked tiles come first.
//
// Dense and packed calls need no lists.
//
// Key ranges. With one range of keys for each query, `range_tiles` says which key tiles each query
// tile needs: those that hold what some of its queries see. It is made for each pair of query tile
// and batch row (or sequence), once for all heads, by src/backends/cuda/attention/range_tiles.rs or,
// where the device alone knows the mask, ../rows/range_tiles.cuh:
//
//   keys some queries see     ·····░░░░░░████████████████████░░░░░░░░░·······
//   all queries               ·····░░░░░░████████████████████░░░░░░░░░·······
//   tiles of keys in a row         [left |inner|inner|inner|right|right]        from left to right
//   order of work                  4     5     6     7     3     2              1: masked tiles of the lists
//
// Without lists the tiles start at the first key that some query sees. Inner tiles need no mask.
// `range_work` says which block computes which of them for which head.
#pragma once
#include "../common/params.cuh"

// One of the 16-row groups of a query tile.
struct RowGroup {
    // The first row in the tensor, how many rows are the tile's, and a bit for each that is kept.
    int32_t first_row;
    int16_t rows;
    uint16_t kept;
    int32_t head;
};

// Where a row of the output is.
struct PlacedRows {
    void* start;
    const Strides& strides;
    int row;
};

// Where in the ring of stages a tile is, by the number of tiles before it.
template <int STAGES>
struct PipelineState {
    uint32_t count = 0;
    __device__ int stage() const { return count % STAGES; }
    __device__ uint32_t parity() const { return count / STAGES % 2; }
};

// The mask bits of 16 positions from `first` on, 0 past the end of the row; all are set where there
// is no mask.
__device__ inline uint32_t group_bits(const uint32_t* bits, int words, int64_t row, int first) {
    if (bits == nullptr) return 0xffff;
    const int word = first / 32;
    const uint32_t low = word < words ? bits[row * words + word] : 0;
    const uint32_t high = word + 1 < words ? bits[row * words + word + 1] : 0;
    return __funnelshift_r(low, high, first % 32) & 0xffff;
}

// How threads share rows of head dimension D or less to write zeros: each has one chunk of 16 bytes of
// some of them, so that its next address is a sum.
template <int D>
struct ZeroLanes {
    static constexpr int OF_ROW = D <= 64 ? 8 : D <= 128 ? 16 : 32;

    template <typename T>
    __device__ static void write(T* start, int64_t stride, int rows, int head_dim, int thread, int threads) {
        const int chunk = thread % OF_ROW;
        if (chunk * 8 >= head_dim) return;
        const int step = threads / OF_ROW;
        int row = thread / OF_ROW;
        T* to = start + row * stride + chunk * 8;
#pragma unroll 4
        for (; row < rows; row += step, to += step * stride) *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
    }
};

// Writes zeros to the rows that no group covers. Called by threads with nothing else to do. `output`
// says where the output from a row on is: with strides, and the row as it is counted there.
template <typename T, int D, typename Output>
__device__ inline void write_zero_spans(const TileListParams& params, int thread, int threads, Output output) {
    const int spans = params.zero_span_count >= 0 ? params.zero_span_count : params.zero_spans[-1].batch;
    for (int item = blockIdx.x; item < spans * params.heads; item += gridDim.x) {
        const ZeroSpan span = params.zero_spans[item / params.heads];
        const int head = item % params.heads;
        const PlacedRows rows = output(span.first_query);
        T* const out =
            static_cast<T*>(rows.start) + span.batch * rows.strides.batch + rows.row * rows.strides.token + head * rows.strides.head;
        ZeroLanes<D>::write(out, rows.strides.token, span.rows, params.head_dim, thread, threads);
        if (params.lse != nullptr) {
            float* const lse = params.lse + span.batch * params.lse_batch_stride + head * params.lse_head_stride + span.first_query;
            for (int row = thread; row < span.rows; row += threads) lse[row] = -INFINITY;
        }
    }
}

template <typename T, int D>
__device__ inline void write_zero_spans(const TileListParams& params, int thread, int threads) {
    write_zero_spans<T, D>(params, thread, threads, [&](int row) { return PlacedRows{params.out, params.out_strides, row}; });
}
