//! Layouts and errors, from one library to the other.

use candle_core::{Error, Layout, Result};

/// A tensor's layout as the library has it: shape, strides and offset, in elements.
pub fn of(layout: &Layout) -> Result<varlen_fa::Layout> {
    let strides: Vec<u64> = layout.stride().iter().map(|&stride| stride as u64).collect();
    varlen_fa::Layout::strided(layout.dims(), &strides, layout.start_offset() as u64).map_err(Error::wrap)
}
