//! What there is to say.

use std::collections::BTreeMap;
use std::{env, thread};

use serde::Serialize;
use varlen_fa::DeviceChoice;

use super::cold_start::ColdStart;
use super::speed::Speed;
use crate::variables;

/// The whole report.
#[derive(Debug, Serialize)]
pub struct Report {
    pub version: &'static str,
    pub features: Vec<&'static str>,
    pub os: &'static str,
    pub arch: &'static str,
    pub processors: usize,
    /// The library's variables that are set.
    pub variables: BTreeMap<&'static str, String>,
    pub devices: Vec<Finding>,
    /// Whether no device computed a wrong result, and the one that was asked for, or else the CPU, is there.
    pub is_well: bool,
}

/// What there is to say of one device.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// What to ask for to get it.
    pub device: String,
    /// Why it is not available.
    pub why_not: Option<String>,
    #[serde(flatten)]
    pub facts: Option<Facts>,
    /// Warnings of the library's log.
    pub log: Vec<String>,
}

/// What there is to say of a device that is available.
#[derive(Debug, Serialize)]
pub struct Facts {
    pub adapter: String,
    pub is_software: bool,
    pub kernels: Vec<&'static str>,
    pub dtypes: Vec<&'static str>,
    pub max_buffer_bytes: u64,
    pub max_binding_bytes: u64,
    pub max_head_dim: usize,
    pub has_timestamps: bool,
    pub multiprocessors: Option<usize>,
    /// Of wgpu devices alone.
    pub cooperative_matrices: Option<&'static str>,
    pub cold_start: ColdStart,
    pub check: Checked,
    /// None if it was not asked for, or could not be measured.
    pub speed: Option<Speed>,
    /// Why it could not be measured.
    pub speed_error: Option<String>,
}

/// Random calls that were compared with the f64 oracle.
#[derive(Debug, Serialize)]
pub struct Checked {
    /// Of the first.
    pub seed: u64,
    pub right: u64,
    /// Calls that the device does not do.
    pub refused: u64,
    pub failure: Option<String>,
}

impl Report {
    /// Without a device.
    pub fn empty() -> Self {
        let features = [("cuda", cfg!(feature = "cuda")), ("wgpu", cfg!(feature = "wgpu"))];
        Self {
            version: env!("CARGO_PKG_VERSION"),
            features: features.into_iter().filter_map(|(name, is_on)| is_on.then_some(name)).collect(),
            os: env::consts::OS,
            arch: env::consts::ARCH,
            processors: thread::available_parallelism().map_or(1, usize::from),
            variables: variables::set().collect(),
            devices: Vec::new(),
            is_well: false,
        }
    }

    /// Whether all is well; of one device, or of all.
    pub fn judge(&self, only: Option<DeviceChoice>) -> bool {
        let needed = only.unwrap_or(DeviceChoice::Cpu).to_string();
        let is_there = self.devices.iter().any(|finding| finding.device == needed && finding.facts.is_some());
        is_there && self.devices.iter().all(Finding::is_well)
    }
}

impl Finding {
    /// Whether nothing that was computed is wrong.
    pub fn is_well(&self) -> bool {
        self.facts.as_ref().is_none_or(|facts| facts.check.failure.is_none())
    }

    /// What was measured.
    pub fn tflops(&self) -> Option<f64> {
        Some(self.facts.as_ref()?.speed.as_ref()?.tflops)
    }
}
