//! `VARLEN_FA`, `VARLEN_FA_DEVICE` and `VARLEN_FA_KERNEL`: every value as an argument, and the real variables in a process of their own.

use std::env;
use std::ffi::{OsStr, OsString};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use varlen_fa::{
    AttentionMask, Config, CpuIsa, Device, DeviceChoice, Error, Kernel, KeyMask, MaskedAttention, Tensor, VarlenMeta,
};

/// Set in the processes that this test starts; they report what they see and end.
const CHILD: &str = "VARLEN_FA_TEST_CHILD";

fn main() -> ExitCode {
    if env::var_os(CHILD).is_some() {
        println!("{}", report());
        return ExitCode::SUCCESS;
    }
    let trial = |name: &str, test: fn() -> Result<()>| {
        Trial::test(name, move || test().map_err(|error| Failed::from(format!("{error:#}"))))
    };
    let trials = vec![
        trial("values/varlen_fa", values_of_varlen_fa),
        trial("values/varlen_fa_device", values_of_varlen_fa_device),
        trial("values/varlen_fa_kernel", values_of_varlen_fa_kernel),
        trial("values/empty_ones_count_as_unset", empty_values_count_as_unset),
        trial("values/that_are_no_text", values_that_are_no_text),
        trial("values/device_choices_read_back", device_choices_read_back),
        trial("settings/are_set_one_by_one", settings_are_set_one_by_one),
        trial("process/nothing_set", process_with_nothing_set),
        trial("process/varlen_fa", process_with_varlen_fa),
        trial("process/varlen_fa_device", process_with_varlen_fa_device),
        trial("process/varlen_fa_kernel", process_with_varlen_fa_kernel),
        trial("process/varlen_fa_cpu", process_with_varlen_fa_cpu),
        trial("process/varlen_fa_threads", process_with_varlen_fa_threads),
        trial("process/bad_values", process_with_bad_values),
        trial("process/absent_device", process_with_absent_device),
        trial("process/new_ignores_varlen_fa_device", process_new_ignores_varlen_fa_device),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn read(varlen: Option<&str>, device: Option<&str>) -> varlen_fa::Result<Config> {
    Config::from_values(varlen.map(OsString::from), device.map(OsString::from), None)
}

fn read_kernel(kernel: &str) -> varlen_fa::Result<Config> {
    Config::from_values(None, None, Some(kernel.into()))
}

fn bad_varlen(got: &str) -> Error {
    Error::Environment { variable: "VARLEN_FA", expected: "0 or 1".to_owned(), got: got.to_owned() }
}

fn bad_device(got: &str) -> Error {
    Error::Environment {
        variable: "VARLEN_FA_DEVICE",
        expected: "cuda, cuda:N, wgpu or cpu".to_owned(),
        got: got.to_owned(),
    }
}

fn bad_kernel(got: &str) -> Error {
    let names: Vec<&str> = Kernel::ALL.iter().map(|kernel| kernel.name()).collect();
    let (last, rest) = names.split_last().unwrap_or((&"", &[]));
    let expected = format!("{} or {last}", rest.join(", "));
    Error::Environment { variable: "VARLEN_FA_KERNEL", expected, got: got.to_owned() }
}

fn expect(result: varlen_fa::Result<Config>, expected: Error) -> Result<()> {
    let error = result.err().with_context(|| format!("expected {expected:?}, got no error"))?;
    ensure!(error == expected, "expected {expected:?}, got {error:?}");
    let Error::Environment { variable, got, .. } = &expected else { anyhow::bail!("{expected:?}") };
    let message = error.to_string();
    ensure!(message.contains(variable) && message.contains(&format!("{got:?}")), "{message}");
    Ok(())
}

fn values_of_varlen_fa() -> Result<()> {
    ensure!(read(None, None)? == Config::default());
    ensure!(!Config::default().force_dense && Config::default().device == DeviceChoice::Auto);
    ensure!(read(Some("1"), None)? == Config::default());
    ensure!(read(Some("0"), None)? == Config::default().with_force_dense(true));
    for got in [" ", "2", "01", "00", "-1", "0 ", " 1", "true", "false", "on", "off", "dense", "０"] {
        expect(read(Some(got), None), bad_varlen(got))?;
        expect(read(Some(got), Some("cpu")), bad_varlen(got))?;
    }
    Ok(())
}

fn values_of_varlen_fa_device() -> Result<()> {
    for (text, choice) in [
        ("cpu", DeviceChoice::Cpu),
        ("wgpu", DeviceChoice::Wgpu),
        ("cuda", DeviceChoice::Cuda(0)),
        ("cuda:0", DeviceChoice::Cuda(0)),
        ("cuda:7", DeviceChoice::Cuda(7)),
        ("cuda:12", DeviceChoice::Cuda(12)),
    ] {
        ensure!(read(None, Some(text))?.device == choice, "{text}");
        let both = read(Some("0"), Some(text))?;
        ensure!(both.device == choice && both.force_dense, "{text}");
    }
    for got in [
        " ",
        "CPU",
        "Cuda",
        "cpu ",
        " cpu",
        "cpu:0",
        "wgpu:0",
        "auto",
        "gpu",
        "vulkan",
        "cuda:",
        "cuda:-1",
        "cuda:+1",
        "cuda: 1",
        "cuda:x",
        "cuda:1:2",
        "cuda0",
        "cuda:99999999999999999999",
        "cuda,cpu",
    ] {
        expect(read(None, Some(got)), bad_device(got))?;
        expect(read(Some("0"), Some(got)), bad_device(got))?;
    }
    Ok(())
}

fn values_of_varlen_fa_kernel() -> Result<()> {
    ensure!(Config::default().kernel.is_none() && read(None, None)?.kernel.is_none());
    for &kernel in Kernel::ALL {
        let expected = Config::default().with_kernel(Some(kernel));
        ensure!(read_kernel(kernel.name())? == expected && expected.kernel == Some(kernel), "{kernel}");
        ensure!(expected.with_kernel(None) == Config::default(), "{kernel}");
    }
    for got in [" ", "SM80", "sm_80", "sm80 ", " sm80", "sm8", "80", "cpu", "auto", "sm80,sm90", "sm120"] {
        expect(read_kernel(got), bad_kernel(got))?;
    }
    Ok(())
}

/// `VARIABLE= command` is how a shell unsets a variable for one command.
fn empty_values_count_as_unset() -> Result<()> {
    ensure!(read(Some(""), Some(""))? == Config::default() && read_kernel("")? == Config::default());
    ensure!(read(Some(""), Some("cpu"))?.device == DeviceChoice::Cpu && read(Some("0"), Some(""))?.force_dense);
    ensure!(process_with_all([Some(""); 5])? == process_with_all([None; 5])?);
    Ok(())
}

/// Values that are not Unicode are values that are not understood.
#[cfg(unix)]
fn values_that_are_no_text() -> Result<()> {
    use std::os::unix::ffi::OsStringExt;
    let broken = || Some(OsString::from_vec(b"c\xffu".to_vec()));
    expect(Config::from_values(broken(), None, None), bad_varlen("c\u{fffd}u"))?;
    expect(Config::from_values(None, broken(), None), bad_device("c\u{fffd}u"))?;
    expect(Config::from_values(None, None, broken()), bad_kernel("c\u{fffd}u"))
}

#[cfg(not(unix))]
fn values_that_are_no_text() -> Result<()> {
    use std::os::windows::ffi::OsStringExt;
    let broken = || Some(OsString::from_wide(&[0xd800]));
    expect(Config::from_values(broken(), None, None), bad_varlen("\u{fffd}"))?;
    expect(Config::from_values(None, broken(), None), bad_device("\u{fffd}"))?;
    expect(Config::from_values(None, None, broken()), bad_kernel("\u{fffd}"))
}

fn device_choices_read_back() -> Result<()> {
    for choice in [DeviceChoice::Cpu, DeviceChoice::Wgpu, DeviceChoice::Cuda(0), DeviceChoice::Cuda(3)] {
        ensure!(choice.to_string().parse::<DeviceChoice>()? == choice, "{choice}");
    }
    ensure!(DeviceChoice::default() == DeviceChoice::Auto);
    Ok(())
}

fn settings_are_set_one_by_one() -> Result<()> {
    let config = Config::default().with_device(DeviceChoice::Cpu).with_force_dense(true);
    ensure!((config.device, config.force_dense) == (DeviceChoice::Cpu, true));
    let device = Device::with_config(config)?;
    ensure!(device.config() == config, "got {:?}", device.config());
    ensure!(!config.with_force_dense(false).force_dense);
    ensure!(config.max_binding_bytes.is_none() && config.with_max_binding_bytes(7).max_binding_bytes == Some(7));
    let limited = config.with_max_dispatch_operations(8);
    ensure!(config.max_dispatch_operations.is_none() && limited.max_dispatch_operations == Some(8));
    Ok(())
}

/// What a process with other variables sees: `from_env`'s device and setting, `new`'s, and the path of one call.
fn report() -> String {
    let seen = |device: varlen_fa::Result<Device>| match device.and_then(|device| Ok((plan(&device)?, device))) {
        Ok((plan, device)) => {
            format!("{} force_dense={} {plan}", device.capabilities().backend, device.config().force_dense)
        }
        Err(error) => format!("{error:?}"),
    };
    let (from_env, new) = (Device::from_env(), Device::new(DeviceChoice::Cpu));
    let cpu = new.as_ref().map(|device| device.capabilities().adapter.clone());
    let cpu = cpu.unwrap_or_else(|error| format!("{error:?}"));
    format!("from_env: {}\nnew: {}\ncpu: {cpu}", seen(from_env), seen(new))
}

fn plan(device: &Device) -> varlen_fa::Result<String> {
    let x = Tensor::zeros(device, varlen_fa::DType::F16, &[1, 4, 1, 8])?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(4, &[3])?)?;
    let plan = MaskedAttention::new(device).forward(&x, &x, &x, AttentionMask::varlen(&meta))?.plan;
    Ok(format!("{} since {}", plan.path, plan.reason))
}

/// Starts this program anew with the first two variables set or unset.
fn process(varlen: Option<&str>, device: Option<&str>) -> Result<(String, String)> {
    process_with([varlen, device, None])
}

/// The same with all three.
fn process_with([varlen, device, kernel]: [Option<&str>; 3]) -> Result<(String, String)> {
    let [from_env, new, _] = process_with_all([varlen, device, kernel, None, None])?;
    Ok((from_env, new))
}

/// The same with the CPU device's instruction set and threads; the third line is its adapter.
fn process_with_all([varlen, device, kernel, cpu, threads]: [Option<&str>; 5]) -> Result<[String; 3]> {
    let mut command = Command::new(env::current_exe()?);
    command.env(CHILD, "1");
    for (variable, value) in [
        (Config::VARLEN_VARIABLE, varlen),
        (Config::DEVICE_VARIABLE, device),
        (Config::KERNEL_VARIABLE, kernel),
        (Config::CPU_VARIABLE, cpu),
        (Config::THREADS_VARIABLE, threads),
    ] {
        match value {
            Some(value) => command.env(variable, OsStr::new(value)),
            None => command.env_remove(variable),
        };
    }
    let output = command.output().context("starting a process")?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(
        output.status.success(),
        "the process ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let line = |start: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(start));
        found.map(str::to_owned).with_context(|| format!("no line {start:?} in {text:?}"))
    };
    Ok([line("from_env: ")?, line("new: ")?, line("cpu: ")?])
}

const DENSE: &str = "cpu force_dense=true dense since dense attention is forced (VARLEN_FA=0)";

fn process_with_nothing_set() -> Result<()> {
    let (from_env, new) = process(None, None)?;
    let best = Device::with_config(Config::default())?;
    let backend = best.capabilities().backend;
    ensure!(from_env.starts_with(&format!("{backend} force_dense=false ")), "got {from_env}");
    ensure!(new.starts_with("cpu force_dense=false "), "got {new}");
    ensure!(!from_env.contains(" dense since") && !new.contains(" dense since"), "got {from_env} and {new}");
    Ok(())
}

fn process_with_varlen_fa() -> Result<()> {
    let (from_env, new) = process(Some("0"), Some("cpu"))?;
    ensure!(from_env == DENSE && new == DENSE, "got {from_env} and {new}");
    let (from_env, new) = process(Some("1"), Some("cpu"))?;
    ensure!(from_env == new && new.starts_with("cpu force_dense=false "), "got {from_env} and {new}");
    ensure!(!new.contains(" dense since"), "got {new}");
    Ok(())
}

fn process_with_varlen_fa_device() -> Result<()> {
    for report in Device::list() {
        let (from_env, _) = process(None, Some(&report.choice.to_string()))?;
        match report.status {
            Ok(capabilities) => {
                let start = format!("{} force_dense=false ", capabilities.backend);
                ensure!(from_env.starts_with(&start), "{}: got {from_env}", report.choice);
            }
            // No fallback to another device.
            Err(error) => ensure!(from_env == format!("{error:?}"), "{}: got {from_env}", report.choice),
        }
    }
    Ok(())
}

fn process_with_varlen_fa_kernel() -> Result<()> {
    // The CPU's kernel picks the CPU, whatever else there is; nothing else of the CPU has another's.
    let (from_env, new) = process_with([None, None, Some("cpu-tiled")])?;
    ensure!(from_env == new && new.starts_with("cpu force_dense=false "), "got {from_env} and {new}");
    let (_, new) = process_with([None, None, Some("sm80")])?;
    ensure!(new.starts_with("NotApplicable { argument: \"kernel\", got: \"sm80\", why: \"cpu ("), "got {new}");
    // Every device with each of its kernels, alone.
    for report in Device::list() {
        let Ok(capabilities) = report.status else { continue };
        for kernel in capabilities.kernels {
            let config = Config::default().with_device(report.choice).with_kernel(Some(kernel));
            let device = Device::with_config(config)?;
            ensure!(device.capabilities().kernels == [kernel], "{}: {:?}", report.choice, device.capabilities());
            let choice = report.choice.to_string();
            let (from_env, _) = process_with([None, Some(&choice), Some(kernel.name())])?;
            let start = format!("{} force_dense=false ", capabilities.backend);
            ensure!(from_env.starts_with(&start), "{choice} with {kernel}: got {from_env}");
        }
    }
    Ok(())
}

fn process_with_varlen_fa_cpu() -> Result<()> {
    let mut best = None;
    for &isa in CpuIsa::ALL {
        let [_, new, cpu] = process_with_all([None, None, None, Some(isa.name()), None])?;
        match Device::with_config(Config::default().with_device(DeviceChoice::Cpu).with_cpu_isa(Some(isa))) {
            Ok(device) => {
                ensure!(new.starts_with("cpu force_dense=false ") && cpu.ends_with(isa.name()), "got {new}, {cpu}");
                ensure!(device.capabilities().adapter.ends_with(isa.name()), "{:?}", device.capabilities());
                best = best.or(Some(isa));
            }
            Err(error) => ensure!(new == format!("{error:?}") && new.contains("cpu_isa"), "got {new}"),
        }
    }
    let [_, _, cpu] = process_with_all([None; 5])?;
    ensure!(best.is_some_and(|best| cpu.ends_with(best.name())), "without the variable: {cpu}");
    for bad in [" ", "AVX2", "sse"] {
        let [from_env, new, _] = process_with_all([None, None, None, Some(bad), None])?;
        let expected = "avx512bf16, avx512, avx2, neonbf16, neon, simd128, scalar".to_owned();
        let expected = Error::Environment { variable: "VARLEN_FA_CPU", expected, got: bad.to_owned() };
        let expected = format!("{expected:?}");
        ensure!(from_env == expected && new == expected, "got {from_env} and {new}");
    }
    Ok(())
}

fn process_with_varlen_fa_threads() -> Result<()> {
    for threads in ["1", "2", "17"] {
        let [_, _, cpu] = process_with_all([None, None, None, None, Some(threads)])?;
        ensure!(cpu.starts_with(&format!("{threads} threads, ")), "{threads}: got {cpu}");
    }
    for bad in ["0", "-1", "two", " 2", "1.5"] {
        let [from_env, new, _] = process_with_all([None, None, None, None, Some(bad)])?;
        let expected = "a number from 1 on".to_owned();
        let expected = Error::Environment { variable: "VARLEN_FA_THREADS", expected, got: bad.to_owned() };
        let expected = format!("{expected:?}");
        ensure!(from_env == expected && new == expected, "got {from_env} and {new}");
    }
    Ok(())
}

fn process_with_bad_values() -> Result<()> {
    let (from_env, new) = process_with([None, None, Some("fastest")])?;
    let expected = format!("{:?}", bad_kernel("fastest"));
    ensure!(from_env == expected && new == expected, "got {from_env} and {new}");
    let (from_env, new) = process(Some("yes"), None)?;
    let expected = format!("{:?}", bad_varlen("yes"));
    ensure!(from_env == expected && new == expected, "got {from_env} and {new}");
    // A device that the program names is not the variable's to refuse.
    let (from_env, new) = process(None, Some("tpu"))?;
    let expected = format!("{:?}", bad_device("tpu"));
    ensure!(from_env == expected && new.starts_with("cpu force_dense=false "), "got {from_env} and {new}");
    Ok(())
}

/// No machine has a hundred thousand CUDA devices.
fn process_with_absent_device() -> Result<()> {
    let (from_env, _) = process(None, Some("cuda:99999"))?;
    ensure!(from_env.starts_with("DeviceUnavailable { device: \"cuda:99999\", why: "), "got {from_env}");
    Ok(())
}

fn process_new_ignores_varlen_fa_device() -> Result<()> {
    let (from_env, new) = process(Some("0"), Some("cuda:99999"))?;
    ensure!(from_env.starts_with("DeviceUnavailable"), "got {from_env}");
    ensure!(new == DENSE, "got {new}");
    Ok(())
}
