//! The cost model: the time that each path and kernel takes on a GPU, from what the host knows of a call. `plan` chooses by it.
//!
//! ```text
//!   attention   launch + √(busy² + memory² + zeros²): each hides most of the others, but none wholly
//!     busy      items in the order of work, dealt out to the blocks that run at once: the time of the slowest block. With sm80
//!               on CUDA, blocks in the order of launch, each of which starts as soon as one before it has ended
//!     item      a query tile of a head: start and end + keys of a tile · steps (+ more for a tile that is made of groups,
//!               − what the first one has fewer keys, − what warps without queries leave to the others)
//!               heads that share query tiles (`packed_heads`) are an item together; packed rows with keys of other tokens cost more
//!     memory    rows read and written, in the pieces that memory moves / rate
//!     zeros     what one warp writes of the masked rows; with sm80 a part of busy, since the same warps compute
//!   packed      attention + for each copy, launch + rows read and written / rate
//! ```
//!
//! With key ranges a query tile has the key tiles of what its queries see, and the blocks share the items out evenly.
//!
//! Estimates of packed calls are the sums of more parts than others, and err by more: of two choices that are as good by the model,
//! the one that packs loses more where it is wrong. So it is taken only with a lead (`Chip::packed_lead`).
//!
//! The constants are in `chips`. Everything else follows from the runs of the metadata and from the tiles of the kernels, so the
//! model knows of waves that are not full, of tiles that are mostly holes, and of batches that are too small for a GPU.
//! `benches/peers/cost_model.py` has the same formulas, to fit the constants.

use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::DeviceId;
use crate::call::chips::{Chip, TileCost};
use crate::call::packed_heads::Heads;
use crate::call::path::Path;
use crate::call::problem::AttentionProblem;
use crate::call::segments::Cuts;
use crate::error::Result;
use crate::kernel::{BackendKind, Kernel};
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::Run;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::{GROUP_ROWS, VarlenMeta};

/// How a GPU's kernel cuts calls into tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tiling {
    /// Whose tiles they are.
    pub kernel: Kernel,
    /// The largest head dimension that they hold, or that the cost model takes them to be made for, in elements.
    pub width: usize,
    /// Query rows of a block.
    pub rows: usize,
    /// Keys of a step.
    pub keys: usize,
    /// Blocks that share a multiprocessor.
    pub blocks: usize,
    /// Whether several blocks can share the keys of a query tile.
    pub(crate) splits: bool,
    /// The most heads of a launch.
    pub(crate) max_heads: usize,
}

/// A GPU, as the model sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Machine {
    /// Tells the estimates of different devices apart.
    id: DeviceId,
    chip: &'static Chip,
    multiprocessors: usize,
    /// Whether that is only assumed, and the chip any.
    is_assumed: bool,
    /// Of every kernel that runs there, by rising width, the longest of a width first.
    tilings: Vec<(Tiling, TileCost)>,
}

/// The time of one choice, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Choice {
    pub path: Path,
    pub kernel: Kernel,
    /// Keys of its tiles, if it has several.
    pub tile_keys: Option<usize>,
    pub time: f64,
}

/// More parts of a query tile than this would mostly add up one another's sums, and a part has at least this many key tiles. The
/// CUDA backend splits by these.
pub(crate) const MAX_PARTS: usize = 8;
pub(crate) const MIN_PART_STEPS: usize = 2;
/// What parts of a query tile cost beside their steps: counting them, each one's sums, and adding those up.
const SPLIT: f64 = 2000.0;
const PART: f64 = 2900.0;
const ADDED_PART: f64 = 1450.0;
/// Parts are computed by a slower softmax.
const PART_TIME: f64 = 1.125;

/// Kernels that work by tile lists compute the scores of a query tile's first key tile for a multiple of as many keys.
const FIRST_KEYS: usize = 64;
/// Where chance places blocks, as many multiprocessors are expected to have those that are taken to be somewhere.
const EXPECTED: f64 = 0.5;
/// Of a call of few batch rows, blocks that compute and those that write zeros take turns so often.
const TURNS: usize = 8;
/// Rows of a warp that computes with sm80, and of a warpgroup of kernels that work by tile lists.
const WARP_ROWS: usize = 32;
const WARPGROUP_ROWS: usize = 64;
/// Bytes that memory moves at once.
const SECTORS: usize = 64;

/// Bytes that a warp writes at once.
const PIECE: f64 = 512.0;
/// Rows of zeros that are enough work for a block: of those that packed rows leave, and of those that no group covers. The CUDA
/// backend launches by these.
pub(crate) const ZEROED_ROWS: usize = 64;
pub(crate) const ZERO_SPAN_ROWS: usize = 64;

/// What a GPU through wgpu is taken to have: an H200's, as `Chip::of_adapter`. A GPU with fewer has less memory bandwidth too, so
/// steps and copies grow alike.
const ASSUMED_MULTIPROCESSORS: usize = 132;

/// Choices of one kind of call that are kept.
const CAPACITY: usize = 16;

/// Which call the choices are of: the key's metadata, the ranges, heads, kv heads, head dimension.
type CallKey = (u64, Option<u64>, [usize; 3]);

/// Which call on packed rows the choices are of: the key's sequences, heads, kv heads, head dimension.
type RowsKey = (CuSeqlens, [usize; 3]);

/// Kept with the query's metadata, or its sequences.
#[derive(Debug)]
struct Known<K>(Mutex<Vec<(K, Arc<[Choice]>)>>);

impl<K> Default for Known<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K> Known<K> {
    /// The choices of the call that `is_call` knows, or those that are made now.
    fn get_or_make(
        &self,
        is_call: impl Fn(&K) -> bool,
        make: impl FnOnce() -> Result<(K, Vec<Choice>)>,
    ) -> Result<Arc<[Choice]>> {
        // A panic leaves the entries as they were: they are only pushed whole.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, choices)) = known.iter().find(|(of, _)| is_call(of)) {
            return Ok(Arc::clone(choices));
        }
        let (call, choices) = make()?;
        let choices: Arc<[Choice]> = choices.into();
        if known.len() >= CAPACITY {
            known.remove(0);
        }
        known.push((call, Arc::clone(&choices)));
        Ok(choices)
    }
}

impl Machine {
    /// A GPU of a compute capability. `None` if the chip is unknown. Tilings whose costs are unknown are left out.
    pub fn new(
        compute_capability: (i32, i32),
        multiprocessors: usize,
        tilings: impl IntoIterator<Item = Tiling>,
    ) -> Option<Self> {
        Some(Self::of_chip(Chip::of(compute_capability)?, multiprocessors.max(1), tilings))
    }

