// Heads are written once.

fn store_joint(element: u32, pair: vec2<f32>) {}
