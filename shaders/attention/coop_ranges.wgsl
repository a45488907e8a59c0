// What coop.wgsl does only where queries have ranges of keys.
//
// Scores of keys that a query does not see are masked as those of dropped keys. Then their weights
// are 0, but 0 · NaN is NaN in a product of matrices. So in steps with keys that only some queries
// see, infinities and NaN among the values are staged as zeros, and added to the output of the
// queries that see them one by one:
//
//      values of a step       staged                      scores, while O is there to be scaled
//      [ 1  2   3 ]           [ 1  2  3 ]
//      [ 4  inf 5 ]    ──▶    [ 4  0  5 ]    and    O[row][1] += weight · inf, if the row sees key 1

// Set in `growing` beside what says that the output must be scaled.
const HAS_NON_FINITE: u32 = 2u;

// By its bits: a shader compiler may assume that there is no NaN and no infinity.
fn is_non_finite(values: vec4<f32>) -> vec4<bool> {
    let exponents = bitcast<vec4<u32>>(values) & vec4<u32>(0x7f800000u);
    return exponents == vec4<u32>(0x7f800000u);
}

// The lowest bits, `count` of them or all.
fn lowest_bits(count: u32) -> u32 {
    return insertBits(0u, 0xffffffffu, 0u, count);
}

// The needed keys of a step that one query sees.
fn seen_in(kept: vec2<u32>, seen: KeyRange, first_key: u32) -> vec2<u32> {
    let first = max(seen.first, first_key) - first_key;
    let end = max(seen.end, first_key) - first_key;
    var bits = vec2<u32>(lowest_bits(end) & ~lowest_bits(first), 0u);
    if TILE_KEYS > 32u {
        bits.y = lowest_bits(max(end, 32u) - 32u) & ~lowest_bits(max(first, 32u) - 32u);
    }
    return kept & bits;
}

// Whether a query sees a key that no mask drops. Rarely asked: only where all weights are 0.
fn sees_a_key(tile: Tile, seen: KeyRange) -> bool {
    let end = min(seen.end, tile.keys.end);
    var at = seen.first;
    while at < end {
        let count = min(32u - (at & 31u), end - at);
        if ((mask_bits(tile, at & ~31u) >> (at & 31u)) & lowest_bits(count)) != 0u {
            return true;
        }
        at += count;
    }
    return false;
}

// HAS_NON_FINITE if a step needs `add_non_finite` and `clear_non_finite`. Numbers that the factor brings
// out of range do not count: the tile is computed once more then. Without a branch, which would keep
// products from running beside the softmax in every step.
fn non_finite_in(tile: Tile, step: Step, values: Words) -> u32 {
    var overflows = vec4<u32>(0u);
    for (var f = 0u; f < FETCHES; f++) { // unroll
        overflows |= exponent_overflows(values[f]);
    }
    let is_found = any(overflows != vec4<u32>(0u)) & !seen_by_all(tile, step.first_key);
    return select(0u, HAS_NON_FINITE, is_found);
}

// Makes zeros of what this invocation staged of values that are not finite.
fn clear_non_finite(invocation: u32) {
    for (var i = invocation; i < STAGED_WORDS; i += INVOCATIONS) {
        for (var part = 0u; part < 2u; part++) {
            let at = VALUES + i / DIM_WORDS * STAGED_STRIDE + i % DIM_WORDS * 2u + part;
            let values = staged[at];
            staged[at] = select(values, vec4<f16>(0.0), is_non_finite(vec4<f32>(values)));
        }
    }
}

// Where one lane finds its row: what it sees of a step, and its part of `probs` and `scores`.
struct LaneRow {
    seen: vec2<u32>,
    probs: u32,
    scores: u32,
    lane: u32,
}

// Adds weights times values that are not finite to a slice of the output, which lies in `scores`.
// Values are as they would be staged.
fn add_non_finite(tile: Tile, first_key: u32, row: LaneRow, slice: u32, factor: f32) {
    for (var i = 0u; i < QUADS; i++) {
        let quad = i * LANES + row.lane;
        let column = head_quad(slice, quad);
        if column >= HEAD_DIM / 4u {
            continue;
        }
        var sum = scores[row.scores + quad];
        for (var key = 0u; key < TILE_KEYS; key++) {
            if !is_kept(row.seen, key) {
                continue;
            }
            let word = v[tile.v + key_row(tile, first_key + key) * params.v_stride_s + column / 2u];
            let values = vec4<f32>(halves(word, column % 2u, factor));
            let weight = f32(probs[row.probs + key / 4u][key % 4u]);
            sum += select(vec4<f32>(0.0), weight * values, is_non_finite(values));
        }
        scores[row.scores + quad] = sum;
    }
}
