// Pairs of blocks of the sm90 kernel: clusters of two, for calls without a mask. The blocks of a pair
// have neighbouring query tiles of one head, and the same key tiles at the same time. Each has half of
// the panels of a key tile copied, into the shared memory of both:
//
//   block 0    K V ◀─┬─ panels of the first half, by block 0
//   block 1    K V ◀─┴─ panels of the second half, by block 1
//
// So L2 is read half as often. A stage is empty when the consumers of both blocks have released it, and
// full when both halves have come.
#pragma once
#include "../../ptx/cluster.cuh"

namespace sm90 {

constexpr int PAIR = 2;

// Starts to copy this block's half of a tile of keys or values in a row. Called by a whole warp.
template <typename Tile>
__device__ inline void load_half_of_rows(uint32_t tile, const ptx::TensorMap& map, uint32_t barrier, uint64_t policy, int row, int head,
                                         int batch) {
    constexpr int PANELS = Tile::PANELS / PAIR;
    static_assert(Tile::PANELS % PAIR == 0);
    const int lane = threadIdx.x % 32;
    if (lane < PANELS) {
        const int panel = ptx::cluster_rank() * PANELS + lane;
        ptx::tma_load_multicast(tile + panel * Tile::ROWS * Tile::ROW_BYTES, &map, barrier, policy, (1 << PAIR) - 1, panel * Tile::PANEL, row,
                                head, batch);
    }
}

// Arrives at a barrier of both blocks. Called by a whole warp.
__device__ inline void arrive_in_pair(uint32_t barrier) {
    const int lane = threadIdx.x % 32;
    if (lane < PAIR) ptx::mbarrier_arrive_mapped(ptx::address_in(barrier, lane));
}

}  // namespace sm90
