// The producer warpgroup of the sm90 kernel. Warps 0 and 3 find the next tiles and have them copied:
// queries and keys, and values. They share the scheduler with different consumers, and one alone
// cannot keep up. Warp 1 zeroes masked rows of V; warp 2 writes zeros to the rows that are in no query
// tile.
#pragma once
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/tma.cuh"
#include "../arrivals.cuh"
#include "../key_range.cuh"
#include "../loader.cuh"
#include "../schedule.cuh"
#include "../segments.cuh"
#include "../tile_lists.cuh"
#include "block.cuh"

namespace sm90 {

template <typename S>
struct Producer {
    using KeysState = typename S::KeysState;

    // Whether this warp has values copied, and the other one queries and keys.
    const bool loads_values;
    const TileListParams& params;
    // Null without segments.
    const SegmentTable* segments;
    unsigned char* shared;
    uint32_t base;
    int lane;
    KeyTiles<S::TILE_M, S::TILE_N> tiles;
    int kv_head;
    // The part of the query tile's key tiles that is this work item's.
    int first_tile;
    int end_tile;
    // Tiles before this one need their scores changed: for keys that are not kept, or for a
    // negative scale.
    int masked_end;
    // Whether consumers may ask for the bits of a masked tile of which no value is to be zeroed. Of key ranges
    // the exact softmax alone does; only where blocks share a multiprocessor, bits are worth saving.
    bool needs_bits;
    // With key ranges: the entry of `range_tiles`; and 32 key tiles from `window` on, one a lane.
    int range_tile;
    int window;
    int lane_tile;
    // With segments: where they end.
    std::conditional_t<S::SEGMENTED, SegmentEnds, int> query_ends;
    std::conditional_t<S::SEGMENTED, SegmentEnds, int> key_ends;

    __device__ Producer(bool loads_values, const TileListParams& params, const SegmentTable* segments, unsigned char* shared,
                        uint32_t base)
        : loads_values(loads_values), params(params), segments(segments), shared(shared), base(base), lane(threadIdx.x % 32),
          query_ends(ends_of(segments, true)), key_ends(ends_of(segments, false)) {}

    __device__ void run() {
        KeysState state;
        int work_index = 0;
        for (bool is_exact = false;; is_exact = true) {
            std::conditional_t<S::RANGED, DealtWork, Schedule<S::TILE_M, S::PACKS_HEADS, S::HAS_DENSE, S::PAIRED>> schedule(params);
            Work work;
            for (; schedule.next(work) && !(is_exact && work.part >= 0); ++work_index) {
                if constexpr (S::RANGED) range_tile = schedule.tile;
                needs_bits = !S::RANGED || S::BLOCKS == 1 || is_exact || work.part >= 0;
                const RowGroup group = find(work);
                // A query tile may have no keys. With two places for queries theirs is free long before that
                // of the first keys. With one place it is the other way round.
                // The block's first ones are loaded by the other warp, so that its first keys do not wait.
                if (S::QUERY_TILES == 2 && loads_values == (work_index == 0)) load_queries(work, work_index, group);
                if constexpr (S::SEGMENTED) wait_for_arrival(*segments, tiles.batch * (params.heads / params.group_size) + kv_head);
                for (int i = first_tile; i == first_tile || i < end_tile; ++i) {
                    // All wait for the first queries and keys of a block, so its first values come after
                    // them. These queries stay as long as their values are not there.
                    if (loads_values && work_index == 0 && i == first_tile && i < end_tile) {
                        ptx::mbarrier_wait(base + S::full_q(0, 0), 0);
                    }
                    if (i < end_tile) load(i, state, work_index);
                    if (S::QUERY_TILES == 1 && i == first_tile && !loads_values) load_queries(work, work_index, group);
                }
            }
            if (!loads_values) {
                for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) wait_for_room(work_index, warpgroup);
                if (lane == 0) {
                    rows_info(work_index).key_tiles = -1;
                    for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup)
                        ptx::mbarrier_arrive(base + S::full_q(work_index, warpgroup));
                }
            }
            ++work_index;
            const int barrier = loads_values ? BARRIER_END_VALUES : BARRIER_END_COPIES;
            if (is_exact) return end_pair<S>();
            if (!must_recompute<S>(shared, barrier, S::CONSUMERS + 32)) return;
        }
    }

