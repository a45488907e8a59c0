//! Calls over the application's buffers give the bits that the library's own tensors give, and write nothing else.

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::Completion;
use varlen_fa::wgpu::{self, BufferUsages};
use varlen_fa::{
    AttentionMask, BackendKind, Config, DType, Device, DeviceMemory, Kernel, KeyMask, MaskedAttention, Path, Reason,
    VarlenMeta, f16,
};

use super::super::memory::{narrow, upload};
use super::super::trials::Trials;
use super::application::{Application, Case, InPlace, READABLE, at, bytes};

pub fn register(trials: &mut Trials) {
    trials.each_dtype("external_wgpu/same_bits_as_own_tensors", same_bits_as_own_tensors);
    trials.once("external_wgpu/buffers_larger_than_a_binding", buffers_larger_than_a_binding);
    trials.once("external_wgpu/settings_apply", settings_apply);
    trials.once("external_wgpu/calls_from_many_threads", calls_from_many_threads);
    trials.once("external_wgpu/reads_and_writes", reads_and_writes);
    trials.once("external_wgpu/handlers_stay_the_applications", handlers_stay_the_applications);
    trials.once("external_wgpu/time", time);
    trials.once("external_wgpu/cooperative_matrices", cooperative_matrices);
}

/// A device with the features and the memory for it runs the kernel on cooperative matrices, and gives the bits of our own.
fn cooperative_matrices(own: &Device) -> Result<Completion> {
    if !own.capabilities().kernels.contains(&Kernel::WgslCoop) {
        return Ok(Completion::ignored_with(format!("{} has no kernel {}", own.name(), Kernel::WgslCoop)));
    }
    let (ours, _) = own.wgpu().context("no handles")?;
    let features =
        wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP;
    let max_compute_workgroup_storage_size = ours.limits().max_compute_workgroup_storage_size;
    let limits = wgpu::Limits { max_compute_workgroup_storage_size, ..Default::default() };
    // With less workgroup memory it is not offered.
    for (limits, is_offered) in [(limits, true), (wgpu::Limits::default(), false)] {
        let application = Application::with(own, features, limits)?;
        let device = application.attach()?;
        let kernels = &device.capabilities().kernels;
        ensure!(
            kernels.contains(&Kernel::WgslCoop) == is_offered,
            "expected it offered: {is_offered}, got {kernels:?}"
        );
        if is_offered {
            let case = Case::new(DType::F16, 9)?;
            let mask = AttentionMask::varlen(&case.meta);
            let layer = |device| MaskedAttention::new(device).with_kernel(Kernel::WgslCoop);
            let expected = case.expected_by(&layer(own), mask)?;
            let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
            let ([q, k, v], out) = tensors.call();
            layer(&device).forward_into(q, k, v, mask, out)?;
            ensure!(tensors.output(&application)? == expected, "other bits");
        }
        application.expect_quiet()?;
    }
    Ok(Completion::Completed)
}

