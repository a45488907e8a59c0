//! Copies of host-side metadata on devices: made once per device, reused by every layer and step.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::process::OfProcess;

/// Identifies one device of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct DeviceId(u64);

impl DeviceId {
    /// The host's processor and memory.
    pub(crate) const CPU: Self = Self(0);

    /// An id that no other device of this process has.
    pub(crate) fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

type Entry = (DeviceId, OfProcess<dyn Any + Send + Sync>);

/// What backends keep of one mask or metadata: at most one value of each type for each device.
///
/// Type-erased, so that the metadata does not depend on any backend.
#[derive(Default)]
pub(crate) struct DeviceCopies {
    entries: Mutex<Vec<Entry>>,
}

impl DeviceCopies {
    /// The copy of type `T` for `device`, made by `make` if there is none yet.
    pub(crate) fn get_or_make<T: Any + Send + Sync>(
        &self,
        device: DeviceId,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        // The lock is held while the copy is made, so two threads never upload the same thing. A panic while it is held
        // leaves the list as it was: entries are only ever pushed whole.
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let found = entries
            .iter()
            .filter(|(owner, _)| *owner == device)
            .find_map(|(_, copy)| Arc::clone(copy).downcast::<T>().ok());
        if let Some(copy) = found {
            return Ok(copy);
        }
        let copy = Arc::new(make()?);
        entries.push((device, OfProcess::new(Arc::clone(&copy) as Arc<dyn Any + Send + Sync>)));
        Ok(copy)
    }
}

/// A clone starts without copies: it makes its own when it is first used.
impl Clone for DeviceCopies {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for DeviceCopies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        write!(f, "{} device copies", entries.len())
    }
}
