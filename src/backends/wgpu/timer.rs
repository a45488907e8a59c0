//! GPU time of compute passes, by timestamp queries where the device has them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use wgpu::{BufferUsages, Features, QuerySet, QueryType};

use crate::call::op::{Instant, Timing};
use crate::error::{Error, Result};

use super::buffer::Allocator;
use super::fault::Faults;
use super::transfer;

/// Two queries a pass. A timed region of more passes is refused; WebGPU allows no larger set.
const QUERIES: u32 = 4096;

/// Times the passes between `start` and `stop`.
#[derive(Debug)]
pub(super) struct Timer {
    device_name: Arc<str>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Idle,
    Host,
    Device { queries: QuerySet, used: u32 },
}

/// The two queries of one pass.
#[derive(Debug)]
pub(super) struct PassQueries {
    queries: QuerySet,
    first: u32,
}

impl PassQueries {
    pub fn writes(&self) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(self.first),
            end_of_pass_write_index: Some(self.first + 1),
        }
    }
}

impl Timer {
    pub fn new(device_name: &Arc<str>) -> Self {
        Self { device_name: Arc::clone(device_name), state: Mutex::new(State::Idle) }
    }

    pub fn start(&self, device: &wgpu::Device, faults: &Faults) -> Result<()> {
        let state = if device.features().contains(Features::TIMESTAMP_QUERY) {
            let descriptor =
                wgpu::QuerySetDescriptor { label: Some("timer"), ty: QueryType::Timestamp, count: QUERIES };
            let make = || device.create_query_set(&descriptor);
            State::Device { queries: faults.capture("creating timestamp queries", 0, make)?, used: 0 }
        } else {
            State::Host
        };
        *self.lock() = state;
        Ok(())
    }

    /// The queries of the next pass, if passes are being timed on the device.
    pub fn next_pass(&self) -> Result<Option<PassQueries>> {
        let State::Device { queries, used } = &mut *self.lock() else { return Ok(None) };
        if *used + 2 > QUERIES {
            return Err(self.error(format!("more than {} launches in one timed region", QUERIES / 2)));
        }
        let first = *used;
        *used += 2;
        Ok(Some(PassQueries { queries: queries.clone(), first }))
    }

    /// Waits for the device and gives the sum of the passes' times, or the host's time since `start`.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn stop(
        &self,
        started: Instant,
        handles: (&wgpu::Device, &wgpu::Queue),
        allocator: &Allocator,
        faults: &Faults,
    ) -> Result<Timing> {
        let measured = self.measured(handles, allocator, faults)?;
        if let Measured::Passes { resolved, mut ticks } = measured {
            let bytes = bytemuck::cast_slice_mut(&mut ticks);
            transfer::download(handles, allocator, faults, (&resolved, 0), bytes)?;
            return Ok(sum_of_passes(&ticks, handles.1));
        }
        faults.wait()?;
        Ok(measured.without_passes(started))
    }

    /// The same in a browser.
    #[cfg(target_arch = "wasm32")]
    pub async fn stop_async(
        &self,
        started: Instant,
        handles: (&wgpu::Device, &wgpu::Queue),
        allocator: &Allocator,
        faults: &Faults,
    ) -> Result<Timing> {
        let measured = self.measured(handles, allocator, faults)?;
        if let Measured::Passes { resolved, mut ticks } = measured {
            let bytes = bytemuck::cast_slice_mut(&mut ticks);
            transfer::download_async(handles, allocator, faults, (&resolved, 0), bytes).await?;
            return Ok(sum_of_passes(&ticks, handles.1));
        }
        faults.wait_async(handles.1).await?;
        Ok(measured.without_passes(started))
    }

    /// Ends the timing and has the queries written to a buffer.
    fn measured(
        &self,
        (device, queue): (&wgpu::Device, &wgpu::Queue),
        allocator: &Allocator,
        faults: &Faults,
    ) -> Result<Measured> {
        let state = std::mem::replace(&mut *self.lock(), State::Idle);
        match state {
            State::Idle => Err(self.error("it was not started, or another thread stopped it".to_owned())),
            State::Host => Ok(Measured::Host),
            State::Device { used: 0, .. } => Ok(Measured::NoPass),
            State::Device { queries, used } => {
                let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
                let resolved = allocator.raw("timestamps", u64::from(used) * 8, usage)?;
                faults.capture("reading timestamps", 0, || {
                    let mut encoder = device.create_command_encoder(&Default::default());
                    encoder.resolve_query_set(&queries, 0..used, &resolved, 0);
                    queue.submit([encoder.finish()]);
                })?;
                Ok(Measured::Passes { resolved, ticks: vec![0; used as usize] })
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, why: String) -> Error {
        Error::Backend { device: self.device_name.to_string(), operation: "timing", why }
    }
}

/// What a timing came to.
enum Measured {
    /// No queries: the host's clock counts.
    Host,
    /// Nothing was launched.
    NoPass,
    /// Buffer of the queries' values, and room for them.
    Passes { resolved: wgpu::Buffer, ticks: Vec<u64> },
}

impl Measured {
    fn without_passes(&self, started: Instant) -> Timing {
        match self {
            Self::Host => Timing { duration: started.elapsed(), by_device: false },
            _ => Timing { duration: Duration::ZERO, by_device: true },
        }
    }
}

fn sum_of_passes(ticks: &[u64], queue: &wgpu::Queue) -> Timing {
    let total: u64 = ticks.chunks_exact(2).map(|pass| pass[1].saturating_sub(pass[0])).sum();
    let nanoseconds = total as f64 * f64::from(queue.get_timestamp_period());
    Timing { duration: Duration::from_nanos(nanoseconds as u64), by_device: true }
}
