//! The ways to compute attention over a divided sequence: [`Mode`].

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::dtype::DType;
use crate::error::{Error, Result};

/// How ranks share the work of one attention call. `docs/sequence-parallel.md` has a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// Queries stay; every rank receives the keys and values of all. Any number of heads; the bits are those of one device.
    Gather,
    /// Every rank attends with some of the heads over the whole sequence: rows are exchanged for heads, and back. The number of
    /// ranks must divide the heads. The bits are those of one device.
    Ulysses,
    /// Queries stay; keys and values go round, and each rank merges what it gets from them by the log-sum-exp. Any number of heads,
    /// little memory; the last bits differ from one device.
    Ring,
    /// [`Ulysses`](Self::Ulysses) among `ulysses` consecutive ranks, [`Gather`](Self::Gather) among those groups.
    UlyssesGather {
        /// Ranks of a group.
        ulysses: usize,
    },
    /// [`Ulysses`](Self::Ulysses) among `ulysses` consecutive ranks, such as those of a host, [`Ring`](Self::Ring) among those groups.
    UlyssesRing {
        /// Ranks of a group.
        ulysses: usize,
    },
}

/// What happens among groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outer {
    Gather,
    Ring,
}

impl Mode {
    /// The name, without the size of groups.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gather => "gather",
            Self::Ulysses => "ulysses",
            Self::Ring => "ring",
            Self::UlyssesGather { .. } => "ulysses-gather",
            Self::UlyssesRing { .. } => "ulysses-ring",
        }
    }

    /// Ranks of a group, and what happens among groups.
    pub(super) fn levels(self, world: usize) -> (usize, Outer) {
        match self {
            Self::Gather => (1, Outer::Gather),
            Self::Ring => (1, Outer::Ring),
            Self::Ulysses => (world, Outer::Gather),
            Self::UlyssesGather { ulysses } => (ulysses, Outer::Gather),
            Self::UlyssesRing { ulysses } => (ulysses, Outer::Ring),
        }
    }

    /// Every mode that `world` ranks can take if the heads allow it.
    pub(super) fn all(world: usize) -> Vec<Self> {
        let mut modes = vec![Self::Gather, Self::Ulysses, Self::Ring];
        for ulysses in (2..world).filter(|ulysses| world.is_multiple_of(*ulysses)) {
            modes.extend([Self::UlyssesGather { ulysses }, Self::UlyssesRing { ulysses }]);
        }
        modes
    }

    /// Why ranks cannot take this mode with these heads.
    pub(super) fn refusal(self, world: usize, heads: &Heads) -> Option<String> {
        let (ulysses, _) = self.levels(world);
        if ulysses == 0 || !world.is_multiple_of(ulysses) {
            return Some(format!("groups of {ulysses} do not divide {world} ranks"));
        }
        let Heads { num_heads, num_kv_heads, .. } = *heads;
        if !num_heads.is_multiple_of(ulysses) {
            return Some(format!("{ulysses} ranks do not divide {num_heads} heads"));
        }
        if !num_kv_heads.is_multiple_of(ulysses) && !ulysses.is_multiple_of(num_kv_heads) {
            return Some(format!("{ulysses} ranks and {num_kv_heads} key/value heads do not divide one another"));
        }
        None
    }
}

/// The mode's name, and the size of groups after a colon.
impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UlyssesGather { ulysses } | Self::UlyssesRing { ulysses } => write!(f, "{}:{ulysses}", self.name()),
            _ => f.write_str(self.name()),
        }
    }
}

/// The form that [`Display`](fmt::Display) writes.
///
/// # Errors
/// [`Error::Sharding`] for other texts.
impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, ulysses) = match text.split_once(':') {
            Some((name, ulysses)) => (name, ulysses.parse().ok()),
            None => (text, None),
        };
        match (name, ulysses) {
            ("ulysses-gather", Some(ulysses)) => Ok(Self::UlyssesGather { ulysses }),
            ("ulysses-ring", Some(ulysses)) => Ok(Self::UlyssesRing { ulysses }),
            _ => {
                let found = [Self::Gather, Self::Ulysses, Self::Ring].into_iter().find(|mode| mode.name() == text);
                let expected = "gather, ulysses, ring, ulysses-gather:N or ulysses-ring:N, with N ranks a group";
                let (expected, got) = (expected.to_owned(), format!("{text:?}"));
                found.ok_or(Error::Sharding { argument: "mode", expected, got })
            }
        }
    }
}

/// What attention is computed of, beside the sequence: heads, their dimension, and the element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Heads of `q`, H.
    pub num_heads: usize,
    /// Heads of `k` and `v`, Hkv, which divides H.
    pub num_kv_heads: usize,
    /// Elements of a head, D.
    pub head_dim: usize,
    /// Element type.
    pub dtype: DType,
}

