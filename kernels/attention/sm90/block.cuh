// A block of the sm90 kernel: its warps, its shared memory, and what its producer tells its
// consumers.
#pragma once
#include <type_traits>

#include "../../common/params.cuh"
#include "../../common/shared_tile.cuh"
#include "../../ptx/counter.cuh"
#include "../../ptx/warpgroup.cuh"
#include "../segments.cuh"
#include "../tile_lists.cuh"
#include "narrow_tiles.h"
#include "pair.cuh"
#include "pair_tiles.h"
#include "short_pair_tiles.h"
#include "short_ranged_tiles.h"
#include "short_tiles.h"
#include "small_tiles.h"
#include "tiles.h"

namespace sm90 {

constexpr int WARPGROUP = WARPGROUP_THREADS;

// Named barriers. The first two are ranges, one barrier for each of up to three warpgroups.
constexpr int BARRIER_TURN = 1;
constexpr int BARRIER_WARPGROUP = 4;
// The end of all query tiles: for the consumers, and for each warp of the producer that waits for
// them.
constexpr int BARRIER_END = 7;
constexpr int BARRIER_END_COPIES = 8;
constexpr int BARRIER_END_ZEROING = 9;
// All consumers, about the values of a key tile.
constexpr int BARRIER_VALUES = 10;
// As BARRIER_END_COPIES, for the warp that loads values.
constexpr int BARRIER_END_VALUES = 11;

// What consumers know of a query tile.
struct TileRows {
    // Key tiles, negative where nothing is left to do; the first `masked_tiles` of them are masked.
    int32_t key_tiles;
    int32_t masked_tiles;
    int32_t batch;
    // Padded tensors: rows past the end are clipped by the copy engine.
    int32_t clips;
    // `Work::part`.
    int32_t part;
    // One for each warp.
    RowGroup groups[12];
};

// What consumers know of a key tile.
struct TileKeys {
    // Whether there are rows of V that must be zeroed.
    uint32_t has_masked_values;
    // For masked tiles: bits of the keys; and how many groups there are up to the last kept key, counted
    // by whole words of bits, which blocks that share a multiprocessor do not ask.
    uint32_t kept[6];
    int32_t groups;
};

// The same where queries see ranges of keys.
struct RangedTileRows : TileRows {
    // Whether every key tile is masked, and they come from right to left.
    int32_t descends;
    // `RangeTile::some_first` and `some_end`.
    int32_t some_first[3];
    int32_t some_end[3];
};

struct RangedTileKeys : TileKeys {
    // For masked tiles: the first key of each group, counted as ranges count keys.
    int32_t first_keys[12];
};

// The same where tensors come in segments.
template <typename Base>
struct SegmentedTileRows : Base {
    // Where the rows of each group lie.
    SegmentRow places[12];
};

template <typename T_, int D_, int WARPGROUPS_, int TILE_N_, int QUERY_TILES_, int STAGES_, bool RANGED_ = false, bool SEGMENTED_ = false,
          int BLOCKS_ = 1, bool PAIRED_ = false>
struct Shape {
    using T = T_;
    // Whether each query sees a range of keys.
    static constexpr bool RANGED = RANGED_;
    // Whether tensors come in segments along S, which the lists are cut for.
    static constexpr bool SEGMENTED = SEGMENTED_;
    // Whether heads of one key/value head can share query tiles.
    static constexpr bool PACKS_HEADS = !RANGED && !SEGMENTED;
    // Calls on segments are fused.
    static constexpr bool HAS_DENSE = !SEGMENTED;
    using WholeRows = std::conditional_t<RANGED, RangedTileRows, TileRows>;
    using Rows = std::conditional_t<SEGMENTED, SegmentedTileRows<WholeRows>, WholeRows>;
    using Keys = std::conditional_t<RANGED, RangedTileKeys, TileKeys>;
    static constexpr int D = D_;
    static constexpr int WARPGROUPS = WARPGROUPS_;
    static constexpr int TILE_M = WARPGROUPS * SM90_WARPGROUP_ROWS;
    static constexpr int TILE_N = TILE_N_;
    // The first key tile of a query tile is computed for so many keys, or 64 more and so on. Not at head
    // dimension 64 without ranges: with one start alone, descriptors of the loop stay in registers of
    // their own, which saves 10 of its 433 instructions.
    static constexpr int FEW_KEYS = (D == 64 && !RANGED) || TILE_N <= 64 ? TILE_N : TILE_N >= 112 ? 64 : 48;
    // Whether the first product of a query tile is added to zeros. Else it is the first output: 64 and more
    // instructions less, but at head dimension 64 dense calls then take 1.5 % longer.
    static constexpr bool STARTS_WITH_ZEROS = D == 64 && WARPGROUPS > 1;
    // Blocks that share a multiprocessor.
    static constexpr int BLOCKS = BLOCKS_;
    // Whether two blocks share what they load (`pair.cuh`).
    static constexpr bool PAIRED = PAIRED_;
    // The place of the values, where outputs lie with one place for queries, is not this block's alone.
    static_assert(!PAIRED || (BLOCKS == 1 && QUERY_TILES_ == 2 && !RANGED && !SEGMENTED));
    // Blocks whose consumers release a stage.
    static constexpr int RELEASING_BLOCKS = PAIRED ? PAIR : 1;
    // Whether the loading warps read the ranges of a query tile, and consumers have them from shared memory.
    static constexpr bool LOADS_RANGES = RANGED && BLOCKS > 1;
    static constexpr int THREADS = (WARPGROUPS + 1) * WARPGROUP;
    static constexpr int CONSUMER_WARPS = WARPGROUPS * 4;
    static constexpr int CONSUMERS = WARPGROUPS * WARPGROUP;
    static constexpr int QUERY_TILES = QUERY_TILES_;
    // Of keys and of values.
    static constexpr int STAGES = STAGES_;
    using KeysState = PipelineState<STAGES>;
    // Where the output of a query tile lies until the copy engine has read it. Where shared memory has two
    // places for queries, in that of the tile's own. Else their place is free for the next ones with the last
    // scores, and each warpgroup's output takes a stage of values, the first one's that which the next query
    // tile's first values come to.
    static constexpr bool OUTPUT_IN_VALUES = QUERY_TILES == 1;
    // Whether the loop gives back the place of the queries with the last scores, not the softmax after them.
    // At head dimension 192 and with ranges its few instructions cost as much as they save, or more.
    static constexpr bool GIVES_BACK_EARLY = OUTPUT_IN_VALUES && D == 256 && !RANGED;
    // The next queries then come while this query tile ends, so what consumers know of it stays for longer.
    static constexpr int ROWS_PLACES = OUTPUT_IN_VALUES ? 4 : 2;
    // Whether consumers wait for the product before they compute exponentials. Both at once need
    // more registers.
    static constexpr bool WAITS_EARLY = D == 256;
    // Of the registers that threads have at entry, consumers take what the producer gives back. They come
    // by eights.
    static constexpr int ENTRY_REGISTERS = 65536 / (BLOCKS * THREADS) / 8 * 8;
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 && BLOCKS == 1 ? 40 : 32;
    static constexpr int CONSUMER_REGISTERS = (ENTRY_REGISTERS + (ENTRY_REGISTERS - PRODUCER_REGISTERS) / WARPGROUPS) / 8 * 8;

