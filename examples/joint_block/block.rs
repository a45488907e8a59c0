//! The block, in f32: all but QK-norm, rotary embedding and attention on the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rayon::prelude::*;
use varlen_fa::{
    AttentionMask, DType, Device, JointAttention, JointPlan, JointSegment, QkNorm, QkSegment, Rotary, RotaryPairing,
    Tensor, VarlenMeta,
};
use varlen_fa_harness::random::standard_normal;

use super::product::add_product;

/// Of LayerNorm and of QK-norm.
pub const EPS: f32 = 1e-6;
/// Of the rotary embedding's angles.
const THETA: f32 = 10_000.0;

/// Sizes of the block; there are two batch rows.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub heads: usize,
    pub head_dim: usize,
    /// Tokens of the padded text.
    pub text: usize,
    pub image: usize,
}

impl Sizes {
    pub fn width(self) -> usize {
        self.heads * self.head_dim
    }
}

/// What text and image each have.
pub struct Stream {
    pub seq: usize,
    /// Hidden states, `[B, S, W]`; NaN where a token is masked.
    pub hidden: Vec<f32>,
    /// `[W, 6·W]`: shift, scale and gate of attention, and of the MLP.
    pub modulation: Vec<f32>,
    /// To q, k and v, each `[W, W]`.
    pub project: [Vec<f32>; 3],
    /// QK-norm, `[D]`.
    pub norms: [Vec<f32>; 2],
    /// Cosines and sines, `[S, D/2]`.
    pub tables: [Vec<f32>; 2],
    /// `[W, W]`.
    pub out: Vec<f32>,
    /// `[W, 4·W]`.
    pub up: Vec<f32>,
    /// `[4·W, W]`.
    pub down: Vec<f32>,
}

/// The weights of a block and what goes into it.
pub struct Block {
    pub sizes: Sizes,
    pub batch: usize,
    /// Embedding of the time step, `[B, W]`.
    pub time: Vec<f32>,
    /// Text and image.
    pub streams: [Stream; 2],
}

/// What a step gives.
pub struct Step {
    /// Of text and image, `[B, S, W]`.
    pub hidden: [Vec<f32>; 2],
    pub plan: JointPlan,
    /// Time before the joint attention, of it, and after it.
    pub before: Duration,
    pub attention: Duration,
    pub after: Duration,
}

impl Stream {
    fn random(seed: u64, sizes: Sizes, batch: usize, seq: usize, first_position: usize) -> Self {
        let (width, half) = (sizes.width(), sizes.head_dim / 2);
        // Of deviation 1/√inputs: what comes out is again of deviation 1.
        let weight = |number: u64, inputs: usize, outputs: usize| {
            let mut values = standard_normal(seed + number, inputs * outputs);
            let scale = (inputs as f32).sqrt().recip();
            values.par_iter_mut().for_each(|value| *value *= scale);
            values
        };
        let angle = |at: usize| {
            let (position, pair) = (first_position + at / half, at % half);
            position as f32 * THETA.powf(-(pair as f32) / half as f32)
        };
        Self {
            seq,
            hidden: standard_normal(seed, batch * seq * width),
            modulation: weight(1, width, 6 * width),
            project: [2, 3, 4].map(|number| weight(number, width, width)),
            norms: [5, 6].map(|number| standard_normal(seed + number, sizes.head_dim)),
            tables: [f32::cos, f32::sin].map(|of| (0..seq * half).map(|at| of(angle(at))).collect()),
            out: weight(7, width, width),
            up: weight(8, width, 4 * width),
            down: weight(9, 4 * width, width),
        }
    }

    /// `[B, 6·W]`.
    fn modulate(&self, time: &[f32], width: usize) -> Vec<f32> {
        let active: Vec<f32> = time.iter().map(|&value| value / (1.0 + (-value).exp())).collect();
        product(&active, &self.modulation, width, 6 * width)
    }

    /// Each row of the hidden states by LayerNorm, scaled by 1 + scale and shifted; `first` is the
    /// place of the shift among the modulation's parts, and the scale follows.
    fn normalised(&self, hidden: &[f32], modulation: &[f32], width: usize, first: usize) -> Vec<f32> {
        let mut rows = hidden.to_vec();
        rows.par_chunks_mut(width).enumerate().for_each(|(token, row)| {
            let [shift, scale] = [first, first + 1].map(|part| part_of(modulation, token / self.seq, width, part));
            let mean = row.iter().sum::<f32>() / width as f32;
            let variance = row.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / width as f32;
            let root = (variance + EPS).sqrt().recip();
            for ((value, shift), scale) in row.iter_mut().zip(shift).zip(scale) {
                *value = (*value - mean) * root * (1.0 + scale) + shift;
            }
        });
        rows
    }

