//! Score modifiers in the tests' own form.

use varlen_fa::{Path, ScoreModifiers};
use varlen_fa_testkit::oracle::Modifiers;

/// What happens to the scores of a call.
#[derive(Debug, Clone, Default)]
pub struct Modifying {
    /// 0 for none.
    pub softcap: f32,
    /// `[H]`
    pub slopes: Option<Vec<f32>>,
    /// `[H]`
    pub sinks: Option<Vec<f32>>,
}

impl Modifying {
    /// The library's form.
    pub fn modifiers(&self) -> ScoreModifiers {
        let mut modifiers = ScoreModifiers::new().with_softcap(self.softcap);
        if let Some(slopes) = &self.slopes {
            modifiers = modifiers.with_alibi(slopes.as_slice());
        }
        if let Some(sinks) = &self.sinks {
            modifiers = modifiers.with_sinks(sinks.as_slice());
        }
        modifiers
    }

    /// The oracle's form.
    pub fn of_oracle(&self) -> Modifiers<'_> {
        Modifiers {
            softcap: (self.softcap != 0.0).then_some(f64::from(self.softcap)),
            slopes: self.slopes.as_deref(),
            sinks: self.sinks.as_deref(),
        }
    }

    /// What a path that packs padded rows takes of it.
    pub fn on(self, path: Option<Path>) -> Self {
        Self { slopes: self.slopes.filter(|_| path != Some(Path::Packed)), ..self }
    }
}
