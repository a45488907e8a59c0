//! Attention by FlashAttention-2's loop (Dao 2023, arXiv:2307.08691): tiles of queries, each of
//! which walks the tiles of its keys once and keeps a running softmax, so that scores never leave
//! the cache.
//!
//! ```text
//!                             keys of the batch row that count, some 100 at a time
//!                           +-------------+-------------+----
//!                           | K, V as f32 |             |            gathered once for all strips
//!                           +------+------+-------------+----
//!   query tile:  +-------+  |      v      |             |
//!   queries of   | strip |  | S = K·Q     |             |
//!   one kv head, +-------+  | P = exp(S-m)|     ->      |  ->  ...  O / l, to the output's rows
//!   tokens times | strip |  | O += V·P    |             |
//!   group heads  +-------+  +-------------+-------------+----
//!
//!   a strip: up to 3 SIMD vectors of queries, one query in a lane (strip.rs)
//! ```
//!
//! A query tile is a task. What is computed for a query depends on that query and its keys alone,
//! so results are the same bit for bit whichever thread computes it, in whichever tile.

use std::cmp::Reverse;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use super::call::{Call, Task};
use super::copy::{self, PackedScratch};
use super::lse;
use super::processor::Processor;
use super::rows::RowElement;
use super::threads::{Team, Threads};
use super::tiles::{Tiles, key_tile};
use crate::call::op::{Attention, Rows};
use crate::call::path::Path;
use crate::call::problem::AttentionShape;
use crate::call::segments::Segmented;
use crate::dtype::DType;
use crate::error::Result;
use crate::host_vec;
use crate::mask::meta::VarlenMeta;

/// Queries of a task, at most, and how many such tasks each worker should have: the more queries,
/// the less often K and V are gathered; the more tasks, the less the others wait for a worker whose
/// core is slow or busy. The last size where no other makes enough.
const QUERY_TILES: [(usize, usize); 4] = [(1008, 8), (432, 8), (144, 4), (48, 0)];
/// Query tiles are multiples of this, which is whole strips for every length of vector.
const QUERY_STEP: usize = 48;
/// Pairs of query and key, times the head dimension, for which it is worth to wake a thread.
const WORK_OF_A_THREAD: usize = 1 << 20;
/// Tokens that a task of zero-filling takes, at least.
const ZERO_TOKENS: usize = 64;

pub(super) fn attend(attention: Attention<'_>, processor: Processor, threads: &Threads) -> Result<()> {
    match attention.rows {
        Rows::Varlen { query, key } if attention.plan.path == Path::Packed => {
            attend_packed(attention, processor, threads, query, key)
        }
        _ => match attention.problem.dtype {
            DType::F32 => Call::<f32>::new(attention, processor)?.run(threads),
            DType::F16 => Call::<f16>::new(attention, processor)?.run(threads),
            DType::Bf16 => Call::<bf16>::new(attention, processor)?.run(threads),
        },
    }
}

/// Pack, attention over the packed rows, scatter. The fused path gathers rows just as well, so
/// this one is only taken when a caller forces it.
fn attend_packed(
    attention: Attention<'_>,
    processor: Processor,
    threads: &Threads,
    query: &VarlenMeta,
    key: &VarlenMeta,
) -> Result<()> {
    let Attention { problem, plan, q, k, v, out, lse, ranges, modifiers, .. } = attention;
    let ranges = ranges.map(|ranges| ranges.of_packed_rows(query, key, false)).transpose()?;
    let ranges = ranges.as_deref();
    let q = PackedScratch::pack(q, query, threads)?;
    let k = PackedScratch::pack(k, key, threads)?;
    let v = PackedScratch::pack(v, key, threads)?;
    let mut packed_out = PackedScratch::like(&q)?;
    let rows = Rows::Packed { query: query.cu_seqlens(), key: key.cu_seqlens() };
    let (q, k, v) = (q.input(), k.input(), v.input());
    let mut packed_lse = lse.as_ref().map(|_| PackedScratch::lse(query, problem.shape.num_heads)).transpose()?;
    let [q, k, v] = [q, k, v].map(Segmented::One);
    let (out_of_rows, lse_of_rows) =
        (Segmented::One(packed_out.output()), packed_lse.as_mut().map(PackedScratch::output));
    let attention = Attention {
        problem,
        plan,
        q,
        k,
        v,
        out: out_of_rows,
        lse: lse_of_rows,
        rows,
        ranges,
        modifiers,
        bias: None,
        arrivals: None,
    };
    attend(attention, processor, threads)?;
    copy::scatter(packed_out.input(), out, query, threads)?;
    if let (Some(packed), Some(padded)) = (packed_lse, lse) {
        lse::scatter(packed.input(), padded, query)?;
    }
    Ok(())
}

