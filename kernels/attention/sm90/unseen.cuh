// Key ranges in a consumer warp of the sm90 kernel: keys that some queries of a tile see and others
// do not. Their scores are -inf where they are not seen, and the fast softmax needs no more as long
// as values are finite. A weight of 0 times NaN is NaN, so rows that come out as NaN are computed
// again by the exact softmax, in whose masked tiles values that are NaN or infinite are taken out
// and added by ordinary arithmetic to the rows that see them.
#pragma once
#include "../../ptx/tma.cuh"
#include "../../ptx/warpgroup.cuh"
#include "../nonfinite.cuh"
#include "block.cuh"

namespace sm90 {

// How many groups of a tile of N keys there are up to the last one of which some row of a warpgroup,
// whose rows see keys from `some_first` to `some_end`, may see a key; 0 if there is none. A whole warp
// asks.
template <int N>
__device__ inline int seen_groups(const RangedTileKeys& keys, int some_first, int some_end) {
    constexpr int GROUPS = N / GROUP_ROWS;
    const int group = threadIdx.x % 32;
    const int first = keys.first_keys[min(group, GROUPS - 1)];
    const bool sees = group < GROUPS && first < some_end && first + static_cast<int>(GROUP_ROWS) > some_first;
    return ptx::uniform(32 - __clz(__ballot_sync(0xffffffff, sees)));
}

// What this lane's two rows see.
struct SeenByRows {
    int2 row[2];

    // The lane's rows. Those that do not exist count as seeing everything.
    __device__ void read(const KeyRangeParams& params, const TileRows& tile) {
        // Fits: the queries of all batch rows are counted in an int.
        const int first_query = static_cast<int>(tile.batch * params.row_stride);
        const RowGroup& group = tile.groups[threadIdx.x / 32 - 4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = half * 8 + threadIdx.x % 32 / 4;
            row[half] = make_int2(0, INT32_MAX);
            if (at < group.rows) row[half] = __ldg(reinterpret_cast<const int2*>(params.ranges) + (first_query + group.first_row + at));
        }
    }

    // The same of those that a loading warp has read, for a warpgroup's first warp from the first on.
    __device__ void read(const int2* ranges) {
#pragma unroll
        for (int half = 0; half < 2; ++half) row[half] = ranges[threadIdx.x / 32 % 4 * GROUP_ROWS + half * 8 + threadIdx.x % 32 / 4];
    }

    __device__ bool has_keys(int half) const { return row[half].x < row[half].y; }

    __device__ bool sees(int half, int key) const { return row[half].x <= key && key < row[half].y; }

    // Whether one of this lane's rows sees a kept key of a tile of N keys.
    template <int N>
    __device__ bool sees_some(int half, const RangedTileKeys& keys) const {
        uint32_t seen = 0;
#pragma unroll
        for (int group = 0; group < N / GROUP_ROWS; ++group) {
            const uint32_t kept = keys.kept[group / 2] >> (group % 2 * GROUP_ROWS) & 0xffff;
            const int first = keys.first_keys[group];
            seen |= kept & below(row[half].y - first) & ~below(row[half].x - first);
        }
        return seen != 0;
    }

    // Scores of keys that a row does not see become -inf. Most tiles hold ends alone of what rows see, as
    // under a causal mask, or starts alone.
    template <int TILES>
    __device__ void hide_others(float (&scores)[TILES][4], const RangedTileKeys& keys) const {
        const int lane_key = threadIdx.x % 4 * 2;
        // Groups come in the order of their keys.
        const int tile_end = keys.first_keys[TILES / 2 - 1] + static_cast<int>(GROUP_ROWS);
        if (!__all_sync(0xffffffff, min(row[0].y, row[1].y) >= tile_end)) {
#pragma unroll
            for (int group = 0; group < TILES / 2; ++group) {
                const int own = keys.first_keys[group] + lane_key;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int seen_end = row[half].y - own;
#pragma unroll
                    for (int at = 0; at < 4; ++at) {
                        // Selected: a score may be NaN.
                        if (at / 2 * 8 + at % 2 >= seen_end) scores[2 * group + at / 2][2 * half + at % 2] = -INFINITY;
                    }
                }
            }
        }
        if (__all_sync(0xffffffff, max(row[0].x, row[1].x) <= keys.first_keys[0])) return;
#pragma unroll
        for (int group = 0; group < TILES / 2; ++group) {
            const int own = keys.first_keys[group] + lane_key;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int seen_first = row[half].x - own;
#pragma unroll
                for (int at = 0; at < 4; ++at) {
                    if (at / 2 * 8 + at % 2 < seen_first) scores[2 * group + at / 2][2 * half + at % 2] = -INFINITY;
                }
            }
        }
    }

