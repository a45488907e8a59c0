//! How much work a submission may have, so that none runs for long on a slow adapter.
//!
//! Windows resets a GPU that neither finishes nor can preempt a submission within 2 seconds. How
//! finely a GPU can be preempted depends on its driver, but it always can be between two
//! submissions. So a long operation becomes several submissions of half a second at most: a GPU
//! that also draws must not keep the screen waiting.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use wgpu::DeviceType;

use super::shader::{Algorithm, AttentionShader, Shader};

/// A submission may take this many seconds.
const SUBMISSION_SECONDS: f64 = 0.5;

/// Work is timed if it is at least this fraction of the limit.
const TELLING_PART: u64 = 16;

/// More operations a second than any device has. A lost device reports work as done that it never
/// did.
const MOST_RATE: f64 = 1e15;

/// Floating-point operations a second of the slowest adapters of a kind, about.
fn least_rate(device_type: DeviceType) -> f64 {
    match device_type {
        DeviceType::DiscreteGpu => 300e9,
        DeviceType::IntegratedGpu | DeviceType::VirtualGpu | DeviceType::Other => 40e9,
        DeviceType::Cpu => 2e9,
    }
}

/// How many times as fast cooperative matrices are on a GPU that has them, at least. Calls that are recorded, not submitted, tell
/// nothing about speed: only this keeps them from more dispatches than they need.
const ON_MATRICES: f64 = 3.0;

/// The operations that one submission may have on a device: those for the slowest adapters of its
/// kind, until it was seen to be faster.
#[derive(Debug)]
pub(super) struct Pace {
    /// Fixed by [`Config::max_dispatch_operations`](crate::Config::max_dispatch_operations).
    fixed: Option<u64>,
    device_type: DeviceType,
    /// The highest rate seen of each shader. Shaders differ a lot in speed.
    seen: Mutex<HashMap<Shader, f64>>,
}

impl Pace {
    pub fn new(fixed: Option<u64>, device_type: DeviceType) -> Self {
        Self { fixed, device_type, seen: Mutex::default() }
    }

    /// The most operations of one submission that mostly runs `shader`.
    pub fn limit(&self, shader: Shader) -> u64 {
        let seen = || self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(&shader).copied();
        self.fixed.unwrap_or_else(|| (seen().unwrap_or(0.0).max(self.least(shader)) * SUBMISSION_SECONDS) as u64)
    }

    fn least(&self, shader: Shader) -> f64 {
        let is_on_matrices = matches!(shader, Shader::Attention(AttentionShader { algorithm: Algorithm::Coop(_), .. }));
        let is_gpu = self.device_type != DeviceType::Cpu;
        least_rate(self.device_type) * if is_on_matrices && is_gpu { ON_MATRICES } else { 1.0 }
    }

    /// Whether the time that `operations` take says how fast the device is: little work takes as
    /// long as its launch.
    pub fn is_telling(&self, shader: Shader, operations: u64) -> bool {
        self.fixed.is_none() && operations >= self.limit(shader) / TELLING_PART
    }

    /// Records a finished submission: its operations and the time since it was submitted. Earlier
    /// work that it waited for, and a host that notices late, make the rate seem lower, never
    /// higher.
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
    use crate::backends::wgpu::shader::{AttentionRows, CoopTile, TileKeys};
    use crate::dtype::DType;
    use crate::score_modifiers::ModifierSet;

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
    fn more_is_expected_of_matrices_but_on_a_processor() {
        let tile = CoopTile { shape: 16, subgroup_size: 32, subgroups: 8, keys: 32 };
        let on = |algorithm| {
            Shader::Attention(AttentionShader {
                algorithm,
                dtype: DType::F16,
                head_dim: 128,
                rows: AttentionRows::Packed,
                ranges: false,
                lse: false,
                modifiers: ModifierSet::default(),
                out_buffers: 0,
                tiles: TileKeys::All,
            })
        };
        let limits = |device_type| {
            let pace = Pace::new(None, device_type);
            [Algorithm::Portable, Algorithm::Coop(tile)].map(|algorithm| pace.limit(on(algorithm)))
        };
        assert_eq!(limits(DeviceType::DiscreteGpu), [150_000_000_000, 450_000_000_000]);
        assert_eq!(limits(DeviceType::Cpu), [1_000_000_000; 2]);
    }

    #[test]
    fn a_fixed_limit_stays() {
        let pace = Pace::new(Some(7), DeviceType::DiscreteGpu);
        pace.learn(SHADER, u64::MAX, Duration::ZERO);
        assert_eq!(pace.limit(SHADER), 7);
        assert!(!pace.is_telling(SHADER, 100));
    }
}