    using TileQ = SharedTile<TILE_M, D>;
    using TileKV = SharedTile<TILE_N, D>;
    using TileO = std::conditional_t<OUTPUT_IN_VALUES, SharedTile<SM90_WARPGROUP_ROWS, D>, TileQ>;
    static_assert(!OUTPUT_IN_VALUES || (TileO::BYTES <= TileKV::BYTES && WARPGROUPS == STAGES));
    static constexpr int PANEL = TileQ::PANEL;
    static constexpr int PANELS = TileQ::PANELS;
    static constexpr int ROW_BYTES = TileQ::ROW_BYTES;
    static constexpr int Q = 0;
    static constexpr int K = Q + QUERY_TILES * TileQ::BYTES;
    static constexpr int V = K + STAGES * TileKV::BYTES;
    static constexpr int ROWS_INFO = V + STAGES * TileKV::BYTES;
    static constexpr int KEYS_INFO = ROWS_INFO + ROWS_PLACES * sizeof(Rows);
    // What each row sees, of two query tiles.
    static constexpr int RANGES = KEYS_INFO + (STAGES * sizeof(Keys) + 7) / 8 * 8;
    static constexpr int BARRIERS = RANGES + (LOADS_RANGES ? 2 * TILE_M * 8 : 0);
    static constexpr int FULL_Q = BARRIERS;
    static constexpr int EMPTY_Q = FULL_Q + 8 * QUERY_TILES * WARPGROUPS;
    static constexpr int FULL_K = EMPTY_Q + 8 * QUERY_TILES * WARPGROUPS;
    static constexpr int EMPTY_K = FULL_K + 8 * STAGES;
    static constexpr int FULL_V = EMPTY_K + 8 * STAGES;
    static constexpr int EMPTY_V = FULL_V + 8 * STAGES;
    // Values are copied, but masked rows are not zeroed yet.
    static constexpr int RAW_V = EMPTY_V + 8 * STAGES;
    // Whether the block must recompute all tiles; and for each warpgroup, how many parts of its
    // query tile were done before.
    static constexpr int OUT_OF_RANGE = RAW_V + 8 * STAGES;
    static constexpr int PARTS_DONE = OUT_OF_RANGE + 4;
    // With key ranges: for each stage, whether one of its values was ever NaN or infinite.
    static constexpr int NONFINITE = PARTS_DONE + 4 * WARPGROUPS;
    // For each warpgroup, how many outputs of its warps have left. Not an mbarrier: of query tiles with few
    // keys nobody waits for each of its phases.
    static constexpr int OUTPUTS_LEFT = NONFINITE + (RANGED ? 4 * STAGES : 0);
    static constexpr int BYTES = OUTPUTS_LEFT + (OUTPUT_IN_VALUES ? 4 * WARPGROUPS : 0);
    // The host asks for the tiles and SM90_EXTRA_SHARED_BYTES.
    static_assert(BYTES <= ROWS_INFO + SM90_EXTRA_SHARED_BYTES);
    // The driver takes some for each block.
    static constexpr int RESERVED_BYTES = 1024;
    static_assert(BLOCKS * (ROWS_INFO + SM90_EXTRA_SHARED_BYTES + RESERVED_BYTES) <= SM90_MAX_SHARED_BYTES + RESERVED_BYTES);
    static_assert(TILE_N % 16 == 0 && TILE_N <= 192 && TILE_M <= 192);

