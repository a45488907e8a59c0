// Attention forward for SM80 and newer: mma.sync, ldmatrix, cp.async. The algorithm is
// FlashAttention-2's (Dao, 2023): a thread block keeps a tile of query rows and walks over the keys
// from the last tile to the first.
//
//                 keys, TILE_N a step  ◀──────────────
//              ┌───────┬───────┬───────┐
//   TILE_M     │       │       │ S = Q·Kᵀ in registers; P = exp2(S - max) becomes the A operand of O += P·V in place
//   rows,      │       │       │
//   a warp     └───────┴───────┴───────┘
//   16·M_TILES
//
// Keys and values of the next step are copied to shared memory while this step is computed. There
// is one barrier a step.
//
// One kernel in seven forms. Each masks the end of the last key tile:
//   PLAIN    padded tensors (grid z = batch row) or packed ones (z = sequence, cu_seqlens set)
//   MASKED   padded tensors with a key mask, a bias and rows to be written as zeros
//   FUSED    the valid rows of padded tensors. A copy to shared memory takes a row from anywhere, so tiles are made of the
//            rows that `indices` lists, and what is masked costs nothing, however short the runs are:
//
//              indices         [ 0 1 5 6 7 9 ... ]        a tile's part of it is in shared memory a step before its rows are asked for
//                                │ │ └─────┐
//              padded rows     [ █ █ · · · █ █ █ · █ ]    an output row goes back to where its query came from; a block also writes
//                                                         zeros to those of its TILE_M padded rows that are masked
//   RANGED        what PLAIN and MASKED compute, where each query sees a range of keys. A block skips
//                 key tiles that none of its queries sees, and masks scores in tiles that not all of
//                 them see whole
//   FUSED_RANGED  the same for FUSED, with rows to be written as zeros where every query is listed
//   MODIFIED, FUSED_MODIFIED  what the forms with ranges compute, or without any, with score modifiers; by lists, with a
//                 bias too
//
// Rows of more than 256 columns have the last two alone. Two warps share 16 query rows there: each
// multiplies its half of the columns of Q and K, both add up the scores through shared memory, and
// each keeps its half of the columns of O.
//
//                 columns 0 to 255     256 to 511
//   S of 16 rows  warp 0           +   warp 1          in shared memory, one step after another
//   O             warp 0               warp 1
#include "../../common/math.cuh"
#include "../../common/params.cuh"
#include "../../common/shared_tile.cuh"
#include "../../ptx/cp_async.cuh"
#include "../../ptx/mma.cuh"
#include "../../ptx/warpgroup.cuh"
#include "../key_range.cuh"
#include "mask.cuh"
#include "modifiers.cuh"
#include "seqlen.cuh"
#include "softmax.cuh"
#include "tiles.h"
#include "unseen_keys.cuh"

namespace sm80 {

// a·bᵀ of a warp over COLUMNS columns in shared memory: rows of `a` against rows of `b`.
template <typename T, int COLUMNS, int M_TILES, int N_TILES, typename TileA, typename TileB>
__device__ inline void scores_of(float (&scores)[M_TILES][N_TILES][4], uint32_t a, uint32_t b, int first_row) {
    const int lane = threadIdx.x % 32;
    const auto a_lane = TileA::lane_address(a, first_row, lane % 16, lane / 16);
    const auto b_lane = TileB::lane_address(b, 0, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; ++k) {
        uint32_t a_fragments[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            ptx::ldmatrix_x4(a_fragments[m], TileA::at(a_lane, m * 16, k * 2));
        }
#pragma unroll
        for (int n = 0; n < N_TILES; n += 2) {
            uint32_t b_fragments[4];
            ptx::ldmatrix_x4(b_fragments, TileB::at(b_lane, n * 8, k * 2));
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                ptx::mma_16x8x16<T>(scores[m][n], a_fragments[m], b_fragments[0], b_fragments[1]);
                ptx::mma_16x8x16<T>(scores[m][n + 1], a_fragments[m], b_fragments[2], b_fragments[3]);
            }
        }
    }
}

