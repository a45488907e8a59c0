// The warps that feed the sm100 kernel: one finds the next tiles and has them copied, one zeroes
// masked rows of V.
#pragma once
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/tma.cuh"
#include "../key_range.cuh"
#include "../loader.cuh"
#include "../schedule.cuh"
#include "../tile_lists.cuh"
#include "block.cuh"
#include "unseen.cuh"

namespace sm100 {

// Finds the tiles of the block, describes them to the other warps, and copies them.
template <typename S>
struct LoadWarp {
    Block<S> block;
    const TileListParams& params;
    int lane;
    KeyTiles<TILES * TILE_M, TILE_N> tiles;
    int kv_head;
    // With key ranges: the entry of `range_tiles`.
    int range_tile;

    using Tile = typename S::Tile;
    using KeysState = PipelineState<S::STAGES>;

    __device__ explicit LoadWarp(const Block<S>& block) : block(block), params(block.params), lane(threadIdx.x % 32) {}

    __device__ void run() {
        std::conditional_t<S::RANGED, DealtWork, Schedule<TILES * TILE_M, false, true>> schedule(params);
        KeysState state;
        Work work;
        uint32_t work_index = 0;
        uint32_t uses[TILES] = {};
        for (; schedule.next(work); ++work_index) {
            kv_head = work.head / params.group_size;
            const RowGroup group = tiles.template find<false>(params, work, lane);
            if constexpr (S::RANGED) {
                range_tile = schedule.tile;
                const RangeTile& seen = params.range_tiles[range_tile];
                tiles.count = seen.masked + seen.end - seen.first;
                tiles.masked = tiles.count - (seen.inner_end - seen.inner_first);
            }
            const bool has_second = __shfl_sync(0xffffffff, group.rows, TILE_GROUPS) > 0;
            const int query_tiles = tiles.count == 0 ? 0 : has_second ? TILES : 1;
            describe_rows(work, work_index, query_tiles, group);
            if (query_tiles == 0) continue;
            int tile = tile_at(0);
            load_keys(0, tile, state);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t < query_tiles) load_queries(t, uses[t]++, work, group);
            }
            for (int i = 0; i < tiles.count; ++i) {
                int next = 0;
                if (i + 1 < tiles.count) {
                    next = tile_at(i + 1);
                    load_keys(i + 1, next, {state.count + 1});
                }
                load_values(i, tile, state);
                tile = next;
                ++state.count;
            }
        }
        block.wait_free(S::FREE_ROWS + 8 * (work_index % ROWS_SLOTS), work_index / ROWS_SLOTS);
        if (lane == 0) block.rows_info(work_index).key_tiles = -1;
        block.arrive(S::FULL_ROWS + 8 * (work_index % ROWS_SLOTS));
    }

