//! Compiled CUDA kernels of [varlen-fa](https://docs.rs/varlen-fa), which takes them with its feature `cuda`. Nothing else is meant
//! to use them: what they are launched with changes from version to version.
#![no_std]

// In blocks, since rustdoc writes a literal out on the page of its constant.
macro_rules! images {
    ($($(#[$about:meta])* $name:ident = $file:literal;)*) => {$(
        $(#[$about])*
        pub const $name: &[u8; include_bytes!($file).len()] = { include_bytes!($file) };
    )*};
}

images! {
    /// Attention on compute capability 10.0 and 10.3.
    ATTENTION_SM100 = "../attention_sm100.fatbin";
    /// Attention on compute capability 9.0.
    ATTENTION_SM90 = "../attention_sm90.fatbin";
    /// The log-sum-exp: its way back to padded rows, and attention in parts that it merges.
    LSE = "../lse.fatbin";
    /// Metadata of a mask on the device.
    METADATA = "../metadata.fatbin";
    /// Rows packed and scattered.
    PACK = "../pack.fatbin";
    /// Norm and rotary embedding of queries and keys.
    PREPARE_QK = "../prepare_qk.fatbin";
    /// Tile lists of metadata on the device.
    TILE_LISTS = "../tile_lists.fatbin";
}
