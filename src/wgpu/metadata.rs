//! Device copies of masks and metadata, uploaded once and kept with them.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::mask::KeyMask;
use crate::meta::{CuSeqlens, VarlenMeta};

use super::WgpuDevice;

/// Bits of a [`KeyMask`], `[B, row_words]`.
#[derive(Debug)]
pub(super) struct MaskBits {
    pub buffer: wgpu::Buffer,
    pub row_words: u32,
}

/// `VarlenMeta::indices`.
#[derive(Debug)]
pub(super) struct Indices(pub wgpu::Buffer);

/// `VarlenMeta::inv_indices`.
#[derive(Debug)]
pub(super) struct InvIndices(pub wgpu::Buffer);

/// `CuSeqlens::as_slice`.
#[derive(Debug)]
pub(super) struct CuSeqlensCopy(pub wgpu::Buffer);

/// Query tiles of packed sequences: `[first row, rows, sequence, 0]` each, in the order of the rows.
#[derive(Debug, Clone)]
pub(super) struct Tiles {
    pub buffer: wgpu::Buffer,
    /// Tiles of sequence `b` are `first[b]..first[b + 1]`.
    first: Arc<[u32]>,
}

/// Tiles of at most `ROWS` rows, as a type of their own: the cache keeps one value of each type.
#[derive(Debug)]
struct TilesOf<const ROWS: usize>(Tiles);

impl Tiles {
    /// Tiles of a range of sequences.
    pub fn of(&self, sequences: &Range<usize>) -> Range<u32> {
        self.first[sequences.start]..self.first[sequences.end]
    }
}

impl WgpuDevice {
    pub(super) fn mask_bits(&self, mask: &KeyMask) -> Result<Arc<MaskBits>> {
        mask.copies().get_or_make(self.id, || {
            let halves = |word: &u64| [*word as u32, (*word >> 32) as u32];
            let words: Vec<u32> = mask.words().iter().flat_map(halves).collect();
            let row_words = 2 * mask.words_per_row() as u32;
            Ok(MaskBits { buffer: self.uploaded("mask", bytemuck::cast_slice(&words))?, row_words })
        })
    }

    pub(super) fn indices(&self, meta: &VarlenMeta) -> Result<Arc<Indices>> {
        meta.copies()
            .get_or_make(self.id, || self.uploaded("indices", bytemuck::cast_slice(meta.indices())).map(Indices))
    }

    pub(super) fn inv_indices(&self, meta: &VarlenMeta) -> Result<Arc<InvIndices>> {
        meta.copies().get_or_make(self.id, || {
            self.uploaded("inv_indices", bytemuck::cast_slice(meta.inv_indices())).map(InvIndices)
        })
    }

    pub(super) fn cu_seqlens(&self, cu_seqlens: &CuSeqlens) -> Result<Arc<CuSeqlensCopy>> {
        cu_seqlens.copies().get_or_make(self.id, || {
            self.uploaded("cu_seqlens", bytemuck::cast_slice(cu_seqlens.as_slice())).map(CuSeqlensCopy)
        })
    }

    /// Tiles of `rows` rows; a power of two from 16 to 256.
    pub(super) fn tiles(&self, cu_seqlens: &CuSeqlens, rows: usize) -> Result<Tiles> {
        match rows {
            16 => self.tiles_of::<16>(cu_seqlens),
            32 => self.tiles_of::<32>(cu_seqlens),
            64 => self.tiles_of::<64>(cu_seqlens),
            128 => self.tiles_of::<128>(cu_seqlens),
            _ => self.tiles_of::<256>(cu_seqlens),
        }
    }

    fn tiles_of<const ROWS: usize>(&self, cu_seqlens: &CuSeqlens) -> Result<Tiles> {
        let kept = cu_seqlens.copies().get_or_make(self.id, || {
            let mut tiles = Vec::new();
            let mut first = vec![0];
            for sequence in 0..cu_seqlens.batch() {
                let rows = cu_seqlens.rows(sequence);
                tiles.extend(rows.clone().step_by(ROWS).map(|row| {
                    // Rows and sequences fit an i32: CuSeqlens.
                    [row as u32, ROWS.min(rows.end - row) as u32, sequence as u32, 0]
                }));
                first.push(tiles.len() as u32);
            }
            let buffer = self.uploaded("tiles", bytemuck::cast_slice(&tiles))?;
            Ok(TilesOf::<ROWS>(Tiles { buffer, first: first.into() }))
        })?;
        Ok(kept.0.clone())
    }
}
