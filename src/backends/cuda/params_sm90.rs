//! Parameters of `attention_sm90`: the mirror of `kernels/include/params_sm90.cuh`. Sizes and offsets are asserted on both sides.
//!
//! Addresses are `u64`, 0 for null.

use std::mem::offset_of;

use bytemuck::{Pod, Zeroable};

use super::params::Strides;

/// A `CUtensorMap`: what the copy engine is told of a tensor.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct TensorMap(pub [u64; 16]);

/// `AttentionForm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Form {
    Dense = 0,
    Packed = 1,
    Fused = 2,
}

/// Parameters of `attention_sm90`. Strides are in elements.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct AttentionParamsSm90 {
    pub q_map: TensorMap,
    pub k_map: TensorMap,
    pub v_map: TensorMap,
    pub k_group_map: TensorMap,
    pub v_group_map: TensorMap,
    pub out_map: TensorMap,
    pub out: u64,
    pub lse: u64,
    pub cu_seqlens_q: u64,
    pub cu_seqlens_k: u64,
    pub order: u64,
    pub key_bits: u64,
    pub row_bits: u64,
    pub batches: u64,
    pub query_groups: u64,
    pub key_tiles: u64,
    pub key_groups: u64,
    pub zero_spans: u64,
    pub out_strides: Strides,
    pub lse_head_stride: i64,
    pub form: i32,
    pub groups: i32,
    pub heads: i32,
    pub group_size: i32,
    pub seq_q: i32,
    pub seq_k: i32,
    pub head_dim: i32,
    pub key_words: i32,
    pub row_words: i32,
    pub zero_span_count: i32,
    /// `softmax_scale` · log2(e), not 0.
    pub score_scale: f32,
    pub padded_rows: i32,
    pub out_rows: u64,
    pub inv_indices: u64,
    pub part_chunks: u64,
    pub parts_done: u64,
    pub split_from: i32,
    pub parts: i32,
    pub unused: [i32; 10],
}

const _: () = {
    assert!(size_of::<TensorMap>() == 128 && align_of::<TensorMap>() == 64);
    assert!(offset_of!(AttentionParamsSm90, out) == 768);
    assert!(offset_of!(AttentionParamsSm90, out_strides) == 864);
    assert!(offset_of!(AttentionParamsSm90, form) == 896);
    assert!(offset_of!(AttentionParamsSm90, out_rows) == 944);
    assert!(offset_of!(AttentionParamsSm90, split_from) == 976);
    assert!(size_of::<AttentionParamsSm90>() == 1024);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_names_the_same_sizes_and_offsets() {
        let header = include_str!("../../../kernels/include/params_sm90.cuh");
        for assertion in [
            format!("offsetof(AttentionParamsSm90, out) == {}", offset_of!(AttentionParamsSm90, out)),
            format!("offsetof(AttentionParamsSm90, out_strides) == {}", offset_of!(AttentionParamsSm90, out_strides)),
            format!("offsetof(AttentionParamsSm90, form) == {}", offset_of!(AttentionParamsSm90, form)),
            format!("offsetof(AttentionParamsSm90, out_rows) == {}", offset_of!(AttentionParamsSm90, out_rows)),
            format!("offsetof(AttentionParamsSm90, split_from) == {}", offset_of!(AttentionParamsSm90, split_from)),
            format!("sizeof(AttentionParamsSm90) == {}", size_of::<AttentionParamsSm90>()),
            format!("FORM_DENSE = {}", Form::Dense as i32),
            format!("FORM_PACKED = {}", Form::Packed as i32),
            format!("FORM_FUSED = {}", Form::Fused as i32),
        ] {
            assert!(header.contains(&assertion), "params_sm90.cuh does not say {assertion}");
        }
    }
}
