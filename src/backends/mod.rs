//! The backends: one device kind each, behind the seam of [`call::op`](crate::call::op). They never name one another.

pub(crate) mod cpu;
#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
pub(crate) mod cuda;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;
