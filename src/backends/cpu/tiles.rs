//! What one thread holds of a call: a query tile and a key tile, gathered from tensors of any
//! element type and strides, and the output of the query tile until it is written.

use std::ops::{Deref, DerefMut, Range};

use super::bf16_pairs;
use super::call::{Bias, Call, Task};
use super::host::HostInput;
use super::needed_keys::Tokens;
use super::operands::OneF32;
use super::rows::{RowElement, from_panel, prefetch, to_block, to_panel};
use super::seen_keys::SeenKeys;
use super::softmax::{LOWEST_BIAS, OVERFLOWED};
use super::strip::{KeyTile, NARROW, Normalize, Step, Strips, panel, tile_columns};
use crate::error::Result;
use crate::host_vec;

/// Keys of a tile: few enough that a strip's scores stay in the first-level cache, and the tile's K
/// and V in the second; whole blocks of 6 and of 8 keys.
const KEY_TILE: usize = 120;
/// The same where queries see different keys: their strips are narrower, and a window lies in fewer
/// tiles.
const LONG_KEY_TILE: usize = 2 * KEY_TILE;
/// Rows of a block of V's columns: more than a tile's, so that blocks do not compete for the same
/// sets of the cache.
const VALUE_STRIDE: usize = LONG_KEY_TILE + 2;

/// Words of 2 keys of a block of V's columns.
const PAIR_STRIDE: usize = VALUE_STRIDE / 2;

/// Keys of the tiles of a call.
pub(super) fn key_tile<T: RowElement>(call: &Call<'_, T>) -> usize {
    if call.queries_differ() { LONG_KEY_TILE } else { KEY_TILE }
}

/// Buffers for the largest tile of a call. Panels and blocks are as `strip` describes them.
pub(super) struct Tiles {
    q: Floats,
    acc: Floats,
    max: Floats,
    sum: Floats,
    keys: Floats,
    values: Floats,
    scores: Floats,
    bias: Floats,
    /// Rows of one strip, before they become a panel or after they were one.
    rows: Floats,
    /// For the conversion of a row.
    converted: Floats,
    /// Where the queries need different keys.
    seen: Option<SeenKeys>,
    /// Whether no value of the key tile is NaN or infinite; kept up to date with `seen` alone.
    values_are_finite: bool,
}

impl Tiles {
    /// For up to `queries` queries and `keys` keys at a time.
    pub fn new<T: RowElement>(call: &Call<'_, T>, queries: usize, keys: usize) -> Result<Self> {
        let dim = tile_columns(call.shape().head_dim);
        let strips = Strips::new(call.processor, queries, call.queries_differ());
        let (lanes, strip) = (strips.lanes(), strips.widest());
        let block = strips.block_keys();
        let padded_keys = keys.next_multiple_of(block);
        Ok(Self {
            q: zeros(lanes * dim)?,
            acc: zeros(lanes * dim)?,
            max: zeros(lanes)?,
            sum: zeros(lanes)?,
            keys: zeros(padded_keys * dim)?,
            values: zeros(dim * VALUE_STRIDE)?,
            scores: zeros(padded_keys * strip)?,
            bias: zeros(if call.adds_to_scores() { keys * lanes } else { 0 })?,
            rows: zeros(strip.max(block) * dim.max(keys))?,
            converted: zeros(dim.max(keys))?,
            seen: if call.queries_differ() { Some(SeenKeys::new(lanes, strip)?) } else { None },
            values_are_finite: true,
        })
    }

