// Attention of one tile of query rows against all its keys on cooperative matrices: f16 operands,
// f32 accumulators.
//
// Queries and output stay in matrices throughout. Scores and weights pass through workgroup memory,
// since WGSL cannot read an element of a matrix:
//
//      k, v ──▶ staged (f16) ──▶ S = Q·Kᵀ ──▶ scores (f32)
//                                                 │ softmax, a row to LANES lanes
//                                                 ▼
//                                O += P·V ◀── probs (f16)
//
// Of softmax a subgroup has SHAPE rows. Of the products it has, where that fits, half of the columns of
// twice as many rows, so that each matrix of keys or values that it loads serves two products. Scores are computed a
// step ahead and products with values a step behind, so that a step needs only two barriers and
// products run beside exponentials:
//
//      phase   reads                          computes                             writes
//        1     K(n+1), V(n-1), scores of n    S of n+1, O += P·V of n-1, softmax   probs of n
//        2     probs of n, into matrices                                           K(n+2), V(n),
//                                                                                  scores of n+1
//
// What phase 2 stages is fetched in phase 1 and pinned there: drivers move loads of memory that
// nobody writes down to their use. Where there are registers for it, rows of keys are looked up a step
// before they are fetched, and with FETCHES_EARLY they are fetched a step before they are staged.
//
// Weights are relative to a base of each row. It follows the row's maximum only when that has
// grown by more than 2^8 (the rule of FlashAttention-4). Only then O goes through workgroup
// memory to be scaled.
//
// Tensors are read as u32s, 16 bytes at a time, with no branch around a load, so that loads need
// not wait for each other.
//
// Where few workgroups would work at the end, several take a tile, each some of its keys: what they find is
// merged (coop_splits.wgsl).
//
// Lines marked `// with ranges` or `// without ranges` are only in variants where queries have
// ranges of keys, or none; coop_ranges.wgsl has what they call.

const LANES: u32 = SUBGROUP_SIZE / SHAPE;
const INVOCATIONS: u32 = SUBGROUPS * SUBGROUP_SIZE;
// The head dimension, padded with zeros to whole matrices.
const DIM: u32 = (HEAD_DIM + SHAPE - 1u) / SHAPE * SHAPE;
const DIM_FRAGMENTS: u32 = DIM / SHAPE;
const KEY_FRAGMENTS: u32 = TILE_KEYS / SHAPE;
const SLICES: u32 = (DIM_FRAGMENTS + KEY_FRAGMENTS - 1u) / KEY_FRAGMENTS;
// A subgroup computes the products of BLOCKS blocks of SHAPE rows, and of one of as many parts of the
// columns: keys of the scores, dimensions of the output.
const OWN_KEY_FRAGMENTS: u32 = KEY_FRAGMENTS / BLOCKS;
const OWN_DIM_FRAGMENTS: u32 = DIM_FRAGMENTS / BLOCKS;
// Words of a row that are read, and that are staged.
const HEAD_WORDS: u32 = HEAD_DIM / 8u;
const DIM_WORDS: u32 = DIM / 8u;
const KEY_WORDS: u32 = TILE_KEYS / 8u;
const STAGED_WORDS: u32 = TILE_KEYS * DIM_WORDS;
const FETCHES: u32 = (STAGED_WORDS + INVOCATIONS - 1u) / INVOCATIONS;
// Quads (four elements) of a fragment's row, and of the scores that one lane has of a row.
const FRAGMENT: u32 = SHAPE / 4u;
const QUADS: u32 = TILE_KEYS / 4u / LANES;
// Words that one lane moves of a row of queries or output: of a slice with as many columns as a
// step has keys.
const LANE_WORDS: u32 = (KEY_WORDS + LANES - 1u) / LANES;
// Distances of rows in quads, such that the rows of a matrix, and the lanes that read them, fall on
// different banks.
const STAGED_STRIDE: u32 = DIM / 4u + 2u;
const PROBS_STRIDE: u32 = TILE_KEYS / 4u + 2u;
const SCORES_STRIDE: u32 = TILE_KEYS / 4u + LANES;
const VALUES: u32 = TILE_KEYS * STAGED_STRIDE;
// A row's largest weight is 2^7 when its base is set and never above 2^15, so weights down to
// 2^-31 of the largest are not lost.
const BASE_BELOW: f32 = 7.0;
const MOST: f32 = 15.0;

