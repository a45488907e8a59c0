//! Which mode to take, and why: pure, from sizes, heads, memory and bandwidth.

use std::fmt;
use std::ops::Range;

use super::mode::{Heads, Mode, Outer};
use super::needs::ParallelNeeds;
use super::sharded_meta::ShardedMeta;
use crate::error::{Error, Result};
use crate::host_vec;

/// What a plan knows of the ranks' devices and of the links between them. All ranks must be given the same.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Machine {
    /// Consecutive ranks that share a host; 0 if all do.
    pub ranks_per_host: usize,
    /// Bytes that a rank sends to ranks of its host in a second.
    pub in_host: f64,
    /// Bytes that a rank sends to other hosts in a second.
    pub between_hosts: f64,
    /// Seconds that an exchange takes beside its bytes.
    pub latency: f64,
    /// Bytes that a device copies in its own memory in a second: rows are packed, unpacked and merged.
    pub copies: f64,
    /// Floating-point operations that a device does in a second, in attention.
    pub flops: f64,
    /// Bytes that a call may take on a device beside its tensors; any if there is no limit.
    pub memory: Option<u64>,
    /// Seconds that a call of attention more costs on a device: for one chunk of heads more, or one part of the keys in a ring.
    /// Infinite where rows do not travel meanwhile; then nothing is computed in chunks, and it does not count in a ring.
    pub chunk: f64,
}

impl Machine {
    /// Ranks on the CPUs of one machine.
    pub const CPU: Self = Self {
        ranks_per_host: 0,
        in_host: 4e9,
        between_hosts: 1e9,
        latency: 50e-6,
        copies: 4e9,
        flops: 5e10,
        memory: None,
        chunk: f64::INFINITY,
    };

    /// GPUs of the class of an H100, eight a host, on NVLink, with a network card of 400 Gbit/s for each.
    pub const H100: Self = Self {
        ranks_per_host: 8,
        in_host: 3e11,
        between_hosts: 4.5e10,
        latency: 15e-6,
        copies: 2.4e12,
        flops: 6.5e14,
        memory: None,
        chunk: 20e-6,
    };

    /// With so many consecutive ranks on each host.
    #[must_use]
    pub fn with_ranks_per_host(self, ranks_per_host: usize) -> Self {
        Self { ranks_per_host, ..self }
    }

    /// With measured bandwidths, in bytes a second.
    #[must_use]
    pub fn with_bandwidth(self, in_host: f64, between_hosts: f64) -> Self {
        Self { in_host, between_hosts, ..self }
    }

    /// With a limit to what a call may take on a device beside its tensors.
    #[must_use]
    pub fn with_memory(self, bytes: u64) -> Self {
        Self { memory: Some(bytes), ..self }
    }

    fn is_same_host(&self, a: usize, b: usize) -> bool {
        self.ranks_per_host == 0 || a / self.ranks_per_host == b / self.ranks_per_host
    }
}

/// What one mode would cost, by the model of `docs/sequence-parallel.md`: the most of any rank.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct ModeEstimate {
    /// Bytes that a rank sends to ranks of its host.
    pub bytes_in_host: u64,
    /// Bytes that a rank sends to other hosts.
    pub bytes_between_hosts: u64,
    /// Bytes that a rank needs beside the call's tensors.
    pub memory: u64,
    /// Seconds of attention.
    pub attention: f64,
    /// Seconds in all.
    pub seconds: f64,
}

/// Why a mode was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ModeReason {
    /// The caller asked for it.
    Forced,
    /// There is one rank.
    OneRank,
    /// It has the least estimated time of those that the heads and the memory allow.
    Fastest,
    /// A ring would be faster by less than a tenth, and this has the bits of one device.
    SameBits,
    /// Another mode would be chosen, but for what calls carry: [`ParallelNeeds`].
    Needs,
    /// The heads and the memory allow no other.
    OnlyOne,
    /// No mode fits the memory: it needs the least.
    LeastMemory,
}

impl fmt::Display for ModeReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forced => "the caller forced this mode",
            Self::OneRank => "there is one rank",
            Self::Fastest => "it has the least estimated time",
            Self::SameBits => "a ring gains less than a tenth by the estimate, and this has the bits of one device",
            Self::Needs => "it is the best of those that compute what calls carry, which a better one does not",
            Self::OnlyOne => "no other mode can be taken",
            Self::LeastMemory => "no mode fits the memory, and it needs the least",
        })
    }
}

