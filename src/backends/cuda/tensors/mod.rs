//! Tensors, masks and metadata on the device.
//!
//! | module | what it holds |
//! |---|---|
//! | `strided_copy` | a copy of a strided view as few rectangles |
//! | `placement` | where tensors lie, and aligned copies of inputs whose rows do not start at words |
//! | `segments` | tensors that come in parts along S, put together |
//! | `tensor_map` | tensors as they are described to the copy engine (TMA) |
//! | `metadata` | copies of masks and metadata, and tables that the device builds |
//! | `key_ranges` | copies of key ranges |
//! | `lse` | where a log-sum-exp lies, launches that write it, and what it merges |
//! | `score_modifiers` | copies of what heads do to scores |
//! | `prepare_qk` | the launch that normalises and rotates q and k |
//! | `copy` | launches that move rows: pack, scatter, zero |

pub mod copy;
pub mod key_ranges;
pub mod lse;
pub mod metadata;
pub mod placement;
pub mod prepare_qk;
pub mod score_modifiers;
pub mod segments;
mod strided_copy;
pub mod tensor_map;
