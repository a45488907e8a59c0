//! What the user may set from outside. This file is the only reader of the environment.

use std::ffi::OsString;
use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::kernel::{BackendKind, Kernel};

/// Which device to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DeviceChoice {
    /// The best one present: CUDA, then a hardware wgpu adapter, then the CPU.
    #[default]
    Auto,
    /// The CUDA device with this ordinal.
    Cuda(usize),
    /// The best wgpu adapter, software adapters included.
    Wgpu,
    /// The CPU.
    Cpu,
}

const DEVICE_NAMES: &str = "cuda, cuda:N, wgpu or cpu";

impl FromStr for DeviceChoice {
    type Err = Error;

    /// Reads `cuda`, `cuda:N`, `wgpu` or `cpu`.
    fn from_str(text: &str) -> Result<Self> {
        let kind = BackendKind::ALL.iter().find(|kind| kind.name() == text);
        let ordinal = || {
            text.strip_prefix("cuda:")
                .filter(|ordinal| ordinal.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|ordinal| ordinal.parse().ok())
        };
        let choice = kind.map(|&kind| kind.into()).or_else(|| ordinal().map(Self::Cuda));
        choice.ok_or_else(|| Error::UnknownDevice { expected: DEVICE_NAMES, got: text.to_owned() })
    }
}

/// The best device of a kind: CUDA's first, or wgpu's best adapter.
impl From<BackendKind> for DeviceChoice {
    fn from(kind: BackendKind) -> Self {
        match kind {
            BackendKind::Cpu => Self::Cpu,
            BackendKind::Wgpu => Self::Wgpu,
            BackendKind::Cuda => Self::Cuda(0),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cuda(ordinal) => write!(f, "{}:{ordinal}", BackendKind::Cuda),
            Self::Wgpu => BackendKind::Wgpu.fmt(f),
            Self::Cpu => BackendKind::Cpu.fmt(f),
        }
    }
}

/// An instruction set of the CPU device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CpuIsa {
    /// [`Avx512`](Self::Avx512) with AVX512-BF16. Products of bf16 tensors are those of bf16 numbers,
    /// as on GPUs; f32 and f16 are as there.
    Avx512Bf16,
    /// x86-64 with AVX-512 (F, BW, CD, DQ, VL).
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// [`Neon`](Self::Neon) with FEAT_BF16. Products of bf16 tensors are those of bf16 numbers, as on
    /// GPUs; f32 and f16 are as there.
    NeonBf16,
    /// 64-bit Arm.
    Neon,
    /// WebAssembly's 128-bit vectors.
    Simd128,
    /// Code without vector instructions of a processor's own.
    Scalar,
}

impl CpuIsa {
    /// Every instruction set.
    pub const ALL: &'static [Self] =
        &[Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::NeonBf16, Self::Neon, Self::Simd128, Self::Scalar];

    /// `avx512bf16`, `avx512`, `avx2`, `neonbf16`, `neon`, `simd128` or `scalar`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Avx512Bf16 => "avx512bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::NeonBf16 => "neonbf16",
            Self::Neon => "neon",
            Self::Simd128 => "simd128",
            Self::Scalar => "scalar",
        }
    }

    /// The instruction set of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|isa| isa.name() == name)
    }
}

