//! Bad input at the border to the application's wgpu objects: each an error value, nothing written.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::wgpu::{self, BufferUsages, Features};
use varlen_fa::{
    AttentionMask, Config, CuSeqlens, DType, Device, DeviceChoice, DeviceMemory, Error, Layout, MaskedAttention,
    Tensor, VarlenOptions, encode_pack, encode_scatter, f16, pack, scatter_to_padded, varlen_attention,
};

use super::super::trials::Trials;
use super::application::{Application, Case, InPlace, READABLE, at, bytes};

pub fn register(trials: &mut Trials) {
    trials.once("external_wgpu/refusals/missing_usages", missing_usages);
    trials.once("external_wgpu/refusals/unusable_buffers", unusable_buffers);
    trials.once("external_wgpu/refusals/buffers_destroyed_later", buffers_destroyed_later);
    trials.once("external_wgpu/refusals/buffers_mapped_later", buffers_mapped_later);
    trials.once("external_wgpu/refusals/overlaps", overlaps);
    trials.once("external_wgpu/refusals/sizes_and_places", sizes_and_places);
    trials.once("external_wgpu/refusals/devices_of_another_kind", devices_of_another_kind);
    trials.once("external_wgpu/refusals/another_devices_queue", another_devices_queue);
    trials.once("external_wgpu/refusals/limits_that_are_too_low", limits_that_are_too_low);
    trials.once("external_wgpu/refusals/a_device_lost_under_us", a_device_lost_under_us);
}

fn expect<T>(what: &str, result: varlen_fa::Result<T>, expected: &Error) -> Result<()> {
    let error = result.err().with_context(|| format!("{what}: expected {expected:?}, got no error"))?;
    ensure!(error == *expected, "{what}: expected {expected:?}, got {error:?}");
    Ok(())
}

/// The refused argument, if the buffer was refused as unusable for a reason that says `why`.
fn unusable<T>(what: &str, result: varlen_fa::Result<T>, argument: &str, why: &str) -> Result<()> {
    match result.err() {
        Some(Error::BufferUnusable { argument: got, why: said }) if got == argument && said.contains(why) => Ok(()),
        other => anyhow::bail!("{what}: expected `{argument}` to be unusable because {why:?}, got {other:?}"),
    }
}

fn missing_usages(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let usage = |argument, missing: &str| Error::BufferUsage { argument, missing: missing.to_owned() };
    for without_storage in [BufferUsages::COPY_SRC | BufferUsages::COPY_DST, BufferUsages::UNIFORM] {
        let buffer = application.buffer(without_storage, &[0; 64])?;
        expect("import", DeviceMemory::from_wgpu(&device, buffer), &usage("buffer", "STORAGE"))?;
    }
    let storage = application.buffer(BufferUsages::STORAGE, &[0; 64])?;
    let mut memory = DeviceMemory::from_wgpu(&device, storage)?;
    expect("read", memory.read(&mut [0_u8; 4]), &usage("memory", "COPY_SRC"))?;
    expect("write", memory.write(&[0_u8; 4]), &usage("memory", "COPY_DST"))?;
    // A write that ends within a word has to read that word first.
    let buffer = application.buffer(BufferUsages::STORAGE | BufferUsages::COPY_DST, &[0; 64])?;
    let mut memory = DeviceMemory::from_wgpu(&device, buffer)?;
    memory.write(&[0_u8; 4])?;
    expect("write", memory.write(&[0_u8; 3]), &usage("memory", "COPY_SRC"))?;
    // Calls need no more than STORAGE, zeros for nothing valid included.
    let case = Case::new(DType::F16, 1)?;
    let nothing = varlen_fa::VarlenMeta::from_key_mask(&varlen_fa::KeyMask::from_lengths(70, &[0, 0])?)?;
    let tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let buffer = application.buffer(BufferUsages::STORAGE, &vec![0; case.out_len() * 2])?;
    let mut out = DeviceMemory::from_wgpu(&device, buffer)?;
    for meta in [&case.meta, &nothing] {
        let [q, k, v] = tensors.views();
        let out = out.view_mut(DType::F16, at(&case.out_shape(), 0)?);
        MaskedAttention::new(&device).forward_into(q, k, v, AttentionMask::varlen(meta), out)?;
    }
    device.synchronize()?;
    application.expect_quiet()
}