/// The mode of a request, and why it was chosen.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ParallelPlan {
    /// The mode.
    pub mode: Mode,
    /// Why.
    pub reason: ModeReason,
    /// In how many chunks a rank computes its heads: rows of one chunk travel under attention of another. 1 of a ring, whose hops
    /// run under attention in any case.
    pub chunks: usize,
    /// Every mode that was looked at: its estimate, or why it cannot be taken.
    pub candidates: Vec<(Mode, Result<ModeEstimate, String>)>,
}

impl fmt::Display for ParallelPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.mode)?;
        if self.chunks > 1 {
            write!(f, " in {} chunks of heads", self.chunks)?;
        }
        write!(f, ": {}", self.reason)?;
        let mut before = " (";
        for (mode, estimate) in &self.candidates {
            match estimate {
                Ok(estimate) => write!(f, "{before}{mode} {:.3} ms", estimate.seconds * 1e3)?,
                Err(why) => write!(f, "{before}not {mode}: {why}")?,
            }
            before = "; ";
        }
        if self.candidates.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}

impl ParallelPlan {
    /// The plan of a request: every rank comes to the same, since all it looks at is the same on every rank. `needs` is what calls
    /// carry; `forced` takes that mode whatever the estimate.
    ///
    /// # Errors
    /// [`Error::HeadsNotDivisible`], [`Error::HeadDim`]; [`Error::NotApplicable`] for a forced mode that the ranks, the heads or the
    /// needs do not allow, or for needs that no mode of the ranks computes, with the reason.
    pub fn new(
        meta: &ShardedMeta,
        heads: &Heads,
        needs: ParallelNeeds,
        machine: &Machine,
        forced: Option<Mode>,
    ) -> Result<Self> {
        heads.check()?;
        let world = meta.shards().ranks();
        let rows = Rows::of(meta)?;
        if let Some(mode) = forced {
            if let Some(why) = mode.refusal(world, heads) {
                return Err(Error::NotApplicable { argument: "mode", got: mode.to_string(), why });
            }
            needs.check(mode, world)?;
            let chunks = rows.chunks(mode, heads, machine);
            return Ok(Self { mode, reason: ModeReason::Forced, chunks, candidates: Vec::new() });
        }
        if world == 1 {
            return Ok(Self { mode: Mode::Gather, reason: ModeReason::OneRank, chunks: 1, candidates: Vec::new() });
        }
        let of_heads: Vec<_> = Mode::all(world)
            .into_iter()
            .map(|mode| (mode, mode.refusal(world, heads).map_or_else(|| Ok(rows.estimate(mode, heads, machine)), Err)))
            .collect();
        let of_needs = |(mode, estimate): &(Mode, Result<ModeEstimate, String>)| match needs.refusal(*mode, world) {
            Some(refusal) if estimate.is_ok() => (*mode, Err(refusal.to_string())),
            _ => (*mode, estimate.clone()),
        };
        let candidates: Vec<_> = of_heads.iter().map(of_needs).collect();
        let Some((mode, reason)) = choose(&candidates, machine, world) else {
            let why =
                candidates.iter().filter_map(|(mode, estimate)| Some(format!("{mode}: {}", estimate.as_ref().err()?)));
            let why = format!("no mode of {world} ranks computes it ({})", why.collect::<Vec<_>>().join("; "));
            return Err(Error::NotApplicable { argument: "needs", got: needs.to_string(), why });
        };
        let is_for_needs = choose(&of_heads, machine, world).is_some_and(|(of_heads, _)| of_heads != mode);
        let reason = if is_for_needs { ModeReason::Needs } else { reason };
        Ok(Self { mode, reason, chunks: rows.chunks(mode, heads, machine), candidates })
    }
}

