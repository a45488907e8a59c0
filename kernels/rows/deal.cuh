// Who computes which query tile of a call with key ranges, where the device alone knows the tiles. As
// src/backends/cuda/attention/range_tiles.rs does it: heads whose keys and values fit in L2 together
// make a section, of which the longest tiles come first. But where the host deals out one tile after
// another, each to the block that is free the soonest, here a round has a tile for each block:
//
//   tiles, the longest first     12 11 11 10 | 9 9 8 8 | ...
//   blocks, the soonest free     ▲  ▲  ▲  ▲    ▲ ▲ ▲ ▲
//
// So one block of threads deals out a hundred tiles at a time. Where many are left, two rounds follow
// one another before blocks are put in order again, the second one backwards.
#pragma once
#include "../common/params.cuh"
#include "range_tiles.cuh"

namespace tile_lists {

// The work in its order: tile by tile of a section, each of them for all heads of the section.
struct Sections {
    const RangeTilesParams& params;
    // Sets of groups that sections are made of, and sections of a set.
    int sets;
    int pieces;
    // For each set: its tiles.
    const int32_t* tiles;
    const OrderedTile* order;

    __device__ int heads_of(int piece) const { return min(params.section_heads, params.heads - piece * params.section_heads); }

    // The entry of `order` that a set's first one is.
    __device__ int first_of(int set) const { return set * params.section_groups * params.lists.row_query_tiles; }
};

// A place in the work.
struct WorkPlace {
    int set = 0;
    int piece = 0;
    // Items of the section before it.
    int at = 0;

    __device__ int items(const Sections& sections) const { return sections.tiles[set] * sections.heads_of(piece); }

    // Goes on by so many items; past the last one to no set.
    __device__ void move(const Sections& sections, int count) {
        at += count;
        while (set < sections.sets) {
            const int own = items(sections);
            if (at < own) return;
            at -= own;
            if (++piece == sections.pieces) {
                piece = 0;
                ++set;
            }
        }
    }
};

// Puts the tiles of a set in the order of work; gives their number. Called by a whole warp.
__device__ inline int order_tiles(const RangeTilesParams& params, int first, int slots, OrderedTile* order) {
    const int lane = threadIdx.x % 32;
    // Other blocks wrote them in this launch.
    const auto steps_of = [&](int at) { return __ldcg(&params.order[first + at].steps); };
    int count = 0;
    // So many are of one group. From the last to the first is the order of causal ones.
    if (slots > MAX_ORDERED_TILES) {
        count = query_tiles_of(params, first / params.lists.row_query_tiles);
        // Both ends at once: `order` may be where they are read from.
        for (int at = lane; at < (count + 1) / 2; at += 32) {
            const int other = count - 1 - at;
            const int steps = steps_of(at), other_steps = steps_of(other);
            order[at] = {first + other, other_steps};
            order[other] = {first + at, steps};
        }
        return count;
    }
    constexpr int PASSES = MAX_ORDERED_TILES / 32;
    // Larger for longer tiles and, among equals, for earlier ones; negative where there is no tile.
    int keys[PASSES];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int at = pass * 32 + lane;
        const int steps = at < slots ? steps_of(at) : -1;
        keys[pass] = steps < 0 ? -1 : steps * MAX_ORDERED_TILES + MAX_ORDERED_TILES - 1 - at;
    }
    int ranks[PASSES] = {};
#pragma unroll
    for (int others = 0; others < PASSES; ++others) {
        count += lanes_where(keys[others] >= 0);
        if (others * 32 >= slots) continue;
#pragma unroll 4
        for (int source = 0; source < 32; ++source) {
            const int other = __shfl_sync(0xffffffff, keys[others], source);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) ranks[pass] += other > keys[pass];
        }
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        if (keys[pass] >= 0) order[ranks[pass]] = {first + pass * 32 + lane, keys[pass] / MAX_ORDERED_TILES};
    }
    return count;
}