private:
    __device__ void describe_rows(const Work& work, uint32_t work_index, int query_tiles, const RowGroup& group) const {
        block.wait_free(S::FREE_ROWS + 8 * (work_index % ROWS_SLOTS), work_index / ROWS_SLOTS);
        volatile auto& rows = block.rows_info(work_index);
        if (lane < TILES * TILE_GROUPS) {
            rows.groups[lane].first_row = group.first_row;
            rows.groups[lane].rows = group.rows;
            rows.groups[lane].kept = group.kept;
        }
        if (lane == 0) {
            rows.key_tiles = tiles.count;
            rows.tiles = query_tiles;
            rows.batch = tiles.batch;
            rows.head = work.head;
            rows.clips = params.form != FORM_PACKED;
            if constexpr (S::RANGED) rows.first_key = tiles.first_key;
        }
        block.arrive(S::FULL_ROWS + 8 * (work_index % ROWS_SLOTS));
    }

    __device__ void expect(int barrier) const {
        if (lane == 0) ptx::mbarrier_arrive_expect(block.base + barrier, Tile::BYTES);
        __syncwarp();
    }

    // Loads a query tile as soon as the products with the one before are done.
    __device__ void load_queries(int t, uint32_t use, const Work& work, const RowGroup& group) const {
        block.wait_free(S::FREE_Q + 8 * t, use);
        expect(S::FULL_Q + 8 * t);
        if (lane / TILE_GROUPS == t) {
            load_group<Tile>(block.base + S::Q + t * Tile::BYTES, lane % TILE_GROUPS, params.q_map, block.base + S::FULL_Q + 8 * t,
                             ptx::policy_evict_first(), group.first_row, work.head, tiles.batch);
        }
    }

    // Key tile i: its first key in the tensor, or ~ its number among the masked tiles of the lists.
    __device__ int tile_at(int i) const {
        if constexpr (S::RANGED) return tiles.seen_tile(params, params.range_tiles[range_tile], i);
        return params.form == FORM_FUSED ? tiles.list[i] : tiles.first_key + i * TILE_N;
    }

    __device__ bool is_masked(int i, int tile) const {
        if constexpr (S::RANGED) return i < tiles.masked;
        return params.form == FORM_FUSED ? tile < 0 : (i + 1) * TILE_N > tiles.keys;
    }

    // With key ranges those of every masked tile are searched.
    __device__ bool has_masked_values(int i, int tile) const { return (S::RANGED || params.form != FORM_DENSE) && is_masked(i, tile); }

    __device__ void load_tile(const ptx::TensorMap& map, const ptx::TensorMap& group_map, int to, int barrier, int tile) const {
        expect(barrier);
        load_key_tile<Tile>(block.base + to, map, group_map, params.key_groups, block.base + barrier, tile, kv_head, tiles.batch);
    }

    __device__ void load_keys(int i, int tile, KeysState state) const {
        block.wait_free(S::FREE_KEYS + 8 * (state.count % KEYS_SLOTS), state.count / KEYS_SLOTS);
        volatile auto& info = block.keys_info(state.count);
        const bool is_changed = is_masked(i, tile) || params.score_scale < 0.0f;
        if (is_changed) {
            const uint32_t kept = tiles.kept_keys(params, tile, S::RANGED ? tile - tiles.first_key : i * TILE_N, lane);
            if (lane < TILE_N / 32) info.kept[lane] = kept;
        }
        if (lane == 0) {
            info.masked = is_changed;
            info.has_masked_values = has_masked_values(i, tile);
            if constexpr (S::RANGED) info.tile = tile < 0 ? tile : tile - tiles.first_key;
        }
        block.arrive(S::FULL_KEYS + 8 * (state.count % KEYS_SLOTS));
        ptx::mbarrier_wait(block.base + S::FREE_K + 8 * state.stage(), state.parity() ^ 1);
        load_tile(params.k_map, params.k_group_map, S::K + state.stage() * Tile::BYTES, S::FULL_K + 8 * state.stage(), tile);
    }

    __device__ void load_values(int i, int tile, KeysState state) const {
        ptx::mbarrier_wait(block.base + S::FREE_V + 8 * state.stage(), state.parity() ^ 1);
        const int full = (has_masked_values(i, tile) ? S::RAW_V : S::FULL_V) + 8 * state.stage();
        load_tile(params.v_map, params.v_group_map, S::V + state.stage() * Tile::BYTES, full, tile);
    }
};

// The warp that zeroes masked rows of V, and then opens the barrier that the products wait for.
template <typename S>
__device__ inline void zero_masked_values(const Block<S>& block) {
    const int lane = threadIdx.x % 32;
    PipelineState<S::STAGES> state;
    // A bit for each stage.
    uint32_t raw_parities = 0;
    for (uint32_t work_index = 0;; ++work_index) {
        const volatile TileRows& rows = block.wait_rows(work_index);
        const int key_tiles = rows.key_tiles;
        const int tiles = rows.tiles;
        block.leave_rows(work_index);
        if (key_tiles < 0) return;
        bool has_nonfinite = false;
        for (int i = 0; i < key_tiles && tiles > 0; ++i, ++state.count) {
            const volatile TileKeys& info = block.wait_keys(state.count);
            const bool has_masked_values = info.has_masked_values;
            const uint32_t kept = lane < TILE_N / 32 && has_masked_values ? info.kept[lane] : 0;
            block.leave_keys(state.count);
            if (!has_masked_values) continue;
            ptx::mbarrier_wait(block.base + S::RAW_V + 8 * state.stage(), raw_parities >> state.stage() & 1);
            raw_parities ^= 1u << state.stage();
            unsigned char* const values = block.shared + S::V + state.stage() * S::Tile::BYTES;
            if constexpr (S::RANGED) {
                if (__any_sync(0xffffffff, lane < TILE_N / 32 && kept != 0xffffffff)) {
                    zero_rows<typename S::Tile>(values, kept, lane);
                    __syncwarp();
                }
                has_nonfinite |= take_out_nonfinite<S>(values);
            } else {
                zero_rows<typename S::Tile>(values, kept, lane);
            }
            ptx::fence_async_proxy();
            block.arrive(S::FULL_V + 8 * state.stage());
        }
        if constexpr (S::RANGED) block.tell_checked(work_index, has_nonfinite);
    }
}

}  // namespace sm100
