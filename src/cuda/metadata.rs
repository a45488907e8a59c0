//! Device copies of masks and metadata, uploaded once and kept with them.

use std::sync::Arc;

use crate::error::Result;
use crate::mask::KeyMask;
use crate::meta::{CuSeqlens, VarlenMeta};

use super::device::CudaDevice;
use super::memory::CudaBuffer;

/// Bits of a [`KeyMask`], `[B, row_words]`.
#[derive(Debug)]
pub(super) struct MaskBits {
    pub buffer: CudaBuffer,
    /// u32s of one row.
    pub row_words: i32,
}

/// `VarlenMeta::indices`.
#[derive(Debug)]
pub(super) struct Indices(pub CudaBuffer);

/// `VarlenMeta::inv_indices`.
#[derive(Debug)]
pub(super) struct InvIndices(pub CudaBuffer);

/// `CuSeqlens::as_slice`.
#[derive(Debug)]
pub(super) struct CuSeqlensCopy(pub CudaBuffer);

impl CudaDevice {
    pub(super) fn mask_bits(&self, mask: &KeyMask) -> Result<Arc<MaskBits>> {
        mask.copies().get_or_make(self.id, || {
            // The lower half of a word first, which is bit order in u32s.
            let halves = |word: &u64| [*word as u32, (*word >> 32) as u32];
            let words: Vec<u32> = mask.words().iter().flat_map(halves).collect();
            // Fits: a row has at most i32::MAX bits.
            let row_words = 2 * mask.words_per_row() as i32;
            Ok(MaskBits { buffer: self.uploaded(bytemuck::cast_slice(&words))?, row_words })
        })
    }

    pub(super) fn indices(&self, meta: &VarlenMeta) -> Result<Arc<Indices>> {
        meta.copies().get_or_make(self.id, || self.uploaded(bytemuck::cast_slice(meta.indices())).map(Indices))
    }

    pub(super) fn inv_indices(&self, meta: &VarlenMeta) -> Result<Arc<InvIndices>> {
        meta.copies().get_or_make(self.id, || self.uploaded(bytemuck::cast_slice(meta.inv_indices())).map(InvIndices))
    }

    pub(super) fn cu_seqlens(&self, cu_seqlens: &CuSeqlens) -> Result<Arc<CuSeqlensCopy>> {
        let upload = || self.uploaded(bytemuck::cast_slice(cu_seqlens.as_slice())).map(CuSeqlensCopy);
        cu_seqlens.copies().get_or_make(self.id, upload)
    }

    /// New memory that holds the bytes.
    fn uploaded(&self, bytes: &[u8]) -> Result<CudaBuffer> {
        CudaBuffer::holding(&self.context, self.id, bytes)
    }
}
