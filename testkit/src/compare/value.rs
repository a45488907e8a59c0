//! Element types that can be compared.

use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
}

/// An element type of an output or a reference.
pub trait Value: Copy + sealed::Sealed {
    /// The same number in f64; every element type widens exactly.
    fn widen(self) -> f64;

    /// The bit pattern, in the low bits.
    fn bits(self) -> u64;
}

macro_rules! value {
    ($($type:ty),*) => {$(
        impl sealed::Sealed for $type {}

        impl Value for $type {
            fn widen(self) -> f64 {
                f64::from(self)
            }

            fn bits(self) -> u64 {
                u64::from(self.to_bits())
            }
        }
    )*};
}

value!(f16, bf16, f32, f64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_tell_the_zeros_apart() {
        assert_eq!([f16::ZERO.bits(), bf16::ZERO.bits(), 0f32.bits(), 0f64.bits()], [0; 4]);
        let negative = [f16::NEG_ZERO.bits(), bf16::NEG_ZERO.bits(), (-0f32).bits(), (-0f64).bits()];
        assert_eq!(negative, [1 << 15, 1 << 15, 1 << 31, 1 << 63]);
        assert_eq!(f16::from_f32(1.5).widen(), 1.5);
        assert_eq!(bf16::from_f32(-1.5).widen(), -1.5);
    }
}
