//! A joint layer on a wgpu device, from projected q, k and v of a text and an image to their outputs:
//! [`JointAttention`] recorded into one command buffer, beside what an application does without it. That is a norm, a rotation,
//! a concatenation and a split by compute shaders of its own, around attention on concatenated tensors, which is ours in both.
//! In turns; outputs are compared first.
//!
//! A submission has as many layers as `--layers` says, since a model records a step of many into one. Its time is that between the
//! GPU's timestamps around it, or from its start to its end by the host's clock if there are none: what the host does before, it
//! does while the GPU computes the step before.
//!
//! ```text
//! cargo bench --bench joint_layer -- --device wgpu --dtype f16
//! ```

mod clock;
mod passes;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use varlen_fa::wgpu::{self, BufferUsages};
use varlen_fa::{
    AttentionMask, DType, Device, DeviceMemory, Element, JointAttention, JointSegment, KeyMask, Layout,
    MaskedAttention, Plan, QkNorm, QkSegment, Rotary, RotaryPairing, VarlenMeta,
};
use varlen_fa_harness::arguments::Problem;
use varlen_fa_harness::benches::program;
use varlen_fa_harness::comparison::{self, Comparison};
use varlen_fa_harness::random::standard_normal;
use varlen_fa_harness::report::Report;
use varlen_fa_harness::times::Times;
use varlen_fa_testkit::WorkloadKind;

use clock::Clock;
use passes::{Kernel, Passes};

const EPS: f32 = 1e-6;

/// Time a joint layer against separate passes for norm, rotation, concatenation, attention and split.
#[derive(Debug, Args)]
struct JointLayer {
    /// Layers of a submission
    #[arg(long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u32).range(1..))]
    layers: u32,
}

fn main() -> ExitCode {
    program(comparison::run::<JointLayer>)
}

/// A buffer of the application's, which the library sees too.
struct Shared {
    buffer: wgpu::Buffer,
    memory: DeviceMemory,
}

impl Shared {
    fn new<T: Element>(device: &Device, values: &[f32]) -> Result<Self> {
        let (handle, _) = device.wgpu().context("a wgpu device")?;
        let buffer = handle.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: (values.len() * T::DTYPE.size()).next_multiple_of(16) as u64,
            usage: BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut memory = DeviceMemory::from_wgpu(device, buffer.clone())?;
        memory.write(&values.iter().map(|&value| T::from_f32(value)).collect::<Vec<_>>())?;
        Ok(Self { buffer, memory })
    }

    fn read<T: Element>(&self, len: usize) -> Result<Vec<f32>> {
        let mut values = vec![T::from_f32(0.0); len];
        self.memory.read(&mut values)?;
        Ok(values.into_iter().map(T::to_f32).collect())
    }
}

/// q, k, v and the output of a text or an image, and its tables.
struct Stream {
    seq: usize,
    qkv: [Shared; 3],
    out: Shared,
    weights: [Shared; 2],
    tables: [Shared; 2],
}

impl Stream {
    /// With the same values for the same seed.
    fn new<T: Element>(device: &Device, [batch, seq, heads, dim]: [usize; 4], seed: u64) -> Result<Self> {
        let (len, half) = (batch * seq * heads * dim, dim / 2);
        let tensor = |number| Shared::new::<T>(device, &standard_normal(seed + number, len));
        let angles = standard_normal(seed + 3, seq * half);
        let table =
            |of: fn(f32) -> f32| Shared::new::<f32>(device, &angles.iter().map(|&angle| of(angle)).collect::<Vec<_>>());
        let weight = |number| Shared::new::<f32>(device, &standard_normal(seed + number, dim));
        Ok(Self {
            seq,
            qkv: [tensor(0)?, tensor(1)?, tensor(2)?],
            out: Shared::new::<T>(device, &vec![f32::NAN; len])?,
            weights: [weight(4)?, weight(5)?],
            tables: [table(f32::cos)?, table(f32::sin)?],
        })
    }

