//! One call: checked, planned, and handed to a backend as one operation.

pub(crate) mod op;
pub(crate) mod plan;
pub(crate) mod problem;
// CUDA devices alone have more than one kernel; its tests need none.
#[cfg(any(feature = "cuda", test))]
pub(crate) mod self_check;
