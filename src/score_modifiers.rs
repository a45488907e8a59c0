//! What happens to the scores of a call beside their scale and a bias: [`ScoreModifiers`].

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::DeviceCopies;
use crate::error::{Error, Result};

/// What happens to the scores between `q·k` and the softmax: a soft cap, ALiBi, attention sinks.
///
/// ```text
///    score = softmax_scale · q·k
///    score = softcap · tanh(score / softcap)              with a soft cap
///    score = score − slope[h] · |i + Sk − Sq − j|         with ALiBi, query i and key j
///    score = score + bias                                 with a bias
///    weight = exp(score) / (exp(sink[h]) + Σ exp(score))  the sink with attention sinks alone
/// ```
///
/// Positions are those of the padded tensors, or of the sequence for packed rows. Values of heads are plain numbers of the host:
/// they are checked once, and each device keeps its copy, so a call uploads nothing. Make the modifiers once for each layer of a
/// model, and give them to every call by [`AttentionMask::with_modifiers`](crate::AttentionMask::with_modifiers) or
/// [`VarlenOptions::with_modifiers`](crate::VarlenOptions::with_modifiers). Clones share the copies.
///
/// ```
/// use varlen_fa::{AttentionMask, ScoreModifiers, alibi_slopes};
///
/// let modifiers = ScoreModifiers::new().with_softcap(50.0).with_alibi(alibi_slopes(8));
/// let _ = AttentionMask::none().with_modifiers(&modifiers);
/// ```
#[derive(Debug, Clone, Default)]
pub struct ScoreModifiers {
    softcap: f32,
    slopes: Option<Arc<Vec<f32>>>,
    sinks: Option<Arc<Vec<f32>>>,
    derived: Arc<Derived>,
}

/// What is made of modifiers when it is first asked for, and kept.
#[derive(Debug, Default)]
struct Derived {
    /// Of the values of heads, and of the cap on some devices.
    copies: DeviceCopies,
    /// Those of some of the heads.
    of_heads: Mutex<Vec<OfHeads>>,
}

/// Query heads, and the modifiers of those alone.
type OfHeads = (Range<usize>, ScoreModifiers);

/// Which modifiers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct ModifierSet {
    pub softcap: bool,
    pub alibi: bool,
    pub sinks: bool,
}

impl ModifierSet {
    /// Every modifier.
    pub(crate) const ALL: Self = Self { softcap: true, alibi: true, sinks: true };

    /// Whether there is none.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

impl ScoreModifiers {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Scores stay between −`softcap` and `softcap`, by `softcap · tanh(score / softcap)`; 0 is no cap. As in flash-attention and
    /// Gemma 2, it comes after the softmax scale and before ALiBi and the bias. A score beyond f32 gives the cap.
    #[must_use]
    pub fn with_softcap(mut self, softcap: f32) -> Self {
        self.softcap = softcap;
        self.derived = Arc::default();
        self
    }

    /// Attention with linear biases (Press et al., 2021): the distance of query and key times the slope of the query head is taken
    /// from the score. One slope for each query head, `[H]`; [`alibi_slopes`] has the published ones. With causal ranges this is the
    /// one-sided form.
    #[must_use]
    pub fn with_alibi(mut self, slopes: impl Into<Vec<f32>>) -> Self {
        self.slopes = Some(Arc::new(slopes.into()));
        self.derived = Arc::default();
        self
    }

    /// Attention sinks (Xiao et al., 2023), as gpt-oss has them: each query head has one more score, `[H]`, without a value. It takes
    /// weight from the keys. A sink of −∞ takes none. A query that sees no key gives zeros all the same. The log-sum-exp
    /// has the sink, and is the sink for a query that sees no key.
    #[must_use]
    pub fn with_sinks(mut self, sinks: impl Into<Vec<f32>>) -> Self {
        self.sinks = Some(Arc::new(sinks.into()));
        self.derived = Arc::default();
        self
    }

    /// The soft cap; 0 if there is none.
    #[must_use]
    pub fn softcap(&self) -> f32 {
        self.softcap
    }

    /// The ALiBi slope of each query head.
    #[must_use]
    pub fn alibi(&self) -> Option<&[f32]> {
        self.slopes.as_deref().map(Vec::as_slice)
    }

    /// The sink of each query head.
    #[must_use]
    pub fn sinks(&self) -> Option<&[f32]> {
        self.sinks.as_deref().map(Vec::as_slice)
    }

    /// Those of some query heads, of values that were [checked](Self::check). They are kept, so that devices keep their copies too.
    pub(crate) fn of_heads(&self, heads: &Range<usize>) -> Self {
        let values = [&self.slopes, &self.sinks].into_iter().flatten();
        if values.clone().all(|values| *heads == (0..values.len())) {
            return self.clone();
        }
        let mut kept = self.derived.of_heads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = kept.iter().find(|(of, _)| of == heads) {
            return found.clone();
        }
        let cut =
            |values: &Option<Arc<Vec<f32>>>| values.as_ref().map(|values| Arc::new(values[heads.clone()].to_vec()));
        let made =
            Self { softcap: self.softcap, slopes: cut(&self.slopes), sinks: cut(&self.sinks), ..Self::default() };
        kept.push((heads.clone(), made.clone()));
        made
    }

    /// Which there are.
    pub(crate) fn set(&self) -> ModifierSet {
        ModifierSet { softcap: self.softcap != 0.0, alibi: self.alibi().is_some(), sinks: self.sinks().is_some() }
    }

