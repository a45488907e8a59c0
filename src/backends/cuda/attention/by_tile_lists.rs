//! Launches of the sm90 and the sm100 kernel, which take the same parameters: dense, on packed
//! rows, and on padded tensors by tile lists (`tile_lists`); each also with key ranges
//! (`range_tiles`).

use std::sync::Arc;

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::driver::scratch::LentScratch;
use crate::backends::cuda::driver::zeroed::ZeroedCounts;
use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{
    RangedTileListParams, SegmentOutput, SegmentTable, SegmentedTileListParams, TensorMap, TileListForm, TileListParams,
};
use crate::backends::cuda::kernels::tiles::{ListForm, ListTile};
use crate::backends::cuda::launcher::Launcher;
use crate::backends::cuda::tensors::key_ranges::PlacedRanges;
use crate::backends::cuda::tensors::metadata;
use crate::backends::cuda::tensors::placement::Placed;
use crate::backends::cuda::tensors::tensor_map::MappedTensor;
use crate::call::cost::{self, ZEROED_ROWS};
use crate::call::op::{Attention, DeviceTables};
use crate::call::packed_heads::{Heads, Sharing};
use crate::call::problem::{AttentionProblem, AttentionShape};
use crate::error::{Error, Result};
use crate::fifo_cache::FifoCache;
use crate::kernel::Kernel;
use crate::mask::key_mask::KeyMask;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::{GROUP_ROWS, VarlenMeta};

use super::call::{PackedRows, SegmentedTensors, Tensors, score_scale};
use super::dense_metas::DenseMeta;
use super::device_lists::DeviceLists;
use super::device_work::DeviceWork;
use super::range_tiles::{Deal, DealtWork, RangeTiles};
use super::split::Split;
use super::tile_lists::{Ends, TileLists};

/// The most keys that a query sees, the mean of all, for which shorter key tiles take less time: under a causal mask on an H200 they
/// took 2 % less at 1024, as long at 2048 and 3 % longer at 8192.
const FEW_KEYS: u64 = 1280;

/// The same for tiles that several blocks of a multiprocessor compute.
const NARROW_KEYS: u64 = 512;

/// Whether a call without a mask, which has so many query tiles of the longest kind, takes less time in small ones. On an H200 with 132
/// multiprocessors calls of 24, 48, 72 and 144 tiles took 15 to 18 % less, those of 256 and 264, which leave no multiprocessor idle, 5 and
/// 15 % more. Query tiles of longer rows are split instead, which small ones are not.
fn are_few(tiles: usize, seq_k: usize, multiprocessors: usize) -> bool {
    let leaves_many_idle = 5 * tiles <= 3 * multiprocessors && seq_k <= 512;
    let has_few_in_its_last_wave = tiles > multiprocessors && 10 * tiles <= 11 * multiprocessors && seq_k <= 1024;
    seq_k >= 256 && (leaves_many_idle || has_few_in_its_last_wave)
}

/// Whether a call without a mask is computed by pairs of blocks, which have neighbouring query tiles of one head. Each batch row of each
/// head, or set of heads that share tiles, has `tiles_of_one`, all together `tiles`, each of `key_tiles`. Multiprocessors come in pairs too. On
/// an H200 with 132 of them it takes 1 to 2 % less from 384 query tiles and 13 key tiles on, as long with 256, and 1 to 6 % more with 8 key
/// tiles or idle multiprocessors. Calls of the smallest size are computed so too, that the self-check makes one.
const fn come_in_pairs(tiles_of_one: usize, tiles: usize, key_tiles: usize, multiprocessors: usize) -> bool {
    let are_even = tiles_of_one.is_multiple_of(2) && multiprocessors.is_multiple_of(2);
    let are_many = tiles >= 2 * multiprocessors && key_tiles >= 12;
    are_even && (are_many || tiles <= 4)
}

/// Tile lists, and their copies on the device.
#[derive(Debug)]
struct ListsCopy {
    lists: TileLists,
    batches: CudaBuffer,
    query_groups: CudaBuffer,
    key_tiles: CudaBuffer,
    key_groups: CudaBuffer,
    zero_spans: CudaBuffer,
    /// Heads that share query tiles, each of which is a group in the lists if there are several.
    packed_heads: usize,
}

