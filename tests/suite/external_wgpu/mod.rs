//! The application's own wgpu device, queue and buffers: computed on in place, recorded into its commands, refused by name.

mod application;
mod encode;
mod pipeline_cache;
mod refusals;
mod scratch;
mod segments;
mod tensors;

use super::trials::Trials;

pub fn register(trials: &mut Trials) {
    // Only wgpu devices have a counterpart that an application may own.
    if trials.device().wgpu().is_some() {
        tensors::register(trials);
        encode::register(trials);
        pipeline_cache::register(trials);
        refusals::register(trials);
        scratch::register(trials);
        segments::register(trials);
    }
}
