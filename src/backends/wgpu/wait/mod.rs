//! Waiting for the device, in one form that may give up the thread. A browser's page cannot block
//! its thread: there [`now`] is an error that names what to call instead. Everywhere else nothing
//! is ever pending: the forms below block inside, and `now` runs them to their end.

#[cfg(not(target_arch = "wasm32"))]
mod blocking;
#[cfg(target_arch = "wasm32")]
mod browser;

#[cfg(not(target_arch = "wasm32"))]
pub(super) use blocking::{for_work, now, signal};
#[cfg(target_arch = "wasm32")]
pub(super) use browser::{for_work, now, signal};

/// A call that blocks the thread.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(target_arch = "wasm32"), expect(dead_code, reason = "only a browser refuses it"))]
pub(super) struct Blocking {
    /// What it does, for messages.
    operation: &'static str,
    /// What to call where the thread cannot block.
    instead: &'static str,
}

pub(super) const OPENING: Blocking = Blocking { operation: "opening a GPU", instead: "Device::with_config_async" };
pub(super) const WAITING: Blocking =
    Blocking { operation: "waiting for its work", instead: "Device::synchronize_async or Device::time_async" };
pub(super) const READING: Blocking = Blocking {
    operation: "reading memory",
    instead: "Tensor::to_vec_async, DeviceMemory::read_async, or a write of whole u32s",
};
pub(super) const TIMING: Blocking = Blocking { operation: "timing", instead: "Device::time_async" };
