//! Sequence parallelism: attention over a sequence that is divided among ranks, under a key mask.
//!
//! [`SequenceParallel`] is the layer, [`Shards`] says how the sequence is divided, [`ShardedMeta`] which of its tokens count, and a
//! [`Communicator`] moves rows between the ranks: [`HostCommunicator`] among threads or processes, [`PeerCommunicator`] among the
//! GPUs of one process. `docs/sequence-parallel.md` says how the modes work and what they cost.

mod call;
mod communicator;
mod digest;
mod frame;
mod gather;
mod host;
mod kept;
mod local;
mod mailbox;
mod mode;
#[cfg(feature = "nccl")]
mod nccl;
mod needs;
mod peer;
mod peer_lane;
#[cfg_attr(
    any(not(feature = "cuda"), target_arch = "wasm32"),
    allow(dead_code, reason = "the GPUs of CUDA alone copy in pieces")
)]
mod pieces;
mod plan;
mod rendezvous;
mod request;
mod ring;
mod scores;
mod sequence_parallel;
mod sharded_meta;
mod shards;
mod transfer;
mod ulysses;

pub use call::ParallelCall;
pub use communicator::{Communicator, DeviceBytes, Exchange, Incoming, Outgoing, Transfer, TransferMut};
pub use host::HostCommunicator;
pub use mode::{Heads, Mode};
#[cfg(feature = "nccl")]
pub use nccl::NcclCommunicator;
pub use needs::ParallelNeeds;
pub use peer::PeerCommunicator;
pub use plan::{Machine, ModeEstimate, ModeReason, ParallelPlan};
pub use rendezvous::{MeetingPoint, Rendezvous};
pub use request::ParallelRequest;
pub use sequence_parallel::SequenceParallel;
pub use sharded_meta::ShardedMeta;
pub use shards::Shards;
