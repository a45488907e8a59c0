//! [`varlen_fa`]'s attention on burn's tensors, in their own memory.
//!
//! - [`masked_attention`] computes a padded batch, `[B, H, S, D]` as burn has it, under a key mask, its metadata, ranges of keys.
//! - [`varlen_attention`] computes packed rows.
//! - [`key_mask`] turns burn's padding mask round.
#![cfg_attr(feature = "wgpu", doc = "- [`share_wgpu`] says which wgpu device and queue a device of burn is.")]
//!
//! There are no gradients. `README.md` says which backends there are, and what each copies.

mod attention;
mod call;
mod error;
#[cfg(feature = "flex")]
mod flex;
mod layout;
mod mask;
#[cfg(feature = "wgpu")]
mod wgpu;

pub use crate::attention::{masked_attention, varlen_attention};
pub use crate::error::{Error, Result};
pub use crate::mask::key_mask;
#[cfg(feature = "wgpu")]
pub use crate::wgpu::share_wgpu;
/// The library itself: [`KeyMask`](varlen_fa::KeyMask) and [`VarlenMeta`](varlen_fa::VarlenMeta) come from there.
pub use varlen_fa;

/// Compiles and runs the README's example.
#[cfg(all(doctest, feature = "flex"))]
#[doc = include_str!("../README.md")]
struct Readme;
