// Which work a persistent block does next: a query tile of a head.
//
//   items    batch row 0 (the longest)                           batch row 1 ...
//            head 0: tile 0, 1, 2, ... | head 1: tile 0, ...     head 0: ...
//
// Where `packed_heads` heads share query tiles, these take the place of a head: the 16-row groups of the
// first head, then those of the second, and so on, fill one tile after the other.
//
// Block b takes items b, b + blocks, ... Blocks that run side by side thus share keys and values in
// L2. Where the last items would leave blocks without work, each item from `split_from` on becomes
// several, one for each part of its keys.
#pragma once
#include "../common/params.cuh"

struct Work {
    // The entry of `batches`, sequence or batch row that the tile belongs to.
    int group;
    // The first one, where several share query tiles.
    int head;
    // The query tile in the group.
    int tile;
    // Its number among the parts of all split items; negative for an item that is not split.
    int part;
};

// The work of a call with key ranges. Query tiles then differ in length, so the host deals them out
// (src/backends/cuda/attention/range_tiles.rs). Called by all lanes of one warp together.
class DealtWork {
public:
    // The entry of `range_tiles` that `next` gave.
    int tile;

    __device__ DealtWork(const TileListParams& params) : tile(0), params(params), at(blockIdx.x) {}

    // False when nothing is left.
    __device__ bool next(Work& work) {
        const int4 item = __ldg(reinterpret_cast<const int4*>(params.range_work) + at);
        tile = item.x;
        if (tile < 0) return false;
        const RangeTile& of = params.range_tiles[tile];
        work = {of.group, item.y, of.tile, item.z};
        at += gridDim.x;
        return true;
    }

private:
    const TileListParams& params;
    int at;
};

// Called by all lanes of one warp together, each lane holding one of 32 groups. Only with PACKS_HEADS can
// heads share query tiles, and only with HAS_DENSE are there calls without a mask: what is not asked for
// takes no registers.
//
// With PAIRED, blocks 2b and 2b + 1 take neighbouring query tiles of one head: there is an even number of
// tiles a head, and of blocks, and of tiles that are not split. Of those that are split, they take the same part.
template <int TILE_M, bool PACKS_HEADS, bool HAS_DENSE, bool PAIRED = false>
class Schedule {
public:
    __device__ Schedule(const TileListParams& params) : params(params), item(blockIdx.x), first_group(0), first_item(0) {
        // Without a mask all groups have as many.
        if (is_dense()) {
            lane_tiles = tiles_of(params.seq_q);
        } else {
            load();
        }
    }

    // False when nothing is left.
    __device__ bool next(Work& work) {
        int part = item - params.split_from;
        if (PAIRED && part >= 0) {
            const int pair = part / 2;
            part = (pair / params.parts * 2 + part % 2) * params.parts + pair % params.parts;
        }
        const int whole = part < 0 ? item : params.split_from + part / params.parts;
        if (is_dense()) {
            const uint32_t tiles = lane_tiles;
            const uint32_t items_of_one = tiles * heads();
            const uint32_t group = whole / items_of_one;
            if (group >= static_cast<uint32_t>(params.groups)) return false;
            const uint32_t at = whole - group * items_of_one;
            const uint32_t set = at / tiles;
            const int head = PACKS_HEADS ? set * params.packed_heads : set;
            work = {static_cast<int>(group), head, static_cast<int>(at - set * tiles), part < 0 ? -1 : part};
            item += gridDim.x;
            return true;
        }
        while (true) {
            if (first_group >= params.groups) return false;
            const int items_of_all = __shfl_sync(0xffffffff, items_through, 31);
            if (whole < first_item + items_of_all) break;
            first_item += items_of_all;
            first_group += 32;
            load();
        }
        const int at_lane = __popc(__ballot_sync(0xffffffff, whole - first_item >= items_through));
        const int tiles = __shfl_sync(0xffffffff, lane_tiles, at_lane);
        const int at = whole - first_item - (__shfl_sync(0xffffffff, items_through, at_lane) - tiles * heads());
        const int head = PACKS_HEADS ? at / tiles * params.packed_heads : at / tiles;
        work = {__shfl_sync(0xffffffff, lane_group, at_lane), head, at % tiles, part < 0 ? -1 : part};
        item += gridDim.x;
        return true;
    }

private:
    // Heads, or sets of heads that share query tiles.
    __device__ int heads() const { return PACKS_HEADS ? params.head_sets : params.heads; }

    __device__ bool is_dense() const { return HAS_DENSE && params.form == FORM_DENSE; }

    __device__ bool packs() const { return PACKS_HEADS && params.packed_heads > 1; }

    // Query tiles of so many groups of 16 rows of each of several heads.
    __device__ int shared_tiles(int groups) const {
        return (groups * params.packed_heads + TILE_M / GROUP_ROWS - 1) / (TILE_M / GROUP_ROWS);
    }

    // Query tiles of so many queries.
    __device__ int tiles_of(int queries) const {
        return packs() ? shared_tiles((queries + GROUP_ROWS - 1) / GROUP_ROWS) : (queries + TILE_M - 1) / TILE_M;
    }

    __device__ void load() {
        const int lane = threadIdx.x % 32;
        lane_group = first_group + lane;
        lane_tiles = 0;
        if (lane_group < params.groups) {
            if (params.form == FORM_FUSED) {
                // The lists have tiles of one group where heads are packed.
                const int listed = params.batches[lane_group].query_tiles;
                lane_tiles = packs() ? shared_tiles(listed) : listed;
            } else {
                if (params.order != nullptr) lane_group = params.order[lane_group];
                lane_tiles = tiles_of(params.cu_seqlens_q[lane_group + 1] - params.cu_seqlens_q[lane_group]);
            }
        }
        items_through = lane_tiles * heads();
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int before = __shfl_up_sync(0xffffffff, items_through, distance);
            if (lane >= distance) items_through += before;
        }
    }

    const TileListParams& params;
    int item;
    int first_group;
    int first_item;
    int lane_group;
    // Its query tiles; without a mask those of any group.
    int lane_tiles;
    // Items of this lane's group and of the groups of lower lanes.
    int items_through;
};
