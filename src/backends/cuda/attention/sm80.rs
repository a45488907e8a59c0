//! Launches of the sm80 kernel: dense, fused, and on packed rows.

use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{
    AttentionParams, KeyRangeParams, ModifiedAttentionParams, RangedAttentionParams, RowLists, ScoreModifierParams,
};
use crate::backends::cuda::kernels::tiles::{FormSm80, MAX_GRID, Tile};
use crate::backends::cuda::launcher::Launcher;
use crate::backends::cuda::tensors::key_ranges::PlacedRanges;
use crate::backends::cuda::tensors::metadata::{self, Tables};
use crate::backends::cuda::tensors::placement::Operand;
use crate::backends::cuda::tensors::score_modifiers::PlacedModifiers;
use crate::backends::rows::head_ranges;
use crate::call::op::{Attention, DeviceTables};
use crate::call::problem::AttentionShape;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

use super::call::{PackedRows, Tensors, score_scale};
use super::dense_metas::DenseMeta;

/// The extent of a launch.
struct Extent {
    batch: usize,
    /// Rows of the longest query sequence, or of every padded one.
    max_queries: usize,
}

/// Every query row of padded tensors. Keys that the key mask drops do not count, a bias is added to
/// the scores, and rows that `zero_rows` drops are zeros.
pub fn dense(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: &Tensors,
    key_mask: Option<&KeyMask>,
    zero_rows: Option<&KeyMask>,
) -> Result<()> {
    let shape = attention.problem.shape;
    // By lists, dropped keys cost nothing. With a bias, every key is computed: what the fused path
    // adds to its lists is checked by this.
    if attention.bias.is_none()
        && key_mask.is_some()
        && let Some(meta) = DenseMeta::of(launcher, &shape, key_mask, zero_rows)?
    {
        return kept_keys(launcher, attention, tensors, &meta, zero_rows);
    }
    let mut params = params(launcher, attention, tensors)?;
    (params.key_bits, params.key_words) = bits(launcher, key_mask)?;
    (params.row_bits, params.row_words) = bits(launcher, zero_rows)?;
    let extent = Extent { batch: shape.batch, max_queries: shape.seq_q };
    let ranges = attention.ranges.map(|ranges| PlacedRanges::padded(launcher, ranges)).transpose()?;
    let ranges = ranges.as_ref().map(PlacedRanges::params);
    launch(launcher, attention, &extent, &Work { attention: params, lists: None, ranges })
}

/// Every query row of padded tensors against the kept keys. Rows that `zero_rows` drops are computed
/// too, and then written as zeros: what other paths skip is checked by what this one computes.
fn kept_keys(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: &Tensors,
    meta: &DenseMeta,
    zero_rows: Option<&KeyMask>,
) -> Result<()> {
    let DenseMeta { query, key } = meta;
    let tables = [metadata::host_tables(launcher, query)?, metadata::host_tables(launcher, key)?];
    let ranges = attention.ranges.map(|ranges| PlacedRanges::listed(launcher, ranges, query, key)).transpose()?;
    let (row_bits, row_words) = bits(launcher, zero_rows)?;
    let params = AttentionParams { row_bits, row_words, ..params(launcher, attention, tensors)? };
    by_lists(launcher, attention, params, &tables, ranges.as_ref().map(PlacedRanges::params))
}

/// Address of a mask's bits, and u32s of a row of them; zeros if there is no mask.
fn bits(launcher: &Launcher, mask: Option<&KeyMask>) -> Result<(u64, i32)> {
    let Some(mask) = mask else { return Ok((0, 0)) };
    let bits = metadata::mask_bits(launcher, mask)?;
    // Fits: a row has at most i32::MAX bits.
    Ok((bits.buffer.address(), bits.row_words as i32))
}

/// Every query row of padded tensors, masked by tables that the device built.
pub fn dense_with_tables(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: &Tensors,
    query: &DeviceTables<'_>,
    key: &DeviceTables<'_>,
) -> Result<()> {
    let mut params = params(launcher, attention, tensors)?;
    (params.row_bits, params.row_words) = metadata::device_bits(launcher, query)?;
    (params.key_bits, params.key_words) = metadata::device_bits(launcher, key)?;
    let extent = Extent { batch: query.batch, max_queries: query.seq };
    let ranges = attention.ranges.map(|ranges| PlacedRanges::padded(launcher, ranges)).transpose()?;
    let ranges = ranges.as_ref().map(PlacedRanges::params);
    launch(launcher, attention, &extent, &Work { attention: params, lists: None, ranges })
}

