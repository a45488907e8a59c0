//! Calls that are recorded into the application's commands.

use anyhow::{Context, Result, ensure};
use varlen_fa::wgpu;
use varlen_fa::{
    AttentionMask, AttentionOutputs, DType, Device, DeviceChoice, DeviceMemory, DeviceVarlenMeta, Error,
    JointAttention, JointSegment, KeyMask, KeyRanges, Layout, MaskDType, MaskView, MaskedAttention, Path, QkNorm,
    QkSegment, Rotary, RotaryPairing, ScoreModifiers, Tensor, TensorView, VarlenMeta, alibi_slopes,
    encode_merge_attention, encode_pack, encode_prepare_qk, encode_scatter, merge_attention, pack, prepare_qk,
    scatter_to_padded,
};
use varlen_fa_testkit::random;

use super::super::dispatches::{Dispatches, count};
use super::super::memory::{download, narrow, sentinel, upload};
use super::super::trials::Trials;
use super::application::{Application, Case, InPlace, READABLE, at, bits, bytes, portable};

pub fn register(trials: &mut Trials) {
    trials.each_dtype("external_wgpu/encoded_calls_give_the_same_bits", encoded_calls_give_the_same_bits);
    trials.once("external_wgpu/between_the_applications_passes", between_the_applications_passes);
    trials.once("external_wgpu/submitted_in_any_order_or_never", submitted_in_any_order_or_never);
    trials.once("external_wgpu/submitted_after_everything_was_dropped", submitted_after_everything_was_dropped);
    trials.once("external_wgpu/many_ranges_in_one_call", many_ranges_in_one_call);
    trials.once("external_wgpu/pack_and_scatter", pack_and_scatter);
    trials.once("external_wgpu/lse_and_merge", lse_and_merge);
    trials.once("external_wgpu/segments", segments);
    trials.once("external_wgpu/score_modifiers", score_modifiers);
    trials.once("external_wgpu/prepare_qk_of_a_fused_projection", prepare_qk_of_a_fused_projection);
    trials.once("external_wgpu/joint_layer", joint_layer);
    trials.once("external_wgpu/metadata_of_a_mask_that_changes", metadata_of_a_mask_that_changes);
    trials.once("external_wgpu/nothing_runs_before_the_submission", nothing_runs_before_the_submission);
    trials.once("external_wgpu/an_encoder_of_another_device", an_encoder_of_another_device);
    trials.once("external_wgpu/an_encoder_with_an_open_pass", an_encoder_with_an_open_pass);
}

/// Into an encoder and into a pass; every path; inputs that a shader must copy first.
fn encoded_calls_give_the_same_bits(own: &Device, dtype: DType) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer = MaskedAttention::new(&device);
    let case = Case::new(dtype, 1)?;
    let nothing = VarlenMeta::from_key_mask(&KeyMask::from_lengths(70, &[0, 0])?)?;
    let calls = [
        (AttentionMask::key(&case.mask), Path::Fused, case.expected(own, AttentionMask::key(&case.mask))?),
        (AttentionMask::varlen(&case.meta), Path::Fused, case.expected(own, AttentionMask::varlen(&case.meta))?),
        (AttentionMask::varlen(&case.meta), Path::Packed, case.expected(own, AttentionMask::varlen(&case.meta))?),
        (AttentionMask::varlen(&nothing), Path::Zero, vec![0; case.out_len()]),
    ];
    for (mask, path, expected) in calls {
        // Zeros are what is chosen, and cannot be forced.
        let layer = if path == Path::Zero { layer.clone() } else { layer.clone().with_path(path) };
        for (gap, out_offset) in [(0, 0), (1, 16)] {
            for into_pass in [false, true] {
                let place = format!("{path}, offsets {gap} and {out_offset}, into a pass: {into_pass}");
                let mut tensors = InPlace::new(&application, &device, &case, gap, out_offset)?;
                let mut encoder = application.encoder();
                let ([q, k, v], out) = tensors.call();
                let plan = if into_pass {
                    let mut pass = encoder.begin_compute_pass(&Default::default());
                    layer.encode_into(&mut pass, q, k, v, mask, out)
                } else {
                    layer.encode_into(&mut encoder, q, k, v, mask, out)
                };
                let plan = plan.with_context(|| place.clone())?;
                ensure!(plan.path == path, "{place}: {plan}");
                application.queue.submit([encoder.finish()]);
                ensure!(tensors.output(&application)? == expected, "{place}: other bits");
            }
        }
    }
    application.expect_quiet()
}