// acc += P·V, P in registers, V in shared memory.
template <typename T, int M_TILES, int N_TILES, int O_TILES, typename TileV>
__device__ inline void accumulate(float (&acc)[M_TILES][O_TILES][4], const float (&probs)[M_TILES][N_TILES][4], uint32_t v) {
    const int lane = threadIdx.x % 32;
    const auto v_lane = TileV::lane_address(v, 0, lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < N_TILES / 2; ++k) {
        uint32_t p_fragments[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = probs[m][2 * k + i / 2];
                p_fragments[m][i] = ptx::pack_pair<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (int o = 0; o < O_TILES; o += 2) {
            uint32_t v_fragments[4];
            ptx::ldmatrix_x4_trans(v_fragments, TileV::at(v_lane, k * 16, o));
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                ptx::mma_16x8x16<T>(acc[m][o], p_fragments[m], v_fragments[0], v_fragments[1]);
                ptx::mma_16x8x16<T>(acc[m][o + 1], p_fragments[m], v_fragments[2], v_fragments[3]);
            }
        }
    }
}

// Adds up the scores of two warps that share rows, each of which has the products over its part of
// the columns. Each adds up one tile of keys, so that both hold the same bits. `slots` has room for
// a tile a part; `pair` numbers the two warps, from 1 on.
__device__ inline void add_up_parts(float (&scores)[1][2][4], float4* slots, int part, int pair) {
    const int lane = threadIdx.x % 32;
    float own[4];
    float given[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        own[i] = part == 0 ? scores[0][0][i] : scores[0][1][i];
        given[i] = part == 0 ? scores[0][1][i] : scores[0][0][i];
    }
    float4& own_slot = slots[part * 32 + lane];
    float4& other_slot = slots[(1 - part) * 32 + lane];
    other_slot = make_float4(given[0], given[1], given[2], given[3]);
    ptx::barrier_sync(pair, 64);
    const float4 other = own_slot;
    own[0] += other.x;
    own[1] += other.y;
    own[2] += other.z;
    own[3] += other.w;
    own_slot = make_float4(own[0], own[1], own[2], own[3]);
    ptx::barrier_sync(pair, 64);
    const float4 sums = other_slot;
    const float others[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        scores[0][0][i] = part == 0 ? own[i] : others[i];
        scores[0][1][i] = part == 0 ? others[i] : own[i];
    }
}

// The place of the log-sum-exp of a query of this block's batch row, or of a packed row.
__device__ inline float& lse_at(const AttentionParams& params, const BlockRows& rows, int query) {
    return params.lse[rows.batch * params.lse_batch_stride + rows.head * params.lse_head_stride + query];
}

// Writes zeros to the masked rows among the TILE_M rows of the padded output from `first_query` on.
template <typename T, int D, int TILE_M, int THREADS>
__device__ inline void zero_masked_rows(const AttentionParams& params, const RowLists& lists, const BlockRows& rows) {
    if (lists.inv_indices == nullptr) return;
    const int lane = threadIdx.x % 32;
    const int32_t* inv_indices = lists.inv_indices + static_cast<int64_t>(rows.batch) * params.seq_q;
    T* out = static_cast<T*>(params.out) + rows.start(params.out_strides, 0, rows.head) + lane * 8;
    for (int warp_row = threadIdx.x / 32 * 32; warp_row < TILE_M; warp_row += THREADS) {
        const int first_row = rows.first_query + warp_row;
        uint32_t masked = __ballot_sync(0xffffffff, first_row + lane < params.seq_q && inv_indices[first_row + lane] < 0);
        for (; masked != 0; masked &= masked - 1) {
            T* row = out + (first_row + __ffs(masked) - 1) * params.out_strides.token;
            // One store, under a predicate: around a loop over chunks the compiler puts a branch, which
            // costs masked rows a sixth of their time.
            if (lane < params.head_dim / 8) *reinterpret_cast<uint4*>(row) = make_uint4(0, 0, 0, 0);
            if constexpr (D > 256) {
                if (32 + lane < params.head_dim / 8) *reinterpret_cast<uint4*>(row + 256) = make_uint4(0, 0, 0, 0);
            }
            if (lane == 0 && params.lse != nullptr) lse_at(params, rows, first_row + __ffs(masked) - 1) = -INFINITY;
        }
    }
}

enum class Form { PLAIN, MASKED, FUSED, RANGED, FUSED_RANGED, MODIFIED, FUSED_MODIFIED };