    /// A GPU that tells neither what it is nor how many multiprocessors it has: through wgpu.
    pub fn of_adapter(tilings: impl IntoIterator<Item = Tiling>) -> Self {
        Self { is_assumed: true, ..Self::of_chip(Chip::of_adapter(), ASSUMED_MULTIPROCESSORS, tilings) }
    }

    fn of_chip(chip: &'static Chip, multiprocessors: usize, tilings: impl IntoIterator<Item = Tiling>) -> Self {
        let cost = |tiling: Tiling| Some((tiling, chip.tile_cost(tiling.kernel, tiling.width, tiling.keys)?));
        let mut tilings: Vec<_> = tilings.into_iter().filter_map(cost).collect();
        tilings.sort_by_key(|(tiling, _)| (tiling.width, std::cmp::Reverse(tiling.keys)));
        Self { id: DeviceId::unique(), chip, multiprocessors, is_assumed: false, tilings }
    }

    /// What the model reckons with.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Whether the model only assumes what GPU it is.
    pub fn is_assumed(&self) -> bool {
        self.is_assumed
    }

    /// The narrowest tiles of a kernel that hold a head dimension, and the shorter ones of their width.
    pub fn tilings(&self, kernel: Kernel, head_dim: usize) -> impl Iterator<Item = &(Tiling, TileCost)> {
        let of_kernel = move |&&(tiling, _): &&(Tiling, TileCost)| tiling.kernel == kernel && tiling.width >= head_dim;
        let width = self.tilings.iter().find(of_kernel).map(|(tiling, _)| tiling.width);
        self.tilings.iter().filter(of_kernel).filter(move |(tiling, _)| Some(tiling.width) == width)
    }

    /// The choices of a call under metadata, the quickest first. Kept with the metadata.
    pub fn choices(
        &self,
        problem: &AttentionProblem,
        query: &VarlenMeta,
        key: &VarlenMeta,
        ranges: Option<&KeyRanges>,
    ) -> Result<Arc<[Choice]>> {
        let shape = problem.shape;
        let known = query.copies().get_or_make(self.id, || Ok(Known::<CallKey>::default()))?;
        let call = (key.id(), ranges.map(KeyRanges::id), [shape.num_heads, shape.num_kv_heads, shape.head_dim]);
        let make = || {
            // On other GPUs the dense path is the best of few masks, and by little.
            let with_dense = [Path::Fused, Path::Packed, Path::Dense];
            let paths = if self.is_assumed { &with_dense[..] } else { &with_dense[..2] };
            let listed = ranges.map(|ranges| ranges.of_packed_rows(query, key, false)).transpose()?;
            let tokens = Tokens { metas: Some((query, key)), sequences: Some((query.cu_seqlens(), key.cu_seqlens())) };
            Ok((call, self.estimates(problem, tokens, listed.as_deref(), paths)))
        };
        known.get_or_make(|of| *of == call, make)
    }

    /// The choices of a call in which every token is valid, the quickest first.
    pub fn dense_choices(&self, problem: &AttentionProblem) -> Vec<Choice> {
        self.estimates(problem, Tokens { metas: None, sequences: None }, None, &[Path::Dense])
    }

    /// The choices of a call on rows that are packed already, the quickest first. Kept with the sequences.
    pub fn rows_choices(
        &self,
        problem: &AttentionProblem,
        query: &CuSeqlens,
        key: &CuSeqlens,
    ) -> Result<Arc<[Choice]>> {
        let shape = problem.shape;
        let known = query.copies().get_or_make(self.id, || Ok(Known::<RowsKey>::default()))?;
        let call = [shape.num_heads, shape.num_kv_heads, shape.head_dim];
        let make = || {
            let tokens = Tokens { metas: None, sequences: Some((query, key)) };
            Ok(((key.clone(), call), self.estimates(problem, tokens, None, &[Path::Packed])))
        };
        known.get_or_make(|(of, sizes)| of.is_same(key) && *sizes == call, make)
    }

    fn estimates(
        &self,
        problem: &AttentionProblem,
        tokens: Tokens<'_>,
        ranges: Option<&KeyRanges>,
        paths: &[Path],
    ) -> Vec<Choice> {
        let shape = problem.shape;
        let mut choices = Vec::new();
        for kernel in Kernel::ALL.iter().copied() {
            let tilings = || {
                let fits = |(tiling, _): &&(Tiling, TileCost)| tiling.max_heads >= shape.num_heads;
                // Calls with ranges and segments have one.
                let is_plain = ranges.is_none() && matches!(problem.cuts, Cuts::None);
                self.tilings(kernel, shape.head_dim).filter(fits).take(if is_plain { usize::MAX } else { 1 })
            };
            let Some(longest) = tilings().next() else { continue };
            let has_several = tilings().nth(1).is_some();
            let call = |of, path| {
                let (tiling, cost): &(Tiling, TileCost) = of;
                let call = Call { machine: self, tiling, cost, problem, tokens, ranges, path, packed_heads: 1 };
                Call { packed_heads: call.sharing_heads(), ..call }
            };
            for &path in paths {
                // Work that this many multiprocessors have room for beside the rest takes time on fewer.
                let is_padding = path == Path::Dense && tokens.metas.is_some();
                if is_padding && call(longest, Path::Dense).work() > call(longest, Path::Fused).work() {
                    continue;
                }
                let times = tilings().map(|of| (of.0.keys, call(of, path).time()));
                let Some((keys, time)) = times.min_by(|(_, a), (_, b)| a.total_cmp(b)) else { continue };
                choices.push(Choice { path, kernel, tile_keys: has_several.then_some(keys), time });
            }
        }
        // Times are finite: sums and quotients of positive constants.
        choices.sort_by(|a, b| self.with_lead(a).total_cmp(&self.with_lead(b)));
        choices
    }

    /// What a choice is compared by: its time, and what it must be ahead of others.
    fn with_lead(&self, choice: &Choice) -> f64 {
        choice.time * if choice.path == Path::Packed { self.chip.packed_lead } else { 1.0 }
    }
}

/// What the host knows of the tokens of a call.
#[derive(Debug, Clone, Copy)]
struct Tokens<'a> {
    /// Of padded tensors in which not every token is valid: the query's and the key's.
    metas: Option<(&'a VarlenMeta, &'a VarlenMeta)>,
    /// Of these, and of packed rows: which rows are a batch row's. `None` where every token is valid.
    sequences: Option<(&'a CuSeqlens, &'a CuSeqlens)>,
}

#[cfg(test)]
impl Machine {
    /// A GPU through wgpu, of which nothing is known, with the tiles of `wgsl-portable` at head dimension 128.
    pub fn portable() -> Self {
        let kernel = Kernel::WgslPortable;
        let max_heads = usize::MAX;
        Self::of_adapter([Tiling { kernel, width: 128, rows: 64, keys: 64, blocks: 1, splits: false, max_heads }])
    }
}

