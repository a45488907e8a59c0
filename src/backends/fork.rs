//! Notices when the process is forked.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::process;

/// From now on a child made by `fork` knows that it is one. Called before anything is kept that a
/// child cannot use: threads, drivers.
pub(crate) fn watch() {
    static IS_WATCHED: AtomicBool = AtomicBool::new(false);
    // No lock, which a fork could leave locked. Two threads at once register twice: the number of a
    // process is then larger than it need be, and still its own.
    if IS_WATCHED.load(Ordering::Acquire) {
        return;
    }
    match register() {
        true => IS_WATCHED.store(true, Ordering::Release),
        false => log::warn!("no memory to notice forks: a forked child must not use varlen-fa"),
    }
}

#[cfg(unix)]
fn register() -> bool {
    use std::ffi::c_int;
    type Handler = Option<extern "C" fn()>;
    unsafe extern "C" {
        fn pthread_atfork(prepare: Handler, parent: Handler, child: Handler) -> c_int;
    }
    // SAFETY: declared as POSIX has it; the handler lives as long as the program or library, and
    // does only what is allowed in a child of a process with threads.
    let code = unsafe { pthread_atfork(None, None, Some(process::note_fork)) };
    code == 0
}

#[cfg(not(unix))]
fn register() -> bool {
    // Nothing forks here.
    let _ = process::current();
    true
}
