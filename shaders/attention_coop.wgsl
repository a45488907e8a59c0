// Attention of one tile of query rows against all its keys on cooperative matrices: f16 operands, f32 accumulators.
//
// A subgroup owns BLOCKS · SHAPE rows. Its queries and its output stay in matrices all along; scores and weights pass through
// workgroup memory, since an element of a matrix cannot be read:
//
//      k, v ──▶ staged (f16)  ──▶ S = Q·Kᵀ ──▶ scores (f32) ──▶ softmax, a row to LANES lanes ──▶ probs (f16) ──▶ O += P·V
//
// A step has two barriers. Between them lie the products of two steps, P·V of the last and Q·Kᵀ of this; after them softmax,
// and staging of this step's values and the next one's keys:
//
//      | P·V(n-1), Q·Kᵀ(n) | stage V(n), K(n+1); softmax(n) | P·V(n), Q·Kᵀ(n+1) | ...
//
// Weights are relative to a base of each row that follows its maximum only when that has grown by more than 2^8 (the rule of
// FlashAttention-4): only then O goes through workgroup memory to be scaled.

const LANES: u32 = SUBGROUP_SIZE / SHAPE;
const INVOCATIONS: u32 = SUBGROUPS * SUBGROUP_SIZE;
// The head dimension, filled up with zeros to whole matrices.
const DIM: u32 = (HEAD_DIM + SHAPE - 1u) / SHAPE * SHAPE;
const DIM_FRAGMENTS: u32 = DIM / SHAPE;
const KEY_FRAGMENTS: u32 = TILE_KEYS / SHAPE;
const SLICES: u32 = (DIM_FRAGMENTS + KEY_FRAGMENTS - 1u) / KEY_FRAGMENTS;
// Words of a row that are read, and that are staged.
const HEAD_WORDS: u32 = HEAD_DIM / 8u;
const DIM_WORDS: u32 = DIM / 8u;
const KEY_WORDS: u32 = TILE_KEYS / 8u;
const FETCHES: u32 = (TILE_KEYS * DIM_WORDS + INVOCATIONS - 1u) / INVOCATIONS;
// Quads (vec4s) of a fragment's row, and of the scores that one lane has of a row.
const FRAGMENT: u32 = SHAPE / 4u;
const QUADS: u32 = TILE_KEYS / 4u / LANES;
// Rows lie so far apart, in quads, that the rows of a matrix, and the lanes that read them, fall on different banks.
const STAGED_STRIDE: u32 = DIM / 4u + 2u;
const PROBS_STRIDE: u32 = TILE_KEYS / 4u + 2u;
const SCORES_STRIDE: u32 = TILE_KEYS / 4u + LANES;
const VALUES: u32 = TILE_KEYS * STAGED_STRIDE;
const KEPT_WORDS: u32 = (TILE_KEYS + 31u) / 32u;
// Below any score: masked scores take it. The lowest biases come close to it.
const LOWEST: f32 = -3.4028234e38;
// A row's largest weight is 2^7 when its base is set and never above 2^15, so that weights down to 2^-31 of the largest count.
const BASE_BELOW: f32 = 7.0;
const MOST: f32 = 15.0;

// Keys, then values.
var<workgroup> staged: array<vec4<f16>, 2u * VALUES>;
var<workgroup> probs: array<vec4<f16>, TILE_ROWS * PROBS_STRIDE>;
var<workgroup> scores: array<vec4<f32>, TILE_ROWS * SCORES_STRIDE>;
// Whether a subgroup has rows whose output must be scaled before the next product.
var<workgroup> grew: array<u32, SUBGROUPS>;
// The bits of the largest magnitudes of q, k and v.
var<workgroup> largest: array<atomic<u32>, 3>;

// What q, k and v are multiplied by to lie inside of f16's range; powers of two.
struct Factors {
    q: f32,
    k: f32,
    v: f32,
}

// 2^13 over a power of two near the magnitude.
fn factor_for(magnitude: u32) -> f32 {
    return bitcast<f32>(clamp(266 - i32(magnitude >> 23u), 2, 252) << 23u);
}