// Keys, then values.
var<workgroup> staged: array<vec4<f16>, 2u * VALUES>;
var<workgroup> probs: array<vec4<f16>, TILE_ROWS * PROBS_STRIDE>;
var<workgroup> scores: array<vec4<f32>, TILE_ROWS * SCORES_STRIDE>;
// Not 0 if the output of some row must be scaled before the next product.
var<workgroup> growing: atomic<u32>;
// Written only in a case that never matters, so that the compiler keeps the loads; see `pin`.
var<workgroup> pinned: atomic<u32>;
// The bits of the largest magnitudes of q, k and v.
var<workgroup> largest: array<atomic<u32>, 3>;

// Powers of two that bring q, k and v into f16's range.
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

// One step's keys.
struct Step {
    // Past the tile's last key if there is no such step.
    first_key: u32,
    kept: vec2<u32>,
    // The rows that this invocation fetches.
    rows: array<u32, FETCHES>,
}

// The first step from `first_key` on. Keys past the tile's last one get its row, so that loads
// need no branch.
fn step_from(tile: Tile, first_key: u32, invocation: u32) -> Step {
    var step: Step;
    step.first_key = next_step(tile, first_key);
    step.kept = kept_in(tile, step.first_key);
    for (var f = 0u; f < FETCHES; f++) { // unroll
        let key = (invocation + f * INVOCATIONS) / DIM_WORDS;
        step.rows[f] = key_row(tile, min(step.first_key + key, tile.keys.end - 1u));
    }
    return step;
}

alias Steps = array<Step, STEPS_AFTER + 1u>;

fn take_step(steps: ptr<function, Steps>, last: Step) {
    for (var i = 0u; i < STEPS_AFTER; i++) { // unroll
        (*steps)[i] = (*steps)[i + 1u];
    }
    (*steps)[STEPS_AFTER] = last;
}

// What an invocation fetches of a step's keys or values: word `invocation` and every
// INVOCATIONS-th after it.
alias Words = array<vec4<u32>, FETCHES>;

// Dropped keys are set to zero only where they would count in the range: their scores are masked
// anyway.
fn fetch_keys(tile: Tile, step: Step, invocation: u32) -> Words {
    var words: Words;
    for (var f = 0u; f < FETCHES; f++) { // unroll
        let i = invocation + f * INVOCATIONS;
        let word = k[tile.k + step.rows[f] * params.k_stride_s + min(i % DIM_WORDS, HEAD_WORDS - 1u)];
        let is_zero = i % DIM_WORDS >= HEAD_WORDS || (HAS_RANGE && !is_kept(step.kept, i / DIM_WORDS));
        words[f] = select(word, vec4<u32>(0u), is_zero);
    }
    return words;
}

// Values of dropped keys are set to zero: what their rows hold must not matter, and 0 · NaN is NaN.
fn fetch_values(tile: Tile, step: Step, invocation: u32) -> Words {
    var words: Words;
    for (var f = 0u; f < FETCHES; f++) { // unroll
        let i = invocation + f * INVOCATIONS;
        let word = v[tile.v + step.rows[f] * params.v_stride_s + min(i % DIM_WORDS, HEAD_WORDS - 1u)];
        words[f] = select(word, vec4<u32>(0u), i % DIM_WORDS >= HEAD_WORDS || !is_kept(step.kept, i / DIM_WORDS));
    }
    return words;
}

// Stages words from `first` on, and returns their largest magnitude.
fn stage(words: Words, first: u32, invocation: u32, factor: f32) -> f32 {
    var largest = 0.0;
    for (var f = 0u; f < FETCHES; f++) { // unroll
        let i = invocation + f * INVOCATIONS;
        if STAGED_WORDS % INVOCATIONS == 0u || i < STAGED_WORDS {
            let at = first + i / DIM_WORDS * STAGED_STRIDE + i % DIM_WORDS * 2u;
            staged[at] = halves(words[f], 0u, factor);
            staged[at + 1u] = halves(words[f], 1u, factor);
            // Words beyond the step's are of keys that nobody has asked whether they are kept.
            largest = max(largest, largest_of(words[f]));
        }
    }
    return largest;
}

