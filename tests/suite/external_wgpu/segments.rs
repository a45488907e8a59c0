//! Segments of an output in the application's buffers: written where they lie, as far as there are bindings; and how many
//! dispatches a joint layer is.

use anyhow::{Context, Result, ensure};
use varlen_fa::wgpu;
use varlen_fa::{
    AttentionMask, AttentionOutputs, DType, Device, DeviceMemory, JointAttention, JointSegment, KeyRanges, Layout,
    MaskedAttention, QkNorm, QkSegment, Tensor,
};
use varlen_fa_testkit::random;

use super::super::dispatches::{Dispatches, count};
use super::super::memory::{download, narrow, sentinel, upload};
use super::super::trials::Trials;
use super::application::{Application, Case, READABLE, bits, bytes, portable};

pub fn register(trials: &mut Trials) {
    trials.once("external_wgpu/segments_of_an_output_in_buffers", segments_of_an_output_in_buffers);
    trials.once("external_wgpu/dispatches_of_a_joint_layer", dispatches_of_a_joint_layer);
}

/// More storage buffers than WebGPU's default, if the adapter has them; and the default.
fn numbers_of_buffers(own: &Device) -> Result<Vec<u32>> {
    let default = wgpu::Limits::default().max_storage_buffers_per_shader_stage;
    let most = Application::new(own)?.storage_buffers();
    if most < 12 {
        println!("not run with 12 storage buffers: the adapter has {most}");
        return Ok(vec![default]);
    }
    Ok(vec![default, 12])
}

fn with_buffers(own: &Device, max_storage_buffers_per_shader_stage: u32) -> Result<Application> {
    let limits = wgpu::Limits { max_storage_buffers_per_shader_stage, ..Default::default() };
    Application::with(own, wgpu::Features::empty(), limits)
}

