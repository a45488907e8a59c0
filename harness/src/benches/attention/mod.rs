//! Times dense, fused and packed attention and each primitive on one device.

mod measure;
mod table;

use std::num::NonZeroUsize;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;
use varlen_fa::{Device, Kernel, Path, bf16, f16};

use crate::arguments::{ElementType, ProblemArguments, workload_help};
use crate::record::Record;
use crate::report::Report;
use crate::sizes::Sizes;
use crate::times::milliseconds;
use measure::{Measured, Row, Schedule, Timed};

/// Workloads of a size for a CPU.
const SOFTWARE_DEFAULTS: [&str; 2] = ["joint-small", "prefix-half"];

/// The workloads that other libraries were measured on.
const HARDWARE_DEFAULTS: [&str; 5] =
    ["joint-1024-b1", "joint-1024-b8", "joint-512-b8", "prefix-2048-b16", "prefix-512-b64"];

/// A workload that takes no time, with a hole, an empty prompt and a full one.
const SMOKE: &str = "joint:text=24:image=40:valid=5,0,24:heads=4:kv_heads=2:dim=32";

/// Time attention under key masks: dense, fused and packed, and each primitive, on random data.
///
/// TFLOP/s count valid pairs of query and key only, for dense attention too. GB/s count bytes read and written. Outputs are checked
/// against an f64 oracle before they are timed; fails if one is wrong.
#[derive(Debug, Args)]
#[command(after_help = workload_help())]
pub struct Arguments {
    #[command(flatten)]
    problem: ProblemArguments,
    /// Samples of each row of the table; short calls are repeated within a sample [default: 5 on software devices, 20 elsewhere]
    #[arg(long, value_name = "N")]
    reps: Option<NonZeroUsize>,
    /// Calls before the first sample [default: 1 on software devices, 5 elsewhere]
    #[arg(long, value_name = "N")]
    warmup: Option<usize>,
    /// Kernel to run, by its name [default: the device's preferred one]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<String>,
}

/// Runs it and writes the report.
pub fn run(arguments: &Arguments, sizes: Sizes) -> Result<()> {
    let device = arguments.problem.open_device()?;
    let kernel = arguments.kernel.as_deref().map(|name| find_kernel(&device, name)).transpose()?;
    let is_software = device.capabilities().is_software;
    let smoke = sizes == Sizes::Smoke && arguments.problem.workloads.is_empty();
    let (defaults, mut schedule) = match (smoke, is_software) {
        (true, _) => (&[SMOKE][..], Schedule::smoke()),
        (false, true) => (&SOFTWARE_DEFAULTS[..], Schedule::software()),
        (false, false) => (&HARDWARE_DEFAULTS[..], Schedule::hardware()),
    };
    schedule.samples = arguments.reps.map_or(schedule.samples, NonZeroUsize::get);
    schedule.warmup = arguments.warmup.unwrap_or(schedule.warmup);
    let problems = arguments.problem.problems(&device, defaults)?;
    let mut report = Report::new(arguments.problem.json.as_deref())?;

    table::print_device(&mut report.text, &device, &schedule)?;
    let mut failed = 0;
    for problem in &problems {
        let measured = match problem.element_type {
            ElementType::F32 => measure::run::<f32>(&device, problem, kernel, &schedule),
            ElementType::F16 => measure::run::<f16>(&device, problem, kernel, &schedule),
            ElementType::Bf16 => measure::run::<bf16>(&device, problem, kernel, &schedule),
        }
        .with_context(|| format!("workload {}", problem.workload.name))?;
        table::print(&mut report.text, problem, &measured)?;
        let ms = |row| measured.find(row).map_or(f64::NAN, |timed| milliseconds(timed.times.median));
        let (times, masked_rows_zero) = ((ms(Row::Varlen), ms(Row::Dense)), measured.masked_rows.is_ok());
        let record = Record::new(&device, problem, measured.plan, times, &measured.varlen, masked_rows_zero);
        report.json(&BenchRecord::new(record, &measured))?;
        failed += usize::from(measured.failures().next().is_some());
    }
    ensure!(failed == 0, "{failed} of {} workloads failed a check", problems.len());
    Ok(())
}

fn find_kernel(device: &Device, name: &str) -> Result<Kernel> {
    let kernels = &device.capabilities().kernels;
    let found = kernels.iter().copied().find(|kernel| kernel.name() == name);
    let names = || kernels.iter().map(|kernel| kernel.name()).collect::<Vec<_>>().join(", ");
    found.ok_or_else(|| anyhow::anyhow!("kernel: expected one of {} on this device, got `{name}`", names()))
}

/// The record of the example, and the figures that only the bench has. What was not measured is `null`.
#[derive(Debug, Serialize)]
struct BenchRecord {
    #[serde(flatten)]
    record: Record,
    varlen_min_ms: Option<f64>,
    varlen_max_ms: Option<f64>,
    varlen_tflops: Option<f64>,
    dense_min_ms: Option<f64>,
    dense_max_ms: Option<f64>,
    dense_tflops: Option<f64>,
    fused_ms: Option<f64>,
    packed_ms: Option<f64>,
    packed_attention_ms: Option<f64>,
    pack_ms: Option<f64>,
    pack_gbs: Option<f64>,
    scatter_ms: Option<f64>,
    scatter_gbs: Option<f64>,
    by_device: bool,
}

impl BenchRecord {
    fn new(record: Record, measured: &Measured) -> Self {
        let (varlen, dense) = (measured.find(Row::Varlen), measured.find(Row::Dense));
        let (pack, scatter) = (measured.find(Row::Pack), measured.find(Row::Scatter));
        let median = |timed: Option<&Timed>| timed.map(|timed| milliseconds(timed.times.median));
        let min = |timed: Option<&Timed>| timed.map(|timed| milliseconds(timed.times.min));
        let max = |timed: Option<&Timed>| timed.map(|timed| milliseconds(timed.times.max));
        Self {
            record,
            varlen_min_ms: min(varlen),
            varlen_max_ms: max(varlen),
            varlen_tflops: varlen.and_then(Timed::tflops),
            dense_min_ms: min(dense),
            dense_max_ms: max(dense),
            dense_tflops: dense.and_then(Timed::tflops),
            fused_ms: median(measured.path(Path::Fused)),
            packed_ms: median(measured.path(Path::Packed)),
            packed_attention_ms: median(measured.find(Row::PackedAttention)),
            pack_ms: median(pack),
            pack_gbs: pack.and_then(Timed::gbs),
            scatter_ms: median(scatter),
            scatter_gbs: scatter.and_then(Timed::gbs),
            by_device: varlen.is_some_and(|timed| timed.by_device),
        }
    }
}
