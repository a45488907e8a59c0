//! Copies between host and device.

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use wgpu::{BufferUsages, MapMode};

use crate::error::Result;

use super::buffer::Allocator;
use super::fault::Faults;

/// The most bytes that one staging buffer holds, so that large tensors do not double the memory in use.
const STAGING_BYTES: usize = 64 << 20;
/// Copies move whole u32s.
const COPY_ALIGNMENT: usize = 4;

/// How long to wait for the callback of a mapping before asking the device again.
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

/// Copies bytes of a buffer to the host, from a whole u32 on, after all work submitted so far.
pub(super) fn download(
    (device, queue): (&wgpu::Device, &wgpu::Queue),
    allocator: &Allocator,
    faults: &Faults,
    (buffer, start): (&wgpu::Buffer, u64),
    into: &mut [u8],
) -> Result<()> {
    faults.check()?;
    let staging_bytes = into.len().min(STAGING_BYTES).next_multiple_of(COPY_ALIGNMENT) as u64;
    if staging_bytes == 0 {
        return faults.wait();
    }
    let staging = allocator.raw("staging", staging_bytes, BufferUsages::COPY_DST | BufferUsages::MAP_READ)?;
    let mut offset = start;
    for part in into.chunks_mut(STAGING_BYTES) {
        let size = part.len().next_multiple_of(COPY_ALIGNMENT) as u64;
        let slice = staging.slice(..size);
        let mapped = faults.capture("copying from the device", size, || {
            let mut encoder = device.create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(buffer, offset, &staging, 0, size);
            queue.submit([encoder.finish()]);
            let (done, mapped) = mpsc::channel();
            slice.map_async(MapMode::Read, move |result| {
                // The receiver is gone only if this function has returned an error already.
                let _ = done.send(result);
            });
            mapped
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
        if let Err(why) = result {
            return Err(faults.explain("mapping a buffer", why));
        }
        {
            let view =
                slice.get_mapped_range().map_err(|error| faults.explain("mapping a buffer", error.to_string()))?;
            part.copy_from_slice(&view[..part.len()]);
        }
        staging.unmap();
        offset += part.len() as u64;
    }
    Ok(())
}
