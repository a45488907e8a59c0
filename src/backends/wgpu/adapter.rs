//! Finding an adapter and opening a device on it.

use wgpu::{Backends, DeviceType, ExperimentalFeatures, Features, Limits};

use crate::error::{Error, Result};

use super::coop::{self, Coop};
use super::launcher::IMMEDIATE_BYTES;
use super::params::MAX_OUT_PARTS;
use super::shader::MAX_STORAGE_BUFFERS;

const CHOICE: &str = "wgpu";

/// The adapters that may be used, the best first; at least one.
pub(super) async fn candidates(include_software: bool) -> Result<Vec<wgpu::Adapter>> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = Backends::PRIMARY;
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = adapters(&instance).await;
    if adapters.is_empty() {
        let hint = if cfg!(target_arch = "wasm32") {
            "the browser offers no WebGPU adapter"
        } else if cfg!(target_os = "linux") {
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
    if adapters.is_empty() {
        return Err(unavailable("only software adapters, which are slower than the CPU device".to_owned()));
    }
    Ok(adapters)
}

/// A device of an adapter. Its optional features are timestamps, immediates, pipeline caches and
/// those of cooperative matrices, where the adapter has them.
pub(super) async fn open(
    adapter: &wgpu::Adapter,
    max_binding_bytes: Option<u64>,
) -> Result<(wgpu::Device, wgpu::Queue, Option<Coop>)> {
    let coop = Coop::of(adapter);
    let mut optional = Features::TIMESTAMP_QUERY | Features::IMMEDIATES | Features::PIPELINE_CACHE;
    optional.set(coop::FEATURES, coop.is_some());
    let mut required_limits = limits(&adapter.limits(), max_binding_bytes);
    if adapter.features().contains(Features::IMMEDIATES) {
        required_limits.max_immediate_size = adapter.limits().max_immediate_size.min(IMMEDIATE_BYTES);
    }
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
    let (device, queue) = request.await.map_err(|error| unavailable(error.to_string()))?;
    Ok((device, queue, coop))
}

#[cfg(not(target_arch = "wasm32"))]
async fn adapters(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    instance.enumerate_adapters(Backends::PRIMARY).await
}

/// A browser lists no adapters; it picks one.
#[cfg(target_arch = "wasm32")]
async fn adapters(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    let power_preference = wgpu::PowerPreference::HighPerformance;
    let options = wgpu::RequestAdapterOptions { power_preference, ..Default::default() };
    instance.request_adapter(&options).await.into_iter().collect()
}

/// Storage buffers of a shader that has all bindings and each segment of its output in one.
const MOST_STORAGE_BUFFERS: u32 = MAX_STORAGE_BUFFERS + MAX_OUT_PARTS as u32 - 1;

/// WebGPU's default limits, which suffice for every shader, but buffers as large as the adapter
/// allows, and as many of them as spare copies.
fn limits(adapter: &Limits, max_binding_bytes: Option<u64>) -> Limits {
    let largest = adapter.max_storage_buffer_binding_size;
    let defaults = Limits::default();
    let most_buffers = adapter.max_storage_buffers_per_shader_stage.min(MOST_STORAGE_BUFFERS);
    Limits {
        max_storage_buffers_per_shader_stage: most_buffers.max(defaults.max_storage_buffers_per_shader_stage),
        max_storage_buffer_binding_size: max_binding_bytes.map_or(largest, |bytes| largest.min(bytes)),
        max_buffer_size: adapter.max_buffer_size,
        ..defaults
    }
}

/// Name, API and driver, as far as they are known: browsers hide most of it.
pub(super) fn name(info: &wgpu::AdapterInfo) -> String {
    let name = if info.name.is_empty() { "unnamed adapter" } else { &info.name };
    let driver = format!("{} {}", info.driver, info.driver_info);
    let api = format!("{:?}", info.backend);
    [name, &api, driver.trim()].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
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

pub(super) fn unavailable(why: String) -> Error {
    Error::DeviceUnavailable { device: CHOICE.to_owned(), why }
}