    /// Gathers the queries of a task, before its first key.
    pub fn start<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task) -> Strips {
        let head_dim = call.shape().head_dim;
        let dim = tile_columns(head_dim);
        let strips = Strips::new(call.processor, task.count, call.queries_differ());
        self.acc[..strips.lanes() * dim].fill(0.0);
        self.max[..strips.lanes()].fill(f32::NEG_INFINITY);
        self.sum[..strips.lanes()].fill(0.0);
        let query = Query::of(call, task);
        let q_rows = call.q.batch_rows(task.batch);
        let q_row = |lane| {
            let (token, head) = query.at(lane);
            q_rows.row(token, head, head_dim)
        };
        (0..task.count).for_each(|lane| prefetch(q_row(lane)));
        if let Some(seen) = &mut self.seen {
            // Bits are counted.
            call.processor.vectorize(
                #[inline(always)]
                || {
                    seen.start(
                        strips,
                        task.count,
                        #[inline(always)]
                        |lane| call.keys_of_query(task.batch, query.at(lane).0),
                    );
                },
            );
        }
        let words = call.words_of_head();
        let Self { q, rows, converted, .. } = self;
        call.processor.vectorize(
            #[inline(always)]
            || {
                for lanes in strips.ranges() {
                    let rows = &mut rows[..lanes.len() * words];
                    for (lane, row) in lanes.clone().zip(rows.chunks_exact_mut(words)) {
                        if lane >= task.count {
                            row.fill(0.0);
                            continue;
                        }
                        if call.pairs.is_some() {
                            let scaled = &mut converted[..dim];
                            T::widen_into(q_row(lane), scaled);
                            scaled.iter_mut().for_each(
                                #[inline(always)]
                                |q| *q *= call.scale.queries,
                            );
                            T::narrow(scaled, bytemuck::cast_slice_mut(row));
                            continue;
                        }
                        let q = widened_row(q_row(lane), &mut converted[..dim]);
                        for (to, q) in row.iter_mut().zip(q) {
                            *to = q * call.scale.queries;
                        }
                    }
                    to_panel(rows, words, &mut q[panel(&lanes, words)], lanes.len());
                }
            },
        );
        strips
    }

    /// Gathers a tile of the keys that take part, and their values.
    pub fn gather_keys<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task, strips: Strips, tile: Range<usize>) {
        if call.pairs.is_some() {
            return self.gather_pairs(call, task, tile);
        }
        let head_dim = call.shape().head_dim;
        let dim = tile_columns(head_dim);
        let tokens = call.keys.of(task.batch);
        let (k, v) = (call.k.batch_rows(task.batch), call.v.batch_rows(task.batch));
        let (block, columns) = (strips.block_keys(), strips.columns(dim));
        let Self { keys, values, rows, converted, seen, values_are_finite, .. } = self;
        *values_are_finite = true;
        let (wide, narrow) = values.split_at_mut(columns.wide_columns() * VALUE_STRIDE);
        call.processor.vectorize(
            #[inline(always)]
            || {
                let blocks = keys.chunks_exact_mut(block * dim).zip(tile.clone().step_by(block));
                for (keys, first) in blocks {
                    // Places that are left over hold the tile's last key again; its scores there
                    // are not used.
                    let key = |n: usize| k.row(tokens.at((first + n).min(tile.end - 1)), task.kv_head, head_dim);
                    if block == 8 {
                        to_block::<8>(widened(key, rows, dim), keys);
                    } else {
                        to_block::<6>(widened(key, rows, dim), keys);
                    }
                }
                for (i, from) in tile.enumerate() {
                    let value = v.row(tokens.at(from), task.kv_head, head_dim);
                    let value = widened_row(value, &mut converted[..dim]);
                    *values_are_finite &= seen.is_none() || are_finite(value);
                    let (wide_values, narrow_values) = value.split_at(columns.wide_columns());
                    if block == 8 {
                        to_blocks::<8, VALUE_STRIDE>(wide_values, wide, i);
                    } else {
                        to_blocks::<6, VALUE_STRIDE>(wide_values, wide, i);
                        to_blocks::<NARROW, VALUE_STRIDE>(narrow_values, narrow, i);
                    }
                }
            },
        );
    }

    /// [`gather_keys`](Self::gather_keys) where a word is a pair of elements.
    fn gather_pairs<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task, tile: Range<usize>) {
        /// Keys and columns of a block, of every processor that has such products.
        const BLOCK: usize = 8;
        let dim = call.shape().head_dim;
        let tokens = call.keys.of(task.batch);
        let (k, v) = (call.k.batch_rows(task.batch), call.v.batch_rows(task.batch));
        let Self { keys, values, rows, converted, seen, values_are_finite, .. } = self;
        *values_are_finite = true;
        call.processor.vectorize(
            #[inline(always)]
            || {
                let blocks = keys.chunks_exact_mut(BLOCK * dim / 2).zip(tile.clone().step_by(BLOCK));
                for (keys, first) in blocks {
                    let mut scratch = rows.chunks_exact_mut(dim / 2);
                    let rows: [&[f32]; BLOCK] = std::array::from_fn(
                        #[inline(always)]
                        |n| {
                            let key = tokens.at((first + n).min(tile.end - 1));
                            bf16_pairs::words(k.row(key, task.kv_head, dim), scratch.next().unwrap_or_default())
                        },
                    );
                    to_block::<BLOCK>(rows, keys);
                }
                let pair = &mut converted[..dim];
                for (i, low) in tile.clone().step_by(2).enumerate() {
                    let value = |key| v.row(tokens.at(key), task.kv_head, dim);
                    if low + 1 < tile.end {
                        bf16_pairs::joined(value(low), value(low + 1), pair);
                    } else {
                        bf16_pairs::alone(value(low), pair);
                    }
                    *values_are_finite &= seen.is_none() || bf16_pairs::are_finite(pair);
                    to_blocks::<BLOCK, PAIR_STRIDE>(pair, values, i);
                }
            },
        );
    }

    /// Fetches the rows of a tile of keys and of their values to the cache, while another tile is
    /// computed.
    pub fn prefetch_keys<T: RowElement>(&self, call: &Call<'_, T>, task: &Task, tile: Range<usize>) {
        let dim = call.shape().head_dim;
        let tokens = call.keys.of(task.batch);
        let (k, v) = (call.k.batch_rows(task.batch), call.v.batch_rows(task.batch));
        for key in tile {
            prefetch(k.row(tokens.at(key), task.kv_head, dim));
            prefetch(v.row(tokens.at(key), task.kv_head, dim));
        }
    }

    /// Gathers what is added to the scores of the task's queries and a tile of keys, if anything is: the bias and ALiBi.
    pub fn gather_bias<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task, strips: Strips, tile: Range<usize>) {
        let query = Query::of(call, task);
        match &call.bias {
            None if call.slopes.is_none() => {}
            None => self.gather_bias_of::<T, f32>(call, None, &query, strips, tile),
            Some(Bias::Same(bias)) => self.gather_bias_of(call, Some(bias), &query, strips, tile),
            Some(Bias::F32(bias)) => self.gather_bias_of(call, Some(bias), &query, strips, tile),
        }
    }

    fn gather_bias_of<T: RowElement, E: RowElement>(
        &mut self,
        call: &Call<'_, T>,
        bias: Option<&HostInput<'_, E>>,
        query: &Query<'_>,
        strips: Strips,
        tile: Range<usize>,
    ) {
        let len = tile.len();
        let tokens = call.keys.of(query.task.batch);
        let is_contiguous = bias.is_some_and(|bias| bias.layout.strides().last() == Some(&1)) && tokens.is_range();
        let level = call.level(query.task.batch);
        let Self { bias: panels, rows, converted, .. } = self;
        call.processor.vectorize(
            #[inline(always)]
            || {
                for lanes in strips.ranges() {
                    let rows = &mut rows[..lanes.len() * len];
                    for (lane, row) in lanes.clone().zip(rows.chunks_exact_mut(len)) {
                        if lane >= query.task.count {
                            row.fill(0.0);
                            continue;
                        }
                        let (token, head) = query.at(lane);
                        let at = |key| [query.task.batch, head, token, tokens.at(key)];
                        let Some(bias) = bias else {
                            row.fill(0.0);
                            add_alibi(
                                call.slopes,
                                head,
                                row,
                                token as i64 + level,
                                tile.clone().map(|key| tokens.at(key)),
                            );
                            continue;
                        };
                        if is_contiguous {
                            row.copy_from_slice(E::widen(bias.row(&at(tile.start), len), &mut converted[..len]));
                        } else {
                            for (to, key) in row.iter_mut().zip(tile.clone()) {
                                *to = bias.at(&at(key)).to_f32();
                            }
                        }
                        add_alibi(call.slopes, head, row, token as i64 + level, tile.clone().map(|key| tokens.at(key)));
                    }
                    to_panel(rows, len, &mut panels[panel(&lanes, len)], lanes.len());
                }
            },
        );
    }

    /// Whether a strip, by its number, has a query that sees a key of a tile.
    pub fn sees(&self, strip: usize, tile: &Range<usize>) -> bool {
        self.seen.as_ref().is_none_or(|seen| seen.strip_sees(strip, tile))
    }

    /// Attention of a strip of the query tile, with its number, to the key tile.
    pub fn step<T: RowElement>(
        &mut self,
        call: &Call<'_, T>,
        strips: Strips,
        (strip, lanes): (usize, Range<usize>),
        tile: Range<usize>,
    ) {
        let head_dim = tile_columns(call.shape().head_dim);
        let (part, seen) = match &mut self.seen {
            None => (0..tile.len(), None),
            Some(seen) => match seen.of_strip(strip, &lanes, &tile, strips.block_keys()) {
                None => return,
                Some(part_and_limits) => part_and_limits,
            },
        };
        let tile = KeyTile {
            keys: &self.keys,
            values: &self.values,
            value_stride: if call.pairs.is_some() { PAIR_STRIDE } else { VALUE_STRIDE },
            len: tile.len(),
            part,
            bias: call.adds_to_scores().then_some(&self.bias[..]),
            seen,
            values_are_finite: self.values_are_finite,
        };
        let step = Step {
            columns: strips.columns(head_dim),
            lanes,
            head_dim,
            q: &self.q,
            acc: &mut self.acc,
            max: &mut self.max,
            sum: &mut self.sum,
            scores: &mut self.scores,
            tile,
            scale: call.scale.scores,
            softcap: call.softcap,
        };
        match call.pairs {
            None => call.processor.dispatch((OneF32, step)),
            Some(pairs) => pairs.dispatch((pairs, step)),
        }
    }

    /// Writes the output of a task, after its last key, if it has any.
    pub fn finish<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task, strips: Strips, has_keys: bool) {
        let head_dim = call.shape().head_dim;
        let dim = tile_columns(head_dim);
        self.spread_overflow(has_keys, call.adds_to_scores());
        let query = Query::of(call, task);
        self.add_sinks(call, strips, task.count, |lane| query.at(lane).1);
        let out = call.out.batch_rows(task.batch);
        let Self { acc, max, sum, rows, .. } = self;
        call.processor.dispatch(Normalize { strips, head_dim: dim, acc, sum });
        call.processor.vectorize(
            #[inline(always)]
            || {
                for lanes in strips.ranges() {
                    let rows = &mut rows[..lanes.len() * dim];
                    from_panel(&acc[panel(&lanes, dim)], lanes.len(), rows, dim);
                    for (lane, row) in (lanes.start..lanes.end.min(task.count)).zip(rows.chunks_exact(dim)) {
                        let (token, head) = query.at(lane);
                        if call.query_mask.is_none_or(|mask| mask.keeps(task.batch, token)) {
                            // SAFETY: tasks share no queries, rows of the output do not overlap
                            // (checked by problem), and rows of masked queries are not asked for
                            // here.
                            let out = unsafe { out.row(token, head, head_dim) };
                            T::narrow(&row[..head_dim], out);
                        }
                    }
                }
            },
        );
        if !call.has_lse() {
            return;
        }
        // Where there is a bias, it and the scale are in the scores already.
        let scale = f64::from(call.scale_of_max());
        for (lane, (&max, &sum)) in max.iter().zip(sum.iter()).enumerate().take(task.count) {
            let (token, head) = query.at(lane);
            if call.query_mask.is_none_or(|mask| mask.keeps(task.batch, token)) {
                // In f64, so that the sum is rounded once. Without a key it is −∞ + ln 0 = −∞.
                let lse = (f64::from(max) * scale + f64::from(sum).ln()) as f32;
                call.write_lse([task.batch, head, token], lse);
            }
        }
    }

    /// Adds the sinks' weights to the sums of `count` queries, each of a head.
    fn add_sinks<T: RowElement>(
        &mut self,
        call: &Call<'_, T>,
        strips: Strips,
        count: usize,
        head: impl Fn(usize) -> usize,
    ) {
        let Some(sinks) = call.sinks else { return };
        let (dim, scale) = (tile_columns(call.shape().head_dim), f64::from(call.scale_of_max()));
        for lanes in strips.ranges() {
            let acc = &mut self.acc[panel(&lanes, dim)];
            for lane in lanes.start..lanes.end.min(count) {
                let (max, sum) = (&mut self.max[lane], &mut self.sum[lane]);
                let above = f64::from(sinks[head(lane)]) - f64::from(*max) * scale;
                if above <= 0.0 {
                    *sum = (f64::from(*sum) + above.exp()) as f32;
                } else if above > 0.0 {
                    // The sink is the largest score now. Without another one, nothing was added up.
                    let factor = (-above).exp() as f32;
                    for acc in acc.iter_mut().skip(lane - lanes.start).step_by(lanes.len()) {
                        *acc = if factor == 0.0 { 0.0 } else { *acc * factor };
                    }
                    *max = (f64::from(sinks[head(lane)]) / scale) as f32;
                    *sum = *sum * factor + 1.0;
                }
            }
        }
    }

    /// Makes rows NaN all of whose kept scores are below every f32. The sum of weights says so: the
    /// largest score has weight 1 if it is a number, so a sum of 0 is one of −∞ alone. With a bias,
    /// those are the rows that it hides, and overflow is a number of its own.
    fn spread_overflow(&mut self, has_keys: bool, has_bias: bool) {
        for (lane, (&max, sum)) in self.max.iter().zip(self.sum.iter_mut()).enumerate() {
            let sees_keys = || has_keys && self.seen.as_ref().is_none_or(|seen| seen.sees_any(lane));
            if if has_bias { max == OVERFLOWED } else { *sum == 0.0 && sees_keys() } {
                *sum = f32::NAN;
            }
        }
    }
}

