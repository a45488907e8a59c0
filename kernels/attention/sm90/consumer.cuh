// A consumer warpgroup of the sm90 kernel: 64 query rows against the keys and values that the
// producer has copied.
#pragma once
#include "../../common/math.cuh"
#include "../../ptx/counter.cuh"
#include "../../ptx/mbarrier.cuh"
#include "../../ptx/tma.cuh"
#include "../../ptx/warpgroup.cuh"
#include "../../ptx/wgmma.cuh"
#include "../segments.cuh"
#include "block.cuh"
#include "softmax.cuh"
#include "unseen.cuh"

namespace sm90 {

template <typename S>
struct Consumer {
    using T = typename S::T;
    using KeysState = typename S::KeysState;
    static constexpr int N = S::TILE_N;
    static constexpr int D = S::D;
    static constexpr int ROW_BYTES = S::ROW_BYTES;

    const TileListParams& params;
    // Null without segments.
    const SegmentTable* segments;
    unsigned char* shared;
    uint32_t base;
    int warpgroup;

    __device__ Consumer(const TileListParams& params, const SegmentTable* segments, unsigned char* shared, uint32_t base, int warpgroup)
        : params(params), segments(segments), shared(shared), base(base), warpgroup(warpgroup) {}

    using Matrix = ptx::SharedMatrix<ROW_BYTES>;

    // Descriptors of matrices have no room for the block's number in a pair, which is above the offset in an address.
    __device__ uint32_t offset() const { return S::PAIRED ? base & 0xffffff : base; }
    __device__ Matrix queries(int work_index) const { return {offset() + S::query_tile(work_index) + warpgroup * 64 * ROW_BYTES, 16}; }
    __device__ Matrix keys(int stage) const { return {offset() + S::K + stage * S::TileKV::BYTES, 16}; }
    __device__ Matrix values(int stage) const { return {offset() + S::V + stage * S::TileKV::BYTES, N * ROW_BYTES}; }

    // The results of a softmax for this lane's two rows; zeros for a query tile without keys.
    struct RowSums {
        float sum[2] = {0.0f, 0.0f};
        // Log2 of what sums are divided by.
        float top[2];
        bool out_of_range[2] = {false, false};
        // Whether these are sums over all keys. False for a part of a query tile while other parts
        // are not done.
        bool is_whole = true;

        template <typename Softmax>
        __device__ void read_from(const Softmax& softmax) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[half] = softmax.row_sum[half];
                top[half] = softmax.log2_factor(half);
                out_of_range[half] = softmax.out_of_range(half);
            }
        }
    };

    // What this warp must know of its 16 rows to write them.
    struct WarpRows {
        int batch;
        int head;
        int first_row;
        int rows;
        uint32_t kept;
        bool clips;

        __device__ void read(const TileRows& tile) {
            const auto& group = tile.groups[threadIdx.x / 32 - 4];
            batch = tile.batch;
            head = group.head;
            first_row = group.first_row;
            rows = group.rows;
            kept = group.kept;
            clips = tile.clips;
        }
    };

    // S = Q·Kᵀ of this warpgroup's rows and the first keys of a tile, or all of them.
    template <int TILES>
    __device__ static void issue_scores(float (&scores)[TILES][4], Matrix q, Matrix k) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            const int panel = step * 16 / S::PANEL;
            const int column = step * 16 % S::PANEL * 2;
            ptx::Wgmma<TILES * 8, T>::ss(scores, q.at(panel * S::TILE_M * ROW_BYTES + column), k.at(panel * N * ROW_BYTES + column), step > 0);
        }
        ptx::wgmma_commit();
    }

    // O += P·V, or O = P·V where there is none yet.
    __device__ static void issue_output(float (&acc)[D / 8][4], uint32_t (&probs)[N / 16][4], Matrix v, bool accumulates) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < N / 16; ++step) ptx::Wgmma<D, T>::rs(acc, probs[step], v.at(step * 16 * ROW_BYTES), step > 0 || accumulates);
        ptx::wgmma_commit();
    }

    // Keys without a score have no weight.
    template <int TILES>
    __device__ static void pack(uint32_t (&probs)[N / 16][4], const float (&scores)[TILES][4]) {
#pragma unroll
        for (int step = 0; step < N / 16; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (step >= TILES / 2) {
                    probs[step][i] = 0;
                    continue;
                }
                const float(&pair)[4] = scores[2 * step + i / 2];
                probs[step][i] = ptx::pack_pair<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
        }
    }

    __device__ static void fill_zeros(float (&acc)[D / 8][4]) {
#pragma unroll
        for (int tile = 0; tile < D / 8; ++tile) acc[tile][0] = acc[tile][1] = acc[tile][2] = acc[tile][3] = 0.0f;
    }

    __device__ static void rescale(float (&acc)[D / 8][4], const float (&factor)[2]) {
#pragma unroll
        for (int tile = 0; tile < D / 8; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[tile][i] *= factor[i / 2];
        }
    }

    __device__ const typename S::Keys& keys_info(int stage) const {
        return reinterpret_cast<const typename S::Keys*>(shared + S::KEYS_INFO)[stage];
    }

    template <int TILES>
    __device__ void mask(float (&scores)[TILES][4], int stage) const {
        // The maximum is taken before scaling, so the sign of the scale goes to the scores.
        if (params.score_scale < 0.0f) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[tile][i] = -scores[tile][i];
            }
        }
        if constexpr (S::RANGED) {
            const auto& keys = keys_info(stage);
            seen.hide_others(scores, keys);
            // No row sees keys past the end of its sequence, and other tiles of keys in a row are
            // kept as a whole.
            if (keys.has_masked_values == 0) return;
        }