fn unusable_buffers(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let import = |buffer: wgpu::Buffer| DeviceMemory::from_wgpu(&device, buffer);
    let create = |device: &wgpu::Device, size, mapped_at_creation| {
        let usage = BufferUsages::STORAGE;
        device.create_buffer(&wgpu::BufferDescriptor { label: Some("mine"), size, usage, mapped_at_creation })
    };
    unusable("empty", import(create(&application.device, 0, false)), "buffer", "0 bytes")?;
    unusable("3 bytes", import(create(&application.device, 3, false)), "buffer", "3 bytes")?;
    unusable("mapped", import(create(&application.device, 64, true)), "buffer", "mapped")?;
    let destroyed = create(&application.device, 64, false);
    destroyed.destroy();
    unusable("destroyed", import(destroyed), "buffer", "mine")?;
    let (other, _) = application.sibling()?;
    unusable("another device's", import(create(&other, 64, false)), "buffer", "mine")?;
    // One of another instance that has more buffers than ours: wgpu panics on it, and the library does not.
    let elsewhere = Application::new(own)?;
    let buffers: Vec<_> = (0..1000).map(|_| create(&elsewhere.device, 64, false)).collect();
    let last = buffers.last().context("a buffer")?.clone();
    unusable("another instance's", import(last), "buffer", "another wgpu instance")?;
    // Bytes after the last whole word do not count.
    ensure!(import(create(&application.device, 103, false))?.size() == 100);
    application.expect_quiet()
}

/// Buffers that were fine when they were imported: the call names the argument, whichever way it is made.
fn buffers_destroyed_later(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer = MaskedAttention::new(&device);
    let case = Case::new(DType::F16, 1)?;
    for mask in [AttentionMask::key(&case.mask), AttentionMask::varlen(&case.meta)] {
        let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
        let k = application.buffer(BufferUsages::STORAGE, &bytes(&case.inputs[1], DType::F16))?;
        let k_memory = DeviceMemory::from_wgpu(&device, k.clone())?;
        let k_view = k_memory.view(DType::F16, at(&case.shapes[1], 0)?);
        k.destroy();
        let ([q, _, v], out) = tensors.call();
        unusable("forward_into", layer.forward_into(q, k_view, v, mask, out), "k", "destroyed")?;
        let mut encoder = application.encoder();
        let ([q, _, v], out) = tensors.call();
        unusable("encode_into", layer.encode_into(&mut encoder, q, k_view, v, mask, out), "k", "destroyed")?;
        // The encoder is as good as new.
        application.queue.submit([encoder.finish()]);
        tensors.expect_untouched(&application)?;

        let ([q, k, v], _) = tensors.call();
        let out = application.buffer(BufferUsages::STORAGE, &vec![0; case.out_len() * 2])?;
        let mut out_memory = DeviceMemory::from_wgpu(&device, out.clone())?;
        out.destroy();
        let out = out_memory.view_mut(DType::F16, at(&case.out_shape(), 0)?);
        unusable("forward_into", layer.forward_into(q, k, v, mask, out), "out", "destroyed")?;
    }
    application.expect_quiet()
}

/// Only with a feature may a storage buffer be mapped after it was created.
fn buffers_mapped_later(own: &Device) -> Result<Completion> {
    let feature = Features::MAPPABLE_PRIMARY_BUFFERS;
    if !Application::new(own)?.offers(feature) {
        return Ok(Completion::ignored_with("the adapter does not map storage buffers"));
    }
    let application = Application::with(own, feature, wgpu::Limits::default())?;
    let device = application.attach()?;
    let layer = MaskedAttention::new(&device);
    let case = Case::new(DType::F16, 1)?;
    let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let mask = AttentionMask::varlen(&case.meta);
    let usage = READABLE | BufferUsages::COPY_DST | BufferUsages::MAP_READ;
    let v_buffer = application.buffer(usage, &bytes(&case.inputs[2], DType::F16))?;
    let mut v_memory = DeviceMemory::from_wgpu(&device, v_buffer.clone())?;
    v_buffer.map_async(wgpu::MapMode::Read, .., |_| {});
    application.device.poll(wgpu::PollType::wait_indefinitely())?;
    let v_layout = at(&case.shapes[2], 0)?;
    let ([q, k, _], out) = tensors.call();
    let v = v_memory.view(DType::F16, v_layout);
    unusable("forward_into", layer.forward_into(q, k, v, mask, out), "v", "mapped")?;
    let mut encoder = application.encoder();
    let ([q, k, _], out) = tensors.call();
    unusable("encode_into", layer.encode_into(&mut encoder, q, k, v, mask, out), "v", "mapped")?;
    unusable("read", v_memory.read(&mut [0_u8; 4]), "memory", "mapped")?;
    unusable("write", v_memory.write(&[0_u8; 4]), "memory", "mapped")?;
    tensors.expect_untouched(&application)?;

    // Mapped in part: wgpu refuses the submission.
    v_buffer.unmap();
    v_buffer.map_async(wgpu::MapMode::Read, 64..128, |_| {});
    application.device.poll(wgpu::PollType::wait_indefinitely())?;
    let ([q, k, _], out) = tensors.call();
    let refused = layer.forward_into(q, k, v_memory.view(DType::F16, v_layout), mask, out);
    ensure!(matches!(&refused, Err(Error::Backend { operation: "a launch", .. })), "got {refused:?}");
    tensors.expect_untouched(&application)?;

    v_buffer.unmap();
    let ([q, k, _], out) = tensors.call();
    layer.forward_into(q, k, v_memory.view(DType::F16, v_layout), mask, out)?;
    ensure!(tensors.output(&application)? == case.expected(own, mask)?, "other bits after it was unmapped");
    application.expect_quiet()?;
    Ok(Completion::Completed)
}