/// Recorded calls write the log-sum-exp that launched ones give, and so does a recorded merge of them.
fn lse_and_merge(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer = MaskedAttention::new(&device).with_lse();
    let bits: Vec<u32> = random::normal(91, 2 * 40 * 3 * 32).into_iter().map(f32::to_bits).collect();
    let x = upload(&device, DType::F32, &bits, &[2, 40, 3, 32])?;
    let meta = |lengths: [usize; 2]| VarlenMeta::from_key_mask(&KeyMask::from_lengths(40, &lengths)?);
    let all = meta([40, 40])?;
    // The last has no key at all: nothing is computed.
    for lengths in [[40, 0], [17, 33], [0, 0]] {
        let keys = meta(lengths)?;
        let mask = AttentionMask::varlen_cross(&all, &keys);
        let launched = layer.forward(&x, &x, &x, mask)?;
        let lse = launched.lse.context("lse was asked for")?;
        let expected = merge_attention(&device, &launched.out, &lse, &launched.out, &lse)?;
        let mut outs = [Tensor::zeros(&device, DType::F32, x.shape())?, Tensor::zeros(&device, DType::F32, x.shape())?];
        let mut lses =
            [Tensor::zeros(&device, DType::F32, &[2, 3, 40])?, Tensor::zeros(&device, DType::F32, &[2, 3, 40])?];
        let mut encoder = application.encoder();
        let outputs = AttentionOutputs::new(&mut outs[0]).with_lse(&mut lses[0]);
        layer.encode_into(&mut encoder, &x, &x, &x, mask, outputs)?;
        {
            let ([out, merged_out], [lse, merged_lse]) = (&mut outs, &mut lses);
            let outputs = AttentionOutputs::new(merged_out).with_lse(merged_lse);
            let mut pass = encoder.begin_compute_pass(&Default::default());
            encode_merge_attention(&device, &mut pass, &*out, &*lse, &*out, &*lse, outputs)?;
        }
        application.queue.submit([encoder.finish()]);
        ensure!(download(&outs[0])? == download(&launched.out)?, "{}: the output differs", launched.plan);
        ensure!(download(&lses[0])? == download(&lse)?, "{}: the lse differs", launched.plan);
        ensure!(download(&outs[1])? == download(&expected.out)?, "{}: the merged output differs", launched.plan);
        ensure!(download(&lses[1])? == download(&expected.lse)?, "{}: the merged lse differs", launched.plan);
    }
    application.expect_quiet()
}

/// Two layers of a model in one submission, each with its own modifiers: each finds its own.
fn score_modifiers(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer = MaskedAttention::new(&device);
    let bits: Vec<u32> = random::normal(92, 2 * 40 * 3 * 32).into_iter().map(f32::to_bits).collect();
    let x = upload(&device, DType::F32, &bits, &[2, 40, 3, 32])?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(40, &[40, 23])?)?;
    let layers = [
        ScoreModifiers::new().with_softcap(2.0).with_sinks([0.0, 1.0, -1.0]),
        ScoreModifiers::new().with_softcap(0.5).with_alibi(alibi_slopes(3)),
    ];
    let mut outs = [Tensor::zeros(&device, DType::F32, x.shape())?, Tensor::zeros(&device, DType::F32, x.shape())?];
    let mut encoder = application.encoder();
    for (modifiers, out) in layers.iter().zip(&mut outs) {
        let mask = AttentionMask::varlen(&meta).with_modifiers(modifiers);
        layer.encode_into(&mut encoder, &x, &x, &x, mask, out)?;
    }
    application.queue.submit([encoder.finish()]);
    for (modifiers, out) in layers.iter().zip(&outs) {
        let launched = layer.forward(&x, &x, &x, AttentionMask::varlen(&meta).with_modifiers(modifiers))?;
        ensure!(download(out)? == download(&launched.out)?, "{modifiers:?}: the output differs");
    }
    ensure!(download(&outs[0])? != download(&outs[1])?, "the modifiers change nothing");
    application.expect_quiet()
}

