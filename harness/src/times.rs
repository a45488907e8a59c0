//! Repeated timings in three numbers.

use std::time::Duration;

/// Median and extremes of repeated timings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// The mean of the middle two, for an even number.
    pub median: Duration,
    /// The shortest.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

impl Times {
    /// Of at least one timing; zeros for none. The median of an even number is the mean of the middle two.
    pub fn of(mut timings: Vec<Duration>) -> Self {
        timings.sort_unstable();
        let at = |index: usize| timings.get(index).copied().unwrap_or_default();
        let (last, half) = (timings.len().saturating_sub(1), timings.len() / 2);
        Self { median: (at(last / 2) + at(half)) / 2, min: at(0), max: at(last) }
    }
}

/// The duration as a number of milliseconds.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
