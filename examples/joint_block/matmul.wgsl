// y = x · w of [ROWS, INPUTS] and [INPUTS, COLUMNS]. A workgroup computes a tile of 32 × 32, an
// invocation 4 × 4 of it. SILU is applied to x, GELU to y.
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> w: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// 16 inputs of the tile's rows and columns, the inputs outermost.
var<workgroup> of_rows: array<f32, 512>;
var<workgroup> of_columns: array<f32, 512>;

fn activated(value: f32) -> f32 {
    if SILU {
        return value / (1.0 + exp(-value));
    }
    return value;
}

// The approximation by tanh, which is bounded: WGSL's may be a quotient of infinities.
fn gelu(value: f32) -> f32 {
    if !GELU {
        return value;
    }
    let inner = clamp(0.7978845608 * (value + 0.044715 * value * value * value), -20.0, 20.0);
    return 0.5 * value * (1.0 + tanh(inner));
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile = group.x + group.y * 65535u;
    let across = (COLUMNS + 31u) / 32u;
    let first_row = tile / across * 32u;
    let first_column = tile % across * 32u;
    if first_row >= ROWS {
        return;
    }
    var sums: array<vec4<f32>, 4>;
    for (var first = 0u; first < INPUTS; first += 16u) {
        workgroupBarrier();
        for (var i = lane; i < 512u; i += 64u) {
            let row = first_row + i / 16u;
            let input = first + i % 16u;
            let value = activated(x[min(row, ROWS - 1u) * INPUTS + min(input, INPUTS - 1u)]);
            of_rows[i % 16u * 32u + i / 16u] = select(0.0, value, row < ROWS && input < INPUTS);
            let column = first_column + i % 32u;
            let weight = w[min(first + i / 32u, INPUTS - 1u) * COLUMNS + min(column, COLUMNS - 1u)];
            of_columns[i] = select(0.0, weight, column < COLUMNS && first + i / 32u < INPUTS);
        }
        workgroupBarrier();
        for (var k = 0u; k < 16u; k++) {
            let row_at = k * 32u + lane / 8u * 4u;
            let column_at = k * 32u + lane % 8u * 4u;
            let columns = vec4<f32>(
                of_columns[column_at],
                of_columns[column_at + 1u],
                of_columns[column_at + 2u],
                of_columns[column_at + 3u],
            );
            for (var i = 0u; i < 4u; i++) {
                sums[i] += of_rows[row_at + i] * columns;
            }
        }
    }
    for (var i = 0u; i < 4u; i++) {
        let row = first_row + lane / 8u * 4u + i;
        for (var j = 0u; j < 4u; j++) {
            let column = first_column + lane % 8u * 4u + j;
            if row < ROWS && column < COLUMNS {
                y[row * COLUMNS + column] = gelu(sums[i][j]);
            }
        }
    }
}
