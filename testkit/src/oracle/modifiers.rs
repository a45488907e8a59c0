//! What happens to scores beside their scale and a bias, head by head.

use super::error::{OracleError, check_len};

/// A soft cap, ALiBi and attention sinks; none of them by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Modifiers<'a> {
    /// `c`: a score `s` becomes `c · tanh(s / c)`.
    pub softcap: Option<f64>,
    /// `[heads]`: the distance of query and key times this is taken from a capped score.
    pub slopes: Option<&'a [f32]>,
    /// `[heads]`: a score beside those of the keys, whose value is 0; -inf is none.
    pub sinks: Option<&'a [f32]>,
}

impl Modifiers<'_> {
    pub(super) fn check(&self, heads: usize) -> Result<(), OracleError> {
        let named = [("slopes", self.slopes), ("sinks", self.sinks)];
        named.into_iter().try_for_each(|(name, values)| values.map_or(Ok(()), |v| check_len(name, &[heads], v.len())))
    }

    /// A score after the cap.
    pub fn capped(&self, score: f64) -> f64 {
        self.softcap.map_or(score, |cap| cap * (score / cap).tanh())
    }

    /// What a head adds to the score of query `i` and key `j` of a row with as many of each. The last query is level with
    /// the last key.
    pub fn alibi(&self, head: usize, [i, j]: [usize; 2], [queries, keys]: [usize; 2]) -> f64 {
        let (from_last_query, from_last_key) = ((queries - 1 - i) as f64, (keys - 1 - j) as f64);
        self.slopes.map_or(0.0, |slopes| -f64::from(slopes[head]) * (from_last_query - from_last_key).abs())
    }

    /// The sink of a head.
    pub fn sink(&self, head: usize) -> f64 {
        self.sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]))
    }
}
