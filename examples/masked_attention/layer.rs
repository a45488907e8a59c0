//! The layer around attention: normalisation and projections, in f32 on the host.

use anyhow::{Result, bail};
use rayon::prelude::*;

use super::product::add_product;
use varlen_fa_harness::arguments::Problem;
use varlen_fa_harness::random::standard_normal;

/// Random weights of one layer, and the hidden states that pass through it.
pub struct Layer {
    /// Width of the hidden states: query heads × head dimension, as in the models.
    width: usize,
    /// Width of the fused projection: (query + key + value heads) × head dimension.
    fused: usize,
    /// `[width, fused]`.
    qkv_weight: Vec<f32>,
    /// `[width, width]`.
    out_weight: Vec<f32>,
    /// `[tokens, width]`.
    hidden: Vec<f32>,
}

impl Layer {
    /// The same layer for the same problem. The problem's tensors have been allocated once, so its sizes are sound.
    pub fn random(problem: &Problem) -> Result<Self> {
        let width = problem.heads * problem.head_dim;
        let fused = (problem.heads + 2 * problem.kv_heads) * problem.head_dim;
        let tokens = problem.workload.mask.len();
        // And what a step has at once: hidden states twice, the projection as f32, in the tensor's type
        // and as q, k and v; outputs as NaN, twice as read back, and as f32.
        check_memory([[width, fused], [width, width], [tokens, 2 * width + 3 * fused + 4 * width]])?;
        // Of deviation 1/√width: every projected value is again of deviation 1.
        let weight = |seed, outputs| {
            let mut weight = standard_normal(seed, width * outputs);
            let scale = (width as f32).sqrt().recip();
            weight.par_iter_mut().for_each(|value| *value *= scale);
            weight
        };
        let (qkv_weight, out_weight) = (weight(1, fused), weight(2, width));
        Ok(Self { width, fused, qkv_weight, out_weight, hidden: standard_normal(3, tokens * width) })
    }

    /// The fused projection of the normalised hidden states, `[tokens, H + 2·Hkv, D]`: query heads, key heads, value heads.
    pub fn project_qkv(&self) -> Vec<f32> {
        let mut normalised = self.hidden.clone();
        normalised.par_chunks_mut(self.width).for_each(|row| {
            let mean_square = row.iter().map(|value| value * value).sum::<f32>() / row.len() as f32;
            let scale = (mean_square + 1e-6).sqrt().recip();
            row.iter_mut().for_each(|value| *value *= scale);
        });
        let mut projected = vec![0.0; self.hidden.len() / self.width * self.fused];
        add_product(&mut projected, &normalised, &self.qkv_weight, self.width, self.fused);
        projected
    }

    /// Adds the output projection of the attended rows, `[tokens, H, D]`, to the hidden states.
    pub fn project_out(&mut self, attended: &[f32]) {
        add_product(&mut self.hidden, attended, &self.out_weight, self.width, self.width);
    }
}

/// Fails with a message where the host cannot hold matrices of these sizes; a failed `vec!` would abort.
fn check_memory(sizes: [[usize; 2]; 3]) -> Result<()> {
    let elements = sizes.into_iter().try_fold(0_usize, |sum, [rows, columns]| {
        rows.checked_mul(columns).and_then(|product| sum.checked_add(product))
    });
    let is_there = |elements: usize| Vec::<f32>::new().try_reserve_exact(elements).is_ok();
    match elements {
        Some(elements) if is_there(elements) => Ok(()),
        _ => bail!("the host has no memory for a layer and a step with matrices of sizes {sizes:?}"),
    }
}