    fn segment(&mut self, dtype: DType, [batch, _, heads, dim]: [usize; 4]) -> varlen_fa::Result<JointSegment<'_>> {
        let layout = Layout::contiguous(&[batch, self.seq, heads, dim])?;
        let [q, k, v] = &mut self.qkv;
        let (weight, table) = (Layout::contiguous(&[dim])?, Layout::contiguous(&[self.seq, dim / 2])?);
        let [q_weight, k_weight] = self.weights.each_ref().map(|it| it.memory.view(DType::F32, weight));
        let [cos, sin] = self.tables.each_ref().map(|it| it.memory.view(DType::F32, table));
        let qk = QkSegment::in_place(q.memory.view_mut(dtype, layout), k.memory.view_mut(dtype, layout))
            .with_norm(QkNorm::new(q_weight, k_weight, EPS))
            .with_rotary(Rotary::new(cos, sin, RotaryPairing::Interleaved));
        Ok(JointSegment::new(qk, v.memory.view(dtype, layout), self.out.memory.view_mut(dtype, layout)))
    }
}

/// The layer without the library's: concatenated q, k, v and output, and the application's kernels.
struct Separate {
    streams: [Stream; 2],
    whole: [Shared; 4],
    before: Vec<Kernel>,
    after: Vec<Kernel>,
}

impl Separate {
    fn new<T: Element>(device: &Device, streams: [Stream; 2], shape: [usize; 4]) -> Result<Self> {
        let (handle, _) = device.wgpu().context("a wgpu device")?;
        let whole = || Shared::new::<T>(device, &vec![f32::NAN; shape.iter().product()]);
        let whole = [whole()?, whole()?, whole()?, whole()?];
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let mut first = 0;
        for stream in &streams {
            let passes = Passes::new(handle, T::DTYPE, shape, [first, stream.seq])?;
            let [cos, sin] = stream.tables.each_ref().map(|table| &table.buffer);
            for (tensor, weight) in stream.qkv.iter().zip(&stream.weights) {
                before.push(passes.norm(&tensor.buffer, &weight.buffer, EPS));
                before.push(passes.rotary(&tensor.buffer, [cos, sin]));
            }
            for (part, whole) in stream.qkv.iter().zip(&whole) {
                before.push(passes.concatenate(&part.buffer, &whole.buffer));
            }
            after.push(passes.split(&whole[3].buffer, &stream.out.buffer));
            first += stream.seq;
        }
        Ok(Self { streams, whole, before, after })
    }

    fn record(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        attention: &MaskedAttention,
        meta: &VarlenMeta,
        form: (DType, [usize; 4]),
    ) -> varlen_fa::Result<Plan> {
        self.before.iter().for_each(|kernel| kernel.record(pass));
        let plan = self.attend(pass, attention, meta, form)?;
        self.after.iter().for_each(|kernel| kernel.record(pass));
        Ok(plan)
    }

    /// Attention alone, on the concatenated tensors.
    fn attend(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        attention: &MaskedAttention,
        meta: &VarlenMeta,
        (dtype, shape): (DType, [usize; 4]),
    ) -> varlen_fa::Result<Plan> {
        let layout = Layout::contiguous(&shape)?;
        let [q, k, v, out] = &mut self.whole;
        let [q, k, v] = [q, k, v].map(|tensor| tensor.memory.view(dtype, layout));
        let out = out.memory.view_mut(dtype, layout);
        attention.encode_into(pass, q, k, v, AttentionMask::varlen(meta), out)
    }
}

