//! Launches of the attention shader: dense, in place by lists, on packed rows, and the packed path of padded tensors.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use crate::call::op::{Attention, Rows as AttentionRows, no_device_tables};
use crate::call::plan::Path;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::{CuSeqlens, VarlenMeta};

use super::WgpuDevice;
use super::copy::{RowShape, packed_rows};
use super::launch::Window;
use super::launches::{AttentionLaunch, Launches, Work};
use super::params::AttentionParams;
use super::placement::{BINDING_ALIGNMENT, MAX_GROUPS, Operand, Placed, Rows, WORD_BYTES};
use super::shader::{Algorithm, AttentionRows as ShaderRows, AttentionShader, Shader};

/// Placed tensors of one launch.
struct Tensors {
    q: Placed,
    k: Placed,
    v: Placed,
    out: Placed,
}

/// The sequences of one launch on packed rows.
struct Sequences<'a> {
    query: &'a CuSeqlens,
    key: &'a CuSeqlens,
    range: Range<usize>,
    /// Packed rows at which the placed tensors start.
    q_row_base: usize,
    k_row_base: usize,
}

impl WgpuDevice {
    pub(super) fn record_attention(&self, attention: &Attention<'_>, launches: &mut Launches<'_>) -> Result<()> {
        let heads = attention.problem.shape.num_heads;
        if heads > MAX_GROUPS {
            let (limit_name, limit) = ("heads in max_compute_workgroups_per_dimension", MAX_GROUPS as u64);
            return Err(Error::TooLarge { argument: "q", limit_name, limit, got: heads as u64 });
        }
        let algorithm = self.algorithm(attention);
        let (shader, work) = (attention_shader(attention, algorithm), Work::of(attention, algorithm));
        launches.announce(shader, work, self.pace.limit(shader));
        match &attention.rows {
            AttentionRows::Dense { key_mask, zero_rows, .. } => {
                self.record_dense(attention, *key_mask, *zero_rows, launches)
            }
            AttentionRows::Packed { query, key } => self.record_packed(attention, query, key, launches),
            AttentionRows::Varlen { query, key } if attention.plan.path == Path::Fused => {
                self.record_fused(attention, query, key, launches)
            }
            AttentionRows::Varlen { query, key } => self.record_varlen(attention, query, key, launches),
            AttentionRows::DeviceVarlen { .. } => Err(no_device_tables(&self.name)),
        }
    }

    fn record_dense(
        &self,
        attention: &Attention<'_>,
        key_mask: Option<&KeyMask>,
        zero_rows: Option<&KeyMask>,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let shape = attention.problem.shape;
        let [q, k, v, out] = self.operands(attention, Rows::Padded, Rows::Padded)?;
        let AttentionRows::Dense { bias, .. } = &attention.rows else { return Ok(()) };
        let bias = bias.as_ref().map(|bias| self.input("bias", bias, Rows::Padded)).transpose()?;
        let mut bound = vec![q, k, v, out];
        bound.extend(bias);
        let algorithm = self.algorithm(attention);
        let tile_rows = algorithm.tile_rows(shape.head_dim);
        let tiles = shape.seq_q.div_ceil(tile_rows);
        if tiles > MAX_GROUPS {
            let (limit_name, limit) =
                ("query rows in max_compute_workgroups_per_dimension", (MAX_GROUPS * tile_rows) as u64);
            return Err(Error::TooLarge { argument: "q", limit_name, limit, got: shape.seq_q as u64 });
        }
        let bits = |mask: Option<&KeyMask>| mask.map(|mask| self.mask_bits(mask)).transpose();
        let (key_bits, row_bits) = (bits(key_mask)?, bits(zero_rows)?);
        for range in self.split_batch(shape.batch, &bound, |_| 0)? {
            let mut scratch = Vec::new();
            let tensors = self.place([&q, &k, &v, &out], &range, launches, &mut scratch)?;
            let mut params = AttentionParams {
                batch_base: range.start as u32,
                key_words: key_bits.as_ref().map_or(0, |bits| bits.row_words),
                row_words: row_bits.as_ref().map_or(0, |bits| bits.row_words),
                ..attention_params(attention, &tensors)
            };
            let mut bias_window = self.unused_read();
            if let Some(bias) = &bias {
                let (window, offset) = bias.place_elements(&range)?;
                bias_window = window;
                params.bias_offset = offset;
                // Each fits wherever it is stepped over: a binding is below 2 GiB.
                let [b, h, q, k] = [0, 1, 2, 3].map(|dim| bias.layout.strides()[dim] as u32);
                (params.bias_stride_b, params.bias_stride_h) = (b, h);
                (params.bias_stride_q, params.bias_stride_k) = (q, k);
            }
            let mask_window = |bits: &Option<std::sync::Arc<super::metadata::MaskBits>>| {
                bits.as_ref().map_or_else(|| self.unused_read(), |bits| Window::whole(&bits.buffer))
            };
            let Tensors { q, k, v, out } = tensors;
            let masks = [mask_window(&key_bits), mask_window(&row_bits), bias_window];
            launches.push_attention(AttentionLaunch {
                shader: attention_shader(attention, algorithm),
                params,
                windows: [q.window, k.window, v.window, out.window].into_iter().chain(masks).collect(),
                groups: [tiles as u32, range.len() as u32, shape.num_heads as u32],
                group_operations: group_operations(algorithm, shape.seq_k, shape.head_dim),
            });
            launches.give_back(scratch);
        }
        Ok(())
    }

