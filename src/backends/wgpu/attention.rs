//! Launches of the attention shader: dense, fused by lists, on packed rows, and the packed path of
//! padded tensors.

use std::ops::Range;

use crate::backends::rows::{RowShape, WORD_BYTES, head_ranges, with_filled_heads};
use crate::call::op::{Attention, Rows};
use crate::call::path::Path;
use crate::call::segments::Role;
use crate::error::{Error, Result};
use crate::mask::cu_seqlens::CuSeqlens;
use crate::score_modifiers::ScoreModifiers;

use super::context::Context;
use super::copy::{Move, move_placed};
use super::dispatch::{BINDING_ALIGNMENT, MAX_GROUPS, Window};
use super::head_table::head_table;
use super::launches::{AttentionLaunch, Launches};
use super::lse::{PlacedLse, scatter_lse};
use super::pace::Pace;
use super::params::AttentionParams;
use super::placement::{FirstDim, Operand, Placed, split_batch};
use super::ranges::Ranges;
use super::segments::{PlacedOutput, Segments};
use super::shader::{Algorithm, AttentionRows, AttentionShader, RangesOf, Shader, TileKeys};
use super::sides::{Kept, Sequences, Side};
use super::splits::{SPLITS, split_heads};
use super::work::{Work, group_operations};

/// Makes a call into launches.
pub(super) fn record(
    context: &Context,
    algorithm: Algorithm,
    pace: &Pace,
    attention: Attention<'_>,
    launches: &mut Launches<'_>,
) -> Result<()> {
    // Tensors keep their layouts: placing them says which are copied.
    let filled = with_filled_heads(attention.problem);
    let attention = &attention.on(&filled);
    let shader = shader_for(context, attention, algorithm)?;
    let announced = Shader::Attention(shader);
    launches.announce(announced, Work::of(attention, algorithm)?, pace.limit(announced));
    let heads = attention.modifiers.map(|modifiers| head_table(context, modifiers, attention.problem)).transpose()?;
    let call = Call { context, attention, algorithm, shader, heads };
    match &attention.rows {
        Rows::Dense { key_mask, zero_rows } => {
            call.dense(key_mask.map(Kept::Host), zero_rows.map(Kept::Host), launches)
        }
        Rows::Packed { query, key } => call.packed(query, key, launches),
        Rows::Varlen { query, key } => call.varlen(Side::Host(query), Side::Host(key), launches),
        Rows::DeviceVarlen { query, key } => {
            call.varlen(Side::device(context, query)?, Side::device(context, key)?, launches)
        }
    }
}

/// The variant that computes a call.
fn shader_for(context: &Context, attention: &Attention<'_>, algorithm: Algorithm) -> Result<AttentionShader> {
    let (dtype, head_dim) = (attention.problem.dtype, attention.problem.shape.head_dim);
    let rows = match &attention.rows {
        Rows::Dense { key_mask, zero_rows } => AttentionRows::Dense {
            key_mask: key_mask.is_some(),
            zero_rows: zero_rows.is_some(),
            bias: attention.bias.as_ref().map(|bias| bias.dtype),
        },
        Rows::DeviceVarlen { .. } if attention.plan.path == Path::Dense => {
            let bias = attention.bias.as_ref().map(|bias| bias.dtype);
            AttentionRows::Dense { key_mask: true, zero_rows: true, bias }
        }
        Rows::Varlen { .. } | Rows::DeviceVarlen { .. } if attention.plan.path == Path::Fused => {
            AttentionRows::Fused { bias: attention.bias.as_ref().map(|bias| bias.dtype) }
        }
        _ => AttentionRows::Packed,
    };
    let (ranges, lse) = (attention.ranges.is_some(), attention.lse.is_some());
    let modifiers = attention.modifiers.map(ScoreModifiers::set).unwrap_or_default();
    let (out_buffers, tiles) = (0, TileKeys::All);
    let whole = AttentionShader { algorithm, dtype, head_dim, rows, ranges, lse, modifiers, out_buffers, tiles };
    if rows == AttentionRows::Packed {
        return Ok(whole);
    }
    let out = Segments::output(context, Role::Out, &attention.out, FirstDim::Batch)?;
    let in_place = out.buffers_in_place(context, whole.left_for_output(context.max_storage_buffers))?;
    // Fits: there are few segments.
    Ok(AttentionShader { out_buffers: in_place.map_or(0, |buffers| buffers as u32), ..whole })
}