template <typename T, int D, int TILE_M, int TILE_N, int WARPS, Form FORM>
__device__ inline void attention(const AttentionParams& params, const RowLists& lists, const KeyRangeParams& ranges,
                                 [[maybe_unused]] const ScoreModifierParams& modifier_params) {
    constexpr bool MODIFIED = FORM == Form::MODIFIED || FORM == Form::FUSED_MODIFIED;
    constexpr bool RANGED = MODIFIED || FORM == Form::RANGED || FORM == Form::FUSED_RANGED;
    constexpr bool MASKED = FORM == Form::MASKED || FORM == Form::RANGED || FORM == Form::MODIFIED;
    constexpr bool FUSED = FORM == Form::FUSED || FORM == Form::FUSED_RANGED || FORM == Form::FUSED_MODIFIED;
    constexpr int THREADS = WARPS * 32;
    // 16 rows of output with 256 columns are 128 registers: two warps divide wider rows among them.
    constexpr int PARTS = D > 256 ? 2 : 1;
    constexpr int M_TILES = TILE_M / (WARPS / PARTS) / 16;
    constexpr int N_TILES = TILE_N / 8;
    constexpr int O_TILES = D / PARTS / 8;
    using TileQ = SharedTile<TILE_M, D>;
    using TileKV = SharedTile<TILE_N, D>;
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t q_shared = ptx::shared_address(shared);
    const uint32_t kv_shared = q_shared + TileQ::BYTES;

    // Late queries often see the most keys, and long blocks go first.
    const BlockRows rows(params, TILE_M, RANGED ? gridDim.x - 1 - blockIdx.x : blockIdx.x, lists.first_batch);
    const int tile_rows = min(TILE_M, rows.queries - rows.first_query);
    const auto range = [&] {
        if constexpr (RANGED) {
            return SeenKeys::of<TILE_M>(ranges, rows.batch, rows.q_base + rows.first_query, tile_rows, rows.keys);
        } else {
            return KeyRange::of(rows.keys);
        }
    }();

    // The fused form's lists lie after the tiles: the query tile's, and those of two key tiles.
    const uint32_t* query_list = reinterpret_cast<const uint32_t*>(shared + TileQ::BYTES + 4 * TileKV::BYTES);
    const uint32_t* key_lists = query_list + TILE_M;
    // Starts to copy the list of a key tile; entries past the last key repeat it.
    const auto load_key_list = [&](int tile) {
        static_assert(TILE_N <= THREADS);
        if (threadIdx.x < TILE_N) {
            const int key = min(tile * TILE_N + static_cast<int>(threadIdx.x), rows.keys - 1);
            ptx::cp_async_4(ptx::shared_address(key_lists + tile % 2 * TILE_N + threadIdx.x), lists.indices_k + (rows.k_base + key));
        }
    };
    if constexpr (FUSED) {
        if (tile_rows > 0) {
            for (int row = threadIdx.x; row < TILE_M; row += THREADS) {
                const int query = min(rows.first_query + row, rows.queries - 1);
                ptx::cp_async_4(ptx::shared_address(query_list + row), lists.indices_q + rows.q_base + query);
            }
            if constexpr (RANGED) {
                if (range.end > range.first) load_key_list(range.template end_tile<TILE_N>() - 1);
            } else {
                if (rows.keys > 0) load_key_list((rows.keys - 1) / TILE_N);
            }
            ptx::cp_async_commit();
        }
        zero_masked_rows<T, D, TILE_M, THREADS>(params, lists, rows);
    }
    if (tile_rows <= 0) return;
    const int head_chunks = params.head_dim / 8;
    const int warp_row = threadIdx.x / (32 * PARTS) * (M_TILES * 16);
    const int lane = threadIdx.x % 32;
    // The warp's part of the columns, and where it starts in tiles, whose panels it consists of.
    const int part = PARTS == 1 ? 0 : threadIdx.x / 32 % PARTS;
    const int q_part = part * (TileQ::BYTES / PARTS);
    const int kv_part = part * (TileKV::BYTES / PARTS);

    // Where a tensor's rows are counted from.
    const auto start = [&](const Strides& strides, int seq, int first_row, int head) {
        return FUSED ? rows.listed_start(strides, seq, head) : rows.start(strides, first_row, head);
    };
    const T* q = static_cast<const T*>(params.q) + start(params.q_strides, params.seq_q, rows.q_base + rows.first_query, rows.head);
    const T* k = static_cast<const T*>(params.k) + start(params.k_strides, params.seq_k, rows.k_base, rows.kv_head);
    const T* v = static_cast<const T*>(params.v) + start(params.v_strides, params.seq_k, rows.k_base, rows.kv_head);

    // Starts to copy the keys and values of a tile to one of the two stages.
    const auto load = [&](int tile) {
        const int first_key = tile * TILE_N;
        const uint32_t stage = kv_shared + tile % 2 * (2 * TileKV::BYTES);
        const auto keeps = [&](int row) {
            if constexpr (MASKED) {
                return params.key_bits == nullptr || bit_at(params.key_bits, params.key_words, rows.batch, first_key + row);
            } else {
                return true;
            }
        };
        if constexpr (FUSED) {
            const typename TileKV::template Listed<THREADS> listed(key_lists + tile % 2 * TILE_N);
            const auto gather = [&](uint32_t to, const T* from, const Strides& strides) {
                if (first_key + TILE_N <= rows.keys && params.head_dim == D) {
                    TileKV::template gather<true>(to, from, strides.token, listed, TILE_N, D / 8);
                } else {
                    TileKV::template gather<false>(to, from, strides.token, listed, rows.keys - first_key, head_chunks);
                }
            };
            gather(stage, k, params.k_strides);
            gather(stage + TileKV::BYTES, v, params.v_strides);
            // It takes the place of the list before this one. Every warp has read that one: there
            // was a barrier since.
            if (tile > range.template first_tile<TILE_N>()) load_key_list(tile - 1);
            ptx::cp_async_commit();
            return;
        }
        const auto copy = [&](uint32_t to, const T* from, const Strides& strides) {
            const T* first = from + first_key * strides.token;
            const bool keeps_all = !MASKED || (RANGED && params.key_bits == nullptr);
            if (keeps_all && first_key + TILE_N <= rows.keys && params.head_dim == D) {
                TileKV::template load_whole<THREADS>(to, first, strides.token);
            } else {
                TileKV::template load<THREADS>(to, first, strides.token, rows.keys - first_key, head_chunks, keeps);
            }
        };
        copy(stage, k, params.k_strides);
        copy(stage + TileKV::BYTES, v, params.v_strides);
        ptx::cp_async_commit();
    };

    float acc[M_TILES][O_TILES][4] = {};
    OnlineSoftmax<M_TILES> softmax;
    // Whether scores are scaled one by one, since something is added to them or keys are dropped.
    const bool scales_scores = MODIFIED || (MASKED && (!RANGED || params.bias != nullptr || params.key_bits != nullptr));
    // The maximum is taken before scaling, so the sign of the scale goes to the scores.
    const float scale = scales_scores ? 1.0f : fabsf(params.score_scale);
    [[maybe_unused]] const auto modifiers = [&] {
        if constexpr (MODIFIED) {
            return HeadModifiers(modifier_params, rows.head);
        } else {
            return 0;
        }
    }();
    // Where a listed query and a listed key lie in their batch row: lists hold positions in the batch.
    [[maybe_unused]] const auto listed_query = [&](int row) {
        return static_cast<int>(query_list[warp_row + row]) - rows.batch * params.seq_q;
    };
    [[maybe_unused]] const auto listed_key = [&](int key) {
        // Not from shared memory, where the list may be the next one.
        return static_cast<int>(__ldg(lists.indices_k + rows.k_base + min(key, rows.keys - 1))) - rows.batch * params.seq_k;
    };
    // How far a key is from a row of the warp's. The last query is level with the last key.
    [[maybe_unused]] const auto distance = [&](int row, int key) {
        if constexpr (FUSED) {
            return listed_query(row) + params.seq_k - params.seq_q - listed_key(key);
        } else {
            return rows.first_query + warp_row + row + rows.keys - rows.queries - key;
        }
    };
    // Adds the bias of a query and a key, by their positions. Comparisons with OVERFLOWED are false for NaN.
    [[maybe_unused]] const auto add_bias = [&](float& score, int query, int key) {
        const int64_t position = rows.batch * params.bias_strides[0] + rows.head * params.bias_strides[1] +
                                 query * params.bias_strides[2] + key * params.bias_strides[3];
        const float bias = bias_at<T>(params, position);
        score += fmaxf(bias, LOWEST_BIAS) * LOG2_E;
        if (score < OVERFLOWED) score = OVERFLOWED;
        if (bias == -INFINITY) score = bias;
    };
    // What a row of the warp's sees.
    [[maybe_unused]] const auto seen_by = [&](int row) {
        if constexpr (RANGED) return range.by(warp_row + row);
    };

    const int first_tile = range.template first_tile<TILE_N>();
    const int end_tile = range.template end_tile<TILE_N>();
    if constexpr (FUSED) {
        // The lists have arrived.
        ptx::cp_async_wait<0>();
        __syncthreads();
    }
    if (end_tile > first_tile) {
        if constexpr (FUSED) {
            const typename TileQ::template Listed<THREADS> listed(query_list);
            TileQ::template gather<false>(q_shared, q, params.q_strides.token, listed, tile_rows, head_chunks);
        } else {
            TileQ::template load<THREADS>(q_shared, q, params.q_strides.token, tile_rows, head_chunks, [](int) { return true; });
        }
        load(end_tile - 1);
    }
    for (int tile = end_tile - 1; tile >= first_tile; --tile) {
        const int first_key = tile * TILE_N;
        const uint32_t stage = kv_shared + tile % 2 * (2 * TileKV::BYTES);
        // The tile has arrived, and every warp is done with the tile before, whose stage the next
        // copy takes.
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (tile > first_tile) load(tile - 1);
        [[maybe_unused]] bool is_seen_by_all = true;
        [[maybe_unused]] bool has_nonfinite = false;
        [[maybe_unused]] unsigned char* v_tile = shared + TileQ::BYTES + tile % 2 * (2 * TileKV::BYTES) + TileKV::BYTES;
        if constexpr (RANGED) {
            is_seen_by_all = range.all_see(first_key, TILE_N);
            if (!is_seen_by_all) has_nonfinite = __syncthreads_or(holds_nonfinite<T, THREADS, TileKV>(v_tile));
        }
        float scores[M_TILES][N_TILES][4] = {};
        scores_of<T, D / PARTS, M_TILES, N_TILES, TileQ, TileKV>(scores, q_shared + q_part, stage + kv_part, warp_row);
        if constexpr (PARTS == 2) {
            // After the lists, where there are any.
            constexpr int LISTS = FUSED ? TILE_M + 2 * TILE_N : 0;
            float4* slots = reinterpret_cast<float4*>(shared + TileQ::BYTES + 4 * TileKV::BYTES + LISTS * sizeof(uint32_t));
            const int pair = threadIdx.x / 64;
            add_up_parts(scores, slots + pair * 64, part, 1 + pair);
        }
        if constexpr (FORM == Form::FUSED_MODIFIED) {
            for_each_score(scores, [&](float& score, int row, int key) {
                score = modifiers.score(score, params.score_scale, [&] { return distance(row, first_key + key); });
                if (params.bias != nullptr) {
                    add_bias(score, listed_query(row), listed_key(first_key + key));
                } else if (score < OVERFLOWED) {
                    score = OVERFLOWED;
                }
            });
        } else if (scales_scores) {
            for_each_score(scores, [&](float& score, int row, int key) {
                const int query = min(rows.first_query + warp_row + row, rows.queries - 1);
                const int at = min(first_key + key, rows.keys - 1);
                if constexpr (MODIFIED) {
                    score = modifiers.score(score, params.score_scale, [&] { return distance(row, at); });
                } else {
                    score *= params.score_scale;
                }
                if (params.bias != nullptr) {
                    add_bias(score, query, at);
                } else if (score < OVERFLOWED) {
                    score = OVERFLOWED;
                }
                const bool kept = params.key_bits == nullptr || bit_at(params.key_bits, params.key_words, rows.batch, at);
                if (!kept || (!RANGED && first_key + key >= range.end)) score = -INFINITY;
            });
        } else {
            if (params.score_scale < 0.0f) for_each_score(scores, [](float& score, int, int) { score = -score; });
            if (!RANGED && first_key + TILE_N > range.end) {
                for_each_score(scores, [&](float& score, int, int key) {
                    if (first_key + key >= range.end) score = -INFINITY;
                });
            }
        }
        if constexpr (RANGED) {
            if (!is_seen_by_all) hide_unseen(scores, first_key, seen_by);
        }
        softmax.step(scores, acc, scale);
        if constexpr (RANGED) {
            if (has_nonfinite) {
                add_nonfinite<T, TileKV>(acc, v_tile + kv_part, first_key, seen_by);
                __syncthreads();
                zero_nonfinite<T, THREADS, TileKV>(v_tile);
                __syncthreads();
            }
        }
        accumulate<T, M_TILES, N_TILES, O_TILES, TileKV>(acc, scores, stage + TileKV::BYTES + kv_part);
    }
    softmax.finish();

    // The output goes through shared memory, each warp in its own rows of the query tile, so that
    // stores are 16 bytes wide.
    T* out = static_cast<T*>(params.out) + start(params.out_strides, params.seq_q, rows.q_base + rows.first_query, rows.head);
    if (end_tile > first_tile) __syncthreads();
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + m * 16 + half * 8 + lane / 4;
            float sum = softmax.row_sum[m][half];
            // Every kept score is below every float.
            bool overflows;
            if (scales_scores) {
                overflows = softmax.row_max[m][half] == OVERFLOWED;
            } else if constexpr (RANGED) {
                const int2 seen = range.by(row);
                overflows = sum == 0.0f && seen.x < seen.y;
            } else {
                overflows = sum == 0.0f && end_tile > first_tile;
            }
            if (overflows) sum = NAN;
            bool zero = sum == 0.0f;
            [[maybe_unused]] bool is_masked = false;
            if constexpr (MASKED || RANGED) {
                const int query = min(rows.first_query + row, rows.queries - 1);
                is_masked = params.row_bits != nullptr && !bit_at(params.row_bits, params.row_words, rows.batch, query);
                zero = zero || is_masked;
            }
            float factor = 1.0f;
            bool is_nothing = zero;
            if constexpr (MODIFIED) {
                factor = modifiers.add_sink(softmax.row_max[m][half], sum);
                // A sink is the log-sum-exp of a row without keys.
                is_nothing = is_masked || sum == 0.0f;
            }
            const float inverse = zero ? 0.0f : factor / sum;
#pragma unroll
            for (int o = 0; o < O_TILES; ++o) {
                // Selected, not multiplied: a masked row may hold NaN.
                const float low = zero ? 0.0f : acc[m][o][2 * half] * inverse;
                const float high = zero ? 0.0f : acc[m][o][2 * half + 1] * inverse;
                *reinterpret_cast<uint32_t*>(shared + q_part + TileQ::offset(row, o) + lane % 4 * 4) = ptx::pack_pair<T>(low, high);
            }
            if (params.lse != nullptr && part == 0 && lane % 4 == 0 && row < tile_rows) {
                const float lse = is_nothing ? -INFINITY : (softmax.finite_max(m, half) * scale + log2f(sum)) * LN_2;
                const int query = FUSED ? static_cast<int>(query_list[row]) - rows.batch * params.seq_q : rows.q_base + rows.first_query + row;
                lse_at(params, rows, query) = lse;
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < M_TILES * 16 * O_TILES / 32; ++i) {
        const int index = i * 32 + lane;
        const int row = warp_row + index / O_TILES;
        const int chunk = part * O_TILES + index % O_TILES;
        if (row < tile_rows && chunk < head_chunks) {
            const int64_t out_row = FUSED ? static_cast<int64_t>(query_list[row]) : row;
            *reinterpret_cast<uint4*>(out + out_row * params.out_strides.token + chunk * 8) =
                *reinterpret_cast<const uint4*>(shared + TileQ::offset(row, chunk));
        }
    }
}

