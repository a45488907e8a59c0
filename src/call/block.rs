//! What copies between the memories of devices move.

/// Bytes that lie in the same places of two pieces of memory: slices of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block {
    /// Where the first row begins.
    pub start: u64,
    /// Bytes of a row.
    pub width: u64,
    /// Bytes from row to row.
    pub pitch: u64,
    pub rows: u64,
    /// Rows from slice to slice.
    pub slice_rows: u64,
    pub slices: u64,
}

impl Block {
    /// The first byte past it.
    pub fn end(&self) -> Option<u64> {
        if self.width == 0 || self.rows == 0 || self.slices == 0 {
            return Some(self.start);
        }
        let last_row = (self.slices - 1).checked_mul(self.slice_rows)?.checked_add(self.rows - 1)?;
        self.start.checked_add(last_row.checked_mul(self.pitch)?)?.checked_add(self.width)
    }
}