fn too_large(argument: &'static str, limit_name: &'static str, limit: u64, got: u64) -> Error {
    Error::TooLarge { argument, limit_name, limit, got }
}

/// A call that is made into launches.
struct Call<'a> {
    context: &'a Context,
    attention: &'a Attention<'a>,
    algorithm: Algorithm,
    shader: AttentionShader,
    /// Values of heads, where scores are modified.
    heads: Option<Window>,
}

/// The tensors of a call.
struct Operands<'a> {
    q: Segments<'a>,
    k: Segments<'a>,
    v: Segments<'a>,
    out: Segments<'a>,
}

impl<'a> Operands<'a> {
    /// With q and k joined before the first launch, if that has begun.
    fn join(self, context: &Context, launches: &mut Launches<'_>) -> Result<Self> {
        let Self { q, k, v, out } = self;
        Ok(Self { q: q.join(context, Role::Q, launches)?, k: k.join(context, Role::K, launches)?, v, out })
    }

    /// After the last launch.
    fn finish(self, launches: &mut Launches<'_>) {
        self.q.finish_input(launches);
        self.k.finish_input(launches);
    }

    fn all(&self) -> impl Iterator<Item = Operand<'a>> {
        [&self.q, &self.k, &self.v, &self.out].into_iter().flat_map(Segments::operands)
    }
}

/// The tensors of one launch.
struct Tensors {
    q: Placed,
    k: Placed,
    v: Placed,
    out: PlacedOutput,
}

/// The sequences of one launch on packed rows.
struct PackedRows<'a> {
    query: Sequences<'a>,
    key: Sequences<'a>,
    ranges: &'a Ranges<'a>,
    range: Range<usize>,
    /// Packed rows at which the placed tensors start.
    q_row_base: usize,
    k_row_base: usize,
}

