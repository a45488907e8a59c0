//! Packed copies of the tensors of a padded call. They lie in one scratch buffer, one after the
//! other.

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::kernels::params::RowTensor;
use crate::backends::cuda::launcher::Launcher;
use crate::backends::cuda::tensors::copy::{launch_pack, launch_scatter, row_tensor};
use crate::backends::cuda::tensors::key_ranges::PlacedRanges;
use crate::backends::cuda::tensors::lse::{PlacedLse, scatter_lse};
use crate::backends::cuda::tensors::metadata::Tables;
use crate::backends::cuda::tensors::placement::Placed;
use crate::backends::rows::RowShape;
use crate::call::op::Attention;
use crate::dtype::DType;
use crate::error::Result;
use crate::mask::cu_seqlens::CuSeqlens;

use super::call::{PackedRows, Tensors};

/// Parts of the scratch buffer start at multiples of this, as buffers do.
const PART_ALIGNMENT: u64 = 256;

/// One side of a call with metadata, queries or keys.
#[derive(Debug, Clone, Copy)]
struct Side {
    tables: Tables,
    row: RowShape,
    head_dim: usize,
    dtype: DType,
    form: SideForm,
}

/// What the kernel computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SideForm {
    /// Packed copies.
    Copied,
    /// The padded tensors, of which every token is valid.
    Padded,
    /// The same tensors as packed rows, which they are: their batch rows lie one after the other.
    Rows,
}

impl Side {
    /// `are_rows` says whether the padded tensors can be taken for packed ones.
    fn new(attention: &Attention<'_>, tables: Tables, heads: usize, are_rows: bool) -> Self {
        let (head_dim, dtype) = (attention.problem.shape.head_dim, attention.problem.dtype);
        let traits = attention.plan.kernel.traits();
        let form = match tables.is_all_valid {
            true if traits.mixes_padded_and_packed => SideForm::Padded,
            true if traits.takes_valid_sides_as_rows && are_rows => SideForm::Rows,
            _ => SideForm::Copied,
        };
        Self { tables, row: RowShape::new(heads, head_dim, dtype.size()), head_dim, dtype, form }
    }

    fn is_copied(&self) -> bool {
        self.form == SideForm::Copied
    }

    /// Whether the kernel has packed rows, and not padded ones.
    fn is_packed(&self) -> bool {
        self.form != SideForm::Padded
    }

    /// Bytes of one packed tensor, rounded up; 0 if there is none.
    fn packed_bytes(&self) -> u64 {
        let bytes = self.tables.packed_rows as u64 * self.row.bytes();
        if self.is_copied() { bytes.next_multiple_of(PART_ALIGNMENT) } else { 0 }
    }

    /// A packed tensor at the start of `free`, which moves past it.
    fn take(&self, free: &mut u64) -> Placed {
        let address = *free;
        *free += self.packed_bytes();
        Placed::packed(address, self.row.heads, self.head_dim, self.dtype)
    }

    /// The same of the log-sum-exp, `[H, n]` f32.
    fn lse_bytes(&self) -> u64 {
        (4 * (self.tables.packed_rows * self.row.heads) as u64).next_multiple_of(PART_ALIGNMENT)
    }

    fn take_lse(&self, free: &mut u64) -> PlacedLse {
        let address = *free;
        *free += self.lse_bytes();
        // Fits: rows are counted in an i32.
        PlacedLse { address, batch_stride: 0, head_stride: self.tables.packed_rows as i64 }
    }

    fn pair(&self, padded: &Placed, packed: &Placed) -> RowTensor {
        row_tensor(self.row, padded, packed)
    }
}

/// The tensors of a call whose sides are packed, and the scratch that they lie in.
#[derive(Debug)]
pub struct Packing {
    queries: Side,
    keys: Side,
    /// The kernel writes to the padded output itself.
    kernel_scatters: bool,
    padded: Tensors,
    tensors: Tensors,
    /// Lives until the last launch, which keeps its memory.
    _scratch: CudaBuffer,
}

