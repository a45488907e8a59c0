//! Where a call is recorded: an external command encoder or compute pass.

use std::fmt;

/// An external command encoder or open compute pass, to record a call into.
///
/// `into()` makes one from a `&mut wgpu::CommandEncoder`, in which the call becomes a new compute
/// pass, or from a `&mut wgpu::ComputePass`, in which it becomes dispatches. The call changes a
/// pass's pipeline, its bind group 0 and, on a device with immediates, its immediates. Other bind
/// groups stay set; the call does not use them.
pub struct Recorder<'a>(Target<'a>);

enum Target<'a> {
    Encoder(&'a mut wgpu::CommandEncoder),
    Pass(&'a mut dyn Dispatch),
}

impl<'a> From<&'a mut wgpu::CommandEncoder> for Recorder<'a> {
    fn from(encoder: &'a mut wgpu::CommandEncoder) -> Self {
        Self(Target::Encoder(encoder))
    }
}

impl<'a> From<&'a mut wgpu::ComputePass<'_>> for Recorder<'a> {
    fn from(pass: &'a mut wgpu::ComputePass<'_>) -> Self {
        Self(Target::Pass(pass))
    }
}

impl Recorder<'_> {
    /// The same encoder or pass, for a call of several operations.
    pub(crate) fn reborrow(&mut self) -> Recorder<'_> {
        Recorder(match &mut self.0 {
            Target::Encoder(encoder) => Target::Encoder(encoder),
            Target::Pass(pass) => Target::Pass(&mut **pass),
        })
    }
}

impl fmt::Debug for Recorder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Target::Encoder(_) => "Recorder(CommandEncoder)",
            Target::Pass(_) => "Recorder(ComputePass)",
        })
    }
}

impl Recorder<'_> {
    /// Runs `record` with the pass to record into.
    pub(super) fn pass(self, record: impl FnOnce(&mut dyn Dispatch)) {
        match self.0 {
            Target::Pass(pass) => record(pass),
            Target::Encoder(encoder) => {
                let descriptor = wgpu::ComputePassDescriptor { label: Some("varlen-fa"), timestamp_writes: None };
                record(&mut encoder.begin_compute_pass(&descriptor));
            }
        }
    }
}

/// A compute pass of any lifetime.
pub(super) trait Dispatch {
    /// One launch.
    fn dispatch(
        &mut self,
        pipeline: &wgpu::ComputePipeline,
        bind_group: &wgpu::BindGroup,
        immediates: Option<&[u8]>,
        groups: [u32; 3],
    );
}

impl Dispatch for wgpu::ComputePass<'_> {
    fn dispatch(
        &mut self,
        pipeline: &wgpu::ComputePipeline,
        bind_group: &wgpu::BindGroup,
        immediates: Option<&[u8]>,
        [x, y, z]: [u32; 3],
    ) {
        self.set_pipeline(pipeline);
        if let Some(immediates) = immediates {
            self.set_immediates(0, immediates);
        }
        self.set_bind_group(0, bind_group, &[]);
        self.dispatch_workgroups(x, y, z);
    }
}
