//! The process that something was made in. A child made by `fork` has copies of its parent's
//! memory but none of its other threads, and no driver that the parent started works in it.

use std::cell::Cell;
use std::fmt;
use std::mem;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How often this process and its ancestors were forked off. No ancestor has the same number.
static FORKS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread is the one that called `fork`, seen in the child.
    static IS_FORKED: Cell<bool> = const { Cell::new(false) };
}

/// The process, as a number that its ancestors do not have.
pub(crate) fn current() -> usize {
    FORKS.load(Ordering::Relaxed)
}

/// Whether this thread was copied from a parent: if it was a worker there, its pool is gone.
pub(crate) fn is_forked_thread() -> bool {
    IS_FORKED.try_with(Cell::get).unwrap_or(false)
}

/// Called in the child between `fork` and its return, where nothing may lock or allocate.
#[cfg(unix)]
pub(crate) extern "C" fn note_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    let _ = IS_FORKED.try_with(|is_forked| is_forked.set(true));
}

/// A shared value that only the process that made it may use or drop: a child leaks its copy, since
/// a drop could wait for a lock that a thread of the parent held.
pub(crate) struct OfProcess<T: ?Sized> {
    value: Arc<T>,
    process: usize,
}

impl<T: ?Sized> OfProcess<T> {
    pub(crate) fn new(value: Arc<T>) -> Self {
        Self { value, process: current() }
    }

    /// Whether this process made the value.
    pub(crate) fn is_own(&self) -> bool {
        self.process == current()
    }
}

impl<T: ?Sized> Deref for OfProcess<T> {
    type Target = Arc<T>;

    fn deref(&self) -> &Arc<T> {
        &self.value
    }
}

impl<T: ?Sized> Clone for OfProcess<T> {
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), process: self.process }
    }
}

impl<T: ?Sized> Drop for OfProcess<T> {
    fn drop(&mut self) {
        if !self.is_own() {
            // One owner more than there are, so that the value is never dropped.
            mem::forget(Arc::clone(&self.value));
        }
    }
}

impl<T: fmt::Debug + ?Sized> fmt::Debug for OfProcess<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}