private:
    static constexpr int KEY_GROUPS = S::TILE_N / GROUP_ROWS;
    // Whether the compiler is told which numbers are the same in all lanes. With key ranges or segments
    // that takes fewer instructions for a tile, else more.
    static constexpr bool IS_UNIFORM = S::RANGED || S::SEGMENTED;

    // The same number, as the compiler is to know it.
    template <typename Number>
    __device__ static Number told(Number number) {
        if constexpr (IS_UNIFORM) return ptx::uniform(number);
        return number;
    }

    // The map of what this warp has copied, keys or values: of tiles in a row, and of groups. With
    // segments, that of one.
    __device__ const ptx::TensorMap& row_map(int segment) const {
        if constexpr (S::SEGMENTED) {
            const SegmentMaps& maps = segments->maps[told(segment)];
            return loads_values ? maps.v : maps.k;
        } else {
            return loads_values ? params.v_map : params.k_map;
        }
    }
    __device__ const ptx::TensorMap& group_map(int segment) const {
        if constexpr (S::SEGMENTED) {
            const SegmentMaps& maps = segments->maps[told(segment)];
            return loads_values ? maps.v_group : maps.k_group;
        } else {
            return loads_values ? params.v_group_map : params.k_group_map;
        }
    }

    __device__ static auto ends_of(const SegmentTable* segments, bool of_queries) {
        if constexpr (S::SEGMENTED) {
            return of_queries ? SegmentEnds(segments->query_ends, segments->query_count)
                              : SegmentEnds(segments->key_ends, segments->key_count);
        } else {
            return 0;
        }
    }

    // One warpgroup may be at the next query tile already.
    __device__ typename S::Rows& rows_info(int work_index) const { return S::rows_info(shared, work_index); }

    // Waits until a warpgroup has given back the place of its queries.
    __device__ void wait_for_room(int work_index, int warpgroup) const {
        ptx::mbarrier_wait(base + S::empty_q(work_index, warpgroup), S::parity_q(work_index) ^ 1);
    }

    // The work item's key tiles, and this lane's 16 query rows.
    __device__ RowGroup find(const Work& work) {
        kv_head = told(S::BLOCKS > 1 && params.group_size == 1 ? work.head : work.head / params.group_size);
        const RowGroup group = tiles.template find<S::PACKS_HEADS>(params, work, lane);
        tiles.batch = told(tiles.batch);
        if constexpr (S::RANGED) {
            const RangeTile& seen = params.range_tiles[range_tile];
            tiles.count = seen.masked + seen.end - seen.first;
            tiles.masked = tiles.count - (seen.inner_end - seen.inner_first);
            window = -32;
        }
        masked_end = params.score_scale < 0.0f ? tiles.count : tiles.masked;
        first_tile = 0;
        end_tile = tiles.count;
        if (work.part >= 0) {
            const int part = work.part % params.parts;
            first_tile = tiles.count * part / params.parts;
            end_tile = tiles.count * (part + 1) / params.parts;
        }
        return group;
    }

    // Describes the query tile, and loads each warpgroup's rows. With two places for query tiles,
    // all warpgroups have long left this one; with one place, a warpgroup's rows are loaded as soon
    // as it is done with those before.
    __device__ void load_queries(const Work& work, int work_index, RowGroup group) const {
        work_index = told(work_index);
        const int head = told(work.head);
        SegmentRow place = {};
        if constexpr (S::SEGMENTED) {
            int left;
            place = query_ends.find(group.first_row, left);
            group.rows = min(static_cast<int>(group.rows), left);
            group.kept &= (1u << group.rows) - 1;
        }
        int2 ranges[S::LOADS_RANGES ? S::TILE_M / 32 : 1];
        if constexpr (S::LOADS_RANGES) {
            // Fits: the queries of all batch rows are counted in an int.
            const int first_query = static_cast<int>(tiles.batch * params.ranges.row_stride);
#pragma unroll
            for (int pass = 0; pass < S::TILE_M / 32; ++pass) {
                const int of_group = pass * 2 + lane / GROUP_ROWS;
                const int first_row = __shfl_sync(0xffffffff, group.first_row, of_group);
                const int rows = __shfl_sync(0xffffffff, static_cast<int>(group.rows), of_group);
                ranges[pass] = make_int2(0, INT32_MAX);
                if (lane % GROUP_ROWS < rows) {
                    ranges[pass] = __ldg(reinterpret_cast<const int2*>(params.ranges.ranges) + (first_query + first_row + lane % GROUP_ROWS));
                }
            }
        }
        if (S::QUERY_TILES == 2) {
            for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) wait_for_room(work_index, warpgroup);
        }
        if constexpr (S::LOADS_RANGES) {
            int2* const to = reinterpret_cast<int2*>(shared + S::RANGES) + work_index % 2 * S::TILE_M + lane;
#pragma unroll
            for (int pass = 0; pass < S::TILE_M / 32; ++pass) to[pass * 32] = ranges[pass];
        }
