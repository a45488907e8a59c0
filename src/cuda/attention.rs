//! Launches of the attention kernel: dense, on packed rows, and the packed path of padded tensors.

use std::f32::consts::LOG2_E;

use crate::backend::{Attention, Rows};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::mask::KeyMask;
use crate::meta::CuSeqlens;
use crate::plan::Path;
use crate::problem::AttentionShape;

use super::copy::RowShape;
use super::device::CudaDevice;
use super::memory::CudaBuffer;
use super::metadata::Tables;
use super::module::Entry;
use super::params::{AttentionParams, RowTensor};
use super::placement::{Placed, WORD_BYTES};
use super::tiles::Tile;

/// Blocks in the second and third dimension of a grid.
const MAX_GRID: usize = 65_535;
/// Parts of one scratch buffer start at multiples of this, as buffers do.
const PART_ALIGNMENT: u64 = 256;

/// Placed tensors of one launch.
#[derive(Clone, Copy)]
struct Tensors {
    q: Placed,
    k: Placed,
    v: Placed,
    out: Placed,
}

/// The extent of a launch.
struct Extent {
    batch: usize,
    /// Rows of the longest query sequence.
    max_queries: usize,
    masked: bool,
}

/// One side of a call with metadata, queries or keys: if every token is valid, its padded tensors are taken as they are.
#[derive(Clone, Copy)]
struct Side {
    tables: Tables,
    row: RowShape,
    head_dim: usize,
    dtype: DType,
}

impl Side {
    fn is_packed(&self) -> bool {
        !self.tables.is_all_valid
    }

    /// Bytes of one packed tensor, rounded up; 0 if there is none.
    fn packed_bytes(&self) -> u64 {
        let bytes = (self.tables.packed_rows * self.row.words()) as u64 * WORD_BYTES;
        if self.is_packed() { bytes.next_multiple_of(PART_ALIGNMENT) } else { 0 }
    }

    /// A packed tensor at the start of `free`, which moves on past it.
    fn take(&self, free: &mut u64) -> Placed {
        let address = *free;
        *free += self.packed_bytes();
        Placed::packed(address, self.row.heads, self.head_dim, self.dtype)
    }
}

impl CudaDevice {
    pub(super) fn attend(&self, attention: &Attention<'_>) -> Result<()> {
        let heads = attention.problem.shape.num_heads;
        if heads > MAX_GRID {
            let (limit_name, limit) = ("heads in a CUDA grid's second dimension", MAX_GRID as u64);
            return Err(Error::TooLarge { argument: "q", limit_name, limit, got: heads as u64 });
        }
        let mut scratch = Vec::new();
        // The output first: one that is refused is refused before anything is launched.
        let out = self.output("out", &attention.out)?.place_output()?;
        let q = self.place_input(&self.input("q", &attention.q)?, &mut scratch)?;
        let k = self.place_input(&self.input("k", &attention.k)?, &mut scratch)?;
        let v = self.place_input(&self.input("v", &attention.v)?, &mut scratch)?;
        let tensors = Tensors { q, k, v, out };
        match &attention.rows {
            Rows::Dense { key_mask, zero_rows, .. } => self.attend_dense(attention, tensors, *key_mask, *zero_rows),
            Rows::Packed { query, key } => self.attend_packed(attention, tensors, query, key),
            Rows::Varlen { query, key } => {
                let tables = [self.host_tables(query)?, self.host_tables(key)?];
                self.attend_varlen(attention, tensors, tables, std::ptr::eq(*query, *key))
            }
            Rows::DeviceVarlen { query, key } if attention.plan.path == Path::Dense => {
                let mut params = params(attention, &tensors);
                (params.row_bits, params.row_words) = self.device_bits(query)?;
                (params.key_bits, params.key_words) = self.device_bits(key)?;
                let extent = Extent { batch: query.batch, max_queries: query.seq, masked: true };
                self.launch_attention(attention, &params, &extent)
            }
            Rows::DeviceVarlen { query, key } => {
                let tables = [self.device_tables(query)?, self.device_tables(key)?];
                let is_self = tables[0].cu_seqlens == tables[1].cu_seqlens;
                self.attend_varlen(attention, tensors, tables, is_self)
            }
        }
    }

