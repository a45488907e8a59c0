//! Copies of host masks and metadata in the buffers of a GPU backend. A copy is uploaded once for
//! each device and kept with what it is a copy of.

use std::any::Any;
use std::sync::Arc;

use crate::cache::DeviceId;
use crate::error::Result;
use crate::host_vec;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

/// Bits of a [`KeyMask`] in u32s, `[B, row_words]`: bit `s % 32` of word `s / 32` is token `s`.
#[derive(Debug)]
pub(super) struct MaskBits<Buffer> {
    pub buffer: Buffer,
    /// u32s of one row.
    pub row_words: u32,
}

/// [`VarlenMeta::indices`].
#[derive(Debug)]
pub(super) struct Indices<Buffer>(pub Buffer);

/// [`VarlenMeta::inv_indices`].
#[derive(Debug)]
pub(super) struct InvIndices<Buffer>(pub Buffer);

impl<Buffer: Any + Send + Sync> MaskBits<Buffer> {
    /// The bits on a device; `upload` makes a buffer that holds the bytes.
    pub fn on(device: DeviceId, mask: &KeyMask, upload: impl FnOnce(&[u8]) -> Result<Buffer>) -> Result<Arc<Self>> {
        mask.copies().get_or_make(device, || {
            // The lower half of a u64 first, so that bits are in the order of tokens in u32s too.
            let halves = |word: &u64| [*word as u32, (*word >> 32) as u32];
            let mut words = host_vec::reserve(2 * mask.words().len())?;
            words.extend(mask.words().iter().flat_map(halves));
            // Fits: a row has at most i32::MAX bits.
            let row_words = 2 * mask.words_per_row() as u32;
            Ok(Self { buffer: upload(bytemuck::cast_slice::<u32, u8>(&words))?, row_words })
        })
    }
}

impl<Buffer: Any + Send + Sync> Indices<Buffer> {
    /// The indices on a device; `upload` makes a buffer that holds the bytes.
    pub fn on(device: DeviceId, meta: &VarlenMeta, upload: impl FnOnce(&[u8]) -> Result<Buffer>) -> Result<Arc<Self>> {
        meta.copies().get_or_make(device, || upload(bytemuck::cast_slice(meta.indices()?)).map(Self))
    }
}

impl<Buffer: Any + Send + Sync> InvIndices<Buffer> {
    /// The inverse indices on a device; `upload` makes a buffer that holds the bytes.
    pub fn on(device: DeviceId, meta: &VarlenMeta, upload: impl FnOnce(&[u8]) -> Result<Buffer>) -> Result<Arc<Self>> {
        meta.copies().get_or_make(device, || upload(bytemuck::cast_slice(meta.inv_indices()?)).map(Self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(bytes: &[u8]) -> Vec<u32> {
        bytes.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])).collect()
    }

    #[test]
    fn bits_are_in_the_order_of_tokens_and_uploaded_once() -> Result<()> {
        let mut keep = vec![false; 2 * 70];
        [0, 31, 32, 69, 70 + 64].iter().for_each(|&at: &usize| keep[at] = true);
        let (mask, device) = (KeyMask::from_bool(2, 70, &keep)?, DeviceId::unique());
        let upload = |bytes: &[u8]| Ok(words(bytes));
        let bits = MaskBits::on(device, &mask, upload)?;
        assert_eq!(bits.row_words, 4);
        assert_eq!(bits.buffer, [1 | 1 << 31, 1, 1 << 5, 0, 0, 0, 1, 0]);
        let again = MaskBits::<Vec<u32>>::on(device, &mask, |_| Ok(Vec::new()))?;
        assert!(Arc::ptr_eq(&bits, &again));
        Ok(())
    }

    #[test]
    fn both_tables_of_one_metadata_are_kept() -> Result<()> {
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(3, &[2, 1])?)?;
        let (device, upload) = (DeviceId::unique(), |bytes: &[u8]| Ok(bytes.to_vec()));
        let indices = Indices::on(device, &meta, upload)?;
        let inv_indices = InvIndices::on(device, &meta, upload)?;
        assert_eq!(words(&indices.0), [0, 1, 3]);
        assert_eq!(words(&inv_indices.0), [0, 1, u32::MAX, 2, u32::MAX, u32::MAX]);
        Ok(())
    }
}
