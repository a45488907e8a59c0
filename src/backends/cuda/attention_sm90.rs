//! Launches of `attention_sm90` and `attention_sm100`, which take the same parameters: dense, on packed rows, and on padded tensors in
//! place by lists of tiles.

use std::sync::{Arc, Mutex, PoisonError};

use crate::call::op::Attention;
use crate::call::problem::AttentionShape;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::{GROUP_ROWS, VarlenMeta};

use super::attention::{PackedRows, Tensors, score_scale};
use super::device::CudaDevice;
use super::memory::CudaBuffer;
use super::module::Entry;
use super::params_sm90::{AttentionParamsSm90, Form};
use super::tensor_map::MappedTensor;
use super::tile_lists::TileLists;
use super::tiles::{ListTile, Split, TileSm90, TileSm100};

/// Lists on the device.
#[derive(Debug)]
struct ListsCopy {
    batches: CudaBuffer,
    query_groups: CudaBuffer,
    key_tiles: CudaBuffer,
    key_groups: CudaBuffer,
    zero_spans: CudaBuffer,
    batch_count: usize,
    zero_span_count: usize,
    query_tiles: usize,
    /// Of the batch row with the fewest.
    fewest_key_tiles: usize,
}

/// What a copy of lists depends on beside the query's metadata: the key's, by its id, and the tile.
type ListsKey = (u64, ListTile);

/// What a mask or metadata keeps of each kind at most, but for what a graph may use. A request has one or two kinds of keys and one
/// head dimension; only queries that outlive their keys many times over come to more.
const MAX_KEPT: usize = 16;

/// Few values by their keys, the oldest first; the oldest goes for a new one.
#[derive(Debug)]
struct Kept<Key, Value>(Mutex<Vec<KeptEntry<Key, Value>>>);

#[derive(Debug)]
struct KeptEntry<Key, Value> {
    key: Key,
    value: Arc<Value>,
    /// A graph may hold its addresses, so it stays as long as what it is kept with.
    is_captured: bool,
}

impl<Key, Value> Default for Kept<Key, Value> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<Key: PartialEq, Value> Kept<Key, Value> {
    /// The value of a key, made by `make` if there is none yet.
    fn get_or_make(&self, key: Key, is_captured: bool, make: impl FnOnce() -> Result<Value>) -> Result<Arc<Value>> {
        // Held while the value is made, so that two threads never upload the same. A panic leaves the entries as they were: they
        // are only ever pushed whole.
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = entries.iter_mut().find(|entry| entry.key == key) {
            found.is_captured |= is_captured;
            return Ok(Arc::clone(&found.value));
        }
        let value = Arc::new(make()?);
        if entries.len() >= MAX_KEPT
            && let Some(oldest) = entries.iter().position(|entry| !entry.is_captured)
        {
            entries.remove(oldest);
        }
        entries.push(KeptEntry { key, value: Arc::clone(&value), is_captured });
        Ok(value)
    }
}

type ListsCopies = Kept<ListsKey, ListsCopy>;

/// Metadata that stands for a dense call's masks: every query, and the kept keys or every key. Kept with one of the masks, by the
/// lengths of both sides and whether the keys are masked.
type DenseMetas = Kept<DenseKey, DenseMeta>;

type DenseKey = (usize, usize, bool);

#[derive(Debug)]
struct DenseMeta {
    query: VarlenMeta,
    key: VarlenMeta,
}

/// How far the tensors of a launch reach, and its work.
#[derive(Debug, Clone, Copy)]
struct Extent {
    batch: usize,
    /// Tokens of a batch row.
    queries: usize,
    keys: usize,
    /// Query tiles, times heads, or as many as there may be.
    items: usize,
    /// Key tiles of the item with the fewest; 0 if the host does not know, or does not know how many items there are.
    fewest_key_tiles: usize,
    /// Rows of zeros that are work for so many blocks.
    zero_items: usize,
}

/// Rows of a padded output whose zeros are enough work for a block.
const ZEROED_ROWS: usize = 256;