alias Queries = array<MatrixA, BLOCKS * DIM_FRAGMENTS>;
alias Sums = array<MatrixC, BLOCKS * OWN_KEY_FRAGMENTS>;
alias Output = array<MatrixC, BLOCKS * OWN_DIM_FRAGMENTS>;
alias Weights = array<MatrixA, BLOCKS * KEY_FRAGMENTS>;

// Where a subgroup's share of the products begins: among keys and values that are staged, and its
// first row's among weights and scores.
struct Share {
    keys: u32,
    values: u32,
    probs: u32,
    scores: u32,
}

fn share_of(subgroup: u32) -> Share {
    let part = subgroup % BLOCKS;
    let row = (subgroup - part) * SHAPE;
    return Share(
        part * OWN_KEY_FRAGMENTS * SHAPE * STAGED_STRIDE,
        VALUES + part * OWN_DIM_FRAGMENTS * FRAGMENT,
        row * PROBS_STRIDE,
        row * SCORES_STRIDE + part * OWN_KEY_FRAGMENTS * FRAGMENT,
    );
}

// Output passes through `scores` in slices, of each subgroup as many columns as of its scores. This is
// the quad of a head that lies at a quad of a slice; past the head if there is none.
fn head_quad(slice: u32, quad: u32) -> u32 {
    let in_part = slice * (OWN_KEY_FRAGMENTS * FRAGMENT) + quad % (OWN_KEY_FRAGMENTS * FRAGMENT);
    let part = quad / (OWN_KEY_FRAGMENTS * FRAGMENT);
    let at = part * (OWN_DIM_FRAGMENTS * FRAGMENT) + in_part;
    return select(DIM / 4u, at, in_part < OWN_DIM_FRAGMENTS * FRAGMENT);
}

// S = Q·Kᵀ with the staged keys.
fn multiply_keys(queries: ptr<function, Queries>, share: Share, sums: ptr<function, Sums>) {
    for (var n = 0u; n < OWN_KEY_FRAGMENTS; n++) { // unroll
        for (var b = 0u; b < BLOCKS; b++) { // unroll
            (*sums)[b * OWN_KEY_FRAGMENTS + n] = MatrixC();
        }
    }
    for (var c = 0u; c < DIM_FRAGMENTS; c++) { // unroll
        for (var n = 0u; n < OWN_KEY_FRAGMENTS; n++) { // unroll
            let at = share.keys + n * SHAPE * STAGED_STRIDE + c * FRAGMENT;
            let keys = coopLoad<MatrixB>(&staged[at], STAGED_STRIDE);
            for (var b = 0u; b < BLOCKS; b++) { // unroll
                (*sums)[b * OWN_KEY_FRAGMENTS + n] =
                    coopMultiplyAdd((*queries)[b * DIM_FRAGMENTS + c], keys, (*sums)[b * OWN_KEY_FRAGMENTS + n]);
            }
        }
    }
}

fn store_scores(sums: ptr<function, Sums>, share: Share) {
    for (var b = 0u; b < BLOCKS; b++) { // unroll
        for (var n = 0u; n < OWN_KEY_FRAGMENTS; n++) { // unroll
            let at = share.scores + b * SHAPE * SCORES_STRIDE + n * FRAGMENT;
            coopStoreT((*sums)[b * OWN_KEY_FRAGMENTS + n], &scores[at], SCORES_STRIDE);
        }
    }
}

fn load_weights(weights: ptr<function, Weights>, share: Share) {
    for (var b = 0u; b < BLOCKS; b++) { // unroll
        for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
            let at = share.probs + b * SHAPE * PROBS_STRIDE + n * FRAGMENT;
            (*weights)[b * KEY_FRAGMENTS + n] = coopLoadT<MatrixA>(&probs[at], PROBS_STRIDE);
        }
    }
}

// O += P·V with the staged values.
fn multiply_values(weights: ptr<function, Weights>, share: Share, output: ptr<function, Output>) {
    for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
        for (var c = 0u; c < OWN_DIM_FRAGMENTS; c++) { // unroll
            let at = share.values + n * SHAPE * STAGED_STRIDE + c * FRAGMENT;
            let values = coopLoadT<MatrixB>(&staged[at], STAGED_STRIDE);
            for (var b = 0u; b < BLOCKS; b++) { // unroll
                (*output)[b * OWN_DIM_FRAGMENTS + c] = coopMultiplyAdd(
                    (*weights)[b * KEY_FRAGMENTS + n],
                    values,
                    (*output)[b * OWN_DIM_FRAGMENTS + c],
                );
            }
        }
    }
}

