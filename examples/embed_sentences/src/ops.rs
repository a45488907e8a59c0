//! The encoder's arithmetic apart from attention, in f32, on row-major matrices.

use rayon::prelude::*;

/// A linear layer: `y = x · Wᵀ + b`, with `W` as PyTorch stores it, `[outputs, inputs]`.
#[derive(Debug)]
pub struct Linear {
    weight: Vec<f32>,
    bias: Vec<f32>,
    inputs: usize,
}

impl Linear {
    /// A layer of `weight` `[bias.len(), inputs]`; `None` where the lengths disagree or are zero.
    pub fn new(weight: Vec<f32>, bias: Vec<f32>, inputs: usize) -> Option<Self> {
        let fits = inputs > 0 && !bias.is_empty() && Some(weight.len()) == inputs.checked_mul(bias.len());
        fits.then_some(Self { weight, bias, inputs })
    }

    /// Applies the layer to each whole row of `x`, `[rows, inputs]`; gives `[rows, outputs]`.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let (rows, inputs, outputs) = (x.len() / self.inputs, self.inputs, self.bias.len());
        let mut y = self.bias.repeat(rows);
        // SAFETY: the largest element offsets are those of y [rows, outputs], which `repeat` has just made, of the
        // first `rows` whole rows of x, and of the weight [outputs, inputs], whose length `new` checked. All three are
        // slices, so their extents fit in isize; y is borrowed exclusively and overlaps neither.
        unsafe {
            gemm::gemm(
                rows,
                outputs,
                inputs,
                y.as_mut_ptr(),
                1,
                outputs as isize,
                true,
                x.as_ptr(),
                1,
                inputs as isize,
                self.weight.as_ptr(),
                inputs as isize,
                1,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
        y
    }
}

/// Layer normalisation over the rows of a matrix.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    epsilon: f32,
}

impl LayerNorm {
    /// Normalises rows of `weight.len()` elements; `None` where the lengths disagree or are zero.
    pub fn new(weight: Vec<f32>, bias: Vec<f32>, epsilon: f32) -> Option<Self> {
        let fits = !weight.is_empty() && weight.len() == bias.len();
        fits.then_some(Self { weight, bias, epsilon })
    }

    /// Normalises each whole row of `x` in place.
    pub fn forward(&self, x: &mut [f32]) {
        let width = self.weight.len();
        x.par_chunks_exact_mut(width).for_each(|row| {
            let mean = row.iter().sum::<f32>() / width as f32;
            let variance = row.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / width as f32;
            let scale = (variance + self.epsilon).sqrt().recip();
            for ((value, weight), bias) in row.iter_mut().zip(&self.weight).zip(&self.bias) {
                *value = (*value - mean) * scale * weight + bias;
            }
        });
    }
}

/// Applies GELU in place, in its exact form `x/2 · (1 + erf(x/√2))`.
pub fn gelu(x: &mut [f32]) {
    x.par_chunks_mut(4096).for_each(|chunk| {
        for value in chunk {
            *value *= 0.5 * (1.0 + libm::erff(*value * std::f32::consts::FRAC_1_SQRT_2));
        }
    });
}

/// Adds `other` to `x`, element by element.
pub fn add(x: &mut [f32], other: &[f32]) {
    for (value, other) in x.iter_mut().zip(other) {
        *value += other;
    }
}

