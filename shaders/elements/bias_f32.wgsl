// An additive bias of f32.

fn bias_value(position: u32) -> f32 {
    return bitcast<f32>(bias[position]);
}