/// Valid query rows and keys of padded tensors; other rows as zeros.
pub fn fused(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: &Tensors,
    query: &VarlenMeta,
    key: &VarlenMeta,
) -> Result<()> {
    let tables = [metadata::host_tables(launcher, query)?, metadata::host_tables(launcher, key)?];
    let ranges = attention.ranges.map(|ranges| PlacedRanges::listed(launcher, ranges, query, key)).transpose()?;
    let ranges = ranges.as_ref().map(PlacedRanges::params);
    by_lists(launcher, attention, params(launcher, attention, tensors)?, &tables, ranges)
}

/// The same by tables that the device built; the ranges are of listed queries.
pub fn fused_with_tables(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: &Tensors,
    tables: &[Tables; 2],
    ranges: Option<&PlacedRanges>,
) -> Result<()> {
    let ranges = ranges.map(PlacedRanges::params);
    by_lists(launcher, attention, params(launcher, attention, tensors)?, tables, ranges)
}

/// Launches a fused form; the ranges are of listed queries and keys.
fn by_lists(
    launcher: &Launcher,
    attention: &Attention<'_>,
    params: AttentionParams,
    [query, key]: &[Tables; 2],
    ranges: Option<KeyRangeParams>,
) -> Result<()> {
    let params = AttentionParams {
        cu_seqlens_q: query.cu_seqlens,
        cu_seqlens_k: key.cu_seqlens,
        batch_order: order_in_one_launch(key.batch_order, key.batch),
        ..params
    };
    let lists = RowLists {
        indices_q: query.indices,
        indices_k: key.indices,
        inv_indices: if query.is_all_valid { 0 } else { query.inv_indices },
        ..Default::default()
    };
    // Blocks for every padded row: those of masked rows write the zeros.
    let extent = Extent { batch: query.batch, max_queries: query.seq };
    launch(launcher, attention, &extent, &Work { attention: params, lists: Some(lists), ranges })
}

/// Packed rows.
pub fn packed(launcher: &Launcher, attention: &Attention<'_>, tensors: &Tensors, rows: &PackedRows<'_>) -> Result<()> {
    let params = AttentionParams {
        cu_seqlens_q: rows.cu_seqlens_q.unwrap_or_default(),
        cu_seqlens_k: rows.cu_seqlens_k.unwrap_or_default(),
        batch_order: order_in_one_launch(rows.batch_order.unwrap_or_default(), rows.batch),
        ..params(launcher, attention, tensors)?
    };
    let extent = Extent { batch: rows.batch, max_queries: rows.max_queries };
    let ranges = rows.ranges.as_ref().map(PlacedRanges::params);
    launch(launcher, attention, &extent, &Work { attention: params, lists: None, ranges })
}

/// What a launch computes, but for score modifiers.
struct Work {
    attention: AttentionParams,
    /// Of the fused forms.
    lists: Option<RowLists>,
    ranges: Option<KeyRangeParams>,
}

impl Work {
    /// The form that computes it with the least beside.
    const fn form(&self, has_modifiers: bool) -> FormSm80 {
        let AttentionParams { bias, key_bits, row_bits, .. } = self.attention;
        match (self.lists.is_some(), self.ranges.is_some()) {
            (false, _) if has_modifiers => FormSm80::Modified,
            (false, true) => FormSm80::Ranged,
            (false, false) if bias != 0 || key_bits != 0 || row_bits != 0 => FormSm80::Masked,
            (false, false) => FormSm80::Plain,
            (true, _) if has_modifiers || bias != 0 => FormSm80::FusedModified,
            (true, true) => FormSm80::FusedRanged,
            // The form without ranges has no rows to be written as zeros.
            (true, false) if row_bits != 0 => FormSm80::FusedRanged,
            (true, false) => FormSm80::Fused,
        }
    }

