//! Options that the programs share, and the problems that they describe.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use varlen_fa::{BackendKind, Capabilities, DType, Device, DeviceChoice};
use varlen_fa_testkit::workload::NAMED;
use varlen_fa_testkit::{OracleShape, Precision, Workload};

use crate::sizes::Sizes;

/// Heads and head dimension of Qwen-Image, where neither the options nor the workload say otherwise.
const DEFAULT_HEADS: usize = 24;
const DEFAULT_HEAD_DIM: usize = 128;

/// What to run, and on what.
#[derive(Debug, Args)]
pub struct ProblemArguments {
    /// Key mask and sizes to run, see below; may be given several times
    #[arg(long = "workload", value_name = "SPEC|NAME")]
    pub workloads: Vec<Workload>,
    /// cuda, cuda:N, wgpu or cpu [default: VARLEN_FA_DEVICE, or the best one present]
    #[arg(long, value_name = "DEVICE", value_parser = parse_device)]
    device: Option<DeviceChoice>,
    /// Element type of q, k, v and the output [default: f32 on the cpu device, f16 elsewhere]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<ElementType>,
    /// Query heads [default: the workload's, or 24]
    #[arg(long, value_name = "N")]
    heads: Option<NonZeroUsize>,
    /// Key and value heads, a divisor of the query heads [default: the workload's, or as many as query heads]
    #[arg(long, value_name = "N")]
    kv_heads: Option<NonZeroUsize>,
    /// Elements of one head, from 1 to 512 [default: the workload's, or 128]
    #[arg(long, value_name = "N")]
    head_dim: Option<NonZeroUsize>,
    /// Also write one JSON object a line to FILE; `-` is standard output, and the text then goes to standard error
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// How often a bench times what it compares.
#[derive(Debug, Args)]
pub struct RoundArguments {
    /// Rounds, each of which times every row once; medians are printed
    #[arg(long, value_name = "N", default_value = "7")]
    rounds: NonZeroUsize,
}

impl RoundArguments {
    /// The workloads and the number of rounds.
    pub fn of_run<'a>(&self, sizes: Sizes, defaults: &'a [&'a str], smoke: &'a [&'a str]) -> (&'a [&'a str], usize) {
        match sizes {
            Sizes::Full => (defaults, self.rounds.get()),
            Sizes::Smoke => (smoke, 1),
        }
    }
}

/// The end of the `--help` text.
pub fn workload_help() -> String {
    let names = NAMED.map(|(name, _)| name).join(", ");
    format!(
        "Workloads:
  A SPEC says which tokens of a padded batch are valid:
    joint:text=N:image=N:valid=A,B,...  the first A, B, ... text tokens of each batch row, and every image token
    prefix:len=N:valid=A,B,...          the first A, B, ... tokens of each batch row
    random:len=N:p=P[:seed=N]           each token with probability P
  Each takes batch=N (the list is repeated or cut to it), heads=N, kv_heads=N and dim=N as well. Names stand for a SPEC:
    {names}

Environment:
  VARLEN_FA=0 forces dense attention, VARLEN_FA_DEVICE picks the device, RUST_LOG=debug logs each call's path."
    )
}

/// An element type, as options name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ElementType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper 16 bits of a binary32.
    Bf16,
}

impl ElementType {
    /// What the oracle rounds to.
    pub fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::F16 => Precision::F16,
            Self::Bf16 => Precision::Bf16,
        }
    }

    /// As the library names it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::Bf16,
        }
    }

    /// The usual one of a device.
    pub fn default_on(capabilities: &Capabilities) -> Self {
        if capabilities.backend == BackendKind::Cpu { Self::F32 } else { Self::F16 }
    }
}

/// A workload with the sizes that it is run at.
#[derive(Debug)]
pub struct Problem {
    /// The key mask and its size.
    pub workload: Workload,
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, Hkv.
    pub kv_heads: usize,
    /// Elements of one head, D.
    pub head_dim: usize,
    /// Of q, k, v and the output.
    pub element_type: ElementType,
}

impl Problem {
    /// `[B, S, H, D]` of the queries and of the output.
    pub fn shape(&self) -> [usize; 4] {
        [self.workload.batch, self.workload.seq, self.heads, self.head_dim]
    }

    /// `[B, S, Hkv, D]` of the keys and of the values.
    pub fn kv_shape(&self) -> [usize; 4] {
        [self.workload.batch, self.workload.seq, self.kv_heads, self.head_dim]
    }

    /// The same for the oracle.
    pub fn oracle_shape(&self) -> OracleShape {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        let shape = OracleShape::self_attention(self.workload.batch, self.workload.seq, heads, head_dim);
        OracleShape { kv_heads, ..shape }
    }
}

impl ProblemArguments {
    /// The device asked for, or the one that the environment asks for.
    pub fn open_device(&self) -> Result<Device> {
        Ok(match self.device {
            Some(choice) => Device::new(choice)?,
            None => Device::from_env()?,
        })
    }

    /// The workloads asked for, or else `defaults`, each at its sizes on `device`.
    pub fn problems(&self, device: &Device, defaults: &[&str]) -> Result<Vec<Problem>> {
        let workloads = match self.workloads.as_slice() {
            [] => defaults.iter().map(|text| Workload::parse(text)).collect::<Result<_, _>>()?,
            given => given.to_vec(),
        };
        let element_type = self.dtype.unwrap_or_else(|| ElementType::default_on(device.capabilities()));
        Ok(workloads.into_iter().map(|workload| self.problem(workload, element_type)).collect())
    }

    fn problem(&self, workload: Workload, element_type: ElementType) -> Problem {
        let heads = self.heads.map(usize::from).or(workload.heads).unwrap_or(DEFAULT_HEADS);
        let kv_heads = self.kv_heads.map(usize::from).or(workload.kv_heads).unwrap_or(heads);
        let head_dim = self.head_dim.map(usize::from).or(workload.dim).unwrap_or(DEFAULT_HEAD_DIM);
        Problem { workload, heads, kv_heads, head_dim, element_type }
    }
}

/// The library's own message speaks of the environment variable, where such names usually come from.
/// Reads the name of a device.
pub fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    text.parse().map_err(|_| "expected cuda, cuda:N, wgpu or cpu".to_owned())
}
