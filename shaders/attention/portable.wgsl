// Attention of one tile of query rows against all its keys, with the online softmax of
// FlashAttention-2 (Dao, 2023). It needs no optional feature: 128 invocations, 16 KiB of
// workgroup memory.
//
// An invocation is one of 8 row groups and of 16 lanes. It owns ROWS rows, 8 apart, and
//
//      keys 4·lane .. 4·lane+3 of the scores        and 4·VECS columns of each block of the output
//
//           64 keys                                      D
//        ┌──────────────┐                        ┌─────────┬─────────┐
//   rows │ S, P         │  P goes through `rows` │ block 0 │ block 1 │  O stays in registers
//        │ ROWS x 4 per │ ─────────────────────▶ │ ROWS x VECS vec4s │
//        │ invocation   │                        │ per block         │
//        └──────────────┘                        └───────────────────┘
//
// All operands pass through workgroup memory, widened to f32 on the way in, a chunk at a time.
// With AHEAD a chunk is fetched into registers while the one before it is computed:
//
//      S += Q·Kᵀ: 32 dimensions of all rows and keys, CHUNKS times
//      softmax
//      O += P·V: VALUE_KEYS keys, VALUE_CHUNKS times
//
// The shared arrays are laid out so that the row groups and the lanes of a subgroup read distinct
// banks. src/backends/wgpu/shader/unroll.rs writes out loops marked `// unroll`: arrays stay in
// registers only where every index is a constant.

const GROUPS: u32 = 8u;
const LANES: u32 = 16u;
const INVOCATIONS: u32 = GROUPS * LANES;
// Neighbours that are loaded and stored as one vec4: keys of a lane, or rows of an invocation.
const QUAD: u32 = 4u;
const ROW_QUADS: u32 = ROWS / QUAD;
// vec4 columns of a row, and of a chunk of queries and keys; words of both.
const COLUMNS: u32 = HEAD_DIM / 4u;
const CHUNK: u32 = 8u;
const CHUNKS: u32 = (COLUMNS + CHUNK - 1u) / CHUNK;
const ROW_WORDS: u32 = COLUMNS / VECS_PER_WORD;
const CHUNK_WORDS: u32 = CHUNK / VECS_PER_WORD;
// Rows of queries and keys whose chunks all invocations fetch at once.
const FETCHED_ROWS: u32 = INVOCATIONS / CHUNK_WORDS;
const Q_FETCHES: u32 = TILE_ROWS / FETCHED_ROWS;
const K_FETCHES: u32 = TILE_KEYS / FETCHED_ROWS;
// The number of vec4s of a row if each lane has one per block of output columns. With two, the even
// columns come first.
const HALF: u32 = BLOCKS * LANES;
// The columns, words and keys of a chunk of values.
const VALUE_COLUMNS: u32 = VECS * HALF;
const VALUE_WORDS: u32 = VALUE_COLUMNS / VECS_PER_WORD;
const VALUE_KEYS: u32 = SHARED / VALUE_COLUMNS;
const VALUE_QUADS: u32 = VALUE_KEYS / QUAD;
const VALUE_CHUNKS: u32 = TILE_KEYS / VALUE_KEYS;
// Keys whose values all invocations fetch at once.
const VALUE_ROWS: u32 = INVOCATIONS / VALUE_WORDS;
const V_FETCHES: u32 = VALUE_KEYS / VALUE_ROWS;
// Quads of keys whose weights are shared at a time, and the chunks of values that they meet.
const QUADS: u32 = min(SHARED / TILE_ROWS, LANES);
const CHUNKS_OF_QUADS: u32 = QUADS * QUAD / VALUE_KEYS;

const SHARED: u32 = 512u;
// A chunk of queries; maxima and sums of rows; weights.
var<workgroup> rows: array<vec4<f32>, SHARED>;
// A chunk of keys; a chunk of values.
var<workgroup> keys: array<vec4<f32>, SHARED>;

// Where an invocation's words of the chunks lie in the tensors, and what was fetched from there.
struct Fetched {
    q_at: array<u32, Q_FETCHES>,
    k_at: array<u32, K_FETCHES>,
    v_at: array<u32, V_FETCHES>,
    q: array<vec4<u32>, Q_FETCHES>,
    k: array<vec4<u32>, K_FETCHES>,
    v: array<vec4<u32>, V_FETCHES>,
}

// The n-th key that is staged. Neighbours are 4 keys apart, so they fall on different banks.
fn staged_key(n: u32) -> u32 {
    return (n & ~7u) | ((n & 1u) << 2u) | ((n >> 1u) & 3u);
}