impl Packing {
    /// Packs both sides of a call, but for a side that the kernel reads where it lies.
    pub fn new(
        launcher: &Launcher,
        attention: &Attention<'_>,
        padded: Tensors,
        [query, key]: [Tables; 2],
    ) -> Result<Self> {
        let shape = attention.problem.shape;
        let as_rows = |tensor: &Placed, of: &Tables| tensor.as_rows(of.batch, of.seq);
        // The log-sum-exp of padded queries is [B, H, S], that of packed ones [H, n].
        let query_rows = as_rows(&padded.q, &query).zip(as_rows(&padded.out, &query)).filter(|_| padded.lse.is_none());
        let key_rows = as_rows(&padded.k, &key).zip(as_rows(&padded.v, &key));
        let queries = Side::new(attention, query, shape.num_heads, query_rows.is_some());
        let keys = Side::new(attention, key, shape.num_kv_heads, key_rows.is_some());
        let kernel_scatters = attention.plan.kernel.traits().scatters;
        let query_tensors = if kernel_scatters { 1 } else { 2 };
        let lse_bytes = if padded.lse.is_some() && queries.is_copied() { queries.lse_bytes() } else { 0 };
        let scratch = launcher.scratch(query_tensors * queries.packed_bytes() + 2 * keys.packed_bytes() + lse_bytes)?;
        let (mut free, mut tensors) = (scratch.address(), padded);
        if let (SideForm::Rows, Some((q, out))) = (queries.form, query_rows) {
            (tensors.q, tensors.out) = (q, out);
        }
        if let (SideForm::Rows, Some((k, v))) = (keys.form, key_rows) {
            (tensors.k, tensors.v) = (k, v);
        }
        if queries.is_copied() {
            tensors.q = queries.take(&mut free);
            if !kernel_scatters {
                tensors.out = queries.take(&mut free);
            }
            tensors.lse = padded.lse.map(|_| queries.take_lse(&mut free));
        }
        if keys.is_copied() {
            (tensors.k, tensors.v) = (keys.take(&mut free), keys.take(&mut free));
        }
        let packing = Self { queries, keys, kernel_scatters, padded, tensors, _scratch: scratch };
        packing.pack(launcher, &padded)?;
        Ok(packing)
    }

    fn pack(&self, launcher: &Launcher, padded: &Tensors) -> Result<()> {
        let Self { queries, keys, tensors, .. } = self;
        let q = [queries.pair(&padded.q, &tensors.q)];
        let kv = [keys.pair(&padded.k, &tensors.k), keys.pair(&padded.v, &tensors.v)];
        let is_self_attention = queries.tables.cu_seqlens == keys.tables.cu_seqlens;
        if is_self_attention && queries.is_copied() && keys.is_copied() {
            // All three in one launch.
            let [q] = q;
            let [k, v] = kv;
            return launch_pack(launcher, &[q, k, v], &queries.tables);
        }
        if queries.is_copied() {
            launch_pack(launcher, &q, &queries.tables)?;
        }
        if keys.is_copied() {
            launch_pack(launcher, &kv, &keys.tables)?;
        }
        Ok(())
    }

    /// The tensors to compute on.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// Where the packed rows lie; `lengths` are those of the sequences, where the host knows them,
    /// and `ranges` those of the listed queries.
    pub fn rows<'a>(&self, lengths: Option<[&'a CuSeqlens; 2]>, ranges: Option<PlacedRanges>) -> PackedRows<'a> {
        let Self { queries, keys, .. } = self;
        let (query, key) = (&queries.tables, &keys.tables);
        PackedRows {
            cu_seqlens_q: queries.is_packed().then_some(query.cu_seqlens),
            cu_seqlens_k: keys.is_packed().then_some(key.cu_seqlens),
            batch_order: keys.is_packed().then_some(key.batch_order),
            batch: query.batch,
            queries: query.packed_rows,
            keys: key.packed_rows,
            max_queries: query.max_seqlen,
            lengths,
            ranges: match queries.is_packed() {
                true => ranges,
                false => ranges.map(|ranges| ranges.with_padded_queries(query.seq)),
            },
            scatters: (self.kernel_scatters && queries.is_copied()).then_some(*query),
        }
    }

    /// Scatters the packed output to its padded places, unless the kernel has done so, and the
    /// log-sum-exp.
    pub fn scatter(&self, launcher: &Launcher) -> Result<()> {
        let Self { queries, padded, tensors, .. } = self;
        if !queries.is_copied() {
            return Ok(());
        }
        if !self.kernel_scatters {
            launch_scatter(launcher, &queries.pair(&padded.out, &tensors.out), &queries.tables)?;
        }
        match (&tensors.lse, &padded.lse) {
            (Some(packed), Some(padded)) => scatter_lse(launcher, [packed, padded], queries.row.heads, &queries.tables),
            _ => Ok(()),
        }
    }
}