/// The mean of the first `lengths[b]` rows of each batch row `b` of `hidden`, `[lengths.len(), seq, width]`, scaled to
/// length 1: the sentence-transformers recipe. A batch row with no valid token gives zeros.
pub fn mean_pool(hidden: &[f32], lengths: &[usize], seq: usize, width: usize) -> Vec<f32> {
    let mut pooled = vec![0.0; lengths.len() * width];
    if seq * width == 0 {
        return pooled;
    }
    let rows = hidden.chunks_exact(seq * width).zip(lengths);
    for (mean, (tokens, &length)) in pooled.chunks_exact_mut(width).zip(rows) {
        for token in tokens.chunks_exact(width).take(length) {
            add(mean, token);
        }
        // The direction is the sum's, so the division by the token count cancels out.
        let norm = mean.iter().map(|value| value * value).sum::<f32>().sqrt();
        if norm > 0.0 {
            mean.iter_mut().for_each(|value| *value /= norm);
        }
    }
    pooled
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, Result};

    use super::*;

    fn layer_norm(weight: &[f32], bias: &[f32]) -> Result<LayerNorm> {
        LayerNorm::new(weight.to_vec(), bias.to_vec(), 1e-12).context("lengths disagree")
    }

    fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(actual.len(), expected.len());
        for (index, (a, e)) in actual.iter().zip(expected).enumerate() {
            assert!((a - e).abs() <= tolerance, "element {index}: {a}, expected {e}");
        }
    }

    #[test]
    fn linear_multiplies_by_the_transposed_weight_and_adds_the_bias() -> Result<()> {
        let layer =
            Linear::new(vec![1.0, 2.0, 3.0, -1.0, 0.5, 0.0], vec![10.0, 20.0], 3).context("lengths disagree")?;
        let y = layer.forward(&[1.0, 1.0, 1.0, 2.0, 0.0, -1.0]);
        assert_close(&y, &[16.0, 19.5, 9.0, 18.0], 1e-6);
        assert!(layer.forward(&[]).is_empty());
        Ok(())
    }

    #[test]
    fn linear_matches_a_plain_loop_at_odd_sizes() -> Result<()> {
        let (rows, inputs, outputs) = (17, 65, 33);
        let noise = |n: usize| (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect::<Vec<_>>();
        let (x, weight, bias) = (noise(rows * inputs), noise(outputs * inputs), noise(outputs));
        let expected = (0..rows * outputs)
            .map(|at| {
                let (row, output) = (at / outputs, at % outputs);
                (0..inputs).map(|i| x[row * inputs + i] * weight[output * inputs + i]).sum::<f32>() + bias[output]
            })
            .collect::<Vec<_>>();
        let layer = Linear::new(weight, bias, inputs).context("lengths disagree")?;
        assert_close(&layer.forward(&x), &expected, 1e-4);
        Ok(())
    }

    #[test]
    fn linear_and_layer_norm_refuse_lengths_that_disagree() {
        assert!(Linear::new(vec![0.0; 5], vec![0.0; 2], 3).is_none());
        assert!(Linear::new(vec![], vec![], 0).is_none());
        assert!(LayerNorm::new(vec![1.0; 3], vec![0.0; 2], 1e-12).is_none());
    }

    #[test]
    fn layer_norm_gives_each_row_mean_zero_and_variance_one() -> Result<()> {
        let norm = layer_norm(&[1.0; 4], &[0.0; 4])?;
        let mut x = [1.0, 2.0, 3.0, 4.0, -10.0, 10.0, -10.0, 10.0];
        norm.forward(&mut x);
        let (a, b) = (1.341_640_8, 0.447_213_6);
        assert_close(&x, &[-a, -b, b, a, -1.0, 1.0, -1.0, 1.0], 1e-6);

        let norm = layer_norm(&[2.0, 1.0], &[0.5, -0.5])?;
        let mut x = [3.0, 5.0];
        norm.forward(&mut x);
        assert_close(&x, &[-1.5, 0.5], 1e-6);
        Ok(())
    }

    #[test]
    fn layer_norm_of_a_constant_row_is_the_bias() -> Result<()> {
        let norm = layer_norm(&[3.0; 3], &[0.25; 3])?;
        let mut x = [7.0; 3];
        norm.forward(&mut x);
        assert_close(&x, &[0.25; 3], 0.0);
        Ok(())
    }

    #[test]
    fn gelu_takes_its_known_values() {
        let mut x = [0.0, 1.0, -1.0, 0.5, -2.0, 3.0, 10.0, -10.0];
        gelu(&mut x);
        let expected = [0.0, 0.841_344_7, -0.158_655_26, 0.345_731_23, -0.045_500_264, 2.995_950_2, 10.0, 0.0];
        assert_close(&x, &expected, 1e-6);
    }

    #[test]
    fn pooling_ignores_padding_and_gives_unit_vectors() {
        let hidden = [
            [[1.0, 0.0], [5.0, 8.0], [f32::NAN, f32::INFINITY]],
            [[0.0, -2.0], [f32::NAN, 1.0], [1e30, 1e30]],
            [[f32::NAN, 0.0], [1.0, 1.0], [1.0, 1.0]],
        ];
        let pooled = mean_pool(hidden.as_flattened().as_flattened(), &[2, 1, 0], 3, 2);
        assert_close(&pooled, &[0.6, 0.8, 0.0, -1.0, 0.0, 0.0], 1e-7);
        assert!(mean_pool(&[], &[], 0, 2).is_empty());
    }
}
