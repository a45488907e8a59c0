//! The CPU device's instruction sets: each that the processor has, forced, and what is said of the others.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{AttentionMask, Config, CpuIsa, Device, DeviceChoice, Error, MaskedAttention, Tensor};

use super::trials::Trials;
use super::{Register, bias, dense, masks, numerics, packed};

/// What each set's own code computes: products, softmax, conversions, gathering by lists and by ranges.
const OF_EACH_SET: &[Register] =
    &[numerics::register, dense::register, packed::register, masks::register, bias::register];

pub fn register(trials: &mut Trials) {
    let best = trials.device().clone();
    for &isa in CpuIsa::ALL {
        match open(isa) {
            // The suite itself runs on the best one.
            Ok(device) if adapter(&device) == adapter(&best) => {}
            Ok(device) => trials.add_on(isa.name(), device, OF_EACH_SET),
            Err(_) => trials.once_with(&format!("instruction_sets/{isa}"), move |_| absent(isa)),
        }
    }
    trials.once("instruction_sets/there_is_one", there_is_one);
    trials.once("instruction_sets/share_memory", share_memory);
}

fn open(isa: CpuIsa) -> varlen_fa::Result<Device> {
    Device::with_config(Config::default().with_device(DeviceChoice::Cpu).with_cpu_isa(Some(isa)))
}

/// Threads and instruction set.
fn adapter(device: &Device) -> &str {
    &device.capabilities().adapter
}

/// A set that the processor lacks is refused, and the message says what it has.
fn absent(isa: CpuIsa) -> Result<Completion> {
    let error = open(isa).err().context("the device opened now")?;
    let Error::NotApplicable { argument: "cpu_isa", got, why } = &error else { anyhow::bail!("got {error:?}") };
    ensure!(got == isa.name() && why.contains(CpuIsa::Scalar.name()), "got {error:?}");
    Ok(Completion::ignored_with(why.clone()))
}

fn there_is_one(device: &Device) -> Result<()> {
    let scalar = open(CpuIsa::Scalar)?;
    ensure!(
        scalar.config().cpu_isa == Some(CpuIsa::Scalar) && adapter(&scalar).ends_with("scalar"),
        "{}",
        adapter(&scalar)
    );
    let best = CpuIsa::ALL.iter().find_map(|&isa| open(isa).ok()).context("no instruction set")?;
    ensure!(adapter(&best) == adapter(device), "{} is better", adapter(&best));
    for &isa in CpuIsa::ALL {
        ensure!(CpuIsa::from_name(isa.name()) == Some(isa) && isa.to_string() == isa.name(), "{isa:?}");
    }
    for unknown in ["", "AVX2", "avx", "avx2 ", "sse", "cpu"] {
        ensure!(CpuIsa::from_name(unknown).is_none(), "{unknown:?}");
    }
    Ok(())
}

/// Tensors of one set's device are the others' too.
fn share_memory(device: &Device) -> Result<()> {
    let values: Vec<f32> = (0..2 * 16).map(|at| at as f32).collect();
    let x = Tensor::from_slice(device, &values, &[1, 2, 1, 16])?;
    let attended = MaskedAttention::new(&open(CpuIsa::Scalar)?).forward(&x, &x, &x, AttentionMask::None)?;
    let expected = MaskedAttention::new(device).forward(&x, &x, &x, AttentionMask::None)?;
    let (got, expected) = (attended.out.to_vec::<f32>()?, expected.out.to_vec::<f32>()?);
    ensure!(got.iter().zip(&expected).all(|(got, expected)| (got - expected).abs() < 1e-4), "{got:?}, {expected:?}");
    Ok(())
}
