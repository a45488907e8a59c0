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

/// No shader needs more storage buffers. What takes more leaves copies out.
pub const MAX_STORAGE_BUFFERS: u32 = 8;

/// 16 bytes, which one load moves.
const WORD: &str = "vec4<u32>";
/// First and end of a range of keys.
const RANGE: &str = "vec2<u32>";

const LSE: Binding = writes("lse", "u32");
const KEY_BITS: Binding = reads("key_bits", "u32");
const ROW_BITS: Binding = reads("row_bits", "u32");
const BIAS: Binding = reads("bias", "u32");
const RANGES: Binding = reads("ranges", RANGE);
const TILES: Binding = reads("tiles", WORD);
const QUERY_TOKENS: Binding = reads("query_tokens", "u32");
const KEY_TOKENS: Binding = reads("key_tokens", "u32");
const CU_SEQLENS_K: Binding = reads("cu_seqlens_k", "u32");

/// The tensors, and what else a form of attention has.
macro_rules! attention {
    ($($more:expr),*) => {
        &[reads("q", WORD), reads("k", WORD), reads("v", WORD), writes("out", WORD), $($more),*]
    };
}

pub(super) const ATTENTION_DENSE: &[Binding] = attention![KEY_BITS, ROW_BITS, BIAS, RANGES];
/// With the log-sum-exp, or a bias on the fused path, there is one binding too few for all: those that
/// ranges take the place of are missing where there are ranges.
pub(super) const ATTENTION_DENSE_LSE: &[Binding] = attention![LSE, KEY_BITS, ROW_BITS, BIAS];
pub(super) const ATTENTION_DENSE_LSE_RANGES: &[Binding] = attention![LSE, KEY_BITS, BIAS, RANGES];
pub(super) const ATTENTION_PACKED: &[Binding] = attention![LSE, TILES, CU_SEQLENS_K, RANGES];
pub(super) const ATTENTION_FUSED: &[Binding] = attention![TILES, QUERY_TOKENS, KEY_TOKENS, RANGES];
pub(super) const ATTENTION_FUSED_LSE: &[Binding] = attention![LSE, TILES, QUERY_TOKENS, KEY_TOKENS];
pub(super) const ATTENTION_FUSED_LSE_RANGES: &[Binding] = attention![LSE, TILES, KEY_TOKENS, RANGES];
pub(super) const ATTENTION_FUSED_BIAS: &[Binding] = attention![TILES, QUERY_TOKENS, KEY_TOKENS, BIAS];
pub(super) const ATTENTION_FUSED_BIAS_RANGES: &[Binding] = attention![TILES, KEY_TOKENS, BIAS, RANGES];
/// Of an output in segments, after the other bindings.
pub(super) const FURTHER_OUTPUTS: &[Binding] = &[writes("out1", WORD), writes("out2", WORD), writes("out3", WORD)];
/// What the splits of tiles leave for what merges them.
pub(super) const WRITES_SPLITS: Binding = writes("splits", "vec4<f32>");
pub(super) const READS_SPLITS: Binding = reads("splits", "vec4<f32>");
pub(super) const PACK_ROWS: &[Binding] = &[reads("src", WORD), writes("dst", WORD), reads("indices", "u32")];
pub(super) const SCATTER_ROWS: &[Binding] = &[reads("src", WORD), writes("dst", WORD), reads("inv_indices", "i32")];
pub(super) const ZERO_ROWS: &[Binding] = &[writes("dst", WORD)];
pub(super) const MOVE_ROWS: &[Binding] = &[reads("src", WORD), writes("dst", WORD)];
pub(super) const ALIGN_ROWS: &[Binding] = &[reads("src", "u32"), writes("dst", "u32")];
/// Invocations may write halves of one u32.
pub(super) const NARROW_ROWS: &[Binding] = &[reads("src", "u32"), writes("dst", "atomic<u32>")];
pub(super) const SCATTER_LSE: &[Binding] = &[reads("src", "u32"), writes("dst", "u32"), reads("inv_indices", "i32")];
pub(super) const NO_KEYS: &[Binding] = &[writes("dst", "u32")];
pub(super) const PREPARE_QK_OCTETS: &[Binding] = &[
    reads("src", WORD),
    writes("dst", WORD),
    reads("weight", WORD),
    reads("cos_table", WORD),
    reads("sin_table", WORD),
    reads("kept_bits", "u32"),
    writes("joint", WORD),
];
pub(super) const PREPARE_QK: &[Binding] = &[
    reads("src", "u32"),
    writes("dst", "u32"),
    reads("weight", "u32"),
    reads("cos_table", "u32"),
    reads("sin_table", "u32"),
    reads("kept_bits", "u32"),
    writes("joint", "u32"),
];
pub(super) const PREPARE_QK_ODD: &[Binding] = &[
    reads("src", "u32"),
    writes("dst", "atomic<u32>"),
    reads("weight", "u32"),
    reads("cos_table", "u32"),
    reads("sin_table", "u32"),
    reads("kept_bits", "u32"),
    writes("joint", "u32"),
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
const GIVEN: Binding = reads("given", RANGE);
const NUMBERED: Binding = writes("numbered", RANGE);

/// Before the list of queries: what numbers keys.
macro_rules! numbering {
    ($queries:expr) => {
        &[GIVEN, KEY_BITS, reads("word_starts_k", "u32"), CU_SEQLENS_K, $queries, NUMBERED]
    };
}

pub(super) const RANGES_FUSED: &[Binding] = numbering!(QUERY_TOKENS);
pub(super) const RANGES_PACKED: &[Binding] = numbering!(reads("indices", "u32"));
pub(super) const RANGES_DENSE: &[Binding] = &[GIVEN, reads("query_bits", "u32"), NUMBERED];
pub(super) const RANGES_OF_LISTED_TILES: &[Binding] = &[TILES, NUMBERED];
pub(super) const RANGES_OF_TILES: &[Binding] = &[NUMBERED];
