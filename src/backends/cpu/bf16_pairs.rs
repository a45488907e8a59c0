//! Products of bf16 by the processor's instructions for them: AVX512-BF16, and Arm's FEAT_BF16. A
//! word is a pair of bf16 (`operands`), and one instruction multiplies both and adds them to an f32.
//!
//! K and V are taken as they are, and weights are rounded to bf16, as on GPUs; the sum of weights
//! is of those that are not rounded. The instructions take numbers below 2⁻¹²⁶ for 0 and give 0 for
//! them; NaN and infinities are as in f32.
//!
//! How a word is rounded:
//!
//! - `vdpbf16ps` adds the element in the upper half first, each rounded as by a fused multiplication
//!   and addition.
//! - `bfdot` adds the two products, which are exact, then the sum of both to the f32. Each addition
//!   rounds to odd: a result that is not exact gets a last bit of 1. It is off by less than the
//!   worth of that bit, twice what rounding to the nearest is off by, but there are half as many
//!   additions to the f32 as elements: the bound is that of a chain of f32, and the rounding has no
//!   drift. FEAT_EBF16 rounds a word once, to the nearest, where the application has set FPCR.EBF,
//!   and then numbers below 2⁻¹²⁶ count. The contract allows all of these.

use half::bf16;
use pulp::Simd;

use super::isa::{RegisterTile, Vectorized, Vectors};
use super::operands::Operand;
use super::rows::RowElement;
use crate::config::CpuIsa;

/// Proof that the processor has the instructions, with the vectors that they work on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16Pairs(processor::Token);

impl Bf16Pairs {
    /// The instructions for these vectors, if the processor has them.
    pub fn of(vectors: Vectors) -> Option<Self> {
        processor::Token::of(vectors).map(Self)
    }

    pub fn isa(self) -> CpuIsa {
        self.0.isa()
    }

    /// Runs the work, compiled for the instructions.
    #[inline(always)]
    pub fn dispatch<W: Vectorized>(self, work: W) -> W::Output {
        self.0.dispatch(work)
    }
}

impl Operand for Bf16Pairs {
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn mul_add<S: Simd>(self, _: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        self.0.mul_add::<S>(a, b, c)
    }

    #[inline(always)]
    fn add_products<S: RegisterTile, const W: usize, const N: usize>(
        self,
        simd: S,
        sums: &mut [[S::f32s; W]; N],
        scalars: &[f32; N],
        vectors: &[S::f32s; W],
    ) {
        self.0.add_products(simd, sums, scalars, vectors);
    }

    #[inline(always)]
    fn weigh<S: Simd, const W: usize>(
        self,
        simd: S,
        rows: &mut [[S::f32s; W]],
        w: usize,
        mut weight: impl FnMut(S::f32s) -> S::f32s,
    ) {
        let whole = rows.len() / 2;
        for i in 0..whole {
            let (low, high) = (rows[2 * i][w], rows[2 * i + 1][w]);
            rows[i][w] = self.0.pair::<S>(weight(low), weight(high));
        }
        if rows.len() % 2 == 1 {
            rows[whole][w] = self.0.pair::<S>(weight(rows[2 * whole][w]), simd.splat_f32s(0.0));
        }
    }

    #[inline(always)]
    fn keep<S: Simd>(self, simd: S, word: S::f32s, keeps: impl Fn(usize) -> S::m32s) -> S::f32s {
        let (word, zero) = (simd.transmute_u32s_f32s(word), simd.splat_u32s(0));
        let half =
            |number: usize, bits| simd.select_u32s(keeps(number), simd.and_u32s(word, simd.splat_u32s(bits)), zero);
        simd.transmute_f32s_u32s(simd.or_u32s(half(0, 0x0000_ffff), half(1, 0xffff_0000)))
    }
}

/// A row as words, each of two neighbours: itself, or copied to `scratch` where it does not begin
/// with a word of memory.
#[inline(always)]
pub(super) fn words<'a, T: RowElement>(row: &'a [T], scratch: &'a mut [f32]) -> &'a [f32] {
    match bytemuck::try_cast_slice(row) {
        Ok(words) => words,
        Err(_) => {
            bytemuck::cast_slice_mut(scratch).copy_from_slice(row);
            scratch
        }
    }
}

