//! The options.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use varlen_fa::{Device, DeviceChoice};
use varlen_fa_harness::arguments::ElementType;

/// Run masked attention over a sequence divided among ranks, in every mode, and check each against one device.
///
/// Gather and Ulysses must give the bits of one device on the CPU; a ring must come near. Fails if one does not.
#[derive(Debug, Clone, Parser)]
#[command(name = "sequence_parallel", version)]
pub struct Arguments {
    /// Ranks that share the sequence [default: on cuda as many as there are GPUs, else 4]
    #[arg(long, value_name = "N")]
    ranks: Option<NonZeroUsize>,
    /// Ranks are processes of this machine, joined by TCP; else threads of this one
    #[arg(long)]
    pub processes: bool,
    /// Each rank's device; with more ranks than GPUs, several share one
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: Kind,
    /// How rows travel [default: on cuda `peer` between threads, else `host`]
    #[arg(long, value_enum)]
    transport: Option<Transport>,
    /// Element type [default: f32, on cuda f16]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<ElementType>,
    /// Text tokens of each row of the batch; they are padded to the most
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', default_value = "19,77")]
    pub text: Vec<usize>,
    /// Image tokens, which are divided among the ranks
    #[arg(long, value_name = "N", default_value = "602")]
    pub image: usize,
    /// Query heads
    #[arg(long, value_name = "N", default_value = "8")]
    pub heads: NonZeroUsize,
    /// Key and value heads, a divisor of the query heads
    #[arg(long, value_name = "N", default_value = "4")]
    pub kv_heads: NonZeroUsize,
    /// Elements of one head
    #[arg(long, value_name = "N", default_value = "64")]
    pub head_dim: NonZeroUsize,
    /// Calls of each mode; times are their median
    #[arg(long, value_name = "N", default_value = "5")]
    pub calls: NonZeroUsize,
    /// Of a process that another one started: its rank
    #[arg(long, hide = true, requires = "meeting")]
    pub rank: Option<usize>,
    /// Where the processes meet: a file that rank 0 writes
    #[arg(long, hide = true)]
    pub meeting: Option<PathBuf>,
}

impl Arguments {
    /// Ranks that share the sequence.
    pub fn ranks(&self) -> usize {
        match self.device {
            _ if self.ranks.is_some() => self.ranks.map_or(0, NonZeroUsize::get),
            Kind::Cuda => gpus().len().max(1),
            Kind::Cpu | Kind::Wgpu => 4,
        }
    }

    /// How rows travel.
    pub fn transport(&self) -> Transport {
        let by_default = match (self.device, self.processes || self.rank.is_some()) {
            (Kind::Cuda, false) => Transport::Peer,
            _ => Transport::Host,
        };
        self.transport.unwrap_or(by_default)
    }

    /// The device of a rank.
    pub fn choice(&self, rank: usize) -> DeviceChoice {
        match self.device {
            Kind::Cpu => DeviceChoice::Cpu,
            Kind::Wgpu => DeviceChoice::Wgpu,
            Kind::Cuda => {
                let gpus = gpus();
                gpus.get(rank % gpus.len().max(1)).copied().unwrap_or(DeviceChoice::Cuda(rank))
            }
        }
    }
}

/// The GPUs that the CUDA driver knows.
fn gpus() -> Vec<DeviceChoice> {
    Device::choices().into_iter().filter(|choice| matches!(choice, DeviceChoice::Cuda(_))).collect()
}

/// Ways of rows between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Through host memory: between threads, or by TCP between processes.
    Host,
    /// From GPU to GPU, between threads of one process.
    Peer,
    /// By NCCL, with `--features nccl`: a GPU for each rank.
    Nccl,
}

/// Kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The processor.
    Cpu,
    /// Any GPU through wgpu.
    Wgpu,
    /// NVIDIA GPUs.
    Cuda,
}