/// Takes the distance of a query, which is level with the position `level` of the keys, times the
/// slope of its head from a row, which has an element for each of the keys.
#[inline(always)]
fn add_alibi(slopes: Option<&[f32]>, head: usize, row: &mut [f32], level: i64, keys: impl Iterator<Item = usize>) {
    let Some(slopes) = slopes else { return };
    for (to, key) in row.iter_mut().zip(keys) {
        let distance = (level - key as i64).unsigned_abs() as f32;
        let sum = *to + (-slopes[head] * distance).clamp(LOWEST_BIAS, -LOWEST_BIAS);
        // −∞ is a bias that hides the key, and no sum.
        *to = if sum == f32::NEG_INFINITY && *to != sum { f32::MIN } else { sum };
    }
}

/// Finds the queries of a task.
struct Query<'a> {
    task: &'a Task,
    tokens: Tokens<'a>,
    group: usize,
}

impl<'a> Query<'a> {
    fn of<T: RowElement>(call: &'a Call<'_, T>, task: &'a Task) -> Self {
        Self { task, tokens: call.queries.of(task.batch), group: call.shape().group_size() }
    }

    /// Token and head of the query in a lane.
    #[inline(always)]
    fn at(&self, lane: usize) -> (usize, usize) {
        let number = self.task.first + lane;
        (self.tokens.at(number / self.group), self.task.kv_head * self.group + number % self.group)
    }
}

