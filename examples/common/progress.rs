//! A progress bar for work that turns out to be long.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Work that is done before this needs no bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// Shows itself on standard error, if that is a terminal, once the work has taken a while.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
    is_shown: Cell<bool>,
}

impl Progress {
    /// For a number of steps.
    pub fn new(steps: usize) -> Result<Self> {
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::hidden());
        bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}, {eta} left")?);
        Ok(Self { bar, started: Instant::now(), is_shown: Cell::new(false) })
    }

    /// Says what the next step is.
    pub fn begin(&self, what: &str) {
        self.bar.set_message(what.to_owned());
        if !self.is_shown.get() && self.started.elapsed() > PATIENCE {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.is_shown.set(true);
        }
    }

    /// Counts a step.
    pub fn end(&self) {
        self.bar.inc(1);
    }
}

/// The bar leaves nothing behind, also where the work fails.
impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
