//! How long it takes from nothing to the first result.

use std::time::Instant;

use serde::Serialize;
use varlen_fa::{AttentionMask, DType, Device, DeviceChoice, KeyMask, MaskedAttention, Result, Tensor, VarlenMeta};
use varlen_fa_harness::times::milliseconds;

/// Times in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ColdStart {
    /// Opening the device, and comparing its kernels with one another.
    pub open_ms: f64,
    /// Opening it once more in the same process.
    pub open_again_ms: f64,
    /// The first call, which compiles shaders on wgpu devices.
    pub first_call_ms: f64,
    /// The next call of the kind.
    pub next_call_ms: f64,
}

/// A small call: what it computes takes no time.
const SHAPE: [usize; 4] = [2, 128, 4, 64];

impl ColdStart {
    /// Opens a device that was not opened before in the process, and makes it compute.
    ///
    /// # Errors
    /// Why the device is not available, or the calls fail.
    pub fn measure(choice: DeviceChoice) -> Result<(Device, Self)> {
        let started = Instant::now();
        let device = Device::new(choice)?;
        let open_ms = milliseconds(started.elapsed());
        let started = Instant::now();
        drop(Device::new(choice)?);
        let open_again_ms = milliseconds(started.elapsed());

        let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(SHAPE[1], &[SHAPE[1], 37])?)?;
        let layer = MaskedAttention::new(&device);
        let dtype = device.capabilities().dtypes.first().copied().unwrap_or(DType::F32);
        let x = Tensor::zeros(&device, dtype, &SHAPE)?;
        let mut out = Tensor::zeros(&device, dtype, &SHAPE)?;
        device.synchronize()?;
        let mut call = || -> Result<f64> {
            let started = Instant::now();
            layer.forward_into(&x, &x, &x, AttentionMask::varlen(&meta), &mut out)?;
            device.synchronize()?;
            Ok(milliseconds(started.elapsed()))
        };
        let (first_call_ms, next_call_ms) = (call()?, call()?);
        Ok((device, Self { open_ms, open_again_ms, first_call_ms, next_call_ms }))
    }
}
