//! One call: checked, planned, and handed to a backend as one operation.

#[cfg_attr(
    any(not(feature = "cuda"), target_arch = "wasm32"),
    allow(dead_code, reason = "the GPUs of CUDA alone copy in pieces")
)]
pub(crate) mod block;
pub(crate) mod chips;
#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "only CUDA devices have all of the model"))]
pub(crate) mod cost;
#[cfg(all(test, any(feature = "cuda", feature = "wgpu")))]
pub(crate) mod cost_cases;
pub(crate) mod joint;
pub(crate) mod memory;
pub(crate) mod op;
pub(crate) mod packed_heads;
pub(crate) mod path;
pub(crate) mod plan;
pub(crate) mod prepare_qk;
pub(crate) mod problem;
pub(crate) mod segments;
// Only GPUs have kernels to check. The tests of the check need none.
#[cfg(any(feature = "cuda", feature = "wgpu", test))]
pub(crate) mod self_check;
