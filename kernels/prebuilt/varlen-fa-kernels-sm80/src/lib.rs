//! Compiled CUDA kernels of [varlen-fa](https://docs.rs/varlen-fa), which takes them with its feature `cuda`. Nothing else is meant
//! to use them: what they are launched with changes from version to version.
#![no_std]

/// The oldest attention kernel, in machine code of compute capability 8.0, 9.0 and 10.0.
#[expect(unused_braces, reason = "rustdoc writes a literal out on the page of its constant, and no block")]
pub const ATTENTION_SM80: &[u8; include_bytes!("../attention_sm80.fatbin").len()] =
    { include_bytes!("../attention_sm80.fatbin") };
