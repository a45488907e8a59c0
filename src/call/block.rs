//! What copies between the memories of devices move.

/// Bytes of a memory: slices of rows.
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

/// How the rows of a tensor's tokens lie in a part of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Lines {
    /// Of the part, from the first row's first byte on.
    pub bytes: u64,
    /// Bytes from token to token.
    pub pitch: u64,
    /// Tokens from batch row to batch row.
    pub slice_rows: u64,
}

/// The copy of a block from one of several parts of memory to another block of as many rows as wide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockCopy {
    pub part: usize,
    pub from: Block,
    pub to: Block,
}

impl BlockCopy {
    /// With one row, where nothing lies between the rows on either side.
    pub fn merged(self) -> Self {
        let (from, to) = (self.from, self.to);
        let is_one =
            |block: &Block| block.width == block.pitch && (block.slices <= 1 || block.slice_rows == block.rows);
        if !is_one(&from) || !is_one(&to) {
            return self;
        }
        let merged = |block: Block| {
            let width = block.width * block.rows * block.slices;
            Block { width, pitch: width, rows: 1, slice_rows: 1, slices: 1, ..block }
        };
        Self { from: merged(from), to: merged(to), ..self }
    }
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