    /// The parameters of a launch from a batch row and a query head on.
    fn after(&self, batch: usize, heads: usize, modifiers: &ScoreModifierParams) -> ModifiedAttentionParams {
        let Self { attention, lists, ranges } = self;
        let ranges = ranges.unwrap_or_default();
        let ranged = match lists {
            None => RangedAttentionParams {
                attention: attention.after_batch_rows(batch).after_heads(heads),
                lists: RowLists::default(),
                ranges: ranges.after_batch_rows(batch),
            },
            // Lists hold positions in the whole batch, so tensors are not moved by batch rows. Fits:
            // batch · seq does.
            Some(lists) => RangedAttentionParams {
                attention: attention.after_heads(heads),
                lists: RowLists { first_batch: batch as i32, ..*lists },
                ranges,
            },
        };
        ModifiedAttentionParams { ranged, modifiers: modifiers.after_heads(heads) }
    }
}

/// Launches a call, in parts if a grid does not hold its batch or its heads.
fn launch(launcher: &Launcher, attention: &Attention<'_>, extent: &Extent, work: &Work) -> Result<()> {
    let shape = attention.problem.shape;
    let AttentionShape { num_heads, head_dim, .. } = shape;
    let &Extent { batch, max_queries } = extent;
    let Some(tile) = Tile::of(head_dim) else { return Err(Error::HeadDim { got: head_dim }) };
    if max_queries == 0 || num_heads == 0 {
        return Ok(());
    }
    // Lives until the last launch.
    let modifiers = PlacedModifiers::of(launcher, attention)?;
    let form = tile.compiled_form(work.form(modifiers.is_some()));
    let modifiers = modifiers.as_ref().map(PlacedModifiers::params).unwrap_or_default();
    let function = launcher.function(Entry::Attention { dtype: attention.problem.dtype, tile, form })?;
    // Fits: a sequence has at most i32::MAX rows.
    let tiles = max_queries.div_ceil(tile.rows as usize) as u32;
    let batches = (0..batch).step_by(MAX_GRID).map(|first| first..batch.min(first + MAX_GRID));
    let heads = || head_ranges(num_heads, shape.group_size(), MAX_GRID);
    for (batch, heads) in batches.flat_map(|batch| heads().map(move |heads| (batch.clone(), heads))) {
        let grid = [tiles, heads.len() as u32, batch.len() as u32];
        let params = work.after(batch.start, heads.start, &modifiers);
        // SAFETY: the parameters of each form start those of the form with score modifiers. The
        // tensors have the problem's shape and lie inside their buffers, those of packed rows as
        // `cu_seqlens` says (checked by problem; scratch is made so), and their rows start at words
        // (placement). Masks, `cu_seqlens` and the bias have the problem's batch rows, the lists of
        // the fused forms its positions, and ranges its queries. The output shares no memory with
        // them (checked by problem).
        unsafe { launcher.launch(function, grid, tile.threads(), &params) }?;
    }
    Ok(())
}

/// The order of the sequences covers the whole batch: null if one launch does not hold that.
fn order_in_one_launch(batch_order: u64, batch: usize) -> u64 {
    if batch > MAX_GRID { 0 } else { batch_order }
}

/// Parameters of a dense call without a mask.
fn params(
    launcher: &Launcher,
    attention: &Attention<'_>,
    Tensors { q, k, v, out, lse }: &Tensors,
) -> Result<AttentionParams> {
    let shape = attention.problem.shape;
    let lse = lse.unwrap_or_default();
    let mut params = AttentionParams {
        q: q.address,
        k: k.address,
        v: v.address,
        out: out.address,
        q_strides: q.strides,
        k_strides: k.strides,
        v_strides: v.strides,
        out_strides: out.strides,
        // All fit: checked by problem.
        seq_q: shape.seq_q as i32,
        seq_k: shape.seq_k as i32,
        group_size: shape.group_size() as i32,
        head_dim: shape.head_dim as i32,
        score_scale: score_scale(attention.problem),
        lse: lse.address,
        lse_batch_stride: lse.batch_stride,
        lse_head_stride: lse.head_stride,
        ..Default::default()
    };
    if let Some(bias) = &attention.bias {
        let bias = Operand::input(launcher, "bias", bias)?;
        params.bias = bias.address();
        params.bias_is_f32 = i32::from(bias.dtype == DType::F32);
        // Every stride fits: layouts end below an eighth of the range.
        params.bias_strides.iter_mut().zip(bias.layout.strides()).for_each(|(slot, &stride)| *slot = stride as i64);
    }
    Ok(params)
}
