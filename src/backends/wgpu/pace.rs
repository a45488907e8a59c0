//! How much work a submission may have, so that none runs for long on a slow adapter.
//!
//! Windows resets a GPU that does not get done with what was submitted, nor out of it, within 2 seconds. How finely a GPU can be
//! interrupted is its driver's affair: at the latest between two submissions. So a long operation becomes several of those, of
//! half a second at most. On a GPU that also draws, others want it before that.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use wgpu::DeviceType;

use super::shader::Shader;

/// Seconds that a submission may take.
const SUBMISSION_SECONDS: f64 = 0.5;

/// Work is timed if it is more than this part of the limit.
const TELLING_PART: u64 = 16;

/// More than any device does. A lost one is done at once with what it never did.
const MOST_RATE: f64 = 1e15;

/// Floating-point operations a second that the slowest adapter of a kind does at least, about.
fn least_rate(device_type: DeviceType) -> f64 {
    match device_type {
        DeviceType::DiscreteGpu => 300e9,
        DeviceType::IntegratedGpu | DeviceType::VirtualGpu | DeviceType::Other => 40e9,
        DeviceType::Cpu => 2e9,
    }
}

/// The operations of one submission on a device: those of its slowest kind, until longer ones were seen to be done in time.
#[derive(Debug)]
pub(super) struct Pace {
    /// Fixed by [`Config::max_dispatch_operations`](crate::Config::max_dispatch_operations).
    fixed: Option<u64>,
    least: f64,
    /// The highest rate seen of each shader. Their speeds differ a lot.
    seen: Mutex<HashMap<Shader, f64>>,
}

impl Pace {
    pub fn new(fixed: Option<u64>, device_type: DeviceType) -> Self {
        Self { fixed, least: least_rate(device_type), seen: Mutex::default() }
    }

    /// The most operations of one submission that mostly runs `shader`.
    pub fn limit(&self, shader: Shader) -> u64 {
        let seen = || self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(&shader).copied();
        self.fixed.unwrap_or_else(|| (seen().unwrap_or(0.0).max(self.least) * SUBMISSION_SECONDS) as u64)
    }

    /// Whether the time that so much work takes says anything: little work takes a launch's time rather than its own.
    pub fn is_telling(&self, shader: Shader, operations: u64) -> bool {
        self.fixed.is_none() && operations >= self.limit(shader) / TELLING_PART
    }

    /// Takes note that so many operations were done, `elapsed` after they were submitted. What they waited for before, and
    /// what the host took to notice, make the rate lower than it is, never higher.
    pub fn learn(&self, shader: Shader, operations: u64, elapsed: Duration) {
        let rate = (operations as f64 / elapsed.as_secs_f64()).min(MOST_RATE);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let best = seen.entry(shader).or_insert(rate);
        *best = best.max(rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHADER: Shader = Shader::PackRows;
    const OTHER: Shader = Shader::ScatterRows;

    #[test]
    fn the_limit_grows_with_what_was_seen_and_never_falls() {
        let pace = Pace::new(None, DeviceType::IntegratedGpu);
        assert_eq!(pace.limit(SHADER), 20_000_000_000);
        pace.learn(SHADER, 1_000_000, Duration::from_secs(1));
        assert_eq!(pace.limit(SHADER), 20_000_000_000);
        pace.learn(SHADER, 1_000_000_000_000, Duration::from_millis(500));
        assert_eq!(pace.limit(SHADER), 1_000_000_000_000);
        pace.learn(SHADER, 1_000_000_000_000, Duration::from_secs(5));
        assert_eq!((pace.limit(SHADER), pace.limit(OTHER)), (1_000_000_000_000, 20_000_000_000));
    }

    #[test]
    fn a_fixed_limit_stays() {
        let pace = Pace::new(Some(7), DeviceType::DiscreteGpu);
        pace.learn(SHADER, u64::MAX, Duration::ZERO);
        assert_eq!(pace.limit(SHADER), 7);
        assert!(!pace.is_telling(SHADER, 100));
    }
}
