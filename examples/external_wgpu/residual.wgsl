// hidden += attended, element by element.
@group(0) @binding(0) var<storage, read> attended: array<f32>;
@group(0) @binding(1) var<storage, read_write> hidden: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let item = id.y * groups.x * 64u + id.x;
    if item < arrayLength(&hidden) {
        hidden[item] += attended[item];
    }
}