impl CudaDevice {
    /// Every query row; keys by the mask, and rows that `zero_rows` drops as zeros.
    pub(super) fn attend_dense_by_lists(
        &self,
        attention: &Attention<'_>,
        tensors: &Tensors,
        key_mask: Option<&KeyMask>,
        zero_rows: Option<&KeyMask>,
    ) -> Result<()> {
        let AttentionShape { batch, seq_q, seq_k, num_heads, .. } = attention.problem.shape;
        let tile = Self::tile(attention)?;
        // Both fit: checked by problem.
        let params = AttentionParamsSm90 { seq_q: seq_q as i32, seq_k: seq_k as i32, ..params(attention, tensors) };
        let Some(mask) = key_mask.or(zero_rows) else {
            let params = AttentionParamsSm90 { form: Form::Dense as i32, groups: batch as i32, ..params };
            let tiles = seq_q.div_ceil(tile.rows() as usize) * batch;
            let fewest_key_tiles = seq_k.div_ceil(tile.keys() as usize);
            let items = tiles * num_heads;
            let extent = Extent { batch, queries: seq_q, keys: seq_k, items, fewest_key_tiles, zero_items: 0 };
            return self.launch_by_lists(attention, tensors, params, tile, extent);
        };
        let metas = mask.copies().get_or_make(self.id, || Ok(DenseMetas::default()))?;
        let is_captured = self.context.is_captured()?;
        let meta = metas.get_or_make((seq_q, seq_k, key_mask.is_some()), is_captured, || {
            let every = |seq| VarlenMeta::from_key_mask(&KeyMask::all(batch, seq)?);
            Ok(DenseMeta {
                query: every(seq_q)?,
                key: key_mask.map_or_else(|| every(seq_k), VarlenMeta::from_key_mask)?,
            })
        })?;
        // Keys past the end of a row are dropped by their bits, so that there are bits even where every key is kept.
        let masks = (meta.key.key_mask(), zero_rows);
        self.attend_by_lists(attention, tensors, params, tile, (&meta.query, &meta.key), masks)
    }

    /// Valid query rows and keys of padded tensors; other rows as zeros.
    pub(super) fn attend_fused_by_lists(
        &self,
        attention: &Attention<'_>,
        tensors: &Tensors,
        query: &VarlenMeta,
        key: &VarlenMeta,
    ) -> Result<()> {
        let AttentionShape { seq_q, seq_k, .. } = attention.problem.shape;
        let tile = Self::tile(attention)?;
        let params = AttentionParamsSm90 { seq_q: seq_q as i32, seq_k: seq_k as i32, ..params(attention, tensors) };
        let masks = (key.key_mask(), Some(query.key_mask()));
        self.attend_by_lists(attention, tensors, params, tile, (query, key), masks)
    }

    /// The masks are of keys, and of query rows that are not written as zeros; none keeps all.
    fn attend_by_lists(
        &self,
        attention: &Attention<'_>,
        tensors: &Tensors,
        params: AttentionParamsSm90,
        tile: ListTile,
        (query, key): (&VarlenMeta, &VarlenMeta),
        (key_mask, row_mask): (&KeyMask, Option<&KeyMask>),
    ) -> Result<()> {
        let lists = self.lists(query, key, tile)?;
        let key_bits = self.mask_bits(key_mask)?;
        let row_bits = row_mask.map(|mask| self.mask_bits(mask)).transpose()?;
        let params = AttentionParamsSm90 {
            form: Form::Fused as i32,
            // All fit: there are at most as many as tokens.
            groups: lists.batch_count as i32,
            zero_span_count: lists.zero_span_count as i32,
            key_bits: key_bits.buffer.address(),
            key_words: key_bits.row_words as i32,
            row_bits: row_bits.as_ref().map_or(0, |bits| bits.buffer.address()),
            row_words: row_bits.as_ref().map_or(0, |bits| bits.row_words as i32),
            batches: lists.batches.address(),
            query_groups: lists.query_groups.address(),
            key_tiles: lists.key_tiles.address(),
            key_groups: lists.key_groups.address(),
            zero_spans: lists.zero_spans.address(),
            ..params
        };
        let AttentionShape { batch, seq_q, seq_k, num_heads, .. } = attention.problem.shape;
        let extent = Extent {
            batch,
            queries: seq_q,
            keys: seq_k,
            items: lists.query_tiles * num_heads,
            fewest_key_tiles: lists.fewest_key_tiles,
            zero_items: lists.zero_span_count * num_heads,
        };
        self.launch_by_lists(attention, tensors, params, tile, extent)
    }

