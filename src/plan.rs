//! Which path and kernel a call takes, and why. Pure: it looks at the checked call, the device's capabilities and the settings.

use std::fmt;

use crate::config::Config;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::problem::{AttentionProblem, MaskInfo};

/// How a call is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Path {
    /// Every query against every key of the padded tensors, masked keys dropped from the softmax.
    Dense,
    /// One pass over the padded tensors in place that skips what is masked and writes the padded, zero-filled output.
    Fused,
    /// Pack, varlen attention on the packed rows, scatter with zeros.
    Packed,
    /// Zeros only: no query or no key is valid.
    Zero,
}

impl Path {
    /// The path's name: `dense`, `fused`, `packed` or `zero`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Fused => "fused",
            Self::Packed => "packed",
            Self::Zero => "zero",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
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
    /// The CUDA kernel of every chip from compute capability 8.0 on: `mma.sync` and `cp.async`.
    CudaSm80,
}

impl Kernel {
    /// The kernel's name, e.g. `wgsl-portable`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CpuTiled => "cpu-tiled",
            Self::WgslPortable => "wgsl-portable",
            Self::CudaSm80 => "sm80",
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a path was taken. [`Display`](fmt::Display) says it in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// No mask was given.
    NoMask,
    /// A key mask was given: dropped queries are computed like any other.
    KeyMask,
    /// A key mask was given that keeps every key, so it is not applied.
    KeyMaskKeepsAll,
    /// An additive bias was given.
    Bias,
    /// Metadata was given in which every token is valid.
    AllValid,
    /// Metadata was given with no valid query or no valid key.
    NothingValid,
    /// Metadata was given, and the device reads padded tensors in place.
    InPlace,
    /// Metadata was given, and the device has no kernel that reads padded tensors in place.
    NoFusedKernel,
    /// Metadata was given that is in the device's memory, so the plan cannot know the mask.
    MetadataOnDevice,
    /// `VARLEN_FA=0`, or [`Config::force_dense`].
    DenseForced,
    /// The caller forced the path.
    PathForced,
    /// The tensors were packed already.
    AlreadyPacked,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoMask => "no mask was given",
            Self::KeyMask => "a key mask without metadata computes every query row",
            Self::KeyMaskKeepsAll => "the key mask keeps every key",
            Self::Bias => "an additive bias was given",
            Self::AllValid => "every token is valid, so there is nothing to skip",
            Self::NothingValid => "no query or no key is valid, so the output is zeros",
            Self::InPlace => "metadata was given and the device reads padded tensors in place",
            Self::NoFusedKernel => "metadata was given and the device has no kernel that reads padded tensors in place",
            Self::MetadataOnDevice => "the metadata was built on the device, where the plan cannot see it",
            Self::DenseForced => "dense attention is forced (VARLEN_FA=0)",
            Self::PathForced => "the caller forced this path",
            Self::AlreadyPacked => "the rows are packed already",
        })
    }
}

/// What was decided for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// How the call is computed.
    pub path: Path,
    /// What computes it. No kernel runs on [`Path::Zero`].
    pub kernel: Kernel,
    /// Why.
    pub reason: Reason,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path {
            Path::Zero => write!(f, "{}: {}", self.path, self.reason),
            path => write!(f, "{path} by {}: {}", self.kernel, self.reason),
        }
    }
}

/// What a device can do.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Capabilities {
    /// `cpu`, `wgpu` or `cuda`.
    pub backend: &'static str,
    /// The hardware's name, and its driver's where there is one.
    pub adapter: String,
    /// Whether the device is emulated on the CPU.
    pub is_software: bool,
    /// Element types that it computes with.
    pub dtypes: &'static [DType],
    /// Kernels that run on it, the preferred one first.
    pub kernels: Vec<Kernel>,
    /// Whether a kernel reads padded tensors in place.
    pub has_fused: bool,
    /// Bytes of the largest tensor.
    pub max_buffer_bytes: u64,
    /// Bytes that one kernel launch can reach of one tensor; work on larger tensors is split by batch row.
    pub max_binding_bytes: u64,
    /// Whether GPU time is measured by timestamp queries.
    pub has_timestamps: bool,
}

