//! What the user may set from outside. This file is the only reader of the environment.

use std::ffi::OsString;
use std::fmt;
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

/// Settings of a device, fixed when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Config {
    /// Which device to take.
    pub device: DeviceChoice,
    /// Compute every call densely, with the same contract (`VARLEN_FA=0`).
    pub force_dense: bool,
    /// The only kernel to use (`VARLEN_FA_KERNEL`): others are neither used nor compared with it when the device is opened. Calls that it
    /// cannot compute are errors. [`DeviceChoice::Auto`] takes the best device that has it.
    pub kernel: Option<Kernel>,
    /// Upper bound of one storage binding on wgpu devices, in bytes; the adapter's own where there is none. 128 MiB is what a
    /// browser grants. Work on larger tensors is split by batch row.
    pub max_binding_bytes: Option<u64>,
    /// Upper bound of the floating-point operations (4 for each query, key, head and dimension) of one dispatch and one
    /// submission on wgpu devices. Attention of more is split, with the same result. Where there is none, it is what the slowest
    /// adapters of the kind (discrete, integrated, in software) do in half a second, and more on those that were seen to be
    /// faster: systems reset a GPU that is busy for longer than about 2 seconds.
    pub max_dispatch_operations: Option<u64>,
}

impl Config {
    /// `VARLEN_FA`: `0` forces dense attention, `1` (or unset) is the default.
    pub const VARLEN_VARIABLE: &'static str = "VARLEN_FA";
    /// `VARLEN_FA_DEVICE`: `cuda`, `cuda:N`, `wgpu` or `cpu`; unset picks the best device. Read only where the program names
    /// no device.
    pub const DEVICE_VARIABLE: &'static str = "VARLEN_FA_DEVICE";
    /// `VARLEN_FA_KERNEL`: the name of the only [`Kernel`] to use, e.g. `sm80`; unset lets each call take the best one.
    pub const KERNEL_VARIABLE: &'static str = "VARLEN_FA_KERNEL";

    /// Reads `VARLEN_FA`, `VARLEN_FA_DEVICE` and `VARLEN_FA_KERNEL`. Empty variables count as unset.
    ///
    /// # Errors
    /// [`Error::Environment`] for a value that is not understood.
    pub fn from_env() -> Result<Self> {
        let read = std::env::var_os::<&str>;
        Self::from_values(read(Self::VARLEN_VARIABLE), read(Self::DEVICE_VARIABLE), read(Self::KERNEL_VARIABLE))
    }

    /// The same, from given values of the three variables (`None` or empty = unset).
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

    /// [`from_env`](Self::from_env) for a device that the program names: `VARLEN_FA_DEVICE` is not read, so that no value of
    /// it is an error.
    ///
    /// # Errors
    /// [`Error::Environment`] for a value of the other variables that is not understood.
    pub fn from_env_for(device: DeviceChoice) -> Result<Self> {
        let read = std::env::var_os::<&str>;
        let config = Self::from_values(read(Self::VARLEN_VARIABLE), None, read(Self::KERNEL_VARIABLE))?;
        Ok(config.with_device(device))
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
