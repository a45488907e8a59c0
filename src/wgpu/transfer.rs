//! Copies between host and device, and waiting for the device.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use wgpu::{BufferUsages, MapMode, PollType};

use crate::error::Result;

use super::buffer::Allocator;
use super::fault::Faults;

/// The most bytes that one staging buffer holds, so that large tensors do not double the memory in use.
const STAGING_BYTES: usize = 64 << 20;
/// Copies move whole u32s.
const COPY_ALIGNMENT: usize = 4;

/// How long to wait for the callback of a mapping before asking the device again.
const CALLBACK_PATIENCE: Duration = Duration::from_millis(10);

/// Waits for all work submitted so far.
pub(super) fn wait(device: &wgpu::Device, faults: &Faults) -> Result<()> {
    match device.poll(PollType::wait_indefinitely()) {
        Ok(_) => faults.check(),
        Err(error) => Err(faults.explain(device, "waiting for the device", error.to_string())),
    }
}

/// Copies bytes to the start of a buffer, which has room for them rounded up to whole u32s.
pub(super) fn upload(queue: &wgpu::Queue, faults: &Faults, buffer: &wgpu::Buffer, bytes: &[u8]) -> Result<()> {
    faults.check()?;
    let mut offset = 0;
    for part in bytes.chunks(STAGING_BYTES) {
        let whole = part.len() / COPY_ALIGNMENT * COPY_ALIGNMENT;
        queue.write_buffer(buffer, offset, &part[..whole]);
        if whole < part.len() {
            let mut tail = [0; COPY_ALIGNMENT];
            tail[..part.len() - whole].copy_from_slice(&part[whole..]);
            queue.write_buffer(buffer, offset + whole as u64, &tail);
        }
        offset += part.len() as u64;
        // Lets the staging memory go before the next part takes its own.
        if bytes.len() > STAGING_BYTES {
            queue.submit([]);
        }
    }
    faults.check()
}

/// Copies the start of a buffer to the host, after all work submitted so far.
pub(super) fn download(
    (device, queue): (&wgpu::Device, &wgpu::Queue),
    allocator: &Allocator,
    faults: &Faults,
    buffer: &wgpu::Buffer,
    into: &mut [u8],
) -> Result<()> {
    faults.check()?;
    let staging_bytes = into.len().min(STAGING_BYTES).next_multiple_of(COPY_ALIGNMENT) as u64;
    if staging_bytes == 0 {
        return wait(device, faults);
    }
    let staging = allocator.raw("staging", staging_bytes, BufferUsages::COPY_DST | BufferUsages::MAP_READ)?;
    let mut offset = 0;
    for part in into.chunks_mut(STAGING_BYTES) {
        let size = part.len().next_multiple_of(COPY_ALIGNMENT) as u64;
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, offset, &staging, 0, size);
        queue.submit([encoder.finish()]);
        let (done, mapped) = mpsc::channel();
        let slice = staging.slice(..size);
        slice.map_async(MapMode::Read, move |result| {
            // The receiver is gone only if this function has returned an error already.
            let _ = done.send(result);
        });
        let result = loop {
            wait(device, faults)?;
            // Another thread that waits too may have taken the callback and be about to run it.
            match mapped.recv_timeout(CALLBACK_PATIENCE) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(result) => break result.map_err(|error| error.to_string()),
                Err(RecvTimeoutError::Disconnected) => break Err("its callback was dropped".to_owned()),
            }
        };
        if let Err(why) = result {
            return Err(faults.explain(device, "mapping a buffer", why));
        }
        {
            let view = slice
                .get_mapped_range()
                .map_err(|error| faults.explain(device, "mapping a buffer", error.to_string()))?;
            part.copy_from_slice(&view[..part.len()]);
        }
        staging.unmap();
        offset += part.len() as u64;
    }
    Ok(())
}
