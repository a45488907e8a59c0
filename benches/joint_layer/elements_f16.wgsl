// Pairs of f16, in words.
@group(0) @binding(0) var<storage, read_write> x: array<u32>;

fn load(at: u32) -> vec2<f32> {
    return unpack2x16float(x[at]);
}

fn store(at: u32, pair: vec2<f32>) {
    x[at] = pack2x16float(pair);
}
