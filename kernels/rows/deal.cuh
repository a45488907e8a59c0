// Who computes which query tile of a call with key ranges, where the device alone knows the tiles. As
// src/backends/cuda/attention/range_tiles.rs does it: heads whose keys and values fit in L2 together
// make a section, of which the longest tiles come first. But where the host deals out one tile after
// another, each to the block that is free the soonest, here a round has a tile for each block:
//
//   tiles, the longest first     12 11 11 10 | 9 9 8 8 | ...
//   places in the round          0  1  2  3    0 1 2 3
//   warp that deals them out     0  1  0  1    0 1 0 1
//
// Each warp has some of the blocks, at most one a lane, and of every round as many tiles. Of these the
// one that is free the soonest takes the longest. So warps need not wait for one another; and where
// there are more blocks than threads, a warp then deals to others. Where many
// tiles are left, two rounds follow one another before blocks are put in order again, the second one
// backwards.
#pragma once
#include "../common/params.cuh"
#include "range_tiles.cuh"

namespace tile_lists {

// The query heads of a section of a set of groups: all heads of several groups, or as many of one group as
// fit, by the keys that count.
__device__ inline int section_heads(const RangeTilesParams& params, int set) {
    if (params.section_groups > 1) return params.heads;
    const bool is_listed = params.cu_seqlens_q == nullptr;
    const int keys = is_listed ? params.lists.batches[set].key_tiles * params.lists.tile_keys
                               : params.cu_seqlens_k[set + 1] - params.cu_seqlens_k[set];
    // To the nearest.
    const int64_t sections = (static_cast<int64_t>(max(keys, 0)) * params.key_bytes + SECTION_BYTES / 2) / SECTION_BYTES;
    const int kv_heads = params.heads / params.group_size;
    const int count = static_cast<int>(min(max(sections, static_cast<int64_t>(1)), static_cast<int64_t>(kv_heads)));
    return (kv_heads + count - 1) / count * params.group_size;
}

// The work in its order: tile by tile of a section, each of them for all heads of the section.
struct Sections {
    const RangeTilesParams& params;
    // Sets of groups that sections are made of.
    int count;
    const SectionSet* sets;
    const OrderedTile* order;

    __device__ int heads_of(int set, int piece) const { return min(sets[set].heads, params.heads - piece * sets[set].heads); }

    // The entry of `order` that a set's first one is.
    __device__ int first_of(int set) const { return set * params.section_groups * params.lists.row_query_tiles; }
};

// A place in the work.
struct WorkPlace {
    int set = 0;
    int piece = 0;
    // Items of the section before it.
    int at = 0;

    __device__ int items(const Sections& sections) const { return sections.sets[set].tiles * sections.heads_of(set, piece); }

    // Goes on by so many items; past the last one to no set.
    __device__ void move(const Sections& sections, int count) {
        at += count;
        while (set < sections.count) {
            const int own = items(sections);
            if (at < own) return;
            at -= own;
            if (++piece * sections.sets[set].heads >= sections.params.heads) {
                piece = 0;
                ++set;
            }
        }
    }
};

// Puts a set of at most PASSES · 32 tiles in the order of their lengths; gives their number. Called by a
// whole warp.
template <int PASSES>
__device__ inline int order_by_length(const OrderedTile* found, int first, int slots, OrderedTile* order) {
    constexpr int MOST = PASSES * 32;
    const int lane = threadIdx.x % 32;
    // Larger for longer tiles and, among equals, for earlier ones; negative where there is no tile.
    int keys[PASSES];
    int ranks[PASSES];
    int count = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int at = pass * 32 + lane;
        // Other blocks wrote them in this launch.
        const int own = at < slots ? __ldcg(&found[at].steps) : -1;
        keys[pass] = own < 0 ? -1 : own * MOST + MOST - 1 - at;
        ranks[pass] = 0;
    }
#pragma unroll
    for (int others = 0; others < PASSES; ++others) {
        count += lanes_where(keys[others] >= 0);
#pragma unroll 4
        for (int source = 0; source < min(slots - others * 32, 32); ++source) {
            const int other = __shfl_sync(0xffffffff, keys[others], source);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) ranks[pass] += other > keys[pass];
        }
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        if (keys[pass] >= 0) order[ranks[pass]] = {first + pass * 32 + lane, keys[pass] / MOST};
    }
    return count;
}