impl Call<'_> {
    fn tile_rows(&self) -> usize {
        self.algorithm.tile_rows(self.attention.problem.shape.head_dim)
    }

    fn operands<'b>(&'b self, query_dim: FirstDim<'b>, key_dim: FirstDim<'b>) -> Result<Operands<'b>> {
        let Attention { q, k, v, out, .. } = self.attention;
        Ok(Operands {
            q: Segments::input(self.context, Role::Q, q, query_dim)?,
            k: Segments::input(self.context, Role::K, k, key_dim)?,
            v: Segments::input(self.context, Role::V, v, key_dim)?,
            out: Segments::output(self.context, Role::Out, out, query_dim)?,
        })
    }

    /// The tensors of a launch on a range of batch rows. Inputs that are copied first lie in
    /// `scratch`.
    fn place(
        &self,
        Operands { q, k, v, out }: &Operands<'_>,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Tensors> {
        // The output first: one that is refused is refused before anything is copied.
        let out = match self.shader.out_buffers {
            0 => PlacedOutput::Whole(out.place_output(range, launches, scratch)?),
            _ => out.place_parts(range)?,
        };
        let mut place = |input: &Segments<'_>| input.place_input(self.context, range, launches, scratch);
        Ok(Tensors { q: place(q)?, k: place(k)?, v: place(v)?, out })
    }

    fn varlen(&self, query: Side<'_>, key: Side<'_>, launches: &mut Launches<'_>) -> Result<()> {
        match self.attention.plan.path {
            Path::Dense => self.dense(Some(key.kept()), Some(query.kept()), launches),
            Path::Fused => self.fused(query, key, launches),
            _ => self.packed_path(query, key, launches),
        }
    }

    /// One launch on all batch rows, or one for each range of them that fits the bindings.
    fn dense(
        &self,
        key_mask: Option<Kept<'_>>,
        zero_rows: Option<Kept<'_>>,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let (context, shape) = (self.context, self.attention.problem.shape);
        let tiles = shape.seq_q.div_ceil(self.tile_rows());
        if tiles > MAX_GROUPS {
            let limit = (MAX_GROUPS * self.tile_rows()) as u64;
            let limit_name = "query rows in max_compute_workgroups_per_dimension";
            return Err(too_large("q", limit_name, limit, shape.seq_q as u64));
        }
        let operands = self.operands(FirstDim::Batch, FirstDim::Batch)?.join(context, launches)?;
        let bias = self.bias()?;
        let (key_bits, key_words) = Kept::window(key_mask, self.context)?;
        let (row_bits, row_words) = Kept::window(zero_rows, self.context)?;
        let lse = self.lse()?;
        // Beside the lse, rows that are zeros are told by their ranges.
        let kept = zero_rows.filter(|_| lse.is_some());
        let ranges = match kept {
            Some(Kept::Host(kept)) => Ranges::dense_kept(context, self.attention.ranges, kept, self.tile_rows())?,
            Some(Kept::Device(meta)) => {
                let form = (self.tile_rows(), false);
                Ranges::of_device(context, self.attention.ranges, (meta, meta), RangesOf::Dense, form, launches)?
            }
            _ => Ranges::dense(context, self.attention.ranges, self.tile_rows())?,
        };
        let bound: Vec<_> = operands.all().chain(bias).chain(lse).collect();
        for range in split_batch(context.max_binding_bytes, shape.batch, &bound, |_| 0)? {
            let mut scratch = Vec::new();
            let tensors = self.place(&operands, &range, launches, &mut scratch)?;
            let params = self.params(&tensors);
            let params = AttentionParams { batch_base: range.start as u32, key_words, row_words, ..params };
            let (bias_window, params) = self.place_bias(bias.as_ref(), &range, params)?;
            let (lse_window, params) = self.bind_lse(lse.map(|lse| PlacedLse::of(&lse, &range)).transpose()?, params);
            let (ranges_window, params) = ranges.bind(params, 0)?;
            let (key_bits, row_bits) = (key_bits.clone(), row_bits.clone());
            let others = match (lse, self.attention.ranges) {
                (None, _) => [key_bits, row_bits, bias_window, ranges_window],
                (Some(_), None) => [lse_window, key_bits, row_bits, bias_window],
                (Some(_), Some(_)) => [lse_window, key_bits, bias_window, ranges_window],
            };
            let groups = [tiles as u32, range.len() as u32];
            let out = tensors.out.clone();
            self.push((tensors, others), params, groups, ranges.most_keys(shape.seq_k), launches)?;
            self.finish_output(&operands, &range, &out, launches)?;
            launches.give_back(scratch);
        }
        operands.finish(launches);
        ranges.finish(launches);
        Ok(())
    }

    /// The binding of the bias, if there is one, and the parameters with its place.
    fn place_bias(
        &self,
        bias: Option<&Operand<'_>>,
        range: &Range<usize>,
        params: AttentionParams,
    ) -> Result<(Window, AttentionParams)> {
        let Some(bias) = bias else { return Ok((self.context.unused_read(), params)) };
        let (window, bias_offset) = bias.place_elements(range)?;
        // Each fits wherever it is stepped over: a binding is below 2 GiB.
        let [bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k] =
            [0, 1, 2, 3].map(|dim| bias.layout.strides()[dim] as u32);
        let params =
            AttentionParams { bias_offset, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, ..params };
        Ok((window, params))
    }

    /// One launch on packed rows, or one for each range of sequences that fits the bindings.
    fn packed(&self, query: &CuSeqlens, key: &CuSeqlens, launches: &mut Launches<'_>) -> Result<()> {
        let ranges = Ranges::packed(self.context, self.attention.ranges, query, self.tile_rows())?;
        let operands = self.operands(FirstDim::PackedRow(query), FirstDim::PackedRow(key))?;
        // `[H, total_q]`: bound whole, by its heads.
        let lse = self.lse()?.map(|lse| PlacedLse::of(&lse, &(0..self.attention.problem.shape.num_heads)));
        let lse = lse.transpose()?;
        let (limit, got) = (self.context.max_binding_bytes, lse.as_ref().map_or(0, |lse| lse.window.size));
        if got > limit {
            return Err(too_large("lse", "max_storage_buffer_binding_size (bytes)", limit, got));
        }
        let bound: Vec<_> = operands.all().collect();
        for range in split_batch(self.context.max_binding_bytes, query.batch(), &bound, |_| 0)? {
            let mut scratch = Vec::new();
            let tensors = self.place(&operands, &range, launches, &mut scratch)?;
            let (q_row_base, k_row_base) = (query.rows(range.start).start, key.rows(range.start).start);
            let out = tensors.out.clone();
            let (query, key) = (Sequences::Host(query), Sequences::Host(key));
            let sequences = PackedRows { query, key, ranges: &ranges, range, q_row_base, k_row_base };
            self.push_packed(tensors, &sequences, lse.clone(), launches)?;
            self.finish_output(&operands, &sequences.range, &out, launches)?;
            launches.give_back(scratch);
        }
        Ok(())
    }

    /// One launch on the padded tensors by lists of tokens, or one for each range of batch rows
    /// that fits the bindings.
    fn fused(&self, query: Side<'_>, key: Side<'_>, launches: &mut Launches<'_>) -> Result<()> {
        let (context, shape) = (self.context, self.attention.problem.shape);
        let operands = self.operands(FirstDim::Batch, FirstDim::Batch)?.join(context, launches)?;
        let (query_tokens, key_tokens) = (query.token_lists(context)?, key.token_lists(context)?);
        let tiles = query.fused_tiles(context, self.tile_rows())?;
        let (bias, lse) = (self.bias()?, self.lse()?);
        // There is no binding left for the list of queries then.
        let lists_queries = self.attention.ranges.is_some() && (bias.is_some() || lse.is_some());
        let ranges = match (query, key) {
            (Side::Host(query), Side::Host(key)) => {
                Ranges::fused(context, self.attention.ranges, query, key, (self.tile_rows(), lists_queries))?
            }
            (Side::Device(query), Side::Device(key)) => {
                let (both, form) = ((query, key), (self.tile_rows(), lists_queries));
                Ranges::of_device(context, self.attention.ranges, both, RangesOf::Fused, form, launches)?
            }
            _ => Ranges::none(context),
        };
        let bound: Vec<_> = operands.all().chain(bias).chain(lse).collect();
        let list_bytes = |range: &Range<usize>| {
            let lists = [query_tokens.bytes(range), key_tokens.bytes(range), tiles.bytes(range)];
            lists.into_iter().map(|bytes| bytes.end - bytes.start + BINDING_ALIGNMENT).max().unwrap_or(0)
        };
        for range in split_batch(context.max_binding_bytes, shape.batch, &bound, list_bytes)? {
            let count = tiles.of(&range).len();
            if count == 0 {
                continue;
            }
            let mut scratch = Vec::new();
            let tensors = self.place(&operands, &range, launches, &mut scratch)?;
            let (tiles_window, tiles_skipped) = Window::part(&tiles.buffer, tiles.bytes(&range));
            let (query_window, query_skipped) = Window::part(&query_tokens.buffer, query_tokens.bytes(&range));
            let (key_window, key_skipped) = Window::part(&key_tokens.buffer, key_tokens.bytes(&range));
            let (first_tile, groups) = (tiles_skipped / WORD_BYTES as u32, list_groups(count));
            let params = AttentionParams {
                batch_base: range.start as u32,
                first_tile,
                end_tile: first_tile + count as u32,
                grid_width: groups[0],
                query_tokens_offset: if lists_queries { ranges.queries_offset() } else { query_skipped / 4 },
                key_tokens_offset: key_skipped / 4,
                ..self.params(&tensors)
            };
            // The ranges of tiles are bound whole.
            let (ranges_window, params) = ranges.bind(params, tiles.of(&range).start - first_tile)?;
            let keys = ranges.most_keys(key.sequences().longest(&range));
            let (lse_window, params) = self.bind_lse(lse.map(|lse| PlacedLse::of(&lse, &range)).transpose()?, params);
            let (bias_window, params) = self.place_bias(bias.as_ref(), &range, params)?;
            let others = match (lse, &bias, self.attention.ranges) {
                (None, None, _) => [tiles_window, query_window, key_window, ranges_window],
                (None, Some(_), None) => [tiles_window, query_window, key_window, bias_window],
                (None, Some(_), Some(_)) => [tiles_window, key_window, bias_window, ranges_window],
                (Some(_), _, None) => [lse_window, tiles_window, query_window, key_window],
                (Some(_), _, Some(_)) => [lse_window, tiles_window, key_window, ranges_window],
            };
            let out = tensors.out.clone();
            self.push((tensors, others), params, groups, keys, launches)?;
            self.finish_output(&operands, &range, &out, launches)?;
            launches.give_back(scratch);
        }
        operands.finish(launches);
        ranges.finish(launches);
        Ok(())
    }

    /// Pack, attention on the packed rows, scatter: a range of batch rows at a time, through
    /// scratch.
    fn packed_path(&self, query: Side<'_>, key: Side<'_>, launches: &mut Launches<'_>) -> Result<()> {
        let (context, shape) = (self.context, self.attention.problem.shape);
        let ranges = match (self.attention.ranges, query, key) {
            (Some(ranges), Side::Host(query), Side::Host(key)) => {
                let ranges = ranges.of_packed_rows(query, key, false)?;
                Ranges::packed(context, Some(&ranges), query.cu_seqlens(), self.tile_rows())?
            }
            (ranges, Side::Device(query), Side::Device(key)) => {
                let (both, form) = ((query, key), (self.tile_rows(), false));
                Ranges::of_device(context, ranges, both, RangesOf::Packed, form, launches)?
            }
            _ => Ranges::none(context),
        };
        let operands = self.operands(FirstDim::Batch, FirstDim::Batch)?.join(context, launches)?;
        let lse = self.lse()?;
        let bound: Vec<_> = operands.all().chain(lse).collect();
        let row = |heads: usize| RowShape::new(heads, shape.head_dim, self.attention.problem.dtype.size());
        let (q_row, kv_row) = (row(shape.num_heads), row(shape.num_kv_heads));
        let scratch_bytes =
            |range: &Range<usize>| query.packed_bytes(q_row, range).max(key.packed_bytes(kv_row, range));
        let batch_ranges = match query {
            Side::Host(_) => split_batch(context.max_binding_bytes, shape.batch, &bound, scratch_bytes)?,
            Side::Device(_) => self.one_range(&bound, scratch_bytes)?,
        };
        for range in batch_ranges {
            let mut scratch = Vec::new();
            let mut pack = |operand: &Segments<'_>, row: RowShape, meta: Side<'_>| -> Result<Placed> {
                let src = operand.place_input(context, &range, launches, &mut scratch)?;
                let buffer = launches.take_scratch(meta.packed_bytes(row, &range))?;
                let dst = Placed::packed(row, &buffer);
                scratch.push(buffer);
                move_placed(context, Move::Pack, (&src, &dst), row, (meta, &range), launches)?;
                Ok(dst)
            };
            let q = pack(&operands.q, q_row, query)?;
            let (k, v) = (pack(&operands.k, kv_row, key)?, pack(&operands.v, kv_row, key)?);
            let buffer = launches.take_scratch(query.packed_bytes(q_row, &range))?;
            let out = Placed::packed(q_row, &buffer);
            scratch.push(buffer);
            let (query_rows, key_rows) = (query.sequences(), key.sequences());
            let sequences = PackedRows {
                query: query_rows,
                key: key_rows,
                ranges: &ranges,
                range: range.clone(),
                q_row_base: query_rows.packed_rows(&range).start,
                k_row_base: key_rows.packed_rows(&range).start,
            };
            let packed_lse = match lse {
                None => None,
                Some(_) => {
                    let rows = query_rows.packed_rows(&range);
                    let buffer = launches.take_scratch(4 * (shape.num_heads * rows.len()) as u64)?;
                    scratch.push(buffer.clone());
                    Some(PlacedLse::of_packed_rows(&buffer, rows))
                }
            };
            let placed_out = PlacedOutput::Whole(out.clone());
            self.push_packed(Tensors { q, k, v, out: placed_out }, &sequences, packed_lse.clone(), launches)?;
            let padded_out = operands.out.place_output(&range, launches, &mut scratch)?;
            move_placed(context, Move::Scatter, (&out, &padded_out), q_row, (query, &range), launches)?;
            operands.out.finish_output(&range, &padded_out, launches)?;
            if let (Some(packed), Some(padded)) = (packed_lse, lse) {
                let padded = PlacedLse::of(&padded, &range)?;
                scatter_lse(context, (packed, padded), shape.num_heads, (query, &range), launches)?;
            }
            launches.give_back(scratch);
        }
        operands.finish(launches);
        ranges.finish(launches);
        Ok(())
    }

    /// The range of all batch rows: of a smaller one only the device knows where its packed rows
    /// start.
    fn one_range(
        &self,
        bound: &[Operand<'_>],
        scratch_bytes: impl Fn(&Range<usize>) -> u64,
    ) -> Result<Vec<Range<usize>>> {
        let (limit, batch) = (self.context.max_binding_bytes, self.attention.problem.shape.batch);
        let got = scratch_bytes(&(0..batch));
        if got > limit {
            let limit_name = "rows packed by metadata of the device, in max_storage_buffer_binding_size (bytes)";
            return Err(too_large("q", limit_name, limit, got));
        }
        let ranges = split_batch(limit, batch, bound, scratch_bytes)?;
        if ranges.len() > 1 {
            let limit_name = "batch rows packed by metadata of the device, for which every tensor fits a binding";
            return Err(too_large("q", limit_name, ranges[0].len() as u64, batch as u64));
        }
        Ok(ranges)
    }

    fn push_packed(
        &self,
        tensors: Tensors,
        sequences: &PackedRows<'_>,
        lse: Option<PlacedLse>,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let tiles = sequences.query.packed_tiles(self.context, self.tile_rows())?;
        let of_range = tiles.of(&sequences.range);
        if of_range.is_empty() {
            return Ok(());
        }
        let groups = list_groups(of_range.len());
        let params = AttentionParams {
            first_tile: of_range.start,
            end_tile: of_range.end,
            grid_width: groups[0],
            q_row_base: sequences.q_row_base as u32,
            k_row_base: sequences.k_row_base as u32,
            ..self.params(&tensors)
        };
        let (lse_window, params) = self.bind_lse(lse, params);
        let (ranges_window, params) = sequences.ranges.bind(params, 0)?;
        let key_rows = sequences.key.cu_seqlens(self.context)?;
        let others = [lse_window, Window::whole(&tiles.buffer), key_rows, ranges_window];
        let keys = sequences.ranges.most_keys(sequences.key.longest(&sequences.range));
        self.push((tensors, others), params, groups, keys, launches)
    }

    /// Copies the output to its segments, or to heads that are not filled, if it is not there already.
    fn finish_output(
        &self,
        operands: &Operands<'_>,
        range: &Range<usize>,
        out: &PlacedOutput,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        match out {
            PlacedOutput::Whole(written) => operands.out.finish_output(range, written, launches),
            PlacedOutput::Parts { .. } => Ok(()),
        }
    }

    /// The bias, if there is one.
    fn bias(&self) -> Result<Option<Operand<'_>>> {
        let bias = self.attention.bias.as_ref();
        bias.map(|bias| Operand::input(self.context, "bias", bias, FirstDim::BatchOfElements)).transpose()
    }

    /// The log-sum-exp, if it is written.
    fn lse(&self) -> Result<Option<Operand<'_>>> {
        let lse = self.attention.lse.as_ref();
        lse.map(|lse| Operand::output(self.context, "lse", lse, FirstDim::Batch)).transpose()
    }

    /// The binding of the log-sum-exp, if it is written, and the parameters with its place.
    fn bind_lse(&self, lse: Option<PlacedLse>, params: AttentionParams) -> (Window, AttentionParams) {
        let Some(PlacedLse { window, offset, stride_b, stride_h, stride_s }) = lse else {
            return (self.context.unused_write(), params);
        };
        let (lse_offset, lse_stride_b, lse_stride_h, lse_stride_s) = (offset, stride_b, stride_h, stride_s);
        (window, AttentionParams { lse_offset, lse_stride_b, lse_stride_h, lse_stride_s, ..params })
    }

    /// Adds a launch on tensors and the other windows of its form, in which a tile meets `keys` keys
    /// at most; several if a grid does not hold all heads. `groups` is the grid of one head. With ranges
    /// heads lie along x: see `shaders/rows/tile.wgsl`.
    fn push(
        &self,
        (Tensors { q, k, v, out }, others): (Tensors, [Window; 4]),
        params: AttentionParams,
        [x, y]: [u32; 2],
        keys: usize,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let shape = self.attention.problem.shape;
        let group_operations = group_operations(self.algorithm, keys, shape.head_dim);
        let windows = self.windows((q, k, v, out), others);
        for heads in head_ranges(shape.num_heads, shape.group_size(), MAX_GROUPS) {
            let params = params.after_heads(heads.start);
            let Some((shader, split)) = self.split(heads.len(), [x, y], keys) else {
                let heads = heads.len() as u32;
                launches.push_attention(AttentionLaunch {
                    shader: Shader::Attention(self.shader),
                    params,
                    windows: windows(self.shader).collect(),
                    first: [0; 3],
                    groups: if self.shader.ranges { [heads, x, y] } else { [x, y, heads] },
                    group_operations,
                });
                continue;
            };
            let (whole, planes) = ((heads.len() - split) as u32, split as u32 * SPLITS);
            let params =
                AttentionParams { splits: SPLITS, first_split_head: whole, split_width: x, split_height: y, ..params };
            let tiles = u64::from(x) * u64::from(y) * split as u64;
            let splits = launches.take_scratch(split_bytes(self.algorithm, shape.head_dim, tiles))?;
            let merge = AttentionShader { tiles: TileKeys::Merged, ..shader };
            // One dispatch of whole tiles and splits: wgpu would have a second one that writes the same scratch as the
            // call before wait for the first.
            for (shader, first, planes, group_operations) in
                [(shader, 0, whole + planes, group_operations), (merge, whole, planes, 0)]
            {
                launches.push_attention(AttentionLaunch {
                    shader: Shader::Attention(shader),
                    params,
                    windows: windows(shader).chain([Window::whole(&splits)]).collect(),
                    first: [0, 0, first],
                    groups: [x, y, planes],
                    group_operations,
                });
            }
            launches.give_back([splits]);
        }
        Ok(())
    }

    /// The windows that a variant of the call's shader binds, but for splits.
    fn windows(
        &self,
        (q, k, v, out): (Placed, Placed, Placed, PlacedOutput),
        others: [Window; 4],
    ) -> impl Fn(AttentionShader) -> std::vec::IntoIter<Window> {
        let mut outs = out.windows();
        let further = if outs.is_empty() { Vec::new() } else { outs.split_off(1) };
        let first_out = outs.pop().unwrap_or_else(|| self.context.unused_write());
        let of_form: Vec<_> = [q.window, k.window, v.window, first_out].into_iter().chain(others).collect();
        let heads = self.heads.clone();
        move |shader| {
            let windows: Vec<_> =
                shader.bound(of_form.iter().cloned()).chain(further.iter().cloned()).chain(heads.clone()).collect();
            windows.into_iter()
        }
    }

    /// The variant that splits the keys of the last tiles of a launch, and of how many of its heads, if it does. Tiles
    /// that only the device knows may be fewer than there are workgroups for.
    fn split(&self, heads: usize, [x, y]: [u32; 2], keys: usize) -> Option<(AttentionShader, usize)> {
        if matches!(self.attention.rows, Rows::DeviceVarlen { .. }) {
            return None;
        }
        let shader = self.shader.with_splits(self.context.max_storage_buffers)?;
        let tiles = u64::from(x) * u64::from(y);
        let split = split_heads(heads, tiles, keys.div_ceil(self.algorithm.step_keys()));
        let bytes = split_bytes(self.algorithm, self.shader.head_dim, tiles * split as u64);
        (split > 0 && bytes <= self.context.max_binding_bytes).then_some((shader, split))
    }

    /// What every launch is told.
    fn params(&self, Tensors { q, k, v, out }: &Tensors) -> AttentionParams {
        let shape = self.attention.problem.shape;
        let params = AttentionParams {
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
            seq_q: shape.seq_q as u32,
            seq_k: shape.seq_k as u32,
            group_size: shape.group_size() as u32,
            score_scale: score_scale(self.attention),
            ..Default::default()
        };
        out.bind(params)
    }
}

/// What `q·k` is multiplied by: the softmax scale in units of base 2, or the factor under a soft cap.
fn score_scale(attention: &Attention<'_>) -> f32 {
    let problem = attention.problem;
    match attention.modifiers.filter(|modifiers| modifiers.set().softcap) {
        Some(modifiers) => modifiers.softcap_factor(problem.softmax_scale),
        None => problem.score_scale(),
    }
}

/// A grid over tiles of a list.
fn list_groups(tiles: usize) -> [u32; 2] {
    let width = tiles.min(MAX_GROUPS);
    [width as u32, tiles.div_ceil(width) as u32]
}

/// Bytes that the splits of tiles leave: rows of f32, and a word beside each.
fn split_bytes(algorithm: Algorithm, head_dim: usize, tiles: u64) -> u64 {
    let rows = (tiles * u64::from(SPLITS)).saturating_mul(algorithm.tile_rows(head_dim) as u64);
    rows.saturating_mul(4 * head_dim as u64 + WORD_BYTES)
}