// Deals out all work. Called by a whole block.
__device__ inline void deal_out(const RangeTilesParams& params) {
    constexpr int THREADS = TILE_LISTS_THREADS;
    constexpr int LANES = THREADS / MAX_DEALT_BLOCKS;
    constexpr int MAX_SHARED_TILES = 2048;
    constexpr int MAX_SHARED_SETS = 1024;
    // How soon a block is free: its cycles in units, and its number, which makes them differ.
    constexpr int UNIT = 128;
    // Few calls are long enough for more units, and those are only dealt out less evenly.
    constexpr uint32_t ONE_UNIT = MAX_DEALT_BLOCKS;
    __shared__ __align__(16) uint32_t free_at[MAX_DEALT_BLOCKS];
    __shared__ OrderedTile shared_order[MAX_SHARED_TILES];
    __shared__ int32_t shared_tiles[MAX_SHARED_SETS];
    __shared__ int all_tiles;
    // One at least for each round.
    static_assert(LANES >= 2);

    const int groups = params.lists.batch;
    const int row_tiles = params.lists.row_query_tiles;
    const int sets = (groups + params.section_groups - 1) / params.section_groups;
    const int pieces = (params.heads + params.section_heads - 1) / params.section_heads;
    OrderedTile* const order = groups * row_tiles <= MAX_SHARED_TILES ? shared_order : params.order;
    int32_t* const tiles = sets <= MAX_SHARED_SETS ? shared_tiles : params.section_tiles;
    const Sections sections = {params, sets, pieces, tiles, order};
    const int blocks = params.blocks;
    if (threadIdx.x == 0) all_tiles = 0;
    if (threadIdx.x < MAX_DEALT_BLOCKS) free_at[threadIdx.x] = threadIdx.x < blocks ? threadIdx.x : UINT32_MAX;
    __syncthreads();
    for (int set = threadIdx.x / 32; set < sets; set += THREADS / 32) {
        const int first = sections.first_of(set);
        const int slots = min(params.section_groups * row_tiles, groups * row_tiles - first);
        const int count = order_tiles(params, first, slots, order + first);
        if (threadIdx.x % 32 == 0) {
            tiles[set] = count;
            atomicAdd(&all_tiles, count);
        }
    }
    __syncthreads();

    // A few neighbouring lanes work for each block.
    const int block = threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES;
    const int items = all_tiles * params.heads;
    WorkPlace place;
    place.move(sections, 0);
    RangeWork* work = params.range_work + block;
    for (int done = 0; done < items;) {
        const int left = items - done;
        const int rounds = left >= 4 * blocks ? 2 : 1;
        const int count = min(left, rounds * blocks);
        // Which of the blocks that are free the soonest it is.
        int rank = block;
        if (done > 0) {
            rank = 0;
            const uint32_t own = free_at[block];
            for (int others = lane * 4; others < blocks; others += LANES * 4) {
                const uint4 other = *reinterpret_cast<const uint4*>(free_at + others);
                rank += (other.x < own) + (other.y < own) + (other.z < own) + (other.w < own);
            }
#pragma unroll
            for (int distance = 1; distance < LANES; distance *= 2) rank += __shfl_xor_sync(0xffffffff, rank, distance);
            __syncthreads();
        }
        // What is left of this section is shorter than what the next one begins with.
        const int rest = place.items(sections) - place.at;
        if (block < blocks && lane < rounds) {
            const int item = lane * blocks + (lane % 2 == 0 ? rank : blocks - 1 - rank);
            RangeWork own_work = {-1, 0, -1, 0};
            if (item < count) {
                WorkPlace at = place;
                at.move(sections, rest < count ? (item < count - rest ? item + rest : item - (count - rest)) : item);
                const int heads = sections.heads_of(at.piece);
                const OrderedTile tile = order[sections.first_of(at.set) + at.at / heads];
                own_work.tile = tile.tile;
                own_work.head = at.piece * params.section_heads + at.at % heads;
                atomicAdd(free_at + block, static_cast<uint32_t>((tile.steps * params.step_cycles + params.item_cycles) / UNIT) * ONE_UNIT);
            }
            work[lane * blocks] = own_work;
        }
        work += rounds * blocks;
        done += count;
        place.move(sections, count);
        __syncthreads();
    }
    if (block < blocks && lane == 0) *work = {-1, 0, -1, 0};
}

}  // namespace tile_lists