// Puts the tiles of a set in the order of work; gives their number. Called by a whole warp.
__device__ inline int order_tiles(const RangeTilesParams& params, int first, int slots, OrderedTile* order) {
    const OrderedTile* const found = params.order + first;
    if (slots <= 32) return order_by_length<1>(found, first, slots, order);
    if (slots <= MAX_ORDERED_TILES) return order_by_length<MAX_ORDERED_TILES / 32>(found, first, slots, order);
    // So many are of one group. From the last to the first is the order of causal ones. Both ends at once,
    // since `order` may be where they are read from.
    const int count = query_tiles_of(params, first / params.lists.row_query_tiles);
    for (int at = threadIdx.x % 32; at < (count + 1) / 2; at += 32) {
        const int other = count - 1 - at;
        const int steps = __ldcg(&found[at].steps), other_steps = __ldcg(&found[other].steps);
        order[at] = {first + other, other_steps};
        order[other] = {first + at, steps};
    }
    return count;
}

// Deals out all work. Called by a whole block.
__device__ inline void deal_out(const RangeTilesParams& params) {
    constexpr int WARPS = RANGE_TILES_THREADS / 32;
    constexpr int MAX_SHARED_TILES = 2048;
    constexpr int MAX_SHARED_SETS = 1024;
    __shared__ OrderedTile shared_order[MAX_SHARED_TILES];
    __shared__ SectionSet shared_sets[MAX_SHARED_SETS];
    __shared__ int all_tiles;
    __shared__ __align__(16) uint32_t shared_keys[WARPS][32];

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int groups = params.lists.batch;
    const int row_tiles = params.lists.row_query_tiles;
    const int count_of_sets = (groups + params.section_groups - 1) / params.section_groups;
    OrderedTile* const order = groups * row_tiles <= MAX_SHARED_TILES ? shared_order : params.order;
    SectionSet* const sets = count_of_sets <= MAX_SHARED_SETS ? shared_sets : params.section_sets;
    const Sections sections = {params, count_of_sets, sets, order};
    if (threadIdx.x == 0) all_tiles = 0;
    __syncthreads();
    for (int set = warp; set < count_of_sets; set += WARPS) {
        const int first = sections.first_of(set);
        const int slots = min(params.section_groups * row_tiles, groups * row_tiles - first);
        const int count = order_tiles(params, first, slots, order + first);
        if (lane == 0) {
            sets[set] = {count, section_heads(params, set)};
            atomicAdd(&all_tiles, count);
        }
    }
    __syncthreads();

    const int blocks = params.blocks;
    // Sets of blocks, to each of which a warp deals; of each round, the places that a set has: its number,
    // and every so many-th.
    const int dealers = (blocks + 31) / 32;
    for (int dealer = warp; dealer < dealers; dealer += WARPS) {
        const int own_place = lane * dealers + dealer;
        const bool has_block = own_place < blocks;
        uint32_t* const keys = shared_keys[warp];
        // How soon this lane's block is free: units of 128 cycles, and the lane's number, which makes keys
        // differ. Few calls are long enough for more units than fit, and those are dealt out less evenly.
        uint32_t key = has_block ? lane : UINT32_MAX;
        const int items = all_tiles * params.heads;
        WorkPlace place;
        place.move(sections, 0);
        RangeWork* work = params.range_work + own_place;
        for (int done = 0; done < items;) {
            const int left = items - done;
            const int rounds = left >= 4 * blocks ? 2 : 1;
            const int count = min(left, rounds * blocks);
            // How many of the warp's blocks are free sooner.
            keys[lane] = key;
            __syncwarp();
            int rank = 0;
#pragma unroll
            for (int at = 0; at < 32; at += 4) {
                const uint4 other = *reinterpret_cast<const uint4*>(keys + at);
                rank += (other.x < key) + (other.y < key) + (other.z < key) + (other.w < key);
            }
            __syncwarp();
            // What is left of this section is shorter than what the next one begins with.
            const int rest = min(place.items(sections) - place.at, count);
            if (has_block) {
                for (int round = 0; round < rounds; ++round, work += blocks) {
                    const int taken = rank * dealers + dealer;
                    const int item = round == 0 ? taken : 2 * blocks - 1 - taken;
                    RangeWork own = {-1, 0, -1, 0};
                    if (item < count) {
                        WorkPlace at = place;
                        at.move(sections, item < count - rest ? item + rest : item - (count - rest));
                        const int heads = sections.heads_of(at.set, at.piece);
                        const int number = at.at / heads;
                        const OrderedTile tile = order[sections.first_of(at.set) + number];
                        own.tile = tile.tile;
                        own.head = at.piece * sets[at.set].heads + at.at - number * heads;
                        key += static_cast<uint32_t>(tile.steps * params.step_cycles + params.item_cycles) / 128 * 32;
                    }
                    *work = own;
                }
            }
            done += count;
            place.move(sections, count);
        }
        if (has_block) *work = {-1, 0, -1, 0};
    }
}

}  // namespace tile_lists