/// Lengths of the segments, and the buffer of each.
const CUTS: [&[(usize, usize)]; 8] = [
    &[(16, 0), (54, 1)],
    &[(63, 0), (7, 0)],
    &[(1, 1), (0, 1), (69, 0)],
    &[(15, 0), (17, 1), (38, 0)],
    &[(65, 0), (1, 1), (4, 2)],
    &[(17, 3), (0, 0), (1, 2), (16, 1), (36, 0)],
    &[(33, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (31, 0), (6, 0)],
    &[(16, 0), (16, 0), (16, 0), (16, 0), (6, 0)],
];

/// Bits of the call on one tensor, and nothing around the segments. In one dispatch where there are bindings for all buffers.
fn segments_of_an_output_in_buffers(own: &Device) -> Result<()> {
    // Words are moved, whatever is in them.
    let dtype = DType::F16;
    let case = Case::new(dtype, 7)?;
    let seq = case.out_shape()[1];
    let causal = KeyRanges::causal([case.out_shape()[0], seq, seq])?;
    for all in numbers_of_buffers(own)? {
        let application = with_buffers(own, all)?;
        let device = application.attach()?;
        let tensor = |input: usize| upload(&device, dtype, &case.inputs[input], &case.shapes[input]);
        let (q, k, v) = (tensor(0)?, tensor(1)?, tensor(2)?);
        let varlen = AttentionMask::varlen(&case.meta);
        // With the bindings that are not the output's.
        let calls = [
            (varlen, false, 6),
            (varlen.with_ranges(&causal), false, 7),
            (varlen, true, 7),
            (AttentionMask::key(&case.mask), false, 6),
            (AttentionMask::none(), false, 3),
            (AttentionMask::none().with_ranges(&causal), true, 5),
        ];
        for (at, (mask, has_lse, others)) in calls.into_iter().enumerate() {
            let layer = portable(&device);
            let layer = if has_lse { layer.with_lse() } else { layer };
            let expected = case.expected_by(&layer, mask)?;
            for cuts in CUTS {
                let name = || format!("{all} storage buffers, call {at}, {cuts:?}");
                let mut outputs = Outputs::new(&application, &device, &case, cuts)?;
                let lse_shape = [case.out_shape()[0], case.out_shape()[2], seq];
                let mut lse = Tensor::zeros(&device, DType::F32, &lse_shape)?;
                let (_, counts) = count(|| {
                    let mut encoder = application.encoder();
                    let into = AttentionOutputs::new(outputs.views()?);
                    let into = if has_lse { into.with_lse(&mut lse) } else { into };
                    layer.encode_into(&mut encoder, &q, &k, &v, mask, into)?;
                    application.queue.submit([encoder.finish()]);
                    Ok(())
                })?;
                ensure!(outputs.read(&application)? == expected, "{}: other bits", name());
                let filled: Vec<_> = cuts.iter().filter(|(len, _)| *len > 0).collect();
                let mut buffers: Vec<_> = filled.iter().map(|(_, buffer)| buffer).collect();
                buffers.sort_unstable();
                buffers.dedup();
                let is_in_place = filled.len() <= 4 && others + buffers.len() <= all as usize;
                let dispatches = if is_in_place { 1 } else { 1 + filled.len() };
                let expected = Dispatches { dispatches, command_buffers: None };
                ensure!(counts == [expected], "{}: expected {dispatches} dispatches, got {counts:?}", name());
            }
        }
        application.expect_quiet()?;
    }
    Ok(())
}

/// Segments of an output, behind one another in as many buffers as they want.
struct Outputs {
    dtype: DType,
    whole: [usize; 4],
    buffers: Vec<wgpu::Buffer>,
    /// Of each segment: its memory, its buffer and its place.
    segments: Vec<(DeviceMemory, usize, Layout)>,
}

impl Outputs {
    /// Batch rows of all segments in a buffer take turns, with a token between. Tokens are wider than their heads.
    fn new(application: &Application, device: &Device, case: &Case, cuts: &[(usize, usize)]) -> Result<Self> {
        let whole @ [batch, _, heads, dim] = case.out_shape();
        let token = heads * dim + 16;
        let count = 1 + cuts.iter().map(|(_, buffer)| *buffer).max().context("a segment")?;
        let tokens_in = |buffer: usize, before: &[(usize, usize)]| -> usize {
            before.iter().filter(|(_, other)| *other == buffer).map(|(len, _)| len + 1).sum()
        };
        let mut places = Vec::new();
        for (at, &(len, buffer)) in cuts.iter().enumerate() {
            let strides = [tokens_in(buffer, cuts) * token, token, dim, 1].map(|stride| stride as u64);
            let first = 16 + tokens_in(buffer, &cuts[..at]) * token;
            places.push((buffer, Layout::strided(&[batch, len, heads, dim], &strides, first as u64)?));
        }
        let ends: Vec<usize> = (0..count).map(|buffer| 32 + batch * tokens_in(buffer, cuts) * token).collect();
        let of_end = |&end: &usize| application.buffer(READABLE, &bytes(&vec![sentinel(case.dtype); end], case.dtype));
        let buffers = ends.iter().map(of_end).collect::<Result<Vec<_>>>()?;
        let segments = places
            .into_iter()
            .map(|(buffer, layout)| Ok((DeviceMemory::from_wgpu(device, buffers[buffer].clone())?, buffer, layout)));
        Ok(Self { dtype: case.dtype, whole, segments: segments.collect::<Result<_>>()?, buffers })
    }

    fn views(&mut self) -> Result<Vec<varlen_fa::TensorViewMut<'_>>> {
        let dtype = self.dtype;
        Ok(self.segments.iter_mut().map(|(memory, _, layout)| memory.view_mut(dtype, *layout)).collect())
    }

    /// The whole, `[B, S, H, D]`; an error if anything around the segments was written.
    fn read(&self, application: &Application) -> Result<Vec<u32>> {
        let [batch, seq, heads, dim] = self.whole;
        let contents = self.buffers.iter().map(|buffer| Ok(bits(&application.read(buffer)?, self.dtype)));
        let mut contents = contents.collect::<Result<Vec<_>>>()?;
        let mut whole = vec![0; batch * seq * heads * dim];
        let mut first = 0;
        for (_, buffer, layout) in &self.segments {
            let len = layout.shape()[1];
            for (b, s, h) in (0..batch).flat_map(|b| (0..len).flat_map(move |s| (0..heads).map(move |h| (b, s, h)))) {
                let before: u64 = [b, s, h].iter().zip(layout.strides()).map(|(&at, &stride)| at as u64 * stride).sum();
                let start = (layout.offset() + before) as usize;
                let row = &mut contents[*buffer][start..start + dim];
                whole[((b * seq + first + s) * heads + h) * dim..][..dim].copy_from_slice(row);
                row.fill(sentinel(self.dtype));
            }
            first += len;
        }
        let is_untouched = contents.iter().flatten().all(|&bits| bits == sentinel(self.dtype));
        ensure!(is_untouched, "memory around the segments was written");
        Ok(whole)
    }
}

