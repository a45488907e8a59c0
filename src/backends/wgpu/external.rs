//! External devices and queues: whether they can be computed on.

#[cfg(not(target_arch = "wasm32"))]
use std::sync::mpsc;
#[cfg(not(target_arch = "wasm32"))]
use std::time::Duration;

use crate::error::{Error, Result};

#[cfg(not(target_arch = "wasm32"))]
use super::context::Context;
use super::dispatch::{BINDING_ALIGNMENT, MAX_GROUPS};
use super::shader::{INVOCATIONS, MAX_STORAGE_BUFFERS};
#[cfg(not(target_arch = "wasm32"))]
use super::wait;

/// What the shaders need of a device's limits: name, value, least or greatest that will do. All are
/// WebGPU's defaults.
fn needs(limits: &wgpu::Limits) -> [(&'static str, u64, Need); 10] {
    use Need::{AtLeast, AtMost};
    let (invocations, alignment) = (AtLeast(INVOCATIONS as u64), AtMost(BINDING_ALIGNMENT));
    let storage_buffers = u64::from(MAX_STORAGE_BUFFERS);
    [
        ("max_compute_invocations_per_workgroup", limits.max_compute_invocations_per_workgroup.into(), invocations),
        ("max_compute_workgroup_size_x", limits.max_compute_workgroup_size_x.into(), invocations),
        (
            "max_compute_workgroups_per_dimension",
            limits.max_compute_workgroups_per_dimension.into(),
            AtLeast(MAX_GROUPS as u64),
        ),
        ("max_compute_workgroup_storage_size", limits.max_compute_workgroup_storage_size.into(), AtLeast(16 << 10)),
        (
            "max_storage_buffers_per_shader_stage",
            limits.max_storage_buffers_per_shader_stage.into(),
            AtLeast(storage_buffers),
        ),
        ("max_bindings_per_bind_group", limits.max_bindings_per_bind_group.into(), AtLeast(1 + storage_buffers)),
        ("max_bind_groups", limits.max_bind_groups.into(), AtLeast(1)),
        ("max_uniform_buffer_binding_size", limits.max_uniform_buffer_binding_size, AtLeast(BINDING_ALIGNMENT)),
        ("min_uniform_buffer_offset_alignment", limits.min_uniform_buffer_offset_alignment.into(), alignment),
        ("min_storage_buffer_offset_alignment", limits.min_storage_buffer_offset_alignment.into(), alignment),
    ]
}

#[derive(Debug, Clone, Copy)]
enum Need {
    AtLeast(u64),
    AtMost(u64),
}

/// Checks that the limits which the device was created with are enough for every shader.
pub(super) fn expect_limits(limits: &wgpu::Limits) -> Result<()> {
    for (limit_name, got, need) in needs(limits) {
        let expected = match need {
            Need::AtLeast(least) if got < least => format!("at least {least}"),
            Need::AtMost(most) if got > most => format!("at most {most}"),
            _ => continue,
        };
        return Err(Error::DeviceLimit { limit_name, expected, got });
    }
    Ok(())
}

/// How long to wait for the callback when another thread may have taken it and be about to run it.
#[cfg(not(target_arch = "wasm32"))]
const CALLBACK_PATIENCE: Duration = Duration::from_millis(50);

/// Checks that the queue is the device's. Work submitted to another device's queue would fail
/// where no error scope reaches.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn expect_own_queue(context: &Context) -> Result<()> {
    let (done, is_done) = mpsc::channel();
    context.queue.on_submitted_work_done(move || {
        // The receiver is gone only if this function has returned already.
        let _ = done.send(());
    });
    // Waiting for a device runs only the callbacks of its own queue.
    wait::now(&context.name, wait::WAITING, wait::for_work(context))?;
    is_done.recv_timeout(CALLBACK_PATIENCE).map_err(|_| Error::QueueMismatch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn webgpu_defaults_are_enough_and_lower_limits_are_named() {
        assert_eq!(expect_limits(&wgpu::Limits::default()), Ok(()));
        let refused = |limits: wgpu::Limits| match expect_limits(&limits) {
            Err(Error::DeviceLimit { limit_name, .. }) => limit_name,
            other => panic!("expected DeviceLimit, got {other:?}"),
        };
        assert_eq!(refused(wgpu::Limits::downlevel_defaults()), "max_compute_workgroup_storage_size");
        assert_eq!(refused(wgpu::Limits::downlevel_webgl2_defaults()), "max_compute_invocations_per_workgroup");
        let few_buffers = wgpu::Limits { max_storage_buffers_per_shader_stage: 6, ..Default::default() };
        assert_eq!(refused(few_buffers), "max_storage_buffers_per_shader_stage");
        let coarse = wgpu::Limits { min_storage_buffer_offset_alignment: 512, ..Default::default() };
        assert_eq!(refused(coarse), "min_storage_buffer_offset_alignment");
    }
}
