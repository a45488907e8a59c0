// The warpgroup that rescales the outputs of the sm100 kernel and stores them.
#pragma once
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/mma.cuh"
#include "../../ptx/packed_f32.cuh"
#include "../../ptx/tcgen05.cuh"
#include "../../ptx/tma.cuh"
#include "block.cuh"
#include "unseen.cuh"

namespace sm100 {

// Rescales outputs in tensor memory where the softmax says so, and stores them at the end.
template <typename S>
struct CorrectionWarpgroup {
    Block<S> block;
    // The outputs of this thread's warp in tensor memory.
    uint32_t tensor;
    int warp;
    int lane;
    // Rescales and work items of each tile so far.
    uint32_t rescale_uses[TILES] = {};
    uint32_t work_uses[TILES] = {};

    using T = typename S::T;

    __device__ CorrectionWarpgroup(const Block<S>& block, uint32_t tensor)
        : block(block), tensor(tensor + (threadIdx.x / 32 % 4 * 32 << 16) + S::OUTPUT_COLUMN), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

    __device__ void run() {
        for (uint32_t work_index = 0;; ++work_index) {
            const volatile auto& rows = block.wait_rows(work_index);
            const int key_tiles = rows.key_tiles;
            if (key_tiles < 0) break;
            const int tiles = rows.tiles;
            for (int i = 1; i < key_tiles && tiles > 0; ++i) {
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    if (t < tiles) rescale(t);
                }
            }
            if constexpr (S::RANGED) block.wait_checked(work_index);
#pragma unroll
            for (int t = 0; t < TILES; ++t) store(t, rows, t < tiles);
            block.leave_rows(work_index);
        }
        // Shared memory must stay until the copy engine has read it.
        if (lane == 0) ptx::tma_store_wait_read();
    }

    __device__ void rescale(int t) {
        block.wait_full(S::FACTORS_FULL + 8 * t, rescale_uses[t]++);
        const float factor = reinterpret_cast<const volatile float*>(block.shared + S::FACTORS)[t * TILE_M + warp * 32 + lane];
        // True for NaN too.
        if (__any_sync(0xffffffff, factor != 1.0f)) {
            ptx::tensor_fence_after();
#pragma unroll
            for (int part = 0; part < S::D / 32; ++part) {
                uint32_t values[32];
                ptx::tensor_load(values, tensor + t * S::OUTPUT_STEP + part * 32);
                ptx::tensor_wait_load(values);
#pragma unroll
                for (int i = 0; i < 32; i += 2) {
                    const float2 scaled = ptx::multiply_pair({__uint_as_float(values[i]), __uint_as_float(values[i + 1])}, {factor, factor});
                    values[i] = __float_as_uint(scaled.x);
                    values[i + 1] = __float_as_uint(scaled.y);
                }
                ptx::tensor_store(tensor + t * S::OUTPUT_STEP + part * 32, values);
            }
            ptx::tensor_wait_store();
            ptx::tensor_fence_before();
        }
        block.arrive(S::RESCALED + 8 * t);
    }

    // Stores a tile's output, or zeros if there were no keys. It leaves through shared memory by
    // the copy engine; or by 16-byte stores, where the copy engine would write rows of the next
    // sequence. A warp stores the 32 rows that it reaches.
    __device__ void store(int t, const volatile typename S::Rows& rows, bool is_computed) {
        if (!is_computed && rows.groups[t * TILE_GROUPS].rows == 0) return;
        float inverse = 0.0f;
        if (is_computed) {
            block.wait_full(S::SUMS + 8 * t, work_uses[t]);
            inverse = reinterpret_cast<const volatile float*>(block.shared + S::INVERSES)[t * TILE_M + warp * 32 + lane];
            block.arrive(S::FREE_SUMS + 8 * t);
            block.wait_full(S::OUTPUT + 8 * t, work_uses[t]++);
            ptx::tensor_fence_after();
            if constexpr (S::RANGED) {
                if (rows.has_nonfinite) add_nonfinite(block, rows, tensor + t * S::OUTPUT_STEP, t * TILE_GROUPS + warp * 2);
            }
        }
        // This warp's last output has left.
        if (lane == 0) ptx::tma_store_wait_read();
        __syncwarp();
#pragma unroll
        for (int part = 0; part < S::D / 32; ++part) {
            uint32_t values[32] = {};
            if (is_computed) {
                ptx::tensor_load(values, tensor + t * S::OUTPUT_STEP + part * 32);
                ptx::tensor_wait_load(values);
            }
#pragma unroll
            for (int chunk = 0; chunk < 4; ++chunk) {
                uint32_t words[4];
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    const int at = chunk * 8 + word * 2;
                    // Selected, not multiplied: a masked row may hold NaN.
                    const float low = inverse == 0.0f ? 0.0f : __uint_as_float(values[at]) * inverse;
                    const float high = inverse == 0.0f ? 0.0f : __uint_as_float(values[at + 1]) * inverse;
                    words[word] = ptx::pack_pair<T>(low, high);
                }
                *reinterpret_cast<uint4*>(block.shared + S::OUT + S::Tile::offset(warp * 32 + lane, part * 4 + chunk)) =
                    uint4{words[0], words[1], words[2], words[3]};
            }
        }
        if (is_computed) {
            ptx::tensor_fence_before();
            block.arrive(S::FREE_OUTPUT + 8 * t);
        }
        ptx::fence_async_proxy();
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) store_group(rows, rows.groups[t * TILE_GROUPS + warp * 2 + half], warp * 32 + half * GROUP_ROWS);
        if (lane == 0) ptx::tma_store_commit();
    }

    // Stores a group of rows, which lies in the output tile from row `first` on.
    __device__ void store_group(const volatile TileRows& rows, const volatile RowGroup& group, int first) const {
        const int count = group.rows;
        const int first_row = group.first_row;
        if (count == 0) return;
        if (rows.clips || count == GROUP_ROWS) {
            if (lane == 0) {
#pragma unroll
                for (int panel = 0; panel < S::PANELS; ++panel) {
                    ptx::tma_store(&block.params.out_map, block.base + S::OUT + (panel * TILE_M + first) * S::ROW_BYTES, panel * S::PANEL,
                                   first_row, rows.head, rows.batch);
                }
            }
            return;
        }
        const Strides& strides = block.params.out_strides;
        T* const out = static_cast<T*>(block.params.out) + first_row * strides.token + rows.head * strides.head;
        for (int index = lane; index < count * (S::D / 8); index += 32) {
            const int row = index / (S::D / 8);
            const int chunk = index % (S::D / 8);
            if (chunk * 8 < block.params.head_dim) {
                *reinterpret_cast<uint4*>(out + row * strides.token + chunk * 8) =
                    *reinterpret_cast<const uint4*>(block.shared + S::OUT + S::Tile::offset(first + row, chunk));
            }
        }
    }
};

}  // namespace sm100