    /// Checks the values for a call of as many query heads.
    ///
    /// # Errors
    /// [`Error::ScoreModifier`].
    pub(crate) fn check(&self, num_heads: usize) -> Result<()> {
        let refuse = |argument, expected: String, got: String| Err(Error::ScoreModifier { argument, expected, got });
        if !(self.softcap.is_finite() && self.softcap >= 0.0) {
            return refuse("softcap", "a finite number, 0 for none or more".to_owned(), self.softcap.to_string());
        }
        type Rule = (&'static str, fn(f32) -> bool);
        let of_slopes: Rule = ("finite numbers", f32::is_finite);
        let of_sinks: Rule = ("finite numbers or −∞", |sink| sink < f32::INFINITY);
        for (argument, values, (expected, is_good)) in
            [("alibi", self.alibi(), of_slopes), ("sinks", self.sinks(), of_sinks)]
        {
            let Some(values) = values else { continue };
            if values.len() != num_heads {
                return refuse(
                    argument,
                    format!("a number for each of {num_heads} query heads"),
                    values.len().to_string(),
                );
            }
            if let Some(head) = values.iter().position(|&value| !is_good(value)) {
                return refuse(argument, expected.to_owned(), format!("{} for head {head}", values[head]));
            }
        }
        Ok(())
    }

    /// `softmax_scale` over the soft cap, what `q·k` is multiplied by before the hyperbolic tangent. A quotient beyond f32 becomes the
    /// largest number: infinity times a score of 0 would be NaN.
    pub(crate) fn softcap_factor(&self, softmax_scale: f32) -> f32 {
        (f64::from(softmax_scale) / f64::from(self.softcap)).clamp(f32::MIN.into(), f32::MAX.into()) as f32
    }
}

#[cfg(any(feature = "wgpu", all(feature = "cuda", not(target_arch = "wasm32"))))]
impl ScoreModifiers {
    /// What GPU kernels read of a head, in units of base 2: slope, sink, soft cap, and one number that is not used. The slope is 0 where
    /// there are none, and the sink −∞.
    pub(crate) fn of_head(&self, head: usize) -> [f32; 4] {
        let of = |values: Option<&[f32]>| values.and_then(|values| values.get(head)).copied().map(in_log2);
        let (slope, sink) = (of(self.alibi()), of(self.sinks()));
        [slope.unwrap_or(0.0), sink.unwrap_or(f32::NEG_INFINITY), in_log2(self.softcap), 0.0]
    }

    /// What devices keep of the modifiers.
    pub(crate) fn copies(&self) -> &DeviceCopies {
        &self.derived.copies
    }
}

/// Times log₂e, −∞ or inside f32.
#[cfg(any(feature = "wgpu", all(feature = "cuda", not(target_arch = "wasm32"))))]
fn in_log2(value: f32) -> f32 {
    if value == f32::NEG_INFINITY {
        return value;
    }
    (f64::from(value) * std::f64::consts::LOG2_E).clamp(f32::MIN.into(), f32::MAX.into()) as f32
}

/// The slopes that ALiBi was published with: 2^(−8h/H) for heads h = 1 … H where H is a power of two; else those of the largest power
/// of two below it, followed by every other one of twice as many heads.
#[must_use]
pub fn alibi_slopes(num_heads: usize) -> Vec<f32> {
    let of_power = |count: usize| (1..=count).map(move |head| (-8.0 * head as f64 / count as f64).exp2() as f32);
    if num_heads == 0 {
        return Vec::new();
    }
    let power = 1 << num_heads.ilog2();
    of_power(power).chain(of_power(2 * power).step_by(2)).take(num_heads).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argument(modifiers: &ScoreModifiers) -> Option<&'static str> {
        match modifiers.check(2) {
            Err(Error::ScoreModifier { argument, .. }) => Some(argument),
            _ => None,
        }
    }

    #[test]
    fn bad_values_are_named() {
        let none = ScoreModifiers::new;
        for bad in [-1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(argument(&none().with_softcap(bad)), Some("softcap"), "{bad}");
        }
        for bad in [&[1.0][..], &[1.0; 3], &[1.0, f32::NAN], &[f32::NEG_INFINITY, 0.0]] {
            assert_eq!(argument(&none().with_alibi(bad)), Some("alibi"), "{bad:?}");
        }
        for bad in [&[1.0][..], &[], &[1.0, f32::NAN], &[f32::INFINITY, 0.0]] {
            assert_eq!(argument(&none().with_alibi([1.0, 2.0]).with_sinks(bad)), Some("sinks"), "{bad:?}");
        }
        for good in [none(), none().with_softcap(1e-3).with_alibi([-1.0, 0.5]).with_sinks([f32::NEG_INFINITY, 9e9])] {
            assert_eq!(good.check(2), Ok(()));
        }
    }

    #[test]
    fn published_slopes() {
        assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.031_25, 0.015_625, 0.007_812_5, 0.003_906_25]);
        assert_eq!(alibi_slopes(1), [1.0 / 256.0]);
        let six = alibi_slopes(6);
        assert_eq!(six[..4], [0.25, 0.0625, 0.015_625, 0.003_906_25]);
        assert_eq!(six[4..], [0.5, 0.125]);
        assert!(alibi_slopes(0).is_empty());
    }

    #[test]
    fn factors_stay_inside_f32() {
        let tiny = ScoreModifiers::new().with_softcap(1e-40);
        assert_eq!(tiny.softcap_factor(1.0), f32::MAX);
        assert_eq!(tiny.softcap_factor(-1.0), f32::MIN);
        assert_eq!(tiny.softcap_factor(0.0), 0.0);
    }
}
