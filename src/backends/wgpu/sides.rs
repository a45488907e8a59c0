//! Metadata of one side of a call, queries or keys: of the host, with its copies on the device, or
//! of the device. What reads it does not ask which.

use std::ops::Range;
use std::sync::Arc;

use crate::backends::rows::RowShape;
use crate::call::op::DeviceTables;
use crate::error::Result;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

use super::context::Context;
use super::device_meta::DeviceMeta;
use super::dispatch::Window;
use super::metadata::{self, Tiles, TokenLists};

/// Metadata of padded tensors.
#[derive(Debug, Clone, Copy)]
pub(super) enum Side<'a> {
    Host(&'a VarlenMeta),
    Device(&'a DeviceMeta),
}

/// The sequences of packed rows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sequences<'a> {
    Host(&'a CuSeqlens),
    Device(&'a DeviceMeta),
}

/// Which tokens a dense path keeps.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kept<'a> {
    Host(&'a KeyMask),
    Device(&'a DeviceMeta),
}

impl<'a> Side<'a> {
    pub fn device(context: &Context, tables: &DeviceTables<'a>) -> Result<Self> {
        tables.memory.owned_by(context.id, &context.name).map(Self::Device)
    }

    pub fn seq(self) -> usize {
        match self {
            Self::Host(meta) => meta.seq(),
            Self::Device(meta) => meta.seq,
        }
    }

    pub fn sequences(self) -> Sequences<'a> {
        match self {
            Self::Host(meta) => Sequences::Host(meta.cu_seqlens()),
            Self::Device(meta) => Sequences::Device(meta),
        }
    }

    /// The tokens that count, where a dense path takes them from metadata: only that of the device.
    pub fn kept(self) -> Kept<'a> {
        match self {
            Self::Host(meta) => Kept::Host(meta.key_mask()),
            Self::Device(meta) => Kept::Device(meta),
        }
    }

    pub fn token_lists(self, context: &Context) -> Result<Arc<TokenLists>> {
        match self {
            Self::Host(meta) => metadata::token_lists(context, meta),
            Self::Device(meta) => Ok(Arc::clone(&meta.token_lists)),
        }
    }

    pub fn fused_tiles(self, context: &Context, tile_rows: usize) -> Result<Tiles> {
        match self {
            Self::Host(meta) => metadata::fused_tiles(context, meta, tile_rows),
            Self::Device(meta) => meta.fused_tiles(tile_rows),
        }
    }

    pub fn indices(self, context: &Context) -> Result<Window> {
        match self {
            Self::Host(meta) => Ok(Window::whole(&metadata::indices(context, meta)?.0)),
            Self::Device(meta) => Ok(Window::whole(&meta.indices)),
        }
    }

    pub fn inv_indices(self, context: &Context) -> Result<Window> {
        match self {
            Self::Host(meta) => Ok(Window::whole(&metadata::inv_indices(context, meta)?.0)),
            Self::Device(meta) => Ok(Window::whole(&meta.inv_indices)),
        }
    }

    /// Bytes of the packed rows of a range of batch rows; at most, where only the device knows.
    pub fn packed_bytes(self, row: RowShape, range: &Range<usize>) -> u64 {
        self.sequences().packed_rows(range).len() as u64 * row.bytes()
    }
}

impl Sequences<'_> {
    /// Packed rows of a range of batch rows. Where only the device knows how many precede them and
    /// how many they are, those of all batch rows, and as many as if every token were valid.
    pub fn packed_rows(self, range: &Range<usize>) -> Range<usize> {
        match self {
            Self::Host(cu_seqlens) => metadata::packed_rows(cu_seqlens, range),
            Self::Device(meta) => 0..meta.batch * meta.seq,
        }
    }

    /// Rows of the longest sequence of a range; at most, where only the device knows.
    pub fn longest(self, range: &Range<usize>) -> usize {
        match self {
            Self::Host(cu_seqlens) => metadata::longest(cu_seqlens, range),
            Self::Device(meta) => meta.seq,
        }
    }

    pub fn packed_tiles(self, context: &Context, tile_rows: usize) -> Result<Tiles> {
        match self {
            Self::Host(cu_seqlens) => metadata::packed_tiles(context, cu_seqlens, tile_rows),
            Self::Device(meta) => meta.packed_tiles(tile_rows),
        }
    }

    pub fn cu_seqlens(self, context: &Context) -> Result<Window> {
        match self {
            Self::Host(cu_seqlens) => Ok(Window::whole(&metadata::cu_seqlens(context, cu_seqlens)?.0)),
            Self::Device(meta) => Ok(Window::whole(&meta.cu_seqlens)),
        }
    }
}

impl Kept<'_> {
    /// The bits of a mask, if there is one, and the u32s of one row of them; else what no shader reads.
    pub fn window(mask: Option<Self>, context: &Context) -> Result<(Window, u32)> {
        mask.map_or_else(|| Ok((context.unused_read(), 0)), |mask| mask.bits(context))
    }

    /// The bits, and the u32s of one row of them.
    pub fn bits(self, context: &Context) -> Result<(Window, u32)> {
        match self {
            Self::Host(mask) => {
                let bits = metadata::mask_bits(context, mask)?;
                Ok((Window::whole(&bits.buffer), bits.row_words))
            }
            Self::Device(meta) => Ok((Window::whole(&meta.bits), meta.row_words)),
        }
    }
}
