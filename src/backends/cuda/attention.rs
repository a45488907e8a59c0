//! Attention calls: which kernel they go to, and the packed path of padded tensors, which is the same for every kernel.

use std::f32::consts::LOG2_E;

use crate::backends::rows::RowShape;
use crate::call::op::{Attention, Rows};
use crate::call::plan::Path;
use crate::call::problem::AttentionShape;
use crate::dtype::DType;
use crate::error::Result;
use crate::mask::meta::CuSeqlens;

use super::copy::row_tensor;
use super::device::CudaDevice;
use super::memory::CudaBuffer;
use super::metadata::Tables;
use super::params::RowTensor;
use super::placement::Placed;

/// Parts of one scratch buffer start at multiples of this, as buffers do.
const PART_ALIGNMENT: u64 = 256;

/// Placed tensors of one launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tensors {
    pub q: Placed,
    pub k: Placed,
    pub v: Placed,
    pub out: Placed,
}

/// Where packed rows lie. A side without `cu_seqlens` is padded, with a batch row for each sequence.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PackedRows<'a> {
    pub cu_seqlens_q: Option<u64>,
    pub cu_seqlens_k: Option<u64>,
    /// Address of the sequences' order, the longest first.
    pub batch_order: Option<u64>,
    /// Sequences.
    pub batch: usize,
    /// Rows of all sequences, or as many as there may be.
    pub queries: usize,
    pub keys: usize,
    /// Rows of the longest query sequence, as far as the host knows.
    pub max_queries: usize,
    /// How long the sequences are, queries and keys, where the host knows.
    pub lengths: Option<[&'a CuSeqlens; 2]>,
    /// Address of `[H, total_q]` f32, and elements from head to head.
    pub lse: Option<(u64, i64)>,
    /// The queries' tables where the output is padded: rows go to their places in it, and the others become zeros.
    pub scatters: Option<Tables>,
}

/// One side of a call with metadata, queries or keys.
#[derive(Debug, Clone, Copy)]
struct Side {
    tables: Tables,
    row: RowShape,
    head_dim: usize,
    dtype: DType,
    is_packed: bool,
}

impl Side {
    /// Bytes of one packed tensor, rounded up; 0 if there is none.
    fn packed_bytes(&self) -> u64 {
        let bytes = self.tables.packed_rows as u64 * self.row.bytes();
        if self.is_packed { bytes.next_multiple_of(PART_ALIGNMENT) } else { 0 }
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
        let mut scratch = Vec::new();
        // The output first: one that is refused is refused before anything is launched.
        let out = self.output("out", &attention.out)?.place_output()?;
        let by_lists = attention.plan.kernel.works_by_tile_lists();
        let mut place = |name, input| {
            let operand = self.input(name, input)?;
            match by_lists {
                true => self.place_input_for_maps(&operand, &mut scratch),
                false => self.place_input(&operand, &mut scratch),
            }
        };
        let (q, k, v) = (place("q", &attention.q)?, place("k", &attention.k)?, place("v", &attention.v)?);
        let tensors = Tensors { q, k, v, out };
        match &attention.rows {
            Rows::Dense { key_mask, zero_rows, .. } if by_lists => {
                self.attend_dense_by_lists(attention, &tensors, *key_mask, *zero_rows)
            }
            Rows::Dense { key_mask, zero_rows, bias } => {
                self.attend_dense_sm80(attention, &tensors, *key_mask, *zero_rows, bias.as_ref())
            }
            Rows::Packed { query, key } => {
                let (query_rows, key_rows) = (self.cu_seqlens(query)?, self.cu_seqlens(key)?);
                let mut rows = PackedRows {
                    cu_seqlens_q: Some(query_rows.address()),
                    cu_seqlens_k: Some(key_rows.address()),
                    batch_order: Some(key_rows.order()),
                    batch: query.batch(),
                    queries: query.total(),
                    keys: key.total(),
                    max_queries: query.max_seqlen(),
                    lengths: Some([query, key]),
                    lse: None,
                    scatters: None,
                };
                if let Some(lse) = &attention.lse {
                    let lse = self.output("lse", lse)?;
                    // Its tokens are contiguous: checked by problem, as of every output's last dimension.
                    let head_stride = lse.layout.strides().first().map_or(0, |&stride| stride as i64);
                    rows.lse = Some((lse.address(), head_stride));
                }
                self.attend_packed(attention, &tensors, &rows)
            }
            Rows::Varlen { query, key } if attention.plan.path == Path::Fused && by_lists => {
                self.attend_fused_by_lists(attention, &tensors, query, key)
            }
            Rows::Varlen { query, key } => {
                let tables = [self.host_tables(query)?, self.host_tables(key)?];
                if attention.plan.path == Path::Fused {
                    return self.attend_fused_sm80(attention, &tensors, &tables);
                }
                let lengths = Some([query.cu_seqlens(), key.cu_seqlens()]);
                self.attend_varlen(attention, tensors, tables, lengths, std::ptr::eq(*query, *key))
            }
            Rows::DeviceVarlen { query, key } if attention.plan.path == Path::Dense => {
                self.attend_dense_with_tables_sm80(attention, &tensors, query, key)
            }
            Rows::DeviceVarlen { query, key } => {
                let tables = [self.device_tables(query)?, self.device_tables(key)?];
                if attention.plan.path == Path::Fused {
                    return self.attend_fused_sm80(attention, &tensors, &tables);
                }
                let is_self_attention = tables[0].cu_seqlens == tables[1].cu_seqlens;
                self.attend_varlen(attention, tensors, tables, None, is_self_attention)
            }
        }
    }

