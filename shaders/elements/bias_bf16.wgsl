// An additive bias of bf16, two in a u32.

fn bias_value(position: u32) -> f32 {
    let pair = bias[position >> 1u];
    return bitcast<f32>(select(pair << 16u, pair & 0xffff0000u, (position & 1u) == 1u));
}
