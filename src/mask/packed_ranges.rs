//! Key ranges of padded tensors, as those of the packed rows that metadata makes of them.

use std::sync::Arc;

use crate::error::Result;
use crate::host_vec::reserve;
use crate::mask::key_ranges::{KeyRanges, RangesOf};
use crate::mask::meta::VarlenMeta;
use crate::mask::ranks::Ranks;

impl KeyRanges {
    /// The ranges of the packed rows of padded tensors, among which the valid keys of a row are numbered in order. Made once for
    /// each pair of metadata.
    ///
    /// `pin` keeps them from being evicted: a captured graph may hold the addresses of their copy.
    pub(crate) fn of_packed_rows(&self, query: &VarlenMeta, key: &VarlenMeta, pin: bool) -> Result<Arc<Self>> {
        self.packed().get_or_make([query.id(), key.id()], pin, || {
            let ranks = Ranks::new(key.key_mask())?;
            let mut ranges = reserve(query.total_valid())?;
            for b in 0..query.batch() {
                let own = self.row(b);
                for run in query.runs(b) {
                    let numbers = |range: &[u32; 2]| range.map(|position| ranks.of(b, position));
                    ranges.extend(own[run.start as usize..run.end()].iter().map(numbers));
                }
            }
            Ok(Self::new(RangesOf::from((query.cu_seqlens(), key.cu_seqlens())), ranges, false))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::key_mask::KeyMask;

    /// Ranges of padded tensors, of the packed rows of their metadata: valid keys are numbered in order.
    #[test]
    fn packed_rows_of_padded_tensors() -> Result<()> {
        let meta = |bits: &[u8]| VarlenMeta::from_key_mask(&KeyMask::from_integers(2, 4, bits)?);
        let (query, key) = (meta(&[1, 0, 1, 1, 0, 1, 0, 0])?, meta(&[0, 1, 1, 0, 1, 0, 0, 1])?);
        let packed = KeyRanges::causal([2, 4, 4])?.of_packed_rows(&query, &key, false)?;
        assert_eq!((packed.row(0), packed.row(1)), (&[[0, 0], [0, 2], [0, 2]][..], &[[0, 1]][..]));
        packed.expect_packed(query.cu_seqlens(), key.cu_seqlens())
    }
}