/// Two memories over clones of one buffer: an output in it overlaps every input in it, wherever they lie.
fn overlaps(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer = MaskedAttention::new(&device);
    let case = Case::new(DType::F16, 1)?;
    let tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let mask = AttentionMask::varlen(&case.meta);
    let len = case.out_len();
    for (index, other) in ["q", "k", "v"].into_iter().enumerate() {
        // The input at the start, room for the output far behind it.
        let mut contents = bytes(&case.inputs[index], DType::F16);
        contents.resize(2 * (2 * len + 1024), 0xa5);
        let buffer = application.buffer(READABLE, &contents)?;
        let input = DeviceMemory::from_wgpu(&device, buffer.clone())?;
        let mut output = DeviceMemory::from_wgpu(&device, buffer.clone())?;
        let mut views = tensors.views();
        views[index] = input.view(DType::F16, at(&case.shapes[index], 0)?);
        let [q, k, v] = views;
        let layout = at(&case.out_shape(), len + 512)?;
        let expected = Error::Overlap { argument: "out", other };
        let out = output.view_mut(DType::F16, layout);
        expect("forward_into", layer.forward_into(q, k, v, mask, out), &expected)?;
        let mut encoder = application.encoder();
        let out = output.view_mut(DType::F16, layout);
        expect("encode_into", layer.encode_into(&mut encoder, q, k, v, mask, out), &expected)?;
        application.queue.submit([encoder.finish()]);
        ensure!(application.read(&buffer)? == contents, "a refused call wrote to the buffer of {other}");
    }
    // A bias and an output, rows to pack and packed rows, packed rows and their scatter.
    let zeros = vec![0_u8; 4 * len + 4 * 70];
    let buffer = application.buffer(READABLE, &zeros)?;
    let [first, mut second] =
        [DeviceMemory::from_wgpu(&device, buffer.clone())?, DeviceMemory::from_wgpu(&device, buffer.clone())?];
    let out_layout = at(&case.out_shape(), 128)?;
    let [q, k, v] = tensors.views();
    let bias = AttentionMask::bias(first.view(DType::F16, at(&[70], 0)?));
    let expected = Error::Overlap { argument: "out", other: "bias" };
    expect("bias", layer.forward_into(q, k, v, bias, second.view_mut(DType::F16, out_layout)), &expected)?;
    let padded = first.view(DType::F16, at(&case.shapes[0], 0)?);
    let packed_layout = at(&[case.meta.total_valid(), 4, 32], len)?;
    let mut encoder = application.encoder();
    let packed = second.view_mut(DType::F16, packed_layout);
    let expected = Error::Overlap { argument: "packed", other: "padded" };
    expect("pack", encode_pack(&device, &mut encoder, padded, &case.meta, packed), &expected)?;
    let padded = second.view_mut(DType::F16, at(&case.shapes[0], 0)?);
    let expected = Error::Overlap { argument: "padded", other: "packed" };
    let packed = first.view(DType::F16, packed_layout);
    expect("scatter", encode_scatter(&device, &mut encoder, packed, &case.meta, padded), &expected)?;
    application.queue.submit([encoder.finish()]);
    ensure!(application.read(&buffer)? == zeros, "a refused call wrote to its buffer");
    application.expect_quiet()
}

