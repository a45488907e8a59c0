//! How many floating-point operations attention takes.

use crate::call::op::{Attention, Rows};
use crate::error::Result;
use crate::mask::cu_seqlens::CuSeqlens;

use super::shader::Algorithm;

/// Floating-point operations of attention.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Work {
    pub operations: u64,
    /// The same, with last tiles counted as if they were full.
    pub in_whole_tiles: u64,
}

impl Work {
    /// The work of a call, were it one launch.
    pub fn of(attention: &Attention<'_>, algorithm: Algorithm) -> Result<Self> {
        let shape = attention.problem.shape;
        let tile_rows = algorithm.tile_rows(shape.head_dim);
        let of_sequence = |queries: usize, keys: usize| {
            let row = row_operations(keys, shape.head_dim).saturating_mul(shape.num_heads as u64);
            let tiles = queries.div_ceil(tile_rows) as u64;
            Self {
                operations: row.saturating_mul(queries as u64),
                in_whole_tiles: row.saturating_mul(tiles).saturating_mul(tile_rows as u64),
            }
        };
        let of_sequences = |query: &CuSeqlens, key: &CuSeqlens| {
            (0..query.batch())
                .map(|b| of_sequence(query.rows(b).len(), key.rows(b).len()))
                .fold(Self::default(), Self::and)
        };
        let whole = match &attention.rows {
            Rows::Dense { .. } => of_sequence(shape.seq_q, shape.seq_k).times(shape.batch as u64),
            Rows::Varlen { query, key } => of_sequences(query.cu_seqlens(), key.cu_seqlens()),
            Rows::Packed { query, key } => of_sequences(query, key),
            // Only the device knows what is valid: at most every token.
            Rows::DeviceVarlen { .. } => {
                let most = of_sequence(shape.seq_q, shape.seq_k).times(shape.batch as u64);
                Self { operations: 0, ..most }
            }
        };
        let Some(ranges) = attention.ranges else { return Ok(whole) };
        // What says how fast a device is must not be more than it does; what is cut into pieces, not
        // less.
        let pairs = match &attention.rows {
            Rows::Varlen { query, key } => ranges.of_packed_rows(query, key, false)?.pairs(),
            Rows::Packed { .. } | Rows::Dense { key_mask: None, .. } => ranges.pairs(),
            Rows::Dense { .. } | Rows::DeviceVarlen { .. } => 0,
        };
        let operations = (4 * pairs).saturating_mul(shape.head_dim as u64).saturating_mul(shape.num_heads as u64);
        Ok(Self { operations, ..whole })
    }

    fn and(self, other: Self) -> Self {
        Self {
            operations: self.operations.saturating_add(other.operations),
            in_whole_tiles: self.in_whole_tiles.saturating_add(other.in_whole_tiles),
        }
    }

    fn times(self, times: u64) -> Self {
        Self {
            operations: self.operations.saturating_mul(times),
            in_whole_tiles: self.in_whole_tiles.saturating_mul(times),
        }
    }
}

/// Floating-point operations of one query with `keys` keys, in one head.
fn row_operations(keys: usize, head_dim: usize) -> u64 {
    (4 * keys as u64).saturating_mul(head_dim as u64)
}

/// Floating-point operations of the largest workgroup.
pub(super) fn group_operations(algorithm: Algorithm, keys: usize, head_dim: usize) -> u64 {
    row_operations(keys, head_dim).saturating_mul(algorithm.tile_rows(head_dim) as u64)
}
