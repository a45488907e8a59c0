//! Calls that are made while a stream may be captured into a graph.

use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUstreamCaptureMode};

/// Until this is dropped, the calling thread may make calls that are no part of any stream while a stream is being captured:
/// loading kernels, and filling memory that the graph will only read. In the modes that captures usually begin in, such a call
/// would fail and spoil the capture, whether it is of this thread or, in the global mode, of any other.
#[derive(Debug)]
pub(super) struct Relaxed {
    previous: CUstreamCaptureMode,
}

impl Relaxed {
    /// Relaxes the calling thread.
    pub fn enter() -> Result<Self, DriverError> {
        Ok(Self { previous: exchange(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)? })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        if let Err(error) = exchange(self.previous) {
            log::debug!("the thread's capture mode is not restored: {error}");
        }
    }
}

/// Sets the calling thread's mode and gives the one before.
fn exchange(mut mode: CUstreamCaptureMode) -> Result<CUstreamCaptureMode, DriverError> {
    // SAFETY: the pointer is to a mode, which the driver reads and writes as one.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
    Ok(mode)
}