/// Whether no element is NaN or infinite.
#[inline(always)]
fn are_finite(row: &[f32]) -> bool {
    // On bits, since the compiler makes SIMD code of it.
    row.iter().fold(0, |largest, x| largest.max(x.abs().to_bits())) < f32::INFINITY.to_bits()
}

/// A row as f32, as wide as a tile: itself, or converted or copied to `scratch`, which is as wide.
#[inline(always)]
fn widened_row<'a, T: RowElement>(row: &'a [T], scratch: &'a mut [f32]) -> &'a [f32] {
    if row.len() == scratch.len() {
        return T::widen(row, scratch);
    }
    let (columns, rest) = scratch.split_at_mut(row.len());
    T::widen_into(row, columns);
    rest.fill(0.0);
    scratch
}

/// `N` rows as f32; `scratch` holds those that were converted.
#[inline(always)]
fn widened<'a, T: RowElement, const N: usize>(
    row: impl Fn(usize) -> &'a [T],
    scratch: &'a mut [f32],
    dim: usize,
) -> [&'a [f32]; N] {
    let mut scratch = scratch.chunks_exact_mut(dim);
    std::array::from_fn(|n| widened_row(row(n), scratch.next().unwrap_or_default()))
}

/// Row `i` of blocks of `N` columns of the values.
#[inline(always)]
fn to_blocks<const N: usize, const STRIDE: usize>(value: &[f32], blocks: &mut [f32], i: usize) {
    for (block, value) in blocks.chunks_exact_mut(STRIDE * N).zip(value.as_chunks::<N>().0) {
        block.as_chunks_mut::<N>().0[i] = *value;
    }
}

/// Floats that begin with a cache line, so that no vector crosses the border of one.
struct Floats(Vec<Line>);

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

// SAFETY: zeros are a value of an array of floats.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: an array of floats, as long as its alignment, has neither padding nor invalid values.
unsafe impl bytemuck::Pod for Line {}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// `len` zeros, and what fills the last cache line.
fn zeros(len: usize) -> Result<Floats> {
    let count = len.div_ceil(size_of::<Line>() / size_of::<f32>());
    let mut lines = host_vec::reserve(count)?;
    lines.resize(count, Line([0.0; 16]));
    Ok(Floats(lines))
}
