// Attention of one tile of query rows against all its keys, with the online softmax of FlashAttention-2 (Dao, 2023).
// Needs no optional feature: at most 128 invocations, 16 KiB of workgroup memory.
//
// The 64 x 32 scores of a step are split over GROUPS row groups x 8 lanes; an invocation owns rows g, g + GROUPS, ... and
//
//      keys 4·lane .. 4·lane+3 of the scores        and words lane, lane + 8 of each 16 words of the output
//
//          32 keys                                          D
//        ┌─────────┐                              ┌─────────┬────────┐
//   64   │  S, P   │   P goes through `probs`     │ chunk 0 │ chunk 1│  O stays in registers
//   rows │ 4 keys, │ ───────────────────────────▶ │ ROWS x 2 words   │
//        │ ROWS    │                              │ per chunk        │
//        └─────────┘                              └─────────┴────────┘
//
// K and V pass through `stage` 16 words of a row at a time, as they are: reading workgroup memory is what this kernel waits
// for, and 16-bit elements are half as much to read. Both shared arrays are swizzled so that the lanes of a row group, and the
// row groups of a subgroup, read distinct banks.

const LANES: u32 = 8u;
const GROUPS: u32 = TILE_ROWS / ROWS;
const INVOCATIONS: u32 = GROUPS * LANES;
// Words of a chunk, and of a row; words of a chunk that a lane owns.
const CHUNK_WORDS: u32 = 16u;
const ROW_WORDS: u32 = HEAD_DIM / 4u / VECS_PER_WORD;
const CHUNKS: u32 = (ROW_WORDS + CHUNK_WORDS - 1u) / CHUNK_WORDS;
const LANE_WORDS: u32 = (min(CHUNK_WORDS, ROW_WORDS) + LANES - 1u) / LANES;
// Below any score: masked scores take it, and it never reaches the exponential.
const LOWEST: f32 = -3.4028234e38;

var<workgroup> stage: array<vec4<u32>, 512>;
var<workgroup> probs: array<vec4<f32>, 512>;

fn stage_at(key: u32, word: u32) -> u32 {
    return key * CHUNK_WORDS + (word ^ ((key >> 2u) & 7u));
}

fn probs_at(row: u32, quad: u32) -> u32 {
    return row * LANES + (quad ^ (row & 7u));
}

fn words_in(chunk: u32) -> u32 {
    return min(CHUNK_WORDS, ROW_WORDS - chunk * CHUNK_WORDS);
}

// Dropped keys are staged as zeros: what their rows hold must not matter, and 0 · NaN is NaN.
fn stage_keys(tile: Tile, first_key: u32, kept: u32, chunk: u32, invocation: u32) {
    for (var i = invocation; i < TILE_KEYS * CHUNK_WORDS; i += INVOCATIONS) {
        let key = i / CHUNK_WORDS;
        let word = i % CHUNK_WORDS;
        if word < words_in(chunk) {
            var value = vec4<u32>(0u);
            if ((kept >> key) & 1u) == 1u {
                value = k[tile.k + key_row(tile, first_key + key) * params.k_stride_s + chunk * CHUNK_WORDS + word];
            }
            stage[stage_at(key, word)] = value;
        }
    }
}

fn stage_values(tile: Tile, first_key: u32, kept: u32, chunk: u32, invocation: u32) {
    for (var i = invocation; i < TILE_KEYS * CHUNK_WORDS; i += INVOCATIONS) {
        let key = i / CHUNK_WORDS;
        let word = i % CHUNK_WORDS;
        if word < words_in(chunk) {
            var value = vec4<u32>(0u);
            if ((kept >> key) & 1u) == 1u {
                value = v[tile.v + key_row(tile, first_key + key) * params.v_stride_s + chunk * CHUNK_WORDS + word];
            }
            stage[stage_at(key, word)] = value;
        }
    }
}

