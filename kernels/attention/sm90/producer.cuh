// The producer warpgroup of the sm90 kernel. Warp 0 finds out what the next tiles are and has them copied; warp 1 zeroes rows of V that
// are not kept; warps 2 and 3 write the rows without a query tile as zeros.
#pragma once
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/tma.cuh"
#include "../schedule.cuh"
#include "../tile_lists.cuh"
#include "block.cuh"

namespace sm90 {

template <typename S>
struct Producer {
    const TileListParams& params;
    unsigned char* shared;
    uint32_t base;
    int lane;
    // Which keys the tiles of this query tile come from.
    int batch;
    int kv_head;
    int first_key;
    int keys;
    int key_tiles;
    const int32_t* tile_list;
    // The work's key tiles.
    int first_tile;
    int end_tile;
    // Those before this one need their scores changed: for keys that are not kept, or for a negative scale.
    int masked_end;

    __device__ Producer(const TileListParams& params, unsigned char* shared, uint32_t base)
        : params(params), shared(shared), base(base), lane(threadIdx.x % 32) {}

    __device__ void run() {
        KeysState state;
        int work_index = 0;
        for (bool is_exact = false;; is_exact = true) {
            Schedule<S::TILE_M> schedule(params);
            Work work;
            for (; schedule.next(work) && !(is_exact && work.part >= 0); ++work_index) {
                const RowGroup group = find(work);
                int tile = first_tile < end_tile ? tile_at(first_tile) : 0;
                if (first_tile < end_tile) load_keys(first_tile, tile, state);
                load_queries(work, work_index, group);
                for (int i = first_tile; i < end_tile; ++i) {
                    int next = 0;
                    if (i + 1 < end_tile) {
                        next = tile_at(i + 1);
                        load_keys(i + 1, next, {state.count + 1});
                    }
                    load_values(i, tile, state);
                    tile = next;
                    ++state.count;
                }
            }
            for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) wait_for_room(work_index, warpgroup);
            if (lane == 0) {
                rows_info(work_index).key_tiles = -1;
                for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) ptx::mbarrier_arrive(base + S::full_q(work_index, warpgroup));
            }
            ++work_index;
            if (is_exact || !must_recompute<S>(shared, BARRIER_END_COPIES, S::CONSUMERS + 32)) return;
        }
    }

private:
    // Two, since one warpgroup may be at the next query tile already.
    __device__ TileRows& rows_info(int work_index) const { return reinterpret_cast<TileRows*>(shared + S::ROWS_INFO)[work_index % 2]; }

    // Until a warpgroup has given back the queries whose place the work's take.
    __device__ void wait_for_room(int work_index, int warpgroup) const {
        ptx::mbarrier_wait(base + S::empty_q(work_index, warpgroup), S::parity_q(work_index) ^ 1);
    }

    // Where the work's keys are, and this lane's 16 query rows.
    __device__ RowGroup find(const Work& work) {
        batch = work.group;
        first_key = 0;
        keys = params.seq_k;
        kv_head = work.head / params.group_size;
        int first_row = work.tile * S::TILE_M + lane * GROUP_ROWS;
        int queries = params.seq_q;
        uint32_t kept = 0xffff;
        if (params.form == FORM_FUSED) {
            const BatchTiles tiles = params.batches[work.group];
            batch = tiles.batch;
            key_tiles = tiles.key_tiles;
            masked_end = tiles.masked_key_tiles;
            tile_list = params.key_tiles + tiles.first_key_tile;
            const int tile = tiles.first_query_tile + work.tile;
            if (lane < S::TILE_M / GROUP_ROWS) {
                first_row = params.query_groups[tile * (S::TILE_M / GROUP_ROWS) + lane];
                kept = group_bits(params.row_bits, params.row_words, batch, first_row);
            }
        } else {
            if (params.form == FORM_PACKED) {
                first_row += params.cu_seqlens_q[work.group];
                queries = params.cu_seqlens_q[work.group + 1];
                first_key = params.cu_seqlens_k[work.group];
                keys = max(params.cu_seqlens_k[work.group + 1] - first_key, 0);
                batch = 0;
            }
            key_tiles = (keys + S::TILE_N - 1) / S::TILE_N;
            masked_end = keys % S::TILE_N == 0 ? 0 : 1;
        }
        if (params.score_scale < 0.0f) masked_end = key_tiles;
        first_tile = 0;
        end_tile = key_tiles;
        if (work.part >= 0) {
            const int part = work.part % params.parts;
            first_tile = key_tiles * part / params.parts;
            end_tile = key_tiles * (part + 1) / params.parts;
        }
        return {first_row, min(max(queries - first_row, 0), GROUP_ROWS), kept};
    }

    // Describes the query tile, and loads each warpgroup's rows. With two places all warpgroups have long left the one before the
    // last; with one, each one's rows are loaded as soon as it has finished with those before.
    __device__ void load_queries(const Work& work, int work_index, const RowGroup& group) const {
        if (S::QUERY_TILES == 2) {
            for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) wait_for_room(work_index, warpgroup);
        }
