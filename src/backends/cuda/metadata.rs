//! Masks and metadata on the device: copies of the host's, uploaded once and kept with them, and tables that the device builds.

use std::sync::Arc;

use crate::backends::metadata::{Indices, InvIndices, MaskBits};
use crate::call::op::{DeviceTables, MaskInput};
use crate::error::{Error, Result};
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::{CuSeqlens, VarlenMeta};

use super::device::CudaDevice;
use super::memory::CudaBuffer;
use super::module::Entry;
use super::params::{METADATA_CHUNK, MetadataParams};

/// Threads of a block of the metadata kernels; `THREADS` and `SCAN_THREADS` of metadata.cu.
const THREADS: u32 = 256;
const SCAN_THREADS: u32 = 1024;
/// Tables of one buffer start at multiples of this, as buffers do.
const TABLE_ALIGNMENT: u64 = 256;

/// `CuSeqlens::as_slice`, and after it the sequences' order.
#[derive(Debug)]
pub(super) struct CuSeqlensCopy {
    buffer: CudaBuffer,
    order_offset: u64,
}

impl CuSeqlensCopy {
    /// Address of `[B + 1]` values.
    pub fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Address of the `[B]` sequences, the longest first.
    pub fn order(&self) -> u64 {
        self.buffer.address() + self.order_offset
    }
}

/// Addresses of the metadata of one side of a call, queries or keys. They outlive the handles: the metadata keeps its copies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tables {
    pub cu_seqlens: u64,
    pub batch_order: u64,
    pub indices: u64,
    pub inv_indices: u64,
    pub batch: usize,
    pub seq: usize,
    /// Packed rows, as far as the host knows: at least as many as there are.
    pub packed_rows: usize,
    /// Rows of the longest sequence, likewise.
    pub max_seqlen: usize,
    pub is_all_valid: bool,
}

impl CudaDevice {
    pub(super) fn mask_bits(&self, mask: &KeyMask) -> Result<Arc<MaskBits<CudaBuffer>>> {
        MaskBits::on(self.id, mask, |bytes| self.uploaded(bytes))
    }

    /// Tables of metadata that the host built.
    pub(super) fn host_tables(&self, meta: &VarlenMeta) -> Result<Tables> {
        let upload = |bytes: &[u8]| self.uploaded(bytes);
        let cu_seqlens = self.cu_seqlens(meta.cu_seqlens())?;
        Ok(Tables {
            cu_seqlens: cu_seqlens.address(),
            batch_order: cu_seqlens.order(),
            indices: Indices::on(self.id, meta, upload)?.0.address(),
            inv_indices: InvIndices::on(self.id, meta, upload)?.0.address(),
            batch: meta.batch(),
            seq: meta.seq(),
            packed_rows: meta.total_valid(),
            max_seqlen: meta.max_seqlen(),
            is_all_valid: meta.is_all_valid(),
        })
    }

    pub(super) fn cu_seqlens(&self, cu_seqlens: &CuSeqlens) -> Result<Arc<CuSeqlensCopy>> {
        cu_seqlens.copies().get_or_make(self.id, || {
            let values = cu_seqlens.as_slice();
            let order_offset = size_of_val(values) as u64;
            let buffer = self.uploaded(bytemuck::cast_slice(&[values, &longest_first(values)].concat()))?;
            Ok(CuSeqlensCopy { buffer, order_offset })
        })
    }

    /// New memory that holds the bytes.
    pub(super) fn uploaded(&self, bytes: &[u8]) -> Result<CudaBuffer> {
        CudaBuffer::holding(&self.context, self.id, bytes)
    }

    /// Tables for masks of a size, in which no token is valid.
    pub(super) fn empty_metadata(&self, batch: usize, seq: usize) -> Result<CudaBuffer> {
        let places = Places::of(batch, seq);
        let buffer = self.lasting(places.bytes)?;
        // SAFETY: the buffer is new and as large.
        unsafe { self.context.fill(buffer.address(), 0, places.bytes) }?;
        let inv_indices = buffer.address() + places.inv_indices;
        // SAFETY: the table lies inside the buffer. 255 is every byte of −1.
        unsafe { self.context.fill(inv_indices, 255, 4 * (batch * seq) as u64) }?;
        Ok(buffer)
    }

    /// Tables that the device built.
    pub(super) fn device_tables(&self, tables: &DeviceTables<'_>) -> Result<Tables> {
        let &DeviceTables { memory, batch, seq } = tables;
        let (start, places) = (self.source(memory)?.address(), Places::of(batch, seq));
        Ok(Tables {
            cu_seqlens: start + places.cu_seqlens,
            batch_order: start + places.batch_order,
            indices: start + places.indices,
            inv_indices: start + places.inv_indices,
            batch,
            seq,
            packed_rows: batch * seq,
            max_seqlen: seq,
            is_all_valid: false,
        })
    }

