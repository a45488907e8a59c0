//! What a word, 32 bits of an operand of a product, holds: one f32, or a pair of 16-bit numbers
//! that are neighbours along the product's sum. Panels and blocks of words look the same for both.
//!
//! ```text
//!    scores = Σ K·Q           one f32             pairs
//!    panel of q               [d][lane]           [d/2][lane]       word: q[d], q[d+1]
//!    block of keys            [d][key]            [d/2][key]        word: k[d], k[d+1]
//!
//!    out = Σ V·P
//!    panel of weights         [key][lane]         [key/2][lane]     word: p[key], p[key+1]
//!    block of values          [key][column]       [key/2][column]   word: v[key], v[key+1]
//! ```

use pulp::Simd;

use super::isa::RegisterTile;

pub(super) trait Operand: Copy {
    /// Elements of a word. Scores and sums are f32 whatever it is.
    const PER_WORD: usize;

    /// `a · b + c`, summed over the elements of the words `a` and `b`.
    fn mul_add<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s;

    /// Adds `scalars[n] · vectors[w]` to `sums[n][w]`.
    fn add_products<S: RegisterTile, const W: usize, const N: usize>(
        self,
        simd: S,
        sums: &mut [[S::f32s; W]; N],
        scalars: &[f32; N],
        vectors: &[S::f32s; W],
    );

    /// Turns vector `w` of all rows of scores to weights, and those to words, which take the first
    /// rows. What lacks in the last word is 0.
    fn weigh<S: Simd, const W: usize>(
        self,
        simd: S,
        rows: &mut [[S::f32s; W]],
        w: usize,
        weight: impl FnMut(S::f32s) -> S::f32s,
    );

    /// Those elements of a word that `keeps` says, by their number, and 0 for the others.
    fn keep<S: Simd>(self, simd: S, word: S::f32s, keeps: impl Fn(usize) -> S::m32s) -> S::f32s;
}

/// A word is an f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct OneF32;

impl Operand for OneF32 {
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn mul_add<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, c)
    }

    #[inline(always)]
    fn add_products<S: RegisterTile, const W: usize, const N: usize>(
        self,
        simd: S,
        sums: &mut [[S::f32s; W]; N],
        scalars: &[f32; N],
        vectors: &[S::f32s; W],
    ) {
        simd.add_products(sums, scalars, vectors);
    }

    #[inline(always)]
    fn weigh<S: Simd, const W: usize>(
        self,
        _: S,
        rows: &mut [[S::f32s; W]],
        w: usize,
        mut weight: impl FnMut(S::f32s) -> S::f32s,
    ) {
        for row in rows {
            row[w] = weight(row[w]);
        }
    }

    #[inline(always)]
    fn keep<S: Simd>(self, simd: S, word: S::f32s, keeps: impl Fn(usize) -> S::m32s) -> S::f32s {
        simd.select_f32s(keeps(0), word, simd.splat_f32s(0.0))
    }
}