    fn attend_dense(
        &self,
        attention: &Attention<'_>,
        tensors: Tensors,
        key_mask: Option<&KeyMask>,
        zero_rows: Option<&KeyMask>,
    ) -> Result<()> {
        let shape = attention.problem.shape;
        let mut params = params(attention, &tensors);
        let bits = |mask: Option<&KeyMask>| mask.map(|mask| self.mask_bits(mask)).transpose();
        let (key_bits, row_bits) = (bits(key_mask)?, bits(zero_rows)?);
        if let Some(bits) = &key_bits {
            (params.key_bits, params.key_words) = (bits.buffer.address(), bits.row_words);
        }
        if let Some(bits) = &row_bits {
            (params.row_bits, params.row_words) = (bits.buffer.address(), bits.row_words);
        }
        if let Rows::Dense { bias: Some(bias), .. } = &attention.rows {
            let bias = self.input("bias", bias)?;
            params.bias = bias.address();
            params.bias_is_f32 = i32::from(bias.dtype == DType::F32);
            // Every stride fits: layouts end below an eighth of the range.
            params.bias_strides.iter_mut().zip(bias.layout.strides()).for_each(|(slot, &stride)| *slot = stride as i64);
        }
        let masked = params.key_bits != 0 || params.row_bits != 0 || params.bias != 0;
        let extent = Extent { batch: shape.batch, max_queries: shape.seq_q, masked };
        self.launch_attention(attention, &params, &extent)
    }

    fn attend_packed(
        &self,
        attention: &Attention<'_>,
        tensors: Tensors,
        query: &CuSeqlens,
        key: &CuSeqlens,
    ) -> Result<()> {
        let (cu_seqlens_q, cu_seqlens_k) = (self.cu_seqlens(query)?, self.cu_seqlens(key)?);
        let mut params = AttentionParams {
            cu_seqlens_q: cu_seqlens_q.address(),
            cu_seqlens_k: cu_seqlens_k.address(),
            batch_order: cu_seqlens_k.order(),
            ..params(attention, &tensors)
        };
        if let Some(lse) = &attention.lse {
            let lse = self.output("lse", lse)?;
            params.lse = lse.address();
            // Its tokens are contiguous: checked by problem, as of every output's last dimension.
            params.lse_head_stride = lse.layout.strides().first().map_or(0, |&stride| stride as i64);
        }
        let extent = Extent { batch: query.batch(), max_queries: query.max_seqlen(), masked: false };
        self.launch_attention(attention, &params, &extent)
    }