    pub(super) fn attend_packed_by_lists(
        &self,
        attention: &Attention<'_>,
        tensors: &Tensors,
        rows: &PackedRows<'_>,
    ) -> Result<()> {
        let tile = Self::tile(attention)?;
        let (lse, lse_head_stride) = rows.lse.unwrap_or_default();
        let params = AttentionParamsSm90 {
            form: Form::Packed as i32,
            // Fits: batches are counted in an i32.
            groups: rows.batch as i32,
            cu_seqlens_q: rows.cu_seqlens_q.unwrap_or_default(),
            cu_seqlens_k: rows.cu_seqlens_k.unwrap_or_default(),
            order: rows.batch_order.unwrap_or_default(),
            lse,
            lse_head_stride,
            ..params(attention, tensors)
        };
        let tiles_of = |queries: usize| queries.div_ceil(tile.rows() as usize);
        let (tiles, fewest_keys) = match rows.lengths {
            None => (tiles_of(rows.max_queries) * rows.batch, 0),
            Some([queries, keys]) => (0..rows.batch).fold((0, usize::MAX), |(tiles, fewest), row| {
                let (queries, keys) = (queries.rows(row).len(), keys.rows(row).len());
                (tiles + tiles_of(queries), if queries == 0 { fewest } else { fewest.min(keys) })
            }),
        };
        let (params, zero_items) = match rows.scatters {
            None => (params, 0),
            Some(query) => {
                let padded_rows = query.batch * query.seq;
                let scattered = AttentionParamsSm90 {
                    // Both fit: KeyMask bounds batch · seq by i32::MAX.
                    seq_q: query.seq as i32,
                    padded_rows: padded_rows as i32,
                    out_rows: query.indices,
                    inv_indices: if query.is_all_valid { 0 } else { query.inv_indices },
                    ..params
                };
                (scattered, padded_rows.div_ceil(ZEROED_ROWS))
            }
        };
        // Packed tensors have no batch rows: all of their rows are tokens.
        let extent = Extent {
            batch: 1,
            queries: rows.queries,
            keys: rows.keys,
            items: tiles * attention.problem.shape.num_heads,
            fewest_key_tiles: fewest_keys.div_ceil(tile.keys() as usize),
            zero_items,
        };
        self.launch_by_lists(attention, tensors, params, tile, extent)
    }

    fn tile(attention: &Attention<'_>) -> Result<ListTile> {
        let head_dim = attention.problem.shape.head_dim;
        let tile = match attention.plan.kernel {
            Kernel::CudaSm100 => TileSm100::of(head_dim).map(ListTile::Sm100),
            _ => TileSm90::of(head_dim).map(ListTile::Sm90),
        };
        tile.ok_or(Error::HeadDim { got: head_dim })
    }

    fn lists(&self, query: &VarlenMeta, key: &VarlenMeta, tile: ListTile) -> Result<Arc<ListsCopy>> {
        let copies = query.copies().get_or_make(self.id, || Ok(ListsCopies::default()))?;
        copies.get_or_make((key.id(), tile), self.context.is_captured()?, || {
            let lists = TileLists::new(query, key, tile.rows() as usize, tile.keys() as usize);
            Ok(ListsCopy {
                batches: self.uploaded(bytemuck::cast_slice(&lists.batches))?,
                query_groups: self.uploaded(bytemuck::cast_slice(&lists.query_groups))?,
                key_tiles: self.uploaded(bytemuck::cast_slice(&lists.key_tiles))?,
                key_groups: self.uploaded(bytemuck::cast_slice(&lists.key_groups))?,
                zero_spans: self.uploaded(bytemuck::cast_slice(&lists.zero_spans))?,
                batch_count: lists.batches.len(),
                zero_span_count: lists.zero_spans.len(),
                query_tiles: lists.query_tiles(),
                // The last of the batch rows in the order of work.
                fewest_key_tiles: lists.batches.last().map_or(0, |batch| batch.key_tiles as usize),
            })
        })
    }