/// Masks of every kind, at offsets that are aligned for bindings, for words, and for neither.
fn same_bits_as_own_tensors(own: &Device, dtype: DType) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    ensure!(device.capabilities().backend == BackendKind::Wgpu && !device.capabilities().has_timestamps);
    let case = Case::new(dtype, 1)?;
    let bias_shape = [2, 1, 70, 70];
    let bias: Vec<u32> = (0..2 * 70 * 70).map(|at| narrow((at % 13) as f32 * 0.25 - 1.0, dtype)).collect();
    let own_bias = upload(own, dtype, &bias, &bias_shape)?;
    let mut padded_bias = vec![0; 3];
    padded_bias.extend_from_slice(&bias);
    padded_bias.push(0);
    let bias_memory =
        DeviceMemory::from_wgpu(&device, application.buffer(BufferUsages::STORAGE, &bytes(&padded_bias, dtype))?)?;
    let bias_view = bias_memory.view(dtype, at(&bias_shape, 3)?);

    let word = 16 / dtype.size();
    // Masked tokens hold NaN, so the bias and the call without a mask see values of their own.
    let clean = Case { inputs: case.inputs.clone().map(|bits| finite(bits, dtype)), ..Case::new(dtype, 1)? };
    let calls = [
        ("key", &case, AttentionMask::key(&case.mask), AttentionMask::key(&case.mask)),
        ("varlen", &case, AttentionMask::varlen(&case.meta), AttentionMask::varlen(&case.meta)),
        ("none", &clean, AttentionMask::none(), AttentionMask::none()),
        ("bias", &clean, AttentionMask::bias(bias_view), AttentionMask::bias(own_bias.view())),
    ];
    for (name, case, mask, own_mask) in calls {
        let expected = case.expected(own, own_mask)?;
        for (gap, out_offset) in [(0, 0), (word, word), (256, 256 + 3 * word), (1, 5 * word)] {
            let place = format!("{name}, {gap} elements before each input, {out_offset} before the output");
            let mut tensors = InPlace::new(&application, &device, case, gap, out_offset)?;
            let ([q, k, v], out) = tensors.call();
            MaskedAttention::new(&device).forward_into(q, k, v, mask, out).with_context(|| place.clone())?;
            ensure!(tensors.output(&application)? == expected, "{place}: other bits");
        }
    }
    application.expect_quiet()
}

fn finite(mut all: Vec<u32>, dtype: DType) -> Vec<u32> {
    for (place, bits) in all.iter_mut().enumerate() {
        let value = super::super::memory::widen(*bits, dtype);
        if !value.is_finite() {
            *bits = narrow((place % 7) as f32 * 0.5 - 1.5, dtype);
        }
    }
    all
}

/// A buffer of which one binding reaches only a part: by batch row, and refused if one row does not fit.
fn buffers_larger_than_a_binding(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let case = Case::new(DType::F16, 2)?;
    let expected = case.expected(own, AttentionMask::varlen(&case.meta))?;
    let row = (70 * 4 * 32 * 2_u64).next_multiple_of(256) + 256;
    let device = application.attach_with(Config::default().with_max_binding_bytes(row))?;
    ensure!(device.capabilities().max_binding_bytes == row);
    let mut tensors = InPlace::new(&application, &device, &case, 4096, 8)?;
    ensure!(tensors.inputs.size() > 2 * row && tensors.out.size() > row, "everything fits one binding");
    let ([q, k, v], out) = tensors.call();
    MaskedAttention::new(&device).forward_into(q, k, v, AttentionMask::varlen(&case.meta), out)?;
    ensure!(tensors.output(&application)? == expected, "other bits");

    let device = application.attach_with(Config::default().with_max_binding_bytes(row / 2))?;
    let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let ([q, k, v], out) = tensors.call();
    let refused = MaskedAttention::new(&device).forward_into(q, k, v, AttentionMask::varlen(&case.meta), out);
    ensure!(matches!(refused, Err(varlen_fa::Error::TooLarge { argument: "q", .. })), "got {refused:?}");
    tensors.expect_untouched(&application)?;
    application.expect_quiet()
}

/// Dense attention can be forced on a device of the application's as on any other.
fn settings_apply(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach_with(Config::default().with_force_dense(true))?;
    ensure!(device.config().force_dense);
    let case = Case::new(DType::F32, 3)?;
    let tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let [q, k, v] = tensors.views();
    let attended = MaskedAttention::new(&device).forward(q, k, v, AttentionMask::varlen(&case.meta))?;
    ensure!((attended.plan.path, attended.plan.reason) == (Path::Dense, Reason::DenseForced), "{}", attended.plan);
    Ok(())
}

