//! Parameters of the kernels: the mirrors of `kernels/include/params.cuh`. Sizes and offsets are asserted on both sides.
//!
//! Addresses are `u64`, 0 for null.

use std::mem::offset_of;

use bytemuck::{Pod, Zeroable};

/// Distances between neighbours of each dimension. A packed tensor has no batch rows.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Strides {
    pub batch: i64,
    pub token: i64,
    pub head: i64,
}

/// Parameters of `attention_sm80`. Strides are in elements.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct AttentionParams {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    pub lse: u64,
    pub cu_seqlens_q: u64,
    pub cu_seqlens_k: u64,
    pub batch_order: u64,
    pub key_bits: u64,
    pub row_bits: u64,
    pub bias: u64,
    pub q_strides: Strides,
    pub k_strides: Strides,
    pub v_strides: Strides,
    pub out_strides: Strides,
    /// Batch row, head, query, key.
    pub bias_strides: [i64; 4],
    pub lse_head_stride: i64,
    pub seq_q: i32,
    pub seq_k: i32,
    pub group_size: i32,
    pub head_dim: i32,
    /// u32s of one mask row.
    pub key_words: i32,
    pub row_words: i32,
    /// `softmax_scale` · log2(e), not 0.
    pub score_scale: f32,
    pub bias_is_f32: i32,
}

/// Which rows the fused form of `attention_sm80` takes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct RowLists {
    pub indices_q: u64,
    pub indices_k: u64,
    /// Null where no query is masked.
    pub inv_indices: u64,
    /// The batch row of the grid's first.
    pub first_batch: i32,
    pub unused: i32,
}

/// Parameters of the fused form of `attention_sm80`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct FusedAttentionParams {
    pub attention: AttentionParams,
    pub lists: RowLists,
}

/// A tensor to pack or scatter. Strides are in words of 16 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct RowTensor {
    pub padded: u64,
    pub packed: u64,
    pub padded_strides: Strides,
    pub packed_token_stride: i64,
    pub packed_head_stride: i64,
    pub heads: i32,
    pub head_words: i32,
}

/// The most tensors that one launch packs.
pub(super) const MAX_PACK_TENSORS: usize = 3;

/// Parameters of `pack_rows`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct PackParams {
    pub tensors: [RowTensor; MAX_PACK_TENSORS],
    pub indices: u64,
    pub cu_seqlens: u64,
    pub batch: i32,
    pub seq: i32,
}

/// Parameters of `scatter_rows`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct ScatterParams {
    pub tensor: RowTensor,
    /// Null writes zeros everywhere.
    pub inv_indices: u64,
    pub batch: i32,
    pub seq: i32,
}

/// Tokens that one block of the metadata kernels reads of a row.
pub(super) const METADATA_CHUNK: usize = 2048;

/// Parameters of the metadata kernels. Strides are in elements.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct MetadataParams {
    pub mask: u64,
    pub mask_batch_stride: i64,
    pub mask_token_stride: i64,
    pub cu_seqlens: u64,
    pub batch_order: u64,
    pub indices: u64,
    pub inv_indices: u64,
    pub bits: u64,
    pub chunk_starts: u64,
    pub batch: i32,
    pub seq: i32,
    pub chunks: i32,
    pub row_words: i32,
    pub mask_bytes: i32,
    pub unused: i32,
}

const _: () = {
    assert!(size_of::<Strides>() == 24);
    assert!(offset_of!(AttentionParams, q_strides) == 88);
    assert!(offset_of!(AttentionParams, bias_strides) == 184);
    assert!(offset_of!(AttentionParams, seq_q) == 224);
    assert!(size_of::<AttentionParams>() == 256);
    assert!(size_of::<RowLists>() == 32);
    assert!(offset_of!(FusedAttentionParams, lists) == 256);
    assert!(size_of::<FusedAttentionParams>() == 288);
    assert!(size_of::<RowTensor>() == 64);
    assert!(offset_of!(PackParams, indices) == 192);
    assert!(size_of::<PackParams>() == 216);
    assert!(size_of::<ScatterParams>() == 80);
    assert!(offset_of!(MetadataParams, batch) == 72);
    assert!(size_of::<MetadataParams>() == 96);
};

