// The warp that issues the products of the sm100 kernel.
#pragma once
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/tcgen05.cuh"
#include "block.cuh"

namespace sm100 {

// Issues the products of both tiles.
template <typename S>
struct ProductWarp {
    Block<S> block;
    uint32_t tensor;

    using T = typename S::T;
    using Matrix = ptx::OperandMatrix<S::ROW_BYTES>;
    // Uses of each tile so far: by work items, by steps, and by steps that come after another.
    uint32_t work_uses[TILES] = {};
    uint32_t step_uses[TILES] = {};
    uint32_t rescale_uses[TILES] = {};

    __device__ ProductWarp(const Block<S>& block, uint32_t tensor) : block(block), tensor(tensor) {}

    // S = Q·Kᵀ
    __device__ void issue_scores(int t, int stage) const {
        constexpr uint32_t PRODUCT = ptx::Product<T, TILE_N, ptx::Contiguous::SUMMED>::DESCRIPTOR;
        const Matrix q(block.base + S::Q + t * S::Tile::BYTES, 16);
        const Matrix k(block.base + S::K + stage * S::Tile::BYTES, 16);
#pragma unroll
        for (int step = 0; step < S::D / 16; ++step) {
            const int from = step * 16 / S::PANEL * TILE_M * S::ROW_BYTES + step * 16 % S::PANEL * 2;
            ptx::multiply(tensor + S::SCORES_COLUMN + t * TILE_N, q.at(from), k.at(from), PRODUCT, step > 0);
        }
    }

    // O += P·V
    __device__ void issue_output(int t, int stage, bool accumulate) const {
        constexpr uint32_t PRODUCT = ptx::Product<T, S::D, ptx::Contiguous::OTHER>::DESCRIPTOR;
        const Matrix v(block.base + S::V + stage * S::Tile::BYTES, TILE_N * S::ROW_BYTES);
#pragma unroll
        for (int step = 0; step < TILE_N / 16; ++step) {
            // A column holds two probabilities.
            const uint32_t probs = tensor + S::SCORES_COLUMN + t * TILE_N + step * 8;
            ptx::multiply(tensor + S::OUTPUT_COLUMN + t * S::OUTPUT_STEP, probs, v.at(step * 16 * S::ROW_BYTES), PRODUCT, accumulate || step > 0);
        }
    }

    __device__ void commit(int barrier) const { ptx::commit_products(block.base + barrier); }

    // Issues the scores of a step. After the last ones, the queries are free.
    __device__ void start_step(int t, int stage, bool is_last) const {
        issue_scores(t, stage);
        commit(S::SCORES + 8 * t);
        if (is_last) commit(S::FREE_Q + 8 * t);
    }

    __device__ void wait_keys(PipelineState<S::STAGES> state) const { ptx::mbarrier_wait(block.base + S::FULL_K + 8 * state.stage(), state.parity()); }

    __device__ void run() {
        PipelineState<S::STAGES> state;
        for (uint32_t work_index = 0;; ++work_index) {
            const volatile TileRows& rows = block.wait_rows(work_index);
            const int key_tiles = rows.key_tiles;
            const int tiles = rows.tiles;
            block.leave_rows(work_index);
            if (key_tiles < 0) return;
            if (tiles == 0) continue;
            wait_keys(state);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t >= tiles) break;
                block.wait_full(S::FULL_Q + 8 * t, work_uses[t]);
                ptx::tensor_fence_after();
                start_step(t, state.stage(), key_tiles == 1);
            }
            commit(S::FREE_K + 8 * state.stage());
            for (int i = 0; i < key_tiles; ++i) {
                const PipelineState<S::STAGES> next = {state.count + 1};
                const bool is_last = i + 1 == key_tiles;
                ptx::mbarrier_wait(block.base + S::FULL_V + 8 * state.stage(), state.parity());
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    if (t >= tiles) break;
                    block.wait_full(S::PROBS + 8 * t, step_uses[t]++);
                    if (i == 0) {
                        block.wait_free(S::FREE_OUTPUT + 8 * t, work_uses[t]);
                    } else {
                        block.wait_full(S::RESCALED + 8 * t, rescale_uses[t]++);
                    }
                    ptx::tensor_fence_after();
                    issue_output(t, state.stage(), i > 0);
                    if (is_last) {
                        commit(S::OUTPUT + 8 * t);
                    } else {
                        if (t == 0) wait_keys(next);
                        start_step(t, next.stage(), i + 2 == key_tiles);
                    }
                }
                commit(S::FREE_V + 8 * state.stage());
                if (!is_last) commit(S::FREE_K + 8 * next.stage());
                state = next;
            }
#pragma unroll
            for (int t = 0; t < TILES; ++t) work_uses[t] += t < tiles;
        }
    }
};

}  // namespace sm100
