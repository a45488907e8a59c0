//! Score modifiers on the device: the values of heads, uploaded once and kept with them.

use std::sync::Arc;

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::kernels::params::ScoreModifierParams;
use crate::backends::cuda::launcher::Launcher;
use crate::call::op::Attention;
use crate::error::Result;
use crate::score_modifiers::ScoreModifiers;

/// What kernels read of each head.
#[derive(Debug)]
struct Heads(CudaBuffer);

/// Where a launch finds the modifiers. Holds them.
#[derive(Debug, Clone)]
pub struct PlacedModifiers {
    heads: Option<Arc<Heads>>,
    softcap: f32,
    softcap_factor: f32,
}

impl PlacedModifiers {
    /// Of a call; none if its scores are not modified.
    pub fn of(launcher: &Launcher, attention: &Attention<'_>) -> Result<Option<Self>> {
        let Some(modifiers) = attention.modifiers else { return Ok(None) };
        let [_, _, softcap, _] = modifiers.of_head(0);
        let softcap_factor = match modifiers.set().softcap {
            true => modifiers.softcap_factor(attention.problem.softmax_scale),
            false => 0.0,
        };
        Ok(Some(Self { heads: heads(launcher, modifiers)?, softcap, softcap_factor }))
    }

    /// What the kernels are given.
    pub fn params(&self) -> ScoreModifierParams {
        ScoreModifierParams {
            heads: self.heads.as_ref().map_or(0, |heads| heads.0.address()),
            softcap: self.softcap,
            softcap_factor: self.softcap_factor,
        }
    }
}

fn heads(launcher: &Launcher, modifiers: &ScoreModifiers) -> Result<Option<Arc<Heads>>> {
    // As many as the call has query heads, if there are any.
    let Some(values) = modifiers.alibi().or(modifiers.sinks()) else { return Ok(None) };
    let table: Vec<[f32; 4]> = (0..values.len()).map(|head| modifiers.of_head(head)).collect();
    let upload = || Ok(Heads(launcher.uploaded(bytemuck::cast_slice(&table))?));
    modifiers.copies().get_or_make(launcher.id, upload).map(Some)
}
