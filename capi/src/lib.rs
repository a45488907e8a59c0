//! The C library: `include/varlen_fa.h` is its documentation, made from these sources by `cargo xtask header`.
//!
//! Every exported function runs inside [`failure::border`], which turns errors and panics into a status and a message. Handles are
//! numbers that [`handles`] looks up, never addresses. Pointers are read in [`arguments`] and [`tensors`] only.

#![allow(non_camel_case_types, reason = "types have the names that they have in C")]
#![allow(clippy::missing_safety_doc, reason = "the header says once, for all functions, what callers must keep")]

// What is exported, in the order in which the header has it; each a paragraph, so that the formatter keeps the order.
mod version;

mod failure;

mod device;

mod masks;

mod device_meta;

mod attention;

mod primitives;

mod arguments;
mod cuda;
mod handles;
mod tensors;
mod types;