// 1 over a power of two.
fn inverse(factor: f32) -> f32 {
    return bitcast<f32>(0x7f000000u - bitcast<u32>(factor));
}

// Which keys of a step are kept.
fn kept_in(tile: Tile, first_key: u32) -> array<u32, KEPT_WORDS> {
    var kept: array<u32, KEPT_WORDS>;
    for (var word = 0u; word < KEPT_WORDS; word++) {
        kept[word] = kept_keys(tile, (first_key & ~31u) + word * 32u) >> (first_key & 31u);
    }
    return kept;
}

// naga demands that control flow around matrices is uniform, and takes whatever went through a variable for non-uniform. Here it
// depends on constants, parameters, the workgroup's tile, and on what all read of workgroup memory after a barrier.
@diagnostic(off, derivative_uniformity)
@compute @workgroup_size(INVOCATIONS)
fn attention(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let tile = locate(group);
    if !tile.exists {
        return;
    }
    let first_row = subgroup * BLOCKS * SHAPE;
    let lane_row = lane / LANES;
    let lane_in_row = lane % LANES;
    let steps = (tile.keys + TILE_KEYS - 1u) / TILE_KEYS;

    var factors = Factors(1.0, 1.0, 1.0);
    if HAS_RANGE {
        factors = Factors(64.0, 64.0, 256.0);
        if invocation < 3u {
            atomicStore(&largest[invocation], 0u);
        }
    }
    // A second attempt only where a value left the range of the first.
    for (var attempt = 0u; attempt < ATTEMPTS; attempt++) {
        var seen = vec3<f32>(0.0);
        var output: array<array<MatrixC, DIM_FRAGMENTS>, BLOCKS>;
        for (var b = 0u; b < BLOCKS; b++) { // unroll
            for (var c = 0u; c < DIM_FRAGMENTS; c++) { // unroll
                output[b][c] = MatrixC();
            }
        }

        // Queries pass through `probs`, as many columns at a time as there are keys in a step.
        var queries: array<array<MatrixA, DIM_FRAGMENTS>, BLOCKS>;
        for (var slice = 0u; slice < SLICES; slice++) { // unroll
            workgroupBarrier();
            for (var i = invocation; i < TILE_ROWS * KEY_WORDS; i += INVOCATIONS) {
                let row = i / KEY_WORDS;
                let word = i % KEY_WORDS;
                var value = zero_word();
                // Rows that are not written are zeros: what they hold must not count in the range.
                if slice * KEY_WORDS + word < HEAD_WORDS && row < tile.rows && row_is_kept(tile, row) {
                    value = q[tile.q + query_row(tile, row) * params.q_stride_s + slice * KEY_WORDS + word];
                }
                seen.x = max(seen.x, largest_of(value));
                probs[row * PROBS_STRIDE + word * 2u] = halves(value, 0u, factors.q);
                probs[row * PROBS_STRIDE + word * 2u + 1u] = halves(value, 1u, factors.q);
            }
            workgroupBarrier();
            for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
                if slice * KEY_FRAGMENTS + n < DIM_FRAGMENTS {
                    for (var b = 0u; b < BLOCKS; b++) { // unroll
                        let at = (first_row + b * SHAPE) * PROBS_STRIDE + n * FRAGMENT;
                        queries[b][slice * KEY_FRAGMENTS + n] = coopLoadT<MatrixA>(&probs[at], PROBS_STRIDE);
                    }
                }
            }
        }

        let score_scale = inverse(factors.q) * inverse(factors.k) * params.score_scale;
        var base: array<f32, BLOCKS>;
        var scale: array<f32, BLOCKS>;
        // Sums over this lane's keys only.
        var row_sum: array<f32, BLOCKS>;
        for (var b = 0u; b < BLOCKS; b++) { // unroll
            base[b] = LOWEST;
            scale[b] = 1.0;
            row_sum[b] = 0.0;
        }

        var kept = kept_in(tile, 0u);
        for (var i = invocation; i < TILE_KEYS * DIM_WORDS; i += INVOCATIONS) {
            let key = i / DIM_WORDS;
            let word = i % DIM_WORDS;
            var value = zero_word();
            if (HEAD_DIM == DIM || word < HEAD_WORDS) && ((kept[key / 32u] >> (key % 32u)) & 1u) == 1u {
                value = k[tile.k + key_row(tile, key) * params.k_stride_s + word];
            }
            seen.y = max(seen.y, largest_of(value));
            staged[key * STAGED_STRIDE + word * 2u] = halves(value, 0u, factors.k);
            staged[key * STAGED_STRIDE + word * 2u + 1u] = halves(value, 1u, factors.k);
        }

        for (var step = 0u; step <= steps; step++) {
            workgroupBarrier();
            if step > 0u {
                var must_scale = 0u;
                for (var other = 0u; other < SUBGROUPS; other++) {
                    must_scale |= grew[other];
                }
                if must_scale != 0u {
                    for (var slice = 0u; slice < SLICES; slice++) { // unroll
                        for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
                            if slice * KEY_FRAGMENTS + n < DIM_FRAGMENTS {
                                for (var b = 0u; b < BLOCKS; b++) { // unroll
                                    let at = (first_row + b * SHAPE) * SCORES_STRIDE + n * FRAGMENT;
                                    coopStoreT(output[b][slice * KEY_FRAGMENTS + n], &scores[at], SCORES_STRIDE);
                                }
                            }
                        }
                        workgroupBarrier();
                        for (var b = 0u; b < BLOCKS; b++) { // unroll
                            for (var i = 0u; i < QUADS; i++) {
                                let row = first_row + b * SHAPE + lane_row;
                                scores[row * SCORES_STRIDE + i * LANES + lane_in_row] *= scale[b];
                            }
                        }
                        workgroupBarrier();
                        for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
                            if slice * KEY_FRAGMENTS + n < DIM_FRAGMENTS {
                                for (var b = 0u; b < BLOCKS; b++) { // unroll
                                    let at = (first_row + b * SHAPE) * SCORES_STRIDE + n * FRAGMENT;
                                    output[b][slice * KEY_FRAGMENTS + n] =
                                        coopLoadT<MatrixC>(&scores[at], SCORES_STRIDE);
                                }
                            }
                        }
                        workgroupBarrier();
                    }
                }
                // O += P·V
                for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
                    var weights: array<MatrixA, BLOCKS>;
                    for (var b = 0u; b < BLOCKS; b++) { // unroll
                        let at = (first_row + b * SHAPE) * PROBS_STRIDE + n * FRAGMENT;
                        weights[b] = coopLoadT<MatrixA>(&probs[at], PROBS_STRIDE);
                    }
                    for (var c = 0u; c < DIM_FRAGMENTS; c++) { // unroll
                        let at = VALUES + n * SHAPE * STAGED_STRIDE + c * FRAGMENT;
                        let values = coopLoadT<MatrixB>(&staged[at], STAGED_STRIDE);
                        for (var b = 0u; b < BLOCKS; b++) { // unroll
                            output[b][c] = coopMultiplyAdd(weights[b], values, output[b][c]);
                        }
                    }
                }
            }
            if step < steps {
                // S = Q·Kᵀ
                for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
                    var sums: array<MatrixC, BLOCKS>;
                    for (var b = 0u; b < BLOCKS; b++) { // unroll
                        sums[b] = MatrixC();
                    }
                    for (var c = 0u; c < DIM_FRAGMENTS; c++) { // unroll
                        let at = n * SHAPE * STAGED_STRIDE + c * FRAGMENT;
                        let keys = coopLoad<MatrixB>(&staged[at], STAGED_STRIDE);
                        for (var b = 0u; b < BLOCKS; b++) { // unroll
                            sums[b] = coopMultiplyAdd(queries[b][c], keys, sums[b]);
                        }
                    }
                    for (var b = 0u; b < BLOCKS; b++) { // unroll
                        let at = (first_row + b * SHAPE) * SCORES_STRIDE + n * FRAGMENT;
                        coopStoreT(sums[b], &scores[at], SCORES_STRIDE);
                    }
                }
            }
            workgroupBarrier();
            if step < steps {
                let first_key = step * TILE_KEYS;
                let next_key = first_key + TILE_KEYS;
                let kept_next = kept_in(tile, next_key);
                var fetched_k: array<Word, FETCHES>;
                var fetched_v: array<Word, FETCHES>;
                for (var f = 0u; f < FETCHES; f++) { // unroll
                    let i = invocation + f * INVOCATIONS;
                    let key = i / DIM_WORDS;
                    let word = i % DIM_WORDS;
                    fetched_v[f] = zero_word();
                    fetched_k[f] = zero_word();
                    if (HEAD_DIM == DIM || word < HEAD_WORDS)
                        && (TILE_KEYS * DIM_WORDS % INVOCATIONS == 0u || key < TILE_KEYS) {
                        // Dropped keys are staged as zeros: what their rows hold must not matter, and 0 · NaN is NaN.
                        if ((kept[key / 32u] >> (key % 32u)) & 1u) == 1u {
                            fetched_v[f] = v[tile.v + key_row(tile, first_key + key) * params.v_stride_s + word];
                        }
                        if ((kept_next[key / 32u] >> (key % 32u)) & 1u) == 1u {
                            fetched_k[f] = k[tile.k + key_row(tile, next_key + key) * params.k_stride_s + word];
                        }
                    }
                }

                // Softmax.
                var all_kept = true;
                for (var word = 0u; word < KEPT_WORDS; word++) {
                    all_kept = all_kept && kept[word] == 0xffffffffu;
                }
                var rows_grew = false;
                for (var b = 0u; b < BLOCKS; b++) { // unroll
                    let row = first_row + b * SHAPE + lane_row;
                    var row_scores: array<vec4<f32>, QUADS>;
                    var row_max = LOWEST;
                    for (var i = 0u; i < QUADS; i++) { // unroll
                        let quad = i * LANES + lane_in_row;
                        row_scores[i] = scores[row * SCORES_STRIDE + quad] * score_scale;
                        if BIAS {
                            for (var n = 0u; n < 4u; n++) {
                                let score = biased(tile, row, first_key + quad * 4u + n, row_scores[i][n]);
                                row_scores[i][n] = select(LOWEST, score.score, score.kept);
                            }
                        }
                    }
                    if !all_kept {
                        for (var i = 0u; i < QUADS; i++) { // unroll
                            let quad = i * LANES + lane_in_row;
                            let bits = vec4<u32>(kept[quad / 8u] >> (quad % 8u * 4u)) & vec4<u32>(1u, 2u, 4u, 8u);
                            row_scores[i] = select(vec4<f32>(LOWEST), row_scores[i], bits != vec4<u32>(0u));
                        }
                    }
                    for (var i = 0u; i < QUADS; i++) { // unroll
                        let pairs = max(row_scores[i].xy, row_scores[i].zw);
                        row_max = max(row_max, max(pairs.x, pairs.y));
                    }
                    for (var distance = 1u; distance < LANES; distance *= 2u) {
                        row_max = max(row_max, subgroupShuffleXor(row_max, distance));
                    }
                    scale[b] = 1.0;
                    if row_max > base[b] + MOST {
                        let raised = row_max - BASE_BELOW;
                        // Bounded: the difference of the lowest base and a high one has no f32.
                        scale[b] = exp2(max(base[b] - raised, -1000.0));
                        row_sum[b] *= scale[b];
                        rows_grew = rows_grew || base[b] > LOWEST;
                        base[b] = raised;
                    }
                    // A row without keys has no base: its weights are 0.
                    let minus = select(base[b], 0.0, base[b] == LOWEST);
                    for (var i = 0u; i < QUADS; i++) { // unroll
                        let quad = i * LANES + lane_in_row;
                        let p = exp2(row_scores[i] - minus);
                        row_sum[b] += p.x + p.y + p.z + p.w;
                        probs[row * PROBS_STRIDE + quad] = vec4<f16>(p);
                    }
                }
                let subgroup_grew = subgroupAny(rows_grew);
                if lane == 0u {
                    grew[subgroup] = select(0u, 1u, subgroup_grew);
                }

                for (var f = 0u; f < FETCHES; f++) { // unroll
                    let i = invocation + f * INVOCATIONS;
                    let key = i / DIM_WORDS;
                    let word = i % DIM_WORDS;
                    if TILE_KEYS * DIM_WORDS % INVOCATIONS == 0u || key < TILE_KEYS {
                        let at = key * STAGED_STRIDE + word * 2u;
                        staged[VALUES + at] = halves(fetched_v[f], 0u, factors.v);
                        staged[VALUES + at + 1u] = halves(fetched_v[f], 1u, factors.v);
                        staged[at] = halves(fetched_k[f], 0u, factors.k);
                        staged[at + 1u] = halves(fetched_k[f], 1u, factors.k);
                    }
                    seen = max(seen, vec3<f32>(0.0, largest_of(fetched_k[f]), largest_of(fetched_v[f])));
                }
                kept = kept_next;
            }
        }

        if HAS_RANGE && attempt == 0u {
            for (var i = 0u; i < 3u; i++) {
                atomicMax(&largest[i], bitcast<u32>(seen[i]));
            }
            workgroupBarrier();
            let q_bits = atomicLoad(&largest[0]);
            let k_bits = atomicLoad(&largest[1]);
            let v_bits = atomicLoad(&largest[2]);
            let limits = vec3<f32>(512.0, 512.0, 128.0);
            let magnitudes = bitcast<vec3<f32>>(vec3<u32>(q_bits, k_bits, v_bits));
            // Small values are as exact as need be while others of the tensor are not small, or scores do not depend on them.
            let is_inside = all(magnitudes <= limits) && (v_bits == 0u || magnitudes.z >= 0.015625)
                && abs(params.score_scale) <= 4.0;
            if !is_inside {
                factors = Factors(factor_for(q_bits), factor_for(k_bits), factor_for(v_bits));
                continue;
            }
        }

        // Divide by the sum of the lanes' sums and write.
        for (var b = 0u; b < BLOCKS; b++) { // unroll
            for (var distance = 1u; distance < LANES; distance *= 2u) {
                row_sum[b] += subgroupShuffleXor(row_sum[b], distance);
            }
        }
        for (var slice = 0u; slice < SLICES; slice++) { // unroll
            workgroupBarrier();
            for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
                if slice * KEY_FRAGMENTS + n < DIM_FRAGMENTS {
                    for (var b = 0u; b < BLOCKS; b++) { // unroll
                        let at = (first_row + b * SHAPE) * SCORES_STRIDE + n * FRAGMENT;
                        coopStoreT(output[b][slice * KEY_FRAGMENTS + n], &scores[at], SCORES_STRIDE);
                    }
                }
            }
            workgroupBarrier();
            for (var b = 0u; b < BLOCKS; b++) { // unroll
                let row = first_row + b * SHAPE + lane_row;
                if row < tile.rows {
                    // Selected, not multiplied: a dropped row may hold NaN.
                    let is_zero = row_sum[b] == 0.0 || !row_is_kept(tile, row);
                    let out_row = tile.out + query_row(tile, row) * params.out_stride_s;
                    for (var word = lane_in_row; word < KEY_WORDS; word += LANES) {
                        if slice * KEY_WORDS + word < HEAD_WORDS {
                            let at = row * SCORES_STRIDE + word * 2u;
                            let factor = inverse(factors.v);
                            let low = select(scores[at] / row_sum[b] * factor, vec4<f32>(0.0), is_zero);
                            let high = select(scores[at + 1u] / row_sum[b] * factor, vec4<f32>(0.0), is_zero);
                            out[out_row + slice * KEY_WORDS + word] = narrow(low, high);
                        }
                    }
                    if slice == 0u && lane_in_row == 0u {
                        write_lse(tile, row, base[b], row_sum[b]);
                    }
                }
            }
        }
        break;
    }
}
