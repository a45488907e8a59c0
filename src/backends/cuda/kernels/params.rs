//! What the CUDA kernels and the host agree on: the kernels' parameters, the lists that they read,
//! and shared constants.
//!
//! Each item is declared once, here. The macros below turn a declaration into the host's Rust item
//! and, through [`header`], into the text of `kernels/common/params.cuh`, which every kernel
//! includes. `cargo xtask kernels` includes this file and writes that header, so this file uses
//! nothing else of the crate.
//!
//! A field's type names what the kernel sees: `*const i32` is an address in device memory, which
//! the host holds as a `u64`, 0 for null.

use std::ffi::c_void;

use bytemuck::{Pod, Zeroable};

/// A type that C++ has a name for.
trait CudaName {
    const NAME: &'static str;
}

macro_rules! cuda_names {
    ($($type:ty = $name:expr,)*) => {
        $(impl CudaName for $type {
            const NAME: &'static str = $name;
        })*
    };
}

cuda_names! {
    c_void = "void",
    i32 = "int32_t",
    i64 = "int64_t",
    u32 = "uint32_t",
    f32 = "float",
    Float4 = "float4",
    TensorMap = "ptx::TensorMap",
}

/// Four `f32` that one instruction moves.
enum Float4 {}

/// What the host keeps in a field.
macro_rules! host_type {
    (*$access:ident $type:ident) => {
        u64
    };
    ([$type:ident; $count:expr]) => {
        [$type; $count]
    };
    ($type:ident) => {
        $type
    };
}

/// The declaration of a field in C++.
macro_rules! declaration {
    ($field:ident: *const $type:ident) => {
        format!("const {}* {}", <$type as CudaName>::NAME, stringify!($field))
    };
    ($field:ident: *mut $type:ident) => {
        format!("{}* {}", <$type as CudaName>::NAME, stringify!($field))
    };
    ($field:ident: [$type:ident; $count:expr]) => {
        format!("{} {}[{}]", <$type as CudaName>::NAME, stringify!($field), $count)
    };
    ($field:ident: $type:ident) => {
        format!("{} {}", <$type as CudaName>::NAME, stringify!($field))
    };
}

/// Lines of a comment in C++.
fn comment(indent: &str, lines: &[&str]) -> String {
    lines.iter().map(|line| format!("{indent}//{line}\n")).collect()
}