#pragma unroll 1
        for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) {
            const uint32_t full = base + S::full_q(work_index, warpgroup);
            if (S::QUERY_TILES == 1) wait_for_room(work_index, warpgroup);
            if (warpgroup == 0) {
                TileRows& rows = rows_info(work_index);
                if (lane < S::TILE_M / GROUP_ROWS) rows.groups[lane] = group;
                if (lane == 0) {
                    rows.key_tiles = end_tile - first_tile;
                    rows.masked_tiles = min(max(masked_end - first_tile, 0), end_tile - first_tile);
                    rows.part = work.part;
                    rows.batch = batch;
                    rows.head = work.head;
                    rows.clips = params.form != FORM_PACKED;
                }
                __syncwarp();
            }
            if (lane == 0) ptx::mbarrier_arrive_expect(full, S::TileQ::BYTES / S::WARPGROUPS);
            __syncwarp();
            if (lane / 4 == warpgroup) {
                load_group<S::TILE_M>(params.q_map, base + S::query_tile(work_index), full, ptx::policy_evict_first(), group.first_row, work.head);
            }
        }
    }

    // A key tile's first key in the tensor, or, negative, ~ its number among the masked ones of the lists.
    // Without lists the last tile comes first, since it may be masked.
    __device__ int tile_at(int i) const {
        return params.form == FORM_FUSED ? tile_list[i] : first_key + (key_tiles - 1 - i) * S::TILE_N;
    }

    template <int ROWS>
    __device__ void load_group(const ptx::TensorMap& map, uint32_t to, uint32_t barrier, uint64_t policy, int row, int head) const {
#pragma unroll
        for (int panel = 0; panel < S::PANELS; ++panel) {
            ptx::tma_load(to + (panel * ROWS + lane * GROUP_ROWS) * S::ROW_BYTES, &map, barrier, policy, panel * S::PANEL, row, head, batch);
        }
    }

    __device__ void load_tile(const ptx::TensorMap& map, const ptx::TensorMap& group_map, uint32_t to, uint32_t barrier, int tile) const {
        const uint64_t policy = ptx::policy_evict_last();
        if (tile >= 0) {
            if (lane < S::PANELS) {
                ptx::tma_load(to + lane * S::TILE_N * S::ROW_BYTES, &map, barrier, policy, lane * S::PANEL, tile, kv_head, batch);
            }
        } else if (lane < S::TILE_N / GROUP_ROWS) {
            load_group<S::TILE_N>(group_map, to, barrier, policy, params.key_groups[~tile * (S::TILE_N / GROUP_ROWS) + lane], kv_head);
        }
    }

    __device__ bool has_masked_values(int i, int tile) const {
        return params.form == FORM_FUSED ? tile < 0 : params.form == FORM_PACKED && i == 0 && keys % S::TILE_N != 0;
    }

    __device__ void load_keys(int i, int tile, KeysState state) const {
        const uint32_t full = base + S::FULL_K + 8 * state.stage();
        ptx::mbarrier_wait(base + S::EMPTY_K + 8 * state.stage(), state.parity() ^ 1);
        auto& info = reinterpret_cast<TileKeys*>(shared + S::KEYS_INFO)[state.stage()];
        if (i < masked_end) describe(tile, info);
        if (lane == 0) info.has_masked_values = has_masked_values(i, tile);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive_expect(full, S::TileKV::BYTES);
        __syncwarp();
        load_tile(params.k_map, params.k_group_map, base + S::K + state.stage() * S::TileKV::BYTES, full, tile);
    }

    // Which keys of a masked tile are kept.
    __device__ void describe(int tile, TileKeys& info) const {
        uint32_t kept = 0xffffffff;
        if (params.form == FORM_FUSED && tile < 0) {
            kept = 0;
            if (lane < S::TILE_N / GROUP_ROWS) {
                const int first = params.key_groups[~tile * (S::TILE_N / GROUP_ROWS) + lane];
                kept = group_bits(params.key_bits, params.key_words, batch, first);
            }
            const uint32_t even = __shfl_sync(0xffffffff, kept, 2 * lane % 32);
            const uint32_t odd = __shfl_sync(0xffffffff, kept, (2 * lane + 1) % 32);
            kept = even | odd << 16;
        } else if (params.form != FORM_FUSED) {
            const int left = keys - (tile - first_key) - lane * 32;
            kept = left >= 32 ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
        }
        if (lane < (S::TILE_N + 31) / 32) info.kept[lane] = kept;
    }

    __device__ void load_values(int i, int tile, KeysState state) const {
        const uint32_t full = base + (has_masked_values(i, tile) ? S::RAW_V : S::FULL_V) + 8 * state.stage();
        ptx::mbarrier_wait(base + S::EMPTY_V + 8 * state.stage(), state.parity() ^ 1);
        if (lane == 0) ptx::mbarrier_arrive_expect(full, S::TileKV::BYTES);
        __syncwarp();
        load_tile(params.v_map, params.v_group_map, base + S::V + state.stage() * S::TileKV::BYTES, full, tile);
    }
};

