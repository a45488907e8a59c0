//! What works on this machine, and what does not.

mod cold_start;
mod notes;
mod report;
mod speed;
mod text;

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use varlen_fa::{BackendKind, Capabilities, Device, DeviceChoice, Error};
use varlen_fa_harness::arguments::parse_device;

use self::cold_start::ColdStart;
use self::report::{Checked, Facts, Finding, Report};
use self::speed::Speed;
use crate::check::{self, Choices};
use crate::verdict::Verdict;

/// What to report.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The only device to look at: cuda, cuda:N, wgpu or cpu [default: all]
    #[arg(long, value_name = "DEVICE", value_parser = parse_device)]
    device: Option<DeviceChoice>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// How long the speed of each device is measured; 0 leaves it out
    #[arg(long, value_name = "SECONDS", default_value = "2")]
    speed: f64,
}

/// Calls of the check of a device, and the seed of the first: enough that each kernel, path and element
/// type comes up.
const CALLS: u64 = 60;
const SEED: u64 = 26_318;

/// Writes the report to standard output.
pub fn run(arguments: &Arguments) -> Result<Verdict> {
    notes::listen();
    let mut choices = match arguments.device {
        Some(choice) => vec![choice],
        None => Device::choices(),
    };
    // The CPU comes first: other devices are compared with its speed.
    choices.sort_by_key(|choice| *choice != DeviceChoice::Cpu);

    let mut out = anstream::stdout().lock();
    let mut report = Report::empty();
    if !arguments.json {
        text::head(&mut out, &report)?;
    }
    let (mut cpu_speed, mut error) = (None, None::<Error>);
    for choice in choices {
        let (finding, why) = Finding::of(choice, arguments.speed, cpu_speed);
        error = error.or(why);
        if choice == DeviceChoice::Cpu {
            cpu_speed = finding.tflops();
        }
        if !arguments.json {
            text::device(&mut out, &finding)?;
            out.flush()?;
        }
        report.devices.push(finding);
    }
    report.is_well = report.judge(arguments.device);
    match arguments.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
        false => text::end(&mut out, &report)?,
    }
    match error {
        // Of the only device.
        Some(error) if arguments.device.is_some() => Err(error).context("the device that was asked for"),
        _ if report.is_well => Ok(Verdict::Well),
        _ => Ok(Verdict::Wrong),
    }
}

impl Finding {
    /// Opens a device, which must not have been opened before in the process, and looks at it. Where it cannot be opened, the
    /// error too.
    fn of(choice: DeviceChoice, seconds: f64, cpu_speed: Option<f64>) -> (Self, Option<Error>) {
        let opened = ColdStart::measure(choice);
        let device = choice.to_string();
        let (opened, cold_start) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let why = match &error {
                    Error::DeviceUnavailable { why, .. } => why.clone(),
                    error => error.to_string(),
                };
                return (Self { device, why_not: Some(why), facts: None, log: notes::take() }, Some(error));
            }
        };
        let budget = Duration::from_secs_f64(seconds.clamp(0.0, 3600.0));
        let (speed, speed_error) = match (!budget.is_zero()).then(|| Speed::measure(&opened, budget, cpu_speed)) {
            None => (None, None),
            Some(Ok(speed)) => (Some(speed), None),
            Some(Err(error)) => (None, Some(format!("{error:#}"))),
        };
        let facts = Facts { speed, speed_error, ..Facts::of(&opened, cold_start, Checked::of(&opened)) };
        (Self { device, why_not: None, facts: Some(facts), log: notes::take() }, None)
    }
}

impl Facts {
    /// All but the speed.
    fn of(device: &Device, cold_start: ColdStart, check: Checked) -> Self {
        let capabilities = device.capabilities();
        let Capabilities { kernels, dtypes, .. } = capabilities;
        Self {
            adapter: capabilities.adapter.clone(),
            is_software: capabilities.is_software && capabilities.backend != BackendKind::Cpu,
            kernels: kernels.iter().map(|kernel| kernel.name()).collect(),
            dtypes: dtypes.iter().map(|dtype| dtype.name()).collect(),
            max_buffer_bytes: capabilities.max_buffer_bytes,
            max_binding_bytes: capabilities.max_binding_bytes,
            max_head_dim: kernels.iter().map(|kernel| kernel.max_head_dim()).max().unwrap_or(0),
            has_timestamps: capabilities.has_timestamps,
            multiprocessors: capabilities.multiprocessors(),
            cooperative_matrices: cooperative_matrices(device),
            cold_start,
            check,
            speed: None,
            speed_error: None,
        }
    }
}

impl Checked {
    fn of(device: &Device) -> Self {
        let outcome = Choices::of(device, None, None)
            .and_then(|choices| check::calls(device, &choices, SEED, |done| done < CALLS));
        match outcome {
            Err(error) => Self { seed: SEED, right: 0, refused: 0, failure: Some(format!("{error:#}")) },
            Ok(check::Outcome { right, refused, failure }) => {
                let failure = failure.map(|failure| format!("{}; the call: {}", failure.why, failure.call));
                Self { seed: SEED, right, refused, failure }
            }
        }
    }
}

/// Whether the kernel on cooperative matrices runs, and why not.
#[cfg(feature = "wgpu")]
fn cooperative_matrices(device: &Device) -> Option<&'static str> {
    let (wgpu, _) = device.wgpu()?;
    let has_kernel = device.capabilities().kernels.contains(&varlen_fa::Kernel::WgslCoop);
    let has_feature = wgpu.features().contains(varlen_fa::wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
    Some(match (has_kernel, has_feature) {
        (true, _) => "used for f16 and bf16 by wgsl-coop, which passed its self-check",
        (false, true) => "not used: wgsl-coop failed its self-check, or another kernel was asked for",
        (false, false) => "the adapter has none that wgsl-coop can use",
    })
}

#[cfg(not(feature = "wgpu"))]
fn cooperative_matrices(_device: &Device) -> Option<&'static str> {
    None
}
