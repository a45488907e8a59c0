//! The self-check that a GPU makes of its newer kernels, with one that is wrong on purpose: it must not be used, and must be heard of.
//!
//! It takes a GPU of compute capability 9.0 and the form `emulated_wrong` of `cargo xtask kernels --emulated`, whose path is in
//! `VARLEN_FA_TEST_EMULATED_SM100_WRONG`. `VARLEN_FA_TEST_REQUIRE` is that of the suite.

use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::{env, fs, ptr};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, DriverError};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use varlen_fa::{AttentionMask, Config, Device, DeviceChoice, Error, Kernel, MaskedAttention, Tensor, f16};

const FATBIN: &str = "VARLEN_FA_TEST_EMULATED_SM100_WRONG";

fn main() -> ExitCode {
    let trial = Trial::ignorable_test("self_check/a_wrong_kernel_is_not_used", || {
        a_wrong_kernel_is_not_used().map_err(|error| Failed::from(format!("{error:#}")))
    });
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}

/// Keeps what the library logs.
struct Recorder;

static RECORDED: Mutex<Vec<(log::Level, String)>> = Mutex::new(Vec::new());

impl log::Log for Recorder {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("varlen_fa") {
            let mut recorded = RECORDED.lock().unwrap_or_else(PoisonError::into_inner);
            recorded.push((record.level(), record.args().to_string()));
        }
    }
    fn flush(&self) {}
}

fn lines(level: log::Level) -> Vec<String> {
    let recorded = RECORDED.lock().unwrap_or_else(PoisonError::into_inner);
    recorded.iter().filter(|(of, _)| *of == level).map(|(_, line)| line.clone()).collect()
}

fn driver(error: DriverError) -> anyhow::Error {
    anyhow!("the CUDA driver: {error:?}")
}

fn a_wrong_kernel_is_not_used() -> Result<Completion> {
    let is_required = env::var("VARLEN_FA_TEST_REQUIRE").is_ok_and(|names| names.split(',').any(|name| name == "cuda"));
    let Some(path) = env::var_os(FATBIN) else {
        return Ok(Completion::ignored_with(format!("{FATBIN} is not set")));
    };
    let fatbin = fs::read(&path).with_context(|| format!("{FATBIN}: cannot read {}", path.display()))?;
    // With the sm80 kernel alone nothing is checked yet.
    let config = Config::default().with_device(DeviceChoice::Cuda(0));
    let adapter = match Device::with_config(config.with_kernel(Some(Kernel::CudaSm80))) {
        Ok(device) => device.capabilities().adapter.clone(),
        Err(error @ Error::DeviceUnavailable { .. }) if !is_required => {
            return Ok(Completion::ignored_with(error.to_string()));
        }
        Err(error) => return Err(error.into()),
    };
    if !adapter.contains("sm_90") {
        return Ok(Completion::ignored_with(format!("{adapter} does not run the emulated kernel")));
    }
    log::set_logger(&Recorder).map_err(|_| anyhow!("a logger is set"))?;
    log::set_max_level(log::LevelFilter::Debug);
    // The kernels of a context are loaded once, so the next device has a context of its own.
    ensure!(varlen_fa::emulation::set_sm100(&fatbin), "the emulated kernel is set twice");
    beside_a_capture()?;

    let warnings = lines(log::Level::Warn);
    let [warning] = &warnings[..] else { bail!("expected one warning, got {warnings:#?}") };
    for part in ["kernel sm100 failed its self-check", &adapter, "report", "sm100 gives"] {
        ensure!(warning.contains(part), "expected {part:?} in the warning, got {warning}");
    }
    println!("{warning}");
    let passed: Vec<_> = lines(log::Level::Debug).into_iter().filter(|line| line.contains("self-check")).collect();
    ensure!(passed.len() == 1 && passed[0].starts_with("kernel sm90 passed"), "got {passed:#?}");
    println!("{}", passed[0]);

    let device = Device::with_config(config).context("opening the device again")?;
    expect_the_others(&device)?;
    let warnings = lines(log::Level::Warn);
    ensure!(warnings.len() == 1, "a GPU is checked once a process; got {warnings:#?}");
    let error = MaskedAttention::new(&device).with_kernel(Kernel::CudaSm100);
    let x = Tensor::from_slice(&device, &[f16::ONE; 64], &[1, 1, 1, 64])?;
    let error = error.forward(&x, &x, &x, AttentionMask::none()).err();
    ensure!(matches!(error, Some(Error::NotApplicable { argument: "kernel", .. })), "a failed kernel: {error:?}");
    for kernel in [Kernel::CudaSm80, Kernel::CudaSm90] {
        let device = Device::with_config(config.with_kernel(Some(kernel)))?;
        ensure!(device.capabilities().kernels == [kernel], "{kernel} alone: {:?}", device.capabilities());
    }
    Ok(Completion::Completed)
}

/// The first device that has the kernel is made while another stream of this thread is being captured, in the mode in which
/// most of the driver's calls would spoil the capture.
fn beside_a_capture() -> Result<()> {
    let context = {
        let device = cudarc::driver::result::device::get(0).map_err(driver)?;
        // SAFETY: the device comes from the driver; null asks for a plain context.
        let raw = unsafe { cudarc::driver::result::ctx::create_v4(ptr::null_mut(), 0, device) }.map_err(driver)?;
        // SAFETY: just made, for this device; what is returned destroys it.
        unsafe { CudaContext::from_raw_context(0, device, raw) }.map_err(driver)?
    };
    let stream = context.new_stream().map_err(driver)?;
    let captured = context.new_stream().map_err(driver)?;
    captured.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).map_err(driver)?;
    let (raw_context, raw_stream) = (context.cu_ctx(), stream.cu_stream());
    // SAFETY: both are live, and outlive the device.
    let device = unsafe { Device::from_cuda(raw_context.cast(), raw_stream.cast(), Config::default()) };
    let graph = captured.end_capture(CUgraphInstantiate_flags(0)).map_err(driver);
    let device = device.context("a device beside a capture")?;
    graph.context("the capture was spoiled")?;
    expect_the_others(&device)
}

/// Every kernel but the wrong one is there, and works.
fn expect_the_others(device: &Device) -> Result<()> {
    let kernels = &device.capabilities().kernels;
    ensure!(*kernels == [Kernel::CudaSm90, Kernel::CudaSm80], "got {kernels:?}");
    let shape = [2, 150, 2, 64];
    let values: Vec<f16> = (0..shape.iter().product()).map(|at: usize| f16::from_f32((at % 7) as f32)).collect();
    let q = Tensor::from_slice(device, &values, &shape)?;
    let v = Tensor::from_slice(device, &vec![f16::from_f32(0.75); values.len()], &shape)?;
    let layer = MaskedAttention::new(device).with_kernel(Kernel::CudaSm90);
    let attended = layer.forward(&q, &q, &v, AttentionMask::none())?;
    // Whatever the weights are, they add up to 1.
    let out = attended.out.to_vec::<f16>()?;
    ensure!(out.iter().all(|out| (out.to_f32() - 0.75).abs() < 2e-3), "the mean of equal values is another");
    Ok(())
}
