//! What one thread holds of a call: a query tile and a key tile, gathered from tensors of any element type and strides, and
//! the output of the query tile until it is written.

use std::ops::Range;

use super::call::{Bias, Call, Task};
use super::host::{self, HostInput};
use super::needed_keys::Tokens;
use super::rows::{ROW_BLOCK, RowElement, from_panel, to_panel};
use super::strip::{KEY_BLOCK, KeyTile, Normalize, Step, Strips, VALUE_BLOCK, panel};
use crate::error::Result;

/// Keys of a tile: few enough that a strip's scores stay in the first-level cache, and the tile's K and V in the second.
pub(super) const KEY_TILE: usize = 128;
/// What gathered rows of K are longer than the head dimension, so that rows do not compete for the same sets of the cache.
const KEY_PAD: usize = 16;
/// Rows of a block of V's columns: one cache line more than a tile's, for the same reason.
const VALUE_STRIDE: usize = KEY_TILE + 2;

/// Buffers for the largest tile of a call. Panels and blocks are as `strip` describes them.
pub(super) struct Tiles {
    q: Vec<f32>,
    acc: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    scores: Vec<f32>,
    bias: Vec<f32>,
    /// Rows of one strip, before they become a panel or after they were one.
    rows: Vec<f32>,
    /// For the conversion of a row.
    converted: Vec<f32>,
    /// For the transposition of a panel.
    interleaved: Vec<f32>,
}

impl Tiles {
    /// For up to `queries` queries and `keys` keys at a time.
    pub fn new<T: RowElement>(call: &Call<'_, T>, queries: usize, keys: usize) -> Result<Self> {
        let dim = call.shape().head_dim;
        let strips = Strips::new(call.arch, queries);
        let (lanes, strip) = (strips.lanes(), strips.widest());
        let padded_keys = keys.next_multiple_of(KEY_BLOCK);
        Ok(Self {
            q: zeros(lanes * dim)?,
            acc: zeros(lanes * dim)?,
            max: zeros(lanes)?,
            sum: zeros(lanes)?,
            keys: zeros(padded_keys * (dim + KEY_PAD))?,
            values: zeros(dim * VALUE_STRIDE)?,
            scores: zeros(padded_keys * strip)?,
            bias: zeros(if call.bias.is_some() { keys * lanes } else { 0 })?,
            rows: zeros(strip * dim.max(keys))?,
            converted: zeros(dim.max(keys))?,
            interleaved: zeros(ROW_BLOCK * dim.max(keys))?,
        })
    }

