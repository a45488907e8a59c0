//! Metadata that the device builds of a mask in its memory: its tables, and the launches that fill
//! them (`shaders/metadata/scan.wgsl` says in which steps).
//!
//! The host never learns what is in them. So tiles of each row have places of their own, as many as
//! any mask may need, and lists are as long as if every token were valid.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use crate::backends::rows::WORD_BYTES;
use crate::cache::DeviceId;
use crate::call::memory::DeviceBuffer;
use crate::call::op::MaskInput;
use crate::error::{Error, Result};
use crate::host_vec;

use super::buffer::WgpuBuffer;
use super::context::Context;
use super::dispatch::{BINDING_ALIGNMENT, Launch, MAX_GROUPS, Window, groups_for};
use super::launches::Launches;
use super::metadata::{Tiles, TokenLists};
use super::params::MetadataParams;
use super::shader::{INVOCATIONS, MetadataStep, Shader};

/// The tables of a `[batch, seq]` mask.
#[derive(Debug)]
pub(super) struct DeviceMeta {
    device: DeviceId,
    device_name: Arc<str>,
    pub batch: usize,
    pub seq: usize,
    /// A bit a token, `[B, row_words]` u32s, as those of a host's mask.
    pub bits: wgpu::Buffer,
    /// u32s of one row of bits.
    pub row_words: u32,
    /// `[B + 1]`.
    pub cu_seqlens: wgpu::Buffer,
    /// `[B · S]`: flat positions of the valid tokens, and behind them what is no row.
    pub indices: wgpu::Buffer,
    /// `[B · S]`.
    pub inv_indices: wgpu::Buffer,
    pub token_lists: Arc<TokenLists>,
    tiles: Vec<TilesOfRows>,
    /// Kept tokens of, then before each block of words, and before each word: what the steps tell
    /// one another.
    block_sums: wgpu::Buffer,
    pub word_starts: wgpu::Buffer,
}

/// Tiles of one number of rows.
#[derive(Debug)]
struct TilesOfRows {
    rows: usize,
    packed: Tiles,
    fused: Tiles,
}

impl DeviceBuffer for DeviceMeta {
    fn device(&self) -> DeviceId {
        self.device
    }

    fn device_name(&self) -> &str {
        &self.device_name
    }

    fn size(&self) -> u64 {
        self.buffers().map(wgpu::Buffer::size).sum()
    }

    /// No view is ever over tables, so that none shares them.
    fn space(&self) -> u64 {
        u64::MAX
    }

