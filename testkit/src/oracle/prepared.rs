//! The norm and the rotary embedding of one head.

/// The pairs of elements that turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// (0, 1), (2, 3), …
    Neighbours,
    /// (0, n), (1, n + 1), … of n pairs.
    Apart,
}

/// How far a head turns: one cosine and sine for each pair.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// Cosines of the pairs' angles.
    pub cos: &'a [f32],
    /// Sines of the pairs' angles.
    pub sin: &'a [f32],
    /// Which elements the pairs are.
    pub pairs: Pairs,
}

/// What is left of a head after RMSNorm, by a weight and an epsilon, and a rotation; each may be missing.
pub fn prepared_head(head: &[f32], norm: Option<(&[f32], f32)>, turn: Option<Turn<'_>>) -> Vec<f64> {
    let mut out: Vec<f64> = head.iter().copied().map(f64::from).collect();
    if let Some((weight, eps)) = norm {
        let power = out.iter().map(|x| x.powi(2)).sum::<f64>() / out.len() as f64;
        let root = (power + f64::from(eps)).sqrt();
        for (x, &weight) in out.iter_mut().zip(weight) {
            *x = *x / root * f64::from(weight);
        }
    }
    if let Some(Turn { cos, sin, pairs }) = turn {
        for pair in 0..cos.len() {
            let (re, im) = match pairs {
                Pairs::Neighbours => (2 * pair, 2 * pair + 1),
                Pairs::Apart => (pair, cos.len() + pair),
            };
            // (re + i·im)·(cos + i·sin)
            let (x, y, c, s) = (out[re], out[im], f64::from(cos[pair]), f64::from(sin[pair]));
            out[re] = x * c - y * s;
            out[im] = x * s + y * c;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_swaps_the_elements_of_each_pair() {
        let (cos, sin) = ([0.0; 2], [1.0; 2]);
        let turned =
            |pairs| prepared_head(&[1.0, 2.0, 3.0, 4.0, 9.0], None, Some(Turn { cos: &cos, sin: &sin, pairs }));
        assert_eq!(turned(Pairs::Neighbours), [-2.0, 1.0, -4.0, 3.0, 9.0]);
        assert_eq!(turned(Pairs::Apart), [-3.0, -4.0, 1.0, 2.0, 9.0]);
    }

    #[test]
    fn the_norm_makes_the_mean_square_one() {
        let out = prepared_head(&[3.0, 4.0, 0.0, 0.0], Some((&[1.0, 1.0, 1.0, 1.0], 0.0)), None);
        assert_eq!(out, [1.2, 1.6, 0.0, 0.0]);
        let out = prepared_head(&[0.0, 1.0], Some((&[7.0, 2.0], 0.5)), None);
        assert_eq!(out, [0.0, 2.0]);
    }
}
