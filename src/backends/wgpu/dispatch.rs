//! One dispatch: what it runs, what it binds, and how large it is.

use std::ops::Range;

use super::shader::{INVOCATIONS, Shader};

/// Bindings start at multiples of this: WebGPU's `min_storage_buffer_offset_alignment`, and its
/// `min_uniform_buffer_offset_alignment` too.
pub(super) const BINDING_ALIGNMENT: u64 = 256;
/// Workgroups in one dimension of a dispatch: WebGPU's `max_compute_workgroups_per_dimension`.
pub(super) const MAX_GROUPS: usize = 65_535;

/// A part of a buffer.
#[derive(Debug, Clone)]
pub(super) struct Window {
    pub buffer: wgpu::Buffer,
    /// A multiple of [`BINDING_ALIGNMENT`].
    pub offset: u64,
    /// A multiple of 4.
    pub size: u64,
    /// Name of the argument, if the buffer is external.
    pub argument: Option<&'static str>,
}

impl Window {
    pub fn whole(buffer: &wgpu::Buffer) -> Self {
        Self { buffer: buffer.clone(), offset: 0, size: buffer.size(), argument: None }
    }

    /// A part of a list of this crate's, and the number of bytes in the window before that part.
    pub fn part(buffer: &wgpu::Buffer, bytes: Range<u64>) -> (Self, u32) {
        let offset = bytes.start / BINDING_ALIGNMENT * BINDING_ALIGNMENT;
        let window = Self { buffer: buffer.clone(), offset, size: bytes.end - offset, argument: None };
        (window, (bytes.start - offset) as u32)
    }
}

/// One dispatch.
#[derive(Debug)]
pub(super) struct Launch {
    pub shader: Shader,
    /// The shader's parameter struct; at most [`BINDING_ALIGNMENT`] bytes.
    pub params: Vec<u8>,
    /// In the order of the shader's bindings; a table of heads follows them.
    pub windows: Vec<Window>,
    pub groups: [u32; 3],
    /// Floating-point operations, at most; 0 for shaders that move rows.
    pub operations: u64,
}

/// Workgroups of a shader that moves `words` words. Invocations take several where the grid cannot
/// be as large.
pub(super) fn groups_for(words: u64) -> [u32; 3] {
    [words.div_ceil(INVOCATIONS as u64).clamp(1, MAX_GROUPS as u64) as u32, 1, 1]
}
