//! Kernel launches.

use std::ffi::c_void;
use std::ptr;

use bytemuck::Pod;
use cudarc::driver::result;
use cudarc::driver::sys::CUfunction;

use crate::error::Result;

use super::context::Context;

/// A kernel function that is ready to be launched.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    pub raw: CUfunction,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// Launches a kernel that takes one struct by value. The context is current.
///
/// # Safety
/// The function belongs to the context. `P` mirrors the kernel's parameter, or starts with what
/// mirrors it: the driver copies as many bytes as the kernel takes. Every address in it that the
/// kernel follows is memory of this context, in bounds for the sizes beside it. No other work writes
/// there, or uses what the kernel writes, out of the stream's order.
pub unsafe fn launch<P: Pod>(
    context: &Context,
    function: Function,
    grid: [u32; 3],
    block: u32,
    params: &P,
) -> Result<()> {
    let [x, y, z] = grid;
    let mut arguments = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
    // SAFETY: the function's module stays loaded as long as the context; the parameter is what the
    // function takes by the caller's promise, and is copied before the call returns.
    let launched = unsafe {
        result::launch_kernel(
            function.raw,
            (x, y, z),
            (block, 1, 1),
            function.shared_bytes,
            context.stream(),
            &mut arguments,
        )
    };
    context.check(launched, "launching a kernel")
}