#pragma unroll
        for (int word = 0; word < (TILES + 3) / 4; ++word) {
            const uint32_t kept = keys_info(stage).kept[word] >> (threadIdx.x % 4 * 2);
#pragma unroll
            for (int tile = word * 4; tile < word * 4 + 4 && tile < TILES; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if ((kept >> (tile % 4 * 8 + i % 2) & 1) == 0) scores[tile][i] = -INFINITY;
                }
            }
        }
    }

    __device__ void arrive(int barrier) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(base + barrier);
    }

    // Gives a stage back, to both blocks of a pair.
    __device__ void release(int barrier) const {
        if constexpr (S::PAIRED) {
            __syncwarp();
            arrive_in_pair(base + barrier);
        } else {
            arrive(barrier);
        }
    }

    // A query tile's key tiles are those of which its only warpgroup sees something.
    static constexpr bool SEES_ALL_TILES = S::WARPGROUPS == 1;

    // Consumers issue their products in turn. Not where every key tile is masked: there are few, and
    // each consumer passes others on, so that one would wait for the end of another's.
    static constexpr bool HAS_TURNS = S::WARPGROUPS > 1;
    __device__ bool takes_turns() const { return HAS_TURNS && !(S::RANGED && descends); }
    __device__ void wait_turn() const {
        if constexpr (!HAS_TURNS) return;
        ptx::barrier_sync(BARRIER_TURN + warpgroup, 2 * WARPGROUP);
    }
    __device__ void give_turn() const {
        if constexpr (!HAS_TURNS) return;
        const int next = warpgroup + 1 == S::WARPGROUPS ? 0 : warpgroup + 1;
        ptx::barrier_arrive(BARRIER_TURN + next, 2 * WARPGROUP);
    }

    __device__ void run() {
        for (bool is_exact = false;; is_exact = true) {
            if (warpgroup + 1 == S::WARPGROUPS) give_turn();
            for (; open(); ++work_index) {
                // Without a product nothing of it is written.
                float acc[D / 8][4];
                ptx::leave_undefined(acc);
                RowSums sums;
                const bool is_part = part() >= 0;
                if ((!has_rows && !takes_out_values(is_exact || is_part)) || (key_tiles == 0 && !is_part)) {
                    pass(is_exact || is_part);
                    sums.is_whole = has_rows;
                } else if (is_exact || is_part) {
                    attend_exactly(acc, sums);
                } else {
                    attend(acc, sums);
                }
                state.count += key_tiles;
                if (sums.is_whole) {
                    write_output(acc, sums);
                } else if constexpr (S::OUTPUT_IN_VALUES) {
                    pass_output_place();
                } else {
                    arrive(S::empty_q(work_index, warpgroup));
                }
            }
            give_back_stored();
            arrive(S::empty_q(work_index, warpgroup));
            if constexpr (S::OUTPUT_IN_VALUES) pass_output_place();
            ++work_index;
            if (warpgroup == 0) wait_turn();
            // Before they are written again, or the block ends.
            ptx::tma_store_wait();
            if (is_exact) return end_pair<S>();
            if constexpr (!S::PAIRED) {
                ptx::barrier_arrive(BARRIER_END_COPIES, S::CONSUMERS + 32);
                ptx::barrier_arrive(BARRIER_END_VALUES, S::CONSUMERS + 32);
            }
            if (params.form != FORM_DENSE) ptx::barrier_arrive(BARRIER_END_ZEROING, S::CONSUMERS + 32);
            if (!must_recompute<S>(shared, BARRIER_END, S::CONSUMERS)) return;
        }
    }