fn sizes_and_places(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer = MaskedAttention::new(&device);
    let case = Case::new(DType::F16, 1)?;
    let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let mask = AttentionMask::varlen(&case.meta);
    // An output that does not start at a word, or whose rows do not.
    let size = tensors.out.size();
    let [b, s, h, d] = case.out_shape();
    let misaligned = |got| Error::Misaligned { argument: "out", expected: 16, got };
    let past = Error::BufferTooSmall { argument: "out", expected: size + 2, got: size };
    let end = size as usize / 2 - case.out_len();
    let refused = [
        (at(&case.out_shape(), 1)?, misaligned(2)),
        (at(&case.out_shape(), 4)?, misaligned(8)),
        (Layout::strided(&[b, s, h, d], &[(s * 132) as u64, 132, 33, 1], 0)?, misaligned(0)),
        (at(&case.out_shape(), end + 1)?, past),
    ];
    for (layout, expected) in refused {
        for encoded in [false, true] {
            let [q, k, v] = tensors.views();
            let buffer = tensors.out_buffer.clone();
            let mut out = DeviceMemory::from_wgpu(&device, buffer)?;
            let out = out.view_mut(DType::F16, layout);
            let mut encoder = application.encoder();
            let result = match encoded {
                false => layer.forward_into(q, k, v, mask, out),
                true => layer.encode_into(&mut encoder, q, k, v, mask, out),
            };
            match (&expected, result) {
                // Which of several strides is named is the library's choice, or that the last row is past the end.
                (Error::Misaligned { got: 0, .. }, Err(Error::Misaligned { argument: "out", .. })) => {}
                (Error::Misaligned { got: 0, .. }, Err(Error::BufferTooSmall { argument: "out", .. })) => {}
                (expected, Err(error)) => ensure!(error == *expected, "expected {expected:?}, got {error:?}"),
                (expected, Ok(plan)) => anyhow::bail!("expected {expected:?}, got {plan}"),
            }
            application.queue.submit([encoder.finish()]);
        }
    }
    // An input past the end, by one element.
    let size = tensors.inputs.size();
    let past = at(&case.shapes[0], (size / 2) as usize - case.inputs[0].len() + 1)?;
    let q_past = tensors.inputs.view(DType::F16, past);
    let [_, k, v] = tensors.views();
    let expected = Error::BufferTooSmall { argument: "q", expected: size + 2, got: size };
    expect("forward", layer.forward(q_past, k, v, mask), &expected)?;
    tensors.expect_untouched(&application)?;

    // No token, no batch row, no key: nothing to compute, and nothing bound that is not there.
    let small = application.buffer(READABLE, &[0xa5; 4])?;
    let mut memory = DeviceMemory::from_wgpu(&device, small.clone())?;
    let empty = at(&[0, 70, 4, 32], 0)?;
    let none = DeviceMemory::from_wgpu(&device, application.buffer(READABLE, &[0; 4])?)?;
    let view = none.view(DType::F16, empty);
    layer.forward_into(view, view, view, AttentionMask::none(), memory.view_mut(DType::F16, empty))?;
    let no_keys = none.view(DType::F16, at(&[2, 0, 2, 32], 0)?);
    let ([q, ..], out) = tensors.call();
    layer.forward_into(q, no_keys, no_keys, AttentionMask::none(), out)?;
    ensure!(tensors.output(&application)?.iter().all(|&bits| bits == 0), "rows without keys are not zeros");
    // Packed queries without a single key.
    let packed = Tensor::from_slice(&device, &[f16::ONE; 3 * 8], &[3, 1, 8])?;
    let no_rows = none.view(DType::F16, at(&[0, 1, 8], 0)?);
    let (cu_q, cu_k) = (CuSeqlens::new(&[0, 3])?, CuSeqlens::new(&[0, 0])?);
    let attended =
        varlen_attention(&device, [packed.view(), no_rows, no_rows], &cu_q, &cu_k, VarlenOptions::default())?;
    ensure!(attended.out.to_vec::<f16>()? == [f16::ZERO; 24]);
    ensure!(application.read(&small)? == [0xa5; 4]);
    application.expect_quiet()
}

fn devices_of_another_kind(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let cpu = Device::with_config(own.config().with_device(DeviceChoice::Cpu))?;
    let kind = Error::DeviceKind { argument: "device", expected: "wgpu", got: cpu.name().to_owned() };
    let buffer = application.buffer(BufferUsages::STORAGE, &[0; 64])?;
    expect("from_wgpu", DeviceMemory::from_wgpu(&cpu, buffer), &kind)?;
    let x = Tensor::from_slice(&cpu, &[1.0_f32; 8], &[1, 1, 1, 8])?;
    let mut out = Tensor::zeros(&cpu, DType::F32, &[1, 1, 1, 8])?;
    let mut encoder = application.encoder();
    let layer = MaskedAttention::new(&cpu);
    expect("encode_into", layer.encode_into(&mut encoder, &x, &x, &x, AttentionMask::none(), &mut out), &kind)?;
    ensure!(out.to_vec::<f32>()? == [0.0; 8]);

    // Two library devices over one wgpu device do not share memory.
    let (first, second) = (application.attach()?, application.attach()?);
    let case = Case::new(DType::F16, 1)?;
    let mut tensors = InPlace::new(&application, &first, &case, 0, 0)?;
    let ([q, k, v], out) = tensors.call();
    let mismatch =
        Error::DeviceMismatch { argument: "q", expected: second.name().to_owned(), got: first.name().to_owned() };
    let layer = MaskedAttention::new(&second);
    expect("encode_into", layer.encode_into(&mut encoder, q, k, v, AttentionMask::none(), out), &mismatch)?;
    tensors.expect_untouched(&application)
}