/// The best of the modes that have an estimate, and why; none if none has.
fn choose(
    candidates: &[(Mode, Result<ModeEstimate, String>)],
    machine: &Machine,
    world: usize,
) -> Option<(Mode, ModeReason)> {
    let taken: Vec<_> =
        candidates.iter().filter_map(|(mode, estimate)| Some((*mode, estimate.as_ref().ok()?))).collect();
    let fits = |estimate: &ModeEstimate| machine.memory.is_none_or(|limit| estimate.memory <= limit);
    let fitting: Vec<_> = taken.iter().filter(|(_, estimate)| fits(estimate)).collect();
    let by_time = |(_, a): &&&(Mode, &ModeEstimate), (_, b): &&&(Mode, &ModeEstimate)| a.seconds.total_cmp(&b.seconds);
    let is_merged = |mode: Mode| mode.levels(world).1 == Outer::Ring;
    let same_bits = fitting.iter().filter(|(mode, _)| !is_merged(*mode)).min_by(by_time);
    match fitting.iter().min_by(by_time) {
        Some((mode, _)) if fitting.len() == 1 => Some((*mode, ModeReason::OnlyOne)),
        Some((mode, least)) if is_merged(*mode) => match same_bits {
            Some((other, estimate)) if least.seconds > 0.9 * estimate.seconds => Some((*other, ModeReason::SameBits)),
            _ => Some((*mode, ModeReason::Fastest)),
        },
        Some((mode, _)) => Some((*mode, ModeReason::Fastest)),
        None => {
            let smallest = taken.iter().min_by_key(|(_, estimate)| estimate.memory);
            smallest.map(|(mode, _)| (*mode, ModeReason::LeastMemory))
        }
    }
}

/// The most chunks that a plan takes: each may be a call of its own.
const MAX_CHUNKS: usize = 4;
/// What a piece more of one call costs, as a part of what a call more does.
const PIECE: f64 = 0.5;

/// What tokens a request has, summed over batch rows: of each shard, and of prefix and suffix together.
struct Rows {
    batch: usize,
    /// Tokens, valid or not, of the longest shard, and of prefix and suffix.
    longest: usize,
    replicated_tokens: usize,
    shards: Vec<Part>,
    replicated: Part,
}

/// Some of the tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Part {
    /// Valid ones.
    rows: u64,
    /// Pairs of one of them and a key that it sees.
    pairs: u64,
}

impl Rows {
    fn of(meta: &ShardedMeta) -> Result<Self> {
        let shards = meta.shards();
        let mut rows = Self {
            batch: meta.batch(),
            longest: shards.lengths().max().unwrap_or(0),
            replicated_tokens: shards.prefix() + shards.suffix(),
            shards: vec![Part::default(); shards.ranks()],
            replicated: Part::default(),
        };
        for row in 0..meta.batch() {
            let seen = Seen::of(meta, row)?;
            for (rank, part) in rows.shards.iter_mut().enumerate() {
                seen.add(shards.shard(rank), part);
            }
            seen.add(0..shards.prefix(), &mut rows.replicated);
            seen.add(shards.seq() - shards.suffix()..shards.seq(), &mut rows.replicated);
        }
        Ok(rows)
    }

    /// The number of chunks with the least time, of those that heads allow.
    fn chunks(&self, mode: Mode, heads: &Heads, machine: &Machine) -> usize {
        let (ulysses, outer) = mode.levels(self.shards.len());
        if outer == Outer::Ring || self.shards.len() == 1 || machine.chunk.is_infinite() {
            return 1;
        }
        let fits = |chunks: &usize| heads.chunks_refusal(ulysses, *chunks).is_none();
        let seconds = |chunks: &usize| self.estimate_in(mode, *chunks, heads, machine).seconds;
        (1..=MAX_CHUNKS).filter(fits).min_by(|a, b| seconds(a).total_cmp(&seconds(b))).unwrap_or(1)
    }

    /// In the chunks that the plan takes.
    fn estimate(&self, mode: Mode, heads: &Heads, machine: &Machine) -> ModeEstimate {
        self.estimate_in(mode, self.chunks(mode, heads, machine), heads, machine)
    }