impl fmt::Display for CpuIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Settings of a device, fixed when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Config {
    /// Which device to take.
    pub device: DeviceChoice,
    /// Compute every call densely, with the same contract (`VARLEN_FA=0`).
    pub force_dense: bool,
    /// The only kernel to use (`VARLEN_FA_KERNEL`): others are neither used nor compared with it
    /// when the device is opened. Calls that it cannot compute are errors. [`DeviceChoice::Auto`]
    /// takes the best device that has it.
    pub kernel: Option<Kernel>,
    /// The instruction set of the CPU device (`VARLEN_FA_CPU`); the best one of the processor where
    /// there is none. A processor that lacks it is an error when the device is opened.
    pub cpu_isa: Option<CpuIsa>,
    /// Threads that one call on the CPU device uses, at most (`VARLEN_FA_THREADS`). They are the
    /// library's own, start with the first call that is worth them, and are shared by all devices
    /// of this number. Numbers above [`MAX_THREADS`](Self::MAX_THREADS) and the processor's own are
    /// lowered, with a warning in the log; where threads cannot be started there are fewer, at
    /// worst the calling thread alone. With 1 no thread is ever started.
    ///
    /// Where there is none: in a rayon pool, that pool; elsewhere, one thread for each processor.
    /// [`Device::from_thread_pool`](crate::Device::from_thread_pool) takes a pool instead.
    pub threads: Option<NonZeroUsize>,
    /// Upper bound of one storage binding on wgpu devices, in bytes; the adapter's own where there
    /// is none. 128 MiB is what a browser grants. Work on larger tensors is split by batch row.
    pub max_binding_bytes: Option<u64>,
    /// Upper bound of the floating-point operations (4 for each query, key, head and dimension) of
    /// one dispatch and one submission on wgpu devices. Attention of more is split, with the same
    /// result. Where there is none, it is what the slowest adapters of the kind (discrete,
    /// integrated, in software) do in half a second, and more on those that were seen to be faster:
    /// systems reset a GPU that is busy for longer than about 2 seconds.
    pub max_dispatch_operations: Option<u64>,
}

impl Config {
    /// `VARLEN_FA`: `0` forces dense attention, `1` (or unset) is the default.
    pub const VARLEN_VARIABLE: &'static str = "VARLEN_FA";
    /// `VARLEN_FA_DEVICE`: `cuda`, `cuda:N`, `wgpu` or `cpu`; unset picks the best device.
    /// Read only where the program names no device.
    pub const DEVICE_VARIABLE: &'static str = "VARLEN_FA_DEVICE";
    /// `VARLEN_FA_KERNEL`: the name of the only [`Kernel`] to use, e.g. `sm80`; unset lets each
    /// call take the best one.
    pub const KERNEL_VARIABLE: &'static str = "VARLEN_FA_KERNEL";

    /// `VARLEN_FA_CPU`: the name of the CPU device's [`CpuIsa`], e.g. `avx2`; unset takes the best
    /// one of the processor.
    pub const CPU_VARIABLE: &'static str = "VARLEN_FA_CPU";
    /// `VARLEN_FA_THREADS`: how many [`threads`](Self::threads) a call on the CPU device uses. Where
    /// it is unset, rayon's own variable `RAYON_NUM_THREADS` counts.
    pub const THREADS_VARIABLE: &'static str = "VARLEN_FA_THREADS";
    /// Threads of a call on the CPU device, at most, on processors that do not have more.
    pub const MAX_THREADS: usize = 256;

    /// Reads `VARLEN_FA`, `VARLEN_FA_DEVICE`, `VARLEN_FA_KERNEL`, `VARLEN_FA_CPU` and
    /// `VARLEN_FA_THREADS`. Empty variables count as unset.
    ///
    /// # Errors
    /// [`Error::Environment`] for a value that is not understood.
    pub fn from_env() -> Result<Self> {
        Self::read_env(std::env::var_os(Self::DEVICE_VARIABLE))
    }

    /// [`from_env`](Self::from_env) for a device that the program names: `VARLEN_FA_DEVICE` is not
    /// read, so that no value of it is an error.
    ///
    /// # Errors
    /// [`Error::Environment`] for a value of the other variables that is not understood.
    pub fn from_env_for(device: DeviceChoice) -> Result<Self> {
        Ok(Self::read_env(None)?.with_device(device))
    }