impl<T: RowElement> Call<'_, T> {
    fn run(&self, threads: &Threads) -> Result<()> {
        let team = threads.team(self.workers());
        let tasks = self.tasks(team.count())?;
        self.zero_masked_rows(&team);
        let queries = tasks.iter().map(|task| task.count).max().unwrap_or(0);
        let keys = (0..self.shape().batch).map(|b| self.keys.of(b).len()).max().unwrap_or(0);
        // Each worker takes one task after another, the longest ones first, so that none waits for
        // a share that was dealt out before.
        let next = AtomicUsize::new(0);
        let is_left = || next.load(Ordering::Relaxed) < tasks.len();
        let no_memory = OnceLock::new();
        team.run(|| {
            if !is_left() {
                return;
            }
            let mut tiles = match Tiles::new(self, queries, keys.min(key_tile(self))) {
                Ok(tiles) => tiles,
                // The others do the work, if one of them has memory; else the first error is told.
                Err(error) => {
                    let _ = no_memory.set(error);
                    return;
                }
            };
            while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.attend_tile(task, &mut tiles);
            }
        });
        match no_memory.into_inner() {
            Some(error) if is_left() => Err(error),
            _ => Ok(()),
        }
    }

    /// Threads that the call is worth.
    fn workers(&self) -> usize {
        let AttentionShape { batch, num_heads, head_dim, .. } = *self.shape();
        let pairs = (0..batch).map(|b| self.pairs(b)).fold(0, usize::saturating_add).saturating_mul(num_heads);
        pairs.saturating_mul(head_dim) / WORK_OF_A_THREAD
    }

    /// All query tiles, those with the most pairs of query and key first.
    fn tasks(&self, workers: usize) -> Result<Vec<Task>> {
        let AttentionShape { batch, num_kv_heads, .. } = *self.shape();
        let queries = |b| self.queries.of(b).len() * self.shape().group_size();
        let count = |tile| (0..batch).map(|b| queries(b).div_ceil(tile)).sum::<usize>() * num_kv_heads;
        let enough = |&(tile, per_worker): &(usize, usize)| workers == 1 || count(tile) >= workers * per_worker;
        let most = QUERY_TILES.into_iter().find(enough).map_or(QUERY_STEP, |(tile, _)| tile);
        let mut tasks = host_vec::reserve(count(most))?;
        for batch in (0..batch).filter(|&b| queries(b) > 0) {
            let queries = queries(batch);
            // As many tiles as tiles of the largest size would be, but of about the same size.
            let tile = queries.div_ceil(queries.div_ceil(most)).next_multiple_of(QUERY_STEP);
            for first in (0..queries).step_by(tile) {
                let count = tile.min(queries - first);
                let keys = self.needed_keys(batch, &(first..first + count));
                let task = |kv_head| Task { batch, kv_head, first, count, keys: keys.clone() };
                tasks.extend((0..num_kv_heads).map(task));
            }
        }
        // Tasks that share keys stay together. Where each query has its own, those do that share tokens:
        // heads of a token often lie in one page of memory.
        let head_first = !self.queries_differ();
        tasks.sort_unstable_by_key(|task| {
            let of_row = if head_first { [task.kv_head, task.first] } else { [task.first, task.kv_head] };
            (Reverse(task.pairs()), task.batch, of_row)
        });
        Ok(tasks)
    }

    fn zero_masked_rows(&self, team: &Team<'_>) {
        let Some(kept) = self.query_mask.filter(|mask| !mask.is_all_kept()) else { return };
        let AttentionShape { num_heads, head_dim, .. } = *self.shape();
        let (batch, seq) = (kept.batch(), kept.seq());
        let zero_token = |flat: usize| {
            let (b, token) = (flat / seq, flat % seq);
            if kept.keeps(b, token) {
                return;
            }
            let out = self.out.batch_rows(b);
            for h in 0..num_heads {
                // SAFETY: each row is visited once, rows of the output do not overlap (checked by
                // problem), and no task has been started.
                let row = unsafe { out.row(token, h, head_dim) };
                row.fill(T::zeroed());
                self.write_lse([b, h, token], f32::NEG_INFINITY);
            }
        };
        team.for_each(batch * seq, ZERO_TOKENS, zero_token);
    }

    fn attend_tile(&self, task: &Task, tiles: &mut Tiles) {
        let (needed, key_tile) = (&task.keys, key_tile(self));
        let strips = tiles.start(self, task);
        for first in needed.clone().step_by(key_tile) {
            let tile = first..needed.end.min(first + key_tile);
            tiles.gather_keys(self, task, strips, tile.clone());
            tiles.gather_bias(self, task, strips, tile.clone());
            let sees = |tiles: &Tiles, strip: usize| tiles.sees(strip, &tile);
            let working = (0..strips.ranges().count()).filter(|&strip| sees(tiles, strip)).count();
            // A share of the next tile with every strip that works: all of them at once would wait for
            // each other.
            let mut ahead = tile.end..needed.end.min(tile.end + key_tile);
            let share = ahead.len().div_ceil(working.max(1));
            for (strip, lanes) in strips.ranges().enumerate() {
                if !sees(tiles, strip) {
                    continue;
                }
                tiles.prefetch_keys(self, task, ahead.start..ahead.end.min(ahead.start + share));
                ahead.start = ahead.end.min(ahead.start + share);
                tiles.step(self, strips, (strip, lanes), tile.clone());
            }
        }
        tiles.finish(self, task, strips, !needed.is_empty());
    }
}