    fn estimate_in(&self, mode: Mode, chunks: usize, heads: &Heads, machine: &Machine) -> ModeEstimate {
        let mut most =
            ModeEstimate { bytes_in_host: 0, bytes_between_hosts: 0, memory: 0, attention: 0.0, seconds: 0.0 };
        for rank in 0..self.shards.len() {
            let of_rank = self.estimate_rank(rank, (mode, chunks), heads, machine);
            most.bytes_in_host = most.bytes_in_host.max(of_rank.bytes_in_host);
            most.bytes_between_hosts = most.bytes_between_hosts.max(of_rank.bytes_between_hosts);
            most.memory = most.memory.max(of_rank.memory);
            most.attention = most.attention.max(of_rank.attention);
            most.seconds = most.seconds.max(of_rank.seconds);
        }
        most
    }

    fn estimate_rank(
        &self,
        rank: usize,
        (mode, chunks): (Mode, usize),
        heads: &Heads,
        machine: &Machine,
    ) -> ModeEstimate {
        let world = self.shards.len();
        let (ulysses, outer) = mode.levels(world);
        let groups = world / ulysses;
        let (group, at) = (rank / ulysses, rank % ulysses);
        let [own_heads, own_kv_heads] = heads.of_each(ulysses);
        let (q_row, kv_row) = (heads.row_bytes(own_heads), heads.row_bytes(2 * own_kv_heads));
        let members = |group: usize| group * ulysses..(group + 1) * ulysses;
        let of_group = |group: usize| members(group).map(|rank| self.shards[rank].rows).sum::<u64>();
        let replicated = self.replicated.rows;

        let mut exchanged = Traffic::default();
        for peer in members(group).filter(|&peer| peer != rank) {
            let same = machine.is_same_host(rank, peer);
            exchanged.add(same, self.shards[rank].rows * (q_row + kv_row));
            exchanged.add(same, (self.shards[peer].rows + replicated) * q_row);
        }
        exchanged.exchanges = if ulysses > 1 { 2 } else { 0 };
        let mut around = Traffic::default();
        match outer {
            Outer::Gather => {
                for other in (0..groups).filter(|&other| other != group) {
                    around.add(machine.is_same_host(rank, other * ulysses + at), of_group(group) * kv_row);
                }
                around.exchanges = u64::from(groups > 1);
            }
            Outer::Ring => {
                let next = (group + 1) % groups;
                let same = machine.is_same_host(rank, next * ulysses + at);
                (0..groups).filter(|&other| other != next).for_each(|other| around.add(same, of_group(other) * kv_row));
                around.exchanges = groups as u64 - 1;
            }
        }

        let pairs = self.replicated.pairs + members(group).map(|rank| self.shards[rank].pairs).sum::<u64>();
        // Two products, of two operations each.
        let attention = 4.0 * pairs as f64 * own_heads as f64 * heads.head_dim as f64 / machine.flops;

        // Padded tensors of a group, where there are several ranks; all keys, or two shards of them and two partial results.
        let tokens = |shards: usize| (self.batch * (self.replicated_tokens + shards * self.longest)) as u64;
        let of_level1 = if ulysses > 1 { tokens(ulysses) * (2 * q_row + kv_row) } else { 0 };
        let of_level2 = match outer {
            _ if groups == 1 => 0,
            Outer::Gather => tokens(world) * kv_row,
            Outer::Ring => tokens(ulysses) * (2 * kv_row + 2 * q_row),
        };
        let (first, second) = (exchanged.seconds(machine), around.seconds(machine));
        // What is sent is packed, and what comes is unpacked: about as much.
        let queries = of_group(group) + replicated;
        let copied = |bytes: u64| 2.0 * bytes as f64 / machine.copies;
        let seconds = match outer {
            // The first chunk's rows come before any attention, and those of each other one under attention of the one before it.
            Outer::Gather => {
                let (outside, links) = if groups == 1 { (0.0, first) } else { (first, second) };
                let chunk = if groups == 1 { Heads::chunk } else { Heads::growing_chunk };
                let share = |at| match at < chunks {
                    true => chunk(heads, ulysses, (at, chunks))[1].len() as f64 / own_kv_heads as f64,
                    false => 0.0,
                };
                let steps = (0..chunks).map(|at| (attention * share(at)).max(links * share(at + 1)));
                // Keys of other chunks than the first are packed while the first one's come.
                let packs = copied(exchanged.bytes()) + copied(around.bytes()) * share(0);
                // Chunks of Ulysses are calls of their own; those of a gather inside a host are pieces of one.
                let is_one_call = groups > 1 && around.between_hosts == 0;
                let chunk = if is_one_call { machine.chunk * PIECE } else { machine.chunk };
                outside + links * share(0) + steps.sum::<f64>() + packs + (chunks - 1) as f64 * chunk
            }
            // Hops run under attention to what came before, and the output is merged at each. Prefix and suffix are queries of
            // their own, with own keys first.
            Outer::Ring => {
                let of_replicated = if replicated > 0 { groups + 1 } else { 0 };
                let calls = (groups + of_replicated - 1) as f64;
                let parts = if machine.chunk.is_finite() { calls * machine.chunk } else { 0.0 };
                let merged = (groups as u64 - 1) * 3 * queries * q_row;
                let copies = copied(exchanged.bytes() + of_group(group) * kv_row) + merged as f64 / machine.copies;
                first + second.max(attention) + copies + machine.latency + parts
            }
        };
        ModeEstimate {
            bytes_in_host: exchanged.in_host + around.in_host,
            bytes_between_hosts: exchanged.between_hosts + around.between_hosts,
            memory: of_level1 + of_level2,
            attention,
            seconds,
        }
    }
}