// Blocks that a multiprocessor holds at once. At 64 columns a third block hides more latency than
// its registers cost.
constexpr int blocks(int d, int warps, Form form) {
    const bool has_spare_registers = form == Form::PLAIN || form == Form::FUSED || form == Form::FUSED_RANGED;
    return d == 64 && has_spare_registers ? 3 : 8 / warps;
}

#define VARLEN_FA_ENTRY(NAME, T, D, M, N, WARPS, FORM)                                       \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, blocks(D, WARPS, FORM))           \
        NAME(const __grid_constant__ AttentionParams params) {                               \
        attention<T, D, M, N, WARPS, FORM>(params, RowLists{}, KeyRangeParams{}, ScoreModifierParams{});       \
    }
#define VARLEN_FA_FUSED_ENTRY(NAME, T, D, M, N, WARPS)                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, blocks(D, WARPS, Form::FUSED))       \
        NAME(const __grid_constant__ FusedAttentionParams params) {                             \
        attention<T, D, M, N, WARPS, Form::FUSED>(params.attention, params.lists, KeyRangeParams{}, ScoreModifierParams{}); \
    }
#define VARLEN_FA_RANGED_ENTRY(NAME, T, D, M, N, WARPS, FORM)                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, blocks(D, WARPS, FORM))              \
        NAME(const __grid_constant__ RangedAttentionParams params) {                            \
        attention<T, D, M, N, WARPS, FORM>(params.attention, params.lists, params.ranges, ScoreModifierParams{}); \
    }
