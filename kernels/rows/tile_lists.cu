// The tile lists of padded tensors whose masks the host does not know: what
// src/backends/cuda/attention/tile_lists.rs makes of runs, made here of the bits that metadata_count
// left. The same lists in the same order, so that the output has the same bits.
// ../attention/tile_lists.cuh says what they mean.
//
// Nobody knows how many tiles there are before the launch, so each batch row has room for as many as
// it can need:
//
//   query_groups   row 0: tiles of M / 16 groups, then nothing | row 1: ...
//   key_groups     row 0: masked tiles of N / 16 groups        | row 1: ...
//   key_tiles      row 0: nothing, masked tiles ▲ full tiles   | row 1: ...
//                         `row_masked_tiles` entries before ▲
//
// One block: a warp goes through the queries or the keys of a batch row from left to right, then through
// those of another. So few launches are short, and nothing has to be zeroed before this one. In the end
// the block puts the batch rows in the order of work.
//
// Where the call has key ranges, `range_tiles` follows: each warp finds which key tiles a query tile
// needs, and the block that is done last deals out the work.
#include "../common/params.cuh"
#include "deal.cuh"
#include "range_tiles.cuh"

namespace tile_lists {

constexpr int WARP = 32;
constexpr int THREADS = TILE_LISTS_THREADS;
constexpr uint32_t ALL_LANES = 0xffffffff;
// Most rows of a range of zeros, as on the host.
constexpr int ZERO_ROWS = 64;
// The most batch rows whose order a block finds in a few microseconds. More of them keep their own.
constexpr int MAX_ORDERED = 1024;

// The bits of one batch row; those past its end are zero.
struct Bits {
    const uint32_t* words;
    int count;
    int seq;

    __device__ Bits(const uint32_t* all, int row, int count, int seq)
        : words(all + static_cast<int64_t>(row) * count), count(count), seq(seq) {}

    __device__ uint32_t word(int index) const { return index < count ? __ldg(words + index) : 0; }

    __device__ bool at(int token) const { return word(token / WARP) >> (token % WARP) & 1; }

