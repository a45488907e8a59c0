//! The instruction sets that this processor has: vectors, and instructions for products of bf16 on
//! top of them.

use super::bf16_pairs::Bf16Pairs;
use super::isa::{Vectorized, Vectors};
use crate::config::CpuIsa;

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Processor {
    vectors: Vectors,
    bf16: Option<Bf16Pairs>,
}

impl Processor {
    /// Every instruction set of this processor, the best one first. The last one is part of every
    /// processor.
    pub fn all() -> impl Iterator<Item = Self> {
        Vectors::all().flat_map(|vectors| {
            let bf16 = Bf16Pairs::of(vectors);
            bf16.map(|bf16| Self { vectors, bf16: Some(bf16) }).into_iter().chain([Self { vectors, bf16: None }])
        })
    }

    pub fn isa(self) -> CpuIsa {
        self.bf16.map_or(self.vectors.isa(), Bf16Pairs::isa)
    }

    /// The instructions for products of bf16, if it has them.
    pub fn bf16(self) -> Option<Bf16Pairs> {
        self.bf16
    }

    /// Runs the work, compiled for the instruction set's vectors.
    #[inline(always)]
    pub fn dispatch<W: Vectorized>(self, work: W) -> W::Output {
        self.vectors.dispatch(work)
    }

    /// Runs a loop that the compiler makes SIMD code of.
    #[inline(always)]
    pub fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        self.vectors.vectorize(work)
    }
}