fn locate_keys(tile: Tile, first_key: u32, invocation: u32, at: ptr<function, Fetched>) {
    for (var j = 0u; j < K_FETCHES; j++) { // unroll
        let key = first_key + staged_key(invocation / CHUNK_WORDS + j * FETCHED_ROWS);
        (*at).k_at[j] = tile.k + key_row(tile, min(key, tile.keys.end - 1u)) * params.k_stride_s;
    }
}

fn locate_values(tile: Tile, first_key: u32, invocation: u32, at: ptr<function, Fetched>) {
    for (var j = 0u; j < V_FETCHES; j++) { // unroll
        let key = first_key + invocation / VALUE_WORDS + j * VALUE_ROWS;
        (*at).v_at[j] = tile.v + key_row(tile, min(key, tile.keys.end - 1u)) * params.v_stride_s
            + min(invocation % VALUE_WORDS, ROW_WORDS - 1u);
    }
}

fn fetch_chunk(chunk: u32, invocation: u32, into: ptr<function, Fetched>) {
    let word = min(chunk * CHUNK_WORDS + invocation % CHUNK_WORDS, ROW_WORDS - 1u);
    for (var j = 0u; j < Q_FETCHES; j++) { // unroll
        (*into).q[j] = q[(*into).q_at[j] + word];
    }
    for (var j = 0u; j < K_FETCHES; j++) { // unroll
        (*into).k[j] = k[(*into).k_at[j] + word];
    }
}

fn fetch_values(into: ptr<function, Fetched>) {
    for (var j = 0u; j < V_FETCHES; j++) { // unroll
        (*into).v[j] = v[(*into).v_at[j]];
    }
}

// Dropped keys are staged as zeros: what their rows hold must not matter, and 0 · NaN is NaN.
fn stage_chunk(kept: vec2<u32>, invocation: u32, fetched: ptr<function, Fetched>) {
    let column = invocation % CHUNK_WORDS * VECS_PER_WORD;
    for (var j = 0u; j < Q_FETCHES; j++) { // unroll
        let row = invocation / CHUNK_WORDS + j * FETCHED_ROWS;
        for (var part = 0u; part < VECS_PER_WORD; part++) { // unroll
            rows[row * CHUNK + ((column + part) ^ (row & 7u))] = widen((*fetched).q[j], part);
        }
    }
    for (var j = 0u; j < K_FETCHES; j++) { // unroll
        let key = staged_key(invocation / CHUNK_WORDS + j * FETCHED_ROWS);
        let value = select(vec4<u32>(0u), (*fetched).k[j], is_kept(kept, key));
        for (var part = 0u; part < VECS_PER_WORD; part++) { // unroll
            keys[key * CHUNK + ((column + part) ^ ((key >> 2u) & 7u))] = widen(value, part);
        }
    }
}

// With two vec4s to a lane, even columns lie before odd ones.
fn stage_values(kept: vec2<u32>, chunk: u32, invocation: u32, fetched: ptr<function, Fetched>) {
    let word = invocation % VALUE_WORDS;
    for (var j = 0u; j < V_FETCHES; j++) { // unroll
        let key = invocation / VALUE_WORDS + j * VALUE_ROWS;
        let value = select(vec4<u32>(0u), (*fetched).v[j], is_kept(kept, chunk * VALUE_KEYS + key));
        for (var part = 0u; part < VECS_PER_WORD; part++) { // unroll
            let column = word * VECS_PER_WORD + part;
            keys[key * VALUE_COLUMNS + column % VECS * HALF + column / VECS] = widen(value, part);
        }
    }
}

fn write_word(tile: Tile, row: u32, word: u32, value: vec4<u32>) {
    if row < tile.rows && word < ROW_WORDS {
        store_out(out_row(tile, row), word, value);
    }
}

// By its bits: a shader compiler may assume that there is no NaN and no infinity.
fn all_finite(values: vec4<f32>) -> bool {
    let exponents = bitcast<vec4<u32>>(values) & vec4<u32>(0x7f800000u);
    return all(exponents != vec4<u32>(0x7f800000u));
}

