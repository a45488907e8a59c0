//! Copies of host-side metadata on devices: made once per device, reused by every layer and step. And what a device keeps beside
//! metadata that it builds itself.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// What a device makes of tables that it builds itself, and keeps: until they are built anew, or, where a graph builds them anew
/// without the host, as long as they are there. Then each build makes it anew too.
#[derive(Debug)]
pub(crate) struct BuildCopies {
    build: u64,
    copies: DeviceCopies,
    is_replayed: AtomicBool,
    is_lost: AtomicBool,
}

#[cfg_attr(
    any(not(feature = "cuda"), target_arch = "wasm32"),
    allow(dead_code, reason = "CUDA devices alone keep something")
)]
impl BuildCopies {
    /// Of new tables.
    pub(crate) fn new() -> Self {
        let (is_replayed, is_lost) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { build: Self::next(), copies: DeviceCopies::default(), is_replayed, is_lost }
    }

    fn next() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    /// A number above 0 that no other tables of this process have, nor these when they were built otherwise.
    pub(crate) fn build(&self) -> u64 {
        self.build
    }

    /// What is kept; `None` if it may not be what the tables are.
    pub(crate) fn copies(&self) -> Option<&DeviceCopies> {
        (!self.is_lost.load(Ordering::Relaxed)).then_some(&self.copies)
    }

    /// Whether runs of a graph may build the tables anew.
    pub(crate) fn is_replayed(&self) -> bool {
        self.is_replayed.load(Ordering::Relaxed)
    }

    /// From now on they may.
    pub(crate) fn set_replayed(&self) {
        self.is_replayed.store(true, Ordering::Relaxed);
    }

    /// The tables were built anew and what is kept was not, or not all of it.
    pub(crate) fn lose(&self) {
        self.is_lost.store(true, Ordering::Relaxed);
    }

    /// Before the tables are built anew; nobody else has them. Gives up what is kept, unless each build makes it anew.
    pub(crate) fn renew(&mut self) {
        self.build = Self::next();
        if !self.is_replayed() {
            self.copies = DeviceCopies::default();
            self.is_lost = AtomicBool::new(false);
        }
    }
}

impl fmt::Debug for DeviceCopies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        write!(f, "{} device copies", entries.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is kept for the CPU's id.
    fn kept(copies: &BuildCopies, new: usize) -> Result<Option<usize>> {
        copies.copies().map(|copies| copies.get_or_make(DeviceId::CPU, || Ok(new)).map(|kept| *kept)).transpose()
    }

    #[test]
    fn builds_are_told_apart_and_give_up_what_is_kept() -> Result<()> {
        let (mut copies, others) = (BuildCopies::new(), BuildCopies::new());
        let first = copies.build();
        assert!(first > 0 && first != others.build());
        assert_eq!((kept(&copies, 1)?, kept(&copies, 2)?), (Some(1), Some(1)));
        copies.renew();
        assert!(copies.build() != first && copies.build() != others.build());
        assert_eq!(kept(&copies, 3)?, Some(3));
        copies.lose();
        assert_eq!(kept(&copies, 4)?, None);
        copies.renew();
        assert_eq!(kept(&copies, 5)?, Some(5));
        Ok(())
    }

    #[test]
    fn what_a_graph_makes_anew_stays_unless_it_is_lost() -> Result<()> {
        let mut copies = BuildCopies::new();
        assert_eq!(kept(&copies, 1)?, Some(1));
        copies.set_replayed();
        copies.renew();
        assert!(copies.is_replayed());
        assert_eq!(kept(&copies, 2)?, Some(1));
        copies.lose();
        copies.renew();
        assert_eq!(kept(&copies, 3)?, None);
        Ok(())
    }
}
