//! Metadata that stands for a key mask: every query, and the keys that the mask keeps. With it a call that computes every query
//! row takes the paths of metadata, which cost what the mask keeps.

use std::sync::Arc;

use crate::cache::DeviceId;
use crate::error::Result;
use crate::fifo_cache::FifoCache;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

/// Both sides of a call under a key mask.
#[derive(Debug)]
pub(crate) struct EveryQuery {
    /// `[B, Sq]`, every query valid.
    pub query: VarlenMeta,
    /// `[B, Sk]`: the kept keys.
    pub key: VarlenMeta,
}

/// Kept with the mask, by the number of queries.
type ByQueries = FifoCache<usize, EveryQuery>;

impl KeyMask {
    /// The metadata of calls with `seq_q` queries in each batch row; made at the first of them, and kept as long as the mask: a
    /// captured graph may hold addresses of its copies.
    pub(crate) fn every_query(&self, seq_q: usize) -> Result<Arc<EveryQuery>> {
        // Among the mask's copies, as that of the host: a mask cannot name what holds a mask. A clone of it starts without any.
        let made = self.copies().get_or_make(DeviceId::CPU, || Ok(ByQueries::default()))?;
        made.get_or_make(seq_q, true, || {
            let query = VarlenMeta::from_key_mask(&Self::all(self.batch(), seq_q)?)?;
            Ok(EveryQuery { query, key: VarlenMeta::from_key_mask(self)? })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_for_each_number_of_queries() -> Result<()> {
        let mask = KeyMask::from_lengths(5, &[3, 0])?;
        let metas = mask.every_query(7)?;
        assert!(metas.query.is_all_valid() && (metas.query.batch(), metas.query.seq()) == (2, 7));
        assert_eq!(metas.key.key_mask(), &mask);
        assert_eq!(mask.every_query(7)?.key.id(), metas.key.id());
        assert_ne!(mask.every_query(5)?.query.id(), metas.query.id());
        Ok(())
    }
}
