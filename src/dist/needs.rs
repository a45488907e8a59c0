//! What calls carry that not every mode can compute: [`ParallelNeeds`].

use std::fmt;

use super::digest::Digest;
use super::mode::{Mode, Outer};
use crate::error::{Error, Result};
use crate::score_modifiers::{ModifierSet, ScoreModifiers};

/// What the calls of a request carry beside `q`, `k` and `v`, as far as some modes cannot compute it. A
/// [plan](super::ParallelPlan) that is told leaves those modes out, and says why. Of modifiers their kinds count, not their values.
///
/// ```
/// use varlen_fa::ScoreModifiers;
/// use varlen_fa::dist::{Heads, Machine, Mode, ParallelNeeds, ParallelPlan, ShardedMeta, Shards};
/// use varlen_fa::{DType, KeyMask, alibi_slopes};
///
/// let meta = ShardedMeta::new(&KeyMask::all(1, 64)?, &Shards::equal(64, 2)?, 0)?;
/// let heads = Heads { num_heads: 8, num_kv_heads: 2, head_dim: 16, dtype: DType::F32 };
/// let modifiers = ScoreModifiers::new().with_alibi(alibi_slopes(8));
/// let needs = ParallelNeeds::new().with_modifiers(&modifiers);
/// let plan = ParallelPlan::new(&meta, &heads, needs, &Machine::CPU, None)?;
/// assert_eq!(plan.mode, Mode::Ulysses);
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ParallelNeeds {
    pub(super) bias: bool,
    pub(super) modifiers: ModifierSet,
    pub(super) lse: bool,
}

/// Names all of it.
impl fmt::Display for ParallelNeeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bias, modifiers: ModifierSet { softcap, alibi, sinks }, lse } = *self;
        let names = [(bias, BIAS), (softcap, "a soft cap"), (alibi, ALIBI), (sinks, SINKS), (lse, LSE)]
            .into_iter()
            .filter(|(is_there, _)| *is_there);
        let names: Vec<_> = names.map(|(_, name)| name).collect();
        f.write_str(&names.join(", "))
    }
}

const BIAS: &str = "a bias";
const ALIBI: &str = "ALiBi";
const SINKS: &str = "sinks";
const LSE: &str = "a log-sum-exp";

/// Why a mode cannot compute something that a call carries.
#[derive(Debug, Clone, Copy)]
pub(super) struct Refusal {
    argument: &'static str,
    what: &'static str,
    why: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl ParallelNeeds {
    /// Nothing: every mode computes it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With [a bias](super::ParallelCall::with_bias).
    #[must_use]
    pub fn with_bias(self) -> Self {
        Self { bias: true, ..self }
    }

    /// With modifiers of these kinds.
    #[must_use]
    pub fn with_modifiers(self, modifiers: &ScoreModifiers) -> Self {
        Self { modifiers: modifiers.set(), ..self }
    }

    /// With the log-sum-exp of each rank's rows.
    #[must_use]
    pub fn with_lse(self) -> Self {
        Self { lse: true, ..self }
    }

    /// Why so many ranks cannot compute it in a mode.
    pub(super) fn refusal(self, mode: Mode, world: usize) -> Option<Refusal> {
        let (ulysses, outer) = mode.levels(world);
        let (is_ring, is_one_group) = (outer == Outer::Ring, ulysses == world);
        let Self { bias, modifiers: ModifierSet { alibi, sinks, .. }, lse } = self;
        let refusals = [
            (
                lse && (is_ring || ulysses > 1),
                Refusal {
                    argument: "lse",
                    what: LSE,
                    why: "a rank has that of its own rows where queries stay and keys are not merged, as in gather",
                },
            ),
            (
                bias && is_ring,
                Refusal {
                    argument: "bias",
                    what: BIAS,
                    why: "a ring computes packed rows, which have none, other than gather and ulysses",
                },
            ),
            (
                sinks && is_ring,
                Refusal {
                    argument: "sinks",
                    what: SINKS,
                    why: "a ring would count them once for each part of the keys, other than gather and ulysses",
                },
            ),
            (
                alibi && (is_ring || !is_one_group),
                Refusal {
                    argument: "alibi",
                    what: ALIBI,
                    why: "it counts positions of the whole sequence, which one group of ranks has, as in ulysses",
                },
            ),
        ];
        refusals.into_iter().find_map(|(applies, refusal)| applies.then_some(refusal))
    }

    /// Fails if so many ranks cannot compute it in a mode.
    ///
    /// # Errors
    /// [`Error::NotApplicable`].
    pub(super) fn check(self, mode: Mode, world: usize) -> Result<()> {
        let Some(Refusal { argument, what, why }) = self.refusal(mode, world) else { return Ok(()) };
        Err(Error::NotApplicable { argument, got: format!("{what} in the mode {mode}"), why: why.to_owned() })
    }

    /// Adds up what ranks must agree on.
    pub(super) fn digest(self, digest: Digest) -> Digest {
        let Self { bias, modifiers: ModifierSet { softcap, alibi, sinks }, lse } = self;
        digest.bytes(&[bias, softcap, alibi, sinks, lse].map(u8::from))
    }
}
