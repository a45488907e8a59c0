//! The block on a wgpu device: the application's shaders around ours, all in one command buffer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use varlen_fa::wgpu::{Buffer, CommandEncoder};
use varlen_fa::{
    AttentionMask, DType, Device, DeviceMemory, JointAttention, JointPlan, JointSegment, Layout, QkNorm, QkSegment,
    Rotary, RotaryPairing, VarlenMeta,
};

use super::application::{Application, Kernel};
use super::block::{Block, EPS, Sizes, Stream};

/// Places of the parts of the modulation: a shift, which its scale follows, and a gate, of attention and of the MLP.
const SHIFTS: [usize; 2] = [0, 3];
const GATES: [usize; 2] = [2, 5];

/// A block on a device.
pub struct OnWgpu<'a> {
    application: Application,
    device: &'a Device,
    batch: usize,
    sizes: Sizes,
    streams: [StreamOnWgpu; 2],
}

/// A stream's buffers and kernels.
struct StreamOnWgpu {
    seq: usize,
    /// Hidden states, and what they are at the start of a step.
    hidden: Buffer,
    given: Buffer,
    memory: [DeviceMemory; 4],
    norms: [DeviceMemory; 2],
    tables: [DeviceMemory; 2],
    before: Vec<Kernel>,
    after: Vec<Kernel>,
}

/// What a step gives.
pub struct Submitted {
    pub plan: JointPlan,
    /// The host's time for recording it, and that of its one submission, until it was done.
    pub recorded: Duration,
    pub run: Duration,
}

impl<'a> OnWgpu<'a> {
    /// Uploads the block; `None` if the device is no wgpu device.
    pub fn new(device: &'a Device, block: &Block) -> Result<Option<Self>> {
        let Some((handle, queue)) = device.wgpu() else { return Ok(None) };
        let application = Application { device: handle.clone(), queue: queue.clone() };
        let time = application.filled("time", &block.time);
        let [text, image] = &block.streams;
        let stream = |stream| StreamOnWgpu::new(&application, device, block, stream, &time);
        let streams = [stream(text)?, stream(image)?];
        Ok(Some(Self { application, device, batch: block.batch, sizes: block.sizes, streams }))
    }

    /// One pass through the block, in one submission, and waits for it.
    pub fn step(&mut self, meta: &VarlenMeta) -> Result<Submitted> {
        let start = Instant::now();
        let mut encoder = self.application.device.create_command_encoder(&Default::default());
        for stream in &self.streams {
            encoder.copy_buffer_to_buffer(&stream.given, 0, &stream.hidden, 0, stream.hidden.size());
            stream.before.iter().for_each(|kernel| kernel.record(&mut encoder));
        }
        let plan = self.attend(&mut encoder, meta)?;
        for stream in &self.streams {
            stream.after.iter().for_each(|kernel| kernel.record(&mut encoder));
        }
        let commands = encoder.finish();
        let recorded = start.elapsed();
        self.application.queue.submit([commands]);
        self.application.wait()?;
        Ok(Submitted { plan, recorded, run: start.elapsed() - recorded })
    }

    fn attend(&mut self, encoder: &mut CommandEncoder, meta: &VarlenMeta) -> Result<JointPlan> {
        let (batch, Sizes { heads, head_dim, .. }) = (self.batch, self.sizes);
        let norm = Layout::contiguous(&[head_dim])?;
        let segments = self.streams.iter_mut().map(|stream| -> varlen_fa::Result<_> {
            let of_heads = Layout::contiguous(&[batch, stream.seq, heads, head_dim])?;
            let table = Layout::contiguous(&[stream.seq, head_dim / 2])?;
            let [q, k, v, out] = &mut stream.memory;
            let [q_norm, k_norm] = stream.norms.each_ref().map(|memory| memory.view(DType::F32, norm));
            let [cos, sin] = stream.tables.each_ref().map(|memory| memory.view(DType::F32, table));
            let qk = QkSegment::in_place(q.view_mut(DType::F32, of_heads), k.view_mut(DType::F32, of_heads))
                .with_norm(QkNorm::new(q_norm, k_norm, EPS))
                .with_rotary(Rotary::new(cos, sin, RotaryPairing::Interleaved));
            Ok(JointSegment::new(qk, v.view(DType::F32, of_heads), out.view_mut(DType::F32, of_heads)))
        });
        let segments = segments.collect::<varlen_fa::Result<Vec<_>>>()?;
        Ok(JointAttention::new(self.device).encode_into(encoder, segments, AttentionMask::varlen(meta))?)
    }

