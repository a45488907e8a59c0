//! The working precisions and rounding to them.

use std::fmt;

use half::{bf16, f16};

/// A working precision: the element type of the tensors under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl Precision {
    /// Every precision.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// `value` rounded to nearest even in this precision, widened back to f32.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// [`Precision::round`] of every value, in place.
    pub fn round_all(self, values: &mut [f32]) {
        if self != Self::F32 {
            for value in values {
                *value = self.round(*value);
            }
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Precision;

    #[test]
    fn ties_go_to_even() {
        // The step above 1 is 2^-10 in f16 and 2^-7 in bf16; a half and a half and a step lie midway between neighbours.
        for (precision, step) in [(Precision::F16, 2f32.powi(-10)), (Precision::Bf16, 2f32.powi(-7))] {
            assert_eq!(precision.round(1.0 + 0.5 * step), 1.0, "{precision}");
            assert_eq!(precision.round(1.0 + 1.5 * step), 1.0 + 2.0 * step, "{precision}");
            assert_eq!(precision.round(1.0 + 0.51 * step), 1.0 + step, "{precision}");
        }
        assert_eq!(Precision::F32.round(1.0 + f32::EPSILON), 1.0 + f32::EPSILON);
    }

    #[test]
    fn signs_and_special_values_survive() {
        for precision in Precision::ALL {
            assert_eq!(precision.round(-0.0).to_bits(), (-0.0f32).to_bits());
            assert_eq!(precision.round(f32::NEG_INFINITY), f32::NEG_INFINITY);
            assert!(precision.round(f32::NAN).is_nan());
        }
        assert_eq!(Precision::F16.round(65520.0), f32::INFINITY);
        assert_eq!(Precision::F16.round(2f32.powi(-24)), 2f32.powi(-24), "a subnormal is kept");
    }
}