macro_rules! constants {
    ($($(#[doc = $doc:literal])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[doc = $doc])* pub const $name: $type = $value;)*

        fn constants() -> String {
            [$(comment("", &[$($doc),*]) + &format!("constexpr int {} = {};\n", stringify!($name), $name),)*].concat()
        }
    };
}

/// A struct whose fields lie in the same places on both sides: the header asserts every offset, and
/// [`Pod`] that there are no gaps.
macro_rules! shared_struct {
    ($(#[doc = $doc:literal])* $name:ident {
        $($(#[doc = $field_doc:literal])*
        $field:ident: $(*$access:ident)? $($type:ident)? $([$element:ident; $count:expr])?,)*
    }) => {
        $(#[doc = $doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
        pub struct $name {
            $($(#[doc = $field_doc])* pub $field: host_type!($(*$access)? $($type)? $([$element; $count])?),)*
        }

        cuda_names! { $name = stringify!($name), }

        impl $name {
            fn text() -> String {
                let (mut fields, mut asserts) = (String::new(), String::new());
                $(
                    fields += &comment("    ", &[$($field_doc),*]);
                    let declaration = declaration!($field: $(*$access)? $($type)? $([$element; $count])?);
                    fields += &format!("    {declaration};\n");
                    let (field, offset) = (stringify!($field), std::mem::offset_of!(Self, $field));
                    asserts += &format!("static_assert(offsetof({}, {field}) == {offset});\n", Self::NAME);
                )*
                let (name, size) = (Self::NAME, size_of::<Self>());
                let docs = comment("", &[$($doc),*]);
                format!("{docs}struct {name} {{\n{fields}}};\nstatic_assert(sizeof({name}) == {size});\n{asserts}")
            }
        }
    };
}

/// Numbers that a field of type `i32` takes, with their names in C++.
macro_rules! shared_enum {
    ($(#[doc = $doc:literal])* $name:ident { $($(#[doc = $value_doc:literal])* $value:ident = $number:literal as $constant:ident,)* }) => {
        $(#[doc = $doc])*
        #[repr(i32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[doc = $value_doc])* $value = $number,)*
        }

        impl $name {
            fn text() -> String {
                let mut values = String::new();
                $(
                    values += &comment("    ", &[$($value_doc),*]);
                    values += &format!("    {} = {},\n", stringify!($constant), Self::$value as i32);
                )*
                format!("{}enum {} : int32_t {{\n{values}}};\n", comment("", &[$($doc),*]), stringify!($name))
            }
        }
    };
}

constants! {
    /// Bytes of an element of q, k, v and the output: f16 or bf16.
    ELEMENT_BYTES: u32 = 2;
    /// Rows of a group, of which the tiles of the kernels with tile lists are made.
    GROUP_ROWS: u32 = 16;
    /// Dynamic shared memory of an sm90 block beside its tiles: barriers, and what its warps tell
    /// one another.
    SM90_EXTRA_SHARED_BYTES: u32 = 2048;
    /// The same for an sm100 block, with the factors of its rows.
    SM100_EXTRA_SHARED_BYTES: u32 = 3072;
    /// The most dynamic shared memory of a block on compute capability 9.0 and 10.0.
    SM90_MAX_SHARED_BYTES: u32 = 227 << 10;
    /// Query rows that an sm90 warpgroup computes.
    SM90_WARPGROUP_ROWS: u32 = 64;
    /// The most warpgroups that share a query tile.
    MAX_WARPGROUPS: usize = 4;
    /// Query tiles of an sm100 block.
    SM100_QUERY_TILES: u32 = 2;
    /// Rows of an sm100 query tile, and keys of a step.
    SM100_TILE_ROWS: u32 = 128;
    /// Threads of an sm100 block.
    SM100_THREADS: u32 = 512;
    /// Threads of a warpgroup, the four warps that wgmma and tcgen05 work with.
    WARPGROUP_THREADS: u32 = 128;
    /// Stages of keys and values in shared memory, sm80.
    STAGES: u32 = 2;
    /// Threads of a block of `pack_rows`, `scatter_rows`, `scatter_lse`, `merge_*` and `prepare_qk_*`.
    ROW_COPY_THREADS: u32 = 256;
    /// The most segments of a tensor.
    MAX_SEGMENTS: usize = 8;
    /// The most tensors that one launch of `pack_rows` packs.
    MAX_PACK_TENSORS: usize = 3;
    /// The most tensors that one launch of `prepare_qk_*` prepares: q and k of 8 segments.
    MAX_PREPARED_TENSORS: usize = 16;
    /// Heads of a token that the same lanes of `prepare_qk_*` take, half as many of wide heads.
    PREPARED_HEADS: u32 = 4;
    /// Threads of a block of `metadata_count`, `metadata_index` and `metadata_ranges`.
    METADATA_THREADS: u32 = 256;
    /// Threads of the one block of `metadata_scan`.
    METADATA_SCAN_THREADS: u32 = 1024;
    /// Tokens of one row that a block of the metadata kernels reads.
    METADATA_CHUNK: usize = 2048;
    /// Threads of the block that makes tile lists.
    TILE_LISTS_THREADS: u32 = 1024;
    /// Threads of a block of `range_tiles`.
    RANGE_TILES_THREADS: u32 = 256;
    /// The most query tiles that `range_tiles` puts in the order of their lengths together.
    MAX_ORDERED_TILES: usize = 256;
    /// Keys and values of a section, whose query tiles are computed together: a third of Hopper's L2. 32 MiB took up to 1 % longer,
    /// 8 MiB at long sequences.
    SECTION_BYTES: usize = 16 << 20;
}

shared_struct! {
    /// Distances between neighbours of each dimension. A packed tensor has no batch rows.
    Strides {
        batch: i64,
        token: i64,
        head: i64,
    }
}

impl Eq for Strides {}

shared_struct! {
    /// Parameters of the sm80 attention kernels. Strides are in elements.
    AttentionParams {
        q: *const c_void,
        k: *const c_void,
        v: *const c_void,
        out: *mut c_void,
        /// `[B, H, Sq]`, or `[H, total_q]` of packed rows: f32, natural logarithm; null where it is not
        /// wanted.
        lse: *mut f32,
        /// `[B + 1]` each; null for padded tensors.
        cu_seqlens_q: *const i32,
        cu_seqlens_k: *const i32,
        /// `[B]`: the batch row or sequence of each step of the grid, longest first; null for their
        /// own order.
        batch_order: *const i32,
        /// `[B, words]` bits of padded tensors: kept keys, and query rows that are not written as
        /// zeros. Null keeps all.
        key_bits: *const u32,
        row_bits: *const u32,
        /// Added to the scores, any strides; null for none.
        bias: *const c_void,
        q_strides: Strides,
        k_strides: Strides,
        v_strides: Strides,
        out_strides: Strides,
        /// Batch row, head, query, key.
        bias_strides: [i64; 4],
        lse_head_stride: i64,
        seq_q: i32,
        seq_k: i32,
        /// Query heads of one key/value head.
        group_size: i32,
        head_dim: i32,
        /// Words of a row of `key_bits` and of `row_bits`.
        key_words: i32,
        row_words: i32,
        /// softmax_scale · log2(e), not 0.
        score_scale: f32,
        /// 1 if the bias is f32, 0 if it has the type of q.
        bias_is_f32: i32,
        /// 0 for packed rows.
        lse_batch_stride: i64,
    }
}

shared_struct! {
    /// Which rows of padded tensors the fused form takes: the tables that pack and scatter go by.
    /// The call's `cu_seqlens` are set.
    RowLists {
        /// Flat positions, batch · seq + token, of the valid tokens of each side.
        indices_q: *const u32,
        indices_k: *const u32,
        /// `[B·Sq]`, negative where a query is masked; null where none is.
        inv_indices: *const i32,
        /// The batch row of the grid's first.
        first_batch: i32,
        unused: i32,
    }
}

shared_struct! {
    /// Parameters of the fused form of the sm80 attention kernels.
    FusedAttentionParams {
        attention: AttentionParams,
        lists: RowLists,
    }
}

shared_struct! {
    /// Which keys each query sees: keys `first` ≤ j < `end` of its batch row or sequence, counted as
    /// the call's keys are. In the fused form those are the listed keys.
    KeyRangeParams {
        /// First and end of each query; null if every query sees every key.
        ranges: *const u32,
        /// Ranges before those of the next batch row; 0 if all rows share the first one's, or if
        /// `cu_seqlens_q` counts the queries.
        row_stride: i64,
    }
}

shared_struct! {
    /// Parameters of the forms of the sm80 attention kernels with key ranges. The lists are those
    /// of the fused one.
    RangedAttentionParams {
        attention: AttentionParams,
        lists: RowLists,
        ranges: KeyRangeParams,
    }
}

shared_struct! {
    /// What happens to scores beside their scale and a bias.
    ScoreModifierParams {
        /// Slope and sink of each query head, in units of base 2, and two numbers that are not used;
        /// null if no head has either. A sink of -inf is none.
        heads: *const Float4,
        /// The soft cap in units of base 2; 0 for none.
        softcap: f32,
        /// With a soft cap, what a product is multiplied by before the hyperbolic tangent.
        softcap_factor: f32,
    }
}

shared_struct! {
    /// Parameters of the forms of the sm80 attention kernels with score modifiers.
    ModifiedAttentionParams {
        ranged: RangedAttentionParams,
        modifiers: ScoreModifierParams,
    }
}

shared_enum! {
    /// What the kernels with tile lists are given: `TileListParams::form`.
    TileListForm {
        /// Padded tensors without a mask; `groups` is the number of batch rows.
        Dense = 0 as FORM_DENSE,
        /// Packed sequences: `cu_seqlens` are set; `groups` is the number of sequences.
        Packed = 1 as FORM_PACKED,
        /// Padded tensors, fused, through the lists; `groups` is the length of `batches`.
        Fused = 2 as FORM_FUSED,
    }
}

shared_struct! {
    /// A batch row with kept queries: ranges of `query_groups` (in tiles) and of `key_tiles`.
    BatchTiles {
        batch: i32,
        query_tiles: i32,
        first_query_tile: i32,
        key_tiles: i32,
        first_key_tile: i32,
        masked_key_tiles: i32,
    }
}

shared_struct! {
    /// Query rows that no group covers.
    ZeroSpan {
        batch: i32,
        first_query: i32,
        rows: i32,
        unused: i32,
    }
}

shared_struct! {
    /// Which key tiles a query tile needs where the call has key ranges (`attention/tile_lists.cuh`).
    RangeTile {
        /// As in `Work`: the entry of `batches`, sequence or batch row, and the query tile in it.
        group: i32,
        tile: i32,
        /// Masked tiles of the group's `key_tiles`, counted from its first.
        first_masked: i32,
        masked: i32,
        /// Without lists: where tile 0 starts, counted as ranges count keys.
        first_key: i32,
        /// Tiles of keys in a row: entries of the group's `key_tiles`, or tiles from `first_key` on.
        /// Every query of the tile sees all of the inner ones.
        first: i32,
        inner_first: i32,
        inner_end: i32,
        end: i32,
        /// For each 64 of the tile's rows: the keys that some of them see.
        some_first: [i32; MAX_WARPGROUPS],
        some_end: [i32; MAX_WARPGROUPS],
    }
}

shared_struct! {
    /// What a block does next where the call has key ranges.
    RangeWork {
        /// The entry of `range_tiles`; negative where the block has no more work.
        tile: i32,
        head: i32,
        /// `Work::part`.
        part: i32,
        unused: i32,
    }
}

/// A `CUtensorMap`: what the copy engine is told of a tensor. `ptx::TensorMap` in the kernels.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
pub struct TensorMap(pub [u64; 16]);

shared_struct! {
    /// Parameters of the attention kernels with tile lists, sm90 and sm100. Strides are in
    /// elements. `attention/tile_lists.cuh` says what the lists mean.
    ///
    /// Tensor maps have the dimensions head_dim, token, head, batch (of extent 1 if packed). A box
    /// is one panel wide (64 columns, 32 where the compiled head dimension is no multiple of 64)
    /// and swizzled over its width (128 or 64 bytes). Its rows: a key tile's of `k_map` and
    /// `v_map`, GROUP_ROWS of the others.
    TileListParams {
        q_map: TensorMap,
        k_map: TensorMap,
        v_map: TensorMap,
        k_group_map: TensorMap,
        v_group_map: TensorMap,
        out_map: TensorMap,
        out: *mut c_void,
        /// `[B, H, Sq]`, or `[H, total_q]` of packed rows: f32, natural logarithm; null where it is not
        /// wanted.
        lse: *mut f32,
        /// `[sequences + 1]` each, if packed.
        cu_seqlens_q: *const i32,
        cu_seqlens_k: *const i32,
        /// The sequences in the order of work, longest first; null for their own order.
        order: *const i32,
        /// `[B, words]` bits, if fused; bits past the end of a row are zero. `row_bits` may be
        /// null, which keeps all.
        key_bits: *const u32,
        row_bits: *const u32,
        batches: *const BatchTiles,
        query_groups: *const i32,
        key_tiles: *const i32,
        key_groups: *const i32,
        zero_spans: *const ZeroSpan,
        out_strides: Strides,
        lse_head_stride: i64,
        /// A `TileListForm`.
        form: i32,
        groups: i32,
        heads: i32,
        /// Query heads of one key/value head.
        group_size: i32,
        seq_q: i32,
        seq_k: i32,
        head_dim: i32,
        key_words: i32,
        row_words: i32,
        /// Negative where the host does not know it: then it is the `batch` of the span before the first.
        zero_span_count: i32,
        /// softmax_scale · log2(e), not 0.
        score_scale: f32,
        /// B · Sq of the padded output of packed rows.
        padded_rows: i32,
        /// If packed, where the rows go in a padded output: `[total_q]` flat positions,
        /// batch · seq_q + token; null for a packed output.
        out_rows: *const u32,
        /// `[padded_rows]`, negative where that output is to be zero; null for nowhere.
        inv_indices: *const i32,
        /// Split query tiles, whose keys several blocks share (`attention/schedule.cuh`): the items
        /// from `split_from` on, each in `parts` parts. `part_chunks` holds what the threads of a
        /// part leave, `[parts of all, warpgroups, D / 8 + 1, 128]`; `parts_done` how many parts of
        /// a query tile are done, `[query tiles, warpgroups]`, zeros before the launch.
        part_chunks: *mut Float4,
        parts_done: *mut u32,
        split_from: i32,
        parts: i32,
        /// 0 for packed rows.
        lse_batch_stride: i64,
        /// Null without key ranges. Otherwise, which keys each query sees; what each query tile needs;
        /// and the work, entry by entry: the first of each block, the second of each, and so on.
        ranges: KeyRangeParams,
        range_tiles: *const RangeTile,
        range_work: *const RangeWork,
        /// Heads of one key/value head that share query tiles, and how many such sets there are.
        packed_heads: i32,
        head_sets: i32,
        unused: [i32; 14],
    }
}

shared_struct! {
    /// Parameters of the forms of the sm100 kernel with key ranges.
    RangedTileListParams {
        lists: TileListParams,
        /// What `v_map` describes.
        values: *const c_void,
        value_strides: Strides,
        unused: [i32; 8],
    }
}

shared_struct! {
    /// A segment of q and of the output, and one of k and of v, as the tensors in `TileListParams`.
    SegmentMaps {
        q: TensorMap,
        out: TensorMap,
        k: TensorMap,
        v: TensorMap,
        k_group: TensorMap,
        v_group: TensorMap,
    }
}

shared_struct! {
    /// A segment of the output.
    SegmentOutput {
        out: *mut c_void,
        strides: Strides,
    }
}

shared_struct! {
    /// Tensors in segments along S, none of them empty (`attention/segments.cuh`).
    SegmentTable {
        maps: [SegmentMaps; MAX_SEGMENTS],
        outputs: [SegmentOutput; MAX_SEGMENTS],
        /// The first row past each segment, counted over all; the largest number for the last segment
        /// and those that there are not.
        query_ends: [i32; MAX_SEGMENTS],
        key_ends: [i32; MAX_SEGMENTS],
        query_count: i32,
        key_count: i32,
        /// Counts the heads whose keys and values are there, of one batch row after another, from
        /// `arrived_before` on (`attention/arrivals.cuh`); null if all are there when the kernel starts.
        arrived: *const u32,
        arrived_before: u32,
        unused: [i32; 11],
    }
}

shared_struct! {
    /// Parameters of the forms of the sm90 kernel with tensors in segments, which read by the lists.
    SegmentedTileListParams {
        lists: TileListParams,
        segments: SegmentTable,
    }
}

shared_struct! {
    /// A tensor to pack or scatter. Rows move as 16-byte words: H heads of `head_words` words each.
    /// All strides count words.
    RowTensor {
        padded: *const c_void,
        packed: *mut c_void,
        padded_strides: Strides,
        packed_token_stride: i64,
        packed_head_stride: i64,
        heads: i32,
        head_words: i32,
    }
}

shared_struct! {
    /// Parameters of `pack_rows`.
    PackParams {
        tensors: [RowTensor; MAX_PACK_TENSORS],
        /// `[total]` flat positions of the valid tokens.
        indices: *const u32,
        /// `[B + 1]`; the last value is the number of packed rows, which only the device may know.
        cu_seqlens: *const i32,
        batch: i32,
        seq: i32,
    }
}

shared_struct! {
    /// Parameters of `scatter_rows`.
    ScatterParams {
        /// `padded` is written, `packed` read.
        tensor: RowTensor,
        /// `[B·S]` packed row of each token, negative where it is masked; null writes zeros
        /// everywhere.
        inv_indices: *const i32,
        batch: i32,
        seq: i32,
    }
}

shared_struct! {
    /// Parameters of `scatter_lse`.
    ScatterLseParams {
        /// `[H, total]`, read.
        packed: *const f32,
        /// `[B, H, S]`, written.
        padded: *mut f32,
        /// `[B·S]` packed row of each token, negative where it is masked; null writes −∞ everywhere.
        inv_indices: *const i32,
        packed_head_stride: i64,
        batch_stride: i64,
        head_stride: i64,
        batch: i32,
        seq: i32,
        heads: i32,
        unused: i32,
    }
}

shared_struct! {
    /// Parameters of `merge_*`: two parts of attention, and what they make. Outputs are
    /// `[B, S, H, D]`, their strides in 16-byte words; log-sum-exps `[B, H, S]` f32.
    MergeParams {
        out1: *const c_void,
        lse1: *const f32,
        out2: *const c_void,
        lse2: *const f32,
        out: *mut c_void,
        /// Null where it is not wanted.
        lse: *mut f32,
        out1_strides: Strides,
        out2_strides: Strides,
        out_strides: Strides,
        lse1_batch_stride: i64,
        lse1_head_stride: i64,
        lse2_batch_stride: i64,
        lse2_head_stride: i64,
        lse_batch_stride: i64,
        lse_head_stride: i64,
        batch: i32,
        seq: i32,
        heads: i32,
        /// Words of one head of one row.
        head_words: i32,
    }
}

shared_struct! {
    /// q or k of a segment, `[B, S, H, D]`, for `prepare_qk_*`. Strides are in elements.
    PreparedRows {
        from: *const c_void,
        to: *mut c_void,
        /// `[D]`; null without a norm.
        weight: *const c_void,
        /// `[B, S, half]` each; not read if `half` is 0.
        cos: *const c_void,
        sin: *const c_void,
        from_strides: Strides,
        to_strides: Strides,
        cos_batch_stride: i64,
        cos_token_stride: i64,
        sin_batch_stride: i64,
        sin_token_stride: i64,
        /// B · S.
        rows: i32,
        seq: i32,
        heads: i32,
        /// Pairs of elements of a head that rotate.
        half: i32,
        /// The place of the segment's first token in the mask.
        first_token: i32,
        /// Blocks of the tensors before this one.
        first_block: i32,
        eps: f32,
        /// 1 if elements 2i and 2i + 1 are a pair, 0 if i and i + half are.
        is_interleaved: i32,
        /// 1 if they are f32, 0 if they have the call's element type.
        weight_is_f32: i32,
        table_is_f32: i32,
        /// 1 if every head, read and written, is 16-byte words.
        has_words: i32,
        unused: i32,
    }
}

shared_struct! {
    /// Parameters of `prepare_qk_*`.
    PrepareQkParams {
        tensors: [PreparedRows; MAX_PREPARED_TENSORS],
        /// `[B, mask_words]` bits of the tokens of all segments; null keeps all.
        kept_bits: *const u32,
        mask_words: i32,
        /// Of `tensors`.
        count: i32,
        head_dim: i32,
        /// Of a warp, for each head: a power of two.
        lanes: i32,
        /// Heads of a tensor that one block takes.
        heads_of_block: i32,
        inverse_head_dim: f32,
    }
}

shared_struct! {
    /// Parameters of the metadata kernels. The tables are those of `VarlenMeta`.
    MetadataParams {
        /// `[B, S]` integers of `mask_bytes` bytes each; any that is not 0 keeps its token. Strides
        /// in elements.
        mask: *const c_void,
        mask_batch_stride: i64,
        mask_token_stride: i64,
        /// `[B + 1]`, `[B]`, `[B·S]`, `[B·S]`.
        cu_seqlens: *mut i32,
        batch_order: *mut i32,
        indices: *mut u32,
        inv_indices: *mut i32,
        /// `[B, row_words]` bits of kept tokens.
        bits: *mut u32,
        /// `[B, chunks]`: kept tokens, then the packed row of the first of them.
        chunk_starts: *mut i32,
        batch: i32,
        seq: i32,
        chunks: i32,
        row_words: i32,
        mask_bytes: i32,
        unused: i32,
    }
}

shared_struct! {
    /// Parameters of `metadata_ranges`. The tables are those of `MetadataParams`, of each side.
    MetadataRangesParams {
        /// Of padded queries, counted in padded keys.
        ranges: KeyRangeParams,
        /// First and end of each listed query, counted in the listed keys of its batch row.
        listed: *mut u32,
        cu_seqlens_q: *const i32,
        cu_seqlens_k: *const i32,
        indices_q: *const u32,
        indices_k: *const u32,
        batch: i32,
        seq_q: i32,
        seq_k: i32,
        unused: i32,
    }
}

shared_struct! {
    /// What the device counts in tile lists. It lies just before `zero_spans` and is as large as a span.
    TileListCounts {
        zero_spans: i32,
        /// `RangeTilesParams::blocks_done`.
        blocks_done: u32,
        unused: [i32; 2],
    }
}

shared_struct! {
    /// Parameters of the kernel that makes tile lists (`rows/tile_lists.cu`).
    TileListsParams {
        /// `[B, words]` bits of valid queries and of valid keys; those past the end of a row are zero.
        query_bits: *const u32,
        key_bits: *const u32,
        /// The lists, as `TileListParams` names them.
        batches: *mut BatchTiles,
        query_groups: *mut i32,
        key_tiles: *mut i32,
        key_groups: *mut i32,
        zero_spans: *mut ZeroSpan,
        /// `[B]`: the batch rows in their own order.
        unordered: *mut BatchTiles,
        counts: *mut TileListCounts,
        /// Where segments end, as in `SegmentTable`.
        query_ends: [i32; MAX_SEGMENTS],
        key_ends: [i32; MAX_SEGMENTS],
        batch: i32,
        seq_q: i32,
        seq_k: i32,
        query_words: i32,
        key_words: i32,
        /// Rows and keys of a tile.
        tile_queries: i32,
        tile_keys: i32,
        /// The most of a batch row: query tiles, masked key tiles, and key tiles.
        row_query_tiles: i32,
        row_masked_tiles: i32,
        row_key_tiles: i32,
    }
}

shared_struct! {
    /// A query tile in the order of work: its entry of `range_tiles`, and its key tiles.
    OrderedTile {
        tile: i32,
        steps: i32,
    }
}

shared_struct! {
    /// A set of groups that sections are made of: its query tiles, and the query heads of a section.
    SectionSet {
        tiles: i32,
        heads: i32,
    }
}

shared_struct! {
    /// Parameters of `range_tiles`, which makes what a call with key ranges needs beside tile lists that
    /// the device made (`rows/range_tiles.cuh`), and deals out its work (`rows/deal.cuh`).
    RangeTilesParams {
        /// Of packed sequences: their number, the longest one's queries (an upper bound), and tiles.
        lists: TileListsParams,
        /// Of every query of padded tensors; of packed sequences one after another.
        ranges: KeyRangeParams,
        /// `[B + 1]` of packed sequences; null for padded tensors.
        cu_seqlens_q: *const i32,
        cu_seqlens_k: *const i32,
        /// `[B, row_query_tiles]`: the tiles of each entry of `batches`, or sequence.
        range_tiles: *mut RangeTile,
        /// As `TileListParams` has it, for `blocks` blocks.
        range_work: *mut RangeWork,
        /// `[B, row_query_tiles]`: those of a section's groups together, the longest first; and `[B]` sets
        /// of groups.
        order: *mut OrderedTile,
        section_sets: *mut SectionSet,
        /// Blocks of this launch that are done: 0 before it.
        blocks_done: *mut u32,
        /// Of the launch that does the work.
        blocks: i32,
        heads: i32,
        /// Query heads of one key/value head.
        group_size: i32,
        /// Of one key: in keys and values of all heads.
        key_bytes: i32,
        /// Groups of a section; of several groups it has all heads.
        section_groups: i32,
        unused: i32,
        /// An estimate of what a query tile takes: so much, and so much for each key tile.
        item_cycles: i32,
        step_cycles: i32,
    }
}

/// Where the header is, from the repository's root.
pub const HEADER: &str = "kernels/common/params.cuh";

/// The text of the header.
pub fn header() -> String {
    let about = "// Generated by `cargo xtask kernels` from src/backends/cuda/kernels/params.rs,\n\
                 // which declares the host's side too: edit that file.\n\
                 #pragma once\n\
                 #include <cstddef>\n\
                 #include <cstdint>\n\
                 \n\
                 #include \"../ptx/tma.cuh\"\n";
    let (map_size, map_alignment) = (size_of::<TensorMap>(), align_of::<TensorMap>());
    let tensor_map =
        format!("static_assert(sizeof(ptx::TensorMap) == {map_size} && alignof(ptx::TensorMap) == {map_alignment});\n");
    let items = [
        about.to_owned(),
        constants(),
        Strides::text(),
        AttentionParams::text(),
        RowLists::text(),
        FusedAttentionParams::text(),
        KeyRangeParams::text(),
        RangedAttentionParams::text(),
        ScoreModifierParams::text(),
        ModifiedAttentionParams::text(),
        TileListForm::text(),
        BatchTiles::text(),
        ZeroSpan::text(),
        RangeTile::text(),
        RangeWork::text(),
        tensor_map,
        TileListParams::text(),
        RangedTileListParams::text(),
        SegmentMaps::text(),
        SegmentOutput::text(),
        SegmentTable::text(),
        SegmentedTileListParams::text(),
        RowTensor::text(),
        PackParams::text(),
        ScatterParams::text(),
        ScatterLseParams::text(),
        MergeParams::text(),
        PreparedRows::text(),
        PrepareQkParams::text(),
        MetadataParams::text(),
        MetadataRangesParams::text(),
        TileListCounts::text(),
        TileListsParams::text(),
        OrderedTile::text(),
        SectionSet::text(),
        RangeTilesParams::text(),
    ];
    items.join("\n")
}

// The parameters of every form of the sm80 kernels start those of the form that does everything, which launches pass to all.
const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(ModifiedAttentionParams, ranged) == 0 && offset_of!(RangedAttentionParams, attention) == 0);
    assert!(offset_of!(FusedAttentionParams, attention) == 0);
    assert!(offset_of!(FusedAttentionParams, lists) == offset_of!(RangedAttentionParams, lists));
};

impl AttentionParams {
    /// The same call without its first `rows` batch rows. Packed tensors stay, since `cu_seqlens`
    /// says where their rows are. A call that is split has no `batch_order`.
    pub fn after_batch_rows(&self, rows: usize) -> Self {
        let moved = |address, step| moved(address, rows as i64 * step);
        let element_bytes = i64::from(ELEMENT_BYTES);
        let bias_bytes = if self.bias_is_f32 == 1 { 4 } else { element_bytes };
        Self {
            q: moved(self.q, self.q_strides.batch * element_bytes),
            k: moved(self.k, self.k_strides.batch * element_bytes),
            v: moved(self.v, self.v_strides.batch * element_bytes),
            out: moved(self.out, self.out_strides.batch * element_bytes),
            cu_seqlens_q: moved(self.cu_seqlens_q, 4),
            cu_seqlens_k: moved(self.cu_seqlens_k, 4),
            key_bits: moved(self.key_bits, i64::from(self.key_words) * 4),
            row_bits: moved(self.row_bits, i64::from(self.row_words) * 4),
            bias: moved(self.bias, self.bias_strides[0] * bias_bytes),
            lse: moved(self.lse, self.lse_batch_stride * 4),
            ..*self
        }
    }

    /// The same call without its first `heads` query heads.
    pub fn after_heads(&self, heads: usize) -> Self {
        let (heads, kv_heads) = (heads as i64, heads as i64 / i64::from(self.group_size));
        let element_bytes = i64::from(ELEMENT_BYTES);
        let bias_bytes = if self.bias_is_f32 == 1 { 4 } else { element_bytes };
        Self {
            q: moved(self.q, heads * self.q_strides.head * element_bytes),
            k: moved(self.k, kv_heads * self.k_strides.head * element_bytes),
            v: moved(self.v, kv_heads * self.v_strides.head * element_bytes),
            out: moved(self.out, heads * self.out_strides.head * element_bytes),
            bias: moved(self.bias, heads * self.bias_strides[1] * bias_bytes),
            lse: moved(self.lse, heads * self.lse_head_stride * 4),
            ..*self
        }
    }
}

impl KeyRangeParams {
    /// The ranges of the same call without its first `rows` batch rows.
    pub fn after_batch_rows(&self, rows: usize) -> Self {
        let range_bytes = 2 * size_of::<u32>() as i64;
        Self { ranges: moved(self.ranges, rows as i64 * self.row_stride * range_bytes), ..*self }
    }
}

impl ScoreModifierParams {
    /// The values of the same call without its first `heads` query heads.
    pub fn after_heads(&self, heads: usize) -> Self {
        let value_bytes = 4 * size_of::<f32>() as i64;
        Self { heads: moved(self.heads, heads as i64 * value_bytes), ..*self }
    }
}

/// An address that many bytes further; null stays null.
fn moved(address: u64, bytes: i64) -> u64 {
    if address == 0 { 0 } else { address.wrapping_add_signed(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_include_what_is_declared_here() {
        let committed = include_str!("../../../../kernels/common/params.cuh");
        let stale = committed.lines().zip(header().lines()).position(|(committed, declared)| committed != declared);
        assert_eq!(stale, None, "{HEADER} is stale: run `cargo xtask kernels`");
        assert_eq!(committed.len(), header().len());
    }

    #[test]
    fn a_declaration_becomes_the_text_of_a_struct() {
        let text = "\
// Which rows of padded tensors the fused form takes: the tables that pack and scatter go by.
// The call's `cu_seqlens` are set.
struct RowLists {
    // Flat positions, batch · seq + token, of the valid tokens of each side.
    const uint32_t* indices_q;
    const uint32_t* indices_k;
    // `[B·Sq]`, negative where a query is masked; null where none is.
    const int32_t* inv_indices;
    // The batch row of the grid's first.
    int32_t first_batch;
    int32_t unused;
};
static_assert(sizeof(RowLists) == 32);
static_assert(offsetof(RowLists, indices_q) == 0);
static_assert(offsetof(RowLists, indices_k) == 8);
static_assert(offsetof(RowLists, inv_indices) == 16);
static_assert(offsetof(RowLists, first_batch) == 24);
static_assert(offsetof(RowLists, unused) == 28);
";
        assert_eq!(RowLists::text(), text);
        assert!(AttentionParams::text().contains("    int64_t bias_strides[4];\n"));
    }

    #[test]
    fn a_later_batch_row_moves_what_has_batch_rows() {
        let padded = AttentionParams {
            q: 1000,
            out: 2000,
            key_bits: 3000,
            bias: 4000,
            lse: 5000,
            lse_batch_stride: 6,
            q_strides: Strides { batch: 10, ..Default::default() },
            out_strides: Strides { batch: 20, ..Default::default() },
            bias_strides: [5, 0, 0, 1],
            key_words: 2,
            bias_is_f32: 1,
            ..Default::default()
        };
        let moved = padded.after_batch_rows(3);
        assert_eq!((moved.q, moved.out, moved.key_bits, moved.bias), (1060, 2120, 3024, 4060));
        assert_eq!((moved.row_bits, moved.cu_seqlens_q, moved.lse), (0, 0, 5072));
        let packed = AttentionParams { q: 1000, cu_seqlens_q: 500, lse: 700, ..Default::default() };
        let moved = packed.after_batch_rows(3);
        assert_eq!((moved.q, moved.cu_seqlens_q, moved.lse), (1000, 512, 700));
    }

    #[test]
    fn a_later_batch_row_has_its_own_ranges_or_shares_them() {
        let own = KeyRangeParams { ranges: 1000, row_stride: 7 };
        assert_eq!(own.after_batch_rows(3).ranges, 1000 + 3 * 7 * 8);
        let shared = KeyRangeParams { row_stride: 0, ..own };
        assert_eq!(shared.after_batch_rows(3).ranges, 1000);
        assert_eq!(KeyRangeParams { ranges: 0, ..own }.after_batch_rows(3).ranges, 0);
    }

    #[test]
    fn heads_that_are_left_out_move_keys_by_groups() {
        let strides = |head| Strides { batch: 900, token: 90, head };
        let call = AttentionParams {
            q: 1000,
            q_strides: strides(8),
            k: 2000,
            k_strides: strides(16),
            out: 3000,
            out_strides: strides(24),
            bias: 4000,
            bias_strides: [0, 5, 0, 1],
            bias_is_f32: 1,
            lse: 5000,
            lse_head_stride: 7,
            group_size: 3,
            ..Default::default()
        };
        let moved = call.after_heads(6);
        assert_eq!((moved.q, moved.k, moved.v, moved.out), (1096, 2064, 0, 3288));
        assert_eq!((moved.bias, moved.lse, moved.cu_seqlens_q), (4120, 5168, 0));
        assert_eq!(call.after_heads(2).k, 2000);
    }
}