    /// Address of the bits of valid tokens in tables that the device built, and u32s of a row of them.
    pub(super) fn device_bits(&self, tables: &DeviceTables<'_>) -> Result<(u64, i32)> {
        let places = Places::of(tables.batch, tables.seq);
        Ok((self.source(tables.memory)?.address() + places.bits, places.row_words as i32))
    }

    pub(super) fn build_metadata(&self, mask: &MaskInput<'_>, tables: &DeviceTables<'_>) -> Result<()> {
        let (batch, seq) = (tables.batch, tables.seq);
        if batch * seq == 0 {
            return Ok(());
        }
        let element_bytes = mask.element_bytes as u64;
        let address = self.source(mask.memory)?.address() + mask.layout.offset() * element_bytes;
        if !address.is_multiple_of(element_bytes) {
            return Err(Error::Misaligned { argument: "mask", expected: element_bytes, got: address % element_bytes });
        }
        let (start, places) = (self.source(tables.memory)?.address(), Places::of(batch, seq));
        let strides = mask.layout.strides();
        let params = MetadataParams {
            mask: address,
            // Both fit: layouts end below an eighth of the range.
            mask_batch_stride: strides[0] as i64,
            mask_token_stride: strides[1] as i64,
            cu_seqlens: start + places.cu_seqlens,
            batch_order: start + places.batch_order,
            indices: start + places.indices,
            inv_indices: start + places.inv_indices,
            bits: start + places.bits,
            chunk_starts: start + places.chunk_starts,
            // All fit: batch · seq does.
            batch: batch as i32,
            seq: seq as i32,
            chunks: places.chunks as i32,
            row_words: places.row_words as i32,
            mask_bytes: element_bytes as i32,
            unused: 0,
        };
        let chunks = (batch * places.chunks) as u32;
        for (entry, blocks, threads) in [
            (Entry::MetadataCount, chunks, THREADS),
            (Entry::MetadataScan, 1, SCAN_THREADS),
            (Entry::MetadataIndex, chunks, THREADS),
        ] {
            let function = self.function(entry)?;
            // SAFETY: the mask lies inside its memory (checked by problem) at a multiple of its elements, and the tables were
            // made for its size by `empty_metadata`.
            unsafe { self.context.launch(function, [blocks, 1, 1], threads, &params) }?;
        }
        Ok(())
    }
}

/// Where the tables of a `[batch, seq]` mask lie in their buffer, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Places {
    cu_seqlens: u64,
    batch_order: u64,
    indices: u64,
    inv_indices: u64,
    bits: u64,
    chunk_starts: u64,
    bytes: u64,
    /// Chunks of a row.
    chunks: usize,
    /// u32s of a row of bits.
    row_words: usize,
}

impl Places {
    fn of(batch: usize, seq: usize) -> Self {
        let (chunks, row_words) = (seq.div_ceil(METADATA_CHUNK), seq.div_ceil(32));
        let mut bytes = 0;
        let mut take = |words: usize| {
            let start = bytes;
            bytes += (4 * words as u64).next_multiple_of(TABLE_ALIGNMENT);
            start
        };
        Self {
            cu_seqlens: take(batch + 1),
            batch_order: take(batch),
            indices: take(batch * seq),
            inv_indices: take(batch * seq),
            bits: take(batch * row_words),
            chunk_starts: take(batch * chunks),
            chunks,
            row_words,
            bytes,
        }
    }
}

/// The sequences of `cu_seqlens`, the longest first, those of one length in their own order: a grid that starts with the long
/// ones does not end with one of them running alone.
fn longest_first(cu_seqlens: &[i32]) -> Vec<i32> {
    let lengths: Vec<i32> = cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // Fits: an i32 counts the rows, of which every sequence but the empty ones has some; empty ones beyond it are not run.
    let mut order: Vec<i32> = (0..lengths.len() as i32).collect();
    order.sort_by_key(|&sequence| std::cmp::Reverse(lengths[sequence as usize]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_sequences_come_first() {
        assert_eq!(longest_first(&[0, 3, 3, 10, 13]), [2, 0, 3, 1]);
        assert!(longest_first(&[0]).is_empty());
    }

    #[test]
    fn tables_lie_apart_and_aligned() {
        let places = Places::of(3, 5000);
        assert_eq!((places.chunks, places.row_words), (3, 157));
        assert_eq!((places.cu_seqlens, places.batch_order, places.indices), (0, 256, 512));
        assert_eq!(places.inv_indices, 512 + 60_160);
        assert_eq!(places.bits, places.inv_indices + 60_160);
        assert_eq!(places.chunk_starts, places.bits + 2048);
        assert_eq!(places.bytes, places.chunk_starts + 256);
    }
}