/// The words of two rows: an element of each, that of `low` in the lower half.
#[inline(always)]
pub(super) fn joined<T: RowElement>(low: &[T], high: &[T], words: &mut [f32]) {
    let (low, high): (&[u16], &[u16]) = (bytemuck::cast_slice(low), bytemuck::cast_slice(high));
    for ((word, &low), &high) in words.iter_mut().zip(low).zip(high) {
        *word = f32::from_bits(u32::from(low) | u32::from(high) << 16);
    }
}

/// The words of a row whose neighbour there is not: 0 in the upper half.
#[inline(always)]
pub(super) fn alone<T: RowElement>(low: &[T], words: &mut [f32]) {
    for (word, &low) in words.iter_mut().zip(bytemuck::cast_slice::<_, u16>(low)) {
        *word = f32::from_bits(u32::from(low));
    }
}

/// Whether no element of the words is NaN or infinite.
#[inline(always)]
pub(super) fn are_finite(words: &[f32]) -> bool {
    let magnitude = |bits: u32| bits & 0x7fff;
    let largest = words
        .iter()
        .fold(0, |largest: u32, word| largest.max(magnitude(word.to_bits())).max(magnitude(word.to_bits() >> 16)));
    largest < u32::from(bf16::INFINITY.to_bits())
}

#[cfg(target_arch = "x86_64")]
mod processor {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_permutexvar_epi16,
    };
    use std::mem::transmute;

    use pulp::Simd;
    use pulp::x86::V4;

    use super::{CpuIsa, RegisterTile, Vectorized, Vectors};

    #[derive(Debug, Clone, Copy)]
    pub(super) struct Token(V4);

    impl Token {
        pub fn of(vectors: Vectors) -> Option<Self> {
            match vectors {
                Vectors::Avx512(v4) if std::arch::is_x86_feature_detected!("avx512bf16") => Some(Self(v4)),
                _ => None,
            }
        }

        pub fn isa(self) -> CpuIsa {
            CpuIsa::Avx512Bf16
        }

        #[inline(always)]
        pub fn dispatch<W: Vectorized>(self, work: W) -> W::Output {
            // SAFETY: the processor has everything of V4, which there is, and AVX512-BF16, which
            // was looked for.
            unsafe {
                compiled(
                    #[inline(always)]
                    || work.run(self.0),
                )
            }
        }

        #[inline(always)]
        pub fn mul_add<S: Simd>(self, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
            // SAFETY: as above.
            pulp::cast(unsafe { mul_add(pulp::cast(a), pulp::cast(b), pulp::cast(c)) })
        }

        #[inline(always)]
        pub fn add_products<S: RegisterTile, const W: usize, const N: usize>(
            self,
            simd: S,
            sums: &mut [[S::f32s; W]; N],
            scalars: &[f32; N],
            vectors: &[S::f32s; W],
        ) {
            for n in 0..N {
                let scalar = simd.splat_f32s(scalars[n]);
                for w in 0..W {
                    sums[n][w] = self.mul_add::<S>(vectors[w], scalar, sums[n][w]);
                }
            }
        }

        /// Words of two numbers each, rounded to the nearest, ties to even.
        #[inline(always)]
        pub fn pair<S: Simd>(self, low: S::f32s, high: S::f32s) -> S::f32s {
            // SAFETY: as above.
            pulp::cast(unsafe { pair(pulp::cast(low), pulp::cast(high)) })
        }
    }

    /// The instruction sets of V4, and AVX512-BF16.
    #[target_feature(
        enable = "sse,sse2,fxsr,sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,bmi1,bmi2,fma,lzcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16"
    )]
    fn compiled<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: 32 bf16 are 16 words.
        let [a, b] = unsafe { transmute::<[__m512; 2], [__m512bh; 2]>([a, b]) };
        _mm512_dpbf16_ps(c, a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn pair(low: __m512, high: __m512) -> __m512 {
        /// Where the elements of the words are, among 16 of `low` and 16 of `high`.
        const PLACES: [u16; 32] = {
            let mut places = [0; 32];
            let mut word = 0;
            while word < 16 {
                places[2 * word] = word as u16;
                places[2 * word + 1] = 16 + word as u16;
                word += 1;
            }
            places
        };
        // SAFETY: 32 numbers of 16 bits each.
        let places = unsafe { transmute::<[u16; 32], __m512i>(PLACES) };
        let narrow = _mm512_cvtne2ps_pbh(high, low);
        // SAFETY: 32 bf16 are 512 bits.
        let narrow = unsafe { transmute::<__m512bh, __m512i>(narrow) };
        pulp::cast(_mm512_permutexvar_epi16(places, narrow))
    }
}

