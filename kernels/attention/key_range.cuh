// Which keys a tile of query rows needs: the one place that says so, for every attention kernel.
//
//   KeyRange    sm80: every key of the sequence
//   SeenKeys    sm80: the keys that some query of the tile sees, those that all of them see, and
//               those that one sees, where the call has key ranges
//   KeyTiles    sm90, sm100: every key in tiles, or the tiles of a list where a mask drops keys
#pragma once
#include "../common/params.cuh"
#include "schedule.cuh"
#include "tile_lists.cuh"

// Keys of a sequence, counted from its first.
struct KeyRange {
    static constexpr int first = 0;
    int end;

    // For a tile of query rows of a sequence with `keys` keys.
    __device__ static KeyRange of(int keys) { return {keys}; }

    // Tiles of N keys that hold the range.
    template <int N>
    __device__ int first_tile() const {
        return first / N;
    }
    template <int N>
    __device__ int end_tile() const {
        return (end + N - 1) / N;
    }
};

// The same where queries see ranges of keys.
struct SeenKeys {
    // Keys that some query of the tile sees.
    int first;
    int end;
    // Keys that all of its queries see; nothing if one sees nothing.
    int all_first;
    int all_end;
    const KeyRangeParams& params;
    // The tile's first query, among all that have ranges, and its last one, counted from there.
    int first_query;
    int last_row;

    // For `tile_rows` queries, at most TILE_M, of a sequence with `keys` keys. `first_row` counts
    // them in their batch row, or among packed or listed ones. A whole warp finds the ranges.
    template <int TILE_M>
    __device__ static SeenKeys of(const KeyRangeParams& params, int batch, int first_row, int tile_rows, int keys) {
        // Fits: the queries of all batch rows are counted in an int.
        const int first_query = static_cast<int>(batch * params.row_stride) + first_row;
        SeenKeys seen = {0, keys, 0, keys, params, first_query, tile_rows - 1};
        if (params.ranges == nullptr || tile_rows <= 0) return seen;
        seen.first = keys;
        seen.end = 0;
#pragma unroll
        for (int pass = 0; pass < TILE_M / 32; ++pass) {
            const int2 own = seen.by(pass * 32 + threadIdx.x % 32);
            if (own.x < own.y) {
                seen.first = min(seen.first, own.x);
                seen.end = max(seen.end, own.y);
            }
            seen.all_first = max(seen.all_first, own.x);
            seen.all_end = min(seen.all_end, own.y);
        }
        seen.first = __reduce_min_sync(0xffffffff, seen.first);
        seen.end = __reduce_max_sync(0xffffffff, seen.end);
        seen.all_first = __reduce_max_sync(0xffffffff, seen.all_first);
        seen.all_end = __reduce_min_sync(0xffffffff, seen.all_end);
        // No tile holds the range of queries that see nothing.
        if (seen.end == 0) seen.first = 0;
        return seen;
    }

    // The keys that a query of the tile sees; rows past the last one count as it.
    __device__ int2 by(int row) const {
        if (params.ranges == nullptr) return make_int2(0, all_end);
        return __ldg(reinterpret_cast<const int2*>(params.ranges) + (first_query + min(row, last_row)));
    }

    // Whether every query sees every one of these keys.
    __device__ bool all_see(int first_key, int count) const { return all_first <= first_key && first_key + count <= all_end; }

    // Tiles of N keys that hold what some query sees.
    template <int N>
    __device__ int first_tile() const {
        return first / N;
    }
    template <int N>
    __device__ int end_tile() const {
        return (end + N - 1) / N;
    }
};

// The key tiles of a block's query tile, M query rows and N keys. A whole warp finds them; all of
// its lanes hold the same values.
template <int M, int N>
struct KeyTiles {
    static constexpr int ROW_GROUPS = M / GROUP_ROWS;
    static constexpr int KEY_GROUPS = N / GROUP_ROWS;

    // The batch row in the tensors.
    int batch;
    // Key tiles; and how many of them hold keys that are not kept: the first ones of a list, or the
    // one with the last key.
    int count;
    int masked;
    // The first key of the sequence in the tensor, and its keys; not used with lists.
    int first_key;
    int keys;
    // The entries of `key_tiles`, with lists.
    const int32_t* list;

