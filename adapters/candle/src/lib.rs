//! [`varlen_fa`]'s attention on candle's tensors.
//!
//! - [`masked_attention`] computes a padded batch under the metadata of its key mask.
//! - [`flash_attn_varlen`] and its family take what candle-flash-attn's functions of the same names take, in the same order: a
//!   model changes the crate that it imports them from.
//! - [`Attention`] is what they are made of: a custom operation, built once per request, with ranges of keys and modifiers of
//!   scores.
//!
//! Tensors are read where they lie, by their own strides; the output is the one allocation. There are no gradients: a backward
//! pass is an error. `README.md` says which devices there are, and how to build for each.

mod attention;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod flash;
mod layout;

pub use crate::attention::{Attention, masked_attention};
pub use crate::flash::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap, flash_attn_varlen,
    flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed, flash_attn_varlen_alibi_windowed_softcap,
    flash_attn_varlen_windowed, flash_attn_windowed,
};
/// The library itself: [`KeyMask`](varlen_fa::KeyMask) and [`VarlenMeta`](varlen_fa::VarlenMeta) come from there.
pub use varlen_fa;