// Forces words to be loaded by now: a store depends on them, if only to where nobody reads.
fn pin(keys: Words, values: Words) {
    var sum = 0u;
    for (var f = 0u; f < FETCHES; f++) { // unroll
        sum ^= keys[f].x ^ values[f].x;
    }
    if sum == 0x9e3779b9u {
        atomicStore(&pinned, sum);
    }
}

// naga demands uniform control flow around matrices, and assumes that whatever went through a
// variable is not uniform. Here control flow depends on constants, parameters, the workgroup's
// tile, and on workgroup memory that all invocations read after a barrier.
@diagnostic(off, derivative_uniformity)
@compute @workgroup_size(INVOCATIONS)
fn attention(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let tile = locate(group); // without splits
    let tile = share_of_tile(group); // with splits
    let leaves_split = has_split(group); // with splits
    if !tile.exists {
        return;
    }
    if tile.keys.end == tile.keys.first {
        if !leaves_split { // with splits
            write_zeros(tile, invocation);
        } // with splits
        return;
    }
    let lane_row = lane / LANES;
    let lane_in_row = lane % LANES;
    let row = subgroup * SHAPE + lane_row;
    let share = share_of(subgroup);
    let probs_row = row * PROBS_STRIDE;
    let scores_row = row * SCORES_STRIDE;
    let own_keys = seen_by(tile, row); // with ranges

    var factors = Factors(1.0, 1.0, 1.0);
    if HAS_RANGE {
        factors = Factors(64.0, 64.0, 256.0);
        if invocation < 3u {
            atomicStore(&largest[invocation], 0u);
        }
        workgroupBarrier();
    }
    // The second attempt runs only if a value was out of the range of the first.
    for (var attempt = 0u; attempt < ATTEMPTS; attempt++) {
        var seen = vec3<f32>(0.0);
        var output: Output;
        for (var c = 0u; c < OWN_DIM_FRAGMENTS; c++) { // unroll
            for (var b = 0u; b < BLOCKS; b++) { // unroll
                output[b * OWN_DIM_FRAGMENTS + c] = MatrixC();
            }
        }

        // Queries pass through `probs`, as many columns at a time as there are keys in a step.
        var queries: Queries;
        // Rows that are not written are set to zero: what they hold must not count in the range.
        let is_read = row < tile.rows && row_is_kept(tile, row);
        let own_query = tile.q + query_row(tile, min(row, tile.rows - 1u)) * params.q_stride_s;
        var words: array<vec4<u32>, SLICES * LANE_WORDS>;
        for (var slice = 0u; slice < SLICES; slice++) { // unroll
            for (var w = 0u; w < LANE_WORDS; w++) { // unroll
                let word = slice * KEY_WORDS + w * LANES + lane_in_row;
                let value = q[own_query + min(word, HEAD_WORDS - 1u)];
                words[slice * LANE_WORDS + w] = select(vec4<u32>(0u), value, is_read && word < HEAD_WORDS);
            }
        }
        for (var slice = 0u; slice < SLICES; slice++) { // unroll
            workgroupBarrier();
            for (var w = 0u; w < LANE_WORDS; w++) { // unroll
                let word = w * LANES + lane_in_row;
                if KEY_WORDS % LANES == 0u || word < KEY_WORDS {
                    let value = words[slice * LANE_WORDS + w];
                    seen.x = max(seen.x, largest_of(value));
                    probs[probs_row + word * 2u] = halves(value, 0u, factors.q);
                    probs[probs_row + word * 2u + 1u] = halves(value, 1u, factors.q);
                }
            }
            workgroupBarrier();
            for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
                if slice * KEY_FRAGMENTS + n < DIM_FRAGMENTS {
                    for (var b = 0u; b < BLOCKS; b++) { // unroll
                        let at = share.probs + b * SHAPE * PROBS_STRIDE + n * FRAGMENT;
                        queries[b * DIM_FRAGMENTS + slice * KEY_FRAGMENTS + n] =
                            coopLoadT<MatrixA>(&probs[at], PROBS_STRIDE);
                    }
                }
            }
        }

        // Infinity times a score of 0 would be NaN.
        let score_scale = clamp(inverse(factors.q) * params.score_scale * inverse(factors.k), LOWEST, -LOWEST);
        var base = LOWEST;
        // The sum over this lane's keys only.
        var row_sum = 0.0;
        if invocation == 0u {
            atomicStore(&growing, 0u);
        }

        var sums: Sums;
        // This step and those after it.
        var steps: Steps;
        steps[0] = step_from(tile, tile.keys.first, invocation);
        let has_keys = steps[0].first_key < tile.keys.end;
        var keys: Words;
        var values: Words;
        if has_keys {
            for (var i = 0u; i < STEPS_AFTER; i++) { // unroll
                steps[i + 1u] = step_from(tile, steps[i].first_key + TILE_KEYS, invocation);
            }
            seen.y = max(seen.y, stage(fetch_keys(tile, steps[0], invocation), 0u, invocation, factors.k));
            workgroupBarrier();
            multiply_keys(&queries, share, &sums);
            workgroupBarrier();
            store_scores(&sums, share);
            seen.y = max(seen.y, stage(fetch_keys(tile, steps[1], invocation), 0u, invocation, factors.k));
            if FETCHES_EARLY {
                keys = fetch_keys(tile, steps[STEPS_AFTER - 1u], invocation);
                values = fetch_values(tile, steps[0], invocation);
            }
            // The first product with values has no keys yet.
            var nothing: Words;
            seen.z = max(seen.z, stage(nothing, VALUES, invocation, factors.v));
        }
        var weights: Weights;
        for (var n = 0u; n < KEY_FRAGMENTS; n++) { // unroll
            for (var b = 0u; b < BLOCKS; b++) { // unroll
                weights[b * KEY_FRAGMENTS + n] = MatrixA();
            }
        }
        // The outer loop handles steps that scale O: a branch for them in the inner loop would
        // cost every step copies of O.
        while steps[0].first_key < tile.keys.end {
            var last: Step;
            var next_keys: Words;
            var next_values: Words;
            var scale = 1.0;
            var must_scale = 0u;
            while steps[0].first_key < tile.keys.end {
                workgroupBarrier();
                let step = steps[0];
                last = step_from(tile, steps[STEPS_AFTER].first_key + TILE_KEYS, invocation);
                var row_scores: array<vec4<f32>, QUADS>;
                for (var i = 0u; i < QUADS; i++) { // unroll
                    let quad = i * LANES + lane_in_row;
                    row_scores[i] = scores[scores_row + quad] * score_scale;
                    for (var n = 0u; n < 4u; n++) { // with modifiers
                        row_scores[i][n] = modified(tile, row, step.first_key + quad * 4u + n, row_scores[i][n]); // with modifiers
                    } // with modifiers
                    if BIAS {
                        for (var n = 0u; n < 4u; n++) {
                            let score = biased(tile, row, step.first_key + quad * 4u + n, row_scores[i][n]);
                            row_scores[i][n] = select(LOWEST, score.score, score.kept);
                        }
                    }
                }
                // Also where no key is dropped: a branch here would keep products from running
                // beside what follows.
                let seen_keys = seen_in(step.kept, own_keys, step.first_key); // with ranges
                for (var i = 0u; i < QUADS; i++) { // unroll
                    let quad = i * LANES + lane_in_row;
                    let word = select(step.kept.x, step.kept.y, TILE_KEYS > 32u && quad >= 8u); // without ranges
                    let word = select(seen_keys.x, seen_keys.y, TILE_KEYS > 32u && quad >= 8u); // with ranges
                    let bits = vec4<u32>(word >> (quad % 8u * 4u)) & vec4<u32>(1u, 2u, 4u, 8u);
                    row_scores[i] = select(vec4<f32>(LOWEST), row_scores[i], bits != vec4<u32>(0u));
                }

                if FETCHES_EARLY {
                    next_keys = fetch_keys(tile, steps[STEPS_AFTER], invocation);
                    next_values = fetch_values(tile, steps[1], invocation);
                } else {
                    if STEPS_AFTER == 1u {
                        keys = fetch_keys(tile, last, invocation);
                    } else {
                        keys = fetch_keys(tile, steps[STEPS_AFTER], invocation);
                    }
                    values = fetch_values(tile, step, invocation);
                }
                multiply_keys(&queries, share, &sums);
                multiply_values(&weights, share, &output);
                // Softmax.
                var row_max = LOWEST;
                for (var i = 0u; i < QUADS; i++) { // unroll
                    let pairs = max(row_scores[i].xy, row_scores[i].zw);
                    row_max = max(row_max, max(pairs.x, pairs.y));
                }
                for (var distance = 1u; distance < LANES; distance *= 2u) {
                    row_max = max(row_max, subgroupShuffleXor(row_max, distance));
                }
                scale = 1.0;
                var grew = false;
                if row_max > base + MOST {
                    let raised = row_max - BASE_BELOW;
                    // Bounded: the difference of the lowest base and a high one can leave f32's
                    // range.
                    scale = exp2(max(base - raised, -1000.0));
                    row_sum *= scale;
                    grew = base > LOWEST;
                    base = raised;
                }
                // A row without keys has no base: its weights are 0.
                let minus = select(base, 0.0, base == LOWEST);
                for (var i = 0u; i < QUADS; i++) { // unroll
                    let p = exp2(row_scores[i] - minus);
                    row_sum += p.x + p.y + p.z + p.w;
                    probs[probs_row + i * LANES + lane_in_row] = vec4<f16>(p);
                }
                if subgroupAny(grew) { // without ranges
                    atomicStore(&growing, 1u); // without ranges
                } // without ranges
                let asks_for = select(0u, 1u, grew) | non_finite_in(tile, step, values); // with ranges
                if subgroupAny(asks_for != 0u) { // with ranges
                    atomicOr(&growing, asks_for); // with ranges
                } // with ranges
                if !FETCHES_EARLY {
                    pin(keys, values);
                }

                workgroupBarrier();
                must_scale = atomicLoad(&growing);
                if must_scale != 0u {
                    break;
                }
                load_weights(&weights, share);
                store_scores(&sums, share);
                seen.y = max(seen.y, stage(keys, 0u, invocation, factors.k));
                seen.z = max(seen.z, stage(values, VALUES, invocation, factors.v));
                take_step(&steps, last);
                if FETCHES_EARLY {
                    keys = next_keys;
                    values = next_values;
                }
            }
            if must_scale != 0u {
                let step = steps[0]; // with ranges
                let own_seen = seen_in(step.kept, own_keys, step.first_key); // with ranges
                let lane_row = LaneRow(own_seen, probs_row, scores_row, lane_in_row); // with ranges
                for (var slice = 0u; slice < SLICES; slice++) { // unroll
                    workgroupBarrier();
                    for (var n = 0u; n < OWN_KEY_FRAGMENTS; n++) { // unroll
                        if slice * OWN_KEY_FRAGMENTS + n < OWN_DIM_FRAGMENTS {
                            for (var b = 0u; b < BLOCKS; b++) { // unroll
                                let at = share.scores + b * SHAPE * SCORES_STRIDE + n * FRAGMENT;
                                coopStoreT(
                                    output[b * OWN_DIM_FRAGMENTS + slice * OWN_KEY_FRAGMENTS + n],
                                    &scores[at],
                                    SCORES_STRIDE,
                                );
                            }
                        }
                    }
                    workgroupBarrier();
                    for (var i = 0u; i < QUADS; i++) {
                        scores[scores_row + i * LANES + lane_in_row] *= scale;
                    }
                    if (must_scale & HAS_NON_FINITE) != 0u { // with ranges
                        add_non_finite(tile, step.first_key, lane_row, slice, factors.v); // with ranges
                    } // with ranges
                    workgroupBarrier();
                    for (var n = 0u; n < OWN_KEY_FRAGMENTS; n++) { // unroll
                        if slice * OWN_KEY_FRAGMENTS + n < OWN_DIM_FRAGMENTS {
                            for (var b = 0u; b < BLOCKS; b++) { // unroll
                                let at = share.scores + b * SHAPE * SCORES_STRIDE + n * FRAGMENT;
                                output[b * OWN_DIM_FRAGMENTS + slice * OWN_KEY_FRAGMENTS + n] =
                                    coopLoadT<MatrixC>(&scores[at], SCORES_STRIDE);
                            }
                        }
                    }
                }
                atomicStore(&growing, 0u);
                workgroupBarrier();
                load_weights(&weights, share);
                store_scores(&sums, share);
                seen.y = max(seen.y, stage(keys, 0u, invocation, factors.k));
                seen.z = max(seen.z, stage(values, VALUES, invocation, factors.v));
                if (must_scale & HAS_NON_FINITE) != 0u { // with ranges
                    clear_non_finite(invocation); // with ranges
                } // with ranges
                take_step(&steps, last);
                if FETCHES_EARLY {
                    keys = next_keys;
                    values = next_values;
                }
            }
        }

        workgroupBarrier();
        multiply_values(&weights, share, &output);

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
            // Small values need not be exact while the tensor has others that are not small, or
            // while scores do not depend on them.
            let is_inside = all(magnitudes <= limits) && (v_bits == 0u || magnitudes.z >= 0.015625)
                && abs(params.score_scale) <= 4.0; // without modifiers
                && abs(params.score_scale) * scale_of_factor(tile) <= 4.0; // with modifiers
            if !is_inside {
                factors = Factors(factor_for(q_bits), factor_for(k_bits), factor_for(v_bits));
                continue;
            }
        }

        // Divide by the sum of the lanes' sums, and write.
        for (var distance = 1u; distance < LANES; distance *= 2u) {
            row_sum += subgroupShuffleXor(row_sum, distance);
        }
        let left_sum = row_sum; // with splits
        row_sum = spread_overflow(has_keys, base, row_sum); // without ranges
        row_sum = spread_overflow(row_sum == 0.0 && sees_a_key(tile, own_keys), base, row_sum); // with ranges
        // Selected, not multiplied: a dropped row may hold NaN.
        let is_zero = row_sum == 0.0 || !row_is_kept(tile, row);
        let sunk = with_sink(tile, base, row_sum); // with modifiers
        base = sunk.row_max; // with modifiers
        row_sum = sunk.row_sum; // with modifiers
        let inverse_sum = 1.0 / row_sum; // without modifiers
        let inverse_sum = sunk.factor / row_sum; // with modifiers
        let inverse_factor = inverse(factors.v);
        let own_out = out_row(tile, min(row, tile.rows - 1u));
        let own_split = split_row(split_slot(group, split_number(group)), row); // with splits
        for (var slice = 0u; slice < SLICES; slice++) { // unroll
            workgroupBarrier();
            for (var n = 0u; n < OWN_KEY_FRAGMENTS; n++) { // unroll
                if slice * OWN_KEY_FRAGMENTS + n < OWN_DIM_FRAGMENTS {
                    for (var b = 0u; b < BLOCKS; b++) { // unroll
                        let at = share.scores + b * SHAPE * SCORES_STRIDE + n * FRAGMENT;
                        coopStoreT(
                            output[b * OWN_DIM_FRAGMENTS + slice * OWN_KEY_FRAGMENTS + n],
                            &scores[at],
                            SCORES_STRIDE,
                        );
                    }
                }
            }
            workgroupBarrier();
            for (var w = 0u; w < LANE_WORDS; w++) { // unroll
                let word = w * LANES + lane_in_row;
                let of_head = head_quad(slice, word * 2u) / 2u;
                if row < tile.rows && word < KEY_WORDS && of_head < HEAD_WORDS {
                    let at = scores_row + word * 2u;
                    if leaves_split { // with splits
                        splits[own_split + of_head * 2u] = scores[at] * inverse_factor; // with splits
                        splits[own_split + of_head * 2u + 1u] = scores[at + 1u] * inverse_factor; // with splits
                    } else { // with splits
                        let low = select(scores[at] * inverse_sum * inverse_factor, vec4<f32>(0.0), is_zero);
                        let high = select(scores[at + 1u] * inverse_sum * inverse_factor, vec4<f32>(0.0), is_zero);
                        store_out(own_out, of_head, rounded(low, high));
                    } // with splits
                }
            }
        }
        if row < tile.rows && lane_in_row == 0u {
            write_lse(tile, row, base, row_sum);
            if leaves_split { // with splits
                splits[own_split + HEAD_DIM / 4u] = vec4<f32>(base, left_sum, 0.0, 0.0); // with splits
            } // with splits
        }
        break;
    }
}