/// Recorded: q and k replaced in one buffer of the application's, between which v stays. The same bits as launched ones in
/// buffers of their own.
fn prepare_qk_of_a_fused_projection(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let (heads, kv_heads, dim) = (3, 2, 16);
    let fused = [2, 9, heads + 2 * kv_heads, dim];
    let mask = KeyMask::from_lengths(9, &[9, 4])?;
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let values = random::normal(92, fused.iter().product());
        let before: Vec<u32> = values.into_iter().map(|value| narrow(value, dtype)).collect();
        let numbers = |seed: u64, shape: &[usize]| {
            let values = random::normal(seed, shape.iter().product());
            upload(&device, DType::F32, &values.into_iter().map(f32::to_bits).collect::<Vec<_>>(), shape)
        };
        let (weight, tables) = (numbers(93, &[dim])?, numbers(94, &[9, 5])?);
        let whole = Layout::contiguous(&fused)?;
        let layouts = [whole.slice(2, 0..heads)?, whole.slice(2, heads..heads + kv_heads)?];
        let mut expected = [upload(&device, dtype, &before, &fused)?, upload(&device, dtype, &before, &fused)?];
        {
            let [q, k] = &mut expected;
            let (q, k) = (q.view_mut().with_layout(layouts[0]), k.view_mut().with_layout(layouts[1]));
            let segment = QkSegment::in_place(q, k)
                .with_norm(QkNorm::new(&weight, &weight, 1e-6))
                .with_rotary(Rotary::new(&tables, &tables, RotaryPairing::Halves));
            prepare_qk(&device, [segment], &mask)?;
        }
        let buffer = application.buffer(READABLE, &bytes(&before, dtype))?;
        let mut memories =
            [DeviceMemory::from_wgpu(&device, buffer.clone())?, DeviceMemory::from_wgpu(&device, buffer.clone())?];
        let mut encoder = application.encoder();
        {
            let [q, k] = &mut memories;
            let segment = QkSegment::in_place(q.view_mut(dtype, layouts[0]), k.view_mut(dtype, layouts[1]))
                .with_norm(QkNorm::new(&weight, &weight, 1e-6))
                .with_rotary(Rotary::new(&tables, &tables, RotaryPairing::Halves));
            encode_prepare_qk(&device, &mut encoder, [segment], &mask)?;
        }
        ensure!(bits(&application.read(&buffer)?, dtype) == before, "{dtype}: it ran before the submission");
        application.queue.submit([encoder.finish()]);
        let after = bits(&application.read(&buffer)?, dtype);
        let [q, k] = [download(&expected[0])?, download(&expected[1])?];
        for (at, &found) in after.iter().enumerate() {
            let head = at / dim % fused[2];
            let of = if head < heads {
                &q
            } else if head < heads + kv_heads {
                &k
            } else {
                &before
            };
            ensure!(found == of[at], "{dtype}: element {at} of head {head}");
        }
        ensure!(q != before && k != before, "{dtype}: nothing was done");
        // One that takes another's place does not.
        let [q, k] = &mut memories;
        let segment = QkSegment::in_place(q.view_mut(dtype, layouts[0]), k.view_mut(dtype, layouts[0].slice(2, 0..2)?));
        let error = prepare_qk(&device, [segment], &mask).err();
        ensure!(matches!(error, Some(Error::Overlap { .. })), "got {error:?}");
    }
    application.expect_quiet()
}

/// Segments of q, k, v and output, normalised in place.
fn normed<'a>(tensors: &'a mut [[Tensor; 4]], weight: &'a Tensor) -> Vec<JointSegment<'a>> {
    let segment = |[q, k, v, out]: &'a mut [Tensor; 4]| {
        JointSegment::new(QkSegment::in_place(q, k).with_norm(QkNorm::new(weight, weight, 1e-6)), &*v, out)
    };
    tensors.iter_mut().map(segment).collect()
}

