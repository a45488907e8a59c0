//! The attention of one query row.

use super::modifiers::Modifiers;

/// An output row and the natural logarithm of the sum that normalised it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttendedRow {
    /// `head_dim` values.
    pub out: Vec<f64>,
    /// `ln Σ exp(score)`, the sink's score among them; -inf when no key was kept and there is no sink.
    pub lse: f64,
    /// Whether some key was kept.
    pub sees_keys: bool,
}

impl AttendedRow {
    /// The row that attends to nothing.
    pub(super) fn without_keys(head_dim: usize) -> Self {
        Self { out: vec![0.0; head_dim], lse: f64::NEG_INFINITY, sees_keys: false }
    }
}

/// Attends from `q`, of a head, to the keys and values that start at the given places of `k` and `v`, each with what is added to
/// its score.
pub(super) fn attend(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    scale: f64,
    (modifiers, head): (&Modifiers<'_>, usize),
    keys: impl Iterator<Item = (usize, f64)>,
) -> AttendedRow {
    let dim = q.len();
    let scored: Vec<(usize, f64)> =
        keys.map(|(start, added)| (start, modifiers.capped(dot(q, &k[start..start + dim]) * scale) + added)).collect();
    // `f64::max` passes over NaN, so look for it first.
    if scored.iter().any(|&(_, score)| score.is_nan()) {
        return AttendedRow { out: vec![f64::NAN; dim], lse: f64::NAN, sees_keys: true };
    }
    let sink = modifiers.sink(head);
    let max = scored.iter().fold(f64::NEG_INFINITY, |max, &(_, score)| max.max(score));
    if max == f64::NEG_INFINITY {
        return AttendedRow { lse: sink, ..AttendedRow::without_keys(dim) };
    }
    let max = max.max(sink);
    let mut out = vec![0.0; dim];
    let mut sum = (sink - max).exp();
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
    AttendedRow { out, lse: max + sum.ln(), sees_keys: true }
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
        let plain = (&Modifiers::default(), 0);
        let both = attend(&[1.0], &k, &v, 1.0, plain, [(0, 0.0), (1, 0.0)].into_iter());
        assert_eq!(both, AttendedRow { out: vec![7.0], lse: 2.0, sees_keys: true });
        let one = attend(&[1.0], &k, &v, 1.0, plain, [(0, 0.0)].into_iter());
        assert_eq!(one, AttendedRow::without_keys(1));
        let infinite = attend(&[1.0], &k, &v, 1.0, plain, [(1, f64::INFINITY)].into_iter());
        assert!(infinite.out[0].is_nan());
    }
}
