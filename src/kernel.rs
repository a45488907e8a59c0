//! The table of attention kernels: what each is called, where it runs, and what it can do. Plans, settings, errors, the C library
//! and the tests read this table; a new kernel is a new row.

use std::fmt;
use std::str::FromStr;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::score_modifiers::ModifierSet;

/// The largest head dimension of any kernel.
pub(crate) const MAX_HEAD_DIM: usize = 512;

/// The kind of device that a kernel runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum BackendKind {
    /// The host's processor.
    Cpu,
    /// A GPU through wgpu: Vulkan, Metal, DirectX 12 or WebGPU.
    Wgpu,
    /// An NVIDIA GPU through the CUDA driver.
    Cuda,
}

impl BackendKind {
    /// Every kind.
    pub const ALL: &'static [Self] = &[Self::Cpu, Self::Wgpu, Self::Cuda];

    /// `cpu`, `wgpu` or `cuda`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

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

/// How a kernel reads padded tensors on the fused path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PaddedAccess {
    /// Row by row through index lists.
    Rows,
    /// Tile by tile through lists.
    TileLists,
}

/// What a kernel does with q, k, v or an output that come in several segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SegmentAccess {
    /// It reads and writes them where they lie.
    InPlace,
    /// So on the fused path, if [`Cuts`](crate::call::segments::Cuts) are few; elsewhere copied.
    InPlaceFused,
    /// Its device copies them to one tensor, and the output back.
    Copied,
}

/// What one kernel can do: a row of the table.
#[derive(Debug)]
pub(crate) struct KernelTraits {
    kernel: Kernel,
    name: &'static str,
    backend: BackendKind,
    /// Element types of q, k, v and the output.
    dtypes: &'static [DType],
    max_head_dim: usize,
    /// Head dimensions below this waste work, because the kernel pads rows to 64 columns. `plan` prefers another kernel for
    /// them if there is one.
    min_efficient_head_dim: usize,
    padded: PaddedAccess,
    pub(crate) segments: SegmentAccess,
    /// Whether it adds a bias to the scores of padded tensors, all rows of which it computes.
    has_bias: bool,
    /// Whether it adds a bias on the fused path too.
    pub(crate) has_fused_bias: bool,
    /// Whether it does so beside the log-sum-exp.
    pub(crate) has_fused_bias_beside_lse: bool,
    /// Whether it takes a range of keys for each query.
    has_ranges: bool,
    /// Whether it takes what else it takes, a bias and ranges, beside metadata that a GPU built too.
    takes_all_with_device_meta: bool,
    /// Whether its dense path costs what a key mask keeps, so that the fused one has no advantage.
    pub(crate) skips_dropped_keys: bool,
    /// What it does to scores beside their scale and a bias.
    modifiers: ModifierSet,
    /// Whether it writes packed output to its padded places itself, and zeros to the others.
    pub(crate) scatters: bool,
    /// Whether heads of a key/value head can share its query tiles.
    pub(crate) packs_heads: bool,
    /// Whether a packed call may have one padded side, on which every token is valid.
    pub(crate) mixes_padded_and_packed: bool,
    /// Whether such a side is taken for packed rows where its batch rows lie one after the other.
    pub(crate) takes_valid_sides_as_rows: bool,
}

const ALL_DTYPES: &[DType] = &[DType::F32, DType::F16, DType::Bf16];
const HALF_DTYPES: &[DType] = &[DType::F16, DType::Bf16];

/// A kernel that reads single rows and has every feature; rows of the table name what differs.
const ROWS: KernelTraits = KernelTraits {
    kernel: Kernel::CpuTiled,
    name: "",
    backend: BackendKind::Cpu,
    dtypes: ALL_DTYPES,
    max_head_dim: MAX_HEAD_DIM,
    min_efficient_head_dim: 0,
    padded: PaddedAccess::Rows,
    segments: SegmentAccess::Copied,
    has_bias: true,
    has_fused_bias: false,
    has_fused_bias_beside_lse: false,
    has_ranges: false,
    takes_all_with_device_meta: false,
    skips_dropped_keys: false,
    modifiers: ModifierSet { softcap: false, alibi: false, sinks: false },
    scatters: false,
    packs_heads: false,
    mixes_padded_and_packed: false,
    takes_valid_sides_as_rows: false,
};

