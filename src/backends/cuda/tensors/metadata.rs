//! Masks and metadata on the device: copies of the host's, uploaded once and kept with them, and
//! tables that the device builds.

use std::sync::Arc;

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::driver::transfer;
use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{METADATA_CHUNK, METADATA_SCAN_THREADS, METADATA_THREADS, MetadataParams};
use crate::backends::cuda::launcher::Launcher;
use crate::backends::metadata::{Indices, InvIndices, MaskBits};
use crate::call::op::{DeviceTables, MaskInput};
use crate::error::{Error, Result};
use crate::host_vec;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

/// Tables in one buffer start at multiples of this, as buffers do.
const TABLE_ALIGNMENT: u64 = 256;

/// [`CuSeqlens::as_slice`], followed by the sequences' order.
#[derive(Debug)]
pub struct CuSeqlensCopy {
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

/// Addresses of the metadata of one side of a call, queries or keys. They stay valid: the metadata
/// keeps its copies.
#[derive(Debug, Clone, Copy)]
pub struct Tables {
    pub cu_seqlens: u64,
    pub batch_order: u64,
    pub indices: u64,
    pub inv_indices: u64,
    pub batch: usize,
    pub seq: usize,
    /// Packed rows; an upper bound where only the device knows.
    pub packed_rows: usize,
    /// Rows of the longest sequence; an upper bound where only the device knows.
    pub max_seqlen: usize,
    pub is_all_valid: bool,
}

/// Bits of a mask, uploaded if they are not on the device yet.
pub fn mask_bits(launcher: &Launcher, mask: &KeyMask) -> Result<Arc<MaskBits<CudaBuffer>>> {
    MaskBits::on(launcher.id, mask, |bytes| launcher.uploaded(bytes))
}

/// Tables of metadata that the host built, uploaded if they are not on the device yet.
pub fn host_tables(launcher: &Launcher, meta: &VarlenMeta) -> Result<Tables> {
    let upload = |bytes: &[u8]| launcher.uploaded(bytes);
    let cu_seqlens = cu_seqlens(launcher, meta.cu_seqlens())?;
    Ok(Tables {
        cu_seqlens: cu_seqlens.address(),
        batch_order: cu_seqlens.order(),
        indices: Indices::on(launcher.id, meta, upload)?.0.address(),
        inv_indices: InvIndices::on(launcher.id, meta, upload)?.0.address(),
        batch: meta.batch(),
        seq: meta.seq(),
        packed_rows: meta.total_valid(),
        max_seqlen: meta.max_seqlen(),
        is_all_valid: meta.is_all_valid(),
    })
}

/// Cumulative sequence lengths, uploaded if they are not on the device yet.
pub fn cu_seqlens(launcher: &Launcher, cu_seqlens: &CuSeqlens) -> Result<Arc<CuSeqlensCopy>> {
    cu_seqlens.copies().get_or_make(launcher.id, || {
        let values = cu_seqlens.as_slice();
        let order_offset = size_of_val(values) as u64;
        let order = longest_first(values)?;
        let mut both = host_vec::reserve::<i32>(values.len() + order.len())?;
        both.extend(values.iter().chain(&order));
        let buffer = launcher.uploaded(bytemuck::cast_slice(&both))?;
        Ok(CuSeqlensCopy { buffer, order_offset })
    })
}

/// Copies of all tables that calls with this metadata use.
pub fn upload(launcher: &Launcher, meta: &VarlenMeta) -> Result<()> {
    host_tables(launcher, meta)?;
    // Dense paths use the bits instead.
    mask_bits(launcher, meta.key_mask()).map(drop)
}

/// Tables for a `[batch, seq]` mask, in which no token is valid.
pub fn empty_tables(launcher: &Launcher, batch: usize, seq: usize) -> Result<CudaBuffer> {
    let places = Places::of(batch, seq);
    let buffer = launcher.lasting(places.bytes)?;
    // SAFETY: the buffer is new and has this size.
    unsafe { transfer::fill(&launcher.context, buffer.address(), 0, places.bytes) }?;
    let inv_indices = buffer.address() + places.inv_indices;
    // SAFETY: the table lies inside the buffer. 255 is every byte of −1.
    unsafe { transfer::fill(&launcher.context, inv_indices, 255, 4 * (batch * seq) as u64) }?;
    if seq > 0 {
        // Each batch row once: a kernel that takes them in this order writes the zeros of all of them.
        // Fits: batch · seq does.
        let mut order = host_vec::reserve::<i32>(batch)?;
        order.extend(0..batch as i32);
        // SAFETY: the table lies inside the buffer and has an i32 for each batch row.
        unsafe {
            transfer::upload(&launcher.context, buffer.address() + places.batch_order, bytemuck::cast_slice(&order))
        }?;
    }
    Ok(buffer)
}

/// Tables that the device built.
pub fn device_tables(launcher: &Launcher, tables: &DeviceTables<'_>) -> Result<Tables> {
    let &DeviceTables { memory, batch, seq, .. } = tables;
    let (start, places) = (launcher.source(memory)?.address(), Places::of(batch, seq));
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
pub fn device_bits(launcher: &Launcher, tables: &DeviceTables<'_>) -> Result<(u64, i32)> {
    let places = Places::of(tables.batch, tables.seq);
    // Fits: a row has at most i32::MAX bits.
    Ok((launcher.source(tables.memory)?.address() + places.bits, places.row_words as i32))
}

/// Builds the tables of a mask on the device.
pub fn build(launcher: &Launcher, mask: &MaskInput<'_>, tables: &DeviceTables<'_>) -> Result<()> {
    let (batch, seq) = (tables.batch, tables.seq);
    if batch * seq == 0 {
        return Ok(());
    }
    if launcher.context.is_captured()? {
        tables.kept.set_replayed();
    }
    let element_bytes = mask.element_bytes as u64;
    let address = launcher.source(mask.memory)?.address() + mask.layout.offset() * element_bytes;
    if !address.is_multiple_of(element_bytes) {
        return Err(Error::Misaligned { argument: "mask", expected: element_bytes, got: address % element_bytes });
    }
    let (start, places) = (launcher.source(tables.memory)?.address(), Places::of(batch, seq));
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
        (Entry::MetadataCount, chunks, METADATA_THREADS),
        (Entry::MetadataScan, 1, METADATA_SCAN_THREADS),
        (Entry::MetadataIndex, chunks, METADATA_THREADS),
    ] {
        let function = launcher.function(entry)?;
        // SAFETY: the mask lies inside its memory (checked by problem) at a multiple of its
        // elements, and the tables were made for its size by `empty_tables`.
        unsafe { launcher.launch(function, [blocks, 1, 1], threads, &params) }?;
    }
    Ok(())
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

/// The sequences of `cu_seqlens`, the longest first, equal ones in their own order: a grid that
/// starts with the long ones does not end with one of them running alone.
fn longest_first(cu_seqlens: &[i32]) -> Result<Vec<i32>> {
    let batch = cu_seqlens.len().saturating_sub(1);
    let mut order = host_vec::reserve(batch)?;
    // Fits: an i32 counts the rows, of which every sequence that is not empty has some; empty ones
    // beyond an i32 are not run.
    order.extend(0..batch as i32);
    let length = |sequence: usize| cu_seqlens[sequence + 1] - cu_seqlens[sequence];
    // Not the stable sort, which allocates.
    order.sort_unstable_by_key(|&sequence| (std::cmp::Reverse(length(sequence as usize)), sequence));
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_sequences_come_first() -> Result<()> {
        assert_eq!(longest_first(&[0, 3, 3, 10, 13])?, [2, 0, 3, 1]);
        assert!(longest_first(&[0])?.is_empty());
        Ok(())
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
