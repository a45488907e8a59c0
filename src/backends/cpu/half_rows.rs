//! Rows of f16 from and to f32, by the processor's instructions: `half` converts eight at a time
//! through a function pointer.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Elements that one step converts, where there are instructions for it.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const STEP: usize = 8;

/// Converts a row to another of the same length.
#[inline(always)]
pub(super) fn widen(from: &[f16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has F16C, and AVX with it.
        unsafe { x86::widen(from, to) };
        return;
    }
    #[cfg(target_arch = "aarch64")]
    neon::widen(from, to);
    #[cfg(not(target_arch = "aarch64"))]
    from.convert_to_f32_slice(to);
}

/// Rounds a row to another of the same length: to the nearest, ties to even.
#[inline(always)]
pub(super) fn narrow(from: &[f32], to: &mut [f16]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has F16C, and AVX with it.
        unsafe { x86::narrow(from, to) };
        return;
    }
    #[cfg(target_arch = "aarch64")]
    neon::narrow(from, to);
    #[cfg(not(target_arch = "aarch64"))]
    to.convert_from_f32_slice(from);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m128i, __m256, _MM_FROUND_TO_NEAREST_INT, _mm256_cvtph_ps, _mm256_cvtps_ph};

    use super::{HalfFloatSliceExt, STEP, f16};

    #[inline]
    #[target_feature(enable = "avx,f16c")]
    pub fn widen(from: &[f16], to: &mut [f32]) {
        let (from, rest) = from.as_chunks::<STEP>();
        let (to, to_rest) = to.as_chunks_mut::<STEP>();
        for (to, &from) in to.iter_mut().zip(from) {
            let wide: __m256 = _mm256_cvtph_ps(bytemuck::cast::<_, __m128i>(from));
            *to = bytemuck::cast(wide);
        }
        if !rest.is_empty() {
            rest.convert_to_f32_slice(to_rest);
        }
    }

    #[inline]
    #[target_feature(enable = "avx,f16c")]
    pub fn narrow(from: &[f32], to: &mut [f16]) {
        let (from, rest) = from.as_chunks::<STEP>();
        let (to, to_rest) = to.as_chunks_mut::<STEP>();
        for (to, &from) in to.iter_mut().zip(from) {
            let narrow = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(bytemuck::cast::<_, __m256>(from));
            *to = bytemuck::cast(narrow);
        }
        if !rest.is_empty() {
            to_rest.convert_from_f32_slice(rest);
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::asm;

    use super::{HalfFloatSliceExt, STEP, f16};

    #[inline(always)]
    pub fn widen(from: &[f16], to: &mut [f32]) {
        let (from, rest) = from.as_chunks::<STEP>();
        let (to, to_rest) = to.as_chunks_mut::<STEP>();
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: reads 16 bytes of `from` and writes 32 of `to`, which are as long; every
            // 64-bit Arm has the instructions.
            unsafe {
                asm!(
                    "ldr {narrow:q}, [{from}]",
                    "fcvtl {low:v}.4s, {narrow:v}.4h",
                    "fcvtl2 {high:v}.4s, {narrow:v}.8h",
                    "stp {low:q}, {high:q}, [{to}]",
                    from = in(reg) from.as_ptr(), to = in(reg) to.as_mut_ptr(),
                    narrow = out(vreg) _, low = out(vreg) _, high = out(vreg) _,
                    options(nostack, preserves_flags),
                );
            }
        }
        rest.convert_to_f32_slice(to_rest);
    }

    #[inline(always)]
    pub fn narrow(from: &[f32], to: &mut [f16]) {
        let (from, rest) = from.as_chunks::<STEP>();
        let (to, to_rest) = to.as_chunks_mut::<STEP>();
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: reads 32 bytes of `from` and writes 16 of `to`, which are as long; every
            // 64-bit Arm has the instructions.
            unsafe {
                asm!(
                    "ldp {low:q}, {high:q}, [{from}]",
                    "fcvtn {narrow:v}.4h, {low:v}.4s",
                    "fcvtn2 {narrow:v}.8h, {high:v}.4s",
                    "str {narrow:q}, [{to}]",
                    from = in(reg) from.as_ptr(), to = in(reg) to.as_mut_ptr(),
                    narrow = out(vreg) _, low = out(vreg) _, high = out(vreg) _,
                    options(nostack, preserves_flags),
                );
            }
        }
        to_rest.convert_from_f32_slice(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_convert_as_elements_do() {
        // Every value, and as many again that do not fill the last step.
        let every: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).chain([f16::ONE; 5]).collect();
        let mut wide = vec![0.0; every.len()];
        widen(&every, &mut wide);
        // Values between two f16, and on the border of both.
        let between: Vec<f32> = wide.iter().map(|x| f32::from_bits(x.to_bits() + 0x1000)).collect();
        for wide in [&wide, &between] {
            let mut back = vec![f16::ZERO; every.len()];
            narrow(wide, &mut back);
            for (&wide, &back) in wide.iter().zip(&back) {
                let expected = f16::from_f32(wide);
                assert!(back.to_bits() == expected.to_bits() || wide.is_nan() && back.is_nan(), "{wide} {back}");
            }
        }
        for (&from, &wide) in every.iter().zip(&wide) {
            assert!(wide.to_bits() == from.to_f32().to_bits() || from.is_nan() && wide.is_nan(), "{from} {wide}");
        }
    }
}
