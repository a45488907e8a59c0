//! Attention under a key mask at FlashAttention speed, on any GPU.
//!
//! Diffusion transformers and encoders run attention over padded batches. This crate computes only what is valid: build a
//! [`VarlenMeta`] from the batch's [`KeyMask`] once per request, and give it to [`MaskedAttention`] in every layer and step. The
//! rows of masked tokens are exactly zero in the output, and what they hold in the input never matters.
//!
//! [`Device::from_env`] picks the device. The crate's `README.md` shows both in fifteen lines, and `docs/architecture.md` says how it
//! is built.
//!
//! # Features
//! - `wgpu` (default): Vulkan, Metal, DirectX 12 and WebGPU devices through WGSL compute shaders. In a browser calls that wait have
//!   other forms: see `docs/web.md`.
//! - `cuda` (default): NVIDIA devices. The driver is loaded at run time; no toolkit is needed to build or to run. Without effect on
//!   wasm32.
//!
//! The CPU device is always there.

// Says of each item which feature it needs. docs.rs has the compiler for it.
#![cfg_attr(docsrs, feature(doc_cfg))]
// Only a build with every backend shows what is dead: the seam has parts that one backend alone uses.
#![cfg_attr(not(all(feature = "wgpu", feature = "cuda", not(target_arch = "wasm32"))), allow(dead_code))]

mod attention;
mod attention_mask;
mod attention_outputs;
mod backends;
mod cache;
mod call;
mod config;
mod device;
#[cfg(not(target_arch = "wasm32"))]
pub mod dist;
mod dtype;
#[cfg(feature = "wgpu")]
mod encode;
mod error;
mod fifo_cache;
mod host_vec;
mod joint;
mod kernel;
mod layout;
mod mask;
mod merge;
mod prepare_qk;
mod primitives;
mod process;
mod score_modifiers;
mod tensor;

/// The rayon whose pools [`Device::from_thread_pool`] takes; its major version is part of this crate's API.
pub use ::rayon;
/// The wgpu that [`Device::wgpu`] speaks of; its major version is part of this crate's API.
#[cfg(feature = "wgpu")]
pub use ::wgpu;
/// Compiles and runs the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Compiles the page on joint layers.
#[cfg(doctest)]
#[doc = include_str!("../docs/joint-layer.md")]
struct JointLayer;

/// Compiles the page on the log-sum-exp.
#[cfg(doctest)]
#[doc = include_str!("../docs/log-sum-exp.md")]
struct LogSumExp;

/// Compiles the program of the page on external CUDA handles.
#[cfg(all(doctest, feature = "cuda"))]
#[doc = include_str!("../docs/external-cuda.md")]
struct ExternalCuda;

/// Compiles and runs the program of the page on external wgpu handles.
#[cfg(all(doctest, feature = "wgpu"))]
#[doc = include_str!("../docs/external-wgpu.md")]
struct ExternalWgpu;

/// For this repository's tests: the sm100 kernel without a Blackwell GPU.
#[cfg(feature = "emulated-sm100")]
pub mod emulation {
    /// Keeps the sm100 kernel in its emulated form, a fatbin of `cargo xtask kernels --emulated`. CUDA devices of compute capability 9.0 that
    /// are opened from now on have [`Kernel::CudaSm100`](crate::Kernel::CudaSm100), and prefer it: do so before any is opened. False
    /// if there is one already.
    #[must_use]
    pub fn set_sm100(fatbin: &[u8]) -> bool {
        crate::backends::cuda::set_emulated_sm100(fatbin)
    }
}

pub use half::{bf16, f16};

pub use crate::attention::{Attended, MaskedAttention};
pub use crate::attention_mask::{AttentionMask, Metadata};
pub use crate::attention_outputs::AttentionOutputs;
#[cfg(feature = "wgpu")]
pub use crate::backends::wgpu::Recorder;
pub use crate::call::cost::Tiling;
pub use crate::call::op::Timing;
pub use crate::call::path::Path;
pub use crate::call::plan::{Capabilities, Estimate, Plan, Reason};
pub use crate::call::prepare_qk::RotaryPairing;
pub use crate::config::{Config, CpuIsa, DeviceChoice};
pub use crate::device::{Device, DeviceReport};
pub use crate::dtype::{DType, Element};
#[cfg(feature = "wgpu")]
pub use crate::encode::{encode_merge_attention, encode_pack, encode_prepare_qk, encode_scatter};
pub use crate::error::{Error, Result};
pub use crate::joint::{JointAttention, JointPlan, JointSegment, Preparation};
pub use crate::kernel::{BackendKind, Kernel};
pub use crate::layout::Layout;
pub use crate::mask::cu_seqlens::CuSeqlens;
pub use crate::mask::key_mask::{KeyMask, MaskDType, MaskInteger, Run};
pub use crate::mask::key_ranges::{KeyRanges, RangesOf};
pub use crate::mask::meta::VarlenMeta;
pub use crate::merge::{MergedAttention, merge_attention, merge_attention_into};
pub use crate::prepare_qk::{QkNorm, QkSegment, Rotary, TokenMask, prepare_qk};
pub use crate::primitives::{
    PackedAttended, VarlenOptions, pack, pack_into, pack_qkv, pack_qkv_into, scatter_to_padded, scatter_to_padded_into,
    varlen_attention, varlen_attention_into,
};
pub use crate::score_modifiers::{ScoreModifiers, alibi_slopes};
pub use crate::tensor::device_meta::{DeviceVarlenMeta, MaskView};
pub use crate::tensor::memory::DeviceMemory;
pub use crate::tensor::{Segments, SegmentsMut, Tensor, TensorView, TensorViewMut};