/// Bytes of an element of q, k, v and out: f16 or bf16.
const ELEMENT_BYTES: i64 = 2;

impl AttentionParams {
    /// The same call without its first `rows` batch rows: packed tensors stay, since `cu_seqlens` says where their rows are. Calls
    /// that are split have no `batch_order`.
    pub fn after_batch_rows(&self, rows: usize) -> Self {
        let rows = rows as i64;
        // Null stays null.
        let moved = |address: u64, step: i64| if address == 0 { 0 } else { address.wrapping_add_signed(rows * step) };
        let bias_bytes = if self.bias_is_f32 == 1 { 4 } else { ELEMENT_BYTES };
        Self {
            q: moved(self.q, self.q_strides.batch * ELEMENT_BYTES),
            k: moved(self.k, self.k_strides.batch * ELEMENT_BYTES),
            v: moved(self.v, self.v_strides.batch * ELEMENT_BYTES),
            out: moved(self.out, self.out_strides.batch * ELEMENT_BYTES),
            cu_seqlens_q: moved(self.cu_seqlens_q, 4),
            cu_seqlens_k: moved(self.cu_seqlens_k, 4),
            key_bits: moved(self.key_bits, i64::from(self.key_words) * 4),
            row_bits: moved(self.row_bits, i64::from(self.row_words) * 4),
            bias: moved(self.bias, self.bias_strides[0] * bias_bytes),
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_name_the_same_sizes_and_offsets() {
        let header = include_str!("../../../kernels/include/params.cuh");
        for assertion in [
            format!("sizeof(Strides) == {}", size_of::<Strides>()),
            format!("offsetof(AttentionParams, q_strides) == {}", offset_of!(AttentionParams, q_strides)),
            format!("offsetof(AttentionParams, bias_strides) == {}", offset_of!(AttentionParams, bias_strides)),
            format!("offsetof(AttentionParams, seq_q) == {}", offset_of!(AttentionParams, seq_q)),
            format!("sizeof(AttentionParams) == {}", size_of::<AttentionParams>()),
            format!("sizeof(RowLists) == {}", size_of::<RowLists>()),
            format!("offsetof(FusedAttentionParams, lists) == {}", offset_of!(FusedAttentionParams, lists)),
            format!("sizeof(FusedAttentionParams) == {}", size_of::<FusedAttentionParams>()),
            format!("sizeof(RowTensor) == {}", size_of::<RowTensor>()),
            format!("offsetof(PackParams, indices) == {}", offset_of!(PackParams, indices)),
            format!("sizeof(PackParams) == {}", size_of::<PackParams>()),
            format!("sizeof(ScatterParams) == {}", size_of::<ScatterParams>()),
            format!("offsetof(MetadataParams, batch) == {}", offset_of!(MetadataParams, batch)),
            format!("sizeof(MetadataParams) == {}", size_of::<MetadataParams>()),
            format!("METADATA_CHUNK = {METADATA_CHUNK}"),
        ] {
            assert!(header.contains(&assertion), "params.cuh does not assert {assertion}");
        }
    }

    #[test]
    fn a_later_batch_row_moves_what_has_batch_rows() {
        let padded = AttentionParams {
            q: 1000,
            out: 2000,
            key_bits: 3000,
            bias: 4000,
            q_strides: Strides { batch: 10, ..Default::default() },
            out_strides: Strides { batch: 20, ..Default::default() },
            bias_strides: [5, 0, 0, 1],
            key_words: 2,
            bias_is_f32: 1,
            ..Default::default()
        };
        let moved = padded.after_batch_rows(3);
        assert_eq!((moved.q, moved.out, moved.key_bits, moved.bias), (1060, 2120, 3024, 4060));
        assert_eq!((moved.row_bits, moved.cu_seqlens_q, moved.lse), (0, 0, 0));
        let packed = AttentionParams { q: 1000, cu_seqlens_q: 500, lse: 700, ..Default::default() };
        let moved = packed.after_batch_rows(3);
        assert_eq!((moved.q, moved.cu_seqlens_q, moved.lse), (1000, 512, 700));
    }
}
