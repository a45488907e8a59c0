//! What only wgpu devices have: handles, and a device that can be lost.

use anyhow::{Context, Result, ensure};
use varlen_fa::{
    AttentionMask, CuSeqlens, DType, Device, DeviceChoice, DeviceMemory, DeviceVarlenMeta, Error, KeyMask, Layout,
    MaskDType, MaskedAttention, Tensor, VarlenMeta, VarlenOptions, f16, pack, pack_qkv, scatter_to_padded,
    varlen_attention,
};

use super::dispatches::count_compiled;
use super::trials::Trials;

pub fn register(trials: &mut Trials) {
    trials.once("wgpu/a_lost_device_is_an_error", a_lost_device_is_an_error);
    trials.once("wgpu/only_wgpu_devices_have_handles", only_wgpu_devices_have_handles);
    trials.once("wgpu/warm_up_leaves_nothing_to_compile", warm_up_leaves_nothing_to_compile);
}

fn only_wgpu_devices_have_handles(device: &Device) -> Result<()> {
    let (wgpu, _) = device.wgpu().context("a wgpu device without handles")?;
    ensure!(wgpu.limits().max_buffer_size >= device.capabilities().max_buffer_bytes);
    let cpu = Device::with_config(device.config().with_device(DeviceChoice::Cpu))?;
    ensure!(cpu.wgpu().is_none(), "the CPU device has wgpu handles");
    Ok(())
}

/// Every operation on a device that was destroyed, each with tensors that were made before.
fn a_lost_device_is_an_error(device: &Device) -> Result<()> {
    let device = Device::with_config(device.config().with_device(DeviceChoice::Wgpu))?;
    let shape = [2, 6, 4, 16];
    let ones = [f16::ONE; 2 * 6 * 4 * 16];
    let x = Tensor::from_slice(&device, &ones, &shape)?;
    let mut out = Tensor::zeros(&device, DType::F16, &shape)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, &[3, 4])?)?;
    let packed = pack(&device, &x, &meta)?;
    let layer = MaskedAttention::new(&device);
    layer.forward_into(&x, &x, &x, AttentionMask::varlen(&meta), &mut out)?;
    let mut built = DeviceVarlenMeta::new(&device, 2, 6)?;
    let mask = DeviceMemory::alloc(&device, 12)?;
    let mask_view = mask.mask_view(MaskDType::U8, Layout::contiguous(&[2, 6])?);
    built.rebuild(mask_view)?;
    device.synchronize()?;

    device.wgpu().context("no handles")?.0.destroy();
    let fresh = VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, &[1, 5])?)?;
    let nothing = VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, &[0, 0])?)?;
    let cu = CuSeqlens::new(&[0, 3, 7])?;
    let options = VarlenOptions::default().with_lse();
    let results = [
        ("synchronize", device.synchronize()),
        ("Tensor::zeros", Tensor::zeros(&device, DType::F16, &shape).map(drop)),
        ("Tensor::from_slice", Tensor::from_slice(&device, &ones, &shape).map(drop)),
        ("Tensor::to_vec", x.to_vec::<f16>().map(drop)),
        ("Tensor::write", out.write(&ones)),
        ("forward", layer.forward(&x, &x, &x, AttentionMask::none()).map(drop)),
        ("forward, metadata in use", layer.forward(&x, &x, &x, AttentionMask::varlen(&meta)).map(drop)),
        ("forward_into", layer.forward_into(&x, &x, &x, AttentionMask::none(), &mut out).map(drop)),
        (
            "forward_into, metadata in use",
            layer.forward_into(&x, &x, &x, AttentionMask::varlen(&meta), &mut out).map(drop),
        ),
        (
            "forward_into, new metadata",
            layer.forward_into(&x, &x, &x, AttentionMask::varlen(&fresh), &mut out).map(drop),
        ),
        (
            "forward_into, zeros alone",
            layer.forward_into(&x, &x, &x, AttentionMask::varlen(&nothing), &mut out).map(drop),
        ),
        ("DeviceVarlenMeta::new", DeviceVarlenMeta::new(&device, 2, 6).map(drop)),
        ("DeviceVarlenMeta::rebuild", built.rebuild(mask_view)),
        ("pack", pack(&device, &x, &meta).map(drop)),
        ("pack_qkv", pack_qkv(&device, &x, &x, &x, &meta).map(drop)),
        ("scatter_to_padded", scatter_to_padded(&device, &packed, &meta).map(drop)),
        ("varlen_attention", varlen_attention(&device, [&packed, &packed, &packed], &cu, &cu, options).map(drop)),
        ("time", device.time(|| Ok(())).map(drop)),
    ];
    for (operation, result) in results {
        ensure!(matches!(result, Err(Error::DeviceLost { .. })), "{operation}: expected DeviceLost, got {result:?}");
    }
    // The tensors go without a panic, and other devices are not lost.
    drop((x, out, packed));
    let other = Device::with_config(device.config())?;
    ensure!(Tensor::zeros(&other, DType::F16, &[3])?.to_vec::<f16>()? == [f16::ZERO; 3]);
    Ok(())
}

/// On a device of its own, so that warming up has something to compile; larger calls of the kind compile nothing more.
fn warm_up_leaves_nothing_to_compile(device: &Device) -> Result<()> {
    let device = Device::with_config(device.config().with_device(DeviceChoice::Wgpu))?;
    let layer = MaskedAttention::new(&device);
    let small = (KeyMask::from_lengths(6, &[3, 6])?, [2, 6, 4, 16], [2, 6, 2, 16]);
    let large = (KeyMask::from_lengths(70, &[9, 70, 0])?, [3, 70, 6, 16], [3, 70, 3, 16]);
    for dtype in [DType::F32, DType::Bf16] {
        for with_meta in [false, true] {
            let warm_up = |(key_mask, q, kv): &(KeyMask, [usize; 4], [usize; 4])| {
                let meta = VarlenMeta::from_key_mask(key_mask)?;
                let mask = if with_meta { AttentionMask::varlen(&meta) } else { AttentionMask::none() };
                Ok(layer.warm_up(dtype, q, kv, mask)?)
            };
            let (plan, compiled) = count_compiled(|| warm_up(&small))?;
            ensure!(compiled > 0, "{plan} compiled nothing");
            let (q_shape, kv_shape) = (large.1, large.2);
            let [q, kv] = [q_shape, kv_shape].map(|shape| Tensor::zeros(&device, dtype, &shape));
            let (q, kv) = (q?, kv?);
            let meta = VarlenMeta::from_key_mask(&large.0)?;
            let mask = if with_meta { AttentionMask::varlen(&meta) } else { AttentionMask::none() };
            let (called, compiled) = count_compiled(|| Ok(layer.forward(&q, &kv, &kv, mask)?.plan))?;
            ensure!(called == plan, "warm_up takes {plan}, forward {called}");
            ensure!(compiled == 0, "{compiled} shaders compiled after warming up, {dtype}, {plan}");
        }
    }
    Ok(())
}