/// A joint layer, recorded and launched: the same bits, in one submission. Where attention cannot write, nothing is done at all.
fn joint_layer(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer = JointAttention::new(&device);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(24, &[24, 13])?)?;
    let random = |seed: u64, shape: &[usize]| {
        let values = random::normal(seed, shape.iter().product());
        upload(&device, DType::F32, &values.into_iter().map(f32::to_bits).collect::<Vec<_>>(), shape)
    };
    let weight = random(95, &[32])?;
    // q, k, v and the output of text and image.
    let tensors = || -> Result<Vec<[Tensor; 4]>> {
        let of = |seq: usize| {
            let tensor = |seed| random(seed + seq as u64, &[2, seq, 2, 32]);
            Ok([tensor(100)?, tensor(200)?, tensor(300)?, tensor(400)?])
        };
        [7, 17].map(of).into_iter().collect()
    };
    let bits = |tensors: &[[Tensor; 4]]| tensors.iter().flatten().map(download).collect::<Result<Vec<_>>>();
    for mask in [AttentionMask::varlen(&meta), AttentionMask::none()] {
        let (mut launched, mut recorded) = (tensors()?, tensors()?);
        let (before, mut encoder) = (bits(&recorded)?, application.encoder());
        let (plan, counts) = count(|| Ok(layer.forward_into(normed(&mut launched, &weight), mask)?))?;
        ensure!(matches!(&counts[..], [Dispatches { command_buffers: Some(1), .. }]), "{plan}: {counts:?}");
        ensure!(
            layer.encode_into(&mut encoder, normed(&mut recorded, &weight), mask)? == plan,
            "another plan than {plan}"
        );
        ensure!(bits(&recorded)? == before, "{plan}: it ran before the submission");
        application.queue.submit([encoder.finish()]);
        ensure!(bits(&recorded)? == bits(&launched)?, "{plan}: other bits");
        ensure!(bits(&recorded)?[3] != before[3], "{plan}: nothing was done");
    }
    // The rows of a single segment's output do not start at words.
    let [mut q, mut k, v, mut out] = tensors()?.swap_remove(0);
    let before = download(&q)?;
    let odd = Layout::strided(&[2, 3, 2, 32], &[200, 65, 32, 1], 1)?;
    let mut encoder = application.encoder();
    for records in [false, true] {
        let [q, k] = [&mut q, &mut k].map(|tensor| tensor.view_mut().slice(1, 0..3));
        let qk = QkSegment::in_place(q?, k?).with_norm(QkNorm::new(&weight, &weight, 1e-6));
        let segment = JointSegment::new(qk, v.view().slice(1, 0..3)?, out.view_mut().with_layout(odd));
        let result = match records {
            true => layer.encode_into(&mut encoder, [segment], AttentionMask::none()),
            false => layer.forward_into([segment], AttentionMask::none()),
        };
        ensure!(matches!(result, Err(Error::Misaligned { argument: "out", .. })), "got {result:?}");
    }
    application.queue.submit([encoder.finish()]);
    ensure!(download(&q)? == before, "q was prepared");
    // A device of another kind records nothing.
    let cpu = JointAttention::new(&Device::new(DeviceChoice::Cpu)?);
    let error = cpu.encode_into(&mut application.encoder(), [], AttentionMask::none()).err();
    ensure!(matches!(error, Some(Error::DeviceKind { expected: "wgpu", .. })), "got {error:?}");
    application.expect_quiet()
}

/// The application's kernels, each over two storage buffers of f32.
struct Kernel {
    pipeline: wgpu::ComputePipeline,
}

impl Kernel {
    fn new(application: &Application, body: &str) -> Self {
        let source = format!(
            "@group(0) @binding(0) var<storage, read> src: array<f32>;
             @group(0) @binding(1) var<storage, read_write> dst: array<f32>;
             @compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>) {{
                 let i = id.x;
                 if i < arrayLength(&dst) {{ {body} }}
             }}"
        );
        let module = application.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let pipeline = application.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: None,
            compilation_options: Default::default(),
            cache: None,
        });
        Self { pipeline }
    }

    fn bind_group(&self, application: &Application, src: &wgpu::Buffer, dst: &wgpu::Buffer) -> wgpu::BindGroup {
        application.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.pipeline.get_bind_group_layout(0),
            entries: &[
                wgpu::BindGroupEntry { binding: 0, resource: src.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 1, resource: dst.as_entire_binding() },
            ],
        })
    }

    fn dispatch(
        &self,
        application: &Application,
        pass: &mut wgpu::ComputePass<'_>,
        src: &wgpu::Buffer,
        dst: &wgpu::Buffer,
    ) {
        let bind_group = self.bind_group(application, src, dst);
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &bind_group, &[]);
        pass.dispatch_workgroups((dst.size() / 4).div_ceil(64) as u32, 1, 1);
    }
}

