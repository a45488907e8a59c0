//! Which tokens are valid, on the host: one bit a token, and the metadata made of it.

pub(crate) mod cu_seqlens;
mod documents;
pub(crate) mod every_query;
pub(crate) mod key_mask;
pub(crate) mod key_ranges;
pub(crate) mod mask_values;
pub(crate) mod meta;
pub(crate) mod packed_ranges;
pub(crate) mod ranks;