fn dot_onto(sum: f32, a: vec4<f32>, b: vec4<f32>) -> f32 {
    return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

@compute @workgroup_size(INVOCATIONS)
fn attention(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) invocation: u32) {
    let tile = locate(group);
    if !tile.exists {
        return;
    }
    let row_group = invocation / LANES;
    let lane = invocation % LANES;

    var q_row: array<u32, ROWS>;
    var row_max: array<f32, ROWS>;
    // Sums over this lane's keys only; the lanes are added up once, at the end.
    var row_sum: array<f32, ROWS>;
    var acc: array<array<array<array<vec4<f32>, VECS_PER_WORD>, LANE_WORDS>, CHUNKS>, ROWS>;
    for (var m = 0u; m < ROWS; m++) {
        // Rows past the tile's end repeat its last one and are not written.
        q_row[m] = tile.q + query_row(tile, min(row_group + m * GROUPS, tile.rows - 1u)) * params.q_stride_s;
        row_max[m] = LOWEST;
        row_sum[m] = 0.0;
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            for (var i = 0u; i < LANE_WORDS; i++) {
                for (var part = 0u; part < VECS_PER_WORD; part++) {
                    acc[m][chunk][i][part] = vec4<f32>(0.0);
                }
            }
        }
    }

    for (var first_key = 0u; first_key < tile.keys; first_key += TILE_KEYS) {
        let kept_word = kept_keys(tile, first_key);
        // S = Q·Kᵀ
        var scores: array<vec4<f32>, ROWS>;
        for (var m = 0u; m < ROWS; m++) {
            scores[m] = vec4<f32>(0.0);
        }
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            workgroupBarrier();
            stage_keys(tile, first_key, kept_word, chunk, invocation);
            workgroupBarrier();
            let words = words_in(chunk);
            for (var word = 0u; word < words; word++) {
                var k_word: array<vec4<u32>, 4>;
                for (var n = 0u; n < 4u; n++) {
                    k_word[n] = stage[stage_at(lane * 4u + n, word)];
                }
                var q_word: array<vec4<u32>, ROWS>;
                for (var m = 0u; m < ROWS; m++) {
                    q_word[m] = q[q_row[m] + chunk * CHUNK_WORDS + word];
                }
                for (var part = 0u; part < VECS_PER_WORD; part++) {
                    let k0 = widen(k_word[0], part);
                    let k1 = widen(k_word[1], part);
                    let k2 = widen(k_word[2], part);
                    let k3 = widen(k_word[3], part);
                    for (var m = 0u; m < ROWS; m++) {
                        let q_vec = widen(q_word[m], part);
                        scores[m].x = dot_onto(scores[m].x, q_vec, k0);
                        scores[m].y = dot_onto(scores[m].y, q_vec, k1);
                        scores[m].z = dot_onto(scores[m].z, q_vec, k2);
                        scores[m].w = dot_onto(scores[m].w, q_vec, k3);
                    }
                }
            }
        }

        // Scale, bias, mask; the maximum of each row over this lane's keys.
        var kept: array<vec4<bool>, ROWS>;
        workgroupBarrier();
        for (var m = 0u; m < ROWS; m++) {
            let row = row_group + m * GROUPS;
            for (var n = 0u; n < 4u; n++) {
                let key = first_key + lane * 4u + n;
                let score = biased(tile, row, key, scores[m][n] * params.score_scale);
                kept[m][n] = score.kept && ((kept_word >> (lane * 4u + n)) & 1u) == 1u;
                scores[m][n] = select(LOWEST, score.score, kept[m][n]);
            }
            let pairs = max(scores[m].xy, scores[m].zw);
            stage[probs_at(row, lane)].x = bitcast<u32>(max(pairs.x, pairs.y));
        }
        workgroupBarrier();

        // The new maximum of each row, P = exp(S - max), and the old sums and outputs rescaled to it.
        for (var m = 0u; m < ROWS; m++) {
            let row = row_group + m * GROUPS;
            var new_max = row_max[m];
            for (var other = 0u; other < LANES; other++) {
                new_max = max(new_max, bitcast<f32>(stage[probs_at(row, other)].x));
            }
            let rescale = exp2(row_max[m] - new_max);
            row_max[m] = new_max;
            let p = select(vec4<f32>(0.0), exp2(scores[m] - new_max), kept[m]);
            probs[probs_at(row, lane)] = p;
            row_sum[m] = row_sum[m] * rescale + p.x + p.y + p.z + p.w;
            for (var chunk = 0u; chunk < CHUNKS; chunk++) {
                for (var i = 0u; i < LANE_WORDS; i++) {
                    for (var part = 0u; part < VECS_PER_WORD; part++) {
                        acc[m][chunk][i][part] *= rescale;
                    }
                }
            }
        }

        // O += P·V
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            workgroupBarrier();
            stage_values(tile, first_key, kept_word, chunk, invocation);
            workgroupBarrier();
            for (var quad = 0u; quad < LANES; quad++) {
                var p: array<vec4<f32>, ROWS>;
                for (var m = 0u; m < ROWS; m++) {
                    p[m] = probs[probs_at(row_group + m * GROUPS, quad)];
                }
                for (var i = 0u; i < LANE_WORDS; i++) {
                    var v_word: array<vec4<u32>, 4>;
                    for (var n = 0u; n < 4u; n++) {
                        v_word[n] = stage[stage_at(quad * 4u + n, lane + i * LANES)];
                    }
                    for (var part = 0u; part < VECS_PER_WORD; part++) {
                        let v0 = widen(v_word[0], part);
                        let v1 = widen(v_word[1], part);
                        let v2 = widen(v_word[2], part);
                        let v3 = widen(v_word[3], part);
                        for (var m = 0u; m < ROWS; m++) {
                            acc[m][chunk][i][part] =
                                acc[m][chunk][i][part] + p[m].x * v0 + p[m].y * v1 + p[m].z * v2 + p[m].w * v3;
                        }
                    }
                }
            }
        }
    }

    // Add up the lanes' sums, divide, write.
    workgroupBarrier();
    for (var m = 0u; m < ROWS; m++) {
        let row = row_group + m * GROUPS;
        probs[probs_at(row, lane)].x = row_sum[m];
    }
    workgroupBarrier();
    for (var m = 0u; m < ROWS; m++) {
        let row = row_group + m * GROUPS;
        if row < tile.rows {
            var sum = 0.0;
            for (var other = 0u; other < LANES; other++) {
                sum += probs[probs_at(row, other)].x;
            }
            // Selected, not multiplied: a dropped row may hold NaN.
            let is_zero = sum == 0.0 || !row_is_kept(tile, row);
            let out_row = tile.out + query_row(tile, row) * params.out_stride_s;
            for (var chunk = 0u; chunk < CHUNKS; chunk++) {
                for (var i = 0u; i < LANE_WORDS; i++) {
                    let word = chunk * CHUNK_WORDS + lane + i * LANES;
                    if word < ROW_WORDS {
                        let low = select(acc[m][chunk][i][0] / sum, vec4<f32>(0.0), is_zero);
                        let high = select(acc[m][chunk][i][VECS_PER_WORD - 1u] / sum, vec4<f32>(0.0), is_zero);
                        out[out_row + word] = narrow(low, high);
                    }
                }
            }
            if lane == 0u {
                write_lse(tile, row, row_max[m], sum);
            }
        }
    }
}
