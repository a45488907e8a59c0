//! The CPU device's instruction sets: each that the processor has, forced, and what is said of the
//! others.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{
    AttentionMask, Config, CpuIsa, Device, DeviceChoice, Element, Error, KeyMask, MaskedAttention, Tensor, VarlenMeta,
    bf16,
};

use super::trials::{Register, Trials};
use super::{bias, dense, masks, numerics, packed, prepare_qk};

/// What each set's own code computes: products, softmax, conversions, gathering by lists and by
/// ranges.
const OF_EACH_SET: &[Register] = &[
    numerics::register,
    dense::register,
    packed::register,
    masks::register,
    bias::register,
    prepare_qk::register_kernels,
];

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
    trials.once("instruction_sets/bf16_below_the_normal_range", bf16_below_the_normal_range);
    trials.once("threads/same_bits_for_any_number/f32", same_bits_for_any_number::<f32>);
    trials.once("threads/same_bits_for_any_number/bf16", same_bits_for_any_number::<bf16>);
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
    let attended = MaskedAttention::new(&open(CpuIsa::Scalar)?).forward(&x, &x, &x, AttentionMask::none())?;
    let expected = MaskedAttention::new(device).forward(&x, &x, &x, AttentionMask::none())?;
    let (got, expected) = (attended.out.to_vec::<f32>()?, expected.out.to_vec::<f32>()?);
    ensure!(got.iter().zip(&expected).all(|(got, expected)| (got - expected).abs() < 1e-4), "{got:?}, {expected:?}");
    Ok(())
}

/// Sets that multiply bf16 as they are.
const OF_BF16: [CpuIsa; 2] = [CpuIsa::Avx512Bf16, CpuIsa::NeonBf16];

/// Numbers below 2⁻¹²⁶ may count as 0, by the instructions for products of bf16, but as nothing else:
/// what stands beside them is exact.
fn bf16_below_the_normal_range(_: &Device) -> Result<()> {
    let (tiny, shape) = (2f32.powi(-130), [1, 6, 1, 16]);
    let tensor = |device: &Device, even: f32, odd: f32| {
        let values: Vec<bf16> = (0..6 * 16).map(|at| bf16::from_f32(if at % 2 == 0 { even } else { odd })).collect();
        Tensor::from_slice(device, &values, &shape)
    };
    for &isa in CpuIsa::ALL {
        let Ok(device) = open(isa) else { continue };
        let (q, k, v) = (tensor(&device, tiny, 2.0)?, tensor(&device, tiny, tiny)?, tensor(&device, tiny, 3.0)?);
        let out = MaskedAttention::new(&device).forward(&q, &k, &v, AttentionMask::none())?.out.to_vec::<bf16>()?;
        let lowest = if OF_BF16.contains(&isa) { 0.0 } else { tiny };
        for pair in out.chunks(2) {
            let [even, odd] = [pair[0].to_f32(), pair[1].to_f32()];
            ensure!(odd == 3.0 && even >= lowest && even <= tiny, "{}: got {even:e}, {odd}", adapter(&device));
        }
    }
    Ok(())
}

/// One thread, several and more than there are tasks: each takes other tiles of queries, and none
/// may show.
fn same_bits_for_any_number<T: Element>(device: &Device) -> Result<()> {
    let shape = [2, 700, 6, 64];
    let values: Vec<T> =
        (0..shape.iter().product()).map(|at: usize| T::from_f32((at * 7919 % 1009) as f32 / 504.5 - 1.0)).collect();
    let x = Tensor::from_slice(device, &values, &shape)?;
    let key_value = Tensor::from_slice(device, &values[..2 * 700 * 2 * 64], &[2, 700, 2, 64])?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(700, &[700, 333])?)?;
    let run = |threads| -> Result<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let layer = MaskedAttention::new(device);
        let attended = pool.install(|| layer.forward(&x, &key_value, &key_value, AttentionMask::varlen(&meta)))?;
        Ok(attended.out.to_vec::<T>()?.into_iter().map(|value| value.to_f32().to_bits()).collect())
    };
    let expected = run(1)?;
    for threads in [2, 3, 7, 64] {
        ensure!(run(threads)? == expected, "{threads} threads gave other bits than one");
    }
    Ok(())
}