/// Kept with the query's metadata, by the id of the key's metadata, the tile, where segments end, and heads: of the call, and of a
/// key/value head (1 and 1 where none can share tiles).
type ListsCopies = FifoCache<(u64, ListTile, Ends, [usize; 2]), ListsCopy>;

/// The work of a call with key ranges, on the device.
#[derive(Debug)]
struct WorkCopy {
    tiles: CudaBuffer,
    work: CudaBuffer,
    blocks: usize,
    split: Split,
}

/// Kept with the ranges, by the ids of the metadata of queries and keys (0 without lists), where
/// segments end, and what the work is dealt out for.
type WorkCopies = FifoCache<([u64; 2], Ends, Deal), WorkCopy>;

/// The work of a call with key ranges, and who finds and deals it out.
#[derive(Clone, Copy)]
enum RangedWork<'a> {
    Host(Ranged<'a>),
    Device(&'a DeviceWork),
}

/// The key ranges of a call, and whose lists its tiles come from.
#[derive(Clone, Copy)]
struct Ranged<'a> {
    placed: &'a PlacedRanges,
    tiles: &'a dyn Fn(&KeyRanges) -> RangeTiles,
    metas: [u64; 2],
}

/// Memory of the parts of query tiles. It lives until the launch.
struct PartsScratch<'a> {
    _parts: LentScratch<'a>,
    _counts: ZeroedCounts,
}

/// The extent of a launch: of its tensors, and of its work.
#[derive(Debug, Clone, Copy)]
struct Extent {
    batch: usize,
    /// Tokens of a batch row.
    queries: usize,
    keys: usize,
    /// Query tiles times heads, or an upper bound.
    items: usize,
    /// Key tiles of the item with the fewest; 0 if the host does not know that, or the number of
    /// items.
    fewest_key_tiles: usize,
    /// Zero rows, in blocks of work.
    zero_items: usize,
}

/// A call, and the tile that its kernel computes it with.
#[derive(Clone, Copy)]
struct Call<'a> {
    launcher: &'a Launcher,
    attention: &'a Attention<'a>,
    tensors: Placement<'a>,
    tile: ListTile,
}