impl Comparison for JointLayer {
    /// Qwen-Image at 1024² and eight requests of it at 512².
    const DEFAULTS: &'static [&'static str] =
        &["joint:text=512:image=4096:valid=256", "joint:text=512:image=1024:valid=37,512,211,80,300,140,64,400"];
    const SMOKE: &'static str = "joint:text=5:image=20:valid=3,5:heads=2:dim=16";

    fn not_on(device: &Device) -> Option<&'static str> {
        device.wgpu().is_none().then_some("it is no wgpu device")
    }

    fn time<T: Element>(&self, device: &Device, problem: &Problem, rounds: usize, report: &mut Report) -> Result<()> {
        let shape @ [batch, seq, heads, dim] = problem.shape();
        let WorkloadKind::Joint { text, .. } = problem.workload.kind else {
            bail!("expected a joint workload: segments are a text and an image");
        };
        let (handle, queue) = device.wgpu().context("expected a wgpu device")?;
        ensure!(problem.kv_heads == heads, "expected as many key heads as query heads");
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(batch, seq, &problem.workload.mask)?)?;
        let streams = || -> Result<[Stream; 2]> {
            let stream = |seq, seed| Stream::new::<T>(device, [batch, seq, heads, dim], seed);
            Ok([stream(text, 1)?, stream(seq - text, 11)?])
        };
        let mut ours = streams()?;
        let mut separate = Separate::new::<T>(device, streams()?, shape)?;
        let (joint, attention) = (JointAttention::new(device), MaskedAttention::new(device));
        let clock = Clock::new(handle, queue);
        let submit = |row: usize, layers: u32, ours: &mut [Stream; 2], separate: &mut Separate| {
            clock.time(|pass| {
                let mut layer = || -> varlen_fa::Result<Plan> {
                    let form = (T::DTYPE, shape);
                    match row {
                        0 => separate.record(pass, &attention, &meta, form),
                        1 => {
                            let segments = ours.iter_mut().map(|stream| stream.segment(T::DTYPE, shape));
                            let segments = segments.collect::<varlen_fa::Result<Vec<_>>>()?;
                            let mask = AttentionMask::varlen(&meta);
                            Ok(joint.encode_into(&mut *pass, segments, mask)?.attention)
                        }
                        _ => separate.attend(pass, &attention, &meta, form),
                    }
                };
                (1..layers).try_for_each(|_| layer().map(drop))?;
                Ok(layer()?)
            })
        };
        // Norms and rotations are in place, so the outputs of the first calls are compared.
        for row in 0..2 {
            submit(row, 1, &mut ours, &mut separate)?;
        }
        let mut difference = 0.0_f32;
        for (own, other) in ours.iter().zip(&separate.streams) {
            let len = batch * own.seq * heads * dim;
            let values = own.out.read::<T>(len)?.into_iter().zip(other.out.read::<T>(len)?);
            // Not a maximum, which drops NaN.
            difference = values
                .map(|(own, other)| (own - other).abs())
                .fold(difference, |most, it| if it <= most { most } else { it });
        }
        let allowed = if T::DTYPE == DType::F32 { 1e-4 } else { 3e-2 };
        ensure!(difference <= allowed, "outputs differ by {difference}, more than {allowed}");
        let names = ["separate passes", "joint layer", "attention alone"];
        let (mut plans, mut times) = (Vec::new(), [Vec::new(), Vec::new(), Vec::new()]);
        // The first round warms up.
        for round in 0..=rounds {
            for (row, times) in times.iter_mut().enumerate() {
                let (plan, time) = submit(row, self.layers, &mut ours, &mut separate)?;
                match round {
                    0 => plans.push(plan),
                    _ => times.push(time),
                }
            }
        }
        let timed = plans.into_iter().zip(times.map(Times::of));
        writeln!(
            report.text,
            "\n{shape:?} {}, text of {text} tokens, {} valid; outputs differ by {difference:.1e}; {} layers a submission",
            T::DTYPE,
            meta.total_valid(),
            self.layers
        )?;
        comparison::report_ratios(
            (report, device, problem),
            (meta.total_valid(), self.layers),
            names.into_iter().zip(timed),
        )
    }
}