/// The application writes q, k and v, attention runs, the application reads the output: one pass, one submission. Its bind
/// group 1, which writes to the buffer that attention reads, stays set meanwhile.
fn between_the_applications_passes(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let case = Case::new(DType::F32, 1)?;
    let expected = case.expected(own, AttentionMask::varlen(&case.meta))?;
    let buffer = |bits: &[u32]| application.buffer(READABLE, &bytes(bits, DType::F32));
    // Halving is exact.
    let half = |&bits: &u32| (f32::from_bits(bits) * 0.5).to_bits();
    let halves = case.inputs.iter().map(|bits| buffer(&bits.iter().map(half).collect::<Vec<_>>()));
    let halves = halves.collect::<Result<Vec<_>>>()?;
    let inputs = case.inputs.iter().map(|bits| buffer(&vec![sentinel(DType::F32); bits.len()]));
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    let (out_buffer, negated) =
        (buffer(&vec![sentinel(DType::F32); case.out_len()])?, buffer(&vec![0; case.out_len()])?);
    let double = Kernel::new(&application, "dst[i] = 2.0 * src[i];");
    let negate = Kernel::new(&application, "dst[i] = 3.0 - src[i];");

    let memories = inputs
        .iter()
        .map(|buffer| DeviceMemory::from_wgpu(&device, buffer.clone()))
        .collect::<varlen_fa::Result<Vec<_>>>()?;
    let mut out_memory = DeviceMemory::from_wgpu(&device, out_buffer.clone())?;
    let view =
        |input: usize| -> Result<TensorView<'_>> { Ok(memories[input].view(DType::F32, at(&case.shapes[input], 0)?)) };
    let mut encoder = application.encoder();
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for (half, input) in halves.iter().zip(&inputs) {
            double.dispatch(&application, &mut pass, half, input);
        }
        let writes_k = double.bind_group(&application, &halves[1], &inputs[1]);
        pass.set_bind_group(1, &writes_k, &[]);
        let out = out_memory.view_mut(DType::F32, at(&case.out_shape(), 0)?);
        let layer = MaskedAttention::new(&device);
        layer.encode_into(&mut pass, view(0)?, view(1)?, view(2)?, AttentionMask::varlen(&case.meta), out)?;
        negate.dispatch(&application, &mut pass, &out_buffer, &negated);
    }
    application.queue.submit([encoder.finish()]);
    ensure!(
        bits(&application.read(&out_buffer)?, DType::F32) == expected,
        "other bits than without the application's passes"
    );
    let negated = bits(&application.read(&negated)?, DType::F32);
    let is_negated = |(&out, &negated): (&u32, &u32)| f32::from_bits(negated) == 3.0 - f32::from_bits(out);
    ensure!(expected.iter().zip(&negated).all(is_negated), "the application did not read what attention wrote");
    application.expect_quiet()
}

/// Three calls that share scratch, recorded, interleaved with a call that is launched, submitted backwards but for one. Each has
/// a scale of its own, so that it shows whose parameters a call ran with.
fn submitted_in_any_order_or_never(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let layer =
        |device, index: usize| portable(device).with_path(Path::Packed).with_softmax_scale(0.1 * (index + 1) as f32);
    let cases = (0..4).map(|seed| Case::new(DType::F16, 20 + seed)).collect::<Result<Vec<_>>>()?;
    let mut stages = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let expected = case.expected_by(&layer(own, index), AttentionMask::varlen(&case.meta))?;
        stages.push((case, InPlace::new(&application, &device, case, 1, 0)?, expected));
    }
    let mut recorded = Vec::new();
    for (index, (case, tensors, _)) in stages[..3].iter_mut().enumerate() {
        let mut encoder = application.encoder();
        let ([q, k, v], out) = tensors.call();
        layer(&device, index).encode_into(&mut encoder, q, k, v, AttentionMask::varlen(&case.meta), out)?;
        recorded.push(encoder.finish());
    }
    let (case, tensors, _) = &mut stages[3];
    let ([q, k, v], out) = tensors.call();
    layer(&device, 3).forward_into(q, k, v, AttentionMask::varlen(&case.meta), out)?;
    // The third, then the first; the second never.
    for index in [2, 0] {
        application.queue.submit([recorded.remove(index)]);
    }
    for (index, (_, tensors, expected)) in stages.iter().enumerate() {
        if index == 1 {
            tensors.expect_untouched(&application)?;
        } else {
            ensure!(tensors.output(&application)? == *expected, "call {index}: other bits");
        }
    }
    application.expect_quiet()
}