#pragma unroll 1
        for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) {
            const uint32_t full = base + S::full_q(work_index, warpgroup);
            if (S::QUERY_TILES == 1) wait_for_room(work_index, warpgroup);
            if (warpgroup == 0) {
                auto& rows = rows_info(work_index);
                if (lane < S::TILE_M / GROUP_ROWS) rows.groups[lane] = group;
                if constexpr (S::SEGMENTED) {
                    if (lane < S::TILE_M / GROUP_ROWS) rows.places[lane] = place;
                }
                if (lane == 0) {
                    rows.key_tiles = end_tile - first_tile;
                    rows.masked_tiles = min(max(masked_end - first_tile, 0), end_tile - first_tile);
                    rows.part = work.part;
                    rows.batch = tiles.batch;
                    rows.clips = params.form != FORM_PACKED;
                    if constexpr (S::RANGED) {
                        const RangeTile& seen = params.range_tiles[range_tile];
                        rows.descends = seen.masked == 0 && seen.inner_first == seen.inner_end;
                        for (int of = 0; of < S::WARPGROUPS; ++of) {
                            rows.some_first[of] = seen.some_first[of];
                            rows.some_end[of] = seen.some_end[of];
                        }
                    }
                }
                __syncwarp();
            }
            if (lane == 0) ptx::mbarrier_arrive_expect(full, S::TileQ::BYTES / S::WARPGROUPS);
            __syncwarp();
            if constexpr (IS_UNIFORM) {
                constexpr int GROUPS = SM90_WARPGROUP_ROWS / GROUP_ROWS;
                const auto map_of = [&](int of_group) -> const ptx::TensorMap& {
                    if constexpr (S::SEGMENTED) return segments->maps[told(lane == of_group ? place.segment : 0)].q;
                    return params.q_map;
                };
                load_groups<typename S::TileQ, GROUPS>(base + S::query_tile(work_index), warpgroup * GROUPS, map_of, full,
                                                       ptx::policy_evict_first(), S::SEGMENTED ? place.row : group.first_row, head,
                                                       tiles.batch);
            } else if (lane / 4 == warpgroup) {
                const ptx::TensorMap* map = &params.q_map;
                int row = group.first_row;
                if constexpr (S::SEGMENTED) {
                    map = &segments->maps[place.segment].q;
                    row = place.row;
                }
                load_group<typename S::TileQ>(base + S::query_tile(work_index), lane, *map, full, ptx::policy_evict_first(), row,
                                              group.head, tiles.batch);
            }
        }
    }

    // Key tile i: its first key in the tensor, or ~ its number among the masked tiles of the lists.
    // Without lists the last tile comes first, since it may be masked.
    __device__ int tile_at(int i) {
        if constexpr (S::RANGED) {
            if (i - window >= 32) {
                window = i;
                lane_tile = i + lane < tiles.count ? tiles.seen_tile(params, params.range_tiles[range_tile], i + lane) : 0;
            }
            return __shfl_sync(0xffffffff, lane_tile, i - window);
        }
        if (params.form != FORM_FUSED) return tiles.first_key + (tiles.count - 1 - i) * S::TILE_N;
        // Of the masked ones the last comes first, which may have few groups.
        return tiles.list[i < tiles.masked ? tiles.masked - 1 - i : i];
    }

    __device__ bool has_masked_values(int i, int tile) const {
        if constexpr (S::RANGED) {
            if (params.form == FORM_PACKED) return i < masked_end && tile - tiles.first_key + S::TILE_N > tiles.keys;
            return tile < 0;
        }
        return params.form == FORM_FUSED ? tile < 0 : params.form == FORM_PACKED && i == 0 && tiles.keys % S::TILE_N != 0;
    }

    // With segments: where a tile of keys lies, or this lane's group of it, of which so many rows are
    // left in the segment.
    __device__ SegmentRow place_of_keys(int tile, int& left) const {
        if constexpr (S::SEGMENTED) {
            if (tile >= 0) return key_ends.find_uniform(tile);
            return key_ends.find(params.key_groups[~tile * KEY_GROUPS + min(lane, KEY_GROUPS - 1)], left);
        }
        return {};
    }

    // The bits of a masked tile's keys. Only `left` rows of this lane's group are left in its segment.
    __device__ uint32_t kept_keys(int tile, int left) const {
        if constexpr (S::SEGMENTED) {
            const auto rows_of = [&](int) { return min(left, static_cast<int>(GROUP_ROWS)); };
            return tiles.kept_keys(params, tile, tile - tiles.first_key, lane, rows_of);
        } else {
            return tiles.kept_keys(params, tile, tile - tiles.first_key, lane);
        }
    }

    // Tells consumers about a key tile: which keys are kept, and whether rows of V must be zeroed.
    // `start` is that of this lane's group in the lists.
    __device__ void describe_keys(int i, int tile, typename S::Keys& info, uint32_t kept, int start) const {
        if (i < masked_end) {
            const bool has_word = lane < (S::TILE_N + 31) / 32;
            if (has_word) info.kept[lane] = kept;
            if constexpr (S::BLOCKS == 1) {
                const int words = 32 - __clz(__ballot_sync(0xffffffff, has_word && kept != 0));
                if (lane == 0) info.groups = words * 32 / GROUP_ROWS;
            }
            if constexpr (S::RANGED) {
                if (lane < KEY_GROUPS) {
                    const bool is_listed = params.form == FORM_FUSED && tile < 0;
                    info.first_keys[lane] = is_listed ? start : tile - tiles.first_key + lane * GROUP_ROWS;
                }
            }
        }
        if (lane == 0) info.has_masked_values = has_masked_values(i, tile);
    }

    // Has key tile i copied, its keys or its values, to the next stage.
    __device__ void load(int i, KeysState& state, int work_index) {
        const int tile = told(tile_at(i));
        state.count = told(state.count);
        // Before the wait, which takes long. The last of a row's masked tiles is filled up with groups past
        // the row's end, which need no copies.
        int start = 0;
        int groups = KEY_GROUPS;
        if (tile < 0) {
            start = params.key_groups[~tile * KEY_GROUPS + min(lane, KEY_GROUPS - 1)];
            // The compiler knows that it is the same in all lanes: through a reduction, ptxas 13.0 once had it depend
            // on a predicate that nothing sets.
            groups = __popc(__ballot_sync(0xffffffff, lane < KEY_GROUPS && start < params.seq_k));
        }
        int left = GROUP_ROWS;
        const SegmentRow at = place_of_keys(tile, left);
        uint32_t kept = 0;
        if (!loads_values && i < masked_end && (needs_bits || has_masked_values(i, tile))) kept = kept_keys(tile, left);
        const uint32_t empty = loads_values ? S::EMPTY_V : S::EMPTY_K;
        uint32_t full = loads_values ? S::FULL_V : S::FULL_K;
        if (loads_values && has_masked_values(i, tile)) full = S::RAW_V;
        full += base + 8 * state.stage();
        ptx::mbarrier_wait(base + empty + 8 * state.stage(), state.parity() ^ 1);
        if constexpr (S::OUTPUT_IN_VALUES) {
            // The first two come where the outputs of the query tile before lie.
            if (loads_values && i < first_tile + S::WARPGROUPS) S::wait_for_outputs(base, i - first_tile, work_index);
        }
        if (!loads_values) describe_keys(i, tile, reinterpret_cast<typename S::Keys*>(shared + S::KEYS_INFO)[state.stage()], kept, start);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive_expect(full, groups * (S::TileKV::BYTES / KEY_GROUPS));
        __syncwarp();
        const uint32_t to = base + (loads_values ? S::V : S::K) + state.stage() * S::TileKV::BYTES;
        ++state.count;
        if (tile >= 0) {
            const ptx::TensorMap& map = row_map(at.segment);
            const int row = S::SEGMENTED ? at.row : tile;
            if constexpr (S::PAIRED) {
                load_half_of_rows<typename S::TileKV>(to, map, full, ptx::policy_evict_last(), row, kv_head, tiles.batch);
            } else if constexpr (IS_UNIFORM) {
                load_uniform_rows<typename S::TileKV>(to, map, full, told(row), kv_head, tiles.batch);
            } else {
                load_rows<typename S::TileKV>(to, map, full, ptx::policy_evict_last(), row, kv_head, tiles.batch);
            }
            return;
        }
        const int row = S::SEGMENTED ? at.row : start;
        const uint64_t policy = ptx::policy_evict_last();
        if constexpr (IS_UNIFORM) {
            const auto map_of = [&](int group) -> const ptx::TensorMap& { return group_map(lane == group ? at.segment : 0); };
            load_groups<typename S::TileKV, KEY_GROUPS>(to, 0, map_of, full, policy, row, kv_head, tiles.batch, groups);
        } else if (lane < groups) {
            load_group<typename S::TileKV>(to, lane, group_map(at.segment), full, policy, row, kv_head, tiles.batch);
        }
    }
};