    fn attend_packed(&self, attention: &Attention<'_>, tensors: &Tensors, rows: &PackedRows<'_>) -> Result<()> {
        match attention.plan.kernel {
            kernel if kernel.works_by_tile_lists() => self.attend_packed_by_lists(attention, tensors, rows),
            _ => self.attend_packed_sm80(attention, tensors, rows),
        }
    }

    /// Pack, attention on the packed rows, scatter, through scratch. The sm90 kernel scatters its output itself.
    fn attend_varlen(
        &self,
        attention: &Attention<'_>,
        mut tensors: Tensors,
        [query, key]: [Tables; 2],
        lengths: Option<[&CuSeqlens; 2]>,
        is_self_attention: bool,
    ) -> Result<()> {
        let AttentionShape { batch, num_heads, num_kv_heads, head_dim, .. } = attention.problem.shape;
        let dtype = attention.problem.dtype;
        let traits = attention.plan.kernel.traits();
        let takes_padded = traits.mixes_padded_and_packed;
        let scatters = traits.scatters;
        let side = |tables: Tables, heads| Side {
            tables,
            row: RowShape::new(heads, head_dim, dtype.size()),
            head_dim,
            dtype,
            is_packed: !(tables.is_all_valid && takes_padded),
        };
        let (queries, keys) = (side(query, num_heads), side(key, num_kv_heads));
        // Lives until the last launch; the work that is launched by then keeps its memory.
        let query_tensors = if scatters { 1 } else { 2 };
        let scratch: CudaBuffer = self.scratch(query_tensors * queries.packed_bytes() + 2 * keys.packed_bytes())?;
        let mut free = scratch.address();
        let padded_out = tensors.out;

        let mut q_rows: Option<RowTensor> = None;
        let mut kv_rows: Option<[RowTensor; 2]> = None;
        if queries.is_packed {
            let packed = queries.take(&mut free);
            q_rows = Some(row_tensor(queries.row, &tensors.q, &packed));
            tensors.q = packed;
            if !scatters {
                tensors.out = queries.take(&mut free);
            }
        }
        if keys.is_packed {
            let (packed_k, packed_v) = (keys.take(&mut free), keys.take(&mut free));
            kv_rows = Some([row_tensor(keys.row, &tensors.k, &packed_k), row_tensor(keys.row, &tensors.v, &packed_v)]);
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

        let rows = PackedRows {
            cu_seqlens_q: queries.is_packed.then_some(query.cu_seqlens),
            cu_seqlens_k: keys.is_packed.then_some(key.cu_seqlens),
            batch_order: keys.is_packed.then_some(key.batch_order),
            batch,
            queries: query.packed_rows,
            keys: key.packed_rows,
            max_queries: query.max_seqlen,
            lengths,
            lse: None,
            scatters: scatters.then_some(query),
        };
        self.attend_packed(attention, &tensors, &rows)?;
        if queries.is_packed && !scatters {
            self.launch_scatter(queries.row, &tensors.out, &padded_out, &query)?;
        }
        Ok(())
    }
}

/// `softmax_scale` · log2(e). Kernels scale after they have put −∞ in place of masked scores, and 0 · −∞ is no number: for 0 a
/// scale that makes every score vanish in the exponential does.
pub(super) fn score_scale(softmax_scale: f32) -> f32 {
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
