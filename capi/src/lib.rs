//! The C library. Its documentation is `include/varlen_fa.h`, which `cargo xtask header` generates
//! from these sources.
//!
//! Every exported function that can fail runs inside [`failure::guard`], which turns errors and
//! panics into a status and a message. Handles are numbers that [`handles`] looks up, not
//! addresses. Pointers are read in [`arguments`], [`tensors`] and [`device_meta`] only. [`names`]
//! holds the enums as tables.

#![allow(non_camel_case_types, reason = "types have the names that they have in C")]
#![allow(clippy::missing_safety_doc, reason = "the header states once, for all functions, what callers must ensure")]

// What is exported, in the order of the header. The blank lines keep the formatter from sorting.
mod version;

mod failure;

mod device;

mod masks;

mod mask_values;

mod key_ranges;

mod device_meta;

mod attention;

mod outputs;
mod primitives;
mod score_modifiers;

mod merge;

mod prepare_qk;

mod dist;

mod warm_up;

mod names;

mod arguments;
mod attention_mask;
mod cuda;
mod handles;
mod pipeline_cache;
mod segments;
mod tensors;
mod types;
