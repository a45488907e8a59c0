// Pairs of f32.
@group(0) @binding(0) var<storage, read_write> x: array<vec2<f32>>;

fn load(at: u32) -> vec2<f32> {
    return x[at];
}

fn store(at: u32, pair: vec2<f32>) {
    x[at] = pair;
}
