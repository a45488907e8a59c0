//! Implementations of attention, and their names.

use std::fmt;

/// An implementation of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// The CPU device's tiled kernel: SIMD products and softmax, dispatched at run time.
    CpuTiled,
    /// The WGSL kernel that needs no optional feature.
    WgslPortable,
    /// The WGSL kernel on cooperative matrices (tensor cores): f16 operands, f32 accumulators.
    WgslCoop,
    /// The CUDA kernel of every chip from compute capability 8.0 on: `mma.sync` and `cp.async`.
    CudaSm80,
    /// The CUDA kernel of compute capability 9.0 (Hopper): `wgmma` and TMA.
    CudaSm90,
    /// The CUDA kernel of compute capability 10.0 and 10.3 (Blackwell): `tcgen05` and TMA.
    CudaSm100,
}

impl Kernel {
    const ALL: [Self; 6] =
        [Self::CpuTiled, Self::WgslPortable, Self::WgslCoop, Self::CudaSm80, Self::CudaSm90, Self::CudaSm100];

    /// The kernel's name, e.g. `wgsl-portable`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CpuTiled => "cpu-tiled",
            Self::WgslPortable => "wgsl-portable",
            Self::WgslCoop => "wgsl-coop",
            Self::CudaSm80 => "sm80",
            Self::CudaSm90 => "sm90",
            Self::CudaSm100 => "sm100",
        }
    }

    /// The kernel with a name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kernel| kernel.name() == name)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