/// One choice for one call.
struct Call<'a> {
    machine: &'a Machine,
    tiling: &'a Tiling,
    cost: &'a TileCost,
    problem: &'a AttentionProblem,
    tokens: Tokens<'a>,
    /// Of the valid rows.
    ranges: Option<&'a KeyRanges>,
    path: Path,
    /// Heads that share query tiles.
    packed_heads: usize,
}

/// Items of batch rows that take the same time.
#[derive(Debug, Clone, Copy)]
struct Items {
    count: usize,
    /// Key tiles of each.
    steps: usize,
    /// Their time.
    keys_time: f64,
    /// The share of a query tile's warps, or warpgroups, that have no query.
    idle: f64,
    /// Of the whole item.
    time: f64,
}

/// Blocks of a batch row: how many, and how long each takes.
#[derive(Debug, Clone, Copy)]
struct Launched {
    /// Those of the query tile that has the most zeros to write before it computes, and of the others.
    computing: [(usize, f64); 2],
    /// Those that write zeros alone.
    zeroing: (usize, f64),
}

impl Launched {
    fn computing(&self) -> usize {
        self.computing.iter().map(|&(count, _)| count).sum()
    }
}

impl Call<'_> {
    fn time(&self) -> f64 {
        let chip = self.machine.chip;
        let memory = self.attention_bytes() / chip.memory_rate;
        let is_narrow = self.problem.shape.head_dim < self.tiling.width;
        let width = if is_narrow { chip.narrow } else { 1.0 };
        let rows = self.batch_rows();
        let attention = if self.is_handed_out() {
            self.launch() + (width * self.handed_out(&rows)).hypot(memory)
        } else {
            let items = in_order_of_work(rows);
            let mut busy = width * self.busy(&items);
            let mut zeros = self.zeros(items.iter().map(|items| items.count).sum());
            if !self.by_lists() {
                busy += std::mem::take(&mut zeros);
            }
            self.launch() + busy.hypot(memory).hypot(zeros)
        };
        let copies = self.copies();
        attention
            + copies.launches as f64 * chip.copy_launch
            + copies.bytes / chip.copy_rate
            + copies.zeros / chip.scatter_rate
    }

    /// The time of all items, one after another.
    fn work(&self) -> f64 {
        self.batch_rows().iter().map(|items| items.count as f64 * items.time).sum()
    }

    fn by_lists(&self) -> bool {
        self.tiling.kernel.works_by_tile_lists()
    }

    fn scatters(&self) -> bool {
        let traits = self.tiling.kernel.traits();
        let is_copied = |(query, _): (&VarlenMeta, _)| !(traits.takes_valid_sides_as_rows && query.is_all_valid());
        self.path == Path::Packed && traits.scatters && self.tokens.metas.is_some_and(is_copied)
    }

    /// Whether a GPU hands out a block for each query tile, several to a multiprocessor. Ranges leave blocks as many steps as they
    /// leave, and the sum counts.
    fn is_handed_out(&self) -> bool {
        !self.by_lists() && self.tiling.kernel.backend() == BackendKind::Cuda && self.ranges.is_none()
    }

    fn launch(&self) -> f64 {
        let chip = self.machine.chip;
        let are_packed = self.tokens.metas.is_none() && self.path == Path::Packed;
        match self.by_lists() {
            true if are_packed => chip.lists_launch + chip.rows_launch,
            true => chip.lists_launch,
            false => chip.launch,
        }
    }

    /// Items of every batch row, or of all of them together where they are alike.
    fn batch_rows(&self) -> Vec<Items> {
        let (shape, packed) = (self.problem.shape, self.packed_heads);
        let mut rows = match self.tokens.sequences {
            None => {
                let items = self.batch_row(packed, shape.seq_q, self.whole_keys(shape.seq_k));
                vec![Items { count: items.count * shape.batch, ..items }]
            }
            Some((query, key)) => {
                (0..query.batch()).map(|row| self.valid_row(row, query.rows(row).len(), key.rows(row).len())).collect()
            }
        };
        let count: usize = rows.iter().map(|items| items.count).sum();
        let idle: f64 = rows.iter().map(|items| items.count as f64 * items.idle).sum();
        let chip = self.machine.chip;
        let spared = if self.by_lists() { chip.lists_idle } else { chip.rows_idle };
        let at_work = 1.0 - spared * idle / count.max(1) as f64;
        for items in &mut rows {
            items.time = self.item() + items.keys_time * at_work;
        }
        match self.ranges {
            None => rows,
            Some(ranges) => {
                let of_row = |(row, items)| self.seen_items(items, ranges.row(row));
                rows.into_iter().enumerate().flat_map(of_row).collect()
            }
        }
    }

    /// Items of a batch row with so many valid queries and keys.
    fn valid_row(&self, row: usize, queries: usize, keys: usize) -> Items {
        let (by_lists, packed) = (self.by_lists(), self.packed_heads);
        match (self.path, self.tokens.metas) {
            (Path::Dense, Some((_, key))) if keys > 0 => {
                // Every row; steps of which every key is dropped are passed over.
                let steps = key_steps(key.runs(row), self.tiling.keys);
                self.batch_row(1, self.problem.shape.seq_q, (steps, steps as f64 * self.cost.step))
            }
            (Path::Fused, Some((query, key))) if by_lists => {
                let rows = groups(query.runs(row)) * GROUP_ROWS;
                self.batch_row(packed, rows, self.keys_in_groups(key.runs(row), keys))
            }
            _ if by_lists || keys > 0 => self.batch_row(packed, queries, self.whole_keys(keys)),
            // Blocks of kernels that read single rows end at once if there is no key.
            _ => Items { count: 0, steps: 0, keys_time: 0.0, idle: 0.0, time: 0.0 },
        }
    }

    /// Start and end of an item.
    fn item(&self) -> f64 {
        let chip = self.machine.chip;
        let more = match self.path {
            Path::Fused if self.by_lists() => self.cost.listed,
            _ if self.scatters() => self.cost.scattered,
            _ => 0.0,
        };
        let shared = if self.packed_heads > 1 { chip.shared_heads } else { 0.0 };
        let cross = if self.has_cross_rows() { chip.cross_rows } else { 0.0 };
        self.cost.item + more + shared + cross
    }

    /// Whether a kernel that works by tile lists reads packed rows, and the keys are those of other tokens.
    fn has_cross_rows(&self) -> bool {
        let is_cross = match (self.tokens.metas, self.tokens.sequences) {
            (Some((query, key)), _) => query.id() != key.id(),
            (None, Some((query, key))) => !query.is_same(key),
            (None, None) => false,
        };
        self.by_lists() && self.path == Path::Packed && is_cross
    }

    /// Heads that share query tiles.
    fn sharing_heads(&self) -> usize {
        let can_pack = self.tiling.kernel.traits().packs_heads && self.ranges.is_none();
        if !can_pack || self.problem.shape.group_size() == 1 || !matches!(self.problem.cuts, Cuts::None) {
            return 1;
        }
        let (batch, is_fused) = (self.problem.shape.batch, self.path == Path::Fused);
        let groups = (0..batch).map(|row| match (self.tokens.metas, self.tokens.sequences) {
            (Some((query, _)), _) if is_fused => groups(query.runs(row)),
            (_, Some((query, _))) => query.rows(row).len().div_ceil(GROUP_ROWS),
            (_, None) => self.problem.shape.seq_q.div_ceil(GROUP_ROWS),
        });
        self.heads().share(groups).packed
    }

    fn heads(&self) -> Heads {
        let shape = self.problem.shape;
        Heads {
            count: shape.num_heads,
            group_size: shape.group_size(),
            tile_rows: self.tiling.rows,
            multiprocessors: self.machine.multiprocessors,
        }
    }

    /// The items of a batch row with so many rows of queries, whose keys are so many steps that take so long. So many heads share
    /// query tiles.
    fn batch_row(&self, packed_heads: usize, rows: usize, (steps, keys_time): (usize, f64)) -> Items {
        let count = match packed_heads {
            1 => rows.div_ceil(self.tiling.rows) * self.problem.shape.num_heads,
            packed => self.heads().tiles(packed, [rows.div_ceil(GROUP_ROWS)].into_iter()),
        };
        let (tile, rows) =
            (self.tiling.rows, if packed_heads == 1 { rows } else { rows.next_multiple_of(GROUP_ROWS) * packed_heads });
        let part = if self.by_lists() { WARPGROUP_ROWS } else { WARP_ROWS };
        let at_work = rows.next_multiple_of(part).min(rows.next_multiple_of(tile));
        let idle = 1.0 - at_work as f64 / rows.next_multiple_of(tile).max(1) as f64;
        Items { count, steps, keys_time, idle, time: self.item() + keys_time }
    }

    /// The same with the ranges of the row's queries: each query tile steps over what its queries see.
    fn seen_items(&self, items: Items, ranges: &[[u32; 2]]) -> Vec<Items> {
        let heads = self.problem.shape.num_heads;
        let tiles = items.count.checked_div(heads).unwrap_or(0);
        let step = (items.time - self.item()) / items.steps.max(1) as f64;
        // The first and the last steps are masked.
        let masked = self.cost.masked - self.cost.step;
        let of_tile = |queries: &[[u32; 2]]| {
            let seen = queries.iter().filter(|[first, end]| first < end);
            let (first, end) = seen.fold((u32::MAX, 0), |(a, b), &[first, end]| (a.min(first), b.max(end)));
            let steps = (end.saturating_sub(first) as usize).div_ceil(self.tiling.keys).min(items.steps);
            let time = self.item() + steps as f64 * step + steps.min(2) as f64 * masked;
            Items { count: heads, steps, keys_time: time - self.item(), idle: items.idle, time }
        };
        ranges.chunks(ranges.len().div_ceil(tiles.max(1)).max(1)).take(tiles).map(of_tile).collect()
    }

    /// Steps over keys in a row, or over those that sm80 gathers, and their time.
    fn whole_keys(&self, keys: usize) -> (usize, f64) {
        let steps = keys.div_ceil(self.tiling.keys);
        let step = if self.path == Path::Fused && !self.by_lists() { self.cost.masked } else { self.cost.step };
        (steps, steps as f64 * step - self.spared(keys))
    }

    /// What the first of the tiles of so many keys takes less than the others.
    fn spared(&self, keys: usize) -> f64 {
        let (tile, rest) = (self.tiling.keys, keys % self.tiling.keys);
        let computed = if self.by_lists() { rest.next_multiple_of(FIRST_KEYS).min(tile) } else { rest };
        if rest == 0 { 0.0 } else { (tile - computed) as f64 * self.cost.spared }
    }

    /// Steps over the tiles of runs, and their time.
    fn keys_in_groups(&self, runs: &[Run], keys: usize) -> (usize, f64) {
        let (full, groups) = key_tiles(runs, self.tiling.keys);
        let (in_full, in_groups) = (full * self.tiling.keys, groups * GROUP_ROWS);
        let masked = in_groups.div_ceil(self.tiling.keys);
        let dropped = in_full + in_groups - keys;
        let steps = full as f64 * self.cost.step + masked as f64 * self.cost.masked;
        let time = steps + dropped as f64 * self.cost.dropped - self.spared(in_groups);
        (full + masked, time)
    }

    /// The time of the slowest block. Block b of those that run at once takes items b, b + blocks, ...
    fn busy(&self, items: &[Items]) -> f64 {
        let blocks = self.machine.multiprocessors * self.tiling.blocks;
        if self.ranges.is_some() {
            let all: f64 = items.iter().map(|items| items.count as f64 * items.time).sum();
            let longest = items.iter().map(|items| items.time).fold(0.0, f64::max);
            return longest.max(all / blocks as f64);
        }
        let (mut time, mut before) = (0.0, 0);
        for of_rows in items {
            // The first block takes every item whose number is a multiple of `blocks`, and no block has longer ones.
            let end = before + of_rows.count;
            time += (end.div_ceil(blocks) - before.div_ceil(blocks)) as f64 * of_rows.time;
            before = end;
        }
        let tail = before % blocks;
        match items.last() {
            Some(last) if tail > 0 && self.tiling.splits => time - last.time + self.last_wave(tail, last),
            _ => time,
        }
    }

    /// The blocks of each batch row in the order of launch. A block writes zeros to the masked rows at its tile's place, and then
    /// computes if there are as many valid queries.
    fn launched(&self, rows: &[Items]) -> Vec<Launched> {
        let (shape, chip) = (self.problem.shape, self.machine.chip);
        let (Path::Fused, Some((query, _))) = (self.path, self.tokens.metas) else {
            let computing = |items: &Items| [(items.count, items.time), (0, 0.0)];
            return rows.iter().map(|items| Launched { computing: computing(items), zeroing: (0, 0.0) }).collect();
        };
        let (heads, mut warps) = (shape.num_heads, Vec::new());
        let of_row = |(row, items): (usize, &Items)| {
            let zeros = zeros_of_tiles(query.runs(row), shape.seq_q, self.tiling.rows, &mut warps);
            let (mut most, mut beside, mut alone, mut tiles) = (0, 0, 0, 0);
            let computing = items.count / heads;
            for zeros in zeros {
                if tiles < computing {
                    most = most.max(zeros);
                    beside += zeros;
                } else {
                    alone += zeros;
                }
                tiles += 1;
            }
            let mean = |zeros: usize, tiles: usize| zeros as f64 / tiles.max(1) as f64;
            let time = |zeros: f64| items.time + zeros * chip.zero_beside;
            let worst = if computing > 0 { heads } else { 0 };
            let others = (items.count - worst, time(mean(beside - most, computing.saturating_sub(1))));
            let zeroing = ((tiles - computing) * heads, mean(alone, tiles - computing) * chip.zero_alone);
            Launched { computing: [(worst, time(most as f64)), others], zeroing }
        };
        rows.iter().enumerate().map(of_row).collect()
    }

    /// The time in which the multiprocessors compute blocks in the order of launch, each as soon as there is a place.
    fn handed_out(&self, rows: &[Items]) -> f64 {
        let (multiprocessors, most) = (self.machine.multiprocessors, self.tiling.blocks);
        let launched = self.launched(rows);
        let turns = (TURNS / launched.len().max(1)).max(1);
        let mut places = Places::new(multiprocessors * most);
        let mut zeros_end = 0.0_f64;
        let (mut computing, mut all) = (Vec::with_capacity(launched.len()), 0);
        // Of the first blocks of all multiprocessors, the second ones, ...: how many compute.
        let mut of_levels = vec![0.0; most];
        for row in &launched {
            let here = row.computing() + row.zeroing.0;
            for (level, computing) in of_levels.iter_mut().enumerate() {
                let (first, end) = (level * multiprocessors, (level + 1) * multiprocessors);
                let overlap = (all + here).min(end).saturating_sub(all.max(first));
                *computing += (overlap * row.computing()) as f64 / here.max(1) as f64;
            }
            all += here;
            let turns = if row.computing() > 0 && row.zeroing.0 > 0 { turns } else { 1 };
            for turn in 0..turns {
                let part = |count: usize| count * (turn + 1) / turns - count * turn / turns;
                for (count, time) in row.computing {
                    places.take(part(count), time, |start, count| computing.push((start, start + time, count)));
                }
                let (count, time) = row.zeroing;
                places.take(part(count), time, |start, _| zeros_end = zeros_end.max(start + time));
            }
        }
        // All places are taken until the last block starts.
        let last_start = computing.iter().map(|&(start, ..)| start).fold(0.0, f64::max);
        let running = || computing.iter().filter(|&&(_, end, _)| end > last_start);
        let count: usize = running().map(|&(.., count)| count).sum();
        let (longest, sum) = running().fold((0.0_f64, 0.0), |(longest, sum), &(_, end, count)| {
            (longest.max(end - last_start), sum + (end - last_start) * count as f64)
        });
        let is_mixed = launched.iter().any(|row| row.zeroing.0 > 0);
        let mut sharing = count.div_ceil(multiprocessors).clamp(1, most);
        if is_mixed {
            let crowd = if all > multiprocessors * most { most } else { crowd(&of_levels, multiprocessors) };
            sharing = sharing.max(crowd);
        }
        let evenness = sum / (count as f64 * longest).max(1.0);
        let share = if most == 1 {
            1.0
        } else {
            let others = (sharing - 1) as f64 / (most - 1) as f64;
            self.cost.alone + (1.0 - self.cost.alone) * others * evenness
        };
        zeros_end.max(last_start + longest * share)
    }

    /// The time of a last wave of `tail` items, which leaves blocks idle: they share query tiles.
    fn last_wave(&self, tail: usize, last: &Items) -> f64 {
        let (multiprocessors, blocks) = (self.machine.multiprocessors, self.tiling.blocks);
        let most = (last.steps / MIN_PART_STEPS).clamp(1, MAX_PARTS);
        let in_parts = |parts: usize| {
            let rounds = (tail * parts).div_ceil(multiprocessors * blocks) as f64;
            let part = (self.item() + (last.time - self.item()) / parts as f64) * PART_TIME + PART;
            SPLIT + rounds * part + parts as f64 * ADDED_PART
        };
        (2..=most).map(in_parts).fold(last.time, f64::min)
    }

    /// The time in which the warp with the most masked rows writes them as zeros.
    fn zeros(&self, items: usize) -> f64 {
        let Some((query, _)) = self.tokens.metas else { return 0.0 };
        let (shape, chip) = (self.problem.shape, self.machine.chip);
        let all_rows = shape.batch * shape.seq_q;
        let masked_rows = all_rows - query.total_valid();
        let (heads, masked) = (shape.num_heads as f64, masked_rows as f64);
        // Of a launch by tile lists, if so many blocks have zeros to write: one of a block, beside those that compute.
        let warps = |zero_items: usize| items.max(zero_items).clamp(1, self.machine.multiprocessors) as f64;
        if self.scatters() {
            // Warps take 32 rows at a time, which are masked in runs.
            let taken = (all_rows.div_ceil(32) as f64 / warps(all_rows.div_ceil(ZEROED_ROWS))).ceil() * 32.0;
            let runs: usize = (0..query.batch()).map(|row| query.runs(row).len()).sum();
            let run = masked / runs.max(1) as f64;
            let rows = (taken * masked / all_rows.max(1) as f64).max(run.min(32.0));
            return rows * ((heads * self.row_bytes() / PIECE).ceil() * chip.zero_piece + chip.zero_row);
        }
        match self.path {
            Path::Fused if self.by_lists() => {
                // As many rows of zeros as a warp takes at once.
                let zero_items = (masked_rows * shape.num_heads).div_ceil(ZERO_SPAN_ROWS);
                let warps = warps(zero_items);
                let pieces = heads * masked * self.row_bytes() / (warps * PIECE);
                pieces * chip.zero_piece + zero_items as f64 / warps * chip.zero_span
            }
            Path::Fused => self.zeros_of_rows(),
            _ => 0.0,
        }
    }

    /// The same of kernels that read single rows, whose blocks write the masked rows at the place of their tile.
    fn zeros_of_rows(&self) -> f64 {
        let Some((query, key)) = self.tokens.metas else { return 0.0 };
        let (shape, chip, rows) = (self.problem.shape, self.machine.chip, self.tiling.rows);
        let masked = shape.batch * shape.seq_q - query.total_valid();
        let beside: usize = (0..query.batch())
            .map(|row| {
                let (queries, keys) = (query.cu_seqlens().rows(row).len(), key.cu_seqlens().rows(row).len());
                let end = if keys > 0 { queries.next_multiple_of(rows).min(shape.seq_q) } else { 0 };
                let valid = |run: &Run| run.end().min(end).saturating_sub(run.start as usize);
                end - query.runs(row).iter().map(valid).sum::<usize>()
            })
            .sum();
        let tiles = shape.seq_q.div_ceil(rows);
        let all = (tiles * shape.num_heads * shape.batch) as f64;
        let at_once = (self.machine.multiprocessors * self.tiling.blocks) as f64;
        // Each warp of a block has 32 rows, so warps of a short row's tile have none.
        let of_warps = (tiles * rows) as f64 / shape.seq_q.next_multiple_of(WARP_ROWS) as f64;
        let time = beside as f64 * chip.zero_beside + (masked - beside) as f64 * chip.zero_alone;
        time * shape.num_heads as f64 * of_warps * (all / at_once).max(1.0) / all.max(1.0)
    }

    /// Bytes of a row of one head.
    fn row_bytes(&self) -> f64 {
        (self.problem.shape.head_dim * self.problem.dtype.size()) as f64
    }

    /// Valid and all rows of queries, and of keys.
    fn rows(&self) -> [[f64; 2]; 2] {
        let shape = self.problem.shape;
        let valid = self.tokens.sequences.map(|(query, key)| [query.total(), key.total()]);
        let all = match valid {
            // Packed rows.
            Some(valid) if self.tokens.metas.is_none() => valid,
            _ => [shape.batch * shape.seq_q, shape.batch * shape.seq_k],
        };
        let valid = valid.unwrap_or(all);
        [[valid[0] as f64, all[0] as f64], [valid[1] as f64, all[1] as f64]]
    }

    /// Bytes that the attention kernel reads and writes.
    fn attention_bytes(&self) -> f64 {
        let shape = self.problem.shape;
        let [[queries, all_queries], [keys, _]] = self.rows();
        let is_padded = self.path != Path::Packed || self.scatters();
        let read = if self.path == Path::Dense { all_queries } else { queries };
        let written = if is_padded { all_queries } else { queries };
        let row = shape.head_dim * self.problem.dtype.size();
        // Rows of other lengths share pieces with the rows beside them, which other blocks need.
        let moved = (row + SECTORS - gcd(row, SECTORS)) as f64;
        moved * (shape.num_heads as f64 * (read + written) + 2.0 * shape.num_kv_heads as f64 * keys)
    }

    /// The copies around attention on packed rows.
    fn copies(&self) -> Copies {
        let (Path::Packed, Some((query, key))) = (self.path, self.tokens.metas) else { return Copies::default() };
        let shape = self.problem.shape;
        let traits = self.tiling.kernel.traits();
        let [[queries, all_queries], [keys, all_keys]] = self.rows();
        // A side of padded tensors lies as packed rows do, as a rule.
        let in_place = traits.mixes_padded_and_packed || traits.takes_valid_sides_as_rows;
        let packs = |valid: f64, all: f64| !(in_place && valid == all);
        let (packs_queries, packs_keys) = (packs(queries, all_queries), packs(keys, all_keys));
        let is_self_attention = query.id() == key.id();
        let (heads, kv_heads) = (shape.num_heads as f64, shape.num_kv_heads as f64);
        let (mut launches, mut rows, mut zeros) = (usize::from(packs_queries) + usize::from(packs_keys), 0.0, 0.0);
        if self.tiling.kernel.backend() == BackendKind::Wgpu {
            // Each tensor in a launch of its own, and the log-sum-exp.
            launches += usize::from(packs_keys) + usize::from(self.problem.lse);
        } else if is_self_attention && launches == 2 {
            // All three tensors in one launch.
            launches = 1;
        }
        if packs_queries {
            rows += 2.0 * heads * queries;
        }
        if packs_keys {
            rows += 4.0 * kv_heads * keys;
        }
        if packs_queries && !traits.scatters {
            launches += 1;
            rows += 2.0 * heads * queries;
            zeros += heads * (all_queries - queries);
        }
        Copies { launches, bytes: rows * self.row_bytes(), zeros: zeros * self.row_bytes() }
    }
}

