// Which key tiles each query tile of a call with key ranges needs, where the device alone knows the
// mask: what src/backends/cuda/attention/range_tiles.rs makes, made here of the lists that `tile_lists`
// left, or of packed sequences. The same entries; ../attention/tile_lists.cuh says what they mean.
//
// A warp finds an entry. It takes about as long as the loads that wait for one another, so what does
// not have to wait is loaded early.
#pragma once
#include "../attention/tile_lists.cuh"
#include "../common/params.cuh"

namespace tile_lists {

// Query tiles of an entry of `batches`, or of a packed sequence.
__device__ inline int query_tiles_of(const RangeTilesParams& params, int group) {
    if (params.cu_seqlens_q == nullptr) return params.lists.batches[group].query_tiles;
    const int queries = params.cu_seqlens_q[group + 1] - params.cu_seqlens_q[group];
    return (queries + params.lists.tile_queries - 1) / params.lists.tile_queries;
}

// The queries of a tile: lane l has the first one of the tile's group l, and a bit for each that counts.
struct TileQueries {
    const int2* ranges;
    // None from here on.
    int end;
    int start;
    uint32_t kept;
    // Of a tile.
    int rows;
};

// What the queries of a tile see; all lanes hold the same.
struct SeenByTile {
    // Keys that some query sees: no end without any. Keys that all of them see.
    int first = INT32_MAX;
    int end = 0;
    int all_first = 0;
    int all_end = INT32_MAX;
    // `RangeTile::some_first` and `some_end`.
    int some_first[MAX_WARPGROUPS];
    int some_end[MAX_WARPGROUPS];

    __device__ SeenByTile(const TileQueries& queries) {
        constexpr int WARP = 32;
        constexpr int PASSES = MAX_WARPGROUPS * SM90_WARPGROUP_ROWS / WARP;
        constexpr int PASSES_OF_WARPGROUP = SM90_WARPGROUP_ROWS / WARP;
        const int lane = threadIdx.x % WARP;
        int2 ranges[PASSES];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if (pass * WARP >= queries.rows) break;
            const int query = __shfl_sync(0xffffffff, queries.start, (pass * WARP + lane) / GROUP_ROWS) + lane % GROUP_ROWS;
            ranges[pass] = query < queries.end ? queries.ranges[query] : int2{0, 0};
        }
#pragma unroll
        for (int warpgroup = 0; warpgroup < MAX_WARPGROUPS; ++warpgroup) {
            some_first[warpgroup] = INT32_MAX;
            some_end[warpgroup] = 0;
            if (warpgroup * SM90_WARPGROUP_ROWS >= queries.rows) continue;
            int own_first = INT32_MAX, own_end = 0;
#pragma unroll
            for (int pass = warpgroup * PASSES_OF_WARPGROUP; pass < (warpgroup + 1) * PASSES_OF_WARPGROUP; ++pass) {
                const uint32_t kept = __shfl_sync(0xffffffff, queries.kept, (pass * WARP + lane) / GROUP_ROWS);
                if ((kept >> (lane % GROUP_ROWS) & 1) == 0) continue;
                const int2 range = ranges[pass];
                if (range.x < range.y) {
                    own_first = min(own_first, range.x);
                    own_end = max(own_end, range.y);
                }
                all_first = max(all_first, range.x);
                all_end = min(all_end, range.y);
            }
            some_first[warpgroup] = __reduce_min_sync(0xffffffff, own_first);
            some_end[warpgroup] = __reduce_max_sync(0xffffffff, own_end);
            first = min(first, some_first[warpgroup]);
            end = max(end, some_end[warpgroup]);
        }
        all_first = __reduce_max_sync(0xffffffff, all_first);
        all_end = __reduce_min_sync(0xffffffff, all_end);
    }
};

// How many lanes say so.
__device__ inline int lanes_where(bool is_so) { return __popc(__ballot_sync(0xffffffff, is_so)); }

// The key tiles of a batch row's lists, a lane for each. They lie from left to right, so that numbers of
// tiles are places.
struct ListedTiles {
    const TileListsParams& lists;
    const int32_t* full;
    // Masked tiles of a row follow one another.
    const int32_t* groups;
    int full_tiles;
    int masked_tiles;
    // Of this lane's tile: the first group of a masked one and the last one in the row; and the start of
    // a full one.
    int first_group;
    int last_group;
    int start;

    __device__ ListedTiles(const TileListsParams& lists, const BatchTiles& batch)
        : lists(lists), full(lists.key_tiles + batch.first_key_tile + batch.masked_key_tiles),
          groups(lists.key_groups + static_cast<int64_t>(batch.batch) * lists.row_masked_tiles * (lists.tile_keys / GROUP_ROWS)),
          full_tiles(batch.key_tiles - batch.masked_key_tiles), masked_tiles(batch.masked_key_tiles) {
        load_masked(0);
        load_full(0);
    }