    // What consumers know of the query tile of a work item.
    __device__ static Rows& rows_info(unsigned char* shared, int work_index) {
        return reinterpret_cast<Rows*>(shared + ROWS_INFO)[work_index % ROWS_PLACES];
    }
    // Where the query tile of a work item lies, and its barriers for each warpgroup.
    __device__ static int query_tile(int work_index) { return Q + work_index % QUERY_TILES * TileQ::BYTES; }
    __device__ static int full_q(int work_index, int warpgroup) { return FULL_Q + 8 * (work_index % QUERY_TILES * WARPGROUPS + warpgroup); }
    __device__ static int empty_q(int work_index, int warpgroup) { return EMPTY_Q + 8 * (work_index % QUERY_TILES * WARPGROUPS + warpgroup); }
    __device__ static int outputs_left(int warpgroup) { return OUTPUTS_LEFT + 4 * warpgroup; }
    // Waits until those of a warpgroup have left that belong to work items before this one.
    __device__ static void wait_for_outputs(uint32_t base, int warpgroup, int work_index) {
        while (ptx::read_acquire(base + outputs_left(warpgroup)) < 4u * work_index) {
        }
    }
    // The parity of the phase in which the queries of a work item are there.
    __device__ static uint32_t parity_q(int work_index) { return work_index / QUERY_TILES % 2; }
};

// At the end of all query tiles, after a barrier that every consumer has arrived at: whether scores
// were out of the range of `WarpgroupSoftmax`, so that every tile must be computed again. `threads`
// wait and arrive: the consumers, and at most one other warp. Of a pair both blocks compute again, and all
// threads wait: neither block ends before the other is done with its shared memory.
template <typename S>
__device__ inline bool must_recompute(unsigned char* shared, int barrier, int threads) {
    if constexpr (S::PAIRED) {
        __syncwarp();
        ptx::cluster_sync();
    } else {
        ptx::barrier_sync(barrier, threads);
    }
    return ptx::uniform(*reinterpret_cast<volatile uint32_t*>(shared + S::OUT_OF_RANGE)) != 0;
}

// At the end of tiles that were computed again: a block of a pair waits as in `must_recompute`.
template <typename S>
__device__ inline void end_pair() {
    if constexpr (S::PAIRED) {
        __syncwarp();
        ptx::cluster_sync();
    }
}

}  // namespace sm90
