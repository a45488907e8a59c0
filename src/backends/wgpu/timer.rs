//! GPU time of compute passes, by timestamp queries where the device has them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use wgpu::{BufferUsages, Features, QuerySet, QueryType};

use crate::call::op::{Instant, Timing};
use crate::error::{Error, Result};

use super::context::Context;
use super::{transfer, wait};

/// Two queries per pass. A timed region of more passes is refused; WebGPU allows no larger set.
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

    /// Starts to count passes.
    pub fn start(&self, Context { device, faults, .. }: &Context) -> Result<()> {
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

    /// Waits for the device and returns the sum of the passes' times. Without passes timed by the
    /// device, returns the host's time since `started`.
    pub async fn stop(&self, context: &Context, started: Instant) -> Result<Timing> {
        let state = std::mem::replace(&mut *self.lock(), State::Idle);
        match state {
            State::Idle => Err(self.error("it was not started, or another thread stopped it".to_owned())),
            State::Host => {
                wait::for_work(context).await?;
                Ok(Timing { duration: started.elapsed(), by_device: false })
            }
            State::Device { used: 0, .. } => {
                wait::for_work(context).await?;
                Ok(Timing { duration: Duration::ZERO, by_device: true })
            }
            State::Device { queries, used } => {
                let resolved = resolve(context, &queries, used)?;
                let mut ticks = vec![0_u64; used as usize];
                transfer::download(context, (&resolved, 0), bytemuck::cast_slice_mut(&mut ticks)).await?;
                Ok(sum_of_passes(&ticks, &context.queue))
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

/// Has the values of the first `used` queries written to a new buffer.
fn resolve(context: &Context, queries: &QuerySet, used: u32) -> Result<wgpu::Buffer> {
    let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
    let resolved = context.allocator.raw("timestamps", u64::from(used) * 8, usage)?;
    context.faults.capture("reading timestamps", 0, || {
        let mut encoder = context.device.create_command_encoder(&Default::default());
        encoder.resolve_query_set(queries, 0..used, &resolved, 0);
        context.queue.submit([encoder.finish()]);
    })?;
    Ok(resolved)
}

fn sum_of_passes(ticks: &[u64], queue: &wgpu::Queue) -> Timing {
    let total: u64 = ticks.chunks_exact(2).map(|pass| pass[1].saturating_sub(pass[0])).sum();
    let nanoseconds = total as f64 * f64::from(queue.get_timestamp_period());
    Timing { duration: Duration::from_nanos(nanoseconds as u64), by_device: true }
}
