//! The one table of bindings, which both the WGSL declarations and the bind group layouts come
//! from.

/// A storage buffer of a shader. Binding 0 is for the parameters; storage buffers follow in the
/// order of their table.
#[derive(Debug)]
pub struct Binding {
    pub name: &'static str,
    pub element: &'static str,
    pub writes: bool,
}

const fn reads(name: &'static str, element: &'static str) -> Binding {
    Binding { name, element, writes: false }
}

const fn writes(name: &'static str, element: &'static str) -> Binding {
    Binding { name, element, writes: true }
}

/// No shader has more storage buffers.
pub const MAX_STORAGE_BUFFERS: u32 = 8;

/// 16 bytes, which one load moves.
const WORD: &str = "vec4<u32>";
/// First and end of a range of keys.
const RANGE: &str = "vec2<u32>";

pub(super) const ATTENTION_DENSE: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    reads("key_bits", "u32"),
    reads("row_bits", "u32"),
    reads("bias", "u32"),
    reads("ranges", RANGE),
];
/// With the log-sum-exp there is one binding too few for all: those that ranges take the place of are
/// missing where there are ranges.
pub(super) const ATTENTION_DENSE_LSE: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    writes("lse", "u32"),
    reads("key_bits", "u32"),
    reads("row_bits", "u32"),
    reads("bias", "u32"),
];
pub(super) const ATTENTION_DENSE_LSE_RANGES: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    writes("lse", "u32"),
    reads("key_bits", "u32"),
    reads("bias", "u32"),
    reads("ranges", RANGE),
];
pub(super) const ATTENTION_PACKED: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    writes("lse", "u32"),
    reads("tiles", WORD),
    reads("cu_seqlens_k", "u32"),
    reads("ranges", RANGE),
];
pub(super) const ATTENTION_FUSED: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    reads("tiles", WORD),
    reads("query_tokens", "u32"),
    reads("key_tokens", "u32"),
    reads("ranges", RANGE),
];
pub(super) const ATTENTION_FUSED_LSE: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    writes("lse", "u32"),
    reads("tiles", WORD),
    reads("query_tokens", "u32"),
    reads("key_tokens", "u32"),
];
pub(super) const ATTENTION_FUSED_LSE_RANGES: &[Binding] = &[
    reads("q", WORD),
    reads("k", WORD),
    reads("v", WORD),
    writes("out", WORD),
    writes("lse", "u32"),
    reads("tiles", WORD),
    reads("key_tokens", "u32"),
    reads("ranges", RANGE),
];
pub(super) const PACK_ROWS: &[Binding] = &[reads("src", WORD), writes("dst", WORD), reads("indices", "u32")];
pub(super) const SCATTER_ROWS: &[Binding] = &[reads("src", WORD), writes("dst", WORD), reads("inv_indices", "i32")];
pub(super) const ZERO_ROWS: &[Binding] = &[writes("dst", WORD)];
pub(super) const ALIGN_ROWS: &[Binding] = &[reads("src", "u32"), writes("dst", "u32")];
/// Invocations may write halves of one u32.
pub(super) const NARROW_ROWS: &[Binding] = &[reads("src", "u32"), writes("dst", "atomic<u32>")];
pub(super) const SCATTER_LSE: &[Binding] = &[reads("src", "u32"), writes("dst", "u32"), reads("inv_indices", "i32")];
pub(super) const NO_KEYS: &[Binding] = &[writes("dst", "u32")];
pub(super) const PREPARE_QK: &[Binding] = &[
    reads("src", "u32"),
    writes("dst", "u32"),
    reads("weight", "u32"),
    reads("cos_table", "u32"),
    reads("sin_table", "u32"),
    reads("kept_bits", "u32"),
];
pub(super) const PREPARE_QK_ODD: &[Binding] = &[
    reads("src", "u32"),
    writes("dst", "atomic<u32>"),
    reads("weight", "u32"),
    reads("cos_table", "u32"),
    reads("sin_table", "u32"),
    reads("kept_bits", "u32"),
];
pub(super) const MERGE: &[Binding] = &[
    reads("out1", WORD),
    reads("lse1", "u32"),
    reads("out2", WORD),
    reads("lse2", "u32"),
    writes("out", WORD),
    writes("lse", "u32"),
];
pub(super) const METADATA_BITS: &[Binding] =
    &[reads("mask", "u32"), writes("bits", "u32"), writes("block_sums", "u32")];
pub(super) const METADATA_BLOCKS: &[Binding] = &[writes("block_sums", "u32"), writes("cu_seqlens", "u32")];
pub(super) const METADATA_STARTS: &[Binding] =
    &[reads("bits", "u32"), reads("block_sums", "u32"), writes("word_starts", "u32"), writes("cu_seqlens", "u32")];
pub(super) const METADATA_LISTS: &[Binding] = &[
    reads("bits", "u32"),
    reads("word_starts", "u32"),
    reads("cu_seqlens", "u32"),
    writes("indices", "u32"),
    writes("inv_indices", "i32"),
    writes("token_lists", "u32"),
];
pub(super) const METADATA_TILES: &[Binding] =
    &[reads("cu_seqlens", "u32"), writes("packed_tiles", WORD), writes("fused_tiles", WORD)];
