//! The C library: `include/varlen_fa.h` is its documentation, made from these sources by `cargo xtask header`.
//!
//! Every exported function runs inside [`failure::border`], which turns errors and panics into a status and a message. Handles are
//! numbers that [`handles`] looks up, never addresses. Pointers are read in [`arguments`] and [`tensors`] only.

#![allow(non_camel_case_types, reason = "types have the names that they have in C")]
#![allow(clippy::missing_safety_doc, reason = "the header says once, for all functions, what callers must keep")]

mod arguments;
mod attention;
mod cuda;
mod device;
mod device_meta;
mod failure;
mod handles;
mod masks;
mod primitives;
mod tensors;
mod types;
mod version;
