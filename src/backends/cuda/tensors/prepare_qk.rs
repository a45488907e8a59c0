//! The launch that normalises and rotates q and k of every segment.

use crate::backends::cuda::kernels::module::{Entry, PrepareForm};
use crate::backends::cuda::kernels::params::{
    MAX_PREPARED_TENSORS, PREPARED_HEADS, PrepareQkParams, PreparedRows, ROW_COPY_THREADS,
};
use crate::backends::cuda::kernels::tiles::MAX_GRID;
use crate::backends::cuda::launcher::Launcher;
use crate::backends::rows::{has_filled_heads, misaligned_by};
use crate::call::memory::Input;
use crate::call::prepare_qk::{HeadNorm, HeadRotary, PrepareQk, PrepareSegment, PreparedRows as Rows, RotaryPairing};
use crate::dtype::DType;
use crate::error::Result;

use super::metadata;
use super::placement::{Operand, strides};

const WORD_BYTES: u64 = 16;
/// Elements of a head that one lane takes as neighbours, at most 32 lanes.
const CHUNK: usize = 8;
const MAX_LANES: usize = 32;
/// Lanes that keep a multiprocessor busy: all that run at once, twice.
const LANES_OF_MULTIPROCESSOR: usize = 2 * 1024;

pub fn prepare_qk(launcher: &Launcher, call: &PrepareQk<'_>) -> Result<()> {
    let mut params = PrepareQkParams::default();
    let kept = call.mask.map(|mask| metadata::mask_bits(launcher, mask)).transpose()?;
    if let Some(kept) = &kept {
        // Fits: tokens are counted in an i32.
        (params.kept_bits, params.mask_words) = (kept.buffer.address(), kept.row_words as i32);
    }
    let Some(head_dim) = call.segments.first().and_then(|first| first.q.layout().shape().last().copied()) else {
        return Ok(());
    };
    let is_wide = head_dim > CHUNK * MAX_LANES;
    let lanes = head_dim.div_ceil(CHUNK).next_power_of_two().min(MAX_LANES);
    let heads_at_once = PREPARED_HEADS as usize / if is_wide { 2 } else { 1 };
    let (mut count, mut blocks, mut most_heads, mut lanes_of_all) = (0, 0, 0, 0);
    let mut all_of_words = !is_wide;
    for segment in &call.segments {
        for side in Side::of(segment) {
            let Some((rows, is_of_words)) = side.rows(launcher, segment)? else { continue };
            // At most q and k of each segment: checked by problem.
            let Some(place) = params.tensors.get_mut(count) else { continue };
            // Fits, since the tensors are in memory: a block takes many rows of them.
            *place = PreparedRows { first_block: blocks as i32, ..rows };
            let (tokens, heads) = (rows.rows as usize, rows.heads as usize);
            blocks += tokens.div_ceil(ROW_COPY_THREADS as usize / lanes);
            all_of_words &= is_of_words;
            most_heads = most_heads.max(heads);
            lanes_of_all += tokens * lanes * heads.div_ceil(heads_at_once);
            count += 1;
        }
    }
    if blocks == 0 {
        return Ok(());
    }
    // A block takes all heads of its tokens, unless multiprocessors would be idle.
    let enough = launcher.multiprocessors * LANES_OF_MULTIPROCESSOR;
    let turns = most_heads.div_ceil(heads_at_once);
    let heads_of_block = heads_at_once * (lanes_of_all / enough).clamp(turns.div_ceil(MAX_GRID), turns);
    // All fit: there are few.
    (params.count, params.head_dim, params.lanes) = (count as i32, head_dim as i32, lanes as i32);
    (params.heads_of_block, params.inverse_head_dim) = (heads_of_block as i32, 1.0 / head_dim as f32);
    let grid = [blocks as u32, most_heads.div_ceil(heads_of_block) as u32, 1];
    let form = match (is_wide, all_of_words) {
        (true, _) => PrepareForm::Wide,
        (false, true) => PrepareForm::Words,
        (false, false) => PrepareForm::Narrow,
    };
    let function = launcher.function(Entry::PrepareQk { dtype: call.dtype, form })?;
    // SAFETY: the tensors have the segment's shape and lie inside their buffers, tables and weights
    // too, the mask has the tokens of all segments, and no output shares memory with another tensor
    // but with what it replaces (all checked by problem). Elements lie at multiples of their size
    // (checked by `Operand`), words at multiples of 16 bytes.
    unsafe { launcher.launch(function, grid, ROW_COPY_THREADS, &params) }
}