// The warp that zeroes masked rows of V. It waits for the same barriers as the consumers, and opens
// theirs when it is done with a tile.
template <typename S>
__device__ inline void zero_masked_values(unsigned char* shared, uint32_t base) {
    const int lane = threadIdx.x % 32;
    typename S::KeysState state;
    // A bit for each stage.
    uint32_t raw_parities = 0;
    bool is_exact = false;
    for (int work_index = 0;; ++work_index) {
        ptx::mbarrier_wait(base + S::full_q(work_index, 0), S::parity_q(work_index));
        const int key_tiles = S::rows_info(shared, work_index).key_tiles;
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(base + S::empty_q(work_index, 0));
        if (key_tiles < 0) {
            if (is_exact || !must_recompute<S>(shared, BARRIER_END_ZEROING, S::CONSUMERS + 32)) return;
            is_exact = true;
        }
        for (int i = 0; i < key_tiles; ++i, ++state.count) {
            ptx::mbarrier_wait(base + S::FULL_K + 8 * state.stage(), state.parity());
            const auto& info = reinterpret_cast<const typename S::Keys*>(shared + S::KEYS_INFO)[state.stage()];
            const bool has_masked_values = info.has_masked_values;
            const uint32_t kept = lane < (S::TILE_N + 31) / 32 && has_masked_values ? info.kept[lane] : 0;
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(base + S::EMPTY_K + 8 * state.stage());
            if (!has_masked_values) continue;
            ptx::mbarrier_wait(base + S::RAW_V + 8 * state.stage(), raw_parities >> state.stage() & 1);
            raw_parities ^= 1u << state.stage();
            unsigned char* const tile = shared + S::V + state.stage() * S::TileKV::BYTES;
            zero_rows<typename S::TileKV>(tile, kept, lane);
            ptx::fence_async_proxy();
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(base + S::FULL_V + 8 * state.stage());
        }
    }
}

