// Attention forward for SM90 (Hopper): wgmma, the copy engine (TMA), warp specialisation.
// Persistent blocks of one producer warpgroup and two or three consumer warpgroups, 64 query rows
// each, as in FlashAttention-3 (Shah et al., 2024).
//
//                   work list                             shared memory
//   producer  warp 0 ────────▶ copy engine ──▶  Q Q │ K K │        two to four stages of K and V; full and empty barriers for each.
//             warp 3 ────────▶ copy engine ─────────────▶ V V      Where there is room for two query tiles, the next one is
//             warp 1 zeroes masked rows of V ─────────────┘        loaded early, and an output takes its tile's place; else
//             warp 2 writes the rows without a query tile as zeros that of V
//
//   consumers, taking turns, S the scores of the next key tile, O the product of this one
//     0   S₁ O₀  softmax₁  S₂ O₁  softmax₂  S₃ O₂ ...
//     1          S₁ O₀  softmax₁  S₂ O₁  softmax₂ ...
//
// The tensor cores have to be fed while a softmax runs, which takes about as long as two products.
// A consumer issues the scores of the next tile together with the product of this one, and
// another's softmax runs under both. The loop has no branch but its barriers, and the compiler
// knows that the consumers' counters are uniform, so that descriptors stay in uniform registers.
// Therefore masked tiles come first, in a separate loop; and scores beyond the range of the fast
// softmax are noticed only at the end, when the block computes all its tiles again with the exact
// softmax. Query tiles of a last wave that would leave multiprocessors idle are split by keys.
// docs/ has the measurements.
//
// One kernel serves dense, packed and fused calls. Only the producer knows which: it describes each
// query tile (`TileRows`) and each key tile (`TileKeys`) to the consumers in shared memory, along
// with the data. Scores are masked only in tiles that need it. Rows of V that are not kept hold
// anything, NaN included, and P·V multiplies them by zero. Where the copy engine does not write
// zeros, warp 1 of the producer does, before consumers see the tile.
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/warpgroup.cuh"
#include "../tile_lists.cuh"
#include "block.cuh"
#include "consumer.cuh"
#include "producer.cuh"

namespace sm90 {

// `segments` is null without segments.
template <typename S>
__device__ inline void attention(const TileListParams& params, const SegmentTable* segments) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = ptx::uniform(ptx::shared_address(shared));
    const int warp = ptx::uniform(threadIdx.x / 32);
    if (threadIdx.x == 0) {
        // The swizzle of the tensor cores and the copy engine follows the address.
        if (base % 1024 != 0) __trap();
        const int helpers = params.form == FORM_DENSE ? 0 : 1;
        for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) {
            for (int work_index = 0; work_index < S::QUERY_TILES; ++work_index) {
                ptx::mbarrier_init(base + S::full_q(work_index, warpgroup), 1);
                ptx::mbarrier_init(base + S::empty_q(work_index, warpgroup), warpgroup == 0 ? 4 + helpers : 4);
            }
        }
        for (int stage = 0; stage < S::STAGES; ++stage) {
            ptx::mbarrier_init(base + S::FULL_K + 8 * stage, 1);
            ptx::mbarrier_init(base + S::EMPTY_K + 8 * stage, S::RELEASING_BLOCKS * S::CONSUMER_WARPS + helpers);
            ptx::mbarrier_init(base + S::FULL_V + 8 * stage, 1);
            ptx::mbarrier_init(base + S::EMPTY_V + 8 * stage, S::RELEASING_BLOCKS * S::CONSUMER_WARPS);
            ptx::mbarrier_init(base + S::RAW_V + 8 * stage, 1);
            if constexpr (S::RANGED) reinterpret_cast<uint32_t*>(shared + S::NONFINITE)[stage] = 0;
        }
        if constexpr (S::OUTPUT_IN_VALUES) {
            for (int warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) {
                *reinterpret_cast<uint32_t*>(shared + S::outputs_left(warpgroup)) = 0;
            }
        }
        ptx::mbarrier_init_fence();
        *reinterpret_cast<uint32_t*>(shared + S::OUT_OF_RANGE) = 0;
    }
    if constexpr (S::PAIRED) {
        ptx::cluster_sync();
    } else {
        __syncthreads();
    }
    if (warp < 4) {
        ptx::release_registers<S::PRODUCER_REGISTERS>();
        if (S::SEGMENTED && warp == 0) {
            // Segments take longer to find by code that serves both warps.
            Producer<S>(false, params, segments, shared, base).run();
        } else if (S::SEGMENTED && warp == 3) {
            Producer<S>(true, params, segments, shared, base).run();
        } else if (!S::SEGMENTED && (warp == 0 || warp == 3)) {
            // One call, so that both run the same code.
            Producer<S>(warp == 3, params, segments, shared, base).run();
        } else if (warp == 1 && params.form != FORM_DENSE) {
            zero_masked_values<S>(shared, base);
        } else if (warp == 2) {
            using T = typename S::T;
            const int lane = threadIdx.x % 32;
            if constexpr (S::SEGMENTED) {
                write_zero_spans<T, S::D>(params, lane, 32, [&](int row) {
                    const SegmentRow at = segment_row(segments->query_ends, row);
                    const SegmentOutput& output = segments->outputs[at.segment];
                    return PlacedRows{output.out, output.strides, at.row};
                });
            } else {
                write_zero_spans<T, S::D>(params, lane, 32);
            }
            if (params.inv_indices != nullptr) write_masked_zeros<T, S::D>(params);
        }
    } else {
        ptx::take_registers<S::CONSUMER_REGISTERS>();
        Consumer<S>(params, segments, shared, base, S::WARPGROUPS == 1 ? 0 : warp / 4 - 1).run();
    }
}

