//! What a processor can do at most.

use std::hint::black_box;
use std::time::Instant;

use pulp::{Arch, Simd, WithSimd};

/// Sums that are computed side by side: as many as hide the latency of an addition.
pub const CHAINS: usize = 12;

/// Multiplications and additions on registers.
struct Peak {
    steps: usize,
}

impl WithSimd for Peak {
    /// Operations, and a value that depends on all of them.
    type Output = (usize, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let (factor, addend) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(1.0)));
        let mut chains = [simd.splat_f32s(1.0); CHAINS];
        for _ in 0..self.steps {
            for chain in &mut chains {
                *chain = simd.mul_add_e_f32s(*chain, factor, addend);
            }
        }
        let sum = chains.into_iter().fold(simd.splat_f32s(0.0), |sum, chain| simd.add_f32s(sum, chain));
        (2 * self.steps * CHAINS * S::F32_LANES, simd.reduce_sum_f32s(sum))
    }
}

/// GFLOP/s of one thread that does nothing but f32 multiplications and additions in registers.
pub fn peak_gflops(arch: Arch) -> f64 {
    let started = Instant::now();
    let (operations, value) = arch.dispatch(Peak { steps: 200_000 });
    let seconds = started.elapsed().as_secs_f64();
    black_box(value);
    operations as f64 / seconds / 1e9
}