    /// Adds gated rows to the hidden states.
    fn add_gated(&self, hidden: &mut [f32], rows: &[f32], modulation: &[f32], width: usize, gate: usize) {
        hidden.par_chunks_mut(width).zip(rows.par_chunks(width)).enumerate().for_each(|(token, (hidden, row))| {
            let gate = part_of(modulation, token / self.seq, width, gate);
            hidden.iter_mut().zip(row).zip(gate).for_each(|((hidden, value), gate)| *hidden += gate * value);
        });
    }
}

/// One of the six parts of a batch row's modulation.
fn part_of(modulation: &[f32], batch: usize, width: usize, part: usize) -> &[f32] {
    &modulation[(batch * 6 + part) * width..][..width]
}

fn product(x: &[f32], w: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len() / inputs * outputs];
    add_product(&mut y, x, w, inputs, outputs);
    y
}

/// The approximation by tanh, as in the model.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + ((2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
}

/// A stream's tensors on the device.
struct OnDevice {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    norms: [Tensor; 2],
    tables: [Tensor; 2],
}

impl Block {
    /// Text of so many valid tokens in each batch row, then an image.
    pub fn random(sizes: Sizes, prompts: &[usize]) -> Self {
        let (batch, width) = (prompts.len(), sizes.width());
        // The image comes first in the positions, as in the model.
        let mut text = Stream::random(100, sizes, batch, sizes.text, sizes.image);
        let image = Stream::random(200, sizes, batch, sizes.image, 0);
        for (rows, &valid) in text.hidden.chunks_mut(sizes.text * width).zip(prompts) {
            rows[valid * width..].fill(f32::NAN);
        }
        Self { sizes, batch, time: standard_normal(300, batch * width), streams: [text, image] }
    }

    /// One pass through the block.
    pub fn step(&self, device: &Device, meta: &VarlenMeta) -> Result<Step> {
        let width = self.sizes.width();
        let start = Instant::now();
        let modulations = self.streams.each_ref().map(|stream| stream.modulate(&self.time, width));
        let mut tensors = Vec::new();
        for (stream, modulation) in self.streams.iter().zip(&modulations) {
            let rows = stream.normalised(&stream.hidden, modulation, width, 0);
            tensors.push(self.project(device, stream, &rows)?);
        }
        device.synchronize()?;
        let projected = Instant::now();

        let segments = tensors.iter_mut().map(|OnDevice { q, k, v, out, norms, tables }| {
            let qk = QkSegment::in_place(q, k)
                .with_norm(QkNorm::new(&norms[0], &norms[1], EPS))
                .with_rotary(Rotary::new(&tables[0], &tables[1], RotaryPairing::Interleaved));
            JointSegment::new(qk, &*v, out)
        });
        let plan = JointAttention::new(device).forward_into(segments, AttentionMask::varlen(meta))?;
        device.synchronize()?;
        let attended = Instant::now();

        let mut hidden = self.streams.each_ref().map(|stream| stream.hidden.clone());
        for (((stream, modulation), tensors), hidden) in
            self.streams.iter().zip(&modulations).zip(&tensors).zip(&mut hidden)
        {
            let rows = product(&tensors.out.to_vec::<f32>()?, &stream.out, width, width);
            stream.add_gated(hidden, &rows, modulation, width, 2);
            let rows = stream.normalised(hidden, modulation, width, 3);
            let mut inner = product(&rows, &stream.up, width, 4 * width);
            inner.par_iter_mut().for_each(|value| *value = gelu(*value));
            stream.add_gated(hidden, &product(&inner, &stream.down, 4 * width, width), modulation, width, 5);
        }
        let after = attended.elapsed();
        Ok(Step { hidden, plan, before: projected - start, attention: attended - projected, after })
    }

    fn project(&self, device: &Device, stream: &Stream, rows: &[f32]) -> Result<OnDevice> {
        let Sizes { heads, head_dim, .. } = self.sizes;
        let (width, shape) = (self.sizes.width(), [self.batch, stream.seq, heads, head_dim]);
        let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(device, values, shape);
        let projected = |weight: &Vec<f32>| tensor(&product(rows, weight, width, width), &shape);
        let [q, k, v] = stream.project.each_ref().map(projected);
        let [q_norm, k_norm] = stream.norms.each_ref().map(|norm| tensor(norm, &[head_dim]));
        let [cos, sin] = stream.tables.each_ref().map(|table| tensor(table, &[stream.seq, head_dim / 2]));
        Ok(OnDevice {
            q: q.context("q")?,
            k: k.context("k")?,
            v: v.context("v")?,
            out: Tensor::zeros(device, DType::F32, &shape)?,
            norms: [q_norm?, k_norm?],
            tables: [cos?, sin?],
        })
    }
}
