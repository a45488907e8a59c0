//! Key ranges on the device: copies of the host's, uploaded once and kept with them, and those that
//! the device counts in lists of its own.

use std::sync::Arc;

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{KeyRangeParams, METADATA_THREADS, MetadataRangesParams};
use crate::backends::cuda::launcher::Launcher;
use crate::error::Result;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;

use super::metadata::Tables;

/// `[first, end)` of each query.
#[derive(Debug)]
struct RangesCopy(CudaBuffer);

/// Where a launch finds its ranges. Holds them: those of lists may be evicted at any time.
#[derive(Debug, Clone)]
pub struct PlacedRanges {
    /// Those on the host; of padded queries, where the device alone has the listed ones.
    pub ranges: KeyRanges,
    copy: Arc<RangesCopy>,
    row_stride: i64,
}

impl PlacedRanges {
    /// Of every query of padded tensors; keys are counted as they lie there.
    pub fn padded(launcher: &Launcher, ranges: &KeyRanges) -> Result<Self> {
        let stride = if ranges.distinct_rows() > 1 { ranges.row(0).len() } else { 0 };
        // Fits: ranges are of at most i32::MAX queries.
        Ok(Self { ranges: ranges.clone(), copy: copy(launcher, ranges)?, row_stride: stride as i64 })
    }

    /// Of packed rows.
    pub fn packed(launcher: &Launcher, ranges: &KeyRanges) -> Result<Self> {
        Ok(Self { ranges: ranges.clone(), copy: copy(launcher, ranges)?, row_stride: 0 })
    }

    /// Of the valid queries of padded tensors, one after another; the valid keys of a row are
    /// numbered in order.
    pub fn listed(launcher: &Launcher, ranges: &KeyRanges, query: &VarlenMeta, key: &VarlenMeta) -> Result<Self> {
        let is_captured = launcher.context.is_captured()?;
        Self::packed(launcher, &*ranges.of_packed_rows(query, key, is_captured)?)
    }

    /// The same by tables that the device built: it finds the listed ranges itself, and the host does
    /// not wait for them.
    pub fn listed_by_tables(launcher: &Launcher, ranges: &KeyRanges, [query, key]: &[Tables; 2]) -> Result<Self> {
        let padded = Self::padded(launcher, ranges)?;
        let queries = query.batch * query.seq;
        let listed = launcher.scratch(queries as u64 * size_of::<[u32; 2]>() as u64)?;
        let params = MetadataRangesParams {
            ranges: padded.params(),
            listed: listed.address(),
            cu_seqlens_q: query.cu_seqlens,
            cu_seqlens_k: key.cu_seqlens,
            indices_q: query.indices,
            indices_k: key.indices,
            // All fit: batch · seq does.
            batch: query.batch as i32,
            seq_q: query.seq as i32,
            seq_k: key.seq as i32,
            unused: 0,
        };
        if queries > 0 {
            let function = launcher.function(Entry::MetadataRanges)?;
            let blocks = queries.div_ceil(METADATA_THREADS as usize) as u32;
            // SAFETY: the ranges are of every padded query of the call (checked by problem), the tables
            // of its batch rows, and the memory has room for a range of each query.
            unsafe { launcher.launch(function, [blocks, 1, 1], METADATA_THREADS, &params) }?;
        }
        Ok(Self { copy: Arc::new(RangesCopy(listed)), row_stride: 0, ..padded })
    }

    /// Listed ranges where the queries are read as they are padded, `seq` a row, all of them valid.
    pub fn with_padded_queries(self, seq: usize) -> Self {
        // Fits: checked by problem.
        Self { row_stride: seq as i64, ..self }
    }

    /// What the kernels are given.
    pub fn params(&self) -> KeyRangeParams {
        KeyRangeParams { ranges: self.copy.0.address(), row_stride: self.row_stride }
    }
}

fn copy(launcher: &Launcher, ranges: &KeyRanges) -> Result<Arc<RangesCopy>> {
    ranges
        .copies()
        .get_or_make(launcher.id, || Ok(RangesCopy(launcher.uploaded(bytemuck::cast_slice(ranges.distinct()))?)))
}
