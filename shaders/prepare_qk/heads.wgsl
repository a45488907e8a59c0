// Where the heads of q or k lie, and which are prepared. Offsets and strides count elements.

// A head, or the first one of a row of them.
struct Head {
    exists: bool,
    read_at: u32,
    write_at: u32,
    joint_at: u32,
    // Of the token's row of the tables.
    cos: u32,
    sin: u32,
}

fn is_kept(batch: u32, token: u32) -> bool {
    if params.has_mask == 0u {
        return true;
    }
    let at = params.first_token + token;
    let word = kept_bits[(params.batch_base + batch) * params.mask_words + (at >> 5u)];
    return ((word >> (at & 31u)) & 1u) == 1u;
}

// The heads of a token.
fn row_at(row: u32) -> Head {
    let batch = row / params.seq;
    let token = row % params.seq;
    var found: Head;
    found.exists = row < params.rows && is_kept(batch, token);
    found.read_at = params.src_offset + batch * params.src_stride_b + token * params.src_stride_s;
    found.write_at = params.dst_offset + batch * params.dst_stride_b + token * params.dst_stride_s;
    found.joint_at = params.joint_offset + batch * params.joint_stride_b + token * params.joint_stride_s;
    found.cos = params.cos_offset + batch * params.cos_stride_b + token * params.cos_stride_s;
    found.sin = params.sin_offset + batch * params.sin_stride_b + token * params.sin_stride_s;
    return found;
}

fn head_at(at: u32) -> Head {
    let head = at % params.heads;
    var found = row_at(at / params.heads);
    found.read_at += head * params.src_stride_h;
    found.write_at += head * params.dst_stride_h;
    found.joint_at += head * params.joint_stride_h;
    return found;
}

// The same numbers, with one bit pattern of NaN: which of two NaN comes out of a sum is up to the compiler,
// and variants of the shader are to write the same bits. Of 16-bit elements `narrow` sees to that.
fn with_one_nan(x: vec4<f32>) -> vec4<f32> {
    if VECS_PER_WORD == 2u {
        return x;
    }
    let bits = bitcast<vec4<u32>>(x);
    let is_nan = (bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    return bitcast<vec4<f32>>(select(bits, vec4<u32>(0x7fc00000u), is_nan));
}
