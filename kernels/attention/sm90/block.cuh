// A block of the sm90 kernel: its warps, its shared memory, and what its producer tells its consumers.
#pragma once
#include "../../common/params.cuh"
#include "../../common/shared_tile.cuh"
#include "../../ptx/warpgroup.cuh"
#include "../tile_lists.cuh"
#include "tiles.h"

namespace sm90 {

constexpr int WARPGROUP = WARPGROUP_THREADS;

// Named barriers. Those of a warpgroup are as many as there are warpgroups at most.
constexpr int BARRIER_TURN = 1;
constexpr int BARRIER_WARPGROUP = 4;
// The end, for consumers, and for each of the producer's warps that follow them.
constexpr int BARRIER_END = 7;
constexpr int BARRIER_END_COPIES = 8;
constexpr int BARRIER_END_ZEROING = 9;

// What consumers know of a query tile.
struct TileRows {
    // Negative where nothing is left to do. The first are masked.
    int32_t key_tiles;
    int32_t masked_tiles;
    int32_t batch;
    int32_t head;
    // Padded tensors: rows past the end are clipped by the copy engine.
    int32_t clips;
    // Of the parts of query tiles, all in a row, the one that this is; negative for a query tile with all its keys.
    int32_t part;
    // One for each warp.
    RowGroup groups[12];
};

// What consumers know of a key tile.
struct TileKeys {
    // Rows of V that are not kept have to be zeroed.
    uint32_t has_masked_values;
    // For the masked tiles.
    uint32_t kept[6];
};

template <typename T_, int D_, int WARPGROUPS_, int TILE_N_, int QUERY_TILES_>
struct Shape {
    using T = T_;
    static constexpr int D = D_;
    static constexpr int WARPGROUPS = WARPGROUPS_;
    static constexpr int TILE_M = WARPGROUPS * SM90_WARPGROUP_ROWS;
    static constexpr int TILE_N = TILE_N_;
    static constexpr int THREADS = (WARPGROUPS + 1) * WARPGROUP;
    static constexpr int CONSUMER_WARPS = WARPGROUPS * 4;
    static constexpr int CONSUMERS = WARPGROUPS * WARPGROUP;
    static constexpr int QUERY_TILES = QUERY_TILES_;
    // For the product, before exponentials are computed; they would run beside it, but registers are too few.
    static constexpr bool WAITS_EARLY = D == 256;
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
    static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 232 : 160;

    using TileQ = SharedTile<TILE_M, D>;
    using TileKV = SharedTile<TILE_N, D>;
    static constexpr int PANEL = TileQ::PANEL;
    static constexpr int PANELS = D / PANEL;
    static constexpr int ROW_BYTES = PANEL * 2;
    static constexpr int Q = 0;
    static constexpr int K = Q + QUERY_TILES * TileQ::BYTES;
    static constexpr int V = K + STAGES * TileKV::BYTES;
    static constexpr int ROWS_INFO = V + STAGES * TileKV::BYTES;
    static constexpr int KEYS_INFO = ROWS_INFO + 2 * sizeof(TileRows);
    static constexpr int BARRIERS = KEYS_INFO + STAGES * sizeof(TileKeys);
    static constexpr int FULL_Q = BARRIERS;
    static constexpr int EMPTY_Q = FULL_Q + 8 * QUERY_TILES * WARPGROUPS;
    static constexpr int FULL_K = EMPTY_Q + 8 * QUERY_TILES * WARPGROUPS;
    static constexpr int EMPTY_K = FULL_K + 8 * STAGES;
    static constexpr int FULL_V = EMPTY_K + 8 * STAGES;
    static constexpr int EMPTY_V = FULL_V + 8 * STAGES;
    // Copied but not yet zeroed where it has to be.
    static constexpr int RAW_V = EMPTY_V + 8 * STAGES;
    // Whether the block has to start again, and for each warpgroup, how many parts of its query tile were done before.
    static constexpr int OUT_OF_RANGE = RAW_V + 8 * STAGES;
    static constexpr int PARTS_DONE = OUT_OF_RANGE + 4;
    static constexpr int BYTES = PARTS_DONE + 4 * WARPGROUPS;
    // The host asks for the tiles and the extra bytes.
    static_assert(BYTES <= ROWS_INFO + SM90_EXTRA_SHARED_BYTES && ROWS_INFO + SM90_EXTRA_SHARED_BYTES <= SM90_MAX_SHARED_BYTES);
    static_assert(TILE_N % 16 == 0 && TILE_N <= 192 && TILE_M <= 192);

    // Where the query tile of a work lies, and what belongs to it for each warpgroup.
    __device__ static int query_tile(int work_index) { return Q + work_index % QUERY_TILES * TileQ::BYTES; }
    __device__ static int full_q(int work_index, int warpgroup) { return FULL_Q + 8 * (work_index % QUERY_TILES * WARPGROUPS + warpgroup); }
    __device__ static int empty_q(int work_index, int warpgroup) { return EMPTY_Q + 8 * (work_index % QUERY_TILES * WARPGROUPS + warpgroup); }
    // Of the phase in which that work's queries are there; those before have been given back at the end of the other one.
    __device__ static uint32_t parity_q(int work_index) { return work_index / QUERY_TILES % 2; }
};

using KeysState = PipelineState<STAGES>;

// At the end of all query tiles, past a barrier that every consumer has arrived at: whether scores left the range of
// `WarpgroupSoftmax`, so that every tile is computed again. Of `threads` those that are not consumers are one warp.
template <typename S>
__device__ inline bool must_recompute(unsigned char* shared, int barrier, int threads) {
    ptx::barrier_sync(barrier, threads);
    return ptx::uniform(*reinterpret_cast<volatile uint32_t*>(shared + S::OUT_OF_RANGE)) != 0;
}

}  // namespace sm90
