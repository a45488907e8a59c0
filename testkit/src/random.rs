//! Seeded inputs, the same on every platform.

use half::{bf16, f16};
use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

use crate::precision::Precision;

/// A probability that is none.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("p: expected a probability in 0..=1, got {got}")]
pub struct ProbabilityError {
    /// The value given.
    pub got: f64,
}

/// The generator behind every function here: ChaCha with 8 rounds, keyed by `seed`, on stream `stream`.
///
/// The key is laid out here, not by `seed_from_u64`, whose expansion a release of rand may change.
pub fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(stream);
    rng
}

/// `len` standard normal values. A longer vector of the same seed starts with the shorter one.
pub fn normal(seed: u64, len: usize) -> Vec<f32> {
    normal_stream(seed, 0, len)
}

/// `len` standard normal values from one of a seed's independent streams (say 0, 1, 2 for q, k, v).
pub fn normal_stream(seed: u64, stream: u64, len: usize) -> Vec<f32> {
    StandardNormal.sample_iter(generator(seed, stream)).take(len).collect()
}

/// [`normal_stream`] rounded to `precision`: what an oracle is given to match tensors of that type.
pub fn normal_rounded(seed: u64, stream: u64, len: usize, precision: Precision) -> Vec<f32> {
    let mut values = normal_stream(seed, stream, len);
    precision.round_all(&mut values);
    values
}

/// The values in f16, rounded to nearest even; exact for values already rounded to f16.
pub fn to_f16(values: &[f32]) -> Vec<f16> {
    values.iter().map(|&value| f16::from_f32(value)).collect()
}

/// The values in bf16, rounded to nearest even; exact for values already rounded to bf16.
pub fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

/// `len` draws that are true with probability `p`.
///
/// # Errors
/// [`ProbabilityError`] if `p` is not in `0..=1`.
pub fn bernoulli_mask(seed: u64, len: usize, p: f64) -> Result<Vec<bool>, ProbabilityError> {
    if !(0.0..=1.0).contains(&p) {
        return Err(ProbabilityError { got: p });
    }
    let mut rng = generator(seed, 0);
    // Values are below 1, so p = 0 is never and p = 1 always true.
    Ok((0..len).map(|_| unit(&mut rng) < p).collect())
}

/// Draws of one seed, one after the other, for random calls.
#[derive(Debug)]
pub struct Draws(ChaCha8Rng);

impl Draws {
    /// Those of one of a seed's independent streams.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(generator(seed, stream))
    }

    /// A value in `0..bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        below(&mut self.0, bound)
    }

    /// True once in `count` times.
    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    /// One of the values; none of none.
    pub fn pick<T: Copy>(&mut self, values: &[T]) -> Option<T> {
        values.get(self.below(values.len())).copied()
    }

    /// A number in `[from, to)`.
    pub fn uniform(&mut self, from: f64, to: f64) -> f64 {
        from + (to - from) * unit(&mut self.0)
    }
}

/// 53 random bits: a uniform value in [0, 1) exactly.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 * 2f64.powi(-53)
}