/// A CUDA kernel that works by tile lists.
const TILE_LISTS: KernelTraits = KernelTraits {
    backend: BackendKind::Cuda,
    dtypes: HALF_DTYPES,
    max_head_dim: 256,
    min_efficient_head_dim: 33,
    padded: PaddedAccess::TileLists,
    has_bias: false,
    has_ranges: true,
    takes_all_with_device_meta: true,
    takes_valid_sides_as_rows: true,
    ..ROWS
};

/// One row a kernel, in the order of the enum.
const TABLE: &[KernelTraits; 6] = &[
    KernelTraits {
        kernel: Kernel::CpuTiled,
        name: "cpu-tiled",
        segments: SegmentAccess::InPlace,
        has_fused_bias: true,
        has_fused_bias_beside_lse: true,
        has_ranges: true,
        skips_dropped_keys: true,
        modifiers: ModifierSet::ALL,
        ..ROWS
    },
    KernelTraits {
        kernel: Kernel::WgslPortable,
        name: "wgsl-portable",
        backend: BackendKind::Wgpu,
        has_fused_bias: true,
        has_ranges: true,
        takes_all_with_device_meta: true,
        modifiers: ModifierSet::ALL,
        ..ROWS
    },
    KernelTraits {
        kernel: Kernel::WgslCoop,
        name: "wgsl-coop",
        backend: BackendKind::Wgpu,
        dtypes: HALF_DTYPES,
        max_head_dim: 256,
        has_fused_bias: true,
        has_ranges: true,
        takes_all_with_device_meta: true,
        modifiers: ModifierSet::ALL,
        ..ROWS
    },
    KernelTraits {
        kernel: Kernel::CudaSm80,
        name: "sm80",
        backend: BackendKind::Cuda,
        dtypes: HALF_DTYPES,
        has_fused_bias: true,
        has_fused_bias_beside_lse: true,
        has_ranges: true,
        takes_all_with_device_meta: true,
        modifiers: ModifierSet::ALL,
        mixes_padded_and_packed: true,
        ..ROWS
    },
    KernelTraits {
        kernel: Kernel::CudaSm90,
        name: "sm90",
        segments: SegmentAccess::InPlaceFused,
        scatters: true,
        packs_heads: true,
        ..TILE_LISTS
    },
    KernelTraits { kernel: Kernel::CudaSm100, name: "sm100", max_head_dim: 128, ..TILE_LISTS },
];

// `traits` finds a row by its place.
const _: () = {
    let mut at = 0;
    while at < TABLE.len() {
        assert!(TABLE[at].kernel as usize == at && Kernel::ALL[at] as usize == at);
        at += 1;
    }
    assert!(at == Kernel::ALL.len());
};

impl Kernel {
    /// Every kernel, whether or not this build and this machine can run it.
    pub const ALL: &'static [Self] =
        &[Self::CpuTiled, Self::WgslPortable, Self::WgslCoop, Self::CudaSm80, Self::CudaSm90, Self::CudaSm100];

