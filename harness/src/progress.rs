//! A line of progress for work that turns out to be long.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Work that is done before this needs no progress.
const PATIENCE: Duration = Duration::from_secs(1);

/// Shows itself on standard error, if that is a terminal, once the work has taken a while.
#[derive(Debug)]
pub struct Progress {
    steps: usize,
    done: usize,
    started: Instant,
    is_terminal: bool,
    is_shown: bool,
}

impl Progress {
    /// For a number of steps.
    pub fn new(steps: usize) -> Self {
        let is_terminal = io::stderr().is_terminal();
        Self { steps, done: 0, started: Instant::now(), is_terminal, is_shown: false }
    }

    /// Says what the next step is.
    pub fn begin(&mut self, what: &str) {
        if self.is_terminal && self.started.elapsed() > PATIENCE {
            self.is_shown = true;
            self.write(&format!("{}/{} {what}", self.done, self.steps));
        }
    }

    /// Counts a step.
    pub fn end(&mut self) {
        self.done += 1;
    }

    /// Replaces the line. A terminal that is gone is no reason to stop the work.
    fn write(&self, line: &str) {
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "\r\x1b[K{line}").and_then(|()| stderr.flush());
    }
}

/// Leaves nothing behind, also where the work fails.
impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_shown {
            self.write("");
        }
    }
}
