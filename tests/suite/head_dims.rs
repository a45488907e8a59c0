//! Which head dimensions trials of many take: as many as there are, unless compiling for each takes too long.

use varlen_fa::{Device, Kernel};

use super::trials::{Variant, is_emulated_gpu};

/// The least, two that fill no power of two, and one with a tile of its own.
const FEW: [usize; 4] = [8, 40, 72, 200];

/// A few, where a kernel compiles a shader for each and that takes long: the kernel on cooperative matrices takes an emulated GPU's
/// compiler about 10 seconds of a processor at head dimension 16, 25 at 32 and 80 at 40 and 64; the call itself takes milliseconds.
pub fn few(device: &Device, kernel: Kernel) -> Option<&'static [usize]> {
    let is_slow = kernel == Kernel::WgslCoop && device.capabilities().is_software;
    is_slow.then_some(&FEW[..])
}

/// The head dimension of a trial that is about something else: a narrow one where a kernel takes long to compile.
pub fn or_narrow(variant: &Variant, head_dim: usize) -> usize {
    if few(&variant.device, variant.kernel).is_some() { 16 } else { head_dim }
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
