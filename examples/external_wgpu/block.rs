//! The block: the application's two kernels with attention between them, all over the application's buffers.

use std::time::{Duration, Instant};

use anyhow::Result;
use varlen_fa::{AttentionMask, DType, Device, DeviceMemory, Layout, MaskedAttention, Plan, VarlenMeta, wgpu};

use crate::application::{Application, Kernel};

/// Sizes of a block.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub seq: usize,
    pub heads: usize,
    pub head_dim: usize,
}

impl Sizes {
    /// Width of the hidden states.
    pub fn width(self) -> usize {
        self.heads * self.head_dim
    }

    pub fn tokens(self) -> usize {
        self.batch * self.seq
    }

    /// `[B, S, H, D]`.
    pub fn shape(self) -> [usize; 4] {
        [self.batch, self.seq, self.heads, self.head_dim]
    }

    /// `[B, S, 3H, D]`: query heads, key heads, value heads.
    pub fn fused_shape(self) -> [usize; 4] {
        [self.batch, self.seq, 3 * self.heads, self.head_dim]
    }
}

/// The block's kernels and buffers.
pub struct Block {
    sizes: Sizes,
    /// `[tokens, width]`, added to in every step.
    hidden: wgpu::Buffer,
    projection: Kernel,
    residual: Kernel,
    attention: MaskedAttention,
    /// The application's buffers, as attention sees them.
    qkv: DeviceMemory,
    attended: DeviceMemory,
}

/// What one step did.
pub struct Step {
    pub plan: Plan,
    /// Host time that recording attention took.
    pub attention_recorded: Duration,
    /// From the submission until the device was done.
    pub run: Duration,
}

impl Block {
    /// `hidden` is `[tokens, width]`, `weight` `[width, 3 · width]`.
    pub fn new(
        application: &Application,
        device: &Device,
        sizes: Sizes,
        hidden: &[f32],
        weight: &[f32],
    ) -> Result<Self> {
        let (tokens, width) = (sizes.tokens(), sizes.width());
        let qkv = application.buffer("qkv", tokens * 3 * width);
        let attended = application.buffer("attended", tokens * width);
        let hidden = application.filled("hidden", hidden);
        let weight = application.filled("weight", weight);
        let source = format!("const WIDTH = {width}u;\n{}", include_str!("project.wgsl"));
        let projection = application.kernel(&source, &[&hidden, &weight, &qkv], tokens * 3 * width);
        let residual = application.kernel(include_str!("residual.wgsl"), &[&attended, &hidden], tokens * width);
        Ok(Self {
            sizes,
            hidden,
            projection,
            residual,
            attention: MaskedAttention::new(device),
            qkv: DeviceMemory::from_wgpu(device, qkv)?,
            attended: DeviceMemory::from_wgpu(device, attended)?,
        })
    }

    /// Records all three parts into one encoder, submits it, and waits.
    pub fn step(&mut self, application: &Application, meta: &VarlenMeta) -> Result<Step> {
        let heads = self.sizes.heads;
        let mut encoder = application.device.create_command_encoder(&Default::default());
        self.projection.record(&mut encoder);

        let start = Instant::now();
        let qkv = self.qkv.view(DType::F32, Layout::contiguous(&self.sizes.fused_shape())?);
        let [q, k, v] = [0, 1, 2].map(|part| qkv.slice(2, part * heads..(part + 1) * heads));
        let out = self.attended.view_mut(DType::F32, Layout::contiguous(&self.sizes.shape())?);
        let plan = self.attention.encode_into(&mut encoder, q?, k?, v?, AttentionMask::varlen(meta), out)?;
        let attention_recorded = start.elapsed();

        self.residual.record(&mut encoder);
        let start = Instant::now();
        application.queue.submit([encoder.finish()]);
        application.wait()?;
        Ok(Step { plan, attention_recorded, run: start.elapsed() })
    }

    /// The hidden states.
    pub fn hidden(&self, application: &Application) -> Result<Vec<f32>> {
        application.read(&self.hidden)
    }
}
