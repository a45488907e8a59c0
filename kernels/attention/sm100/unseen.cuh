// Key ranges in the sm100 kernel: keys that some queries of a tile see and others do not. A thread of
// the softmax has a bit for each key that its row sees. A weight of 0 times NaN is NaN, so the warp
// that zeroes masked rows of V searches the values of masked tiles too. Those that are NaN or infinite
// become zeros for the products. That is rare, and then the correction adds them to the outputs of the
// rows that see them by ordinary arithmetic, from where they lie.
#pragma once
#include "../../ptx/tcgen05.cuh"
#include "../nonfinite.cuh"
#include "block.cuh"

namespace sm100 {

// The keys that a row sees, one of a group of the query tiles. Rows that do not exist see nothing.
template <typename S>
__device__ inline int2 seen_range(const Block<S>& block, const volatile RangedTileRows& rows, int group, int row) {
    if (row >= rows.groups[group].rows) return make_int2(0, 0);
    const KeyRangeParams& params = block.params.ranges;
    const int64_t query = rows.batch * params.row_stride + rows.groups[group].first_row + row;
    return __ldg(reinterpret_cast<const int2*>(params.ranges) + query);
}

// Of the keys from `first` on, a bit for each of 16 that a row sees.
__device__ inline uint32_t seen_bits(int2 range, int first) {
    const auto below = [&](int key) { return (1u << min(max(key - first, 0), static_cast<int>(GROUP_ROWS))) - 1; };
    return below(range.y) & ~below(range.x);
}

// A bit for each key of a tile that is kept and that this thread's row sees. The rows of its query tile
// are those of the groups from `first_group` on.
template <typename S>
__device__ inline void seen_keys(const Block<S>& block, const volatile RangedTileRows& rows, int first_group, const volatile RangedTileKeys& keys,
                                 uint32_t (&seen)[4]) {
    const int row = threadIdx.x % WARPGROUP;
    const int2 range = seen_range(block, rows, first_group + row / GROUP_ROWS, row % GROUP_ROWS);
    const int tile = keys.tile;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        int2 starts = make_int2(tile + part * 32, tile + part * 32 + GROUP_ROWS);
        if (tile < 0) starts = __ldg(reinterpret_cast<const int2*>(block.params.key_groups) + ~tile * (TILE_N / GROUP_ROWS / 2) + part);
        seen[part] = keys.kept[part] & (seen_bits(range, starts.x) | seen_bits(range, starts.y) << GROUP_ROWS);
    }
}

// Takes values that are NaN or infinite out of a tile. Called by a whole warp; true if there were some.
template <typename S>
__device__ inline bool take_out_nonfinite(unsigned char* tile) {
    using T = typename S::T;
    const int lane = threadIdx.x % 32;
    uint32_t found = 0;
#pragma unroll 4
    for (int at = lane * 16; at < S::Tile::BYTES; at += 32 * 16) {
        const uint4 words = *reinterpret_cast<const uint4*>(tile + at);
        found |= nonfinite<T>(words.x) | nonfinite<T>(words.y) | nonfinite<T>(words.z) | nonfinite<T>(words.w);
    }
    if (!__any_sync(0xffffffff, found != 0)) return false;
#pragma unroll 1
    for (int at = lane * 4; at < S::Tile::BYTES; at += 32 * 4) {
        uint32_t& pair = *reinterpret_cast<uint32_t*>(tile + at);
        // A sign bit becomes all bits of its half.
        pair &= ~((nonfinite<T>(pair) >> 15) * 0xffff);
    }
    return true;
}

// Adds values that are NaN or infinite to the outputs of the rows that see them, whatever their
// weights, which are above 0. Called by a warp of the correction, whose 32 rows are those of two groups;
// `tensor` is their output. Values of tiles that were not masked are in it already, and stay what they
// are when they are added again.
template <typename S>
__device__ inline void add_nonfinite(const Block<S>& block, const volatile RangedTileRows& rows, uint32_t tensor, int first_group) {
    using T = typename S::T;
    const TileListParams& params = block.params;
    const int lane = threadIdx.x % 32;
    const int2 range = seen_range(block, rows, first_group + lane / GROUP_ROWS, lane % GROUP_ROWS);
    const bool sees_some = range.x < range.y;
    const int first = __reduce_min_sync(0xffffffff, sees_some ? range.x : INT32_MAX);
    const int end = __reduce_max_sync(0xffffffff, sees_some ? range.y : 0);
    const Strides& strides = block.all_params.value_strides;
    const int batch = rows.batch;
    const T* const values = static_cast<const T*>(block.all_params.values) + batch * strides.batch + rows.first_key * strides.token +
                            rows.head / params.group_size * strides.head;
#pragma unroll 1
    for (int column = 0; column < params.head_dim; column += 32) {
        uint32_t sums[32];
        ptx::tensor_load(sums, tensor + column);
        ptx::tensor_wait_load(sums);
#pragma unroll 1
        for (int before = first; before < end; before += 32) {
            const int key = before + lane;
            uint32_t words[16] = {};
            uint32_t found = 0;
            if (key < end && (group_bits(params.key_bits, params.key_words, batch, key) & 1) != 0) {
                const T* const value = values + key * strides.token + column;
#pragma unroll
                for (int chunk = 0; chunk < 4; ++chunk) {
                    if (column + chunk * 8 >= params.head_dim) break;
                    const uint4 four = __ldg(reinterpret_cast<const uint4*>(value + chunk * 8));
                    words[chunk * 4] = four.x;
                    words[chunk * 4 + 1] = four.y;
                    words[chunk * 4 + 2] = four.z;
                    words[chunk * 4 + 3] = four.w;
                }
#pragma unroll
                for (int word = 0; word < 16; ++word) found |= nonfinite<T>(words[word]);
            }
#pragma unroll 1
            for (uint32_t lanes = __ballot_sync(0xffffffff, found != 0); lanes != 0; lanes &= lanes - 1) {
                const int source = __ffs(lanes) - 1;
                const bool sees = range.x <= before + source && before + source < range.y;
#pragma unroll
                for (int word = 0; word < 16; ++word) {
                    const uint32_t pair = __shfl_sync(0xffffffff, words[word], source);
                    const uint32_t signs = sees ? nonfinite<T>(pair) : 0;
                    if (signs & 0x8000) sums[2 * word] = __float_as_uint(__uint_as_float(sums[2 * word]) + Pair<T>::low(pair));
                    if (signs & 0x80000000) sums[2 * word + 1] = __float_as_uint(__uint_as_float(sums[2 * word + 1]) + Pair<T>::high(pair));
                }
            }
        }
        ptx::tensor_store(tensor + column, sums);
        ptx::tensor_wait_store();
    }
}

}  // namespace sm100