/// Commands keep what they need.
fn submitted_after_everything_was_dropped(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let case = Case::new(DType::F16, 30)?;
    let expected = case.expected(own, AttentionMask::varlen(&case.meta))?;
    let (commands, out) = {
        let device = application.attach()?;
        let mut tensors = InPlace::new(&application, &device, &case, 1, 0)?;
        let meta = case.meta.clone();
        let mut encoder = application.encoder();
        let ([q, k, v], out) = tensors.call();
        MaskedAttention::new(&device).encode_into(&mut encoder, q, k, v, AttentionMask::varlen(&meta), out)?;
        (encoder.finish(), tensors.out_buffer.clone())
    };
    application.queue.submit([commands]);
    let got = bits(&application.read(&out)?, DType::F16);
    ensure!(got[..case.out_len()] == expected, "other bits");
    application.expect_quiet()
}

/// A call of more launches than one buffer of parameters usually holds.
fn many_ranges_in_one_call(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let shape = [90, 9, 1, 16];
    let row_bytes = 9 * 16 * 2_u64;
    let config = varlen_fa::Config::default().with_max_binding_bytes(row_bytes.next_multiple_of(256) + 256);
    let device = application.attach_with(config)?;
    let keep: Vec<bool> = (0..90 * 9).map(|at| at % 5 != 3).collect();
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(90, 9, &keep)?)?;
    let values: Vec<u32> = (0..90 * 9 * 16).map(|at| narrow((at % 101) as f32 * 0.03 - 1.5, DType::F16)).collect();
    let x = upload(own, DType::F16, &values, &shape)?;
    let expected = download(&portable(own).forward(&x, &x, &x, AttentionMask::varlen(&meta))?.out)?;

    let x = upload(&device, DType::F16, &values, &shape)?;
    let layer = MaskedAttention::new(&device);
    ensure!(download(&layer.forward(&x, &x, &x, AttentionMask::varlen(&meta))?.out)? == expected, "forward");
    let mut out = upload(&device, DType::F16, &vec![sentinel(DType::F16); values.len()], &shape)?;
    let mut encoder = application.encoder();
    layer.encode_into(&mut encoder, &x, &x, &x, AttentionMask::varlen(&meta), &mut out)?;
    application.queue.submit([encoder.finish()]);
    ensure!(download(&out)? == expected, "encode_into");
    application.expect_quiet()
}

/// Two recorded calls on text and image, parts of one buffer. The second reads what the first writes, in one submission.
fn segments(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let (batch, lengths, heads, dim) = (2, [7, 33], 3, 32);
    let seq: usize = lengths.iter().sum();
    let layer = MaskedAttention::new(&device);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, &[40, 21])?)?;
    let mask = AttentionMask::varlen(&meta);
    let bits: Vec<u32> = random::normal(92, batch * seq * heads * dim).into_iter().map(f32::to_bits).collect();
    let x = upload(&device, DType::F32, &bits, &[batch, seq, heads, dim])?;
    let first = layer.forward(&x, &x, &x, mask)?.out;
    let expected = download(&layer.forward(&first, &x, &x, mask)?.out)?;

    let bytes = bits.len() as u64 * 4;
    let mut memory = DeviceMemory::alloc(&device, bytes)?;
    memory.write(&bits)?;
    let joint = Layout::contiguous(&[batch, seq, heads, dim])?;
    let parts = [joint.slice(1, 0..lengths[0])?, joint.slice(1, lengths[0]..seq)?];
    let x = parts.map(|part| memory.view(DType::F32, part));
    let part = |length| Tensor::zeros(&device, DType::F32, &[batch, length, heads, dim]);
    let (mut text, mut image) = (part(lengths[0])?, part(lengths[1])?);
    let mut out = Tensor::zeros(&device, DType::F32, &[batch, seq, heads, dim])?;
    let mut encoder = application.encoder();
    let plan = layer.encode_into(&mut encoder, x, x, x, mask, [&mut text, &mut image])?;
    ensure!(plan.copies_segments && plan.to_string().contains("segments are copied"), "{plan}");
    layer.encode_into(&mut encoder, [&text, &image], x, x, mask, &mut out)?;
    application.queue.submit([encoder.finish()]);
    ensure!(download(&out)? == expected, "other bits");
    application.expect_quiet()
}

