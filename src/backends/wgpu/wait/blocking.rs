//! Waiting by blocking the thread: everywhere but in a browser.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use wgpu::PollType;

use crate::error::Result;

use super::super::context::Context;
use super::super::fault::Faults;
use super::calls::Blocking;

/// How long to wait for a callback before asking the device again.
const CALLBACK_PATIENCE: Duration = Duration::from_millis(10);

/// Runs a call to its end. Of the device named `device`, for messages.
pub fn now<T>(_device: &str, _call: Blocking, work: impl Future<Output = Result<T>>) -> Result<T> {
    pollster::block_on(work)
}

/// Waits for all work submitted so far, and runs the callbacks that wait for it.
pub async fn for_work(context: &Context) -> Result<()> {
    poll(&context.device, &context.faults)
}

fn poll(device: &wgpu::Device, faults: &Faults) -> Result<()> {
    // wgpu panics where the driver reports the device lost while it is waited for.
    match catch_unwind(AssertUnwindSafe(|| device.poll(PollType::wait_indefinitely()))) {
        Ok(Ok(_)) => faults.probe().and_then(|()| faults.check()),
        Ok(Err(error)) => Err(faults.explain("waiting for the device", error.to_string())),
        Err(_) => {
            faults.lose("waiting for it failed".to_owned());
            faults.check_lost()
        }
    }
}

/// The value that a callback will be called with.
pub struct Signal<T>(Receiver<T>);

/// A callback, and the value that it will be called with.
pub fn signal<T: Send + 'static>() -> (impl FnOnce(T) + Send + 'static, Signal<T>) {
    let (send, receive) = mpsc::channel();
    let callback = move |value| {
        // The receiver is gone only if the call that waited has returned an error already.
        let _ = send.send(value);
    };
    (callback, Signal(receive))
}

impl<T> Signal<T> {
    /// Waits until the callback has run. None if it was dropped instead.
    pub async fn received(self, context: &Context) -> Result<Option<T>> {
        loop {
            for_work(context).await?;
            // Another thread that waits too may have taken the callback and be about to run it.
            match self.0.recv_timeout(CALLBACK_PATIENCE) {
                Err(RecvTimeoutError::Timeout) => {}
                received => return Ok(received.ok()),
            }
        }
    }
}
