//! Key ranges on the device: copies of the host's, uploaded once and kept with them.

use std::sync::Arc;

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::kernels::params::KeyRangeParams;
use crate::backends::cuda::launcher::Launcher;
use crate::error::Result;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;

/// `[first, end)` of each query.
#[derive(Debug)]
struct RangesCopy(CudaBuffer);

/// Where a launch finds its ranges. Holds them: those of lists may be evicted at any time.
#[derive(Debug, Clone)]
pub struct PlacedRanges {
    /// Those on the host.
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