    fn read_env(device: Option<OsString>) -> Result<Self> {
        let read = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty());
        let config = Self::from_values(read(Self::VARLEN_VARIABLE), device, read(Self::KERNEL_VARIABLE))?;
        let cpu_isa = match read(Self::CPU_VARIABLE) {
            None => None,
            Some(value) => {
                let got = value.to_string_lossy().into_owned();
                let names: Vec<_> = CpuIsa::ALL.iter().map(|isa| isa.name()).collect();
                let unknown = Error::Environment { variable: Self::CPU_VARIABLE, expected: names.join(", "), got };
                Some(value.to_str().and_then(CpuIsa::from_name).ok_or(unknown)?)
            }
        };
        let threads = match read(Self::THREADS_VARIABLE) {
            // As rayon reads it: what is not a number above 0 counts as unset.
            None => read("RAYON_NUM_THREADS").and_then(|value| value.to_str()?.parse().ok()),
            Some(value) => {
                let got = value.to_string_lossy().into_owned();
                let variable = Self::THREADS_VARIABLE;
                let expected = "a number from 1 on".to_owned();
                Some(got.parse().map_err(|_| Error::Environment { variable, expected, got })?)
            }
        };
        Ok(config.with_cpu_isa(cpu_isa).with_threads(threads))
    }

    /// The same as [`from_env`](Self::from_env), from given values of the first three variables
    /// (`None` or empty = unset).
    ///
    /// # Errors
    /// [`Error::Environment`] for a value that is not understood.
    pub fn from_values(varlen: Option<OsString>, device: Option<OsString>, kernel: Option<OsString>) -> Result<Self> {
        let [varlen, device, kernel] = [varlen, device, kernel].map(|value| value.filter(|value| !value.is_empty()));
        let force_dense = match varlen.as_deref().map(|value| (value, value.to_str())) {
            None | Some((_, Some("1"))) => false,
            Some((_, Some("0"))) => true,
            Some((value, _)) => {
                return Err(Error::Environment {
                    variable: Self::VARLEN_VARIABLE,
                    expected: "0 or 1".to_owned(),
                    got: value.to_string_lossy().into_owned(),
                });
            }
        };
        let device = match device {
            None => DeviceChoice::Auto,
            Some(value) => {
                let got = value.to_string_lossy().into_owned();
                let variable = Self::DEVICE_VARIABLE;
                got.parse().map_err(|_| Error::Environment { variable, expected: DEVICE_NAMES.to_owned(), got })?
            }
        };
        let kernel = match kernel {
            None => None,
            Some(value) => {
                let got = value.to_string_lossy().into_owned();
                let variable = Self::KERNEL_VARIABLE;
                let known = got.parse().map_err(|_| Error::Environment { variable, expected: Kernel::names(), got })?;
                Some(known)
            }
        };
        Ok(Self { device, force_dense, kernel, ..Self::default() })
    }

    /// The same settings with another device.
    #[must_use]
    pub fn with_device(self, device: DeviceChoice) -> Self {
        Self { device, ..self }
    }

    /// The same settings, dense attention forced or not.
    #[must_use]
    pub fn with_force_dense(self, force_dense: bool) -> Self {
        Self { force_dense, ..self }
    }

    /// The same settings with one kernel alone, or with all of the device's.
    #[must_use]
    pub fn with_kernel(self, kernel: Option<Kernel>) -> Self {
        Self { kernel, ..self }
    }

    /// The same settings with another [`cpu_isa`](Self::cpu_isa).
    #[must_use]
    pub fn with_cpu_isa(self, cpu_isa: Option<CpuIsa>) -> Self {
        Self { cpu_isa, ..self }
    }

    /// The same settings with another number of [`threads`](Self::threads).
    #[must_use]
    pub fn with_threads(self, threads: Option<NonZeroUsize>) -> Self {
        Self { threads, ..self }
    }

    /// The same settings with another [`max_binding_bytes`](Self::max_binding_bytes).
    #[must_use]
    pub fn with_max_binding_bytes(self, bytes: u64) -> Self {
        Self { max_binding_bytes: Some(bytes), ..self }
    }

    /// The same settings with another [`max_dispatch_operations`](Self::max_dispatch_operations).
    #[must_use]
    pub fn with_max_dispatch_operations(self, operations: u64) -> Self {
        Self { max_dispatch_operations: Some(operations), ..self }
    }
}
