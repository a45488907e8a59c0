//! A pipeline cache of the application's: given to a device, kept for the next, refused if it is another device's.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::wgpu::{self, PipelineCacheDescriptor};
use varlen_fa::{AttentionMask, DType, Device, Error, MaskedAttention};

use super::super::trials::Trials;
use super::application::{Application, Case, InPlace};

pub fn register(trials: &mut Trials) {
    trials.once("external_wgpu/pipeline_cache", pipeline_cache);
}

fn cache(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let descriptor = PipelineCacheDescriptor { label: None, data, fallback: true };
    // SAFETY: the data, if any, is what another cache on the same adapter gave.
    unsafe { device.create_pipeline_cache(&descriptor) }
}

fn pipeline_cache(own: &Device) -> Result<Completion> {
    let features = wgpu::Features::PIPELINE_CACHE;
    if !Application::new(own)?.offers(features) {
        return Ok(Completion::ignored_with(format!("{} has no pipeline caches", own.name())));
    }
    let (ours, _) = own.wgpu().context("no handles")?;
    // The suite may open its device without features.
    if ours.features().contains(features) {
        own.set_pipeline_cache(&cache(ours, None)).context("on a device of ours")?;
    }

    let case = Case::new(DType::F32, 5)?;
    let mask = AttentionMask::varlen(&case.meta);
    let expected = case.expected_by(&MaskedAttention::new(own), mask)?;
    let mut data: Option<Vec<u8>> = None;
    for _ in 0..2 {
        let application = Application::with(own, features, wgpu::Limits::default())?;
        let device = application.attach()?;
        let cache = cache(&application.device, data.as_deref());
        ensure!(device.pipeline_cache().is_none(), "a device that was made a moment ago has a cache");
        device.set_pipeline_cache(&cache)?;
        ensure!(device.pipeline_cache().is_some_and(|set| set == cache), "another cache than was set");
        let before = cache.get_data().context("a cache without data")?;
        let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
        let ([q, k, v], out) = tensors.call();
        MaskedAttention::new(&device).forward_into(q, k, v, mask, out)?;
        ensure!(tensors.output(&application)? == expected, "other bits");
        let after = cache.get_data().context("a cache without data")?;
        // Software adapters keep no code in it.
        ensure!(after.len() >= before.len(), "{} bytes, then {}", before.len(), after.len());
        println!("{} bytes, then {}", before.len(), after.len());
        data = Some(after);
        application.expect_quiet()?;
    }

    let application = Application::with(own, features, wgpu::Limits::default())?;
    let device = application.attach()?;
    let (sibling, _) = application.sibling_with(features)?;
    let stranger = Application::with(own, features, wgpu::Limits::default())?;
    for (whose, other) in [("a sibling's", &sibling), ("another instance's", &stranger.device)] {
        let refused = device.set_pipeline_cache(&cache(other, None));
        ensure!(matches!(refused, Err(Error::Backend { .. })), "{whose} cache: {refused:?}");
    }
    // The device works on, without it.
    let mut tensors = InPlace::new(&application, &device, &case, 0, 0)?;
    let ([q, k, v], out) = tensors.call();
    MaskedAttention::new(&device).forward_into(q, k, v, mask, out)?;
    ensure!(tensors.output(&application)? == expected, "other bits after a refusal");
    application.expect_quiet()?;
    Ok(Completion::Completed)
}
