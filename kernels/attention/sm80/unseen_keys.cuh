// Keys that some queries of a tile see and others do not: their scores are -inf for the queries that
// do not see them. A weight of 0 times NaN is NaN on the tensor cores, so values that are NaN or
// infinite are taken out of the tile, and added to the rows that see them by ordinary arithmetic.
#pragma once
#include <cstdint>

#include "../nonfinite.cuh"

// Scores of keys that a query does not see become -inf. `seen` gives the range of a row of the
// warp's.
template <int M_TILES, int N_TILES, typename Seen>
__device__ inline void hide_unseen(float (&scores)[M_TILES][N_TILES][4], int first_key, Seen seen) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int2 range = seen(m * 16 + half * 8 + lane / 4);
            const int own = first_key + lane % 4 * 2;
            const int first = range.x - own;
            const int end = range.y - own;
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    // Selected: a score may be NaN.
                    if (n * 8 + i < first || n * 8 + i >= end) scores[m][n][2 * half + i] = -INFINITY;
                }
            }
        }
    }
}

// Whether this thread's part of a tile holds NaN or infinities.
template <typename T, int THREADS, typename TileV>
__device__ inline bool holds_nonfinite(const unsigned char* tile) {
    uint32_t found = 0;
#pragma unroll 4
    for (int at = threadIdx.x * 16; at < TileV::BYTES; at += THREADS * 16) {
        const uint4 words = *reinterpret_cast<const uint4*>(tile + at);
        found |= nonfinite<T>(words.x) | nonfinite<T>(words.y) | nonfinite<T>(words.z) | nonfinite<T>(words.w);
    }
    return found != 0;
}

// Adds the values of a tile that are NaN or infinite to the rows that see them, whatever their
// weights, which are above 0.
template <typename T, typename TileV, int M_TILES, int O_TILES, typename Seen>
__device__ inline void add_nonfinite(float (&acc)[M_TILES][O_TILES][4], const unsigned char* tile, int first_key, Seen seen) {
    const int lane = threadIdx.x % 32;
    // The first key of the tile that each row sees, and above it how many: every register is taken.
    uint32_t ranges[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int2 range = seen(m * 16 + half * 8 + lane / 4);
            const int first = max(range.x - first_key, 0);
            const int count = max(min(range.y - first_key, TileV::ROWS) - first, 0);
            ranges[m][half] = min(first, TileV::ROWS) | count << 16;
        }
    }
#pragma unroll 1
    for (int row = 0; row < TileV::ROWS; ++row) {
#pragma unroll
        for (int o = 0; o < O_TILES; ++o) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + TileV::offset(row, o) + lane % 4 * 4);
            const uint32_t signs = nonfinite<T>(pair);
            if (signs == 0) continue;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (row - (ranges[m][half] & 0xffff) >= ranges[m][half] >> 16) continue;
                    if (signs & 0x8000) acc[m][o][2 * half] += Pair<T>::low(pair);
                    if (signs & 0x80000000) acc[m][o][2 * half + 1] += Pair<T>::high(pair);
                }
            }
        }
    }
}

// Puts zeros in place of NaN and infinities in this thread's part of a tile.
template <typename T, int THREADS, typename TileV>
__device__ inline void zero_nonfinite(unsigned char* tile) {
#pragma unroll 1
    for (int at = threadIdx.x * 4; at < TileV::BYTES; at += THREADS * 4) {
        uint32_t& pair = *reinterpret_cast<uint32_t*>(tile + at);
        const uint32_t signs = nonfinite<T>(pair);
        // A sign bit becomes all bits of its half.
        if (signs != 0) pair &= ~((signs >> 15) * 0xffff);
    }
}