/// Where a call's tensors lie.
#[derive(Clone, Copy)]
pub enum Placement<'a> {
    Whole(&'a Tensors),
    Segments(&'a SegmentedTensors),
}

/// Every query row of padded tensors. Keys that the key mask drops do not count, and rows that
/// `zero_rows` drops are zeros.
pub fn dense(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: &Tensors,
    key_mask: Option<&KeyMask>,
    zero_rows: Option<&KeyMask>,
) -> Result<()> {
    let call = Call::new(launcher, attention, Placement::Whole(tensors))?;
    let meta = DenseMeta::of(launcher, &attention.problem.shape, key_mask, zero_rows)?;
    let Some(meta) = meta else { return call.in_small_tiles().without_a_mask() };
    // Keys past the end of a row are dropped by their bits, so that there are bits even where every
    // key is kept.
    call.by_lists((&meta.query, &meta.key), (meta.key.key_mask(), zero_rows))
}

/// Valid query rows and keys of padded tensors; other rows as zeros.
pub fn fused(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: Placement<'_>,
    query: &VarlenMeta,
    key: &VarlenMeta,
) -> Result<()> {
    let call = Call::new(launcher, attention, tensors)?;
    call.by_lists((query, key), (key.key_mask(), Some(query.key_mask())))
}

/// The same under metadata that the device built.
pub fn fused_with_tables(
    launcher: &Launcher,
    attention: &Attention<'_>,
    tensors: Placement<'_>,
    query: &DeviceTables<'_>,
    key: &DeviceTables<'_>,
) -> Result<()> {
    let call = Call::new(launcher, attention, tensors)?;
    call.by_device_lists(query, key)
}

/// Packed rows.
pub fn packed(launcher: &Launcher, attention: &Attention<'_>, tensors: &Tensors, rows: &PackedRows<'_>) -> Result<()> {
    let call = Call::new(launcher, attention, Placement::Whole(tensors))?;
    let mut params = TileListParams {
        form: TileListForm::Packed as i32,
        // Fits: batches are counted in an i32.
        groups: rows.batch as i32,
        cu_seqlens_q: rows.cu_seqlens_q.unwrap_or_default(),
        cu_seqlens_k: rows.cu_seqlens_k.unwrap_or_default(),
        order: rows.batch_order.unwrap_or_default(),
        ..call.params()
    };
    let mut zero_items = 0;
    if let Some(query) = rows.scatters {
        let padded_rows = query.batch * query.seq;
        // Both fit: KeyMask bounds batch · seq by i32::MAX.
        (params.seq_q, params.padded_rows) = (query.seq as i32, padded_rows as i32);
        params.out_rows = query.indices;
        params.inv_indices = if query.is_all_valid { 0 } else { query.inv_indices };
        zero_items = padded_rows.div_ceil(ZEROED_ROWS);
    }
    let tile = call.tile;
    let of_keys = rows.lengths.map(|[_, key]| move |ranges: &KeyRanges| RangeTiles::packed(ranges, key, tile));
    let by_device = match (&rows.ranges, rows.lengths) {
        (Some(placed), None) => {
            let (deal, keys) = (call.deal(zero_items, false), attention.problem.shape.seq_k);
            Some(DeviceWork::of_packed(launcher, rows, placed, (deal, keys))?)
        }
        _ => None,
    };
    let ranged = match (&rows.ranges, &of_keys) {
        (Some(placed), Some(tiles)) => Some(RangedWork::Host(Ranged { placed, tiles, metas: [0; 2] })),
        _ => by_device.as_ref().map(RangedWork::Device),
    };
    let (sharing, fewest_key_tiles) = call.packed_tiles(rows);
    call.pack_heads(&mut params, sharing.packed);
    // Packed tensors have no batch rows: all of their rows are tokens.
    let extent =
        Extent { batch: 1, queries: rows.queries, keys: rows.keys, items: sharing.tiles, fewest_key_tiles, zero_items };
    call.launch(params, &extent, ranged)
}

impl<'a> Call<'a> {
    fn new(launcher: &'a Launcher, attention: &'a Attention<'a>, tensors: Placement<'a>) -> Result<Self> {
        let head_dim = attention.problem.shape.head_dim;
        let tile = ListTile::of(attention.plan.kernel, head_dim).ok_or(Error::HeadDim { got: head_dim })?;
        let of_ranges = |ranges: &KeyRanges| {
            let narrow = tile.narrow(head_dim).filter(|_| ranges.mean_keys() <= NARROW_KEYS);
            narrow.or_else(|| tile.short_ranged().filter(|_| ranges.mean_keys() <= FEW_KEYS))
        };
        let other = match attention.ranges {
            Some(ranges) => of_ranges(ranges),
            None => attention.plan.tile_keys.and_then(|keys| tile.short_of(keys.into())),
        };
        let other = other.filter(|_| matches!(tensors, Placement::Whole(_)));
        Ok(Self { launcher, attention, tensors, tile: other.unwrap_or(tile) })
    }

    /// The same call without a mask, in small tiles if that takes less time.
    fn in_small_tiles(self) -> Self {
        let AttentionShape { batch, seq_q, seq_k, num_heads, head_dim, .. } = self.attention.problem.shape;
        let tiles = batch * num_heads * seq_q.div_ceil(self.tile.rows as usize);
        let are_few = are_few(tiles, seq_k, self.launcher.multiprocessors);
        let small = self.tile.small(head_dim).filter(|_| self.is_plain() && are_few);
        Self { tile: small.unwrap_or(self.tile), ..self }
    }

    /// Whether the call is one on whole tensors without ranges: only such ones have tiles for a number of query tiles.
    fn is_plain(&self) -> bool {
        self.attention.ranges.is_none() && matches!(self.tensors, Placement::Whole(_))
    }

    /// The parameters that every form has.
    fn params(&self) -> TileListParams {
        let shape = self.attention.problem.shape;
        let (out, lse) = match self.tensors {
            Placement::Whole(tensors) => (Some(tensors.out), tensors.lse),
            Placement::Segments(tensors) => (None, tensors.lse),
        };
        let lse = lse.unwrap_or_default();
        TileListParams {
            out: out.map_or(0, |out| out.address),
            out_strides: out.map(|out| out.strides).unwrap_or_default(),
            lse: lse.address,
            lse_batch_stride: lse.batch_stride,
            lse_head_stride: lse.head_stride,
            // All fit: checked by problem.
            heads: shape.num_heads as i32,
            group_size: shape.group_size() as i32,
            packed_heads: 1,
            head_sets: shape.num_heads as i32,
            head_dim: shape.head_dim as i32,
            score_scale: score_scale(self.attention.problem),
            ..Default::default()
        }
    }

    /// The call's heads.
    fn heads(&self) -> Heads {
        let shape = self.attention.problem.shape;
        Heads {
            count: shape.num_heads,
            group_size: shape.group_size(),
            tile_rows: self.tile.rows as usize,
            multiprocessors: self.launcher.multiprocessors,
        }
    }

    /// Blocks that run at once.
    fn blocks_at_once(&self) -> usize {
        self.launcher.multiprocessors * self.tile.blocks as usize
    }

    /// Whether heads of the call can share query tiles.
    fn can_pack_heads(&self) -> bool {
        let is_whole = matches!(self.tensors, Placement::Whole(_));
        self.attention.plan.kernel.traits().packs_heads && is_whole && self.attention.ranges.is_none()
    }

    /// How heads share query tiles, for batch rows with so many groups of queries.
    fn share_heads(&self, groups: impl Iterator<Item = usize> + Clone) -> Sharing {
        if self.can_pack_heads() { self.heads().share(groups) } else { self.heads().alone(groups) }
    }

    /// The query tiles of all sequences, and key tiles of the sequence with the fewest that has queries. If
    /// the host does not know the lengths: an upper bound, of heads that share nothing, and 0.
    fn packed_tiles(&self, rows: &PackedRows<'_>) -> (Sharing, usize) {
        let Some([queries, keys]) = rows.lengths else {
            let groups = std::iter::repeat_n(rows.max_queries.div_ceil(GROUP_ROWS), rows.batch);
            return (self.heads().alone(groups), 0);
        };
        let groups = (0..rows.batch).map(|row| queries.rows(row).len().div_ceil(GROUP_ROWS));
        let with_queries = (0..rows.batch).filter(|&row| !queries.rows(row).is_empty());
        let fewest_keys = with_queries.map(|row| keys.rows(row).len()).min().unwrap_or(usize::MAX);
        (self.share_heads(groups), fewest_keys.div_ceil(self.tile.keys as usize))
    }

    /// Has so many heads share query tiles.
    fn pack_heads(&self, params: &mut TileListParams, packed_heads: usize) {
        // Both fit: as many as heads at most.
        params.packed_heads = packed_heads as i32;
        params.head_sets = (self.attention.problem.shape.num_heads / packed_heads) as i32;
    }

    /// The same for padded tensors.
    fn padded_params(&self) -> TileListParams {
        let AttentionShape { seq_q, seq_k, .. } = self.attention.problem.shape;
        // Both fit: checked by problem.
        TileListParams { seq_q: seq_q as i32, seq_k: seq_k as i32, ..self.params() }
    }

    /// Every query row and every key of padded tensors.
    fn without_a_mask(&self) -> Result<()> {
        let AttentionShape { batch, seq_q, seq_k, .. } = self.attention.problem.shape;
        // Fits: checked by problem.
        let mut params =
            TileListParams { form: TileListForm::Dense as i32, groups: batch as i32, ..self.padded_params() };
        let groups = std::iter::repeat_n(seq_q.div_ceil(GROUP_ROWS), batch);
        let sharing = self.share_heads(groups);
        self.pack_heads(&mut params, sharing.packed);
        let extent = Extent {
            batch,
            queries: seq_q,
            keys: seq_k,
            items: sharing.tiles,
            fewest_key_tiles: seq_k.div_ceil(self.tile.keys as usize),
            zero_items: 0,
        };
        let call = self.in_pairs(&sharing, &extent);
        let placed = self.placed_ranges()?;
        let tiles = |ranges: &KeyRanges| RangeTiles::padded(ranges, batch, seq_k, self.tile);
        let ranged = placed.as_ref().map(|placed| RangedWork::Host(Ranged { placed, tiles: &tiles, metas: [0; 2] }));
        call.launch(params, &extent, ranged)
    }

    /// The same call without a mask, by pairs of blocks if that takes less time.
    fn in_pairs(self, sharing: &Sharing, extent: &Extent) -> Self {
        let sets = extent.batch * self.attention.problem.shape.num_heads / sharing.packed;
        let tiles_of_one = sharing.tiles.checked_div(sets).unwrap_or_default();
        let multiprocessors = self.launcher.multiprocessors;
        let are_pairs = come_in_pairs(tiles_of_one, extent.items, extent.fewest_key_tiles, multiprocessors);
        let paired = self.tile.paired().filter(|_| self.is_plain() && are_pairs);
        Self { tile: paired.unwrap_or(self.tile), ..self }
    }

    /// The call's ranges, of every query of padded tensors.
    fn placed_ranges(&self) -> Result<Option<PlacedRanges>> {
        self.attention.ranges.map(|ranges| PlacedRanges::padded(self.launcher, ranges)).transpose()
    }

    /// Padded tensors by the lists of their metadata. The masks are of keys, and of query rows that
    /// are not written as zeros; without the latter all rows are computed.
    fn by_lists(
        &self,
        (query, key): (&VarlenMeta, &VarlenMeta),
        (key_mask, row_mask): (&KeyMask, Option<&KeyMask>),
    ) -> Result<()> {
        let copy = self.lists(query, key)?;
        let lists = &copy.lists;
        let key_bits = metadata::mask_bits(self.launcher, key_mask)?;
        let row_bits = row_mask.map(|mask| metadata::mask_bits(self.launcher, mask)).transpose()?;
        let mut params = TileListParams {
            form: TileListForm::Fused as i32,
            // All fit: there are at most as many as tokens.
            groups: lists.batches.len() as i32,
            zero_span_count: lists.zero_spans.len() as i32,
            key_bits: key_bits.buffer.address(),
            key_words: key_bits.row_words as i32,
            row_bits: row_bits.as_ref().map_or(0, |bits| bits.buffer.address()),
            row_words: row_bits.as_ref().map_or(0, |bits| bits.row_words as i32),
            batches: copy.batches.address(),
            query_groups: copy.query_groups.address(),
            key_tiles: copy.key_tiles.address(),
            key_groups: copy.key_groups.address(),
            zero_spans: copy.zero_spans.address(),
            ..self.padded_params()
        };
        self.pack_heads(&mut params, copy.packed_heads);
        let AttentionShape { batch, seq_q, seq_k, num_heads, .. } = self.attention.problem.shape;
        let extent = Extent {
            batch,
            queries: seq_q,
            keys: seq_k,
            items: match copy.packed_heads {
                1 => lists.query_tiles() * num_heads,
                packed => self.heads().tiles(packed, lists.batches.iter().map(|row| row.query_tiles as usize)),
            },
            // The last batch row in the order of work.
            fewest_key_tiles: lists.batches.last().map_or(0, |batch| batch.key_tiles as usize),
            zero_items: lists.zero_spans.len() * num_heads,
        };
        let placed = self.placed_ranges()?;
        let tiles = |ranges: &KeyRanges| RangeTiles::listed(ranges, lists, query, key, self.tile);
        let metas = [query.id(), key.id()];
        let ranged = placed.as_ref().map(|placed| RangedWork::Host(Ranged { placed, tiles: &tiles, metas }));
        self.launch(params, &extent, ranged)
    }

    /// Padded tensors by lists that the device makes. It does not wait for the host, which knows
    /// upper bounds alone.
    fn by_device_lists(&self, query: &DeviceTables<'_>, key: &DeviceTables<'_>) -> Result<()> {
        let AttentionShape { batch, seq_q, seq_k, num_heads, .. } = self.attention.problem.shape;
        if batch * seq_q * num_heads == 0 {
            return Ok(());
        }
        let lists = DeviceLists::of(self.launcher, (query, key), &self.ends(), self.tile)?;
        let params = TileListParams { form: TileListForm::Fused as i32, ..self.padded_params() };
        let extent = Extent {
            batch,
            queries: seq_q,
            keys: seq_k,
            items: seq_q.div_ceil(self.tile.rows as usize) * batch * num_heads,
            fewest_key_tiles: 0,
            zero_items: (batch * seq_q).div_ceil(ZEROED_ROWS),
        };
        let placed = self.placed_ranges()?;
        let deal = self.deal(extent.zero_items, false);
        let work = placed.map(|placed| lists.work(self.launcher, &placed, deal)).transpose()?;
        self.launch(lists.in_params(params), &extent, work.as_deref().map(RangedWork::Device))
    }

    /// The lists on the device, made and uploaded if they are not there yet.
    fn lists(&self, query: &VarlenMeta, key: &VarlenMeta) -> Result<Arc<ListsCopy>> {
        let Self { launcher, tile, .. } = *self;
        let copies = query.copies().get_or_make(launcher.id, || Ok(ListsCopies::default()))?;
        let (ends, heads) = (self.ends(), self.heads());
        let packs = self.can_pack_heads() && heads.group_size > 1;
        let of_heads = if packs { [heads.count, heads.group_size] } else { [1; 2] };
        copies.get_or_make((key.id(), tile, ends, of_heads), launcher.context.is_captured()?, || {
            let groups = (0..query.batch()).map(|row| cost::groups(query.runs(row)));
            let packed_heads = if packs { heads.share(groups).packed } else { 1 };
            // Packed heads fill the tiles one after the other.
            let rows = if packed_heads > 1 { GROUP_ROWS } else { tile.rows as usize };
            let lists = TileLists::new((query, key), &ends, (rows, tile.keys as usize));
            Ok(ListsCopy {
                packed_heads,
                batches: launcher.uploaded(bytemuck::cast_slice(&lists.batches))?,
                query_groups: launcher.uploaded(bytemuck::cast_slice(&lists.query_groups))?,
                key_tiles: launcher.uploaded(bytemuck::cast_slice(&lists.key_tiles))?,
                key_groups: launcher.uploaded(bytemuck::cast_slice(&lists.key_groups))?,
                zero_spans: launcher.uploaded(bytemuck::cast_slice(&lists.zero_spans))?,
                lists,
            })
        })
    }

    /// What the work of a call with key ranges is dealt out for.
    fn deal(&self, zero_items: usize, splits: bool) -> Deal {
        let shape = self.attention.problem.shape;
        Deal {
            tile: self.tile,
            heads: shape.num_heads,
            group_size: shape.group_size(),
            head_dim: shape.head_dim,
            blocks_at_once: self.blocks_at_once(),
            zero_items,
            splits,
        }
    }

    /// The work of a call with key ranges, dealt out and uploaded if it is not there yet. Only with
    /// `splits` are query tiles split.
    fn work(&self, ranged: &Ranged<'_>, zero_items: usize, splits: bool) -> Result<Arc<WorkCopy>> {
        let (launcher, deal) = (self.launcher, self.deal(zero_items, splits));
        let ranges = &ranged.placed.ranges;
        let copies = ranges.copies().get_or_make(launcher.id, || Ok(WorkCopies::default()))?;
        copies.get_or_make((ranged.metas, self.ends(), deal), launcher.context.is_captured()?, || {
            let tiles = (ranged.tiles)(ranges);
            let DealtWork { work, blocks, split } = tiles.deal(deal);
            Ok(WorkCopy {
                tiles: launcher.uploaded(bytemuck::cast_slice(&tiles.tiles))?,
                work: launcher.uploaded(bytemuck::cast_slice(&work))?,
                blocks,
                split,
            })
        })
    }

    fn launch(&self, mut params: TileListParams, extent: &Extent, ranged: Option<RangedWork<'_>>) -> Result<()> {
        let &Extent { items, zero_items, .. } = extent;
        if items + zero_items == 0 {
            return Ok(());
        }
        let segments = match self.tensors {
            Placement::Whole(tensors) => {
                self.describe_tensors(tensors, extent, &mut params)?;
                None
            }
            Placement::Segments(tensors) => Some(self.describe_segments(tensors, extent.batch)?),
        };
        let (launcher, tile) = (self.launcher, self.tile);
        let dtype = self.attention.problem.dtype;
        let form = ListForm { has_ranges: ranged.is_some(), has_segments: segments.is_some() };
        let function = launcher.function(Entry::AttentionByLists { dtype, tile, form })?;
        // The scratch lives until the launch, which keeps its memory.
        let (blocks, _scratch) = match &ranged {
            Some(RangedWork::Host(ranged)) => self.deal_out(extent, &mut params, ranged)?,
            Some(RangedWork::Device(work)) => {
                params = work.in_params(params);
                (work.blocks(), None)
            }
            None => {
                let (split, scratch) = self.split(extent, &mut params)?;
                // As many blocks as run at once; each takes one item after the other.
                (split.work_items().max(zero_items).min(self.blocks_at_once()), scratch)
            }
        };
        // Fits: a chip has few multiprocessors.
        let blocks = blocks as u32;
        let grid = [blocks, 1, 1];
        if let (true, Placement::Whole(tensors)) = (form.has_ranges && tile.kernel == Kernel::CudaSm100, self.tensors) {
            let (values, value_strides) = (tensors.v.address, tensors.v.strides);
            let params = RangedTileListParams { lists: params, values, value_strides, ..Default::default() };
            // SAFETY: as below.
            return unsafe { launcher.launch(function, grid, tile.threads, &params) };
        }
        let Some(segments) = segments else {
            // SAFETY: the tensors have the problem's shape and lie inside their buffers, those of
            // packed rows as `cu_seqlens` says (checked by problem; scratch is made so), and their
            // rows start at words (placement). Lists, masks and `cu_seqlens` have the problem's batch
            // rows and sequence lengths, ranges its queries, and work ends in each block's column.
            // The output shares no memory with them (checked by problem).
            return unsafe { launcher.launch(function, grid, tile.threads, &params) };
        };
        let params = SegmentedTileListParams { lists: params, segments: *segments };
        // SAFETY: as above. The pieces have the problem's tokens together, and the lists are cut at
        // their ends.
        unsafe { launcher.launch(function, grid, tile.threads, &params) }
    }

    /// Sets the tensor maps.
    fn describe_tensors(&self, tensors: &Tensors, extent: &Extent, params: &mut TileListParams) -> Result<()> {
        let AttentionShape { num_heads, num_kv_heads, .. } = self.attention.problem.shape;
        let &Extent { batch, queries, keys, .. } = extent;
        let (of_queries, of_keys) = ([queries, num_heads, batch], [keys, num_kv_heads, batch]);
        let group = GROUP_ROWS as u32;
        params.q_map = self.map_of(tensors.q, of_queries, group)?;
        // Not used if the kernel scatters its rows.
        params.out_map = if params.out_rows == 0 { self.map_of(tensors.out, of_queries, group)? } else { params.q_map };
        params.k_map = self.map_of(tensors.k, of_keys, self.tile.keys)?;
        params.v_map = self.map_of(tensors.v, of_keys, self.tile.keys)?;
        params.k_group_map = self.map_of(tensors.k, of_keys, group)?;
        params.v_group_map = self.map_of(tensors.v, of_keys, group)?;
        Ok(())
    }

    /// The table of tensors in segments.
    fn describe_segments(&self, tensors: &SegmentedTensors, batch: usize) -> Result<Box<SegmentTable>> {
        let AttentionShape { num_heads, num_kv_heads, .. } = self.attention.problem.shape;
        let SegmentedTensors { queries, keys, .. } = tensors;
        let Ends { query: query_ends, key: key_ends } = self.ends();
        // They fit: there are few.
        let [query_count, key_count] = [queries, keys].map(|pieces| pieces.ends.len() as i32);
        let mut table = Box::new(SegmentTable { query_ends, key_ends, query_count, key_count, ..Default::default() });
        if let Some(arrivals) = &self.attention.arrivals {
            table.arrived = self.launcher.source(arrivals.count)?.address();
            table.arrived_before = arrivals.before;
        }
        let group = GROUP_ROWS as u32;
        // As many as there is room for: checked by plan.
        for (at, (tokens, &[q, out])) in queries.spans().enumerate() {
            let sizes = [tokens, num_heads, batch];
            table.maps[at].q = self.map_of(q, sizes, group)?;
            table.maps[at].out = self.map_of(out, sizes, group)?;
            table.outputs[at] = SegmentOutput { out: out.address, strides: out.strides };
        }
        for (at, (tokens, &[k, v])) in keys.spans().enumerate() {
            let sizes = [tokens, num_kv_heads, batch];
            table.maps[at].k = self.map_of(k, sizes, self.tile.keys)?;
            table.maps[at].v = self.map_of(v, sizes, self.tile.keys)?;
            table.maps[at].k_group = self.map_of(k, sizes, group)?;
            table.maps[at].v_group = self.map_of(v, sizes, group)?;
        }
        Ok(table)
    }

    /// The map of a tensor: boxes of so many rows of one head.
    fn map_of(&self, placed: Placed, [tokens, heads, batch]: [usize; 3], rows: u32) -> Result<TensorMap> {
        let AttentionProblem { dtype, shape, .. } = *self.attention.problem;
        let tensor = MappedTensor { placed, dtype, head_dim: shape.head_dim, tokens, heads, batch };
        let encoded = tensor.encode(self.tile.panel(), rows);
        self.launcher.context.check(encoded, "describing a tensor to the copy engine")
    }

    /// Where segments end.
    fn ends(&self) -> Ends {
        let Placement::Segments(tensors) = self.tensors else { return Ends::NONE };
        let mut ends = Ends::NONE;
        for (ends, pieces) in [(&mut ends.query, &tensors.queries), (&mut ends.key, &tensors.keys)] {
            // All but the last one's. They fit: tokens are counted in an i32.
            let inner = pieces.ends.iter().take(pieces.ends.len().saturating_sub(1));
            ends.iter_mut().zip(inner).for_each(|(to, &end)| *to = end as i32);
        }
        ends
    }

    /// How the query tiles of a call with key ranges are shared out, which the parameters then say:
    /// among how many blocks, and scratch for the parts of split ones.
    fn deal_out(
        &self,
        extent: &Extent,
        params: &mut TileListParams,
        ranged: &Ranged<'_>,
    ) -> Result<(usize, Option<PartsScratch<'a>>)> {
        let mut copy = self.work(ranged, extent.zero_items, true)?;
        let mut scratch = None;
        if copy.split.parts > 1 {
            match self.parts_scratch(&copy.split, params) {
                Ok(made) => scratch = Some(made),
                // Without parts it takes longer, but no memory.
                Err(Error::OutOfMemory { .. }) => copy = self.work(ranged, extent.zero_items, false)?,
                Err(error) => return Err(error),
            }
        }
        params.ranges = ranged.placed.params();
        (params.range_tiles, params.range_work) = (copy.tiles.address(), copy.work.address());
        // Fits: a query tile has few parts.
        params.parts = copy.split.parts as i32;
        Ok((copy.blocks, scratch))
    }

    /// How query tiles are shared out, which the parameters then say, and scratch for the parts of
    /// split ones.
    fn split(&self, extent: &Extent, params: &mut TileListParams) -> Result<(Split, Option<PartsScratch<'a>>)> {
        let mut split = Split::of(self.tile, extent.items, extent.fewest_key_tiles, self.blocks_at_once());
        let mut scratch = None;
        if split.parts > 1 {
            match self.parts_scratch(&split, params) {
                Ok(made) => scratch = Some(made),
                // Without parts it takes longer, but no memory.
                Err(Error::OutOfMemory { .. }) => split = Split::none(extent.items),
                Err(error) => return Err(error),
            }
        }
        // Both fit: items are counted in an i32 by the kernel.
        (params.split_from, params.parts) = (split.from as i32, split.parts as i32);
        Ok((split, scratch))
    }

    /// Memory for the parts of query tiles, and zeroed counts of the parts that are done. The
    /// parameters then name both.
    fn parts_scratch(&self, split: &Split, params: &mut TileListParams) -> Result<PartsScratch<'a>> {
        let bytes = split.part_items() as u64 * self.tile.part_bytes();
        let count_bytes = split.split_items() as u64 * self.tile.part_count_bytes();
        let parts = self.launcher.lent_scratch(bytes)?;
        let counts = self.launcher.zeroed_counts(count_bytes)?;
        (params.part_chunks, params.parts_done) = (parts.address(), counts.address());
        Ok(PartsScratch { _parts: parts, _counts: counts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_for_even_numbers_of_tiles_that_fill_the_multiprocessors() {
        assert!(come_in_pairs(32, 512, 26, 132) && come_in_pairs(2, 264, 12, 132));
        assert!(!come_in_pairs(31, 496, 26, 132) && !come_in_pairs(32, 512, 26, 133));
        // Few query tiles, few keys, and the self-check's call.
        assert!(!come_in_pairs(16, 256, 13, 132) && !come_in_pairs(8, 512, 8, 132) && come_in_pairs(2, 4, 2, 132));
    }

    #[test]
    fn small_tiles_are_for_calls_that_leave_multiprocessors_idle() {
        let few = |tiles, seq_k| are_few(tiles, seq_k, 132);
        // B1 24x64 of 384, 512 and 1024 tokens.
        assert!(few(48, 384) && few(72, 512) && few(144, 1024));
        // B8 S384 16x64, B1 S2048 24x64, a wave that is nearly full.
        assert!(!few(256, 384) && !few(264, 2048) && !few(120, 512));
        // Short rows, and those that are split.
        assert!(!few(24, 128) && !few(22, 4096) && !few(144, 4096));
    }
}