fn pack_and_scatter(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let case = Case::new(DType::Bf16, 5)?;
    let own_q = upload(own, case.dtype, &case.inputs[0], &case.shapes[0])?;
    let own_packed = pack(own, &own_q, &case.meta)?;
    let expected = [download(&own_packed)?, download(&scatter_to_padded(own, &own_packed, &case.meta)?)?];

    let memory = |bits: &[u32]| -> Result<(wgpu::Buffer, DeviceMemory)> {
        let buffer = application.buffer(READABLE, &bytes(bits, case.dtype))?;
        Ok((buffer.clone(), DeviceMemory::from_wgpu(&device, buffer)?))
    };
    let (_, padded) = memory(&case.inputs[0])?;
    let (packed_buffer, mut packed) = memory(&vec![sentinel(case.dtype); expected[0].len()])?;
    let (back_buffer, mut back) = memory(&vec![sentinel(case.dtype); expected[1].len()])?;
    let packed_layout = at(&[case.meta.total_valid(), 4, 32], 0)?;
    let padded_layout = at(&case.shapes[0], 0)?;
    let mut encoder = application.encoder();
    let from = padded.view(case.dtype, padded_layout);
    encode_pack(&device, &mut encoder, from, &case.meta, packed.view_mut(case.dtype, packed_layout))?;
    let from = packed.view(case.dtype, packed_layout);
    encode_scatter(&device, &mut encoder, from, &case.meta, back.view_mut(case.dtype, padded_layout))?;
    application.queue.submit([encoder.finish()]);
    ensure!(bits(&application.read(&packed_buffer)?, case.dtype) == expected[0], "packed rows");
    ensure!(bits(&application.read(&back_buffer)?, case.dtype) == expected[1], "padded rows");
    application.expect_quiet()
}

fn in_ranges<'a>(mask: AttentionMask<'a>, ranges: Option<&'a KeyRanges>) -> AttentionMask<'a> {
    match ranges {
        Some(ranges) => mask.with_ranges(ranges),
        None => mask,
    }
}