    /// The kernel's row of the table.
    pub(crate) const fn traits(self) -> &'static KernelTraits {
        &TABLE[self as usize]
    }

    /// Why it adds no bias on the fused path of a call, if it does not.
    pub(crate) fn refuses_fused_bias(self, lse: bool) -> Option<&'static str> {
        let &KernelTraits { has_fused_bias, has_fused_bias_beside_lse, .. } = self.traits();
        match (has_fused_bias, has_fused_bias_beside_lse || !lse) {
            (true, true) => None,
            (true, false) => Some("adds a bias beside the log-sum-exp on the dense path alone"),
            (false, _) => Some("adds a bias on the dense path alone"),
        }
    }

    /// The kernel's name, e.g. `wgsl-portable`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.traits().name
    }

    /// The kind of device that it runs on.
    #[must_use]
    pub const fn backend(self) -> BackendKind {
        self.traits().backend
    }

    /// Element types that it computes with, where its device does too.
    #[must_use]
    pub const fn dtypes(self) -> &'static [DType] {
        self.traits().dtypes
    }

    /// The largest head dimension that it computes with; any from 1 on.
    #[must_use]
    pub const fn max_head_dim(self) -> usize {
        self.traits().max_head_dim
    }

    /// Whether it adds a bias to the scores.
    #[must_use]
    pub const fn has_bias(self) -> bool {
        self.traits().has_bias
    }

    /// Whether it takes a range of keys for each query, [`KeyRanges`](crate::KeyRanges).
    #[must_use]
    pub const fn has_ranges(self) -> bool {
        self.traits().has_ranges
    }

    /// Whether it adds a bias on the fused path too, where masked rows and keys are left out.
    #[must_use]
    pub const fn has_fused_bias(self) -> bool {
        self.traits().has_fused_bias
    }

    /// Whether it takes what else it takes, a [bias](Self::has_bias) and [key ranges](Self::has_ranges), beside metadata that a GPU
    /// built too, [`DeviceVarlenMeta`](crate::DeviceVarlenMeta).
    #[must_use]
    pub const fn takes_all_with_device_meta(self) -> bool {
        self.traits().takes_all_with_device_meta
    }

    /// Whether it caps scores: [`ScoreModifiers::with_softcap`](crate::ScoreModifiers::with_softcap).
    #[must_use]
    pub const fn has_softcap(self) -> bool {
        self.traits().modifiers.softcap
    }

    /// Whether it takes distances times slopes from scores: [`ScoreModifiers::with_alibi`](crate::ScoreModifiers::with_alibi).
    #[must_use]
    pub const fn has_alibi(self) -> bool {
        self.traits().modifiers.alibi
    }

    /// Whether it has attention sinks: [`ScoreModifiers::with_sinks`](crate::ScoreModifiers::with_sinks).
    #[must_use]
    pub const fn has_sinks(self) -> bool {
        self.traits().modifiers.sinks
    }

    /// Whether it reads padded tensors through lists of tiles. Such a kernel does not run dense with metadata that a device built.
    /// Other kernels read single rows.
    #[must_use]
    pub const fn works_by_tile_lists(self) -> bool {
        matches!(self.traits().padded, PaddedAccess::TileLists)
    }

    /// Whether it wastes no work on rows of this many elements.
    pub(crate) fn is_efficient_at(self, head_dim: usize) -> bool {
        head_dim >= self.traits().min_efficient_head_dim
    }

    /// The names of all kernels, for messages: `a, b or c`.
    pub(crate) fn names() -> String {
        let names: Vec<&str> = Self::ALL.iter().map(|kernel| kernel.name()).collect();
        match names.split_last() {
            Some((last, [])) => (*last).to_owned(),
            Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
            None => String::new(),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kernel {
    type Err = Error;

    /// Reads a kernel's name, e.g. `sm80`.
    fn from_str(text: &str) -> Result<Self> {
        let known = Self::ALL.iter().find(|kernel| kernel.name() == text);
        known.copied().ok_or_else(|| Error::UnknownKernel { expected: Self::names(), got: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kernel_has_its_row() {
        for row in TABLE {
            let kernel = row.kernel;
            assert_eq!(row.name.parse(), Ok(kernel));
            assert!(row.max_head_dim <= MAX_HEAD_DIM && !row.dtypes.is_empty(), "{kernel}");
        }
        let names = Kernel::names();
        assert!(names.starts_with("cpu-tiled, wgsl-portable, ") && names.matches(" or ").count() == 1, "{names}");
    }
}
