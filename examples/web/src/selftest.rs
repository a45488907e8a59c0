//! What a browser does differently: no call may wait, errors come later, and shaders pass another compiler.

use anyhow::{Context, Result};
use varlen_fa::wgpu::{BufferDescriptor, BufferUsages};
use varlen_fa::{
    AttentionMask, Config, CuSeqlens, DType, Device, DeviceChoice, DeviceMemory, Element, Error, KeyMask, Layout,
    MaskedAttention, Path, Tensor, VarlenMeta, VarlenOptions, bf16, f16, pack, scatter_to_padded, varlen_attention,
};
use varlen_fa_testkit::random::normal_stream;

use crate::check::Check;

const SHAPE: [usize; 4] = [2, 6, 4, 16];
const SEED: u64 = 1;
const ELEMENTS: usize = 2 * 6 * 4 * 16;

/// Tries it all on a device of its own.
///
/// # Errors
/// What fails before there is anything to check. What is checked is in the list.
pub async fn selftest() -> Result<Vec<Check>> {
    let config = Config::default().with_device(DeviceChoice::Wgpu);
    let device = Device::with_config_async(config).await?;
    let mut checks = waiting(&device, config)?;
    checks.push(automatic_choice().await);
    checks.extend(operations::<f32>(&device).await?);
    checks.extend(operations::<f16>(&device).await?);
    checks.extend(operations::<bf16>(&device).await?);
    checks.push(destroyed_buffer(&device).await?);
    checks.push(goes_on(&device).await?);
    checks.push(lost_device(config).await?);
    Ok(checks)
}

/// Calls that wait: refused in a browser with the name of another, done elsewhere.
fn waiting(device: &Device, config: Config) -> Result<Vec<Check>> {
    let tensor = Tensor::zeros(device, DType::F32, &SHAPE)?;
    let calls = [
        ("Device::with_config", Device::with_config(config).map(drop)),
        ("Device::synchronize", device.synchronize()),
        ("Device::time", device.time(|| Ok(())).map(drop)),
        ("Tensor::to_vec", tensor.to_vec::<f32>().map(drop)),
    ];
    let check = |(name, result): (&str, Result<(), Error>)| {
        let found = match result {
            Err(error @ Error::WouldBlock { .. }) if cfg!(target_arch = "wasm32") => Ok(error.to_string()),
            Ok(()) if !cfg!(target_arch = "wasm32") => Ok("done".to_owned()),
            other => Err(format!("got {other:?}")),
        };
        Check::new(format!("{name}, which waits"), found)
    };
    Ok(calls.map(check).into())
}

/// The best device, whatever it is: no wait, no panic.
async fn automatic_choice() -> Check {
    let opened = Device::with_config_async(Config::default()).await;
    Check::new("the best device of all", opened.map(|device| device.name().to_owned()))
}

/// A result on some device, read back.
async fn result_on<T: Element>(device: &Device, operation: Operation) -> Result<Vec<f64>> {
    let [batch, seq, heads, dim] = SHAPE;
    let values = |stream, len| -> Vec<T> { normal_stream(SEED, stream, len).into_iter().map(T::from_f32).collect() };
    let tensor = |stream, shape: &[usize]| Tensor::from_slice(device, &values(stream, shape.iter().product()), shape);
    let (q, k, v) = (tensor(0, &SHAPE)?, tensor(1, &SHAPE)?, tensor(2, &SHAPE)?);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, &[vec![0..2, 3..6], vec![1..2, 3..5]])?)?;
    let cu_seqlens = CuSeqlens::from_lengths(&[5, 0, 7])?;
    let layer = MaskedAttention::new(device);
    let out = match operation {
        Operation::KeyMask => layer.forward(&q, &k, &v, AttentionMask::key(meta.key_mask()))?.out,
        Operation::BiasF32 => {
            let bias = Tensor::from_slice(device, &normal_stream(SEED, 3, seq * seq), &[1, 1, seq, seq])?;
            layer.forward(&q, &k, &v, AttentionMask::bias(bias.view()))?.out
        }
        Operation::Bias => {
            let bias = tensor(3, &[batch, 1, seq, seq])?;
            layer.forward(&q, &k, &v, AttentionMask::bias(bias.view()))?.out
        }
        Operation::ForcedDense => layer.with_path(Path::Dense).forward(&q, &k, &v, AttentionMask::varlen(&meta))?.out,
        Operation::OddPlaces => {
            let wide = tensor(4, &[batch, seq, heads, dim + 3])?;
            let odd = wide.view().slice(3, 1..dim + 1)?;
            layer.forward(odd, odd, odd, AttentionMask::varlen(&meta))?.out
        }
        Operation::PackAndScatter => scatter_to_padded(device, &pack(device, &q, &meta)?, &meta)?,
        Operation::Lse => {
            let packed = tensor(5, &[cu_seqlens.total(), heads, dim])?;
            let options = VarlenOptions::default().with_lse();
            let qkv = [&packed, &packed, &packed];
            let attended = varlen_attention(device, qkv, &cu_seqlens, &cu_seqlens, options)?;
            let lse = attended.lse.context("no lse")?.to_vec_async::<f32>().await?;
            return Ok(lse.into_iter().map(f64::from).collect());
        }
    };
    Ok(out.to_vec_async::<T>().await?.into_iter().map(|value| value.to_f32().into()).collect())
}

