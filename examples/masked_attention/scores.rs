//! What happens to scores: the options, the library's modifiers, and the oracle's.

use std::fmt;

use clap::Args;
use varlen_fa::{ScoreModifiers, alibi_slopes};
use varlen_fa_testkit::oracle::Modifiers;

/// Score modifiers; a cap comes before ALiBi.
#[derive(Debug, Clone, Copy, Args)]
pub struct Scores {
    /// Scores become X · tanh(score / X); 0 is no cap
    #[arg(long, value_name = "X", default_value = "0")]
    softcap: f32,
    /// The distance of query and key times the head's published slope is taken from scores
    #[arg(long)]
    alibi: bool,
}

impl Scores {
    /// The library's form of it.
    pub fn modifiers(&self, heads: usize) -> ScoreModifiers {
        let modifiers = ScoreModifiers::new().with_softcap(self.softcap);
        if self.alibi { modifiers.with_alibi(alibi_slopes(heads)) } else { modifiers }
    }

    /// The slopes of the heads, in this program's own words; none without ALiBi.
    pub fn slopes(&self, heads: usize) -> Option<Vec<f32>> {
        let power = heads.checked_ilog2().map_or(0, |log| 1 << log);
        // Of the heads beyond a power of two: every other slope of twice as many heads.
        let exponent = |head: usize| match head {
            head if head < power => (head + 1) as f64 / power as f64,
            head => (2 * (head - power) + 1) as f64 / (2 * power) as f64,
        };
        self.alibi.then(|| (0..heads).map(|head| 2f64.powf(-8.0 * exponent(head)) as f32).collect())
    }

    /// The oracle's form of it.
    pub fn of_oracle<'a>(&self, slopes: Option<&'a [f32]>) -> Modifiers<'a> {
        let softcap = (self.softcap != 0.0).then_some(f64::from(self.softcap));
        Modifiers { softcap, slopes, sinks: None }
    }
}

/// "scaled", and what else happens to them.
impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("scaled")?;
        if self.softcap != 0.0 {
            write!(f, ", capped at {}", self.softcap)?;
        }
        if self.alibi {
            f.write_str(", ALiBi")?;
        }
        Ok(())
    }
}