    fn touched(&self, bytes: Range<u64>) -> Range<u64> {
        bytes
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DeviceMeta {
    /// Tables with what is in new buffers. `tile_rows` are the rows of every tile that the device's
    /// kernels have.
    pub fn alloc(
        context: &Context,
        batch: usize,
        seq: usize,
        tile_rows: impl IntoIterator<Item = usize>,
    ) -> Result<Self> {
        let row_words = seq.div_ceil(u32::BITS as usize);
        let table = |label, rows: usize, words_of_row: usize| {
            let bytes = (rows as u64).saturating_mul(words_of_row as u64).saturating_mul(4);
            let limit_name = "a metadata table in max_storage_buffer_binding_size (bytes)";
            let limit = context.max_binding_bytes;
            if bytes > limit {
                return Err(Error::TooLarge { argument: "mask", limit_name, limit, got: bytes });
            }
            context.allocator.storage(label, bytes)
        };
        let tiles_of = |label, tiles_of_row: usize| {
            let buffer = table(label, batch, tiles_of_row * (WORD_BYTES as usize / 4))?;
            let mut first = host_vec::reserve(batch + 1)?;
            // All fit: a binding is below 2 GiB.
            first.extend((0..=batch).map(|row| (row * tiles_of_row) as u32));
            Ok(Tiles::new(buffer, first))
        };
        // The largest first: what is too large allocates nothing.
        let lists = table("token_lists", batch, seq.saturating_add(1))?;
        let mut tiles = Vec::new();
        for rows in tile_rows {
            let of_row = seq.div_ceil(rows);
            // Both the kept and the dropped tokens may leave a tile that is not full.
            let (fused, packed) = (tiles_of("fused_tiles", of_row + 1)?, tiles_of("packed_tiles", of_row)?);
            tiles.push(TilesOfRows { rows, packed, fused });
        }
        Ok(Self {
            device: context.id,
            device_name: Arc::clone(&context.name),
            batch,
            seq,
            bits: table("mask", batch, row_words)?,
            // Fits: a row has at most i32::MAX bits.
            row_words: row_words as u32,
            cu_seqlens: table("cu_seqlens", batch + 1, 1)?,
            indices: table("indices", batch, seq)?,
            inv_indices: table("inv_indices", batch, seq)?,
            token_lists: Arc::new(TokenLists::new(lists, seq)),
            tiles,
            block_sums: table("block_sums", (batch * row_words).div_ceil(INVOCATIONS), 1)?,
            word_starts: table("word_starts", batch, row_words)?,
        })
    }

    fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        let Self { bits, cu_seqlens, indices, inv_indices, token_lists, block_sums, word_starts, .. } = self;
        let tables = [bits, cu_seqlens, indices, inv_indices, &token_lists.buffer, block_sums, word_starts];
        let tiles = self.tiles.iter().flat_map(|tiles| [&tiles.packed.buffer, &tiles.fused.buffer]);
        tables.into_iter().chain(tiles)
    }

    pub fn packed_tiles(&self, tile_rows: usize) -> Result<Tiles> {
        Ok(self.tiles_of_rows(tile_rows)?.packed.clone())
    }

    pub fn fused_tiles(&self, tile_rows: usize) -> Result<Tiles> {
        Ok(self.tiles_of_rows(tile_rows)?.fused.clone())
    }

    fn tiles_of_rows(&self, tile_rows: usize) -> Result<&TilesOfRows> {
        self.tiles.iter().find(|tiles| tiles.rows == tile_rows).ok_or_else(|| Error::Backend {
            device: self.device_name.to_string(),
            operation: "looking up tiles",
            why: format!("metadata of the device has none of {tile_rows} rows"),
        })
    }

    /// Launches that build the tables of a mask.
    pub fn build(&self, context: &Context, mask: &MaskInput<'_>, launches: &mut Launches<'_>) -> Result<()> {
        if self.batch * self.seq > 0 {
            self.push_steps(&PlacedMask::of(context, mask)?, launches);
        }
        Ok(())
    }

    /// Launches that build the tables of a mask without any valid token.
    pub fn build_empty(&self, context: &Context, launches: &mut Launches<'_>) {
        if self.batch * self.seq > 0 {
            // One zero for all tokens.
            let window = context.unused_read();
            let zero = PlacedMask { window, offset: 0, stride_b: 0, stride_s: 0, element_bytes: 4 };
            self.push_steps(&zero, launches);
        }
    }

    fn push_steps(&self, mask: &PlacedMask, launches: &mut Launches<'_>) {
        let words = self.batch * self.row_words as usize;
        let blocks = words.div_ceil(INVOCATIONS);
        // All fit: tables are below 2 GiB.
        let params = MetadataParams {
            mask_offset: mask.offset,
            mask_stride_b: mask.stride_b,
            mask_stride_s: mask.stride_s,
            mask_bytes: mask.element_bytes as u32,
            mask_low: u32::MAX >> (32 - 8 * mask.element_bytes.min(4)),
            batch: self.batch as u32,
            seq: self.seq as u32,
            row_words: self.row_words,
            words: words as u32,
            blocks: blocks as u32,
            tile_rows: 0,
        };
        let mut push = |step, params: &MetadataParams, tables: &[&wgpu::Buffer], groups| {
            let is_first = step == MetadataStep::Bits;
            let mask = is_first.then(|| mask.window.clone());
            launches.push(Launch {
                shader: Shader::Metadata(step),
                params: bytemuck::bytes_of(params).to_vec(),
                windows: mask.into_iter().chain(tables.iter().map(|table| Window::whole(table))).collect(),
                groups,
                operations: 0,
            });
        };
        let Self { bits, cu_seqlens, indices, inv_indices, token_lists, block_sums, word_starts, .. } = self;
        let group_a_block = [blocks.min(MAX_GROUPS) as u32, 1, 1];
        push(MetadataStep::Bits, &params, &[bits, block_sums], group_a_block);
        push(MetadataStep::Blocks, &params, &[block_sums, cu_seqlens], [1, 1, 1]);
        push(MetadataStep::Starts, &params, &[bits, block_sums, word_starts, cu_seqlens], group_a_block);
        let lists = [bits, word_starts, cu_seqlens, indices, inv_indices, &token_lists.buffer];
        push(MetadataStep::Lists, &params, &lists, groups_for((self.batch * self.seq) as u64));
        for TilesOfRows { rows, packed, fused } in &self.tiles {
            let params = MetadataParams { tile_rows: *rows as u32, ..params };
            let places = self.batch * (self.seq.div_ceil(*rows) + 1);
            push(MetadataStep::Tiles, &params, &[cu_seqlens, &packed.buffer, &fused.buffer], groups_for(places as u64));
        }
    }
}

/// Where a mask lies in a binding, in elements.
struct PlacedMask {
    window: Window,
    offset: u32,
    stride_b: u32,
    stride_s: u32,
    element_bytes: usize,
}

impl PlacedMask {
    /// Of a mask that has elements.
    fn of(context: &Context, mask: &MaskInput<'_>) -> Result<Self> {
        let (argument, element_bytes) = ("mask", mask.element_bytes as u64);
        let buffer: &WgpuBuffer = mask.memory.owned_by(context.id, &context.name)?;
        buffer.expect_unmapped(argument)?;
        let start = mask.layout.offset() * element_bytes / BINDING_ALIGNMENT * BINDING_ALIGNMENT;
        let end = (mask.layout.end() * element_bytes).next_multiple_of(4).min(buffer.bindable());
        let (limit_name, limit) = ("max_storage_buffer_binding_size (bytes)", context.max_binding_bytes);
        if end - start > limit {
            return Err(Error::TooLarge { argument, limit_name, limit, got: end - start });
        }
        // Each fits wherever it is stepped over: a binding is below 2 GiB.
        let [stride_b, stride_s] = [0, 1].map(|dim| mask.layout.strides()[dim] as u32);
        Ok(Self {
            window: Window {
                buffer: buffer.raw.clone(),
                offset: start,
                size: end - start,
                argument: buffer.is_external().then_some(argument),
            },
            offset: (mask.layout.offset() - start / element_bytes) as u32,
            stride_b,
            stride_s,
            element_bytes: mask.element_bytes,
        })
    }
}