private:
    // Of 16 bits, those below the n-th.
    __device__ static uint32_t below(int n) { return n <= 0 ? 0 : n >= 16 ? 0xffff : (1u << n) - 1; }
};

// Takes the values of a tile that are NaN or infinite out of it, and adds them to the rows of `acc`
// that see them, whatever their weights, which are above 0. Called by all consumers of a block. A stage where some were found is taken for one that
// holds some from then on: its word is set for the tile after only when all have read it.
template <typename S, typename Add>
__device__ inline void take_out_nonfinite(unsigned char* shared, int stage, Add add) {
    using T = typename S::T;
    constexpr int BYTES = S::TileKV::BYTES;
    unsigned char* const tile = shared + S::V + stage * BYTES;
    volatile uint32_t& has_some = reinterpret_cast<volatile uint32_t*>(shared + S::NONFINITE)[stage];
    const int thread = threadIdx.x - WARPGROUP;
    uint32_t found = 0;
#pragma unroll 4
    for (int at = thread * 16; at < BYTES; at += S::CONSUMERS * 16) {
        const uint4 words = *reinterpret_cast<const uint4*>(tile + at);
        found |= nonfinite<T>(words.x) | nonfinite<T>(words.y) | nonfinite<T>(words.z) | nonfinite<T>(words.w);
    }
    if (found != 0) has_some = 1;
    ptx::barrier_sync(BARRIER_VALUES, S::CONSUMERS);
    if (ptx::uniform(has_some) == 0) return;
    add();
    // Every warp has added what it sees.
    ptx::barrier_sync(BARRIER_VALUES, S::CONSUMERS);
#pragma unroll 1
    for (int at = thread * 4; at < BYTES; at += S::CONSUMERS * 4) {
        uint32_t& pair = *reinterpret_cast<uint32_t*>(tile + at);
        const uint32_t signs = nonfinite<T>(pair);
        // A sign bit becomes all bits of its half.
        if (signs != 0) pair &= ~((signs >> 15) * 0xffff);
    }
    ptx::fence_async_proxy();
    ptx::barrier_sync(BARRIER_VALUES, S::CONSUMERS);
}

// Adds the values of a tile that are NaN or infinite to this lane's rows.
template <typename S>
__device__ inline void add_nonfinite(float (&acc)[S::D / 8][4], const unsigned char* tile, const RangedTileKeys& keys, const SeenByRows& seen) {
    using T = typename S::T;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = 0; row < S::TILE_N; ++row) {
        const int key = keys.first_keys[row / GROUP_ROWS] + row % GROUP_ROWS;
        const bool sees[2] = {seen.sees(0, key), seen.sees(1, key)};
#pragma unroll
        for (int chunk = 0; chunk < S::D / 8; ++chunk) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + S::TileKV::offset(row, chunk) + lane % 4 * 4);
            const uint32_t signs = nonfinite<T>(pair);
            if (signs == 0) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (!sees[half]) continue;
                if (signs & 0x8000) acc[chunk][2 * half] += Pair<T>::low(pair);
                if (signs & 0x80000000) acc[chunk][2 * half + 1] += Pair<T>::high(pair);
            }
        }
    }
}

}  // namespace sm90
