//! Which tokens of the batch rows take part in a call.

use std::ops::Range;

use crate::mask::meta::{CuSeqlens, VarlenMeta};

/// Which tokens of each batch row take part.
#[derive(Clone, Copy)]
pub(super) enum Sequences<'a> {
    Whole(usize),
    Valid(&'a VarlenMeta),
    Packed(&'a CuSeqlens),
}

impl<'a> Sequences<'a> {
    pub fn of(self, b: usize) -> Tokens<'a> {
        match self {
            Self::Whole(len) => Tokens::Range(0..len),
            Self::Valid(meta) => {
                Tokens::Listed { indices: &meta.indices()[meta.cu_seqlens().rows(b)], before: b * meta.seq() }
            }
            Self::Packed(cu_seqlens) => Tokens::Range(cu_seqlens.rows(b)),
        }
    }
}

/// The tokens of one batch row that take part, in order.
pub(super) enum Tokens<'a> {
    Range(Range<usize>),
    /// `indices[i] - before`
    Listed {
        indices: &'a [u32],
        before: usize,
    },
}

impl Tokens<'_> {
    pub fn len(&self) -> usize {
        match self {
            Self::Range(range) => range.len(),
            Self::Listed { indices, .. } => indices.len(),
        }
    }

    #[inline(always)]
    pub fn at(&self, i: usize) -> usize {
        match self {
            Self::Range(range) => range.start + i,
            Self::Listed { indices, before } => indices[i] as usize - before,
        }
    }
}