    __device__ void load_masked(int before) {
        const int tile = before + threadIdx.x % 32;
        const int tile_groups = lists.tile_keys / GROUP_ROWS;
        first_group = last_group = 0;
        if (tile >= masked_tiles) return;
        first_group = groups[tile * tile_groups];
        // The last tile is filled up with groups past the row.
        for (int at = 0; at < tile_groups; ++at) {
            const int group = groups[tile * tile_groups + at];
            if (group < lists.seq_k) last_group = group;
        }
    }

    __device__ void load_full(int before) {
        const int tile = before + threadIdx.x % 32;
        start = tile < full_tiles ? full[tile] : 0;
    }

    __device__ void find(const SeenByTile& seen, RangeTile& found) {
        const int lane = threadIdx.x % 32;
        int masked_before = 0, masked_within = 0;
        for (int before = 0; before < masked_tiles; before += 32) {
            if (before > 0) load_masked(before);
            const bool is_tile = before + lane < masked_tiles;
            masked_before += lanes_where(is_tile && last_group + GROUP_ROWS <= seen.first);
            masked_within += lanes_where(is_tile && first_group < seen.end);
        }
        int before_seen = 0, through_seen = 0, before_inner = 0, through_inner = 0;
        for (int before = 0; before < full_tiles; before += 32) {
            if (before > 0) load_full(before);
            const bool is_tile = before + lane < full_tiles;
            before_seen += lanes_where(is_tile && start + lists.tile_keys <= seen.first);
            through_seen += lanes_where(is_tile && start < seen.end);
            before_inner += lanes_where(is_tile && start < seen.all_first);
            through_inner += lanes_where(is_tile && start + lists.tile_keys <= seen.all_end);
        }
        int inner_first = max(before_inner, before_seen);
        int inner_end = min(through_inner, through_seen);
        if (inner_first >= inner_end) inner_first = inner_end = through_seen;
        found.first_masked = masked_before;
        found.masked = max(masked_within - masked_before, 0);
        found.first = masked_tiles + before_seen;
        found.inner_first = masked_tiles + inner_first;
        found.inner_end = masked_tiles + inner_end;
        found.end = masked_tiles + through_seen;
    }
};

// Tiles of a packed sequence, from the first key that some query sees on.
__device__ inline void find_tiles_in_a_row(int tile_keys, const SeenByTile& seen, RangeTile& found) {
    const int count = (seen.end - seen.first + tile_keys - 1) / tile_keys;
    int inner_first = count, inner_end = count;
    if (seen.all_first < seen.all_end) {
        inner_first = (seen.all_first - seen.first + tile_keys - 1) / tile_keys;
        inner_end = (seen.all_end - seen.first) / tile_keys;
    }
    if (inner_first >= inner_end) inner_first = inner_end = count;
    found.first_key = seen.first;
    found.inner_first = inner_first;
    found.inner_end = inner_end;
    found.end = count;
}

// The entry of a query tile, by a warp, and its key tiles: a negative number where there is no such tile.
__device__ inline void find_range_tile(const RangeTilesParams& params, int slot) {
    const TileListsParams& lists = params.lists;
    const int lane = threadIdx.x % 32;
    const int group = slot / lists.row_query_tiles;
    const int tile = slot % lists.row_query_tiles;
    const bool is_listed = params.cu_seqlens_q == nullptr;
    const BatchTiles batch = is_listed ? lists.batches[group] : BatchTiles{};
    if (tile >= (is_listed ? batch.query_tiles : query_tiles_of(params, group))) {
        if (lane == 0) params.order[slot].steps = -1;
        return;
    }
    TileQueries queries = {reinterpret_cast<const int2*>(params.ranges.ranges), lists.seq_q, 0, 0, lists.tile_queries};
    const int tile_groups = lists.tile_queries / GROUP_ROWS;
    if (is_listed) {
        queries.ranges += batch.batch * params.ranges.row_stride;
        if (lane < tile_groups) {
            queries.start = lists.query_groups[static_cast<int64_t>(batch.first_query_tile + tile) * tile_groups + lane];
            queries.kept = group_bits(lists.query_bits, lists.query_words, batch.batch, queries.start);
        }
    } else {
        queries.end = params.cu_seqlens_q[group + 1];
        queries.start = params.cu_seqlens_q[group] + tile * lists.tile_queries + lane * GROUP_ROWS;
        const int rows = min(max(queries.end - queries.start, 0), static_cast<int>(GROUP_ROWS));
        queries.kept = lane < tile_groups ? (1u << rows) - 1 : 0;
    }
    ListedTiles listed(lists, batch);
    const SeenByTile seen(queries);
    RangeTile found = {};
    found.group = group;
    found.tile = tile;
    if (seen.end > 0) {
#pragma unroll
        for (int at = 0; at < MAX_WARPGROUPS; ++at) {
            found.some_first[at] = seen.some_first[at];
            found.some_end[at] = seen.some_end[at];
        }
        if (is_listed) {
            listed.find(seen, found);
        } else {
            find_tiles_in_a_row(lists.tile_keys, seen, found);
        }
    }
    if (lane == 0) {
        params.range_tiles[slot] = found;
        params.order[slot].steps = found.masked + found.end - found.first;
    }
}

}  // namespace tile_lists
