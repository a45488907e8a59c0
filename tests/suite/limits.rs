//! WebGPU's default limits and no optional feature: the least that a wgpu device may have, whatever its adapter could give.

use std::env;

use anyhow::{Result, bail};
use varlen_fa::{Config, Device};

/// `webgpu`: every wgpu device of the suite has these limits.
const LIMITS: &str = "VARLEN_FA_TEST_LIMITS";

/// Whether the suite runs at these limits.
pub fn are_least() -> Result<bool> {
    match env::var(LIMITS).as_deref() {
        Err(_) | Ok("") => Ok(false),
        Ok("webgpu") => Ok(true),
        Ok(other) => bail!("{LIMITS}: expected webgpu, got {other:?}"),
    }
}

/// A device as the suite's own one, with other settings.
pub fn open(config: Config) -> Result<Device> {
    #[cfg(feature = "wgpu")]
    if config.device == varlen_fa::DeviceChoice::Wgpu && are_least()? {
        return least(config);
    }
    Ok(Device::with_config(config)?)
}

/// The best wgpu adapter, opened with wgpu's own means, which check that nothing more is used.
#[cfg(feature = "wgpu")]
fn least(config: Config) -> Result<Device> {
    use varlen_fa::wgpu;

    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let power_preference = wgpu::PowerPreference::HighPerformance;
    let options = wgpu::RequestAdapterOptions { power_preference, ..Default::default() };
    let adapter = pollster::block_on(instance.request_adapter(&options))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        label: Some("WebGPU's default limits"),
        required_features: wgpu::Features::empty(),
        required_limits: wgpu::Limits::default(),
        ..Default::default()
    }))?;
    anyhow::ensure!(device.limits() == wgpu::Limits::default(), "the device has other limits: {:?}", device.limits());
    anyhow::ensure!(device.features().is_empty(), "the device has features: {:?}", device.features());
    Ok(Device::from_wgpu(&device, &queue, config)?)
}
