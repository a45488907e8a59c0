//! Streams that are being captured into a graph.

use cudarc::driver::DriverError;
use cudarc::driver::result::stream;
use cudarc::driver::sys::{self, CUstream, CUstreamCaptureMode, CUstreamCaptureStatus};

/// Whether a stream is being captured into a graph. A capture that has failed counts until the
/// application ends it.
///
/// # Safety
/// The stream is live, or the legacy default stream of the current context.
pub unsafe fn is_captured(stream: CUstream) -> Result<bool, DriverError> {
    // SAFETY: by the caller's promise.
    let status = unsafe { stream::is_capturing(stream) }?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// Until this is dropped, the calling thread may make calls that belong to no stream while a stream
/// is being captured: loading kernels, and filling memory that the graph will only read. In the
/// modes that captures usually begin in, such a call would fail and spoil the capture, whether that
/// belongs to this thread or, in the global mode, to any other.
#[derive(Debug)]
pub struct RelaxedCapture {
    previous: CUstreamCaptureMode,
}

impl RelaxedCapture {
    /// Relaxes the calling thread.
    pub fn enter() -> Result<Self, DriverError> {
        Ok(Self { previous: exchange(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)? })
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        if let Err(error) = exchange(self.previous) {
            log::debug!("the thread's capture mode is not restored: {error}");
        }
    }
}

/// Sets the calling thread's mode and returns the one before.
fn exchange(mut mode: CUstreamCaptureMode) -> Result<CUstreamCaptureMode, DriverError> {
    // SAFETY: the pointer is to a mode, which the driver reads and writes as one.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
    Ok(mode)
}
