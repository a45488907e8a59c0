//! Which keys a query sees beside the mask of tokens: the options, the library's ranges, and the oracle's booleans.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::Args;
use varlen_fa::KeyRanges;
use varlen_fa_testkit::Workload;

/// Ranges of keys; both options together are what both allow.
#[derive(Debug, Clone, Copy, Args)]
pub struct SeenKeys {
    /// Each query sees the keys up to its own place
    #[arg(long)]
    causal: bool,
    /// Each query sees L keys before its own place and R keys after it; -1 is no limit
    #[arg(long, value_name = "L,R", allow_hyphen_values = true)]
    window: Option<Window>,
}

/// Keys before and after a query; `None` is no limit.
#[derive(Debug, Clone, Copy)]
struct Window {
    left: Option<usize>,
    right: Option<usize>,
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |text: &str| match text {
            "-1" => Some(None),
            number => number.parse().ok().map(Some),
        };
        text.split_once(',')
            .and_then(|(left, right)| Some(Self { left: side(left)?, right: side(right)? }))
            .ok_or_else(|| format!("expected two numbers of keys as in 64,64, or -1 for no limit, got {text:?}"))
    }
}

impl SeenKeys {
    /// The library's form of it; none where every query sees every key.
    pub fn ranges(&self, workload: &Workload) -> Result<Option<KeyRanges>> {
        let of = [workload.batch, workload.seq, workload.seq];
        let causal = self.causal.then(|| KeyRanges::causal(of)).transpose()?;
        let window = self.window.map(|Window { left, right }| KeyRanges::window(of, left, right)).transpose()?;
        Ok(match (causal, window) {
            (Some(causal), Some(window)) => Some(causal.intersect(&window)?),
            (causal, window) => causal.or(window),
        })
    }

    /// First and last key that query i of `seq` sees, in this program's own words.
    fn ends(&self, i: usize, seq: usize) -> [usize; 2] {
        let Window { left, right } = self.window.unwrap_or(Window { left: None, right: None });
        let first = left.map_or(0, |left| i - left.min(i));
        let last = right.map_or(seq - 1, |right| if right < seq - i { i + right } else { seq - 1 });
        [first, if self.causal { last.min(i) } else { last }]
    }

    /// `[B, S, S]`, as the oracle takes it; none where every query sees every key.
    pub fn booleans(&self, workload: &Workload) -> Result<Option<Vec<bool>>> {
        if !self.causal && self.window.is_none() {
            return Ok(None);
        }
        let (batch, seq) = (workload.batch, workload.seq);
        let pairs = batch.checked_mul(seq).and_then(|tokens| tokens.checked_mul(seq));
        let mut sees = Vec::new();
        pairs
            .and_then(|pairs| sees.try_reserve_exact(pairs).ok())
            .with_context(|| format!("the host has no memory for the oracle's {batch} × {seq} × {seq} booleans"))?;
        for i in (0..batch).flat_map(|_| 0..seq) {
            let [first, last] = self.ends(i, seq);
            sees.extend((0..seq).map(|j| (first..=last).contains(&j)));
        }
        Ok(Some(sees))
    }

    /// Pairs of a valid query and a valid key that it sees.
    pub fn valid_pairs(&self, workload: &Workload) -> u64 {
        let seq = workload.seq;
        let of_row = |row: &[bool]| {
            // Valid tokens before each one.
            let mut before = vec![0; seq + 1];
            for (at, &keep) in row.iter().enumerate() {
                before[at + 1] = before[at] + u64::from(keep);
            }
            let pairs = |i: usize| {
                let [first, last] = self.ends(i, seq);
                before[last + 1] - before[first]
            };
            (0..seq).filter(|&i| row[i]).map(pairs).sum::<u64>()
        };
        workload.mask.chunks(seq).map(of_row).sum()
    }
}

/// "all", or what limits them.
impl fmt::Display for SeenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |side: Option<usize>| side.map_or("-1".to_owned(), |keys| keys.to_string());
        let window = self.window.map(|Window { left, right }| format!("window {},{}", side(left), side(right)));
        match (self.causal, window) {
            (true, Some(window)) => write!(f, "causal, {window}"),
            (true, None) => f.write_str("causal"),
            (false, Some(window)) => f.write_str(&window),
            (false, None) => f.write_str("all"),
        }
    }
}
