//! Repeated timings, in turns, and in three numbers.

use std::time::Duration;

use varlen_fa::{BackendKind, Device, Result};

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

/// Times calls in turns, each of `calls` once a round by its number, after a round that warms up. Returns what each call gave
/// last, and its times.
pub fn in_turns<T>(
    device: &Device,
    rounds: usize,
    calls: usize,
    mut call: impl FnMut(usize) -> Result<T>,
) -> Result<Vec<(T, Times)>> {
    let mut rows = Vec::with_capacity(calls);
    for _ in 0..=rounds {
        for number in 0..calls {
            let (given, timing) = device.time(|| call(number))?;
            device.synchronize()?;
            match rows.get_mut(number) {
                None => rows.push((given, Vec::with_capacity(rounds))),
                Some((last, timings)) => {
                    *last = given;
                    timings.push(timing.duration);
                }
            }
        }
    }
    Ok(rows.into_iter().map(|(given, timings)| (given, Times::of(timings))).collect())
}

/// How often a short call is repeated in one measured time: on a GPU so often that the host's work for
/// one call hides behind the device's for another.
pub fn repeats_of(device: &Device) -> u32 {
    if device.capabilities().backend == BackendKind::Cpu { 1 } else { 8 }
}

/// The duration as a number of milliseconds.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