    /// Pack, attention on the packed rows, scatter, through scratch. A side on which every token is valid stays as it is.
    fn attend_varlen(
        &self,
        attention: &Attention<'_>,
        mut tensors: Tensors,
        [query, key]: [Tables; 2],
        is_self_attention: bool,
    ) -> Result<()> {
        let AttentionShape { batch, num_heads, num_kv_heads, head_dim, .. } = attention.problem.shape;
        let dtype = attention.problem.dtype;
        let side = |tables, heads| Side { tables, row: RowShape::new(heads, head_dim, dtype.size()), head_dim, dtype };
        let (queries, keys) = (side(query, num_heads), side(key, num_kv_heads));
        // Lives until the last launch; the work that is launched by then keeps its memory.
        let scratch: CudaBuffer = self.scratch(2 * queries.packed_bytes() + 2 * keys.packed_bytes())?;
        let mut free = scratch.address();
        let padded_out = tensors.out;

        let mut q_rows: Option<RowTensor> = None;
        let mut kv_rows: Option<[RowTensor; 2]> = None;
        if queries.is_packed() {
            let packed = queries.take(&mut free);
            q_rows = Some(queries.row.tensor(&tensors.q, &packed));
            tensors.q = packed;
            tensors.out = queries.take(&mut free);
        }
        if keys.is_packed() {
            let (packed_k, packed_v) = (keys.take(&mut free), keys.take(&mut free));
            kv_rows = Some([keys.row.tensor(&tensors.k, &packed_k), keys.row.tensor(&tensors.v, &packed_v)]);
            (tensors.k, tensors.v) = (packed_k, packed_v);
        }
        match (q_rows, kv_rows) {
            // All three in one launch.
            (Some(q), Some([k, v])) if is_self_attention => self.launch_pack(&[q, k, v], &query)?,
            (q, kv) => {
                q.map_or(Ok(()), |q| self.launch_pack(&[q], &query))?;
                kv.map_or(Ok(()), |kv| self.launch_pack(&kv, &key))?;
            }
        }

        let mut params = params(attention, &tensors);
        if queries.is_packed() {
            params.cu_seqlens_q = query.cu_seqlens;
        }
        if keys.is_packed() {
            (params.cu_seqlens_k, params.batch_order) = (key.cu_seqlens, key.batch_order);
        }
        let extent = Extent { batch, max_queries: query.max_seqlen, masked: false };
        self.launch_attention(attention, &params, &extent)?;
        if queries.is_packed() {
            self.launch_scatter(queries.row, &tensors.out, &padded_out, &query)?;
        }
        Ok(())
    }

    fn launch_attention(&self, attention: &Attention<'_>, params: &AttentionParams, extent: &Extent) -> Result<()> {
        let AttentionShape { num_heads, head_dim, .. } = attention.problem.shape;
        let &Extent { batch, max_queries, masked } = extent;
        let Some(tile) = Tile::of(head_dim) else { return Err(Error::HeadDim { got: head_dim }) };
        if max_queries == 0 || num_heads == 0 {
            return Ok(());
        }
        let function = self.function(Entry::Attention { dtype: attention.problem.dtype, tile, masked })?;
        // Both fit: a sequence has at most i32::MAX rows, and the number of heads was checked.
        let (tiles, heads) = (max_queries.div_ceil(tile.rows as usize) as u32, num_heads as u32);
        // The order is of the whole batch.
        let batch_order = if batch > MAX_GRID { 0 } else { params.batch_order };
        for first in (0..batch).step_by(MAX_GRID) {
            let grid = [tiles, heads, (batch - first).min(MAX_GRID) as u32];
            let params = AttentionParams { batch_order, ..params.after_batch_rows(first) };
            // SAFETY: the tensors have the problem's shape and lie inside their buffers, those of packed rows as `cu_seqlens`
            // says (checked by problem; scratch is made so), and their rows start at words (placement). Masks, `cu_seqlens` and
            // the bias have the problem's batch rows. The output shares no memory with them (checked by problem).
            unsafe { self.context.launch(function, grid, tile.threads(), &params) }?;
        }
        Ok(())
    }
}

/// Parameters of a dense call without a mask.
fn params(attention: &Attention<'_>, Tensors { q, k, v, out }: &Tensors) -> AttentionParams {
    let shape = attention.problem.shape;
    AttentionParams {
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
        score_scale: score_scale(attention.problem.softmax_scale),
        ..Default::default()
    }
}

/// The kernel scales after it has put −∞ in place of masked scores, and 0 · −∞ is no number: for 0 a scale that makes every score
/// vanish in the exponential does.
fn score_scale(softmax_scale: f32) -> f32 {
    let scale = softmax_scale * LOG2_E;
    if scale == 0.0 { f32::MIN_POSITIVE } else { scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_scale_is_zero() {
        assert_eq!(score_scale(1.0), LOG2_E);
        assert_eq!(score_scale(-0.25), -0.25 * LOG2_E);
        assert_eq!(score_scale(0.0), f32::MIN_POSITIVE);
        assert_eq!(score_scale(-0.0), f32::MIN_POSITIVE);
    }
}