/// Forms of a call that compile shaders of their own.
#[derive(Debug, Clone, Copy)]
enum Operation {
    KeyMask,
    BiasF32,
    Bias,
    ForcedDense,
    OddPlaces,
    PackAndScatter,
    Lse,
}

/// Every form of a call on the device and on the CPU.
async fn operations<T: Element>(device: &Device) -> Result<Vec<Check>> {
    use Operation::{Bias, BiasF32, ForcedDense, KeyMask, Lse, OddPlaces, PackAndScatter};
    let cpu = Device::with_config(Config::default().with_device(DeviceChoice::Cpu))?;
    let mut checks = Vec::new();
    for operation in [KeyMask, BiasF32, Bias, ForcedDense, OddPlaces, PackAndScatter, Lse] {
        let (got, expected) = (result_on::<T>(device, operation).await?, result_on::<T>(&cpu, operation).await?);
        let pairs = got.iter().zip(&expected);
        let worst = pairs
            .map(|(got, expected)| (got - expected).abs())
            .fold(0.0, |worst: f64, error| if error.is_nan() { f64::INFINITY } else { worst.max(error) });
        let bound = match T::DTYPE {
            DType::F32 => 1e-5,
            DType::F16 => 1e-2,
            _ => 5e-2,
        };
        let found = format!("at most {worst:.1e} from the CPU device, {} values", got.len());
        let is_right = got.len() == expected.len() && !got.is_empty() && worst <= bound;
        let found = if is_right { Ok(found) } else { Err(found) };
        checks.push(Check::new(format!("{operation:?} in {}", T::DTYPE), found));
    }
    Ok(checks)
}

/// A buffer that the application destroyed before the commands are submitted.
async fn destroyed_buffer(device: &Device) -> Result<Check> {
    let (wgpu, queue) = device.wgpu().context("no handles")?;
    let library = Device::from_wgpu(wgpu, queue, Config::default())?;
    let (size, usage) = (ELEMENTS as u64 * 4, BufferUsages::STORAGE | BufferUsages::COPY_SRC);
    let buffer = wgpu.create_buffer(&BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
    let input = Tensor::zeros(&library, DType::F32, &SHAPE)?;
    let mut memory = DeviceMemory::from_wgpu(&library, buffer.clone())?;
    buffer.destroy();
    let out = memory.view_mut(DType::F32, Layout::contiguous(&SHAPE)?);
    // Elsewhere this call is refused already.
    let launched = MaskedAttention::new(&library).forward_into(&input, &input, &input, AttentionMask::none(), out);
    let waited = library.synchronize_async().await;
    let found = match launched.map(drop).and(waited) {
        Err(error @ (Error::Backend { .. } | Error::BufferUnusable { .. })) => Ok(error.to_string()),
        other => Err(format!("expected an error, got {other:?}")),
    };
    Ok(Check::new("a launch into a destroyed buffer", found))
}

/// The device goes on after an error.
async fn goes_on(device: &Device) -> Result<Check> {
    let ones = Tensor::from_slice(device, &[1.0_f32; ELEMENTS], &SHAPE)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(SHAPE[1], &[3, 0])?)?;
    let attended = MaskedAttention::new(device).forward(&ones, &ones, &ones, AttentionMask::varlen(&meta))?;
    let values = attended.out.to_vec_async::<f32>().await?;
    let valid = 3 * SHAPE[2] * SHAPE[3];
    let is_right = values[..valid].iter().all(|value| (value - 1.0).abs() < 1e-6)
        && values[valid..].iter().all(|&value| value == 0.0);
    let found = if is_right { Ok("right".to_owned()) } else { Err("wrong values".to_owned()) };
    Ok(Check::new("attention after an error", found))
}

/// A device that is destroyed.
async fn lost_device(config: Config) -> Result<Check> {
    let device = Device::with_config_async(config).await?;
    let tensor = Tensor::zeros(&device, DType::F32, &SHAPE)?;
    device.synchronize_async().await?;
    device.wgpu().context("no handles")?.0.destroy();
    let waited = device.synchronize_async().await;
    let copied = tensor.to_vec_async::<f32>().await.map(drop);
    let found = match (waited, copied) {
        (Err(Error::DeviceLost { .. }), Err(error @ Error::DeviceLost { .. })) => Ok(error.to_string()),
        other => Err(format!("expected DeviceLost twice, got {other:?}")),
    };
    Ok(Check::new("a device that is lost", found))
}
