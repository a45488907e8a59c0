//! Masked attention in a browser, on WebGPU.
//!
//! `run` computes a workload with metadata and densely, and checks it in the page; `selftest` tries what only a browser does
//! differently. Both also run outside of a browser, where the tests of this package run them. `border` is all that JavaScript sees.

#[cfg(target_arch = "wasm32")]
mod border;
mod check;
mod report;
mod run;
mod selftest;

pub use check::Check;
pub use report::Report;
pub use run::run;
pub use selftest::selftest;