/// The standard library has no stable intrinsics for them.
#[cfg(target_arch = "aarch64")]
mod processor {
    use std::arch::aarch64::float32x4_t;
    use std::arch::asm;

    use pulp::Simd;
    use pulp::aarch64::Neon;

    use super::{CpuIsa, RegisterTile, Vectorized, Vectors};

    #[derive(Debug, Clone, Copy)]
    pub(super) struct Token(Neon);

    impl Token {
        pub fn of(vectors: Vectors) -> Option<Self> {
            match vectors {
                Vectors::Neon(neon) if std::arch::is_aarch64_feature_detected!("bf16") => Some(Self(neon)),
                _ => None,
            }
        }

        pub fn isa(self) -> CpuIsa {
            CpuIsa::NeonBf16
        }

        #[inline(always)]
        pub fn dispatch<W: Vectorized>(self, work: W) -> W::Output {
            // SAFETY: the processor has NEON, which there is, and FEAT_BF16, which was looked for.
            unsafe {
                compiled(
                    #[inline(always)]
                    || work.run(self.0),
                )
            }
        }

        #[inline(always)]
        pub fn mul_add<S: Simd>(self, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
            // SAFETY: as above.
            pulp::cast(unsafe { mul_add(pulp::cast(a), pulp::cast(b), pulp::cast(c)) })
        }

        /// Four scalars a register, each of which a product takes from there.
        #[inline(always)]
        pub fn add_products<S: RegisterTile, const W: usize, const N: usize>(
            self,
            _: S,
            sums: &mut [[S::f32s; W]; N],
            scalars: &[f32; N],
            vectors: &[S::f32s; W],
        ) {
            const { assert!(N % 4 == 0) };
            for (sums, &four) in sums.as_chunks_mut::<4>().0.iter_mut().zip(scalars.as_chunks::<4>().0) {
                for w in 0..W {
                    sums[0][w] = self.mul_add_element::<S, 0>(vectors[w], four, sums[0][w]);
                    sums[1][w] = self.mul_add_element::<S, 1>(vectors[w], four, sums[1][w]);
                    sums[2][w] = self.mul_add_element::<S, 2>(vectors[w], four, sums[2][w]);
                    sums[3][w] = self.mul_add_element::<S, 3>(vectors[w], four, sums[3][w]);
                }
            }
        }

        #[inline(always)]
        fn mul_add_element<S: Simd, const ELEMENT: u32>(self, a: S::f32s, four: [f32; 4], c: S::f32s) -> S::f32s {
            // SAFETY: as above.
            pulp::cast(unsafe { mul_add_element::<ELEMENT>(pulp::cast(a), pulp::cast(four), pulp::cast(c)) })
        }

        /// Words of two numbers each, rounded to the nearest, ties to even.
        #[inline(always)]
        pub fn pair<S: Simd>(self, low: S::f32s, high: S::f32s) -> S::f32s {
            // SAFETY: as above.
            pulp::cast(unsafe { pair(pulp::cast(low), pulp::cast(high)) })
        }
    }

