//! Which head dimensions trials of many take: as many as there are, unless compiling for each takes too long.

use varlen_fa::{Device, Kernel};

use super::trials::{Variant, is_emulated_gpu};

/// The least, two that fill no power of two, and one with a tile of its own.
const FEW: [usize; 4] = [8, 40, 72, 200];

/// A few, where a kernel compiles a shader for each and that takes long: an emulated GPU's compiler unrolls the kernel on cooperative
/// matrices into 3 to 10 seconds of work at head dimension 64, and a minute at 256; the call itself takes milliseconds.
pub fn few(device: &Device, kernel: Kernel) -> Option<&'static [usize]> {
    let is_slow = kernel == Kernel::WgslCoop && device.capabilities().is_software;
    is_slow.then_some(&FEW[..])
}

/// Which of some head dimensions a kernel takes; those above 256 not on an emulated GPU, which compiles each width for seconds.
pub fn of(variant: &Variant, head_dims: &[usize]) -> impl Iterator<Item = usize> {
    let widest = if is_emulated_gpu(&variant.device) { 256 } else { 512 }.min(variant.kernel.max_head_dim());
    head_dims.iter().copied().filter(move |&head_dim| head_dim <= widest)
}

/// Says which kernels take a few, before a test of theirs runs.
pub fn explain(device: &Device, test: &str) {
    for &kernel in &device.capabilities().kernels {
        if let Some(few) = few(device, kernel) {
            eprintln!(
                "{test}: {few:?} alone for {kernel}, which takes long to compile, since {} is emulated",
                device.name()
            );
        }
    }
}
