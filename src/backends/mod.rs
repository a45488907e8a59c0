//! The backends: one device kind each, behind the seam of [`call::op`](crate::call::op). They never
//! name one another; what the GPU backends share lies here beside them.
//!
//! | module | what it holds |
//! |---|---|
//! | `cpu` | the host's processor: SIMD |
//! | `cuda` | NVIDIA GPUs by the CUDA driver |
//! | `wgpu` | GPUs by Vulkan, Metal, DirectX 12 and WebGPU |
//! | `fork` | notices when the process is forked |
//! | `rows` | size, strides and alignment of rows |
//! | `metadata` | copies of masks and metadata on a device |

pub(crate) mod cpu;
#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
pub(crate) mod cuda;
pub(crate) mod fork;
#[cfg(any(feature = "wgpu", all(feature = "cuda", not(target_arch = "wasm32"))))]
mod metadata;
#[cfg(any(feature = "wgpu", all(feature = "cuda", not(target_arch = "wasm32"))))]
mod rows;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;
