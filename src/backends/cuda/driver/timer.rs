//! GPU time by events on the stream. Timings of several threads may overlap: each has its own
//! events.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::DriverError;
use cudarc::driver::result::event;
use cudarc::driver::sys::{CUevent, CUevent_flags};

use crate::call::op::Timing;
use crate::error::{Error, Result};

use super::context::Context;

/// An event. Its context outlives it.
#[derive(Debug)]
struct Event(CUevent);

// SAFETY: an event may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// An event after all work launched so far; the context is current.
    fn record(context: &Context) -> Result<Self, DriverError> {
        let event = Self(event::create(CUevent_flags::CU_EVENT_DEFAULT)?);
        // SAFETY: the event was just made, in the stream's context.
        unsafe { event::record(event.0, context.stream()) }?;
        Ok(event)
    }

    fn milliseconds_until(&self, end: &Self) -> Result<f32, DriverError> {
        // SAFETY: the event is live.
        unsafe { event::synchronize(end.0) }?;
        // SAFETY: both events are live and were recorded.
        unsafe { event::elapsed(self.0, end.0) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is live, and this is its only owner.
        let destroyed = unsafe { event::destroy(self.0) };
        if let Err(error) = destroyed {
            log::debug!("an event is not destroyed: {error}");
        }
    }
}

/// The timings under way.
#[derive(Debug, Default)]
pub struct Timers {
    /// Two that started at the same instant may be mistaken for each other, which changes nothing.
    running: Mutex<Vec<(Instant, Event)>>,
}

impl Timers {
    /// Starts a timing, and returns the instant that identifies it.
    pub fn start(&self, context: &Context) -> Result<Instant> {
        context.expect_no_capture("timing")?;
        let event = context.check(Event::record(context), "timing")?;
        let started = Instant::now();
        self.lock().push((started, event));
        Ok(started)
    }

    /// Waits for all work and returns the time between the stream's arrival at the start and here.
    pub fn stop(&self, context: &Context, started: Instant) -> Result<Timing> {
        let begin = {
            let mut running = self.lock();
            let found = running.iter().position(|(instant, _)| *instant == started);
            found.map(|index| running.swap_remove(index).1)
        };
        let Some(begin) = begin else {
            let device = context.faults.device_name().to_string();
            return Err(Error::Backend { device, operation: "timing", why: "it was not started".to_owned() });
        };
        context.expect_no_capture("timing")?;
        let measured = Event::record(context).and_then(|end| begin.milliseconds_until(&end));
        let seconds = f64::from(context.check(measured, "timing")?) / 1e3;
        let duration = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        Ok(Timing { duration, by_device: true })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, Event)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
