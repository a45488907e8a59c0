//! Times of submissions: by the GPU's timestamps around one, where it has them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use varlen_fa::wgpu;

/// Submits, and tells how long the GPU took.
pub struct Clock<'a> {
    device: &'a wgpu::Device,
    queue: &'a wgpu::Queue,
    stamps: Option<Stamps>,
}

/// Timestamps at the beginning and at the end of a pass, and where the host reads them.
struct Stamps {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    read: wgpu::Buffer,
}

/// Two timestamps of 8 bytes.
const STAMPS_BYTES: u64 = 16;

impl<'a> Clock<'a> {
    pub fn new(device: &'a wgpu::Device, queue: &'a wgpu::Queue) -> Self {
        let buffer = |usage| {
            let descriptor =
                wgpu::BufferDescriptor { label: None, size: STAMPS_BYTES, usage, mapped_at_creation: false };
            device.create_buffer(&descriptor)
        };
        let stamps = device.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| Stamps {
            queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            }),
            resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
            read: buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST),
        });
        Self { device, queue, stamps }
    }

    /// Has one pass recorded, submits it and waits for it.
    pub fn time<T>(&self, record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> Result<T>) -> Result<(T, Duration)> {
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let timestamp_writes = self.stamps.as_ref().map(|stamps| wgpu::ComputePassTimestampWrites {
            query_set: &stamps.queries,
            beginning_of_pass_write_index: Some(0),
            end_of_pass_write_index: Some(1),
        });
        let descriptor = wgpu::ComputePassDescriptor { label: None, timestamp_writes };
        let recorded = record(&mut encoder.begin_compute_pass(&descriptor))?;
        if let Some(Stamps { queries, resolved, read }) = &self.stamps {
            encoder.resolve_query_set(queries, 0..2, resolved, 0);
            encoder.copy_buffer_to_buffer(resolved, 0, read, 0, STAMPS_BYTES);
        }
        let start = Instant::now();
        self.queue.submit([encoder.finish()]);
        self.device.poll(wgpu::PollType::wait_indefinitely())?;
        let elapsed = start.elapsed();
        let Some(stamps) = &self.stamps else { return Ok((recorded, elapsed)) };
        Ok((recorded, stamps.elapsed(self.device, self.queue)?))
    }
}

impl Stamps {
    /// Between the two timestamps.
    fn elapsed(&self, device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Duration> {
        let (sender, receiver) = std::sync::mpsc::channel();
        self.read.map_async(wgpu::MapMode::Read, .., move |result| drop(sender.send(result)));
        device.poll(wgpu::PollType::wait_indefinitely())?;
        receiver.recv().context("mapping the timestamps ended")??;
        let ticks = {
            let bytes = self.read.get_mapped_range(..)?;
            let tick = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
            tick(0).zip(tick(8)).context("two timestamps")?
        };
        self.read.unmap();
        let nanoseconds = ticks.1.saturating_sub(ticks.0) as f64 * f64::from(queue.get_timestamp_period());
        Ok(Duration::from_nanos(nanoseconds as u64))
    }
}