    /// Gathers the queries of a task, before its first key.
    pub fn start<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task) -> Strips {
        let dim = call.shape().head_dim;
        let strips = Strips::new(call.arch, task.count);
        self.acc[..strips.lanes() * dim].fill(0.0);
        self.max[..strips.lanes()].fill(f32::NEG_INFINITY);
        self.sum[..strips.lanes()].fill(0.0);
        let query = Query::of(call, task);
        let Self { q, rows, converted, interleaved, .. } = self;
        call.arch.dispatch(
            #[inline(always)]
            || {
                for lanes in strips.ranges() {
                    let rows = &mut rows[..lanes.len() * dim];
                    for (lane, row) in lanes.clone().zip(rows.chunks_exact_mut(dim)) {
                        if lane >= task.count {
                            row.fill(0.0);
                            continue;
                        }
                        let (token, head) = query.at(lane);
                        let q = T::widen(call.q.row(&[task.batch, token, head], dim), &mut converted[..dim]);
                        for (to, q) in row.iter_mut().zip(q) {
                            *to = q * call.scale.queries;
                        }
                    }
                    to_panel(rows, dim, &mut q[panel(&lanes, dim)], lanes.len(), interleaved);
                }
            },
        );
        strips
    }

    /// Gathers a tile of the keys that take part, and their values.
    pub fn gather_keys<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task, tile: Range<usize>) {
        let dim = call.shape().head_dim;
        let tokens = call.keys.of(task.batch);
        let (k, v) = (call.k.head(task.batch, task.kv_head), call.v.head(task.batch, task.kv_head));
        let Self { keys, values, converted, .. } = self;
        call.arch.dispatch(
            #[inline(always)]
            || {
                for ((i, key), from) in keys.chunks_exact_mut(dim + KEY_PAD).enumerate().zip(tile) {
                    let token = tokens.at(from);
                    key[..dim].copy_from_slice(T::widen(k.row(token, dim), &mut converted[..dim]));
                    let value = T::widen(v.row(token, dim), &mut converted[..dim]);
                    let columns = values.chunks_exact_mut(VALUE_STRIDE * VALUE_BLOCK);
                    for (column, value) in columns.zip(value.as_chunks::<VALUE_BLOCK>().0) {
                        column.as_chunks_mut::<VALUE_BLOCK>().0[i] = *value;
                    }
                }
            },
        );
    }

    /// Gathers the bias of the task's queries for a tile of keys, if there is one.
    pub fn gather_bias<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task, strips: Strips, tile: Range<usize>) {
        let query = Query::of(call, task);
        match &call.bias {
            None => {}
            Some(Bias::Same(bias)) => self.gather_bias_of(call, bias, &query, strips, tile),
            Some(Bias::F32(bias)) => self.gather_bias_of(call, bias, &query, strips, tile),
        }
    }

    fn gather_bias_of<T: RowElement, E: RowElement>(
        &mut self,
        call: &Call<'_, T>,
        bias: &HostInput<'_, E>,
        query: &Query<'_>,
        strips: Strips,
        tile: Range<usize>,
    ) {
        let len = tile.len();
        let tokens = call.keys.of(query.task.batch);
        let is_contiguous = bias.layout.strides().last() == Some(&1) && tokens.is_range();
        let Self { bias: panels, rows, converted, interleaved, .. } = self;
        call.arch.dispatch(
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
                        if is_contiguous {
                            row.copy_from_slice(E::widen(bias.row(&at(tile.start), len), &mut converted[..len]));
                        } else {
                            for (to, key) in row.iter_mut().zip(tile.clone()) {
                                *to = bias.at(&at(key)).to_f32();
                            }
                        }
                    }
                    to_panel(rows, len, &mut panels[panel(&lanes, len)], lanes.len(), interleaved);
                }
            },
        );
    }

    /// Attention of the query tile to the key tile.
    pub fn step<T: RowElement>(&mut self, call: &Call<'_, T>, strips: Strips, len: usize) {
        let head_dim = call.shape().head_dim;
        call.arch.dispatch(Step {
            strips,
            head_dim,
            q: &self.q,
            acc: &mut self.acc,
            max: &mut self.max,
            sum: &mut self.sum,
            scores: &mut self.scores,
            tile: KeyTile {
                keys: &self.keys,
                key_stride: head_dim + KEY_PAD,
                values: &self.values,
                value_stride: VALUE_STRIDE,
                len,
                bias: call.bias.as_ref().map(|_| &self.bias[..]),
            },
            scale: call.scale.scores,
        });
    }

    /// Writes the output of a task, after its last key.
    pub fn finish<T: RowElement>(&mut self, call: &Call<'_, T>, task: &Task, strips: Strips) {
        let dim = call.shape().head_dim;
        let query = Query::of(call, task);
        let Self { acc, max, sum, rows, interleaved, .. } = self;
        call.arch.dispatch(Normalize { strips, head_dim: dim, acc, sum });
        call.arch.dispatch(
            #[inline(always)]
            || {
                for lanes in strips.ranges() {
                    let rows = &mut rows[..lanes.len() * dim];
                    from_panel(&acc[panel(&lanes, dim)], lanes.len(), rows, dim, interleaved);
                    for (lane, row) in (lanes.start..lanes.end.min(task.count)).zip(rows.chunks_exact(dim)) {
                        let (token, head) = query.at(lane);
                        if call.query_mask.is_none_or(|mask| mask.keeps(task.batch, token)) {
                            // SAFETY: tasks share no queries, rows of the output do not overlap (checked by problem), and rows
                            // of masked queries are not asked for here.
                            let out = unsafe { call.out.row(&[task.batch, token, head], dim) };
                            T::narrow(row, out);
                        }
                    }
                }
            },
        );
        let Some(lse) = &call.lse else { return };
        for (lane, (&max, &sum)) in max.iter().zip(&*sum).enumerate().take(task.count) {
            let (token, head) = query.at(lane);
            // SAFETY: tasks share no queries, and elements of the output do not overlap (checked by problem).
            let lse = unsafe { lse.row(&[head, token], 1) };
            // In f64, so that the sum is rounded once. Without a key it is −∞ + ln 0 = −∞.
            lse.fill((f64::from(max) * f64::from(call.scale.scores) + f64::from(sum).ln()) as f32);
        }
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

fn zeros(len: usize) -> Result<Vec<f32>> {
    let mut values = host::reserve(len)?;
    values.resize(len, 0.0);
    Ok(values)
}