#define VARLEN_FA_MODIFIED_ENTRY(NAME, T, D, M, N, WARPS, FORM)                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, blocks(D, WARPS, FORM))              \
        NAME(const __grid_constant__ ModifiedAttentionParams params) {                          \
        attention<T, D, M, N, WARPS, FORM>(params.ranged.attention, params.ranged.lists, params.ranged.ranges, params.modifiers); \
    }
// The forms that do what all others do.
#define VARLEN_FA_WIDE_ENTRIES(D, M, N, N_MASKED, WARPS)                                                \
    VARLEN_FA_MODIFIED_ENTRY(attention_sm80_f16_d##D##_modified, __half, D, M, N_MASKED, WARPS, Form::MODIFIED) \
    VARLEN_FA_MODIFIED_ENTRY(attention_sm80_bf16_d##D##_modified, __nv_bfloat16, D, M, N_MASKED, WARPS, Form::MODIFIED) \
    VARLEN_FA_MODIFIED_ENTRY(attention_sm80_f16_d##D##_fused_modified, __half, D, M, N, WARPS, Form::FUSED_MODIFIED) \
    VARLEN_FA_MODIFIED_ENTRY(attention_sm80_bf16_d##D##_fused_modified, __nv_bfloat16, D, M, N, WARPS, Form::FUSED_MODIFIED)
#define VARLEN_FA_ENTRIES(D, M, N, N_MASKED, WARPS)                                                     \
    VARLEN_FA_ENTRY(attention_sm80_f16_d##D, __half, D, M, N, WARPS, Form::PLAIN)                       \
    VARLEN_FA_ENTRY(attention_sm80_bf16_d##D, __nv_bfloat16, D, M, N, WARPS, Form::PLAIN)               \
    VARLEN_FA_ENTRY(attention_sm80_f16_d##D##_masked, __half, D, M, N_MASKED, WARPS, Form::MASKED)      \
    VARLEN_FA_ENTRY(attention_sm80_bf16_d##D##_masked, __nv_bfloat16, D, M, N_MASKED, WARPS, Form::MASKED) \
    VARLEN_FA_FUSED_ENTRY(attention_sm80_f16_d##D##_fused, __half, D, M, N, WARPS)                      \
    VARLEN_FA_FUSED_ENTRY(attention_sm80_bf16_d##D##_fused, __nv_bfloat16, D, M, N, WARPS)              \
    VARLEN_FA_RANGED_ENTRY(attention_sm80_f16_d##D##_ranged, __half, D, M, N_MASKED, WARPS, Form::RANGED) \
    VARLEN_FA_RANGED_ENTRY(attention_sm80_bf16_d##D##_ranged, __nv_bfloat16, D, M, N_MASKED, WARPS, Form::RANGED) \
    VARLEN_FA_RANGED_ENTRY(attention_sm80_f16_d##D##_fused_ranged, __half, D, M, N, WARPS, Form::FUSED_RANGED) \
    VARLEN_FA_RANGED_ENTRY(attention_sm80_bf16_d##D##_fused_ranged, __nv_bfloat16, D, M, N, WARPS, Form::FUSED_RANGED) \
    VARLEN_FA_WIDE_ENTRIES(D, M, N, N_MASKED, WARPS)
VARLEN_FA_SM80_TILES(VARLEN_FA_ENTRIES)
VARLEN_FA_SM80_WIDE_TILES(VARLEN_FA_WIDE_ENTRIES)

}  // namespace sm80
