//! Copies between host and device.

use std::num::NonZeroU64;
use std::ops::Range;
#[cfg(not(target_arch = "wasm32"))]
use std::sync::mpsc::{self, RecvTimeoutError};
#[cfg(not(target_arch = "wasm32"))]
use std::time::Duration;

use wgpu::{BufferAsyncError, BufferUsages, MapMode};

use crate::error::Result;

use super::buffer::Allocator;
use super::fault::Faults;
#[cfg(target_arch = "wasm32")]
use super::later::signal;

/// The most bytes that one staging buffer holds, so that large tensors do not double the memory in use.
const STAGING_BYTES: usize = 64 << 20;
/// Copies move whole u32s.
const COPY_ALIGNMENT: usize = 4;

/// How long to wait for the callback of a mapping before asking the device again.
#[cfg(not(target_arch = "wasm32"))]
const CALLBACK_PATIENCE: Duration = Duration::from_millis(10);

/// Copies bytes to the start of a buffer, which has room for them rounded up to whole u32s.
pub(super) fn upload(queue: &wgpu::Queue, faults: &Faults, buffer: &wgpu::Buffer, bytes: &[u8]) -> Result<()> {
    faults.check()?;
    let mut offset = 0;
    for part in bytes.chunks(STAGING_BYTES) {
        let size = part.len().next_multiple_of(COPY_ALIGNMENT) as u64;
        write(queue, faults, buffer, offset..offset + size, part)?;
        offset += size;
        // Lets the staging memory go before the next part takes its own.
        if bytes.len() > STAGING_BYTES {
            faults.capture("copying to the device", size, || queue.submit([]))?;
        }
    }
    faults.check()
}

/// Has the next submission begin with a copy of `bytes`, and zeros up to the end of the range, which is of whole u32s.
pub(super) fn write(
    queue: &wgpu::Queue,
    faults: &Faults,
    buffer: &wgpu::Buffer,
    range: Range<u64>,
    bytes: &[u8],
) -> Result<()> {
    let Some(size) = NonZeroU64::new(range.end - range.start) else { return Ok(()) };
    let written = faults.capture("copying to the device", size.get(), || {
        queue.write_buffer_with(buffer, range.start, size).map(|mut view| {
            view.slice(..bytes.len()).copy_from_slice(bytes);
            view.slice(bytes.len()..).fill(0);
        })
    })?;
    match written {
        Some(()) => Ok(()),
        None => Err(faults.explain("copying to the device", "it gave no memory to copy from".to_owned())),
    }
}

/// Has a part of a buffer copied to the start of `staging` and that mapped for the host; `mapped` is called when it is.
fn fetch(
    (device, queue): (&wgpu::Device, &wgpu::Queue),
    faults: &Faults,
    (buffer, offset): (&wgpu::Buffer, u64),
    (staging, size): (&wgpu::Buffer, u64),
    mapped: impl FnOnce(Result<(), BufferAsyncError>) + Send + 'static,
) -> Result<()> {
    faults.capture("copying from the device", size, || {
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, offset, staging, 0, size);
        queue.submit([encoder.finish()]);
        staging.slice(..size).map_async(MapMode::Read, mapped);
    })
}

/// Copies what was fetched, and ends the mapping.
fn take((staging, size): (&wgpu::Buffer, u64), faults: &Faults, part: &mut [u8]) -> Result<()> {
    {
        let view = staging.slice(..size).get_mapped_range();
        let view = view.map_err(|error| faults.explain("mapping a buffer", error.to_string()))?;
        part.copy_from_slice(&view[..part.len()]);
    }
    staging.unmap();
    Ok(())
}

/// A buffer that parts of `bytes` bytes of another are fetched to; none for no bytes.
fn staging_for(bytes: usize, allocator: &Allocator) -> Result<Option<wgpu::Buffer>> {
    let size = bytes.min(STAGING_BYTES).next_multiple_of(COPY_ALIGNMENT) as u64;
    if size == 0 {
        return Ok(None);
    }
    allocator.raw("staging", size, BufferUsages::COPY_DST | BufferUsages::MAP_READ).map(Some)
}

/// Copies bytes of a buffer to the host, from a whole u32 on, after all work submitted so far.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn download(
    handles: (&wgpu::Device, &wgpu::Queue),
    allocator: &Allocator,
    faults: &Faults,
    (buffer, start): (&wgpu::Buffer, u64),
    into: &mut [u8],
) -> Result<()> {
    faults.check()?;
    let Some(staging) = staging_for(into.len(), allocator)? else { return faults.wait() };
    let mut offset = start;
    for part in into.chunks_mut(STAGING_BYTES) {
        let staged = (&staging, part.len().next_multiple_of(COPY_ALIGNMENT) as u64);
        let (done, mapped) = mpsc::channel();
        fetch(handles, faults, (buffer, offset), staged, move |result| {
            // The receiver is gone only if this function has returned an error already.
            let _ = done.send(result);
        })?;
        let result = loop {
            faults.wait()?;
            // Another thread that waits too may have taken the callback and be about to run it.
            match mapped.recv_timeout(CALLBACK_PATIENCE) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(result) => break result.map_err(|error| error.to_string()),
                Err(RecvTimeoutError::Disconnected) => break Err("its callback was dropped".to_owned()),
            }
        };
        result.map_err(|why| faults.explain("mapping a buffer", why))?;
        take(staged, faults, part)?;
        offset += part.len() as u64;
    }
    Ok(())
}

/// Copies bytes of a buffer to the host, from a whole u32 on, after all work submitted so far.
#[cfg(target_arch = "wasm32")]
pub(super) async fn download_async(
    handles: (&wgpu::Device, &wgpu::Queue),
    allocator: &Allocator,
    faults: &Faults,
    (buffer, start): (&wgpu::Buffer, u64),
    into: &mut [u8],
) -> Result<()> {
    faults.check()?;
    let Some(staging) = staging_for(into.len(), allocator)? else { return faults.wait_async(handles.1).await };
    let mut offset = start;
    for part in into.chunks_mut(STAGING_BYTES) {
        let staged = (&staging, part.len().next_multiple_of(COPY_ALIGNMENT) as u64);
        let (done, mapped) = signal();
        fetch(handles, faults, (buffer, offset), staged, done)?;
        let mapped = mapped.await;
        // Where a launch failed or the device was lost, that is the answer.
        faults.settle().await?;
        mapped.map_err(|error| faults.explain("mapping a buffer", error.to_string()))?;
        take(staged, faults, part)?;
        offset += part.len() as u64;
    }
    Ok(())
}