    #[target_feature(enable = "neon,bf16")]
    fn compiled<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    #[inline]
    #[target_feature(enable = "neon,bf16")]
    fn mul_add(a: float32x4_t, b: float32x4_t, mut c: float32x4_t) -> float32x4_t {
        // SAFETY: computes on registers; the processor has the instruction.
        unsafe {
            asm!(
                "bfdot {c:v}.4s, {a:v}.8h, {b:v}.8h",
                a = in(vreg) a, b = in(vreg) b, c = inout(vreg) c,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        c
    }

    /// `a · four[ELEMENT] + c`
    #[inline]
    #[target_feature(enable = "neon,bf16")]
    fn mul_add_element<const ELEMENT: u32>(a: float32x4_t, four: float32x4_t, mut c: float32x4_t) -> float32x4_t {
        // SAFETY: computes on registers; the processor has the instruction.
        unsafe {
            asm!(
                "bfdot {c:v}.4s, {a:v}.8h, {four:v}.2h[{element}]",
                a = in(vreg) a, four = in(vreg) four, c = inout(vreg) c, element = const ELEMENT,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        c
    }

    #[inline]
    #[target_feature(enable = "neon,bf16")]
    fn pair(low: float32x4_t, high: float32x4_t) -> float32x4_t {
        let pairs: float32x4_t;
        // SAFETY: computes on registers; the processor has the instructions.
        unsafe {
            asm!(
                "bfcvtn {pairs:v}.4h, {low:v}.4s",
                "bfcvtn {upper:v}.4h, {high:v}.4s",
                "zip1 {pairs:v}.8h, {pairs:v}.8h, {upper:v}.8h",
                low = in(vreg) low, high = in(vreg) high, pairs = out(vreg) pairs, upper = out(vreg) _,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        pairs
    }
}

/// No processor of the architecture is known to have them.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod processor {
    use pulp::Simd;

    use super::{CpuIsa, RegisterTile, Vectorized, Vectors};

    #[derive(Debug, Clone, Copy)]
    pub(super) enum Token {}

    impl Token {
        pub fn of(_: Vectors) -> Option<Self> {
            None
        }

        pub fn isa(self) -> CpuIsa {
            match self {}
        }

        #[inline(always)]
        pub fn dispatch<W: Vectorized>(self, _: W) -> W::Output {
            match self {}
        }

        #[inline(always)]
        pub fn mul_add<S: Simd>(self, _: S::f32s, _: S::f32s, _: S::f32s) -> S::f32s {
            match self {}
        }

        #[inline(always)]
        pub fn add_products<S: RegisterTile, const W: usize, const N: usize>(
            self,
            _: S,
            _: &mut [[S::f32s; W]; N],
            _: &[f32; N],
            _: &[S::f32s; W],
        ) {
            match self {}
        }

        #[inline(always)]
        pub fn pair<S: Simd>(self, _: S::f32s, _: S::f32s) -> S::f32s {
            match self {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_neighbours_wherever_a_row_begins() {
        let row: Vec<bf16> = (0..9).map(|at| bf16::from_f32(at as f32)).collect();
        for start in 0..2 {
            let mut scratch = [f32::NAN; 4];
            let words = words(&row[start..start + 8], &mut scratch);
            for (at, word) in words.iter().enumerate() {
                let [low, high] = [0, 1].map(|half| row[start + 2 * at + half].to_bits());
                assert_eq!(word.to_bits(), u32::from(low) | u32::from(high) << 16);
            }
            assert_eq!(words.len(), 4);
        }
    }

    #[test]
    fn rows_are_joined_element_by_element() {
        let [low, high] = [[1.0, f32::NEG_INFINITY, -0.0], [f32::NAN, 2.0, 0.5]].map(|row| row.map(bf16::from_f32));
        let mut both = [0.0; 3];
        joined(&low, &high, &mut both);
        let mut one = [f32::NAN; 3];
        alone(&low, &mut one);
        for at in 0..3 {
            assert_eq!(both[at].to_bits(), u32::from(low[at].to_bits()) | u32::from(high[at].to_bits()) << 16);
            assert_eq!(one[at].to_bits(), u32::from(low[at].to_bits()));
        }
        assert!(!are_finite(&both[..1]) && !are_finite(&both[1..2]) && are_finite(&both[2..]));
        assert!(!are_finite(&one) && are_finite(&one[2..]));
    }
}
