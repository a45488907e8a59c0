//! The application: compute kernels for the norm and the rotation of heads, a concatenation and a split. It does not know of
//! varlen-fa.

use anyhow::{Result, ensure};
use varlen_fa::DType;
use varlen_fa::wgpu;

/// Invocations of a workgroup.
const INVOCATIONS: usize = 64;
/// Workgroups in one dimension of a dispatch; further ones lie beside them.
const MAX_GROUPS: u32 = 65_535;

/// Makes the kernels of a stream.
pub struct Passes<'a> {
    device: &'a wgpu::Device,
    elements: &'static str,
    /// Bytes of an element.
    element_bytes: usize,
    /// `[B, S, H, D]` of the concatenated tensors.
    shape: [usize; 4],
    /// The stream's first token there, and its tokens.
    first: usize,
    seq: usize,
}

impl<'a> Passes<'a> {
    /// Of the stream of `seq` tokens from `first` on.
    pub fn new(device: &'a wgpu::Device, dtype: DType, shape: [usize; 4], [first, seq]: [usize; 2]) -> Result<Self> {
        let elements = match dtype {
            DType::F32 => include_str!("elements_f32.wgsl"),
            DType::F16 => include_str!("elements_f16.wgsl"),
            other => anyhow::bail!("expected f16 or f32, got {other}"),
        };
        ensure!(shape[3].is_multiple_of(16 / dtype.size()), "expected heads of whole words of 16 bytes");
        Ok(Self { device, elements, element_bytes: dtype.size(), shape, first, seq })
    }

    /// RMS norm of each head, in place.
    pub fn norm(&self, x: &wgpu::Buffer, weight: &wgpu::Buffer, eps: f32) -> Kernel {
        let [batch, _, heads, dim] = self.shape;
        let rows = batch * self.seq * heads;
        let constants = format!("const ROWS = {rows}u;\nconst PAIRS = {}u;\nconst EPS = {eps:e}f;\n", dim / 2);
        let source = [&constants, self.elements, include_str!("norm.wgsl")].concat();
        self.kernel(&source, &[x, weight], rows)
    }

    /// Rotation of neighbours in each head, in place.
    pub fn rotary(&self, x: &wgpu::Buffer, [cos, sin]: [&wgpu::Buffer; 2]) -> Kernel {
        let [batch, _, heads, dim] = self.shape;
        let count = batch * self.seq * heads * dim / 2;
        let constants = format!(
            "const COUNT = {count}u;\nconst PAIRS = {}u;\nconst HEADS = {heads}u;\nconst SEQ = {}u;\n",
            dim / 2,
            self.seq
        );
        let source = [&constants, self.elements, include_str!("rotary.wgsl")].concat();
        self.kernel(&source, &[x, cos, sin], count.div_ceil(INVOCATIONS))
    }

    /// The stream's tensor to its place in the concatenated one.
    pub fn concatenate(&self, part: &wgpu::Buffer, whole: &wgpu::Buffer) -> Kernel {
        self.copy("whole_at(i)", "i", [whole, part])
    }

    /// The other way.
    pub fn split(&self, whole: &wgpu::Buffer, part: &wgpu::Buffer) -> Kernel {
        self.copy("i", "whole_at(i)", [part, whole])
    }

    fn copy(&self, to: &str, from: &str, buffers: [&wgpu::Buffer; 2]) -> Kernel {
        let [batch, joint_seq, heads, dim] = self.shape;
        let row = heads * dim * self.element_bytes / 16;
        let count = batch * self.seq * row;
        let constants = format!(
            "const COUNT = {count}u;\nconst PART_WORDS = {}u;\nconst WHOLE_WORDS = {}u;\nconst FIRST_WORD = {}u;\n",
            self.seq * row,
            joint_seq * row,
            self.first * row
        );
        let source = include_str!("copy.wgsl").replace("TO_AT", to).replace("FROM_AT", from);
        self.kernel(&[constants, source].concat(), &buffers, count.div_ceil(INVOCATIONS))
    }

    fn kernel(&self, source: &str, buffers: &[&wgpu::Buffer], groups: usize) -> Kernel {
        let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let layout = &pipeline.get_bind_group_layout(0);
        let bind_group =
            self.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        Kernel { pipeline, bind_group, groups: groups as u32 }
    }
}

/// A kernel with its buffers.
pub struct Kernel {
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    groups: u32,
}

impl Kernel {
    /// Records one launch, if there is anything to do.
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) {
        if self.groups > 0 {
            pass.set_pipeline(&self.pipeline);
            pass.set_bind_group(0, &self.bind_group, &[]);
            pass.dispatch_workgroups(self.groups.min(MAX_GROUPS), self.groups.div_ceil(MAX_GROUPS), 1);
        }
    }
}
