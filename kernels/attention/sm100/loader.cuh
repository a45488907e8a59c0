// The warps that feed the sm100 kernel: one finds out what the next tiles are and has them copied; one zeroes masked rows of V.
#pragma once
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/tma.cuh"
#include "../schedule.cuh"
#include "../tile_lists.cuh"
#include "block.cuh"

namespace sm100 {

// Finds what the block has to do, tells the other warps, and copies it.
template <typename S>
struct LoadWarp {
    Block<S> block;
    const TileListParams& params;
    int lane;
    // Which keys the tiles of this work come from.
    int batch;
    int kv_head;
    int first_key;
    int keys;
    int key_tiles;
    const int32_t* tile_list;

    using Tile = typename S::Tile;
    using KeysState = PipelineState<S::STAGES>;

    __device__ explicit LoadWarp(const Block<S>& block) : block(block), params(block.params), lane(threadIdx.x % 32) {}

    __device__ void run() {
        Schedule<TILES * TILE_M> schedule(params);
        KeysState state;
        Work work;
        uint32_t work_index = 0;
        uint32_t uses[TILES] = {};
        for (; schedule.next(work); ++work_index) {
            const RowGroup group = find(work);
            const bool has_second = __shfl_sync(0xffffffff, group.rows, TILE_GROUPS) > 0;
            const int tiles = key_tiles == 0 ? 0 : has_second ? TILES : 1;
            describe_rows(work, work_index, tiles, group);
            if (tiles == 0) continue;
            int tile = tile_at(0);
            load_keys(0, tile, state);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t < tiles) load_queries(t, uses[t]++, work, group);
            }
            for (int i = 0; i < key_tiles; ++i) {
                int next = 0;
                if (i + 1 < key_tiles) {
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
    // Where the work's keys are, and this lane's 16 query rows.
    __device__ RowGroup find(const Work& work) {
        batch = work.group;
        first_key = 0;
        keys = params.seq_k;
        kv_head = work.head / params.group_size;
        int first_row = work.tile * TILES * TILE_M + lane * GROUP_ROWS;
        int queries = params.seq_q;
        uint32_t kept = 0xffff;
        if (params.form == FORM_FUSED) {
            const BatchTiles tiles = params.batches[work.group];
            batch = tiles.batch;
            key_tiles = tiles.key_tiles;
            tile_list = params.key_tiles + tiles.first_key_tile;
            const int tile = tiles.first_query_tile + work.tile;
            if (lane < TILES * TILE_GROUPS) {
                first_row = params.query_groups[tile * TILES * TILE_GROUPS + lane];
                kept = group_bits(params.row_bits, params.row_words, batch, first_row);
            }
        } else {
            if (params.form == FORM_PACKED) {
                first_row += params.cu_seqlens_q[work.group];
                queries = params.cu_seqlens_q[work.group + 1];
                first_key = params.cu_seqlens_k[work.group];
                keys = params.cu_seqlens_k[work.group + 1] - first_key;
                batch = 0;
            }
            key_tiles = (keys + TILE_N - 1) / TILE_N;
        }
        return {first_row, min(max(queries - first_row, 0), GROUP_ROWS), kept};
    }

    __device__ void describe_rows(const Work& work, uint32_t work_index, int tiles, const RowGroup& group) const {
        block.wait_free(S::FREE_ROWS + 8 * (work_index % ROWS_SLOTS), work_index / ROWS_SLOTS);
        volatile TileRows& rows = block.rows_info(work_index);
        if (lane < TILES * TILE_GROUPS) {
            rows.groups[lane].first_row = group.first_row;
            rows.groups[lane].rows = group.rows;
            rows.groups[lane].kept = group.kept;
        }
        if (lane == 0) {
            rows.key_tiles = key_tiles;
            rows.tiles = tiles;
            rows.batch = batch;
            rows.head = work.head;
            rows.clips = params.form != FORM_PACKED;
        }
        block.arrive(S::FULL_ROWS + 8 * (work_index % ROWS_SLOTS));
    }

    __device__ void expect(int barrier) const {
        if (lane == 0) ptx::mbarrier_arrive_expect(block.base + barrier, Tile::BYTES);
        __syncwarp();
    }

    // A query tile, as soon as the products with the one before are done.
    __device__ void load_queries(int t, uint32_t use, const Work& work, const RowGroup& group) const {
        block.wait_free(S::FREE_Q + 8 * t, use);
        expect(S::FULL_Q + 8 * t);
        if (lane / TILE_GROUPS == t) {
            load_group(params.q_map, S::Q + t * Tile::BYTES, S::FULL_Q + 8 * t, ptx::policy_evict_first(), group.first_row, work.head);
        }
    }

    // A key tile's first key in the tensor, or, negative, ~ its number among the masked ones of the lists.
    __device__ int tile_at(int i) const { return params.form == FORM_FUSED ? tile_list[i] : first_key + i * TILE_N; }

    // This lane's group of a tile.
    __device__ void load_group(const ptx::TensorMap& map, int to, int barrier, uint64_t policy, int row, int head) const {
        const uint32_t rows = block.base + to + lane % TILE_GROUPS * GROUP_ROWS * S::ROW_BYTES;
#pragma unroll
        for (int panel = 0; panel < S::PANELS; ++panel) {
            ptx::tma_load(rows + panel * TILE_M * S::ROW_BYTES, &map, block.base + barrier, policy, panel * S::PANEL, row, head, batch);
        }
    }

    __device__ void load_tile(const ptx::TensorMap& map, const ptx::TensorMap& group_map, int to, int barrier, int tile) const {
        const uint64_t policy = ptx::policy_evict_last();
        expect(barrier);
        if (tile >= 0) {
            if (lane < S::PANELS) {
                ptx::tma_load(block.base + to + lane * TILE_N * S::ROW_BYTES, &map, block.base + barrier, policy, lane * S::PANEL, tile, kv_head,
                              batch);
            }
        } else if (lane < TILE_GROUPS) {
            load_group(group_map, to, barrier, policy, params.key_groups[~tile * TILE_GROUPS + lane], kv_head);
        }
    }

    __device__ bool is_masked(int i, int tile) const { return params.form == FORM_FUSED ? tile < 0 : (i + 1) * TILE_N > keys; }

    __device__ bool has_masked_values(int i, int tile) const { return params.form != FORM_DENSE && is_masked(i, tile); }

    __device__ void load_keys(int i, int tile, KeysState state) const {
        block.wait_free(S::FREE_KEYS + 8 * (state.count % KEYS_SLOTS), state.count / KEYS_SLOTS);
        volatile TileKeys& info = block.keys_info(state.count);
        const bool is_changed = is_masked(i, tile) || params.score_scale < 0.0f;
        if (is_changed) describe_keys(i, tile, info);
        if (lane == 0) {
            info.masked = is_changed;
            info.has_masked_values = has_masked_values(i, tile);
        }
        block.arrive(S::FULL_KEYS + 8 * (state.count % KEYS_SLOTS));
        ptx::mbarrier_wait(block.base + S::FREE_K + 8 * state.stage(), state.parity() ^ 1);
        load_tile(params.k_map, params.k_group_map, S::K + state.stage() * Tile::BYTES, S::FULL_K + 8 * state.stage(), tile);
    }

    // Which keys of a masked tile are kept.
    __device__ void describe_keys(int i, int tile, volatile TileKeys& info) const {
        uint32_t kept = 0xffffffff;
        if (params.form == FORM_FUSED && tile < 0) {
            kept = 0;
            if (lane < TILE_GROUPS) {
                kept = group_bits(params.key_bits, params.key_words, batch, params.key_groups[~tile * TILE_GROUPS + lane]);
            }
            const uint32_t even = __shfl_sync(0xffffffff, kept, 2 * lane % 32);
            const uint32_t odd = __shfl_sync(0xffffffff, kept, (2 * lane + 1) % 32);
            kept = even | odd << 16;
        } else if (params.form != FORM_FUSED) {
            const int left = keys - i * TILE_N - lane * 32;
            kept = left >= 32 ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
        }
        if (lane < TILE_N / 32) info.kept[lane] = kept;
    }

    __device__ void load_values(int i, int tile, KeysState state) const {
        ptx::mbarrier_wait(block.base + S::FREE_V + 8 * state.stage(), state.parity() ^ 1);
        const int full = (has_masked_values(i, tile) ? S::RAW_V : S::FULL_V) + 8 * state.stage();
        load_tile(params.v_map, params.v_group_map, S::V + state.stage() * Tile::BYTES, full, tile);
    }
};

// Zeroes rows of V which are not kept: P·V multiplies them by zero, and they may hold NaN. Opens the products' barrier for such a tile.
template <typename S>
__device__ inline void zero_masked_values(const Block<S>& block) {
    const int lane = threadIdx.x % 32;
    PipelineState<S::STAGES> state;
    // One bit a stage.
    uint32_t raw_parities = 0;
    for (uint32_t work_index = 0;; ++work_index) {
        const volatile TileRows& rows = block.wait_rows(work_index);
        const int key_tiles = rows.key_tiles;
        const int tiles = rows.tiles;
        block.leave_rows(work_index);
        if (key_tiles < 0) return;
        for (int i = 0; i < key_tiles && tiles > 0; ++i, ++state.count) {
            const volatile TileKeys& info = block.wait_keys(state.count);
            const bool has_masked_values = info.has_masked_values;
            const uint32_t kept = lane < TILE_N / 32 && has_masked_values ? info.kept[lane] : 0;
            block.leave_keys(state.count);
            if (!has_masked_values) continue;
            ptx::mbarrier_wait(block.base + S::RAW_V + 8 * state.stage(), raw_parities >> state.stage() & 1);
            raw_parities ^= 1u << state.stage();
            unsigned char* const tile = block.shared + S::V + state.stage() * S::Tile::BYTES;
            // A panel's row is as many chunks of 16 bytes; the warp zeroes them for several rows at a time.
            constexpr int CHUNKS = S::ROW_BYTES / 16;
            for (int first = 0; first < TILE_N; first += 32 / CHUNKS) {
                const int row = first + lane / CHUNKS;
                const uint32_t word = __shfl_sync(0xffffffff, kept, first / 32);
                if ((word >> (row % 32) & 1) == 0) {
#pragma unroll
                    for (int panel = 0; panel < S::PANELS; ++panel) {
                        *reinterpret_cast<uint4*>(tile + (panel * TILE_N + row) * S::ROW_BYTES + lane % CHUNKS * 16) = uint4{0, 0, 0, 0};
                    }
                }
            }
            ptx::fence_async_proxy();
            block.arrive(S::FULL_V + 8 * state.stage());
        }
    }
}

}  // namespace sm100