// attention_sm90_{f16, bf16}_d{head_dim}_w{warpgroups}, and the same with key ranges: .._ranged; and
// both with tensors in segments: .._segments, .._ranged_segments. With shorter key tiles of so many
// keys: .._k{keys}, .._k{keys}_ranged; with several blocks a multiprocessor: .._narrow_ranged,
// .._small; with pairs of blocks: .._pair,
// .._k{keys}_pair
#define VARLEN_FA_ENTRY(NAME, THREADS, ...)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, (Shape<__VA_ARGS__>::BLOCKS))                             \
        NAME(const __grid_constant__ TileListParams params) {                                                      \
        attention<Shape<__VA_ARGS__>>(params, nullptr);                                                            \
    }
#define VARLEN_FA_SEGMENTS_ENTRY(NAME, THREADS, ...)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ SegmentedTileListParams params) { \
        attention<Shape<__VA_ARGS__>>(params.lists, &params.segments);                                                      \
    }
#define VARLEN_FA_TYPES(ENTRY, NAME, D, WARPGROUPS, ...)                                       \
    ENTRY(attention_sm90_f16_##NAME, (WARPGROUPS + 1) * 128, __half, D, WARPGROUPS, __VA_ARGS__) \
    ENTRY(attention_sm90_bf16_##NAME, (WARPGROUPS + 1) * 128, __nv_bfloat16, D, WARPGROUPS, __VA_ARGS__)
#define VARLEN_FA_ENTRIES(D, WARPGROUPS, ...)                                                                                        \
    VARLEN_FA_TYPES(VARLEN_FA_ENTRY, d##D##_w##WARPGROUPS, D, WARPGROUPS, __VA_ARGS__)                                                \
    VARLEN_FA_TYPES(VARLEN_FA_ENTRY, d##D##_w##WARPGROUPS##_ranged, D, WARPGROUPS, __VA_ARGS__, true)                                 \
    VARLEN_FA_TYPES(VARLEN_FA_SEGMENTS_ENTRY, d##D##_w##WARPGROUPS##_segments, D, WARPGROUPS, __VA_ARGS__, false, true)               \
    VARLEN_FA_TYPES(VARLEN_FA_SEGMENTS_ENTRY, d##D##_w##WARPGROUPS##_ranged_segments, D, WARPGROUPS, __VA_ARGS__, true, true)
VARLEN_FA_SM90_TILES(VARLEN_FA_ENTRIES)
#define VARLEN_FA_SHORT_ENTRIES(D, WARPGROUPS, KEYS, ...) \
    VARLEN_FA_TYPES(VARLEN_FA_ENTRY, d##D##_w##WARPGROUPS##_k##KEYS, D, WARPGROUPS, KEYS, __VA_ARGS__)
VARLEN_FA_SM90_SHORT_TILES(VARLEN_FA_SHORT_ENTRIES)
#define VARLEN_FA_SHORT_RANGED_ENTRIES(D, WARPGROUPS, KEYS, ...) \
    VARLEN_FA_TYPES(VARLEN_FA_ENTRY, d##D##_w##WARPGROUPS##_k##KEYS##_ranged, D, WARPGROUPS, KEYS, __VA_ARGS__, true)
VARLEN_FA_SM90_SHORT_RANGED_TILES(VARLEN_FA_SHORT_RANGED_ENTRIES)
#define VARLEN_FA_NARROW_ENTRIES(D, WARPGROUPS, KEYS, QUERY_TILES, STAGES, BLOCKS)                                                \
    VARLEN_FA_TYPES(VARLEN_FA_ENTRY, d##D##_w##WARPGROUPS##_narrow_ranged, D, WARPGROUPS, KEYS, QUERY_TILES, STAGES, true, false, \
                    BLOCKS)
VARLEN_FA_SM90_NARROW_TILES(VARLEN_FA_NARROW_ENTRIES)
#define VARLEN_FA_SMALL_ENTRIES(D, WARPGROUPS, KEYS, QUERY_TILES, STAGES, BLOCKS)                                              \
    VARLEN_FA_TYPES(VARLEN_FA_ENTRY, d##D##_w##WARPGROUPS##_small, D, WARPGROUPS, KEYS, QUERY_TILES, STAGES, false, false, BLOCKS)
VARLEN_FA_SM90_SMALL_TILES(VARLEN_FA_SMALL_ENTRIES)
#define VARLEN_FA_PAIR_ENTRY(NAME, THREADS, ...)                                                \
    extern "C" __global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(THREADS, 1)         \
        NAME(const __grid_constant__ TileListParams params) {                                   \
        attention<Shape<__VA_ARGS__, false, false, 1, true>>(params, nullptr);                  \
    }
#define VARLEN_FA_PAIR_ENTRIES(D, WARPGROUPS, ...) \
    VARLEN_FA_TYPES(VARLEN_FA_PAIR_ENTRY, d##D##_w##WARPGROUPS##_pair, D, WARPGROUPS, __VA_ARGS__)
VARLEN_FA_SM90_PAIR_TILES(VARLEN_FA_PAIR_ENTRIES)
#define VARLEN_FA_SHORT_PAIR_ENTRIES(D, WARPGROUPS, KEYS, ...) \
    VARLEN_FA_TYPES(VARLEN_FA_PAIR_ENTRY, d##D##_w##WARPGROUPS##_k##KEYS##_pair, D, WARPGROUPS, KEYS, __VA_ARGS__)
VARLEN_FA_SM90_SHORT_PAIR_TILES(VARLEN_FA_SHORT_PAIR_ENTRIES)

}  // namespace sm90
