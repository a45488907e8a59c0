// Attention forward for SM100 (Blackwell): tcgen05 products with accumulators in tensor memory, the
// copy engine (TMA), a warp or warpgroup for each task, as in FlashAttention-4 (Zadouri et al.,
// 2026). Persistent blocks of 16 warps, which take two tiles of 128 query rows of a head at a time.
//
//   warps 0-3, 4-7   softmax of tile 0, 1    a thread owns a row: scores from tensor memory, probabilities back into it
//   warps 8-11       correction              rescales outputs where a maximum has grown; in the end divides and stores them
//   warp 12          products                S = Q·Kᵀ and O += P·V of both tiles
//   warp 13          loads                   what the next tiles are; copies Q, K, V
//   warp 14          zeroing                 zeroes masked rows of V
//   warp 15          zeros                   writes zeros to rows in no query tile
//
//   tensor memory, columns          one step of keys, seen by the tensor cores
//     0   S₀, then P₀ in its place    S₀│ O₀+=P₀·V │ S₀'│ O₁+=P₁·V │ S₁'│
//     128 S₁, then P₁                        tile 1's softmax  │ tile 0's softmax │ ...
//     256 O₀
//     384 O₁
//
// Two tiles keep the tensor cores busy: while one's products run, the other's softmax does. The
// tensor cores work in the order of issue: the scores of a step may take the place of the
// probabilities of the step before as soon as its product is issued.
//
// Barriers say that something is full or free. Waits are for a phase, and no barrier can get two
// phases ahead of a warp that waits for it:
//
//   loads ──FULL_Q, FULL_K, FULL_V──▶ products ──SCORES──▶ softmax ──FACTORS──▶ correction ──RESCALED──▶ products
//         ◀─FREE_Q, FREE_K, FREE_V──           ◀──PROBS───         ───SUMS────▶            ◀──OUTPUT────
//                                                                                           ──FREE_OUTPUT▶
//
// Masks work as in the sm90 kernel: `TileRows` and `TileKeys` describe each query and key tile to
// the other warps. So do key ranges, whose entries are others, with what `unseen.cuh` has.
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/tcgen05.cuh"
#include "../../ptx/warpgroup.cuh"
#include "../tile_lists.cuh"
#include "block.cuh"
#include "correction.cuh"
#include "loader.cuh"
#include "mma.cuh"
#include "softmax.cuh"
#include "unseen.cuh"

namespace sm100 {

template <typename S>
__device__ inline void init_barriers(uint32_t base, bool zeroes_values) {
    // Warps of a warpgroup arrive one by one.
    constexpr int WARPS = 4;
    const int helpers = zeroes_values ? 1 : 0;
    for (int slot = 0; slot < ROWS_SLOTS; ++slot) {
        ptx::mbarrier_init(base + S::FULL_ROWS + 8 * slot, 1);
        ptx::mbarrier_init(base + S::FREE_ROWS + 8 * slot, (TILES + 1) * WARPS + 1 + helpers);
    }
    for (int slot = 0; slot < KEYS_SLOTS; ++slot) {
        ptx::mbarrier_init(base + S::FULL_KEYS + 8 * slot, 1);
        ptx::mbarrier_init(base + S::FREE_KEYS + 8 * slot, TILES * WARPS + helpers);
    }
    for (int stage = 0; stage < S::STAGES; ++stage) {
        for (const int barrier : {S::FULL_K, S::FREE_K, S::FULL_V, S::FREE_V, S::RAW_V}) ptx::mbarrier_init(base + barrier + 8 * stage, 1);
    }
    for (int t = 0; t < TILES; ++t) {
        for (const int barrier : {S::FULL_Q, S::FREE_Q, S::SCORES, S::OUTPUT}) ptx::mbarrier_init(base + barrier + 8 * t, 1);
        for (const int barrier : {S::PROBS, S::FACTORS_FULL, S::RESCALED, S::SUMS, S::FREE_SUMS, S::FREE_OUTPUT}) {
            ptx::mbarrier_init(base + barrier + 8 * t, WARPS);
        }
    }
    if constexpr (S::RANGED) {
        for (int slot = 0; slot < ROWS_SLOTS; ++slot) ptx::mbarrier_init(base + S::CHECKED + 8 * slot, 1);
    }
    ptx::mbarrier_init_fence();
}

template <typename S>
__device__ inline void attention(const typename S::Params& all_params, const TileListParams& params) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = ptx::shared_address(shared);
    // A shuffle, so that the compiler knows the value to be the same for all lanes.
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    const bool zeroes_values = S::RANGED || params.form != FORM_DENSE;
    if (threadIdx.x == 0) {
        // The swizzle of the tensor cores and the copy engine follows the address.
        if (base % 1024 != 0) __trap();
        init_barriers<S>(base, zeroes_values);
    }
    if (warp == 12) ptx::tensor_alloc(base + S::TENSOR, ptx::TENSOR_COLUMNS);
    ptx::tensor_fence_before();
    __syncthreads();
    ptx::tensor_fence_after();
    const uint32_t tensor = *reinterpret_cast<const volatile uint32_t*>(shared + S::TENSOR);
    const Block<S> block = {all_params, params, shared, base};
    if (warp < 8) {
        ptx::take_registers<SOFTMAX_REGISTERS>();
        SoftmaxWarpgroup<S>(block, tensor, warp / 4).run();
    } else if (warp < 12) {
        ptx::release_registers<CORRECTION_REGISTERS>();
        CorrectionWarpgroup<S>(block, tensor).run();
    } else {
        ptx::release_registers<OTHER_REGISTERS>();
        if (warp == 12) {
            ProductWarp<S>(block, tensor).run();
        } else if (warp == 13) {
            LoadWarp<S>(block).run();
        } else if (warp == 14) {
            if (zeroes_values) zero_masked_values<S>(block);
        } else {
            write_zero_spans<typename S::T, S::D>(params, threadIdx.x % 32, 32);
        }
    }
    // No thread uses tensor memory any more.
    __syncthreads();
    if (warp == 12) ptx::tensor_free(tensor, ptx::TENSOR_COLUMNS);
}

// attention_sm100_{f16, bf16}_d{head_dim}, and the same with key ranges: .._ranged
#define VARLEN_FA_ENTRY(NAME, ...)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ TileListParams params) { \
        attention<Shape<__VA_ARGS__>>(params, params);                                                             \
    }
#define VARLEN_FA_RANGED_ENTRY(NAME, ...)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ RangedTileListParams params) { \
        attention<Shape<__VA_ARGS__, true>>(params, params.lists);                                                       \
    }
#define VARLEN_FA_ENTRIES(D, STAGES)                                                   \
    VARLEN_FA_ENTRY(attention_sm100_f16_d##D, __half, D, STAGES)                       \
    VARLEN_FA_ENTRY(attention_sm100_bf16_d##D, __nv_bfloat16, D, STAGES)               \
    VARLEN_FA_RANGED_ENTRY(attention_sm100_f16_d##D##_ranged, __half, D, STAGES)       \
    VARLEN_FA_RANGED_ENTRY(attention_sm100_bf16_d##D##_ranged, __nv_bfloat16, D, STAGES)
VARLEN_FA_SM100_TILES(VARLEN_FA_ENTRIES)

}  // namespace sm100
