// Attention of one tile of query rows against all its keys, with the online softmax of FlashAttention-2 (Dao, 2023).
// Needs no optional feature: 128 invocations, 16 KiB of workgroup memory.
//
// The 64 x 32 scores of a step are split over 16 row groups x 8 lanes; an invocation owns rows g, g+16, g+32, g+48 and
//
//      keys 4·lane .. 4·lane+3 of the scores        and columns 2·lane, 2·lane+1 (vec4s) of each 64-wide chunk of the output
//
//          32 keys                                          D
//        ┌─────────┐                              ┌─────────┬────────┐
//   64   │  S, P   │   P goes through `probs`     │ chunk 0 │ chunk 1│  O stays in registers
//   rows │ 4x4 per │ ───────────────────────────▶ │ 4 rows x 2 vec4s │
//        │ invoc.  │                              │ per chunk        │
//        └─────────┘                              └─────────┴────────┘
//
// K and V pass through `stage` 64 dimensions at a time, widened to f32 once for all rows. Both shared arrays are swizzled so
// that the lanes of a row group, and the row groups of a subgroup, read distinct banks.

const LANES: u32 = 8u;
const GROUPS: u32 = 16u;
const ROWS: u32 = 4u;
const INVOCATIONS: u32 = 128u;
// vec4 columns of a chunk, and of a row.
const CHUNK: u32 = 16u;
const COLUMNS: u32 = HEAD_DIM / 4u;
const CHUNKS: u32 = (COLUMNS + CHUNK - 1u) / CHUNK;
const CHUNK_WORDS: u32 = CHUNK / VECS_PER_WORD;
const ROW_WORDS: u32 = COLUMNS / VECS_PER_WORD;
// Below any score: masked scores take it, and it never reaches the exponential.
const LOWEST: f32 = -3.4028234e38;

var<workgroup> stage: array<vec4<f32>, 512>;
var<workgroup> probs: array<vec4<f32>, 512>;

fn stage_at(key: u32, column: u32) -> u32 {
    let paired = (column >> 1u) | ((column & 1u) << 3u);
    return key * CHUNK + (paired ^ ((key >> 2u) & 7u));
}

fn probs_at(row: u32, quad: u32) -> u32 {
    return row * LANES + (quad ^ (row & 7u));
}

fn words_in(chunk: u32) -> u32 {
    return min(CHUNK_WORDS, ROW_WORDS - chunk * CHUNK_WORDS);
}

// Dropped keys are staged as zeros: what their rows hold must not matter, and 0 · NaN is NaN.
fn stage_word(key: u32, word: u32, value: vec4<u32>) {
    for (var part = 0u; part < VECS_PER_WORD; part++) {
        stage[stage_at(key, word * VECS_PER_WORD + part)] = widen(value, part);
    }
}

fn stage_keys(tile: Tile, first_key: u32, chunk: u32, invocation: u32) {
    for (var i = invocation; i < TILE_KEYS * CHUNK_WORDS; i += INVOCATIONS) {
        let key = i / CHUNK_WORDS;
        let word = i % CHUNK_WORDS;
        if word < words_in(chunk) {
            var value = vec4<u32>(0u);
            if key_is_kept(tile, first_key + key) {
                value = k[tile.k + key_row(tile, first_key + key) * params.k_stride_s + chunk * CHUNK_WORDS + word];
            }
            stage_word(key, word, value);
        }
    }
}

fn stage_values(tile: Tile, first_key: u32, chunk: u32, invocation: u32) {
    for (var i = invocation; i < TILE_KEYS * CHUNK_WORDS; i += INVOCATIONS) {
        let key = i / CHUNK_WORDS;
        let word = i % CHUNK_WORDS;
        if word < words_in(chunk) {
            var value = vec4<u32>(0u);
            if key_is_kept(tile, first_key + key) {
                value = v[tile.v + key_row(tile, first_key + key) * params.v_stride_s + chunk * CHUNK_WORDS + word];
            }
            stage_word(key, word, value);
        }
    }
}

