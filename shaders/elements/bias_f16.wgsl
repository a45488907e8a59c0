// An additive bias of f16, two in a u32.

fn bias_value(position: u32) -> f32 {
    let pair = unpack2x16float(bias[position >> 1u]);
    return select(pair.x, pair.y, (position & 1u) == 1u);
}
