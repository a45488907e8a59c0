//! The CUDA driver API, as far as the backend uses it. Every driver call is made in this folder,
//! but for loading kernels (`kernels::module`) and describing tensors (`tensors::tensor_map`).
//!
//! | module | what it holds |
//! |---|---|
//! | `probe` | what the driver says of a device, before a context is created |
//! | `external` | checks of contexts, streams and memory that belong to the application |
//! | `fault` | driver errors as [`Error`](crate::Error)s, and the loss of the context |
//! | `capture` | whether a stream is being captured into a graph, and calls beside a capture |
//! | `pool` | where device memory comes from |
//! | `context` | a context, its one stream, its pool and its faults |
//! | `alloc` | allocating and freeing, also while the stream is being captured |
//! | `memory` | buffers: the library's own, or external memory |
//! | `scratch` | scratch that calls use again |
//! | `lane` | copies from other GPUs of the process, beside the stream |
//! | `graph` | copies that are described once and launched again and again |
//! | `nccl`, `nccl_library` | copies between processes and hosts, with the feature `nccl` |
//! | `transfer` | copies to, from and on the device, and fills |
//! | `launch` | kernel launches |
//! | `timer` | GPU time by events |

pub mod alloc;
pub mod capture;
pub mod context;
pub mod count;
pub mod external;
pub mod fault;
mod graph;
pub mod lane;
pub mod launch;
pub mod memory;
#[cfg(feature = "nccl")]
pub mod nccl;
#[cfg(feature = "nccl")]
mod nccl_library;
pub mod pool;
pub mod probe;
pub mod scratch;
pub mod timer;
pub mod transfer;
pub mod zeroed;