impl Heads {
    pub(super) fn check(&self) -> Result<()> {
        let &Self { num_heads, num_kv_heads, head_dim, .. } = self;
        if num_heads == 0 || num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::HeadsNotDivisible { num_heads, num_kv_heads });
        }
        if !(1..=512).contains(&head_dim) {
            return Err(Error::HeadDim { got: head_dim });
        }
        Ok(())
    }

    /// Heads of each rank of a group of `ulysses`.
    pub(super) fn of_each(&self, ulysses: usize) -> [usize; 2] {
        [self.num_heads / ulysses, (self.num_kv_heads / ulysses).max(1)]
    }

    /// Why the heads of a rank of a group cannot be computed in so many chunks.
    pub(super) fn chunks_refusal(&self, ulysses: usize, chunks: usize) -> Option<String> {
        let [_, kv_heads] = self.of_each(ulysses);
        let fits = (1..=kv_heads).contains(&chunks);
        (!fits).then(|| format!("a rank's {kv_heads} key/value heads cannot be divided into {chunks} chunks"))
    }

    /// The heads of the `at`-th rank of a group: those of queries, and those of keys that they read.
    pub(super) fn of(&self, at: usize, ulysses: usize) -> [Range<usize>; 2] {
        let [heads, kv_heads] = self.of_each(ulysses);
        // Several ranks may share a key/value head.
        let first = at * self.num_kv_heads / ulysses;
        [at * heads..(at + 1) * heads, first..first + kv_heads]
    }

    /// One of so many chunks of a rank's heads: those of queries, and those of the keys that they read, counted among the rank's
    /// own. Chunks are as even as can be.
    pub(super) fn chunk(&self, ulysses: usize, (at, chunks): (usize, usize)) -> [Range<usize>; 2] {
        let [_, kv_heads] = self.of_each(ulysses);
        self.with_queries(ulysses, at * kv_heads / chunks..(at + 1) * kv_heads / chunks)
    }

    /// The same, but each chunk has about two and a half times the heads of the one before: nothing hides what the first one waits
    /// for, and each hides what the next one waits for.
    pub(super) fn growing_chunk(&self, ulysses: usize, (at, chunks): (usize, usize)) -> [Range<usize>; 2] {
        // (g^at - 1) / (g^chunks - 1), without large numbers.
        const GROWTH: f64 = 2.5;
        let power = |exponent: usize| GROWTH.powf(exponent as f64 - chunks as f64);
        let share = |at| (power(at) - power(0)) / (1.0 - power(0));
        let [_, kv_heads] = self.of_each(ulysses);
        // A chunk has a head at least.
        let start = |at| ((kv_heads as f64 * share(at)).round() as usize).clamp(at, kv_heads + at - chunks);
        self.with_queries(ulysses, start(at)..start(at + 1))
    }

    /// Some of a rank's key/value heads, after the query heads that read them.
    fn with_queries(&self, ulysses: usize, kv: Range<usize>) -> [Range<usize>; 2] {
        let [heads, kv_heads] = self.of_each(ulysses);
        let group = heads / kv_heads;
        [kv.start * group..kv.end * group, kv]
    }

    /// Bytes of one row of so many heads.
    pub(super) fn row_bytes(&self, heads: usize) -> u64 {
        heads as u64 * self.head_dim as u64 * self.dtype.size() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(num_heads: usize, num_kv_heads: usize) -> Heads {
        Heads { num_heads, num_kv_heads, head_dim: 64, dtype: DType::F32 }
    }

    /// Each query head reads the key head that it reads on one device.
    #[test]
    fn ranks_have_the_key_heads_of_their_query_heads() {
        for (num_heads, num_kv_heads, ulysses) in [(8, 8, 4), (8, 4, 2), (8, 2, 4), (8, 1, 8), (12, 6, 3), (24, 4, 8)] {
            let all = heads(num_heads, num_kv_heads);
            assert_eq!(Mode::Ulysses.refusal(ulysses, &all), None);
            for at in 0..ulysses {
                let [q, kv] = all.of(at, ulysses);
                for (local, head) in q.clone().enumerate() {
                    let expected = head / (num_heads / num_kv_heads);
                    assert_eq!(kv.start + local / (q.len() / kv.len()), expected, "{num_heads} {num_kv_heads} {at}");
                }
            }
        }
    }

    /// Chunks follow one another, none is empty, and each has whole key heads.
    #[test]
    fn chunks_share_out_all_heads() {
        for kv_heads in 1..40 {
            let all = heads(3 * kv_heads, kv_heads);
            for chunks in 1..=kv_heads {
                assert_eq!(all.chunks_refusal(1, chunks), None);
                for chunk in [Heads::chunk, Heads::growing_chunk] {
                    let mut next = 0;
                    for at in 0..chunks {
                        let [q, kv] = chunk(&all, 1, (at, chunks));
                        assert_eq!((kv.start, q.start, q.end), (next, 3 * kv.start, 3 * kv.end), "{at} of {chunks}");
                        assert!(!kv.is_empty(), "{at} of {chunks}, {kv_heads} heads");
                        next = kv.end;
                    }
                    assert_eq!(next, kv_heads);
                }
            }
            assert!(all.chunks_refusal(1, 0).is_some() && all.chunks_refusal(1, kv_heads + 1).is_some());
        }
        let sizes = [0, 1, 2].map(|at| heads(24, 24).growing_chunk(1, (at, 3))[1].len());
        assert_eq!(sizes, [2, 7, 15]);
    }

    #[test]
    fn texts_are_read_as_they_are_written() {
        for mode in Mode::all(6) {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        for text in ["", "Gather", "ring:2", "ulysses-ring", "ulysses-ring:", "ulysses-gather:-1", "gather:"] {
            assert!(matches!(text.parse::<Mode>(), Err(Error::Sharding { argument: "mode", .. })), "{text}");
        }
    }

    #[test]
    fn heads_that_do_not_divide_are_refused_with_the_reason() {
        let why = |mode: Mode, world, heads| mode.refusal(world, &heads).unwrap_or_default();
        assert_eq!(why(Mode::Ulysses, 4, heads(6, 6)), "4 ranks do not divide 6 heads");
        assert_eq!(why(Mode::Ulysses, 4, heads(24, 6)), "4 ranks and 6 key/value heads do not divide one another");
        assert_eq!(why(Mode::UlyssesRing { ulysses: 3 }, 4, heads(6, 6)), "groups of 3 do not divide 4 ranks");
        assert_eq!(why(Mode::UlyssesRing { ulysses: 0 }, 4, heads(6, 6)), "groups of 0 do not divide 4 ranks");
        assert_eq!(why(Mode::Gather, 5, heads(7, 1)), "");
    }
}