    fn record_packed(
        &self,
        attention: &Attention<'_>,
        query: &CuSeqlens,
        key: &CuSeqlens,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let [q, k, v, out] = self.operands(attention, Rows::Packed(query), Rows::Packed(key))?;
        for range in self.split_batch(query.batch(), &[q, k, v, out], |_| 0)? {
            let mut scratch = Vec::new();
            let tensors = self.place([&q, &k, &v, &out], &range, launches, &mut scratch)?;
            let (q_row_base, k_row_base) = (query.rows(range.start).start, key.rows(range.start).start);
            let sequences = Sequences { query, key, range, q_row_base, k_row_base };
            self.push_packed(attention, tensors, &sequences, launches)?;
            launches.give_back(scratch);
        }
        Ok(())
    }

    /// One launch on the padded tensors in place, or one for each range of batch rows that fits the bindings.
    fn record_fused(
        &self,
        attention: &Attention<'_>,
        query: &VarlenMeta,
        key: &VarlenMeta,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let shape = attention.problem.shape;
        let [q, k, v, out] = self.operands(attention, Rows::Padded, Rows::Padded)?;
        let (query_tokens, key_tokens) = (self.token_lists(query)?, self.token_lists(key)?);
        let algorithm = self.algorithm(attention);
        let tiles = self.fused_tiles(query, algorithm.tile_rows(shape.head_dim))?;
        let list_bytes = |range: &Range<usize>| {
            let lists = [query_tokens.bytes(range), key_tokens.bytes(range), tiles.bytes(range)];
            lists.into_iter().map(|bytes| bytes.end - bytes.start + BINDING_ALIGNMENT).max().unwrap_or(0)
        };
        for range in self.split_batch(shape.batch, &[q, k, v, out], list_bytes)? {
            let of_range = tiles.of(&range);
            if of_range.is_empty() {
                continue;
            }
            let mut scratch = Vec::new();
            let tensors = self.place([&q, &k, &v, &out], &range, launches, &mut scratch)?;
            let (tiles_window, tiles_skipped) = Window::part(&tiles.buffer, tiles.bytes(&range));
            let (query_window, query_skipped) = Window::part(&query_tokens.buffer, query_tokens.bytes(&range));
            let (key_window, key_skipped) = Window::part(&key_tokens.buffer, key_tokens.bytes(&range));
            let (first_tile, grid_width) = (tiles_skipped / WORD_BYTES as u32, of_range.len().min(MAX_GROUPS));
            let params = AttentionParams {
                batch_base: range.start as u32,
                first_tile,
                end_tile: first_tile + of_range.len() as u32,
                grid_width: grid_width as u32,
                query_tokens_offset: query_skipped / 4,
                key_tokens_offset: key_skipped / 4,
                ..attention_params(attention, &tensors)
            };
            let Tensors { q, k, v, out } = tensors;
            let lists = [tiles_window, query_window, key_window];
            launches.push_attention(AttentionLaunch {
                shader: attention_shader(attention, algorithm),
                params,
                windows: [q.window, k.window, v.window, out.window].into_iter().chain(lists).collect(),
                groups: [grid_width as u32, of_range.len().div_ceil(grid_width) as u32, shape.num_heads as u32],
                group_operations: group_operations(algorithm, longest(key.cu_seqlens(), &range), shape.head_dim),
            });
            launches.give_back(scratch);
        }
        Ok(())
    }

