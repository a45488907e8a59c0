//! Waiting for the device, in one form that may give up the thread. A browser's page cannot block
//! its thread: there [`now`] is an error that names what to call instead. Everywhere else nothing
//! is ever pending: the forms below block inside, and `now` runs them to their end.

#[cfg(not(target_arch = "wasm32"))]
mod blocking;
#[cfg(target_arch = "wasm32")]
mod browser;
mod calls;

#[cfg(not(target_arch = "wasm32"))]
pub(super) use blocking::{for_work, now, signal};
#[cfg(target_arch = "wasm32")]
pub(super) use browser::{for_work, now, signal};
pub(super) use calls::{OPENING, READING, TIMING, WAITING};