/// Commands of one encoder write a mask, build its metadata, compute with it, and all that again with another mask: each call
/// sees its own. The first row of the second mask is empty.
fn metadata_of_a_mask_that_changes(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let case = Case::new(DType::F16, 40)?;
    let [batch, seq, ..] = case.out_shape();
    let layout = Layout::contiguous(&[batch, seq])?;
    // Masked tokens of the case hold NaN: both masks keep some of the others.
    let tokens = || (0..batch).flat_map(|row| (0..seq).map(move |token| (row, token)));
    let kept = |case: &Case, row, token| case.mask.keeps(row, token);
    let masks = [
        tokens().map(|(row, token)| kept(&case, row, token)).collect::<Vec<_>>(),
        tokens().map(|(row, token)| row > 0 && token % 3 != 0 && kept(&case, row, token)).collect(),
    ];
    let as_bytes = |keep: &[bool]| keep.iter().map(|&keep| u8::from(keep) << 7).collect::<Vec<_>>();
    let sources = [0, 1].map(|at| application.buffer(wgpu::BufferUsages::COPY_SRC, &as_bytes(&masks[at])));
    let [first, second] = sources;
    let sources = [first?, second?];
    let buffer =
        application.buffer(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST, &as_bytes(&masks[1]))?;
    let memory = DeviceMemory::from_wgpu(&device, buffer.clone())?;
    let mut meta = DeviceVarlenMeta::new(&device, batch, seq)?;
    let causal = KeyRanges::causal([batch, seq, seq])?;
    let forms = [(Path::Fused, false), (Path::Fused, true), (Path::Packed, false), (Path::Dense, true)];
    let forms = forms.into_iter().flat_map(|form| [None, Some(&causal)].map(|ranges| (form, ranges)));
    for ((path, into_pass), ranges) in forms {
        let place = format!("{path}, into a pass: {into_pass}, ranges: {}", ranges.is_some());
        let layer = portable(&device).with_path(path);
        let mut stages = Vec::new();
        let mut encoder = application.encoder();
        for (keep, source) in masks.iter().zip(&sources) {
            let host = VarlenMeta::from_key_mask(&KeyMask::from_bool(batch, seq, keep)?)?;
            let expected =
                case.expected_by(&portable(own).with_path(path), in_ranges(AttentionMask::varlen(&host), ranges))?;
            let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
            encoder.copy_buffer_to_buffer(source, 0, &buffer, 0, buffer.size());
            let mask = memory.mask_view(MaskDType::U8, layout);
            let ([q, k, v], out) = tensors.call();
            if into_pass {
                let mut pass = encoder.begin_compute_pass(&Default::default());
                meta.encode_rebuild(&mut pass, mask)?;
                layer.encode_into(&mut pass, q, k, v, in_ranges(AttentionMask::varlen(&meta), ranges), out)?;
            } else {
                meta.encode_rebuild(&mut encoder, mask)?;
                layer.encode_into(&mut encoder, q, k, v, in_ranges(AttentionMask::varlen(&meta), ranges), out)?;
            }
            stages.push((tensors, expected));
        }
        for (tensors, _) in &stages {
            tensors.expect_untouched(&application).with_context(|| format!("{place}, before the submission"))?;
        }
        application.queue.submit([encoder.finish()]);
        for (at, (tensors, expected)) in stages.iter().enumerate() {
            ensure!(tensors.output(&application)? == *expected, "{place}, mask {at}: other bits");
        }
    }

    let error = {
        buffer.destroy();
        meta.encode_rebuild(&mut application.encoder(), memory.mask_view(MaskDType::U8, layout)).err()
    };
    ensure!(
        matches!(&error, Some(Error::BufferUnusable { argument: "mask", .. })),
        "a mask that was destroyed: {error:?}"
    );
    let cpu = Device::with_config(own.config().with_device(DeviceChoice::Cpu))?;
    let mask = MaskView::from_host(&[1_u8; 6], 2, 3)?;
    let error = DeviceVarlenMeta::new(&cpu, 2, 3)?.encode_rebuild(&mut application.encoder(), mask).err();
    ensure!(
        matches!(&error, Some(Error::DeviceKind { argument: "device", .. })),
        "metadata of the CPU device: {error:?}"
    );
    application.expect_quiet()
}

fn nothing_runs_before_the_submission(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let case = Case::new(DType::F16, 6)?;
    let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let mut encoder = application.encoder();
    let ([q, k, v], out) = tensors.call();
    MaskedAttention::new(&device).encode_into(&mut encoder, q, k, v, AttentionMask::varlen(&case.meta), out)?;
    device.synchronize()?;
    tensors.expect_untouched(&application)?;
    application.queue.submit([encoder.finish()]);
    ensure!(tensors.output(&application)? == case.expected(own, AttentionMask::varlen(&case.meta))?);
    Ok(())
}

/// wgpu checks encoders when they are finished: the error comes out there, of the encoder's own device.
fn an_encoder_of_another_device(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let case = Case::new(DType::F16, 7)?;
    let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let (other, _queue) = application.sibling()?;
    let mut encoder = other.create_command_encoder(&Default::default());
    let ([q, k, v], out) = tensors.call();
    MaskedAttention::new(&device).encode_into(&mut encoder, q, k, v, AttentionMask::varlen(&case.meta), out)?;
    let scope = other.push_error_scope(wgpu::ErrorFilter::Validation);
    drop(encoder.finish());
    ensure!(pollster::block_on(scope.pop()).is_some(), "an encoder of another device could be finished");
    tensors.expect_untouched(&application)?;
    application.expect_quiet()
}

/// An encoder whose pass is still open cannot take another: an error of the call.
fn an_encoder_with_an_open_pass(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let case = Case::new(DType::F16, 8)?;
    let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let mut encoder = application.encoder();
    let pass = encoder.begin_compute_pass(&Default::default()).forget_lifetime();
    let ([q, k, v], out) = tensors.call();
    let layer = MaskedAttention::new(&device);
    let refused = layer.encode_into(&mut encoder, q, k, v, AttentionMask::varlen(&case.meta), out);
    ensure!(matches!(&refused, Err(Error::Backend { operation: "recording", .. })), "got {refused:?}");
    drop(pass);
    application.expect_quiet()?;
    tensors.expect_untouched(&application)
}