/// Launches, bytes that they read and write, and bytes of zeros.
#[derive(Debug, Clone, Copy, Default)]
struct Copies {
    launches: usize,
    bytes: f64,
    zeros: f64,
}

/// Places of multiprocessors by the time from which on they are free, the first ones last.
struct Places(Vec<(f64, usize)>);

impl Places {
    fn new(count: usize) -> Self {
        Self(vec![(0.0, count)])
    }

    /// Gives places to so many blocks that take so long, and tells when so many of them start.
    fn take(&mut self, mut count: usize, time: f64, mut starts: impl FnMut(f64, usize)) {
        while count > 0 {
            // There is always a place: those that are taken come back.
            let Some((start, free)) = self.0.pop() else { return };
            let taken = free.min(count);
            if taken < free {
                self.0.push((start, free - taken));
            }
            let at = self.0.partition_point(|&(other, _)| other > start + time);
            self.0.insert(at, (start + time, taken));
            starts(start, taken);
            count -= taken;
        }
    }
}

/// The most computing blocks of some multiprocessor, where so many of the first blocks of all multiprocessors compute, of the second
/// ones, and so on, and chance decides which.
fn crowd(of_levels: &[f64], multiprocessors: usize) -> usize {
    // The chances of a multiprocessor to have none, one, two, ...
    let mut chances = vec![1.0];
    for computing in of_levels {
        let part = computing / multiprocessors as f64;
        chances.push(0.0);
        for count in (0..chances.len()).rev() {
            let one_less = if count > 0 { chances[count - 1] * part } else { 0.0 };
            chances[count] = chances[count] * (1.0 - part) + one_less;
        }
    }
    let expected = |most: usize| multiprocessors as f64 * chances[most..].iter().sum::<f64>();
    (1..chances.len()).rev().find(|&most| expected(most) >= EXPECTED).unwrap_or(1)
}

