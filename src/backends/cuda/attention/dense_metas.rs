//! Metadata that stands for the masks of a dense call, which then costs what it keeps.

use std::sync::Arc;

use crate::backends::cuda::launcher::Launcher;
use crate::call::problem::AttentionShape;
use crate::error::Result;
use crate::fifo_cache::FifoCache;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

/// Kept with one of the masks, by the lengths of both sides and whether the keys are masked.
type DenseMetas = FifoCache<(usize, usize, bool), DenseMeta>;

/// Every query, and the kept keys or every key.
#[derive(Debug)]
pub struct DenseMeta {
    pub query: VarlenMeta,
    pub key: VarlenMeta,
}

impl DenseMeta {
    /// For the masks of a call, made if it is not there yet; nothing if there are none.
    pub fn of(
        launcher: &Launcher,
        shape: &AttentionShape,
        key_mask: Option<&KeyMask>,
        zero_rows: Option<&KeyMask>,
    ) -> Result<Option<Arc<Self>>> {
        let Some(mask) = key_mask.or(zero_rows) else { return Ok(None) };
        let &AttentionShape { batch, seq_q, seq_k, .. } = shape;
        let metas = mask.copies().get_or_make(launcher.id, || Ok(DenseMetas::default()))?;
        let is_captured = launcher.context.is_captured()?;
        let meta = metas.get_or_make((seq_q, seq_k, key_mask.is_some()), is_captured, || {
            let every = |seq| VarlenMeta::from_key_mask(&KeyMask::all(batch, seq)?);
            let key = key_mask.map_or_else(|| every(seq_k), VarlenMeta::from_key_mask)?;
            Ok(Self { query: every(seq_q)?, key })
        })?;
        Ok(Some(meta))
    }
}
