//! Parameters of the shaders. Each struct is declared once: its WGSL text comes from the same
//! list of fields.

use bytemuck::{Pod, Zeroable};

macro_rules! params {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $scalar:ident,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
        pub(super) struct $name {
            $($(#[$field_doc])* pub $field: $scalar,)*
        }

        impl $name {
            /// The struct in WGSL: 4-byte scalars lie in the same places there.
            pub const WGSL: &str =
                concat!("struct Params {\n", $("    ", stringify!($field), ": ", stringify!($scalar), ",\n",)* "}\n");
        }
    };
}

params! {
    /// Parameters of the attention shaders. Offsets and strides of tensors are in words of 16
    /// bytes from the start of the binding, those of the bias and the lse in elements.
    AttentionParams {
        q_offset: u32, q_stride_b: u32, q_stride_s: u32, q_stride_h: u32,
        k_offset: u32, k_stride_b: u32, k_stride_s: u32, k_stride_h: u32,
        v_offset: u32, v_stride_b: u32, v_stride_s: u32, v_stride_h: u32,
        out_offset: u32, out_stride_b: u32, out_stride_s: u32, out_stride_h: u32,
        bias_offset: u32, bias_stride_b: u32, bias_stride_h: u32, bias_stride_q: u32, bias_stride_k: u32,
        lse_offset: u32, lse_stride_b: u32, lse_stride_h: u32, lse_stride_s: u32,
        seq_q: u32, seq_k: u32,
        /// Query heads of one key/value head.
        group_size: u32,
        /// `softmax_scale` · log2(e).
        score_scale: f32,
        /// First batch row of the launch: masks are bound whole.
        batch_base: u32,
        /// u32s of one mask row.
        key_words: u32, row_words: u32,
        /// Tiles of the launch in the list, and the width of the grid that they fill row by row.
        first_tile: u32, end_tile: u32, grid_width: u32,
        /// First packed rows of the bindings of q and of k and v.
        q_row_base: u32, k_row_base: u32,
        /// u32s before the token lists of the first batch row of the launch; ranges before the queries
        /// that stand behind them.
        query_tokens_offset: u32, key_tokens_offset: u32,
        /// Ranges of keys before those of the next batch row; ranges before those of tiles; tiles before
        /// those of the next batch row.
        ranges_stride: u32, unions_offset: u32, unions_stride: u32,
        /// Where the dispatch starts in the grid.
        first_group_x: u32, first_group_y: u32, first_group_z: u32,
        /// Workgroups that share the keys of a tile; of the grid of such tiles the first head, and what it
        /// has along x and y.
        splits: u32, first_split_head: u32, split_width: u32, split_height: u32,
        /// Of an output in segments: first tokens and places of those after the first one, which has
        /// those of the output. Offsets have the number of the segment's binding in their highest bits.
        out1_first: u32, out1_offset: u32, out1_stride_b: u32, out1_stride_s: u32, out1_stride_h: u32,
        out2_first: u32, out2_offset: u32, out2_stride_b: u32, out2_stride_s: u32, out2_stride_h: u32,
        out3_first: u32, out3_offset: u32, out3_stride_b: u32, out3_stride_s: u32, out3_stride_h: u32,
    }
}

/// Segments of an output that are written where they lie, at most: their places are parameters.
pub(super) const MAX_OUT_PARTS: usize = 4;

impl AttentionParams {
    /// With the first token, offset and strides of segment `place` of the output, and of all that are
    /// not there: they begin behind the last token.
    pub fn set_out_part(&mut self, place: usize, [first, offset, stride_b, stride_s, stride_h]: [u32; 5]) {
        match place {
            0 => {
                (self.out_offset, self.out_stride_b) = (offset, stride_b);
                (self.out_stride_s, self.out_stride_h) = (stride_s, stride_h);
                [self.out1_first, self.out2_first, self.out3_first] = [u32::MAX; 3];
            }
            1 => {
                (self.out1_first, self.out1_offset, self.out1_stride_b) = (first, offset, stride_b);
                (self.out1_stride_s, self.out1_stride_h) = (stride_s, stride_h);
            }
            2 => {
                (self.out2_first, self.out2_offset, self.out2_stride_b) = (first, offset, stride_b);
                (self.out2_stride_s, self.out2_stride_h) = (stride_s, stride_h);
            }
            _ => {
                (self.out3_first, self.out3_offset, self.out3_stride_b) = (first, offset, stride_b);
                (self.out3_stride_s, self.out3_stride_h) = (stride_s, stride_h);
            }
        }
    }

    /// The same launch without its first `heads` query heads. They fit: offsets lie inside the
    /// bindings, which are below 2 GiB.
    pub fn after_heads(self, heads: usize) -> Self {
        let (heads, kv_heads) = (heads as u32, heads as u32 / self.group_size);
        Self {
            q_offset: self.q_offset + heads * self.q_stride_h,
            k_offset: self.k_offset + kv_heads * self.k_stride_h,
            v_offset: self.v_offset + kv_heads * self.v_stride_h,
            out_offset: self.out_offset + heads * self.out_stride_h,
            out1_offset: self.out1_offset + heads * self.out1_stride_h,
            out2_offset: self.out2_offset + heads * self.out2_stride_h,
            out3_offset: self.out3_offset + heads * self.out3_stride_h,
            bias_offset: self.bias_offset + heads * self.bias_stride_h,
            // Counts from rows that may lie before the binding: the sum of the kernel lies in it.
            lse_offset: self.lse_offset.wrapping_add(heads * self.lse_stride_h),
            ..self
        }
    }
}

params! {
    /// Parameters of the shaders that copy or zero rows.
    CopyParams {
        src_offset: u32, src_stride_b: u32, src_stride_s: u32, src_stride_h: u32,
        dst_offset: u32, dst_stride_b: u32, dst_stride_s: u32, dst_stride_h: u32,
        rows: u32, heads: u32,
        /// Words (or u32s, see the shader) of one head of one row, and its elements where zeros fill them up.
        head_words: u32, head_dim: u32,
        /// Tokens of a batch row.
        seq: u32,
        /// First row of the launch in the index list.
        first_row: u32,
        /// First batch row of the padded tensor's binding.
        batch_base: u32,
        /// First packed row of the packed tensor's binding.
        row_base: u32,
    }
}

params! {
    /// Parameters of the shader that normalises and rotates heads. Offsets and strides are in elements.
    PrepareQkParams {
        src_offset: u32, src_stride_b: u32, src_stride_s: u32, src_stride_h: u32,
        dst_offset: u32, dst_stride_b: u32, dst_stride_s: u32, dst_stride_h: u32,
        weight_offset: u32,
        cos_offset: u32, cos_stride_b: u32, cos_stride_s: u32,
        sin_offset: u32, sin_stride_b: u32, sin_stride_s: u32,
        /// Tokens of the launch, and of a batch row.
        rows: u32, seq: u32,
        heads: u32, head_dim: u32,
        /// Invocations of a head, and heads of a token that a workgroup takes at once.
        lanes: u32, heads_beside: u32,
        /// Columns of the tables; 0 without a rotation.
        half: u32,
        /// 1 if elements 2i and 2i + 1 are a pair, 0 if i and i + half.
        is_interleaved: u32,
        /// Elements of a u32 of the weight and of the tables, as a power of two.
        weight_shift: u32, table_shift: u32,
        /// 1 if there is a weight.
        has_norm: u32,
        eps: f32,
        /// 1 if there is a mask; u32s of one of its rows.
        has_mask: u32, mask_words: u32,
        /// The mask's place of the first token, and the first batch row of the launch.
        first_token: u32, batch_base: u32,
        /// Where heads are written a second time, among those of all segments.
        joint_offset: u32, joint_stride_b: u32, joint_stride_s: u32, joint_stride_h: u32,
    }
}

params! {
    /// Parameters of the shader that merges attention over parts of the keys. Offsets and strides of
    /// outputs are in words of 16 bytes, those of log-sum-exps in elements.
    MergeParams {
        out1_offset: u32, out1_stride_b: u32, out1_stride_s: u32, out1_stride_h: u32,
        out2_offset: u32, out2_stride_b: u32, out2_stride_s: u32, out2_stride_h: u32,
        out_offset: u32, out_stride_b: u32, out_stride_s: u32, out_stride_h: u32,
        lse1_offset: u32, lse1_stride_b: u32, lse1_stride_h: u32, lse1_stride_s: u32,
        lse2_offset: u32, lse2_stride_b: u32, lse2_stride_h: u32, lse2_stride_s: u32,
        lse_offset: u32, lse_stride_b: u32, lse_stride_h: u32, lse_stride_s: u32,
        /// Tokens of the launch, and of a batch row.
        rows: u32, seq: u32,
        heads: u32,
        /// Words of one head of one row.
        head_words: u32,
        /// 1 if the log-sum-exp is written.
        has_lse: u32,
    }
}

params! {
    /// Parameters of the shaders that number key ranges by metadata of the device.
    RangesParams {
        batch: u32, seq_q: u32, seq_k: u32,
        /// Ranges of a batch row as they were given; 0 if all share the first one's.
        given_stride: u32,
        /// u32s of one row of bits of the queries and of the keys.
        query_words: u32, key_words: u32,
        /// Tiles, and the rows of one.
        tiles: u32, tile_rows: u32,
        /// Ranges of a batch row as they are written, where tiles count so.
        numbered_stride: u32,
        /// Ranges before those of tiles, and before the queries.
        unions_offset: u32, queries_offset: u32,
        /// 1 if the queries stand behind.
        lists_queries: u32,
    }
}

params! {
    /// Parameters of the shaders that build metadata.
    MetadataParams {
        /// Where the mask lies in its binding, in elements.
        mask_offset: u32, mask_stride_b: u32, mask_stride_s: u32,
        /// Bytes of an element, and the bits of its first u32 that belong to it.
        mask_bytes: u32, mask_low: u32,
        batch: u32, seq: u32,
        /// u32s of one row of bits, of all of them, and blocks of those.
        row_words: u32, words: u32, blocks: u32,
        /// Rows of a query tile.
        tile_rows: u32,
    }
}