/// Items of the batch rows that have some, those with the most keys first.
fn in_order_of_work(mut rows: Vec<Items>) -> Vec<Items> {
    rows.retain(|items| items.count > 0);
    rows.sort_by_key(|items| std::cmp::Reverse(items.steps));
    rows
}

/// The greatest common divisor.
fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Steps of `keys` neighbours of a batch row that have a valid key.
fn key_steps(runs: &[Run], keys: usize) -> usize {
    let (mut steps, mut next) = (0, 0);
    for run in runs {
        let (first, end) = ((run.start as usize / keys).max(next), run.end().div_ceil(keys));
        steps += end.saturating_sub(first);
        next = next.max(end);
    }
    steps
}

/// For each tile of a batch row, the masked rows of the warp that has the most of them, as if all warps had as many. `warps` is
/// scratch.
fn zeros_of_tiles(runs: &[Run], seq: usize, tile_rows: usize, warps: &mut Vec<usize>) -> impl Iterator<Item = usize> {
    warps.clear();
    warps.extend((0..seq).step_by(WARP_ROWS).map(|first| (seq - first).min(WARP_ROWS)));
    for run in runs {
        let (start, end) = (run.start as usize, run.end());
        let of_warps = (0..).step_by(WARP_ROWS).zip(warps.iter_mut());
        for (first, masked) in of_warps.take(end.div_ceil(WARP_ROWS)).skip(start / WARP_ROWS) {
            *masked -= end.min(first + WARP_ROWS) - start.max(first);
        }
    }
    let each = tile_rows.div_ceil(WARP_ROWS);
    warps.chunks(each).map(move |warps| each * warps.iter().copied().max().unwrap_or(0))
}