// Writes zeros to the rows of the padded output that no packed row goes to. A warp of each block takes
// 32 rows at a time.
template <typename T, int D>
__device__ inline void write_masked_zeros(const TileListParams& params) {
    using Lanes = ZeroLanes<D>;
    const int lane = threadIdx.x % 32;
    const Strides& strides = params.out_strides;
    // Unsigned, so that the sum past the last row does not overflow.
    const uint32_t rows = params.padded_rows;
    const uint32_t seq_q = params.seq_q;
    const auto masked_from = [&](uint32_t first) { return first + lane < rows && __ldg(params.inv_indices + first + lane) < 0; };
    uint32_t first = blockIdx.x * 32;
    bool is_masked = masked_from(first);
    while (first < rows) {
        const uint32_t next = first + gridDim.x * 32;
        // Before the stores, which the compiler moves no load across.
        const bool next_is_masked = masked_from(next);
        // Each lane finds where its own row starts: divisions take long.
        const uint32_t row = first + lane;
        const int64_t own = static_cast<int64_t>(row / seq_q) * strides.batch + static_cast<int64_t>(row % seq_q) * strides.token;
        for (uint32_t left = __ballot_sync(0xffffffff, is_masked); left != 0; left &= left - 1) {
            const int64_t start = __shfl_sync(0xffffffff, own, __ffs(left) - 1);
            Lanes::write(static_cast<T*>(params.out) + start, strides.head, params.heads, params.head_dim, lane, 32);
        }
        first = next;
        is_masked = next_is_masked;
    }
}

}  // namespace sm90
