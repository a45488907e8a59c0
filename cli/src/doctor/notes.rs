//! The warnings of the library's log: why a kernel is not used, say. They belong in the report.

use std::mem;
use std::sync::{Mutex, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Notes(Mutex<Vec<String>>);

static NOTES: Notes = Notes(Mutex::new(Vec::new()));

impl Log for Notes {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn && metadata.target().starts_with("varlen_fa")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let note = format!("{}: {}", record.level().as_str().to_lowercase(), record.args());
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(note);
        }
    }

    fn flush(&self) {}
}

/// Keeps warnings from now on.
pub fn listen() {
    // Nobody else sets a logger in this program.
    if log::set_logger(&NOTES).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// The warnings since the last call.
pub fn take() -> Vec<String> {
    mem::take(&mut *NOTES.0.lock().unwrap_or_else(PoisonError::into_inner))
}