    fn launch_by_lists(
        &self,
        attention: &Attention<'_>,
        tensors: &Tensors,
        mut params: AttentionParamsSm90,
        tile: ListTile,
        Extent { batch, queries, keys, items, fewest_key_tiles, zero_items }: Extent,
    ) -> Result<()> {
        let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = attention.problem.shape;
        if items + zero_items == 0 {
            return Ok(());
        }
        let dtype = attention.problem.dtype;
        let of_queries = |placed| MappedTensor { placed, dtype, head_dim, tokens: queries, heads: num_heads, batch };
        let of_keys = |placed| MappedTensor { placed, dtype, head_dim, tokens: keys, heads: num_kv_heads, batch };
        let encode = |tensor: MappedTensor, rows: u32| {
            self.context.done(tensor.encode(tile.panel(), rows), "describing a tensor to the copy engine")
        };
        let group = GROUP_ROWS as u32;
        params.q_map = encode(of_queries(tensors.q), group)?;
        // Not used where rows go to places of their own.
        params.out_map = if params.out_rows == 0 { encode(of_queries(tensors.out), group)? } else { params.q_map };
        params.k_map = encode(of_keys(tensors.k), tile.keys())?;
        params.v_map = encode(of_keys(tensors.v), tile.keys())?;
        params.k_group_map = encode(of_keys(tensors.k), group)?;
        params.v_group_map = encode(of_keys(tensors.v), group)?;
        let function = self.function(Entry::AttentionByLists { dtype, tile })?;
        let mut split = match tile {
            ListTile::Sm90(_) => TileSm90::split(items, fewest_key_tiles, self.multiprocessors),
            ListTile::Sm100(_) => Split::none(items),
        };
        // Lives until the launch, which keeps its memory.
        let mut scratch = None;
        if let ListTile::Sm90(tile) = tile
            && split.parts > 1
        {
            match self.parts_scratch(&split, tile, &mut params) {
                Ok(made) => scratch = Some(made),
                // It takes longer, but no memory.
                Err(Error::OutOfMemory { .. }) => split = Split::none(items),
                Err(error) => return Err(error),
            }
        }
        // Both fit: items are counted in an i32 by the kernel.
        (params.split_from, params.parts) = (split.from as i32, split.parts as i32);
        // Blocks are as many as run at once, and take one item after the other. Fits: a chip has few multiprocessors.
        let blocks = split.work_items().max(zero_items).min(self.multiprocessors) as u32;
        // SAFETY: the tensors have the problem's shape and lie inside their buffers, those of packed rows as `cu_seqlens` says
        // (checked by problem; scratch is made so), and their rows start at words (placement). Lists, masks and `cu_seqlens` have
        // the problem's batch rows and sequence lengths. The output shares no memory with them (checked by problem).
        unsafe { self.context.launch(function, [blocks, 1, 1], tile.threads(), &params) }?;
        drop(scratch);
        Ok(())
    }

    /// Memory for the parts of query tiles and zeroed counts of those that are done, which the parameters then name.
    fn parts_scratch(&self, split: &Split, tile: TileSm90, params: &mut AttentionParamsSm90) -> Result<CudaBuffer> {
        let bytes = split.part_items() as u64 * tile.part_bytes();
        let count_bytes = (split.items - split.from) as u64 * tile.part_count_bytes();
        let scratch = self.scratch(bytes + count_bytes)?;
        params.part_chunks = scratch.address();
        params.parts_done = scratch.address() + bytes;
        // SAFETY: the end of the buffer that was just made.
        unsafe { self.context.fill(params.parts_done, 0, count_bytes) }?;
        Ok(scratch)
    }
}

/// What every form has.
fn params(attention: &Attention<'_>, tensors: &Tensors) -> AttentionParamsSm90 {
    let shape = attention.problem.shape;
    AttentionParamsSm90 {
        out: tensors.out.address,
        out_strides: tensors.out.strides,
        // All fit: checked by problem.
        heads: shape.num_heads as i32,
        group_size: shape.group_size() as i32,
        head_dim: shape.head_dim as i32,
        score_scale: score_scale(attention.problem.softmax_scale),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_unless_a_graph_may_use_it() -> Result<()> {
        let kept = Kept::<usize, usize>::default();
        for key in 0..MAX_KEPT {
            // The first is captured later, the third as it is made.
            assert_eq!(*kept.get_or_make(key, key == 2, || Ok(key))?, key);
        }
        kept.get_or_make(0, true, || Err(Error::HeadDim { got: 0 }))?;
        for key in 100..100 + 2 * MAX_KEPT {
            kept.get_or_make(key, false, || Ok(key))?;
        }
        for key in [0, 2] {
            assert_eq!(*kept.get_or_make(key, false, || Ok(999))?, key);
        }
        assert_eq!(*kept.get_or_make(1, false, || Ok(999))?, 999);
        assert_eq!(kept.0.lock().unwrap_or_else(PoisonError::into_inner).len(), MAX_KEPT);
        Ok(())
    }
}