// Values that do not matter where their weight is 0, whatever they are.
fn unless_weightless(weight: f32, values: vec4<f32>) -> vec4<f32> {
    return select(values, vec4<f32>(0.0), weight == 0.0);
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
    // Pairs of 16 neighbours share a row group, so that half a subgroup reads few distinct words
    // at a time.
    let row_group = (invocation >> 1u) & 7u;
    let lane = (invocation & 1u) | ((invocation >> 4u) << 1u);

    var fetched: Fetched;
    var row_max: array<vec4<f32>, ROW_QUADS>;
    // Sums over this lane's keys only; the lanes are added up once, at the end.
    var row_sum: array<vec4<f32>, ROW_QUADS>;
    var acc: array<array<array<vec4<f32>, VECS>, BLOCKS>, ROWS>;
    for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
        row_max[quad] = vec4<f32>(LOWEST);
        row_sum[quad] = vec4<f32>(0.0);
    }
    for (var m = 0u; m < ROWS; m++) { // unroll
        for (var block = 0u; block < BLOCKS; block++) { // unroll
            for (var i = 0u; i < VECS; i++) { // unroll
                acc[m][block][i] = vec4<f32>(0.0);
            }
        }
    }
    for (var j = 0u; j < Q_FETCHES; j++) { // unroll
        // Rows past the tile's end repeat its last one and are not written.
        let row = min(invocation / CHUNK_WORDS + j * FETCHED_ROWS, tile.rows - 1u);
        fetched.q_at[j] = tile.q + query_row(tile, row) * params.q_stride_s;
    }

    var first_key = next_step(tile, tile.keys.first);
    let has_keys = first_key < tile.keys.end;
    if has_keys {
        locate_keys(tile, first_key, invocation, &fetched);
        if AHEAD {
            fetch_chunk(0u, invocation, &fetched);
        }
    }
    while first_key < tile.keys.end {
        let kept = kept_in(tile, first_key);
        let all_see = seen_by_all(tile, first_key); // with ranges
        locate_values(tile, first_key, invocation, &fetched);

        // S = Q·Kᵀ
        var scores: array<vec4<f32>, ROWS>;
        for (var m = 0u; m < ROWS; m++) { // unroll
            scores[m] = vec4<f32>(0.0);
        }
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            if !AHEAD {
                fetch_chunk(chunk, invocation, &fetched);
            }
            workgroupBarrier();
            stage_chunk(kept, invocation, &fetched);
            workgroupBarrier();
            if AHEAD && chunk + 1u < CHUNKS {
                fetch_chunk(chunk + 1u, invocation, &fetched);
            } else if AHEAD {
                fetch_values(&fetched);
                locate_values(tile, first_key + VALUE_KEYS, invocation, &fetched);
            }
            let columns = min(CHUNK, COLUMNS - chunk * CHUNK);
            for (var column = 0u; column < columns; column++) { // unroll
                let q_at = row_group * CHUNK + (column ^ row_group);
                let k_at = lane * 4u * CHUNK + (column ^ (lane & 7u));
                let k0 = keys[k_at];
                let k1 = keys[k_at + CHUNK];
                let k2 = keys[k_at + 2u * CHUNK];
                let k3 = keys[k_at + 3u * CHUNK];
                for (var m = 0u; m < ROWS; m++) { // unroll
                    let q_vec = rows[q_at + m * GROUPS * CHUNK];
                    scores[m].x = dot_onto(scores[m].x, q_vec, k0);
                    scores[m].y = dot_onto(scores[m].y, q_vec, k1);
                    scores[m].z = dot_onto(scores[m].z, q_vec, k2);
                    scores[m].w = dot_onto(scores[m].w, q_vec, k3);
                }
            }
        }

        // Scale, bias, mask; the maximum of each row over this lane's keys.
        var row_kept: array<vec4<bool>, ROWS>; // without ranges
        let bits = select(kept.x, kept.y, lane >= 8u) >> ((lane * 4u) & 31u);
        let lane_kept = (vec4<u32>(bits) & vec4<u32>(1u, 2u, 4u, 8u)) != vec4<u32>(0u);
        for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
            for (var i = 0u; i < QUAD; i++) { // unroll
                let m = quad * 4u + i;
                var own_kept = lane_kept;
                for (var n = 0u; n < QUAD; n++) { // unroll
                    let key = first_key + lane * 4u + n;
                    let score = biased(tile, row_group + m * GROUPS, key, scores[m][n] * params.score_scale); // without modifiers
                    let scaled = modified(tile, row_group + m * GROUPS, key, scores[m][n] * params.score_scale); // with modifiers
                    let score = biased(tile, row_group + m * GROUPS, key, scaled); // with modifiers
                    own_kept[n] = own_kept[n] & score.kept;
                    scores[m][n] = score.score;
                }
                scores[m] = select(vec4<f32>(LOWEST), scores[m], own_kept);
                row_kept[m] = own_kept; // without ranges
            }
        }
        // Most steps of a long range have nothing to mask, and read no range. // with ranges
        if !all_see { // with ranges
            let own = first_key + lane * 4u + vec4<u32>(0u, 1u, 2u, 3u); // with ranges
            for (var m = 0u; m < ROWS; m++) { // unroll // with ranges
                let seen = seen_by(tile, row_group + m * GROUPS); // with ranges
                let is_seen = (own >= vec4<u32>(seen.first)) & (own < vec4<u32>(seen.end)); // with ranges
                scores[m] = select(vec4<f32>(LOWEST), scores[m], is_seen); // with ranges
            } // with ranges
        } // with ranges
        var maxima: array<vec4<f32>, ROW_QUADS>;
        for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
            for (var i = 0u; i < QUAD; i++) { // unroll
                let pairs = max(scores[quad * 4u + i].xy, scores[quad * 4u + i].zw);
                maxima[quad][i] = max(pairs.x, pairs.y);
            }
        }
        workgroupBarrier();
        for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
            rows[(quad * LANES + lane) * GROUPS + row_group] = maxima[quad];
        }
        workgroupBarrier();

        // The new maximum of each row, P = exp(S - max), and old sums and outputs rescaled to it.
        var rescale: array<vec4<f32>, ROW_QUADS>;
        for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
            var new_max = row_max[quad];
            for (var other = 0u; other < LANES; other++) {
                new_max = max(new_max, rows[(quad * LANES + other) * GROUPS + row_group]);
            }
            rescale[quad] = exp2(row_max[quad] - new_max);
            row_max[quad] = new_max;
            row_sum[quad] *= rescale[quad];
        }
        for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
            for (var i = 0u; i < QUAD; i++) { // unroll
                let m = quad * 4u + i;
                // Scores of keys that are seen are above LOWEST, and none of 32 flags stays in a register. // with ranges
                let is_weighed = bitcast<vec4<u32>>(scores[m]) != vec4<u32>(bitcast<u32>(LOWEST)); // with ranges
                let p = select(vec4<f32>(0.0), exp2(scores[m] - row_max[quad][i]), is_weighed); // with ranges
                let p = select(vec4<f32>(0.0), exp2(scores[m] - row_max[quad][i]), row_kept[m]); // without ranges
                scores[m] = p;
                row_sum[quad][i] += p.x + p.y + p.z + p.w;
                for (var block = 0u; block < BLOCKS; block++) { // unroll
                    for (var vec = 0u; vec < VECS; vec++) { // unroll
                        acc[m][block][vec] *= rescale[quad][i];
                    }
                }
            }
        }

        // O += P·V
        let next_key = next_step(tile, first_key + TILE_KEYS);
        if next_key < tile.keys.end {
            locate_keys(tile, next_key, invocation, &fetched);
        }
        for (var chunk = 0u; chunk < VALUE_CHUNKS; chunk++) {
            if !AHEAD {
                fetch_values(&fetched);
                locate_values(tile, first_key + (chunk + 1u) * VALUE_KEYS, invocation, &fetched);
            }
            workgroupBarrier();
            if chunk % CHUNKS_OF_QUADS == 0u && lane / QUADS == chunk / CHUNKS_OF_QUADS {
                for (var m = 0u; m < ROWS; m++) { // unroll
                    rows[(row_group + m * GROUPS) * QUADS + ((lane % QUADS) ^ row_group)] = scores[m];
                }
            }
            stage_values(kept, chunk, invocation, &fetched);
            workgroupBarrier();
            if AHEAD && chunk + 1u < VALUE_CHUNKS {
                fetch_values(&fetched);
                locate_values(tile, first_key + (chunk + 2u) * VALUE_KEYS, invocation, &fetched);
            } else if AHEAD && next_key < tile.keys.end {
                fetch_chunk(0u, invocation, &fetched);
            }
            for (var quad = 0u; quad < VALUE_QUADS; quad++) {
                let p_at = row_group * QUADS + ((chunk % CHUNKS_OF_QUADS * VALUE_QUADS + quad) ^ row_group);
                for (var block = 0u; block < BLOCKS; block++) { // unroll
                    var v0: array<vec4<f32>, VECS>;
                    var v1: array<vec4<f32>, VECS>;
                    var v2: array<vec4<f32>, VECS>;
                    var v3: array<vec4<f32>, VECS>;
                    for (var i = 0u; i < VECS; i++) { // unroll
                        let v_at = quad * 4u * VALUE_COLUMNS + i * HALF + block * LANES + lane;
                        v0[i] = keys[v_at];
                        v1[i] = keys[v_at + VALUE_COLUMNS];
                        v2[i] = keys[v_at + 2u * VALUE_COLUMNS];
                        v3[i] = keys[v_at + 3u * VALUE_COLUMNS];
                    }
                    // A weight of 0 does not keep NaN and infinities from queries that do not see the
                    // key. The sums are those of the other branch, rounded in the same places.
                    var is_careful = false; // with ranges
                    if !all_see { // with ranges
                        var sums = vec4<f32>(0.0); // with ranges
                        for (var i = 0u; i < VECS; i++) { // unroll // with ranges
                            sums += v0[i] + v1[i] + v2[i] + v3[i]; // with ranges
                        } // with ranges
                        is_careful = !all_finite(sums); // with ranges
                    } // with ranges
                    if is_careful { // with ranges
                        for (var m = 0u; m < ROWS; m++) { // unroll // with ranges
                            let p = rows[p_at + m * GROUPS * QUADS]; // with ranges
                            for (var i = 0u; i < VECS; i++) { // unroll // with ranges
                                let u0 = unless_weightless(p.x, v0[i]); // with ranges
                                let u1 = unless_weightless(p.y, v1[i]); // with ranges
                                let u2 = unless_weightless(p.z, v2[i]); // with ranges
                                let u3 = unless_weightless(p.w, v3[i]); // with ranges
                                acc[m][block][i] = acc[m][block][i] + p.x * u0 + p.y * u1 + p.z * u2 + p.w * u3; // with ranges
                            } // with ranges
                        } // with ranges
                    } else { // with ranges
                        for (var m = 0u; m < ROWS; m++) { // unroll
                            let p = rows[p_at + m * GROUPS * QUADS];
                            for (var i = 0u; i < VECS; i++) { // unroll
                                acc[m][block][i] = acc[m][block][i] + p.x * v0[i] + p.y * v1[i] + p.z * v2[i] + p.w * v3[i];
                            }
                        }
                    } // with ranges
                }
            }
        }
        first_key = next_key;
    }

    // Add up the lanes' sums, divide, write.
    workgroupBarrier();
    for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
        rows[(quad * LANES + lane) * GROUPS + row_group] = row_sum[quad];
    }
    workgroupBarrier();
    for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
        row_sum[quad] = vec4<f32>(0.0);
        for (var other = 0u; other < LANES; other++) {
            row_sum[quad] += rows[(quad * LANES + other) * GROUPS + row_group];
        }
    }
    for (var quad = 0u; quad < ROW_QUADS; quad++) { // unroll
        for (var i = 0u; i < QUAD; i++) { // unroll
            let m = quad * 4u + i;
            let row = row_group + m * GROUPS;
            row_sum[quad][i] = spread_overflow(has_keys, row_max[quad][i], row_sum[quad][i]);
            // Selected, not multiplied: a dropped row may hold NaN.
            let is_zero = row_sum[quad][i] == 0.0 || !row_is_kept(tile, min(row, tile.rows - 1u));
            let sunk = with_sink(tile, row_max[quad][i], row_sum[quad][i]); // with modifiers
            row_max[quad][i] = sunk.row_max; // with modifiers
            row_sum[quad][i] = sunk.row_sum; // with modifiers
            for (var block = 0u; block < BLOCKS; block++) { // unroll
                for (var vec = 0u; vec < VECS; vec++) { // unroll
                    acc[m][block][vec] *= sunk.factor; // with modifiers
                    acc[m][block][vec] = select(acc[m][block][vec] / row_sum[quad][i], vec4<f32>(0.0), is_zero);
                }
            }
            if lane == 0u && row < tile.rows {
                write_lse(tile, row, row_max[quad][i], row_sum[quad][i]);
            }
        }
        if VECS < VECS_PER_WORD {
            // A word has the columns of two lanes, which take two of the four rows each.
            workgroupBarrier();
            for (var i = 0u; i < QUAD; i++) { // unroll
                rows[(i * GROUPS + row_group) * LANES + lane] = acc[quad * 4u + i][0][0];
            }
            workgroupBarrier();
            for (var i = lane & 1u; i < 4u; i += 2u) {
                let at = (i * GROUPS + row_group) * LANES + (lane & ~1u);
                write_word(tile, row_group + (quad * 4u + i) * GROUPS, lane / 2u, narrow(rows[at], rows[at + 1u]));
            }
        } else {
            for (var i = 0u; i < QUAD; i++) { // unroll
                let row = row_group + (quad * 4u + i) * GROUPS;
                for (var block = 0u; block < BLOCKS; block++) { // unroll
                    let low = acc[quad * 4u + i][block][0];
                    let high = acc[quad * 4u + i][block][VECS - 1u];
                    let word = (block * LANES + lane) * VECS / VECS_PER_WORD;
                    write_word(tile, row, word, narrow(low, high));
                    if VECS > VECS_PER_WORD {
                        write_word(tile, row, word + 1u, narrow(high, high));
                    }
                }
            }
        }
    }
}
