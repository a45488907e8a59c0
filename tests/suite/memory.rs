//! Elements as bit patterns: what devices hold, what tests put there, and what they must find afterwards.

use anyhow::{Result, bail};
use varlen_fa::{DType, Device, Tensor, bf16, f16};
use varlen_fa_testkit::Precision;

/// The testkit's name of an element type.
pub fn precision(dtype: DType) -> Precision {
    match dtype {
        DType::F16 => Precision::F16,
        DType::Bf16 => Precision::Bf16,
        _ => Precision::F32,
    }
}

/// The bits of a value, in the low bits; exact for values that the type holds.
pub fn narrow(value: f32, dtype: DType) -> u32 {
    match dtype {
        DType::F16 => u32::from(f16::from_f32(value).to_bits()),
        DType::Bf16 => u32::from(bf16::from_f32(value).to_bits()),
        _ => value.to_bits(),
    }
}

/// The value of some bits, exactly.
pub fn widen(bits: u32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_bits(bits as u16).to_f32(),
        DType::Bf16 => bf16::from_bits(bits as u16).to_f32(),
        _ => f32::from_bits(bits),
    }
}

/// Bits that no attention output has: a NaN with a payload. Outputs and the memory around them start as these.
pub fn sentinel(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 0x7e5a,
        DType::Bf16 => 0x7fda,
        _ => 0x7fc5_a5a5,
    }
}

/// Bits that must not reach any output, different from place to place: quiet and signalling NaN, and both infinities. Every other
/// 64 elements are the largest finite numbers, since a kernel may pass over those that are not finite where it looks for a range.
pub fn poison(place: usize, dtype: DType) -> u32 {
    let (others, finite): ([u32; 4], [u32; 4]) = match dtype {
        DType::F16 => ([0x7e00, 0x7c00, 0xfd01, 0xfc00], [0x7bff, 0xfbff, 0x7bff, 0x7bff]),
        DType::Bf16 => ([0x7fc0, 0x7f80, 0xff81, 0xff80], [0x7f7f, 0xff7f, 0x7f7f, 0x7f7f]),
        _ => {
            ([0x7fc0_0000, 0x7f80_0000, 0xff80_0001, 0xff80_0000], [0x7f7f_ffff, 0xff7f_ffff, 0x7f7f_ffff, 0x7f7f_ffff])
        }
    };
    let patterns = if (place / 64).is_multiple_of(2) { others } else { finite };
    patterns[place % patterns.len()]
}

/// A tensor of the given bits.
pub fn upload(device: &Device, dtype: DType, bits: &[u32], shape: &[usize]) -> Result<Tensor> {
    // The casts keep the 16 bits that there are.
    let tensor = match dtype {
        DType::F32 => {
            Tensor::from_slice(device, &bits.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>(), shape)
        }
        DType::F16 => {
            Tensor::from_slice(device, &bits.iter().map(|&bits| f16::from_bits(bits as u16)).collect::<Vec<_>>(), shape)
        }
        DType::Bf16 => Tensor::from_slice(
            device,
            &bits.iter().map(|&bits| bf16::from_bits(bits as u16)).collect::<Vec<_>>(),
            shape,
        ),
        other => bail!("the suite does not know element type {other}"),
    };
    Ok(tensor?)
}

/// The bits of a tensor.
pub fn download(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(match tensor.dtype() {
        DType::F32 => tensor.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect(),
        DType::F16 => tensor.to_vec::<f16>()?.into_iter().map(|value| u32::from(value.to_bits())).collect(),
        DType::Bf16 => tensor.to_vec::<bf16>()?.into_iter().map(|value| u32::from(value.to_bits())).collect(),
        other => bail!("the suite does not know element type {other}"),
    })
}