fn dot_onto(sum: f32, a: vec4<f32>, b: vec4<f32>) -> f32 {
    return sum + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

@compute @workgroup_size(128)
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
    var acc: array<array<array<vec4<f32>, 2>, CHUNKS>, ROWS>;
    for (var m = 0u; m < ROWS; m++) {
        // Rows past the tile's end repeat its last one and are not written.
        q_row[m] = tile.q + query_row(tile, min(row_group + m * GROUPS, tile.rows - 1u)) * params.q_stride_s;
        row_max[m] = LOWEST;
        row_sum[m] = 0.0;
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            acc[m][chunk][0] = vec4<f32>(0.0);
            acc[m][chunk][1] = vec4<f32>(0.0);
        }
    }

    for (var first_key = 0u; first_key < tile.keys; first_key += TILE_KEYS) {
        // S = Q·Kᵀ
        var scores: array<vec4<f32>, ROWS>;
        for (var m = 0u; m < ROWS; m++) {
            scores[m] = vec4<f32>(0.0);
        }
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            workgroupBarrier();
            stage_keys(tile, first_key, chunk, invocation);
            workgroupBarrier();
            let words = words_in(chunk);
            for (var word = 0u; word < words; word++) {
                var q_word: array<vec4<u32>, ROWS>;
                for (var m = 0u; m < ROWS; m++) {
                    q_word[m] = q[q_row[m] + chunk * CHUNK_WORDS + word];
                }
                for (var part = 0u; part < VECS_PER_WORD; part++) {
                    let column = word * VECS_PER_WORD + part;
                    let k0 = stage[stage_at(lane * 4u, column)];
                    let k1 = stage[stage_at(lane * 4u + 1u, column)];
                    let k2 = stage[stage_at(lane * 4u + 2u, column)];
                    let k3 = stage[stage_at(lane * 4u + 3u, column)];
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
                kept[m][n] = score.kept && key_is_kept(tile, key);
                scores[m][n] = select(LOWEST, score.score, kept[m][n]);
            }
            let pairs = max(scores[m].xy, scores[m].zw);
            stage[probs_at(row, lane)] = vec4<f32>(max(pairs.x, pairs.y));
        }
        workgroupBarrier();

        // The new maximum of each row, P = exp(S - max), and the old sums and outputs rescaled to it.
        for (var m = 0u; m < ROWS; m++) {
            let row = row_group + m * GROUPS;
            var new_max = row_max[m];
            for (var other = 0u; other < LANES; other++) {
                new_max = max(new_max, stage[probs_at(row, other)].x);
            }
            let rescale = exp2(row_max[m] - new_max);
            row_max[m] = new_max;
            let p = select(vec4<f32>(0.0), exp2(scores[m] - new_max), kept[m]);
            probs[probs_at(row, lane)] = p;
            row_sum[m] = row_sum[m] * rescale + p.x + p.y + p.z + p.w;
            for (var chunk = 0u; chunk < CHUNKS; chunk++) {
                acc[m][chunk][0] *= rescale;
                acc[m][chunk][1] *= rescale;
            }
        }

        // O += P·V
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            workgroupBarrier();
            stage_values(tile, first_key, chunk, invocation);
            workgroupBarrier();
            for (var quad = 0u; quad < LANES; quad++) {
                var p: array<vec4<f32>, ROWS>;
                for (var m = 0u; m < ROWS; m++) {
                    p[m] = probs[probs_at(row_group + m * GROUPS, quad)];
                }
                for (var i = 0u; i < 2u; i++) {
                    let column = lane * 2u + i;
                    let v0 = stage[stage_at(quad * 4u, column)];
                    let v1 = stage[stage_at(quad * 4u + 1u, column)];
                    let v2 = stage[stage_at(quad * 4u + 2u, column)];
                    let v3 = stage[stage_at(quad * 4u + 3u, column)];
                    for (var m = 0u; m < ROWS; m++) {
                        acc[m][chunk][i] = acc[m][chunk][i] + p[m].x * v0 + p[m].y * v1 + p[m].z * v2 + p[m].w * v3;
                    }
                }
            }
        }
    }

    // Add up the lanes' sums, divide, write.
    workgroupBarrier();
    for (var m = 0u; m < ROWS; m++) {
        let row = row_group + m * GROUPS;
        stage[probs_at(row, lane)] = vec4<f32>(row_sum[m]);
    }
    workgroupBarrier();
    for (var m = 0u; m < ROWS; m++) {
        let row = row_group + m * GROUPS;
        if row < tile.rows {
            var sum = 0.0;
            for (var other = 0u; other < LANES; other++) {
                sum += stage[probs_at(row, other)].x;
            }
            // Selected, not multiplied: a dropped row may hold NaN.
            let is_zero = sum == 0.0 || !row_is_kept(tile, row);
            let out_row = tile.out + query_row(tile, row) * params.out_stride_s;
            for (var chunk = 0u; chunk < CHUNKS; chunk++) {
                let low = select(acc[m][chunk][0] / sum, vec4<f32>(0.0), is_zero);
                let high = select(acc[m][chunk][1] / sum, vec4<f32>(0.0), is_zero);
                let column = chunk * CHUNK + lane * 2u;
                let position = out_row + column / VECS_PER_WORD;
                if column < COLUMNS {
                    out[position] = narrow(low, high);
                    if VECS_PER_WORD == 1u {
                        out[position + 1u] = narrow(high, high);
                    }
                }
            }
            if lane == 0u {
                write_lse(tile, row, row_max[m], sum);
            }
        }
    }
}