    // Finds the key tiles of a work item. Gives lane l group l of the query tile. Only with PACKS_HEADS can
    // that be one of another head.
    template <bool PACKS_HEADS>
    __device__ RowGroup find(const TileListParams& params, const Work& work, int lane) {
        batch = work.group;
        first_key = 0;
        keys = params.seq_k;
        int group = work.tile * ROW_GROUPS + lane;
        int head = work.head;
        // Of lists of groups, with packed heads.
        const auto take_head = [&](int groups) {
            const int set = group / groups;
            group -= set * groups;
            // Past the last head's groups: past the end of the rows.
            if (set >= params.packed_heads) group = groups;
            else head += set;
            return group < groups;
        };
        const bool packs = PACKS_HEADS && params.packed_heads > 1;
        int queries = params.seq_q;
        uint32_t kept = 0xffff;
        int first_row;
        if (params.form == FORM_FUSED) {
            const BatchTiles tiles = params.batches[work.group];
            batch = tiles.batch;
            count = tiles.key_tiles;
            masked = tiles.masked_key_tiles;
            list = params.key_tiles + tiles.first_key_tile;
            first_row = params.seq_q;
            const bool is_listed = packs ? take_head(tiles.query_tiles) : lane < ROW_GROUPS;
            if (is_listed) {
                first_row = params.query_groups[tiles.first_query_tile * (packs ? 1 : ROW_GROUPS) + group];
                kept = group_bits(params.row_bits, params.row_words, batch, first_row);
            }
        } else {
            int before = 0;
            if (params.form == FORM_PACKED) {
                before = params.cu_seqlens_q[work.group];
                queries = params.cu_seqlens_q[work.group + 1];
                first_key = params.cu_seqlens_k[work.group];
                keys = max(params.cu_seqlens_k[work.group + 1] - first_key, 0);
                batch = 0;
            }
            if (packs) take_head((queries - before + GROUP_ROWS - 1) / GROUP_ROWS);
            first_row = before + group * GROUP_ROWS;
            count = (keys + N - 1) / N;
            masked = keys % N == 0 ? 0 : 1;
        }
        const int rows = min(max(queries - first_row, 0), GROUP_ROWS);
        return {first_row, static_cast<int16_t>(rows), static_cast<uint16_t>(kept), head};
    }

    // Key tile i by the ranges of the query tile, in the order of work: masked tiles of the lists; tiles
    // that only some queries see, from right to left; and those that all see. Its first key in the
    // tensor, or ~ its number among the masked tiles of the lists.
    __device__ int seen_tile(const TileListParams& params, const RangeTile& seen, int i) const {
        if (i < seen.masked) return list[seen.first_masked + i];
        i -= seen.masked;
        const int right = seen.end - seen.inner_end;
        const int left = seen.inner_first - seen.first;
        int at;
        if (i < right) {
            at = seen.end - 1 - i;
        } else if (i < right + left) {
            at = seen.inner_first - 1 - (i - right);
        } else {
            at = seen.inner_first + (i - right - left);
        }
        return params.form == FORM_FUSED ? list[at] : first_key + seen.first_key + at * N;
    }

    // Which keys of a tile are kept: the bits of keys 32 · lane and on. Without lists, `before`
    // keys of the sequence are before the tile.
    __device__ uint32_t kept_keys(const TileListParams& params, int tile, int before, int lane) const {
        return kept_keys(params, tile, before, lane, [](int) { return GROUP_ROWS; });
    }

    // The same where `rows_of` says how many rows of a group from a first one on are the group's.
    template <typename Rows>
    __device__ uint32_t kept_keys(const TileListParams& params, int tile, int before, int lane, Rows rows_of) const {
        uint32_t kept = 0xffffffff;
        if (params.form == FORM_FUSED && tile < 0) {
            kept = 0;
            if (lane < KEY_GROUPS) {
                const int first = params.key_groups[~tile * KEY_GROUPS + lane];
                kept = group_bits(params.key_bits, params.key_words, batch, first) & ((1u << rows_of(first)) - 1);
            }
            const uint32_t even = __shfl_sync(0xffffffff, kept, 2 * lane % 32);
            const uint32_t odd = __shfl_sync(0xffffffff, kept, (2 * lane + 1) % 32);
            kept = even | odd << 16;
        } else if (params.form != FORM_FUSED) {
            const int left = keys - before - lane * 32;
            kept = left >= 32 ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
        }
        return kept;
    }
};