    // The first token from `token` on that is kept (DROPPED: that is not), `seq` if there is none. A
    // whole warp asks for the same token.
    template <bool DROPPED>
    __device__ int next(int token) const {
        const int lane = threadIdx.x % WARP;
        for (int first = token / WARP; first < count; first += WARP) {
            const int index = first + lane;
            uint32_t found = DROPPED ? ~word(index) : word(index);
            if (index == token / WARP) found &= ALL_LANES << (token % WARP);
            if (index >= count) found = 0;
            const uint32_t lanes = __ballot_sync(ALL_LANES, found != 0);
            if (lanes == 0) continue;
            const int source = __ffs(lanes) - 1;
            return min((first + source) * WARP + __ffs(__shfl_sync(ALL_LANES, found, source)) - 1, seq);
        }
        return seq;
    }
};

// The end of a row's segment, at most `seq`.
__device__ inline int end_of(const int32_t (&ends)[MAX_SEGMENTS], int row, int seq) {
    int end = seq;
#pragma unroll
    for (int i = MAX_SEGMENTS - 1; i >= 0; --i) {
        if (ends[i] > row) end = min(ends[i], seq);
    }
    return end;
}

// Rows that no group covers, in pieces.
__device__ inline void list_zeros(const TileListsParams& params, int row, int first, int end, int& zero_spans) {
    const int lane = threadIdx.x % WARP;
    while (first < end) {
        const int piece_end = min(end, end_of(params.query_ends, first, params.seq_q));
        const int spans = (piece_end - first + ZERO_ROWS - 1) / ZERO_ROWS;
        int at = 0;
        // Their order does not matter.
        if (lane == 0) at = atomicAdd(&zero_spans, spans);
        at = __shfl_sync(ALL_LANES, at, 0);
        for (int i = lane; i < spans; i += WARP) {
            const int start = first + i * ZERO_ROWS;
            params.zero_spans[at + i] = {row, start, min(piece_end - start, ZERO_ROWS), 0};
        }
        first = piece_end;
    }
}

// Fills up the last tile with groups that start at the end of the row; gives the number of tiles.
__device__ inline int fill_up(int32_t* groups, int count, int tile_groups, int seq) {
    const int tiles = (count + tile_groups - 1) / tile_groups;
    for (int i = count + threadIdx.x % WARP; i < tiles * tile_groups; i += WARP) groups[i] = seq;
    return tiles;
}

// The query tiles and the zeros of a batch row; gives the number of tiles.
__device__ int cover_queries(const TileListsParams& params, int row, int& zero_spans) {
    const int lane = threadIdx.x % WARP;
    const Bits bits(params.query_bits, row, params.query_words, params.seq_q);
    const int tile_groups = params.tile_queries / GROUP_ROWS;
    int32_t* const groups = params.query_groups + static_cast<int64_t>(row) * params.row_query_tiles * tile_groups;
    int covered = 0;
    int count = 0;
    while (true) {
        const int start = bits.next<false>(covered);
        list_zeros(params, row, covered, start, zero_spans);
        if (start == params.seq_q) break;
        // Groups one behind the other, as long as their first rows are kept: up to one a lane.
        const int end = end_of(params.query_ends, start, params.seq_q);
        const int own = start + lane * GROUP_ROWS;
        const uint32_t breaks = ~__ballot_sync(ALL_LANES, own < end && bits.at(own));
        const int more = breaks == 0 ? WARP : __ffs(breaks) - 1;
        if (lane < more) groups[count + lane] = own;
        count += more;
        covered = min(start + more * GROUP_ROWS, end);
    }
    return fill_up(groups, count, tile_groups, params.seq_q);
}

// The key tiles of a batch row, into `tiles`.
__device__ void cover_keys(const TileListsParams& params, int row, BatchTiles& tiles) {
    const int lane = threadIdx.x % WARP;
    const Bits bits(params.key_bits, row, params.key_words, params.seq_k);
    const int tile_groups = params.tile_keys / GROUP_ROWS;
    const int first_masked = row * params.row_masked_tiles;
    int32_t* const groups = params.key_groups + static_cast<int64_t>(first_masked) * tile_groups;
    const int first_full = row * params.row_key_tiles + params.row_masked_tiles;
    int covered = 0;
    int count = 0;
    int full = 0;
    while (true) {
        const int start = bits.next<false>(covered);
        if (start == params.seq_k) break;
        const int end = end_of(params.key_ends, start, params.seq_k);
        const int kept_end = min(bits.next<true>(start), end);
        const int whole = (kept_end - start) / params.tile_keys;
        if (whole > 0) {
            for (int i = lane; i < whole; i += WARP) params.key_tiles[first_full + full + i] = start + i * params.tile_keys;
            full += whole;
            covered = start + whole * params.tile_keys;
            continue;
        }
        // Fewer than a tile has.
        const int more = (kept_end - start + GROUP_ROWS - 1) / GROUP_ROWS;
        if (lane < more) groups[count + lane] = start + lane * GROUP_ROWS;
        count += more;
        covered = min(start + more * GROUP_ROWS, end);
    }
    const int masked = fill_up(groups, count, tile_groups, params.seq_k);
    for (int i = lane; i < masked; i += WARP) params.key_tiles[first_full - masked + i] = ~(first_masked + i);
    if (lane == 0) {
        tiles.key_tiles = masked + full;
        tiles.first_key_tile = first_full - masked;
        tiles.masked_key_tiles = masked;
    }
}

// Whether a batch row comes before another one: the longest work first, rows without queries last.
__device__ inline bool precedes(const BatchTiles& row, const BatchTiles& other) {
    const bool works = row.query_tiles > 0, other_works = other.query_tiles > 0;
    if (works != other_works) return works;
    if (works && row.key_tiles != other.key_tiles) return row.key_tiles > other.key_tiles;
    if (row.query_tiles != other.query_tiles) return row.query_tiles > other.query_tiles;
    return row.batch < other.batch;
}

// Grid: one block.
extern "C" __global__ void __launch_bounds__(THREADS) tile_lists(const __grid_constant__ TileListsParams params) {
    __shared__ int zero_spans;
    if (threadIdx.x == 0) zero_spans = 0;
    __syncthreads();
    const int warp = threadIdx.x / WARP;
    // Even numbers are queries, odd ones keys: each writes its part of the row's entry.
    for (int part = warp; part < 2 * params.batch; part += THREADS / WARP) {
        const int row = part / 2;
        BatchTiles& tiles = params.unordered[row];
        if (part % 2 == 1) {
            cover_keys(params, row, tiles);
            continue;
        }
        const int query_tiles = cover_queries(params, row, zero_spans);
        if (threadIdx.x % WARP == 0) {
            tiles.batch = row;
            tiles.query_tiles = query_tiles;
            tiles.first_query_tile = row * params.row_query_tiles;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        params.counts->zero_spans = zero_spans;
        params.counts->blocks_done = 0;
    }
    for (int own = threadIdx.x; own < params.batch; own += THREADS) {
        const BatchTiles own_tiles = params.unordered[own];
        int rank = own;
        if (params.batch <= MAX_ORDERED) {
            rank = 0;
            for (int other = 0; other < params.batch; ++other) rank += precedes(params.unordered[other], own_tiles);
        }
        params.batches[rank] = own_tiles;
    }
}

// Grid: a warp for each query tile that there may be.
extern "C" __global__ void __launch_bounds__(RANGE_TILES_THREADS, 1) range_tiles(const __grid_constant__ RangeTilesParams params) {
    const int slots = params.lists.batch * params.lists.row_query_tiles;
    const int slot = blockIdx.x * (RANGE_TILES_THREADS / WARP) + threadIdx.x / WARP;
    if (slot < slots) find_range_tile(params, slot);
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    // The last block leaves 0 again, for the launch that comes next.
    if (threadIdx.x == 0) is_last = atomicInc(params.blocks_done, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    deal_out(params);
}

}  // namespace tile_lists