/// The valid tokens of one batch row, and the keys that each sees.
struct Seen<'a> {
    meta: &'a ShardedMeta,
    row: usize,
    /// Valid tokens before each position, where key ranges need them.
    before: Vec<u32>,
}

impl<'a> Seen<'a> {
    fn of(meta: &'a ShardedMeta, row: usize) -> Result<Self> {
        let mut before = Vec::new();
        if meta.ranges().is_some() {
            let seq = meta.shards().seq();
            before = host_vec::zeroed::<u32>(seq + 1)?;
            for run in meta.keys().runs(row) {
                before[run.range()].fill(1);
            }
            let mut count = 0;
            for before in &mut before {
                count += std::mem::replace(before, count);
            }
        }
        Ok(Self { meta, row, before })
    }

    /// Adds the tokens of a place in the whole sequence.
    fn add(&self, place: Range<usize>, part: &mut Part) {
        let runs = self.meta.keys().runs(self.row).iter().map(|run| run.range());
        let runs = runs.map(|run| run.start.max(place.start)..run.end.min(place.end)).filter(|run| !run.is_empty());
        for run in runs {
            part.rows += run.len() as u64;
            part.pairs += match self.meta.ranges() {
                None => run.len() as u64 * self.meta.keys().cu_seqlens().rows(self.row).len() as u64,
                Some(ranges) => {
                    let before = |position: u32| self.before[position as usize];
                    let seen = |&[first, end]: &[u32; 2]| u64::from(before(end).saturating_sub(before(first)));
                    ranges.row(self.row)[run].iter().map(seen).sum()
                }
            };
        }
    }
}

/// What a rank sends.
#[derive(Debug, Default)]
struct Traffic {
    in_host: u64,
    between_hosts: u64,
    exchanges: u64,
}

impl Traffic {
    fn add(&mut self, is_same_host: bool, bytes: u64) {
        *(if is_same_host { &mut self.in_host } else { &mut self.between_hosts }) += bytes;
    }

    fn bytes(&self) -> u64 {
        self.in_host + self.between_hosts
    }