    /// Pack, attention on the packed rows, scatter; a range of batch rows at a time, through scratch.
    fn record_varlen(
        &self,
        attention: &Attention<'_>,
        query: &VarlenMeta,
        key: &VarlenMeta,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let (shape, size) = (attention.problem.shape, attention.problem.dtype.size());
        let [q, k, v, out] = self.operands(attention, Rows::Padded, Rows::Padded)?;
        let q_row = RowShape::new(shape.num_heads, shape.head_dim, size);
        let kv_row = RowShape::new(shape.num_kv_heads, shape.head_dim, size);
        let q_bytes = |range: &Range<usize>| packed_rows(query, range).len() as u64 * q_row.bytes();
        let kv_bytes = |range: &Range<usize>| packed_rows(key, range).len() as u64 * kv_row.bytes();
        let scratch_bytes = |range: &Range<usize>| q_bytes(range).max(kv_bytes(range));
        for range in self.split_batch(shape.batch, &[q, k, v, out], scratch_bytes)? {
            let mut scratch = Vec::new();
            let mut pack = |operand: &Operand<'_>, row: RowShape, meta: &VarlenMeta| -> Result<Placed> {
                let src = self.place_input(operand, &range, launches, &mut scratch)?;
                let bytes = packed_rows(meta, &range).len() as u64 * row.bytes();
                let buffer = launches.take_scratch(bytes)?;
                let dst = row.packed_in(&buffer);
                scratch.push(buffer);
                self.push_pack(&src, &dst, row, meta, &range, launches)?;
                Ok(dst)
            };
            let (q, k, v) = (pack(&q, q_row, query)?, pack(&k, kv_row, key)?, pack(&v, kv_row, key)?);
            let buffer = launches.take_scratch(q_bytes(&range))?;
            let packed_out = q_row.packed_in(&buffer);
            scratch.push(buffer);
            let sequences = Sequences {
                query: query.cu_seqlens(),
                key: key.cu_seqlens(),
                range: range.clone(),
                q_row_base: packed_rows(query, &range).start,
                k_row_base: packed_rows(key, &range).start,
            };
            self.push_packed(attention, Tensors { q, k, v, out: packed_out.clone() }, &sequences, launches)?;
            self.push_scatter(&packed_out, &out.place_output(&range)?, q_row, query, &range, launches)?;
            launches.give_back(scratch);
        }
        Ok(())
    }

    fn push_packed(
        &self,
        attention: &Attention<'_>,
        tensors: Tensors,
        sequences: &Sequences<'_>,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let shape = attention.problem.shape;
        let algorithm = self.algorithm(attention);
        let tiles = self.tiles(sequences.query, algorithm.tile_rows(shape.head_dim))?;
        let of_range = tiles.of(&sequences.range);
        if of_range.is_empty() {
            return Ok(());
        }
        let grid_width = of_range.len().min(MAX_GROUPS);
        let mut params = AttentionParams {
            first_tile: of_range.start,
            end_tile: of_range.end,
            grid_width: grid_width as u32,
            q_row_base: sequences.q_row_base as u32,
            k_row_base: sequences.k_row_base as u32,
            ..attention_params(attention, &tensors)
        };
        let mut lse_window = Window::whole(&self.unused[1]);
        if let Some(lse) = &attention.lse {
            let operand = self.output("lse", lse, Rows::Padded)?;
            let (window, offset) = operand.place_elements(&(0..shape.num_heads))?;
            if window.size > self.capabilities.max_binding_bytes {
                let (limit_name, limit) =
                    ("max_storage_buffer_binding_size (bytes)", self.capabilities.max_binding_bytes);
                return Err(Error::TooLarge { argument: "lse", limit_name, limit, got: window.size });
            }
            lse_window = window;
            params.lse_offset = offset;
            (params.lse_stride_h, params.lse_stride_s) =
                (operand.layout.strides()[0] as u32, operand.layout.strides()[1] as u32);
        }
        let Tensors { q, k, v, out } = tensors;
        launches.push_attention(AttentionLaunch {
            shader: attention_shader(attention, algorithm),
            params,
            windows: vec![
                q.window,
                k.window,
                v.window,
                out.window,
                lse_window,
                Window::whole(&tiles.buffer),
                Window::whole(&self.cu_seqlens(sequences.key)?.0),
            ],
            groups: [grid_width as u32, of_range.len().div_ceil(grid_width) as u32, shape.num_heads as u32],
            group_operations: group_operations(algorithm, longest(sequences.key, &sequences.range), shape.head_dim),
        });
        Ok(())
    }

    /// The tensors of a launch on a range of batch rows; inputs that are copied first lie in `scratch`.
    fn place(
        &self,
        [q, k, v, out]: [&Operand<'_>; 4],
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Tensors> {
        Ok(Tensors {
            q: self.place_input(q, range, launches, scratch)?,
            k: self.place_input(k, range, launches, scratch)?,
            v: self.place_input(v, range, launches, scratch)?,
            out: out.place_output(range)?,
        })
    }

    fn operands<'a>(&self, attention: &Attention<'a>, q_rows: Rows<'a>, kv_rows: Rows<'a>) -> Result<[Operand<'a>; 4]> {
        Ok([
            self.input("q", &attention.q, q_rows)?,
            self.input("k", &attention.k, kv_rows)?,
            self.input("v", &attention.v, kv_rows)?,
            self.output("out", &attention.out, q_rows)?,
        ])
    }

    fn algorithm(&self, attention: &Attention<'_>) -> Algorithm {
        let head_dim = attention.problem.shape.head_dim;
        match (attention.plan.kernel, &self.coop) {
            (Kernel::WgslCoop, Some(coop)) => Algorithm::Coop(coop.tile(head_dim)),
            _ => Algorithm::Portable,
        }
    }

    pub(super) fn unused_read(&self) -> Window {
        Window::whole(&self.unused[0])
    }
}

