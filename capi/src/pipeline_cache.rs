//! Pipeline caches of wgpu devices, or errors in a build without the feature `wgpu`.

use varlen::Device;

use crate::failure::{Failure, Result};
use crate::types::varlen_fa_status;

fn refuse(expected: &str, device: &Device) -> Failure {
    Failure::argument(varlen_fa_status::NotApplicable, "device", expected, device.name())
}

const WITH_CACHES: &str = "a wgpu device with pipeline caches";
const WITH_CACHE: &str = "a wgpu device with a pipeline cache (varlen_fa_pipeline_cache_load)";

/// Gives the device a cache that starts from data.
///
/// # Safety
/// The data is empty or what a cache gave.
#[cfg(feature = "wgpu")]
pub(crate) unsafe fn load(device: &Device, data: &[u8]) -> Result<()> {
    use varlen::wgpu::{Features, PipelineCacheDescriptor};
    let (wgpu, _) = device.wgpu().ok_or_else(|| refuse(WITH_CACHES, device))?;
    if !wgpu.features().contains(Features::PIPELINE_CACHE) {
        return Err(refuse(WITH_CACHES, device));
    }
    let data = Some(data).filter(|data| !data.is_empty());
    let descriptor = PipelineCacheDescriptor { label: Some("varlen-fa"), data, fallback: true };
    // SAFETY: by this function's contract. wgpu itself refuses data of another adapter or driver,
    // and with `fallback` starts an empty cache then.
    let cache = unsafe { wgpu.create_pipeline_cache(&descriptor) };
    Ok(device.set_pipeline_cache(&cache)?)
}

/// What the device's cache holds.
#[cfg(feature = "wgpu")]
pub(crate) fn data(device: &Device) -> Result<Vec<u8>> {
    let cache = device.pipeline_cache().ok_or_else(|| refuse(WITH_CACHE, device))?;
    Ok(cache.get_data().unwrap_or_default())
}

#[cfg(not(feature = "wgpu"))]
pub(crate) unsafe fn load(device: &Device, _data: &[u8]) -> Result<()> {
    Err(refuse(WITH_CACHES, device))
}

#[cfg(not(feature = "wgpu"))]
pub(crate) fn data(device: &Device) -> Result<Vec<u8>> {
    Err(refuse(WITH_CACHE, device))
}