/// q and k are joined by what prepares them, and the output is written where it lies.
fn dispatches_of_a_joint_layer(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach()?;
    let weight = Tensor::from_slice(&device, &[1.0_f32; 32], &[32])?;
    let tensor = |seed: u64, seq: usize| {
        let values = random::normal(seed, 2 * seq * 2 * 32);
        let bits: Vec<u32> = values.into_iter().map(|value| narrow(value, DType::F16)).collect();
        upload(&device, DType::F16, &bits, &[2, seq, 2, 32])
    };
    for (lengths, with_norm, expected) in [
        // Two of q and two of k, two of v that are joined, attention.
        (&[7, 33][..], &[true, true][..], 7),
        // One segment's q and k are joined as they are: a dispatch for each, as before.
        (&[7, 33], &[true, false], 7),
        // Nothing is prepared: q, k and v are joined.
        (&[7, 33], &[false, false], 7),
        // One segment: nothing is joined.
        (&[40], &[true], 3),
        // The output in more buffers than there are bindings: copied.
        (&[7, 16, 17], &[true, true, true], 13),
    ] {
        let mut tensors = Vec::new();
        for (at, &seq) in lengths.iter().enumerate() {
            let seed = 10 * at as u64;
            tensors.push([tensor(seed, seq)?, tensor(seed + 1, seq)?, tensor(seed + 2, seq)?, tensor(seed + 3, seq)?]);
        }
        let mask = random::bernoulli_mask(3, 2 * 40, 0.7)?;
        let meta = varlen_fa::VarlenMeta::from_key_mask(&varlen_fa::KeyMask::from_bool(2, 40, &mask)?)?;
        let before = tensors.iter().map(|tensors| download(&tensors[3])).collect::<Result<Vec<_>>>()?;
        let layer = JointAttention::from(MaskedAttention::new(&device));
        let (plan, counts) = count(|| {
            let segments = tensors.iter_mut().zip(with_norm).map(|([q, k, v, out], with_norm)| {
                let qk = QkSegment::in_place(q, k);
                let qk = if *with_norm { qk.with_norm(QkNorm::new(&weight, &weight, 1e-6)) } else { qk };
                JointSegment::new(qk, &*v, out)
            });
            Ok(layer.forward_into(segments, AttentionMask::varlen(&meta))?)
        })?;
        let expected = [Dispatches { dispatches: expected, command_buffers: Some(1) }];
        ensure!(counts == expected, "{lengths:?}, {with_norm:?}, {plan}: expected {expected:?}, got {counts:?}");
        let after = tensors.iter().map(|tensors| download(&tensors[3])).collect::<Result<Vec<_>>>()?;
        ensure!(after.iter().zip(&before).all(|(after, before)| after != before), "{plan}: nothing was written");
    }
    application.expect_quiet()
}