/// The variant that computes a call.
fn attention_shader(attention: &Attention<'_>, algorithm: Algorithm) -> Shader {
    let (dtype, head_dim) = (attention.problem.dtype, attention.problem.shape.head_dim);
    let rows = match &attention.rows {
        AttentionRows::Dense { key_mask, bias, zero_rows } => ShaderRows::Dense {
            key_mask: key_mask.is_some(),
            zero_rows: zero_rows.is_some(),
            bias: bias.as_ref().map(|bias| bias.dtype),
        },
        AttentionRows::Varlen { .. } if attention.plan.path == Path::Fused => ShaderRows::Fused,
        _ => ShaderRows::Packed { lse: attention.lse.is_some() },
    };
    Shader::Attention(AttentionShader { algorithm, dtype, head_dim, rows })
}

/// Floating-point operations of a query with so many keys, in one head.
fn row_operations(keys: usize, head_dim: usize) -> u64 {
    (4 * keys as u64).saturating_mul(head_dim as u64)
}

/// The most that one workgroup has.
fn group_operations(algorithm: Algorithm, keys: usize, head_dim: usize) -> u64 {
    row_operations(keys, head_dim).saturating_mul(algorithm.tile_rows(head_dim) as u64)
}

/// Rows of the longest sequence of a range.
fn longest(cu_seqlens: &CuSeqlens, range: &Range<usize>) -> usize {
    range.clone().map(|sequence| cu_seqlens.rows(sequence).len()).max().unwrap_or(0)
}

impl Work {
    /// The work of a call, were it one launch.
    fn of(attention: &Attention<'_>, algorithm: Algorithm) -> Self {
        let shape = attention.problem.shape;
        let tile_rows = algorithm.tile_rows(shape.head_dim);
        let of_sequence = |queries: usize, keys: usize| {
            let row = row_operations(keys, shape.head_dim).saturating_mul(shape.num_heads as u64);
            let tiles = queries.div_ceil(tile_rows) as u64;
            Self {
                operations: row.saturating_mul(queries as u64),
                in_whole_tiles: row.saturating_mul(tiles).saturating_mul(tile_rows as u64),
            }
        };
        let of_sequences = |query: &CuSeqlens, key: &CuSeqlens| {
            (0..query.batch())
                .map(|b| of_sequence(query.rows(b).len(), key.rows(b).len()))
                .fold(Self::default(), Self::and)
        };
        match &attention.rows {
            AttentionRows::Dense { .. } => of_sequence(shape.seq_q, shape.seq_k).times(shape.batch as u64),
            AttentionRows::Varlen { query, key } => of_sequences(query.cu_seqlens(), key.cu_seqlens()),
            AttentionRows::Packed { query, key } => of_sequences(query, key),
            AttentionRows::DeviceVarlen { .. } => Self::default(),
        }
    }
}

fn attention_params(attention: &Attention<'_>, Tensors { q, k, v, out }: &Tensors) -> AttentionParams {
    let shape = attention.problem.shape;
    AttentionParams {
        q_offset: q.offset,
        q_stride_b: q.stride_b,
        q_stride_s: q.stride_s,
        q_stride_h: q.stride_h,
        k_offset: k.offset,
        k_stride_b: k.stride_b,
        k_stride_s: k.stride_s,
        k_stride_h: k.stride_h,
        v_offset: v.offset,
        v_stride_b: v.stride_b,
        v_stride_s: v.stride_s,
        v_stride_h: v.stride_h,
        out_offset: out.offset,
        out_stride_b: out.stride_b,
        out_stride_s: out.stride_s,
        out_stride_h: out.stride_h,
        seq_q: shape.seq_q as u32,
        seq_k: shape.seq_k as u32,
        group_size: shape.group_size() as u32,
        score_scale: attention.problem.softmax_scale * LOG2_E,
        ..Default::default()
    }
}