/// Groups that cover the runs of a batch row, from the left.
pub(crate) fn groups(runs: &[Run]) -> usize {
    key_tiles(runs, usize::MAX).1
}

/// Tiles of `keys` valid keys in a row, and groups of the other tiles, that cover the runs of a batch row from the left: as
/// `kernels/attention/tile_lists.cuh` says.
pub(crate) fn key_tiles(runs: &[Run], keys: usize) -> (usize, usize) {
    let (mut tiles, mut groups, mut covered) = (0, 0, 0);
    for run in runs {
        let start = covered.max(run.start as usize);
        let Some(left) = run.end().checked_sub(start).filter(|&left| left > 0) else { continue };
        let (whole, rest) = (left / keys, (left % keys).div_ceil(GROUP_ROWS));
        tiles += whole;
        groups += rest;
        covered = start + whole * keys + rest * GROUP_ROWS;
    }
    (tiles, groups)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a row may have one run")]
mod tests {
    use crate::call::segments::Cuts;
    use std::ops::Range;

    use super::*;
    use crate::call::problem::AttentionShape;
    use crate::dtype::DType;
    use crate::mask::key_mask::KeyMask;

    /// The tiles of sm80 and sm90 at head dimension 128.
    fn tilings() -> [Tiling; 2] {
        let tiling = |kernel, keys, blocks, splits| Tiling {
            kernel,
            width: 128,
            rows: 128,
            keys,
            blocks,
            splits,
            max_heads: 1000,
        };
        [tiling(Kernel::CudaSm80, 64, 2, false), tiling(Kernel::CudaSm90, 160, 1, true)]
    }

    fn machine(multiprocessors: usize) -> Machine {
        let Some(machine) = Machine::new((9, 0), multiprocessors, tilings()) else {
            unreachable!("the H100 has a row")
        };
        machine
    }

    fn problem(batch: usize, seq: usize, heads: usize) -> AttentionProblem {
        let shape =
            AttentionShape { batch, seq_q: seq, seq_k: seq, num_heads: heads, num_kv_heads: heads, head_dim: 128 };
        AttentionProblem { shape, dtype: DType::Bf16, softmax_scale: 1.0, bias: None, cuts: Cuts::None, lse: false }
    }

    fn meta(seq: usize, rows: &[Vec<Range<usize>>]) -> Result<VarlenMeta> {
        VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, rows)?)
    }

    /// Nanoseconds of one choice.
    fn time(machine: &Machine, seq: usize, rows: &[Vec<Range<usize>>], choice: (Path, Kernel)) -> Result<f64> {
        let meta = meta(seq, rows)?;
        let choices = machine.choices(&problem(rows.len(), seq, 24), &meta, &meta, None)?;
        Ok(choices.iter().find(|found| (found.path, found.kernel) == choice).map_or(f64::NAN, |found| found.time))
    }

    const ALL: [(Path, Kernel); 4] = [
        (Path::Fused, Kernel::CudaSm80),
        (Path::Packed, Kernel::CudaSm80),
        (Path::Fused, Kernel::CudaSm90),
        (Path::Packed, Kernel::CudaSm90),
    ];

    #[test]
    fn more_valid_tokens_never_take_less_time() -> Result<()> {
        let machine = machine(132);
        for choice in ALL {
            let mut before = 0.0;
            // Not all: sides that are valid everywhere are not packed by sm80.
            for valid in (64..4096).step_by(64) {
                let now = time(&machine, 4096, &[vec![0..valid], vec![0..4096], vec![4096 - valid..4096]], choice)?;
                // A last wave that is not full may be split, so that a few more items take less.
                assert!(now >= before * 0.97, "{choice:?}, {valid} valid: {now} ns after {before}");
                before = now;
            }
        }
        Ok(())
    }

    #[test]
    fn more_batch_rows_and_fewer_multiprocessors_never_take_less_time() -> Result<()> {
        let rows = |batch: usize| vec![vec![0..1000, 1010..2048]; batch];
        for choice in ALL {
            for batch in 1..20 {
                let [fewer, more] = [batch, batch + 4].map(|batch| time(&machine(132), 2048, &rows(batch), choice));
                assert!(fewer? < more?, "{choice:?}, batch {batch}");
            }
            let [large, small] =
                [132, 66].map(|multiprocessors| time(&machine(multiprocessors), 2048, &rows(8), choice));
            assert!(small? > 1.5 * large?, "{choice:?}");
        }
        Ok(())
    }

    #[test]
    fn holes_cost_the_fused_path_of_tile_lists_alone() -> Result<()> {
        let machine = machine(132);
        let seq = 4096;
        // As many valid tokens: the first half, or every other one.
        let (half, holes) = (vec![0..seq / 2], (0..seq / 2).map(|at| 2 * at..2 * at + 1).collect());
        for choice in ALL {
            let [in_a_row, with_holes] =
                [&half, &holes].map(|row: &Vec<_>| time(&machine, seq, std::slice::from_ref(row), choice));
            let (in_a_row, with_holes) = (in_a_row?, with_holes?);
            if choice == (Path::Fused, Kernel::CudaSm90) {
                assert!(with_holes > 2.0 * in_a_row, "{with_holes} against {in_a_row} ns");
            } else {
                // Where sm90 scatters, one warp may have more rows of zeros than another.
                assert!((with_holes / in_a_row - 1.0).abs() < 0.05, "{choice:?}: {with_holes}, {in_a_row} ns");
            }
        }
        Ok(())
    }

    #[test]
    fn choices_are_kept_with_the_metadata_and_are_of_their_call() -> Result<()> {
        let machine = machine(132);
        let meta = meta(256, &[vec![0..200]])?;
        let of = |heads| machine.choices(&problem(1, 256, heads), &meta, &meta, None);
        let (first, again) = (of(8)?, of(8)?);
        assert!(Arc::ptr_eq(&first, &again));
        assert!(first.is_sorted_by_key(|choice| machine.with_lead(choice)) && first.len() == ALL.len());
        assert!(of(800)?[0].time > first[0].time);
        // Too many heads for a launch: no choice. And a device does not use another one's.
        assert!(of(1001)?.is_empty());
        let other =
            Machine::new((9, 0), 132, tilings()).map(|other| other.choices(&problem(1, 256, 8), &meta, &meta, None));
        assert!(other.is_some_and(|choices| choices.is_ok_and(|choices| !Arc::ptr_eq(&choices, &first))));
        Ok(())
    }

    #[test]
    fn ranges_cost_what_their_queries_see() -> Result<()> {
        let machine = machine(132);
        let of = [2, 8192, 8192];
        let meta = meta(8192, &[vec![0..8192], vec![2000..8192]])?;
        let (causal, window) = (KeyRanges::causal(of)?, KeyRanges::window(of, Some(200), Some(0))?);
        let all = KeyRanges::window(of, None, None)?;
        let [without, all, causal, window] = [None, Some(&all), Some(&causal), Some(&window)]
            .map(|ranges| machine.choices(&problem(2, 8192, 24), &meta, &meta, ranges));
        let (without, all, causal, window) = (without?, all?, causal?, window?);
        for &(path, kernel) in &ALL {
            let [without, all, causal, window] = [&without, &all, &causal, &window].map(|choices| {
                let found = choices.iter().find(|choice| (choice.path, choice.kernel) == (path, kernel));
                found.map_or(f64::NAN, |choice| choice.time)
            });
            assert!((all / without - 1.0).abs() < 0.08, "{path} by {kernel}: {all} of {without} ns");
            assert!((causal / without - 0.54).abs() < 0.08, "{path} by {kernel}: {causal} of {without} ns");
            assert!(window < 0.3 * without, "{path} by {kernel}: {window} of {without} ns");
        }
        Ok(())
    }

    #[test]
    fn estimates_are_near_the_published_figures() -> Result<()> {
        let machine = machine(132);
        let joint = |text: &[usize], padded: usize, image: usize| -> Vec<Vec<Range<usize>>> {
            text.iter().map(|&text| vec![0..text, padded..padded + image]).collect()
        };
        let ragged = [12, 37, 80, 211, 256, 5, 150, 64];
        // docs/performance.md, in µs: fused and packed by sm90, fused and packed by sm80.
        let cases = [
            (4608, joint(&[37], 512, 4096), [309.0, 357.0, 610.0, 680.0]),
            (4352, joint(&ragged, 256, 4096), [2570.0, 2930.0, 5390.0, 5940.0]),
            (1280, joint(&ragged, 256, 1024), [244.0, 347.0, 416.0, 568.0]),
        ];
        for (seq, rows, measured) in cases {
            for (choice, measured) in [ALL[2], ALL[3], ALL[0], ALL[1]].into_iter().zip(measured) {
                let estimate = time(&machine, seq, &rows, choice)? / 1e3;
                assert!((estimate / measured - 1.0).abs() < 0.15, "{choice:?}, {seq}: {estimate:.0} of {measured} µs");
            }
        }
        Ok(())
    }

    #[test]
    fn of_a_gpu_that_is_not_known_every_row_is_computed_where_few_are_masked() -> Result<()> {
        let (kernel, machine) = (Kernel::WgslPortable, Machine::portable());
        let of = |seq, rows: &[Vec<Range<usize>>]| -> Result<[f64; 3]> {
            let times = [Path::Dense, Path::Fused, Path::Packed].map(|path| time(&machine, seq, rows, (path, kernel)));
            let [dense, fused, packed] = times;
            Ok([dense?, fused?, packed?])
        };
        // One token in a hundred: lists cost more than they save.
        let [dense, fused, _] = of(4000, &vec![(0..40).map(|at| at * 100..at * 100 + 99).collect(); 2])?;
        assert!(dense < fused, "{kernel}: dense {dense} ns, fused {fused} ns");
        // Half of the tokens: more work, so no choice even where there is room for it.
        for batch in [1, 8] {
            let [dense, fused, _] = of(512, &vec![vec![0..256]; batch])?;
            assert!(dense.is_nan() && fused > 0.0, "{kernel}: dense {dense} ns");
        }
        // Few keys: nothing is worth a copy.
        let [_, fused, packed] = of(128, &vec![vec![0..64]; 8])?;
        assert!(fused < packed, "{kernel}: fused {fused} ns, packed {packed} ns");
        Ok(())
    }

    #[test]
    fn steps_with_a_valid_key_count_once() {
        let run = |start: u32, len: u32| Run { start, len };
        assert_eq!(key_steps(&[], 32), 0);
        assert_eq!(key_steps(&[run(0, 1), run(2, 29)], 32), 1);
        assert_eq!(key_steps(&[run(31, 1), run(33, 1), run(96, 65)], 32), 5);
        assert_eq!(key_steps(&[run(0, 320)], 32), 10);
    }

    #[test]
    fn the_warp_with_the_most_masked_rows_has_a_tile_wait() {
        let run = |start: u32, len: u32| Run { start, len };
        let of = |runs: &[Run], seq| zeros_of_tiles(runs, seq, 128, &mut Vec::new()).collect::<Vec<_>>();
        assert_eq!(of(&[], 300), [128, 128, 128]);
        assert_eq!(of(&[run(0, 300)], 300), [0, 0, 0]);
        // The last tile's second warp has 12 rows.
        assert_eq!(of(&[run(0, 288)], 300), [0, 0, 48]);
        assert_eq!(of(&[run(0, 60), run(62, 70), run(140, 116)], 256), [8, 32]);
    }

    #[test]
    fn blocks_crowd_where_chance_places_them() {
        // Each multiprocessor has one of those that compute at most, or they lie one over the other.
        assert_eq!(crowd(&[100.0, 0.0, 0.0], 132), 1);
        assert_eq!(crowd(&[100.0, 100.0, 0.0], 132), 2);
        assert_eq!(crowd(&[50.0, 50.0, 50.0], 132), 3);
        assert_eq!(crowd(&[4.0, 4.0, 4.0], 132), 1);
    }

    #[test]
    fn blocks_start_as_soon_as_there_is_a_place() {
        let mut places = Places::new(3);
        let mut started = Vec::new();
        places.take(2, 5.0, |start, count| started.push((start, count)));
        places.take(3, 2.0, |start, count| started.push((start, count)));
        places.take(1, 1.0, |start, count| started.push((start, count)));
        assert_eq!(started, [(0.0, 2), (0.0, 1), (2.0, 1), (4.0, 1), (5.0, 1)]);
    }

    #[test]
    fn groups_cover_from_the_left() {
        let runs = |ranges: &[Range<u32>]| -> Vec<Run> {
            ranges.iter().map(|range| Run { start: range.start, len: range.end - range.start }).collect()
        };
        assert_eq!(groups(&runs(&[])), 0);
        assert_eq!(groups(&runs(&[0..100])), 7);
        // The second run lies in the first's group, the third only begins there.
        assert_eq!(groups(&runs(&[3..5, 8..10, 18..35])), 2);
        assert_eq!(groups(&runs(&[3..5, 8..10, 18..36])), 3);
        // 160 keys in a row are a tile, and the other 40 three groups.
        assert_eq!(key_tiles(&runs(&[5..205]), 160), (1, 3));
    }
}