/// A value in `0..bound` (0 if `bound` is 0); its bias, at most `bound` in 2^64, does not matter for choosing samples.
pub(crate) fn below(rng: &mut ChaCha8Rng, bound: usize) -> usize {
    ((u128::from(rng.next_u64()) * bound as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_chacha8() {
        // The published keystream of ChaCha8 under an all-zero key and nonce.
        let mut rng = generator(0, 0);
        let words = [rng.next_u64(), rng.next_u64()].map(u64::to_le_bytes);
        assert_eq!(words[0], [0x3e, 0x00, 0xef, 0x2f, 0x89, 0x5f, 0x40, 0xd6]);
        assert_eq!(words[1], [0x7f, 0x5b, 0xb8, 0xe8, 0x1f, 0x09, 0xa5, 0xa1]);
    }

    #[test]
    fn values_are_pinned() {
        // These must never change: results recorded elsewhere are of these inputs.
        let bits: Vec<u32> = normal(0, 4).iter().map(|value| value.to_bits()).collect();
        assert_eq!(bits, [0x3fb0_5862, 0x3ecf_899e, 0xbf99_1f57, 0xbff7_af9f], "{bits:#x?}");
        let mask = bernoulli_mask(0, 16, 0.5).unwrap();
        let word = mask.iter().rev().fold(0u16, |word, &keep| (word << 1) | u16::from(keep));
        assert_eq!(word, 0x29fc, "{word:#x}");
        // A sum over enough values to have met the tails.
        let sum = normal(0, 1 << 16).iter().fold(0u32, |sum, value| sum.rotate_left(5) ^ value.to_bits());
        assert_eq!(sum, 0x9cc6_4f37, "{sum:#x}");
    }

    #[test]
    fn moments_are_those_of_a_standard_normal() {
        let values = normal(3, 100_000);
        let count = values.len() as f64;
        let moment = |power: i32| values.iter().map(|&x| f64::from(x).powi(power)).sum::<f64>() / count;
        assert!(moment(1).abs() < 0.02, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.15, "fourth moment {}", moment(4));
    }

    #[test]
    fn seeds_and_streams_differ_and_prefixes_agree() {
        assert_eq!(normal(7, 100)[..10], normal(7, 10)[..]);
        assert_ne!(normal(7, 10), normal(8, 10));
        assert_ne!(normal_stream(7, 1, 10), normal_stream(7, 2, 10));
        assert_eq!(normal_stream(7, 0, 10), normal(7, 10));
    }

    #[test]
    fn rounded_values_convert_without_loss() {
        let f16s = normal_rounded(1, 0, 1000, Precision::F16);
        assert!(to_f16(&f16s).iter().zip(&f16s).all(|(half, &value)| half.to_f32() == value));
        let bf16s = normal_rounded(1, 0, 1000, Precision::Bf16);
        assert!(to_bf16(&bf16s).iter().zip(&bf16s).all(|(half, &value)| half.to_f32() == value));
        assert_ne!(f16s, bf16s);
    }

    #[test]
    fn bernoulli_keeps_its_share_and_its_ends() {
        assert!(bernoulli_mask(1, 1000, 0.0).unwrap().iter().all(|&keep| !keep));
        assert!(bernoulli_mask(1, 1000, 1.0).unwrap().iter().all(|&keep| keep));
        let kept = bernoulli_mask(1, 100_000, 0.3).unwrap().iter().filter(|&&keep| keep).count();
        assert!(kept.abs_diff(30_000) < 1000, "{kept}");
        for p in [-0.1, 1.1, f64::NAN] {
            let error = bernoulli_mask(1, 1, p).unwrap_err();
            assert!(error.to_string().contains(&p.to_string()), "{error}");
        }
    }

    #[test]
    fn draws_stay_in_their_bounds_and_follow_their_seed() {
        let draw = |seed| {
            let mut draws = Draws::new(seed, 1);
            [draws.below(1000) as f64, draws.uniform(-2.0, 3.0), f64::from(draws.pick(&[5, 6, 7]).unwrap())]
        };
        assert_eq!(draw(4), draw(4));
        assert_ne!(draw(4), draw(5));
        let mut draws = Draws::new(0, 0);
        let uniform: Vec<f64> = (0..1000).map(|_| draws.uniform(-2.0, 3.0)).collect();
        assert!(uniform.iter().all(|value| (-2.0..3.0).contains(value)));
        assert!(uniform.iter().any(|&value| value < -1.5) && uniform.iter().any(|&value| value > 2.5));
        let sixes = (0..1000).filter(|_| draws.one_in(6)).count();
        assert!((100..250).contains(&sixes), "{sixes}");
        assert_eq!(draws.pick::<u8>(&[]), None);
    }

    #[test]
    fn below_stays_below() {
        let mut rng = generator(0, 0);
        let mut seen = [0usize; 5];
        for _ in 0..1000 {
            seen[below(&mut rng, 5)] += 1;
        }
        assert!(seen.iter().all(|&count| count > 100), "{seen:?}");
        assert_eq!(below(&mut rng, 0), 0);
    }
}
