//! Compiled CUDA kernels of [varlen-fa](https://docs.rs/varlen-fa), which takes them with its feature `cuda`. Nothing else is meant
//! to use them: what they are launched with changes from version to version.
#![no_std]

/// The oldest attention kernel, in machine code of compute capability 12.0, and as PTX for every chip from 8.0 on.
#[expect(unused_braces, reason = "rustdoc writes a literal out on the page of its constant, and no block")]
pub const ATTENTION_SM80_LATER: &[u8; include_bytes!("../attention_sm80_later.fatbin").len()] =
    { include_bytes!("../attention_sm80_later.fatbin") };