fn another_devices_queue(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let (other, other_queue) = application.sibling()?;
    let refused = Device::from_wgpu(&application.device, &other_queue, Config::default());
    expect("from_wgpu", refused, &Error::QueueMismatch)?;
    // A device whose own queue is gone.
    drop(other_queue);
    expect("from_wgpu", Device::from_wgpu(&other, &application.queue, Config::default()), &Error::QueueMismatch)?;
    application.expect_quiet()
}

fn limits_that_are_too_low(own: &Device) -> Result<()> {
    let defaults = wgpu::Limits::default();
    let limited = [
        (
            "max_storage_buffers_per_shader_stage",
            wgpu::Limits { max_storage_buffers_per_shader_stage: 4, ..defaults.clone() },
        ),
        ("max_compute_workgroup_storage_size", wgpu::Limits::downlevel_defaults()),
        ("max_compute_invocations_per_workgroup", wgpu::Limits::downlevel_webgl2_defaults()),
    ];
    for (name, limits) in limited {
        let application = Application::with(own, Features::empty(), limits)?;
        let error = application.attach().err().with_context(|| format!("{name} was low enough"))?;
        let error = error.downcast::<Error>()?;
        ensure!(
            matches!(&error, Error::DeviceLimit { limit_name, .. } if *limit_name == name),
            "{name}: got {error:?}"
        );
        application.expect_quiet()?;
    }
    Ok(())
}

/// The application destroys its device: every later call says so, and the application's handler hears nothing from us.
fn a_device_lost_under_us(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer = MaskedAttention::new(&device);
    let case = Case::new(DType::F16, 1)?;
    let mask = AttentionMask::varlen(&case.meta);
    let mut tensors = InPlace::new(&application, &device, &case, 1, 0)?;
    let padded = Tensor::zeros(&device, DType::F16, &case.shapes[0])?;
    let packed = pack(&device, &padded, &case.meta)?;
    let buffer = application.buffer(READABLE | BufferUsages::COPY_DST, &[0; 64])?;
    let mut memory = DeviceMemory::from_wgpu(&device, buffer.clone())?;
    let mut encoder = application.encoder();
    let ([q, k, v], out) = tensors.call();
    layer.encode_into(&mut encoder, q, k, v, mask, out)?;

    application.device.destroy();
    let is_lost = |what: &str, result: varlen_fa::Result<()>| -> Result<()> {
        ensure!(matches!(result, Err(Error::DeviceLost { .. })), "{what}: expected DeviceLost, got {result:?}");
        Ok(())
    };
    // Recorded before, submitted after: wgpu drops it, and the next call knows.
    application.queue.submit([encoder.finish()]);
    let ([q, k, v], out) = tensors.call();
    is_lost("forward_into", layer.forward_into(q, k, v, mask, out).map(drop))?;
    let mut encoder = application.encoder();
    let ([q, k, v], out) = tensors.call();
    is_lost("encode_into", layer.encode_into(&mut encoder, q, k, v, mask, out).map(drop))?;
    let [q, k, v] = tensors.views();
    is_lost("forward", layer.forward(q, k, v, AttentionMask::key(&case.mask)).map(drop))?;
    is_lost("alloc", DeviceMemory::alloc(&device, 64).map(drop))?;
    is_lost("from_wgpu", DeviceMemory::from_wgpu(&device, buffer).map(drop))?;
    is_lost("write", memory.write(&[1_u8; 4]))?;
    is_lost("read", memory.read(&mut [1_u8; 4]))?;
    is_lost("pack", pack(&device, &padded, &case.meta).map(drop))?;
    is_lost("scatter_to_padded", scatter_to_padded(&device, &packed, &case.meta).map(drop))?;
    is_lost("synchronize", device.synchronize())?;
    is_lost("time", device.time(|| Ok(())).map(drop))?;
    let attach = Device::from_wgpu(&application.device, &application.queue, Config::default());
    is_lost("Device::from_wgpu", attach.map(drop))?;
    application.expect_quiet()
}
