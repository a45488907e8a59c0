//! The instruction sets that the arithmetic is compiled for, in one table: name, detection, and the
//! tile of sums that a product keeps in registers.
//!
//! A product adds `scalars[i] × vectors[i]` for all `i` to a tile of `SCALARS` rows of `VECTORS`
//! SIMD vectors. Each step loads a row of vectors and spreads one scalar after another over a
//! register; NEON multiplies by an element of a register instead.
//!
//! ```text
//!    AVX2, 16 registers of 8               AVX-512, NEON: 32 registers of 16, of 4
//!
//!             v0   v1     2                         v0   v1   v2     3
//!           +----+----+                           +----+----+----+
//!    s0  s  |    |    |   s: a scalar,     s0     |    |    |    |   AVX-512: spread as well;
//!    s1     |    |    |   spread           s1     |    |    |    |   NEON: elements of 2 vectors
//!    s2     |    |    |                    s2     |    |    |    |
//!    s3     |    |    |                    s3     |    |    |    |
//!    s4     |    |    |                    s4     |    |    |    |
//!    s5     |    |    |                    s5     |    |    |    |
//!           +----+----+                    s6     |    |    |    |
//!        12 sums + 2 + 1 = 15              s7     |    |    |    |
//!                                                 +----+----+----+
//!                                           24 sums + 3 + 2 = 29
//! ```
//!
//! Instructions for products of bf16 come on top of a row of the table (`bf16_pairs`); a processor
//! has both (`processor`).

use pulp::Simd;

use crate::config::CpuIsa;

/// An instruction set's vectors, and its tile of sums.
pub(super) trait RegisterTile: Simd {
    /// SIMD vectors of queries of the widest strip.
    const VECTORS: usize;
    /// Those of the narrowest strip whose products are as fast, as far as that was measured.
    const FEWEST_VECTORS: usize;
    /// Scalars of a product: keys, or columns of the values.
    const SCALARS: usize;

    /// Runs work on a tile of sums of the given width, at most `VECTORS`.
    fn run_at_width<W: AtWidth>(self, width: usize, work: W);

    /// Adds `scalars[n] · vectors[w]` to `sums[n][w]`.
    #[inline(always)]
    fn add_products<const W: usize, const N: usize>(
        self,
        sums: &mut [[Self::f32s; W]; N],
        scalars: &[f32; N],
        vectors: &[Self::f32s; W],
    ) {
        for n in 0..N {
            let scalar = self.splat_f32s(scalars[n]);
            for w in 0..W {
                sums[n][w] = self.mul_add_e_f32s(vectors[w], scalar, sums[n][w]);
            }
        }
    }
}

/// Work that is compiled for each width of a tile of sums: `VECTORS` SIMD vectors by `SCALARS`.
pub(super) trait AtWidth {
    fn run<S: RegisterTile, const VECTORS: usize, const SCALARS: usize>(self, simd: S);
}

/// Work that is compiled for each instruction set.
pub(super) trait Vectorized {
    type Output;
    fn run<S: RegisterTile>(self, simd: S) -> Self::Output;
}

macro_rules! instruction_sets {
    ($($(#[$present:meta])* $isa:ident: $simd:ty, $detect:expr, $vectorize:expr, [$($width:literal),*] x $scalars:literal, from $fewest:literal
        $({ $($own:tt)* })?;)*) => {
        /// Vectors of f32 that this processor has.
        #[derive(Debug, Clone, Copy)]
        pub(super) enum Vectors {
            $($(#[$present])* $isa($simd),)*
        }

        $($(#[$present])* impl RegisterTile for $simd {
            const VECTORS: usize = [$($width),*].len();
            const FEWEST_VECTORS: usize = $fewest;
            const SCALARS: usize = $scalars;

            #[inline(always)]
            fn run_at_width<W: AtWidth>(self, width: usize, work: W) {
                match width {
                    $($width => work.run::<Self, $width, $scalars>(self),)*
                    _ => unreachable!("a strip is one of these widths"),
                }
            }

            $($($own)*)?
        })*

        impl Vectors {
            /// All of this processor, the best ones first. The last ones are part of every
            /// processor.
            pub fn all() -> impl Iterator<Item = Self> {
                [$($(#[$present])* $detect.map(Self::$isa),)*].into_iter().flatten()
            }

            pub fn isa(self) -> CpuIsa {
                match self {
                    $($(#[$present])* Self::$isa(_) => CpuIsa::$isa,)*
                }
            }

            /// Runs the work, compiled for them.
            #[inline(always)]
            pub fn dispatch<W: Vectorized>(self, work: W) -> W::Output {
                match self {
                    $($(#[$present])* Self::$isa(simd) => {
                        $vectorize(simd, #[inline(always)] || work.run(simd))
                    })*
                }
            }

            #[inline(always)]
            pub fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
                match self {
                    $($(#[$present])* Self::$isa(simd) => $vectorize(simd, work),)*
                }
            }
        }
    };
}

instruction_sets! {
    #[cfg(target_arch = "x86_64")]
    Avx512: pulp::x86::V4, pulp::x86::V4::try_new(), |simd: pulp::x86::V4, work| simd.vectorize(work), [1, 2, 3] x 8, from 1;
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    Avx2: pulp::x86::V3, pulp::x86::V3::try_new(), |simd: pulp::x86::V3, work| simd.vectorize(work), [1, 2] x 6, from 2;
    #[cfg(target_arch = "aarch64")]
    Neon: pulp::aarch64::Neon, pulp::aarch64::Neon::try_new(), |simd: pulp::aarch64::Neon, work| simd.vectorize(work), [1, 2, 3] x 8, from 3 {
        /// Four scalars a register, each of which a multiplication takes from there.
        #[inline(always)]
        fn add_products<const W: usize, const N: usize>(
            self,
            sums: &mut [[Self::f32s; W]; N],
            scalars: &[f32; N],
            vectors: &[Self::f32s; W],
        ) {
            const { assert!(N % 4 == 0) };
            for (sums, &four) in sums.as_chunks_mut::<4>().0.iter_mut().zip(scalars.as_chunks::<4>().0) {
                let four = pulp::cast(four);
                for w in 0..W {
                    let vector = pulp::cast(vectors[w]);
                    let neon = self.neon;
                    sums[0][w] = pulp::cast(neon.vfmaq_laneq_f32::<0>(pulp::cast(sums[0][w]), vector, four));
                    sums[1][w] = pulp::cast(neon.vfmaq_laneq_f32::<1>(pulp::cast(sums[1][w]), vector, four));
                    sums[2][w] = pulp::cast(neon.vfmaq_laneq_f32::<2>(pulp::cast(sums[2][w]), vector, four));
                    sums[3][w] = pulp::cast(neon.vfmaq_laneq_f32::<3>(pulp::cast(sums[3][w]), vector, four));
                }
            }
        }
    };
    #[cfg(target_arch = "wasm32")]
    Simd128: pulp::wasm::Simd128, pulp::wasm::Simd128::try_new(), |simd: pulp::wasm::Simd128, work| simd.vectorize(work), [1, 2, 3] x 8, from 3;
    Scalar: pulp::Scalar, Some(pulp::Scalar::new()), run_scalar, [1, 2] x 6, from 2;
}

#[inline(always)]
fn run_scalar<R>(_: pulp::Scalar, work: impl FnOnce() -> R) -> R {
    work()
}