/// What a caller forces, for tests and comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Forced {
    pub path: Option<Path>,
    pub kernel: Option<Kernel>,
}

/// Plans a call on padded tensors.
pub(crate) fn plan_padded(
    problem: &AttentionProblem,
    mask: &MaskInfo<'_>,
    capabilities: &Capabilities,
    config: &Config,
    forced: Forced,
) -> Result<Plan> {
    let kernel = pick_kernel(capabilities, forced)?;
    let chosen = match mask {
        _ if problem.shape.seq_k == 0 => (Path::Zero, Reason::NothingValid),
        MaskInfo::None => (Path::Dense, Reason::NoMask),
        MaskInfo::Key(mask) if mask.is_all_kept() => (Path::Dense, Reason::KeyMaskKeepsAll),
        MaskInfo::Key(_) => (Path::Dense, Reason::KeyMask),
        MaskInfo::Bias(_) => (Path::Dense, Reason::Bias),
        MaskInfo::Varlen { query, key } if query.is_empty() || key.is_empty() => (Path::Zero, Reason::NothingValid),
        MaskInfo::Varlen { .. } | MaskInfo::DeviceVarlen { .. } if config.force_dense => {
            (Path::Dense, Reason::DenseForced)
        }
        MaskInfo::DeviceVarlen { .. } => (Path::Packed, Reason::MetadataOnDevice),
        MaskInfo::Varlen { query, key } if query.is_all_valid() && key.is_all_valid() => {
            (Path::Dense, Reason::AllValid)
        }
        MaskInfo::Varlen { .. } if capabilities.has_fused => (Path::Fused, Reason::InPlace),
        MaskInfo::Varlen { .. } => (Path::Packed, Reason::NoFusedKernel),
    };
    let (path, reason) = match forced.path {
        None => chosen,
        Some(path) => (path, check_forced_path(path, mask, capabilities)?),
    };
    Ok(Plan { path, kernel, reason })
}

/// Plans a call on packed rows.
pub(crate) fn plan_packed(capabilities: &Capabilities, forced: Forced) -> Result<Plan> {
    let kernel = pick_kernel(capabilities, forced)?;
    Ok(Plan { path: Path::Packed, kernel, reason: Reason::AlreadyPacked })
}

fn pick_kernel(capabilities: &Capabilities, forced: Forced) -> Result<Kernel> {
    let preferred = capabilities.kernels.first().copied();
    match forced.kernel {
        Some(kernel) if capabilities.kernels.contains(&kernel) => Ok(kernel),
        Some(kernel) => Err(not_applicable("kernel", kernel.name(), format!("{capabilities} does not run it"))),
        None => preferred.ok_or_else(|| not_applicable("kernel", "any", format!("{capabilities} has no kernels"))),
    }
}

fn check_forced_path(path: Path, mask: &MaskInfo<'_>, capabilities: &Capabilities) -> Result<Reason> {
    let is_varlen = matches!(mask, MaskInfo::Varlen { .. } | MaskInfo::DeviceVarlen { .. });
    let is_on_device = matches!(mask, MaskInfo::DeviceVarlen { .. });
    let why = match path {
        Path::Dense => return Ok(Reason::PathForced),
        Path::Zero => "it follows from the metadata alone".to_owned(),
        Path::Fused | Path::Packed if !is_varlen => "it needs AttentionMask::Varlen".to_owned(),
        Path::Fused if is_on_device => "it needs metadata that was built on the host".to_owned(),
        Path::Fused if !capabilities.has_fused => format!("{capabilities} has no fused kernel"),
        Path::Fused | Path::Packed => return Ok(Reason::PathForced),
    };
    Err(not_applicable("path", path.name(), why))
}

fn not_applicable(argument: &'static str, got: &str, why: String) -> Error {
    Error::NotApplicable { argument, got: got.to_owned(), why }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.backend, self.adapter)
    }
}
