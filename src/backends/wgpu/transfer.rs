//! Copies between host and device.

use std::num::NonZeroU64;
use std::ops::Range;

use wgpu::{BufferAsyncError, BufferUsages, MapMode};

use crate::error::Result;

use super::context::Context;
use super::wait;

/// The most bytes that one staging buffer holds, so that large tensors do not double the memory in
/// use.
const STAGING_BYTES: usize = 64 << 20;
/// Copies move whole u32s.
pub(super) const COPY_ALIGNMENT: usize = 4;

/// A new buffer that holds the bytes.
pub(super) fn uploaded(context: &Context, label: &'static str, bytes: &[u8]) -> Result<wgpu::Buffer> {
    let buffer = context.allocator.storage(label, bytes.len() as u64)?;
    upload(context, &buffer, bytes)?;
    Ok(buffer)
}

/// Copies bytes to the start of a buffer, which has room for them rounded up to whole u32s.
pub(super) fn upload(context: &Context, buffer: &wgpu::Buffer, bytes: &[u8]) -> Result<()> {
    context.faults.check()?;
    let mut offset = 0;
    for part in bytes.chunks(STAGING_BYTES) {
        let size = part.len().next_multiple_of(COPY_ALIGNMENT) as u64;
        write(context, buffer, offset..offset + size, part)?;
        offset += size;
        // Frees the staging memory before the next part takes its own.
        if bytes.len() > STAGING_BYTES {
            context.faults.capture("copying to the device", size, || context.queue.submit([]))?;
        }
    }
    context.faults.check()
}

/// Has the next submission begin with a copy of `bytes`, and of zeros up to the end of the range.
/// The range is of whole u32s.
pub(super) fn write(context: &Context, buffer: &wgpu::Buffer, range: Range<u64>, bytes: &[u8]) -> Result<()> {
    let Some(size) = NonZeroU64::new(range.end - range.start) else { return Ok(()) };
    let written = context.faults.capture("copying to the device", size.get(), || {
        context.queue.write_buffer_with(buffer, range.start, size).map(|mut view| {
            view.slice(..bytes.len()).copy_from_slice(bytes);
            view.slice(bytes.len()..).fill(0);
        })
    })?;
    match written {
        Some(()) => Ok(()),
        None => Err(context.faults.explain("copying to the device", "it gave no memory to copy from".to_owned())),
    }
}

/// Copies bytes of a buffer to the host, from the whole u32 at `start` on, after all work submitted
/// so far.
pub(super) async fn download(context: &Context, (buffer, start): (&wgpu::Buffer, u64), into: &mut [u8]) -> Result<()> {
    context.faults.check()?;
    let Some(staging) = staging_for(context, into.len())? else { return wait::for_work(context).await };
    let mut offset = start;
    for part in into.chunks_mut(STAGING_BYTES) {
        let staged = (&staging, part.len().next_multiple_of(COPY_ALIGNMENT) as u64);
        let (done, mapped) = wait::signal();
        fetch(context, (buffer, offset), staged, done)?;
        let failure = match mapped.received(context).await? {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(error.to_string()),
            None => Some("its callback was dropped".to_owned()),
        };
        if let Some(why) = failure {
            return Err(context.faults.explain("mapping a buffer", why));
        }
        take(context, staged, part)?;
        offset += part.len() as u64;
    }
    Ok(())
}

/// A buffer into which parts of `bytes` bytes of another are fetched. None for no bytes.
fn staging_for(context: &Context, bytes: usize) -> Result<Option<wgpu::Buffer>> {
    let size = bytes.min(STAGING_BYTES).next_multiple_of(COPY_ALIGNMENT) as u64;
    if size == 0 {
        return Ok(None);
    }
    context.allocator.raw("staging", size, BufferUsages::COPY_DST | BufferUsages::MAP_READ).map(Some)
}

/// Has a part of a buffer copied to the start of `staging`, and that mapped for the host.
/// `mapped` is called when it is.
fn fetch(
    context: &Context,
    (buffer, offset): (&wgpu::Buffer, u64),
    (staging, size): (&wgpu::Buffer, u64),
    mapped: impl FnOnce(Result<(), BufferAsyncError>) + Send + 'static,
) -> Result<()> {
    context.faults.capture("copying from the device", size, || {
        let mut encoder = context.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, offset, staging, 0, size);
        context.queue.submit([encoder.finish()]);
        staging.slice(..size).map_async(MapMode::Read, mapped);
    })
}

/// Copies what was fetched, and ends the mapping.
fn take(context: &Context, (staging, size): (&wgpu::Buffer, u64), part: &mut [u8]) -> Result<()> {
    {
        let view = staging.slice(..size).get_mapped_range();
        let view = view.map_err(|error| context.faults.explain("mapping a buffer", error.to_string()))?;
        part.copy_from_slice(&view[..part.len()]);
    }
    staging.unmap();
    Ok(())
}
