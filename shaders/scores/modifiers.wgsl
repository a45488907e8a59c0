// What happens to scores beside their scale and a bias: a soft cap, ALiBi, attention sinks. Scores
// count in units of base 2. With a soft cap they come as what its hyperbolic tangent is taken of.

// By head: slope, sink, soft cap, unused. A sink that takes no weight is LOWEST.
struct Heads {
    values: array<vec4<f32>, MAX_HEADS>,
}

// The score of a query of the tile and a key, from their product times params.score_scale.
fn modified(tile: Tile, row: u32, key: u32, score: f32) -> f32 {
    var value = score;
    if SOFTCAP {
        value = heads.values[tile.head].z * hyperbolic_tangent(score);
    }
    if ALIBI {
        // Positions in the padded tensors, or in the sequence. The last query is level with the last
        // key. Rows and keys past the end repeat the last one.
        let query_at = tile.level + i32(query_row(tile, min(row, tile.rows - 1u)));
        let key_at = i32(key_row(tile, min(key, tile.keys.end - 1u)));
        value -= heads.values[tile.head].x * f32(abs(query_at - key_at));
    }
    return value;
}

// What the softmax scale is of params.score_scale.
fn scale_of_factor(tile: Tile) -> f32 {
    if SOFTCAP {
        return heads.values[tile.head].z;
    }
    return 1.0;
}

// Near 0 it is x + x³ · P(x²), where P interpolates at Chebyshev's nodes; the quotient would cancel
// there. Not the function of WGSL, which may be a quotient of infinities.
fn hyperbolic_tangent(x: f32) -> f32 {
    let magnitude = abs(x);
    // 1 in f32 from 10 on.
    let power = exp2(-2.0 * LOG2_E * min(magnitude, 10.0));
    let far = (1.0 - power) / (1.0 + power);
    let square = min(magnitude, 1.0) * min(magnitude, 1.0);
    let high = (-0.006610228 * square + 0.02130939) * square - 0.05390943;
    let all = (high * square + 0.13333113) * square - 0.3333333;
    let near = all * square * magnitude + magnitude;
    let sign = bitcast<u32>(x) & 0x80000000u;
    let value = bitcast<u32>(select(far, near, magnitude < 0.55)) | sign;
    // NaN by its bits: a minimum may drop it.
    return bitcast<f32>(select(value, bitcast<u32>(x), (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u));
}

// The softmax of a row with its head's sink.
struct Sunk {
    // Of what was added up without the sink.
    factor: f32,
    row_max: f32,
    row_sum: f32,
}

fn with_sink(tile: Tile, row_max: f32, row_sum: f32) -> Sunk {
    let sink = heads.values[tile.head].y;
    if !SINKS || sink <= LOWEST {
        return Sunk(1.0, row_max, row_sum);
    }
    let largest = max(row_max, sink);
    // Bounded: differences can leave f32's range.
    let factor = exp2(max(row_max - largest, -1000.0));
    return Sunk(factor, largest, row_sum * factor + exp2(max(sink - largest, -1000.0)));
}