    /// The hidden states of text and image, `[B, S, W]`.
    pub fn hidden(&self) -> Result<[Vec<f32>; 2]> {
        let [text, image] = &self.streams;
        Ok([self.application.read(&text.hidden)?, self.application.read(&image.hidden)?])
    }
}

impl StreamOnWgpu {
    fn new(application: &Application, device: &Device, block: &Block, stream: &Stream, time: &Buffer) -> Result<Self> {
        let (batch, width) = (block.batch, block.sizes.width());
        let rows = batch * stream.seq;
        let filled = |label: &str, values: &[f32]| application.filled(label, values);
        let buffer = |label: &str, columns: usize| application.buffer(label, rows * columns);
        let hidden = buffer("hidden", width);
        let modulation = application.buffer("modulation", batch * 6 * width);
        let [normalised, product, inner] =
            [buffer("normalised", width), buffer("product", width), buffer("inner", 4 * width)];
        let [q, k, v, out] = ["q", "k", "v", "out"].map(|label| buffer(label, width));

        let matmul = |x: &Buffer, w: &[f32], y: &Buffer, [rows, inputs, columns]: [usize; 3], activation: &str| {
            let constants = format!(
                "const ROWS = {rows}u;\nconst INPUTS = {inputs}u;\nconst COLUMNS = {columns}u;\n\
                 const SILU = {};\nconst GELU = {};\n",
                activation == "silu",
                activation == "gelu"
            );
            let source = [&constants, include_str!("matmul.wgsl")].concat();
            let tiles = rows.div_ceil(32) * columns.div_ceil(32);
            application.kernel(&source, &[x, &filled("weight", w), y], 64 * tiles)
        };
        let constants = format!("const ROWS = {rows}u;\nconst SEQ = {}u;\nconst WIDTH = {width}u;\n", stream.seq);
        let norm = |shift: usize| {
            let own = format!("const SHIFT = {shift}u;\nconst EPS = {EPS:e}f;\n");
            let source = [&constants, &own, include_str!("norm.wgsl")].concat();
            application.kernel(&source, &[&hidden, &modulation, &normalised], 64 * rows)
        };
        let gate = |gate: usize| {
            let source = [&constants, &format!("const GATE = {gate}u;\n"), include_str!("gate.wgsl")].concat();
            application.kernel(&source, &[&hidden, &product, &modulation], rows * width)
        };

        let mut before =
            vec![matmul(time, &stream.modulation, &modulation, [batch, width, 6 * width], "silu"), norm(SHIFTS[0])];
        for (weight, projected) in stream.project.iter().zip([&q, &k, &v]) {
            before.push(matmul(&normalised, weight, projected, [rows, width, width], "none"));
        }
        let after = vec![
            matmul(&out, &stream.out, &product, [rows, width, width], "none"),
            gate(GATES[0]),
            norm(SHIFTS[1]),
            matmul(&normalised, &stream.up, &inner, [rows, width, 4 * width], "gelu"),
            matmul(&inner, &stream.down, &product, [rows, 4 * width, width], "none"),
            gate(GATES[1]),
        ];
        let shared = |buffer: &Buffer| DeviceMemory::from_wgpu(device, buffer.clone());
        let upload = |values: &[f32]| shared(&filled("norm or table", values));
        let [q_norm, k_norm] = &stream.norms;
        let [cos, sin] = &stream.tables;
        Ok(Self {
            seq: stream.seq,
            given: filled("given", &stream.hidden),
            memory: [shared(&q)?, shared(&k)?, shared(&v)?, shared(&out)?],
            norms: [upload(q_norm)?, upload(k_norm).context("the norm of k")?],
            tables: [upload(cos)?, upload(sin)?],
            hidden,
            before,
            after,
        })
    }
}