    /// Both kinds of links are busy at the same time.
    fn seconds(&self, machine: &Machine) -> f64 {
        let of_links = (self.in_host as f64 / machine.in_host).max(self.between_hosts as f64 / machine.between_hosts);
        of_links + self.exchanges as f64 * machine.latency
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::Shards;
    use crate::dtype::DType;
    use crate::mask::key_mask::KeyMask;

    /// The table of docs/sequence-parallel.md is what the model says.
    #[test]
    fn the_page_has_the_estimates() -> Result<()> {
        let machine = Machine::H100;
        let row = |name: &str, (seq, prefix, num_heads): (usize, usize, usize), only: Option<Mode>| -> Result<String> {
            let heads = Heads { num_heads, num_kv_heads: num_heads, head_dim: 128, dtype: DType::Bf16 };
            let mut row = format!("| {name} |");
            for ranks in [1, 2, 4, 8, 16, 32, 64, 128, 512] {
                let shards = Shards::equal(seq, ranks)?.with_prefix(prefix)?;
                let meta = ShardedMeta::new(&KeyMask::all(1, shards.seq())?, &shards, 0)?;
                let mode = only.unwrap_or(ParallelPlan::new(&meta, &heads, ParallelNeeds::new(), &machine, None)?.mode);
                let short = match mode {
                    _ if ranks == 1 || only.is_some() => "",
                    Mode::Gather => " g",
                    Mode::Ulysses => " u",
                    Mode::Ring => " r",
                    Mode::UlyssesGather { .. } => " ug",
                    Mode::UlyssesRing { .. } => " ur",
                };
                let ms = Rows::of(&meta)?.estimate(mode, &heads, &machine).seconds * 1e3;
                let digits = [10.0, 100.0].iter().filter(|&&limit| ms < limit).count();
                row += &format!(" {ms:.digits$}{short} |");
            }
            Ok(row)
        };
        let video = (75_776, 0, 40);
        let rows = [
            row("joint 256 + 4096, 24×128", (4096, 256, 24), None)?,
            row("video 32k, 24×128", (32_768, 0, 24), None)?,
            row("video 75,776, 40×128", video, None)?,
            row("the same, gather", video, Some(Mode::Gather))?,
        ];
        let page = include_str!("../../docs/sequence-parallel.md");
        assert!(rows.iter().all(|row| page.contains(row.as_str())), "the page lacks some of\n{}", rows.join("\n"));
        Ok(())
    }

    /// A ring inside a host hides its hops from about `flops / in_host` rows of a rank on.
    #[test]
    fn a_ring_pays_where_attention_hides_it() -> Result<()> {
        let heads = Heads { num_heads: 24, num_kv_heads: 24, head_dim: 128, dtype: DType::Bf16 };
        // Without what else differs: merges and the latency of hops.
        let machine = Machine { copies: f64::INFINITY, latency: 0.0, chunk: f64::INFINITY, ..Machine::H100 };
        let rows = (machine.flops / machine.in_host) as usize;
        for (of_rank, hides) in [(rows / 2, false), (2 * rows, true)] {
            let shards = Shards::equal(4 * of_rank, 4)?;
            let meta = ShardedMeta::new(&KeyMask::all(1, shards.seq())?, &shards, 0)?;
            let plan = ParallelPlan::new(&meta, &heads, ParallelNeeds::new(), &machine, None)?;
            let ring = plan.candidates.iter().find(|(mode, _)| *mode == Mode::Ring);
            let estimate = ring.and_then(|(_, estimate)| estimate.as_ref().ok());
            let is_hidden = estimate.is_some_and(|ring| ring.seconds < 1.01 * ring.attention);
            assert_eq!(is_hidden, hides, "{of_rank} rows: {plan}");
        }
        Ok(())
    }

    /// Heads come in chunks where attention hides most of what travels, and not where a chunk costs more than that.
    #[test]
    fn chunks_pay_where_attention_hides_rows() -> Result<()> {
        let heads = Heads { num_heads: 24, num_kv_heads: 24, head_dim: 128, dtype: DType::Bf16 };
        let chunks = |seq, mode, heads, machine: &Machine| -> Result<_> {
            let shards = Shards::equal(seq, 2)?;
            let meta = ShardedMeta::new(&KeyMask::all(1, seq)?, &shards, 0)?;
            Ok(ParallelPlan::new(&meta, &heads, ParallelNeeds::new(), machine, Some(mode))?.chunks)
        };
        assert!(chunks(32_768, Mode::Gather, heads, &Machine::H100)? > 1);
        assert!(chunks(32_768, Mode::Ulysses, heads, &Machine::H100)? > 1);
        assert_eq!(chunks(512, Mode::Gather, heads, &Machine::H100)?, 1);
        // On two H200s calls of 2048 tokens took 0.126 ms in one piece and 0.097 in two.
        assert_eq!(chunks(2048, Mode::Gather, heads, &Machine::H100)?, 2);
        assert_eq!(chunks(32_768, Mode::Ring, heads, &Machine::H100)?, 1);
        assert_eq!(chunks(32_768, Mode::Gather, heads, &Machine::CPU)?, 1);
        let one = Heads { num_kv_heads: 1, ..heads };
        assert_eq!(chunks(32_768, Mode::Gather, one, &Machine::H100)?, 1);
        Ok(())
    }
}