private:
    __device__ const typename S::Rows& rows_info(int work_index) const { return S::rows_info(shared, work_index); }

    // `TileRows::part`, read where it is needed, since registers are scarce.
    __device__ int part() const { return ptx::uniform(rows_info(work_index).part); }

    // Waits for the query tile of `work_index`. False if there is none.
    __device__ bool open() {
        ptx::mbarrier_wait(base + S::full_q(work_index, warpgroup), S::parity_q(work_index));
        work_index = ptx::uniform(work_index);
        state.count = ptx::uniform(state.count);
        const auto& rows = rows_info(work_index);
        key_tiles = ptx::uniform(rows.key_tiles);
        masked_tiles = ptx::uniform(rows.masked_tiles);
        // The tile's groups are filled from the first on.
        if constexpr (S::RANGED && HAS_TURNS) descends = ptx::uniform(rows.descends) != 0;
        has_rows = S::WARPGROUPS == 1 || ptx::uniform(rows.groups[warpgroup * 4].rows) > 0;
        return key_tiles >= 0;
    }

    // The place of the output of the query tile before is given back once the output has left.
    __device__ void give_back_stored() {
        // Also where the loops follow, whose descriptors stay in uniform registers only if the compiler knows that
        // no lane goes another way.
        if (!(S::OUTPUT_IN_VALUES ? ptx::uniform(static_cast<int>(is_stored)) != 0 : is_stored)) return;
        if (HAS_ODD_ROWS || threadIdx.x % 32 == 0) ptx::tma_store_wait_read();
        if constexpr (S::OUTPUT_IN_VALUES) {
            give_back_output_place();
        } else {
            arrive(S::empty_q(work_index - 1, warpgroup));
        }
        is_stored = false;
    }

    // The stage of values that this warpgroup's output takes at the end of a query tile: the first warpgroup's
    // that of the last tile but one, the second's that of the last tile, since the first one usually ends first.
    __device__ KeysState output_stage() const { return {state.count + warpgroup}; }

    // Waits until nobody reads values there; nor the copy engine the other warpgroup's last output, after
    // which an only tile of keys may have come to the other stage.
    __device__ void wait_for_output_place() const {
        ptx::mbarrier_wait(base + S::EMPTY_V + 8 * output_stage().stage(), output_stage().parity() ^ 1);
        S::wait_for_outputs(base, 1 - warpgroup, work_index);
    }

    __device__ void give_back_output_place() const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::add_release(base + S::outputs_left(warpgroup), 1);
    }

    // Without an output, in the same order.
    __device__ void pass_output_place() const {
        wait_for_output_place();
        give_back_output_place();
    }

    // Where the output does not take their place.
    __device__ void give_back_queries() const {
        if constexpr (S::OUTPUT_IN_VALUES) arrive(S::empty_q(work_index, warpgroup));
    }

    // With key ranges: whether all consumers take values out of tiles together. A warpgroup without
    // rows computes what it does not write, so that all wait for their barrier at one instruction, as
    // compute-sanitizer's synccheck wants.
    __device__ bool takes_out_values(bool is_in_order) const { return S::RANGED && is_in_order && masked_tiles > 0; }

    // Keeps pace with the other warpgroups where there is nothing to compute.
    __device__ void pass(bool is_in_order) {
        give_back_stored();
        KeysState state = this->state;
        for (int i = 0; i < key_tiles; ++i, ++state.count) {
            ptx::mbarrier_wait(base + S::FULL_K + 8 * state.stage(), state.parity());
            if (i > 0 && !is_in_order && takes_turns()) {
                wait_turn();
                give_turn();
            }
            release(S::EMPTY_K + 8 * state.stage());
            ptx::mbarrier_wait(base + S::FULL_V + 8 * state.stage(), state.parity());
            release(S::EMPTY_V + 8 * state.stage());
        }
        give_back_queries();
    }

    __device__ unsigned char* value_tile(int stage) const { return shared + S::V + stage * S::TileKV::BYTES; }

    __device__ void read_ranges() {
        if constexpr (S::LOADS_RANGES) {
            seen.read(reinterpret_cast<const int2*>(shared + S::RANGES) + work_index % 2 * S::TILE_M);
        } else {
            seen.read(params.ranges, rows_info(work_index));
        }
    }

    // How many groups of a masked tile there are up to the last one that this warpgroup needs. It waits
    // for the tile.
    __device__ int needed_groups(KeysState state) const {
        ptx::mbarrier_wait(base + S::FULL_K + 8 * state.stage(), state.parity());
        const auto& keys = keys_info(state.stage());
        if constexpr (S::RANGED) {
            const auto& rows = rows_info(work_index);
            return seen_groups<N>(keys, rows.some_first[warpgroup], rows.some_end[warpgroup]);
        } else {
            return ptx::uniform(keys.groups);
        }
    }

    // Keeps pace with the other warpgroups at a tile that this one does not see. As where tiles are computed,
    // the keys of the next one come before the values of this one.
    __device__ void pass_keys(KeysState state) const {
        ptx::mbarrier_wait(base + S::FULL_K + 8 * state.stage(), state.parity());
        if (takes_turns()) {
            wait_turn();
            give_turn();
        }
        release(S::EMPTY_K + 8 * state.stage());
    }
    __device__ void pass_values(KeysState state) const {
        ptx::mbarrier_wait(base + S::FULL_V + 8 * state.stage(), state.parity());
        release(S::EMPTY_V + 8 * state.stage());
    }

    // With key ranges: whether a row's sums may hold values that it does not see. Rows that see
    // nothing are right without a sum.
    __device__ void doubt(RowSums& sums, const float (&acc)[D / 8][4]) const {
        // Four chains, since the latency of one is not hidden.
        float zeros[4] = {};
#pragma unroll
        for (int tile = 0; tile < D / 8; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) zeros[i] = __fmaf_rn(acc[tile][i], 0.0f, zeros[i]);
        }
        const float zero[2] = {zeros[0] + zeros[1], zeros[2] + zeros[3]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sums.out_of_range[half] = seen.has_keys(half) && (sums.out_of_range[half] || zero[half] != 0.0f);
        }
    }

    // The scores of a tile are issued before the product of the tile before.
    __device__ void attend(float (&acc)[D / 8][4], RowSums& sums) {
        WarpgroupSoftmax softmax(fabsf(params.score_scale));
        if constexpr (S::RANGED) read_ranges();
        const Matrix q = queries(work_index);
        KeysState state = this->state;
        const uint32_t last_masked = state.count + max(masked_tiles, 1) - 1;
        uint32_t last = state.count + key_tiles - 1;
        uint32_t probs[N / 16][4];
        int groups = N / GROUP_ROWS;
        if (masked_tiles > 0 && !SEES_ALL_TILES) {
            groups = needed_groups(state);
            if constexpr (S::RANGED) {
                // Values of tiles that are passed may come to the place of the output.
                if (S::OUTPUT_IN_VALUES && groups == 0) give_back_stored();
                for (; state.count != last_masked && groups == 0; groups = needed_groups(state)) {
                    pass_keys(state);
                    if (state.count != this->state.count) pass_values({state.count - 1});
                    ++state.count;
                }
            }
        } else {
            ptx::mbarrier_wait(base + S::FULL_K + 8 * state.stage(), state.parity());
        }
        start_with(groups, probs, softmax, q, state);
        const uint32_t first = state.count;
        if constexpr (S::STARTS_WITH_ZEROS) fill_zeros(acc);
        if (S::RANGED && !SEES_ALL_TILES && state.count != this->state.count) pass_values({state.count - 1});
        for (; state.count != last_masked; ++state.count) {
            if constexpr (S::RANGED) {
                // Nor does it see those further to the left.
                if (!SEES_ALL_TILES && descends && needed_groups({state.count + 1}) == 0) {
                    last = state.count;
                    break;
                }
            }
            step<true>(acc, probs, softmax, q, state, state.count != first, last);
        }
        const bool ends_masked = state.count == last;
        for (; state.count != last; ++state.count) step<false>(acc, probs, softmax, q, state, state.count != first, last);
        const Matrix v = values(state.stage());
        ptx::mbarrier_wait(base + S::FULL_V + 8 * state.stage(), state.parity());
        // Not before the values are there: the warp that loads a block's first ones waits for its first queries.
        if (!S::GIVES_BACK_EARLY || ends_masked) give_back_queries();
        issue_output(acc, probs, v, S::STARTS_WITH_ZEROS || state.count != first);
        const uint32_t end = this->state.count + key_tiles;
        // The next tile's keys, which `needed_groups` has waited for.
        if (S::RANGED && !SEES_ALL_TILES && state.count + 1 != end) release(S::EMPTY_K + 8 * KeysState{state.count + 1}.stage());
        ptx::wgmma_wait<0>();
        ptx::pin_registers(acc);
        release(S::EMPTY_V + 8 * state.stage());
        softmax.finish();
        sums.read_from(softmax);
        if constexpr (S::RANGED) {
            doubt(sums, acc);
            // Those that this warpgroup does not see.
            for (++state.count; !SEES_ALL_TILES && state.count != end; ++state.count) {
                if (state.count + 1 != end) pass_keys({state.count + 1});
                pass_values(state);
            }
        }
    }

    // The probabilities of the first tile, which often ends beyond what this warpgroup needs: nothing
    // hides what its scores and their softmax take, so they are computed for as few keys as will do.
    template <int KEYS = S::FEW_KEYS>
    __device__ void start_with(int groups, uint32_t (&probs)[N / 16][4], WarpgroupSoftmax& softmax, Matrix q, KeysState state) {
        if constexpr (KEYS < N) {
            if (groups <= KEYS / GROUP_ROWS) {
                start<KEYS>(probs, softmax, q, state);
            } else {
                start_with<KEYS + 64>(groups, probs, softmax, q, state);
            }
        } else {
            start<N>(probs, softmax, q, state);
        }
    }

    // The same for KEYS keys.
    template <int KEYS>
    __device__ void start(uint32_t (&probs)[N / 16][4], WarpgroupSoftmax& softmax, Matrix q, KeysState state) {
        float scores[KEYS / 8][4];
        issue_scores(scores, q, keys(state.stage()));
        give_back_stored();
        ptx::wgmma_wait<0>();
        ptx::pin_registers(scores);
        if (KEYS < N || masked_tiles > 0) mask(scores, state.stage());
        release(S::EMPTY_K + 8 * state.stage());
        softmax.raise_max(scores);
        softmax.exponentiate(scores);
        pack(probs, scores);
    }

    // The product of a key tile, and the probabilities of the next one.
    template <bool IS_MASKED>
    __device__ void step(float (&acc)[D / 8][4], uint32_t (&probs)[N / 16][4], WarpgroupSoftmax& softmax, Matrix q, KeysState state,
                         bool accumulates, uint32_t last) {
        const KeysState next = {state.count + 1};
        const Matrix k = keys(next.stage());
        const Matrix v = values(state.stage());
        float scores[N / 8][4];
        ptx::mbarrier_wait(base + S::FULL_K + 8 * next.stage(), next.parity());
        if (!IS_MASKED || takes_turns()) wait_turn();
        issue_scores(scores, q, k);
        // While the scores are computed.
        ptx::mbarrier_wait(base + S::FULL_V + 8 * state.stage(), state.parity());
        issue_output(acc, probs, v, S::STARTS_WITH_ZEROS || accumulates);
        if (!IS_MASKED || takes_turns()) give_turn();
        ptx::wgmma_wait<1>();
        ptx::pin_registers(scores);
        if constexpr (IS_MASKED) mask(scores, next.stage());
        release(S::EMPTY_K + 8 * next.stage());
        if (S::GIVES_BACK_EARLY && !IS_MASKED && next.count == last) give_back_queries();
        softmax.raise_max(scores);
        if constexpr (!S::WAITS_EARLY) softmax.exponentiate(scores);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(acc);
        ptx::pin_registers(probs);
        release(S::EMPTY_V + 8 * state.stage());
        if constexpr (S::WAITS_EARLY) softmax.exponentiate(scores);
        rescale(acc, softmax.factor);
        pack(probs, scores);
    }

    // Scores, softmax and product one after the other, with the exact softmax.
    __device__ void attend_exactly(float (&acc)[D / 8][4], RowSums& sums) {
        ExactSoftmax softmax(fabsf(params.score_scale));
        if constexpr (S::RANGED) {
            read_ranges();
            sees_some[0] = sees_some[1] = masked_tiles != key_tiles;
        }
        const Matrix q = queries(work_index);
        KeysState state = this->state;
        const uint32_t masked_end = state.count + masked_tiles;
        const uint32_t end = state.count + key_tiles;
        fill_zeros(acc);
        give_back_stored();
        for (; state.count != masked_end; ++state.count) step_exactly<true>(acc, softmax, q, state);
        for (; state.count != end; ++state.count) step_exactly<false>(acc, softmax, q, state);
        give_back_queries();
        softmax.finish();
        if constexpr (S::RANGED) {
            for (int half = 0; half < 2; ++half) {
                if (!sees_some[half]) softmax.row_max[half] = -INFINITY;
            }
        }
        if (S::RANGED && !has_rows) {
            sums.is_whole = false;
            return;
        }
        if (part() >= 0) sums.is_whole = merge_parts(acc, softmax);
        softmax.spread_overflow();
        sums.read_from(softmax);
    }

    template <bool IS_MASKED>
    __device__ void step_exactly(float (&acc)[D / 8][4], ExactSoftmax& softmax, Matrix q, KeysState state) {
        const int stage = state.stage();
        const Matrix k = keys(stage);
        const Matrix v = values(stage);
        float scores[N / 8][4];
        uint32_t probs[N / 16][4];
        ptx::mbarrier_wait(base + S::FULL_K + 8 * stage, state.parity());
        issue_scores(scores, q, k);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(scores);
        if constexpr (IS_MASKED) mask(scores, stage);
        if constexpr (!(IS_MASKED && S::RANGED)) release(S::EMPTY_K + 8 * stage);
        softmax.raise_max(scores);
        softmax.exponentiate(scores);
        rescale(acc, softmax.factor);
        pack(probs, scores);
        ptx::mbarrier_wait(base + S::FULL_V + 8 * stage, state.parity());
        if constexpr (IS_MASKED && S::RANGED) {
            const auto& keys = keys_info(stage);
            for (int half = 0; half < 2; ++half) sees_some[half] |= seen.template sees_some<N>(half, keys);
            take_out_nonfinite<S>(shared, stage, [&] { add_nonfinite<S>(acc, value_tile(stage), keys, seen); });
            release(S::EMPTY_K + 8 * stage);
        }
        issue_output(acc, probs, v, true);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(acc);
        ptx::pin_registers(probs);
        release(S::EMPTY_V + 8 * stage);
    }

    // Writes this warpgroup's share of a part to global memory. The last part of a query tile adds
    // up all of them; the others return false. They are added in the order of parts, so that sums
    // do not depend on which one is last.
    __device__ bool merge_parts(float (&acc)[D / 8][4], ExactSoftmax& softmax) const {
        constexpr int CHUNKS = D / 8 + 1;
        const int thread = threadIdx.x % WARPGROUP;
        const int part = this->part();
        const int query_tile = part / params.parts;
        const auto chunks_of = [&](int part) {
            return params.part_chunks + (static_cast<int64_t>(part) * S::WARPGROUPS + warpgroup) * CHUNKS * WARPGROUP + thread;
        };
        float4* const mine = chunks_of(part);
        __stcg(mine, float4{softmax.row_max[0], softmax.row_max[1], softmax.row_sum[0], softmax.row_sum[1]});
#pragma unroll
        for (int tile = 0; tile < D / 8; ++tile) {
            __stcg(mine + (tile + 1) * WARPGROUP, float4{acc[tile][0], acc[tile][1], acc[tile][2], acc[tile][3]});
        }
        __threadfence();
        ptx::barrier_sync(BARRIER_WARPGROUP + warpgroup, WARPGROUP);
        auto* const done = reinterpret_cast<volatile uint32_t*>(shared + S::PARTS_DONE) + warpgroup;
        // The last part leaves 0 again, for the launch that comes next.
        if (thread == 0) *done = atomicInc(params.parts_done + query_tile * S::WARPGROUPS + warpgroup, params.parts - 1);
        ptx::barrier_sync(BARRIER_WARPGROUP + warpgroup, WARPGROUP);
        if (*done + 1 != params.parts) return false;
        __threadfence();
        const int first = query_tile * params.parts;
        for (int other = first; other < first + params.parts; ++other) {
            const float4 ends = __ldcg(chunks_of(other));
            softmax.row_max[0] = fmaxf(softmax.row_max[0], ends.x);
            softmax.row_max[1] = fmaxf(softmax.row_max[1], ends.y);
        }
        softmax.row_sum[0] = softmax.row_sum[1] = 0.0f;
        fill_zeros(acc);
#pragma unroll 1
        for (int other = first; other < first + params.parts; ++other) {
            const float4* const theirs = chunks_of(other);
            const float4 ends = __ldcg(theirs);
            const float weights[2] = {softmax.weight(ends.x, softmax.row_max[0]), softmax.weight(ends.y, softmax.row_max[1])};
            softmax.row_sum[0] += ends.z * weights[0];
            softmax.row_sum[1] += ends.w * weights[1];
#pragma unroll
            for (int tile = 0; tile < D / 8; ++tile) {
                const float4 sums = __ldcg(theirs + (tile + 1) * WARPGROUP);
                acc[tile][0] += sums.x * weights[0];
                acc[tile][1] += sums.y * weights[0];
                acc[tile][2] += sums.z * weights[1];
                acc[tile][3] += sums.w * weights[1];
            }
        }
        return true;
    }

    // Whether rows of an odd number of chunks, no whole sectors of memory, leave in one piece each. Where a row
    // is one or two panels, that takes longer.
    static constexpr bool HAS_ODD_ROWS = S::PANELS == 3 && S::BLOCKS == 1;

    // The output takes the place of the queries or of values in shared memory, and leaves by the copy engine; or
    // by 16-byte stores, where the copy engine would write rows of the next sequence, or where
    // `out_rows` lists the rows' places.
    __device__ void write_output(float (&acc)[D / 8][4], const RowSums& sums) {
        const int lane = threadIdx.x % 32;
        const int warp = S::OUTPUT_IN_VALUES ? threadIdx.x / 32 % 4 : threadIdx.x / 32 - 4;
        const int tile_start = S::OUTPUT_IN_VALUES ? S::V + output_stage().stage() * S::TileKV::BYTES : S::query_tile(work_index);
        WarpRows mine;
        mine.read(rows_info(work_index));
        if constexpr (S::OUTPUT_IN_VALUES) {
            wait_for_output_place();
        } else {
            // Every warp is done with the query rows.
            ptx::barrier_sync(BARRIER_WARPGROUP + warpgroup, WARPGROUP);
        }
        bool zero[2];
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + lane / 4;
            const float sum = sums.sum[half];
            const bool is_kept = mine.kept >> row & 1;
            if (sums.out_of_range[half] && is_kept && row < mine.rows) {
                *reinterpret_cast<volatile uint32_t*>(shared + S::OUT_OF_RANGE) = 1;
                if constexpr (S::PAIRED) ptx::store_mapped(ptx::address_in(base + S::OUT_OF_RANGE, ptx::cluster_rank() ^ 1), 1);
            }
            zero[half] = sum == 0.0f || !is_kept;
            inverse[half] = zero[half] ? 0.0f : __fdividef(1.0f, sum);
            if (params.lse != nullptr && lane % 4 == 0 && row < mine.rows) {
                const float lse = zero[half] ? -INFINITY : (sums.top[half] + log2f(sum)) * LN_2;
                params.lse[mine.batch * params.lse_batch_stride + mine.head * params.lse_head_stride + mine.first_row + row] = lse;
            }
        }
        // Selected, not multiplied: they may hold NaN. Few query tiles have such rows.
        if (__any_sync(0xffffffff, zero[0] || zero[1])) {
#pragma unroll
            for (int tile = 0; tile < D / 8; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[tile][i] = zero[i / 2] ? 0.0f : acc[tile][i];
            }
        }
        if (HAS_ODD_ROWS && params.head_dim % 16 != 0) {
            store_odd_rows(mine, acc, inverse, tile_start);
            is_stored = true;
            return;
        }
        const int row = warp * GROUP_ROWS + lane % 16;
        store_chunks(acc, inverse, D / 8, [&](int tile) { return base + tile_start + S::TileO::offset(row, tile + lane / 16); });
        if (params.out_rows == nullptr && (mine.clips || mine.rows == GROUP_ROWS)) {
            ptx::fence_async_proxy();
            __syncwarp();
            if (lane == 0) {
                const ptx::TensorMap* map = &params.out_map;
                int row = mine.first_row;
                if constexpr (S::SEGMENTED) {
                    const SegmentRow at = rows_info(work_index).places[threadIdx.x / 32 - 4];
                    map = &segments->maps[at.segment].out;
                    row = at.row;
                }
#pragma unroll
                for (int panel = 0; panel < S::PANELS; ++panel) {
                    const uint32_t from = base + tile_start + (panel * S::TileO::ROWS + warp * GROUP_ROWS) * ROW_BYTES;
                    ptx::tma_store(map, from, panel * S::PANEL, row, mine.head, mine.batch);
                }
                ptx::tma_store_commit();
            }
        } else {
            __syncwarp();
            store_rows(mine, shared + tile_start, warp * GROUP_ROWS);
            ptx::fence_async_proxy();
        }
        is_stored = true;
    }

    // Where a row of this warp is in the output, if it exists.
    __device__ T* output_row(const WarpRows& mine, int row) const {
        const Strides* strides = &params.out_strides;
        void* start = params.out;
        uint32_t batch = mine.batch;
        uint32_t token = mine.first_row + row;
        if constexpr (S::SEGMENTED) {
            const SegmentRow at = rows_info(work_index).places[threadIdx.x / 32 - 4];
            const SegmentOutput& output = segments->outputs[at.segment];
            start = output.out;
            strides = &output.strides;
            token = at.row + row;
        } else if (params.out_rows != nullptr && row < mine.rows) {
            const uint32_t flat = params.out_rows[token];
            batch = flat / params.seq_q;
            token = flat % params.seq_q;
        }
        return static_cast<T*>(start) + batch * strides->batch + token * strides->token + mine.head * strides->head;
    }

    // Writes the first `chunks` chunks of the rows of a warp's sums, over what they are divided by, to shared
    // memory. `place` says where a lane's row of two neighbouring chunks is: that of the first one in lanes 0 to 15.
    template <typename Place>
    __device__ static void store_chunks(const float (&acc)[D / 8][4], const float (&inverse)[2], int chunks, Place place) {
        // Four matrices of 8 rows x 8 columns at a time: upper and lower rows of two chunks.
#pragma unroll
        for (int tile = 0; tile < D / 8; tile += 2) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i % 2;
                const float(&pair)[4] = acc[tile + i / 2];
                words[i] = ptx::pack_pair<T>(pair[2 * half] * inverse[half], pair[2 * half + 1] * inverse[half]);
            }
            if (tile + 1 < chunks) {
                ptx::stmatrix_x4(place(tile), words);
            } else if (tile < chunks) {
                ptx::stmatrix_x2(place(tile), words[0], words[1]);
            }
        }
    }

    // Rows of an odd number of chunks are no whole sectors of memory. The copy engine writes each of them in one
    // piece, since each piece costs two sectors that it has in part. In shared memory they lie in the places of
    // this warpgroup's output, one place a panel, one row after the other; so no two rows have chunks in the
    // same banks.
    __device__ void store_odd_rows(const WarpRows& mine, const float (&acc)[D / 8][4], const float (&inverse)[2], int tile_start) const {
        constexpr int ROWS = SM90_WARPGROUP_ROWS;
        const int lane = threadIdx.x % 32;
        const int row_bytes = params.head_dim * ELEMENT_BYTES;
        const int panel_rows = ROWS * ROW_BYTES / row_bytes;
        const int row = threadIdx.x / 32 % 4 * GROUP_ROWS + lane % GROUP_ROWS;
        int panel = 0;
#pragma unroll
        for (int other = 1; other < S::PANELS; ++other) panel += row >= other * panel_rows;
        const int first = panel * S::TileO::ROWS + (S::OUTPUT_IN_VALUES ? 0 : warpgroup * ROWS);
        const uint32_t from = base + tile_start + first * ROW_BYTES + (row - panel * panel_rows) * row_bytes;
        store_chunks(acc, inverse, params.head_dim / 8, [&](int tile) { return from + (tile + lane / 16) * 16; });
        ptx::fence_async_proxy();
        __syncwarp();
        if (lane < mine.rows) {
            ptx::bulk_store(output_row(mine, lane), from, row_bytes);
            ptx::tma_store_commit();
        }
    }

    // Rows of packed tensors one by one, to where they lie or, with a list, to their places in the
    // padded output.
    __device__ void store_rows(const WarpRows& mine, const unsigned char* tile, int first) const {
        constexpr int CHUNKS = D / 8;
        const int lane = threadIdx.x % 32;
        // This lane's row, of 16.
        const auto own = reinterpret_cast<uintptr_t>(output_row(mine, min(lane % GROUP_ROWS, max(mine.rows - 1, 0))));
        const int chunks = mine.rows * CHUNKS;
        for (int before = 0; before < chunks; before += 32) {
            const int row = min((before + lane) / CHUNKS, GROUP_ROWS - 1);
            const int chunk = (before + lane) % CHUNKS;
            T* const to = reinterpret_cast<T*>(__shfl_sync(0xffffffff, own, row));
            if (before + lane < chunks && chunk * 8 < params.head_dim) {
                *reinterpret_cast<uint4*>(to + chunk * 8) =
                    *reinterpret_cast<const uint4*>(tile + S::TileO::offset(first + row, chunk));
            }
        }
    }

    // At the first key tile of the current query tile.
    KeysState state;
    // Query tiles before this one, and what `TileRows` says of it.
    int work_index = 0;
    int key_tiles = 0;
    int masked_tiles = 0;
    bool has_rows = false;
    bool is_stored = false;
    // With key ranges: `RangedTileRows::descends`; what this warp's rows see; and whether this lane's rows saw a kept key.
    bool descends = false;
    SeenByRows seen;
    bool sees_some[2];
};

}  // namespace sm90
