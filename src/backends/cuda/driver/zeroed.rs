//! Counts that are zero before every kernel that counts, and that it leaves as zeros: to zero them
//! before each launch takes the driver as long as the launch itself.

use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::DeviceId;
use crate::call::memory::DeviceBuffer;
use crate::error::Result;

use super::context::Context;
use super::memory::CudaBuffer;
use super::transfer;

/// The least that is taken: enough for every query tile of a last wave.
const LEAST_BYTES: u64 = 16 << 10;

/// Zeroed memory for one launch; it is dropped once that is launched.
pub type ZeroedCounts = Arc<CudaBuffer>;

/// Zeroed memory that launches use one after another. All uses are in the order of one stream.
#[derive(Debug, Default)]
pub struct KeptCounts(Mutex<Option<ZeroedCounts>>);

impl KeptCounts {
    /// At least so many bytes. The context is current. While the stream is being captured they are the graph's own: it may run
    /// beside other work.
    pub fn take(&self, context: &Arc<Context>, device: DeviceId, bytes: u64) -> Result<ZeroedCounts> {
        if context.is_captured()? {
            return zeroed(context, device, bytes);
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(counts) if counts.size() >= bytes => Ok(Arc::clone(counts)),
            _ => {
                let made = zeroed(context, device, bytes.next_power_of_two().max(LEAST_BYTES))?;
                *kept = Some(Arc::clone(&made));
                Ok(made)
            }
        }
    }
}

fn zeroed(context: &Arc<Context>, device: DeviceId, bytes: u64) -> Result<ZeroedCounts> {
    let made = CudaBuffer::new(context, device, bytes)?;
    // SAFETY: the whole buffer, which is new.
    unsafe { transfer::fill(context, made.address(), 0, bytes) }?;
    Ok(Arc::new(made))
}