/// q or k of a segment.
struct Side<'a, 's> {
    rows: &'s Rows<'a>,
    weight: Option<&'s Input<'a>>,
    /// What errors call input, output and weight.
    names: [&'static str; 3],
}

impl<'a, 's> Side<'a, 's> {
    fn of(segment: &'s PrepareSegment<'a>) -> [Self; 2] {
        let PrepareSegment { names, q, k, norm, .. } = segment;
        let [q_weight, k_weight] = match norm {
            None => [None, None],
            Some(HeadNorm { weights, .. }) => weights.each_ref().map(Some),
        };
        [
            Self { rows: q, weight: q_weight, names: [names.q, names.q_out, names.q_weight] },
            Self { rows: k, weight: k_weight, names: [names.k, names.k_out, names.k_weight] },
        ]
    }

    /// What the kernel is told, without the blocks before, and whether that is [`PrepareForm::Words`];
    /// nothing if there are no rows.
    fn rows(&self, launcher: &Launcher, segment: &PrepareSegment<'_>) -> Result<Option<(PreparedRows, bool)>> {
        let [input_name, output_name, weight_name] = self.names;
        let (from, to) = match self.rows {
            Rows::InPlace(rows) => {
                let rows = Operand::output(launcher, input_name, rows)?;
                (rows, rows)
            }
            Rows::Copied(from, to) => {
                (Operand::input(launcher, input_name, from)?, Operand::output(launcher, output_name, to)?)
            }
        };
        let &[batch, seq, heads, head_dim] = to.layout.shape() else { return Ok(None) };
        if to.layout.numel() == 0 {
            return Ok(None);
        }
        let input = |name, input: &Input<'_>| Ok((Operand::input(launcher, name, input)?.address(), input.dtype));
        let is_f32 = |dtype: DType| i32::from(dtype == DType::F32);
        let mut rows = PreparedRows::default();
        let mut is_of_words = true;
        if let Some(weight) = self.weight {
            let (address, dtype) = input(weight_name, weight)?;
            (rows.weight, rows.weight_is_f32) = (address, is_f32(dtype));
            is_of_words &= weight.layout.numel().is_multiple_of(CHUNK) && address.is_multiple_of(WORD_BYTES);
        }
        if let Some(HeadRotary { cos, sin, pairing }) = &segment.rotary {
            let (address, dtype) = input(segment.names.cos, cos)?;
            (rows.cos, rows.table_is_f32) = (address, is_f32(dtype));
            (rows.sin, _) = input(segment.names.sin, sin)?;
            let [cos_strides, sin_strides] = [cos, sin].map(|table| table_strides(&table.layout));
            (rows.cos_batch_stride, rows.cos_token_stride) = cos_strides;
            (rows.sin_batch_stride, rows.sin_token_stride) = sin_strides;
            // Fits: a head has few elements.
            rows.half = cos.layout.shape().last().map_or(0, |&half| half as i32);
            let has_words = |address: u64, (batch, token): (i64, i64)| {
                let bytes = |stride: i64| stride * dtype.size() as i64;
                address.is_multiple_of(WORD_BYTES) && (bytes(batch) | bytes(token)) % WORD_BYTES as i64 == 0
            };
            is_of_words &= has_words(rows.cos, cos_strides) && has_words(rows.sin, sin_strides);
            // Pairs of halves then lie in whole chunks.
            is_of_words &= 2 * rows.half as usize == head_dim && (rows.half as usize).is_multiple_of(CHUNK);
            rows.is_interleaved = i32::from(*pairing == RotaryPairing::Interleaved);
        }
        let has_words = |operand: &Operand<'_>| {
            let Operand { buffer, layout, dtype, .. } = operand;
            has_filled_heads(layout) && misaligned_by(buffer.address(), layout, dtype.size()).is_none()
        };
        let has_words = has_words(&from) && has_words(&to);
        let rows = PreparedRows {
            from: from.address(),
            to: to.address(),
            from_strides: strides(&from.layout),
            to_strides: strides(&to.layout),
            // All fit: tokens and heads are counted in an i32.
            rows: (batch * seq) as i32,
            seq: seq as i32,
            heads: heads as i32,
            first_token: segment.first_token as i32,
            eps: segment.norm.as_ref().map_or(0.0, |norm| norm.eps),
            has_words: i32::from(has_words),
            ..rows
        };
        Ok(Some((rows, has_words && is_of_words)))
    }
}

/// Of batch row and token.
fn table_strides(table: &crate::layout::Layout) -> (i64, i64) {
    // Both fit: layouts end below an eighth of the range.
    match *table.strides() {
        [batch, token, _] => (batch as i64, token as i64),
        _ => (0, 0),
    }
}

const _: () = assert!(MAX_PREPARED_TENSORS == 2 * crate::call::segments::MAX_SEGMENTS);
