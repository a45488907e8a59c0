//! Finding an adapter and opening a device on it.

use wgpu::{Backends, DeviceType, ExperimentalFeatures, Features, Limits};

use crate::error::{Error, Result};

use super::coop::{self, Coop};

const CHOICE: &str = "wgpu";

/// A device of the best adapter, with no optional feature but timestamps and what cooperative matrices need, where it has them.
pub(super) fn open(
    include_software: bool,
    max_binding_bytes: Option<u64>,
) -> Result<(wgpu::Device, wgpu::Queue, Option<Coop>)> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = Backends::PRIMARY;
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(Backends::PRIMARY));
    if adapters.is_empty() {
        let hint = if cfg!(target_os = "linux") {
            "no Vulkan adapter; on Linux this needs the Vulkan loader (libvulkan.so.1) and a driver's ICD file"
        } else {
            "no Metal, DirectX 12 or Vulkan adapter"
        };
        return Err(unavailable(hint.to_owned()));
    }
    if !include_software {
        adapters.retain(|adapter| adapter.get_info().device_type != DeviceType::Cpu);
    }
    adapters.sort_by_key(|adapter| rank(adapter.get_info().device_type));
    let Some(adapter) = adapters.into_iter().next() else {
        return Err(unavailable("only software adapters, which are slower than the CPU device".to_owned()));
    };
    let coop = Coop::of(&adapter);
    let optional = if coop.is_some() { Features::TIMESTAMP_QUERY | coop::FEATURES } else { Features::TIMESTAMP_QUERY };
    let mut required_limits = limits(&adapter.limits(), max_binding_bytes);
    if coop.is_some() {
        required_limits.max_compute_workgroup_storage_size = adapter.limits().max_compute_workgroup_storage_size;
    }
    let request = adapter.request_device(&wgpu::DeviceDescriptor {
        label: Some("varlen-fa"),
        required_features: adapter.features() & optional,
        required_limits,
        experimental_features: if coop.is_some() { coop::experimental() } else { ExperimentalFeatures::disabled() },
        memory_hints: wgpu::MemoryHints::Performance,
        trace: wgpu::Trace::Off,
    });
    let (device, queue) = pollster::block_on(request).map_err(|error| unavailable(error.to_string()))?;
    Ok((device, queue, coop))
}

/// WebGPU's default limits, which every shader keeps to, but buffers as large as the adapter has them.
fn limits(adapter: &Limits, max_binding_bytes: Option<u64>) -> Limits {
    let largest = adapter.max_storage_buffer_binding_size;
    Limits {
        max_storage_buffer_binding_size: max_binding_bytes.map_or(largest, |bytes| largest.min(bytes)),
        max_buffer_size: adapter.max_buffer_size,
        ..Limits::default()
    }
}

fn rank(device_type: DeviceType) -> u8 {
    match device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    }
}

fn unavailable(why: String) -> Error {
    Error::DeviceUnavailable { device: CHOICE.to_owned(), why }
}
