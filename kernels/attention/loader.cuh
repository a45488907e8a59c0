// How the loading warps of the sm90 and the sm100 kernel fill tiles in shared memory.
#pragma once
#include "../common/params.cuh"
#include "../common/shared_tile.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warpgroup.cuh"
#include "tile_lists.cuh"

// Starts to copy 16 rows of a head, from `row` on, to one of the 16-row groups of a tile. Called by
// one lane.
template <typename Tile>
__device__ inline void load_group(uint32_t tile, int group, const ptx::TensorMap& map, uint32_t barrier, uint64_t policy, int row, int head,
                                  int batch) {
#pragma unroll
    for (int panel = 0; panel < Tile::PANELS; ++panel) {
        const uint32_t to = tile + (panel * Tile::ROWS + group * GROUP_ROWS) * Tile::ROW_BYTES;
        ptx::tma_load(to, &map, barrier, policy, panel * Tile::PANEL, row, head, batch);
    }
}

// Starts to copy the first `count` of COUNT groups of a tile, from group `first` on; `map_of` gives the map of
// a group. Called by a whole warp, in which lane l has the row of group l. All else is the same in all lanes,
// and the compiler knows it (`ptx::uniform`): so there is no loop over lanes for each copy.
template <typename Tile, int COUNT, typename MapOf>
__device__ inline void load_groups(uint32_t tile, int first, MapOf map_of, uint32_t barrier, uint64_t policy, int row, int head, int batch,
                                   int count = COUNT) {
    const int lane = threadIdx.x % 32;
    const ptx::TensorMap* maps[COUNT];
    int rows[COUNT];
#pragma unroll
    for (int at = 0; at < COUNT; ++at) {
        maps[at] = &map_of(first + at);
        rows[at] = ptx::uniform(lane == first + at ? row : INT32_MIN);
    }
    if (ptx::elect_lane()) {
#pragma unroll
        for (int at = 0; at < COUNT; ++at) {
            if (at < count) load_group<Tile>(tile, first + at, *maps[at], barrier, policy, rows[at], head, batch);
        }
    }
}

// Starts to copy a tile of keys or values in a row. Called by a whole warp.
template <typename Tile>
__device__ inline void load_rows(uint32_t tile, const ptx::TensorMap& map, uint32_t barrier, uint64_t policy, int row, int head, int batch) {
    const int lane = threadIdx.x % 32;
    if (lane < Tile::PANELS) {
        ptx::tma_load(tile + lane * Tile::ROWS * Tile::ROW_BYTES, &map, barrier, policy, lane * Tile::PANEL, row, head, batch);
    }
}

// The same with numbers that the compiler knows to be the same in all lanes.
template <typename Tile>
__device__ inline void load_uniform_rows(uint32_t tile, const ptx::TensorMap& map, uint32_t barrier, int row, int head, int batch) {
    const uint64_t policy = ptx::policy_evict_last();
    if (ptx::elect_lane()) {
#pragma unroll
        for (int panel = 0; panel < Tile::PANELS; ++panel) {
            ptx::tma_load(tile + panel * Tile::ROWS * Tile::ROW_BYTES, &map, barrier, policy, panel * Tile::PANEL, row, head, batch);
        }
    }
}

// Starts to copy a tile of keys or values. Called by a whole warp. `key` is the tile's first row in
// the tensor; or, if negative, the tile is number ~key of the masked ones, whose groups
// `key_groups` lists.
template <typename Tile>
__device__ inline void load_key_tile(uint32_t tile, const ptx::TensorMap& map, const ptx::TensorMap& group_map, const int32_t* key_groups,
                                     uint32_t barrier, int key, int head, int batch) {
    constexpr int GROUPS = Tile::ROWS / GROUP_ROWS;
    const int lane = threadIdx.x % 32;
    const uint64_t policy = ptx::policy_evict_last();
    if (key >= 0) {
        load_rows<Tile>(tile, map, barrier, policy, key, head, batch);
    } else if (lane < GROUPS) {
        load_group<Tile>(tile, lane, group_map, barrier, policy, key_groups[~key * GROUPS + lane], head, batch);
    }
}

// Zeroes the rows of a tile that are not kept. Called by a whole warp; lane l holds the bits of
// rows 32 · l to 32 · l + 31. P·V multiplies such rows of V by zero, and they may hold NaN.
template <typename Tile>
__device__ inline void zero_rows(unsigned char* const tile, uint32_t kept, int lane) {
    // A panel's row is this many chunks of 16 bytes; the warp zeroes them for several rows at a
    // time.
    constexpr int CHUNKS = Tile::ROW_BYTES / 16;
    for (int first = 0; first < Tile::ROWS; first += 32 / CHUNKS) {
        const int row = first + lane / CHUNKS;
        const uint32_t word = __shfl_sync(0xffffffff, kept, first / 32);
        if ((word >> (row % 32) & 1) == 0) {
#pragma unroll
            for (int panel = 0; panel < Tile::PANELS; ++panel) {
                *reinterpret_cast<uint4*>(tile + (panel * Tile::ROWS + row) * Tile::ROW_BYTES + lane % CHUNKS * 16) = uint4{0, 0, 0, 0};
            }
        }
    }
}
