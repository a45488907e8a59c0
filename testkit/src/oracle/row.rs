//! The attention of one query row.

/// An output row and the natural logarithm of the sum that normalised it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttendedRow {
    /// `head_dim` values.
    pub out: Vec<f64>,
    /// `ln Σ exp(score)`; -inf when no key was kept.
    pub lse: f64,
}

impl AttendedRow {
    /// The row that attends to nothing.
    pub(super) fn without_keys(head_dim: usize) -> Self {
        Self { out: vec![0.0; head_dim], lse: f64::NEG_INFINITY }
    }
}

/// Attends from `q` to the keys and values that start at the given places of `k` and `v`, each with its bias.
pub(super) fn attend(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    scale: f64,
    keys: impl Iterator<Item = (usize, f64)>,
) -> AttendedRow {
    let dim = q.len();
    let scored: Vec<(usize, f64)> =
        keys.map(|(start, bias)| (start, dot(q, &k[start..start + dim]) * scale + bias)).collect();
    // `f64::max` passes over NaN, so look for it first.
    if scored.iter().any(|&(_, score)| score.is_nan()) {
        return AttendedRow { out: vec![f64::NAN; dim], lse: f64::NAN };
    }
    let max = scored.iter().fold(f64::NEG_INFINITY, |max, &(_, score)| max.max(score));
    if max == f64::NEG_INFINITY {
        return AttendedRow::without_keys(dim);
    }
    let mut out = vec![0.0; dim];
    let mut sum = 0.0;
    for (start, score) in scored {
        let weight = (score - max).exp();
        sum += weight;
        for (out, &value) in out.iter_mut().zip(&v[start..start + dim]) {
            *out += weight * f64::from(value);
        }
    }
    for out in &mut out {
        *out /= sum;
    }
    AttendedRow { out, lse: max + sum.ln() }
}

/// `Σ aᵢ·bᵢ` in f64, in eight partial sums so that the compiler may use vector registers.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0f64; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 =
        a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_covers_chunks_and_remainder() {
        for len in [0, 1, 7, 8, 9, 20] {
            let a: Vec<f32> = (1..=len).map(|x| x as f32).collect();
            let expected: f64 = (1..=len).map(|x| (x * x) as f64).sum();
            assert_eq!(dot(&a, &a), expected, "length {len}");
        }
    }

    #[test]
    fn scores_of_minus_infinity_weigh_nothing() {
        let (k, v) = ([f32::NEG_INFINITY, 2.0], [5.0, 7.0]);
        let both = attend(&[1.0], &k, &v, 1.0, [(0, 0.0), (1, 0.0)].into_iter());
        assert_eq!(both, AttendedRow { out: vec![7.0], lse: 2.0 });
        let one = attend(&[1.0], &k, &v, 1.0, [(0, 0.0)].into_iter());
        assert_eq!(one, AttendedRow::without_keys(1));
        let infinite = attend(&[1.0], &k, &v, 1.0, [(1, f64::INFINITY)].into_iter());
        assert!(infinite.out[0].is_nan());
    }
}