// The warp that zeroes rows of V which are not kept: it follows the consumers' barriers, and opens theirs for such a tile.
template <typename S>
__device__ inline void zero_masked_values(unsigned char* shared, uint32_t base) {
    const int lane = threadIdx.x % 32;
    KeysState state;
    // One bit a stage.
    uint32_t raw_parities = 0;
    bool is_exact = false;
    for (int work_index = 0;; ++work_index) {
        ptx::mbarrier_wait(base + S::full_q(work_index, 0), S::parity_q(work_index));
        const int key_tiles = reinterpret_cast<const TileRows*>(shared + S::ROWS_INFO)[work_index % 2].key_tiles;
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(base + S::empty_q(work_index, 0));
        if (key_tiles < 0) {
            if (is_exact || !must_recompute<S>(shared, BARRIER_END_ZEROING, S::CONSUMERS + 32)) return;
            is_exact = true;
        }
        for (int i = 0; i < key_tiles; ++i, ++state.count) {
            ptx::mbarrier_wait(base + S::FULL_K + 8 * state.stage(), state.parity());
            const auto& info = reinterpret_cast<const TileKeys*>(shared + S::KEYS_INFO)[state.stage()];
            const bool has_masked_values = info.has_masked_values;
            uint32_t kept = lane < (S::TILE_N + 31) / 32 && has_masked_values ? info.kept[lane] : 0;
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(base + S::EMPTY_K + 8 * state.stage());
            if (!has_masked_values) continue;
            ptx::mbarrier_wait(base + S::RAW_V + 8 * state.stage(), raw_parities >> state.stage() & 1);
            raw_parities ^= 1u << state.stage();
            unsigned char* const tile = shared + S::V + state.stage() * S::TileKV::BYTES;
            // A panel's row is as many chunks of 16 bytes; the warp zeroes them for several rows at a time.
            constexpr int CHUNKS = S::ROW_BYTES / 16;
            for (int first = 0; first < S::TILE_N; first += 32 / CHUNKS) {
                const int row = first + lane / CHUNKS;
                const uint32_t word = __shfl_sync(0xffffffff, kept, first / 32);
                if ((word >> (row % 32) & 1) == 0) {
#pragma unroll
                    for (int panel = 0; panel < S::PANELS; ++panel) {
                        *reinterpret_cast<uint4*>(tile + (panel * S::TILE_N + row) * S::ROW_BYTES + lane % CHUNKS * 16) = uint4{0, 0, 0, 0};
                    }
                }
            }
            ptx::fence_async_proxy();
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(base + S::FULL_V + 8 * state.stage());
        }
    }
}

// `write_zero_spans` for the padded output of packed rows: the rows that no packed one goes to, a warp's at a time.
template <typename T>
__device__ inline void write_masked_zeros(const TileListParams& params, int warp, int warps) {
    const int lane = threadIdx.x % 32;
    const int chunks = params.head_dim / 8;
    const int step = gridDim.x * warps * 32;
    for (int first = (blockIdx.x * warps + warp) * 32; first < params.padded_rows; first += step) {
        const bool is_masked = first + lane < params.padded_rows && params.inv_indices[first + lane] < 0;
        for (uint32_t left = __ballot_sync(0xffffffff, is_masked); left != 0; left &= left - 1) {
            const int flat = first + __ffs(left) - 1;
            T* const out = static_cast<T*>(params.out) + static_cast<int64_t>(flat / params.seq_q) * params.out_strides.batch +
                           static_cast<int64_t>(flat % params.seq_q) * params.out_strides.token;
            for (int index = lane; index < params.heads * chunks; index += 32) {
                *reinterpret_cast<uint4*>(out + index / chunks * params.out_strides.head + index % chunks * 8) = uint4{0, 0, 0, 0};
            }
        }
    }
}

}  // namespace sm90