/// Threads that launch on one device, with scratch and parameters of one pool, beside threads that record and submit.
fn calls_from_many_threads(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let cases = (0..4).map(|seed| Case::new(DType::F16, 10 + seed)).collect::<Result<Vec<_>>>()?;
    let expected: Vec<_> =
        cases.iter().map(|case| case.expected(own, AttentionMask::varlen(&case.meta))).collect::<Result<_>>()?;
    let layer = MaskedAttention::new(&device);
    let start = std::sync::Barrier::new(cases.len());
    let run = |index: usize| -> Result<()> {
        let case = &cases[index];
        let mut tensors = InPlace::new(&application, &device, case, 0, 0)?;
        start.wait();
        for round in 0..6 {
            let ([q, k, v], out) = tensors.call();
            let mask = AttentionMask::varlen(&case.meta);
            if (index + round).is_multiple_of(2) {
                layer.forward_into(q, k, v, mask, out)?;
            } else {
                let mut encoder = application.encoder();
                layer.encode_into(&mut encoder, q, k, v, mask, out)?;
                application.queue.submit([encoder.finish()]);
            }
            ensure!(tensors.output(&application)? == expected[index], "thread {index}, round {round}: other bits");
        }
        Ok(())
    };
    let results = thread::scope(|scope| {
        let threads: Vec<_> = (0..cases.len()).map(|index| scope.spawn(move || run(index))).collect();
        threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    for result in results {
        result.map_err(|_| anyhow!("a thread panicked"))??;
    }
    application.expect_quiet()
}

/// `DeviceMemory::read` and `write` move exactly their bytes.
fn reads_and_writes(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let buffer = application.buffer(READABLE | BufferUsages::COPY_DST, &[7; 16])?;
    let mut memory = DeviceMemory::from_wgpu(&device, buffer.clone())?;
    for len in [0, 1, 2, 3, 4, 5, 11, 16] {
        memory.write(&[7_u8; 16])?;
        memory.write(&(1..=len as u8).collect::<Vec<_>>())?;
        let expected: Vec<u8> = (0..16).map(|at| if at < len { at as u8 + 1 } else { 7 }).collect();
        ensure!(application.read(&buffer)? == expected, "{len} bytes written");
        let mut read = vec![0_u8; len];
        memory.read(&mut read)?;
        ensure!(read == expected[..len], "{len} bytes read");
    }
    application.expect_quiet()
}

/// The application's errors still reach the application, the library's do not.
fn handlers_stay_the_applications(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let case = Case::new(DType::F16, 4)?;
    let tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let destroyed = application.buffer(BufferUsages::STORAGE, &[0; 64])?;
    destroyed.destroy();
    ensure!(DeviceMemory::from_wgpu(&device, destroyed).is_err(), "a destroyed buffer was taken");
    application.expect_quiet()?;

    let usage = BufferUsages::MAP_READ | BufferUsages::MAP_WRITE;
    let descriptor = wgpu::BufferDescriptor { label: None, size: 4, usage, mapped_at_creation: false };
    drop(application.device.create_buffer(&descriptor));
    ensure!(application.raised().len() == 1, "the application's own error went elsewhere: {:?}", application.raised());
    // Nor did the library take it for one of its own.
    let [q, k, v] = tensors.views();
    MaskedAttention::new(&device).forward(q, k, v, AttentionMask::varlen(&case.meta))?;
    device.synchronize()?;

    ensure!(application.losses() == 0);
    application.device.destroy();
    application.device.poll(wgpu::PollType::wait_indefinitely())?;
    ensure!(application.losses() == 1, "the application was not told that its device is lost");
    Ok(())
}

/// A device with timestamps is timed by them, one without by the host.
fn time(own: &Device) -> Result<()> {
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(70, &[70, 9])?)?;
    for features in [wgpu::Features::empty(), own.wgpu().context("not a wgpu device")?.0.features()] {
        let application = Application::with(own, features, wgpu::Limits::default())?;
        let device = application.attach()?;
        let x = varlen_fa::Tensor::from_slice(&device, &[f16::ONE; 2 * 70 * 64], &[2, 70, 2, 32])?;
        let layer = MaskedAttention::new(&device);
        let (_, timing) = device.time(|| layer.forward(&x, &x, &x, AttentionMask::varlen(&meta)))?;
        ensure!(timing.by_device == features.contains(wgpu::Features::TIMESTAMP_QUERY), "{timing:?}");
        ensure!(!timing.duration.is_zero(), "{timing:?}");
        application.expect_quiet()?;
    }
    Ok(())
}
