//! Which keys each query sees: causal masks, windows, prefixes, documents, as one range of keys for each query.
//!
//! ```text
//!    causal, 4 × 6        window(1, 1), 5 × 5    prefix(2), 4 × 4     documents 1 1 2 2
//!
//!    x x x . . .          x x . . .              x x . .              x x . .
//!    x x x x . .          x x x . .              x x . .              x x . .
//!    x x x x x .          . x x x .              x x x .              . . x x
//!    x x x x x x          . . x x x              x x x x              . . x x
//!                         . . . x x
//! ```

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache::DeviceCopies;
use crate::error::{Error, Result};
use crate::fifo_cache::FifoCache;
use crate::host_vec::reserve;
use crate::mask::key_mask::check_token_count;
use crate::mask::meta::{CuSeqlens, VarlenMeta};
use crate::mask::ranks::Ranks;

/// The queries and keys that ranges are made for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum RangesOf {
    /// Padded tensors: `[B, Sq]` queries and `[B, Sk]` keys. Ranges count positions of the padded keys.
    Padded {
        /// Number of batch rows, B.
        batch: usize,
        /// Queries of a row, Sq.
        seq_q: usize,
        /// Keys of a row, Sk.
        seq_k: usize,
    },
    /// Packed rows: sequence b of the queries and of the keys. Ranges count keys of the sequence, from its first one.
    Packed {
        /// Sequences of the queries.
        query: CuSeqlens,
        /// Sequences of the keys, as many.
        key: CuSeqlens,
    },
}

/// `[B, Sq, Sk]`
impl From<[usize; 3]> for RangesOf {
    fn from([batch, seq_q, seq_k]: [usize; 3]) -> Self {
        Self::Padded { batch, seq_q, seq_k }
    }
}

/// Sequences of the queries and of the keys.
impl From<(&CuSeqlens, &CuSeqlens)> for RangesOf {
    fn from((query, key): (&CuSeqlens, &CuSeqlens)) -> Self {
        Self::Packed { query: query.clone(), key: key.clone() }
    }
}

/// One batch row of padded tensors, or one sequence of packed rows.
#[derive(Debug, Clone, Copy)]
struct Row {
    queries: usize,
    keys: usize,
}

impl RangesOf {
    /// Checks that every position fits an `i32`, and that both sides have as many sequences.
    fn check(&self) -> Result<()> {
        match self {
            &Self::Padded { batch, seq_q, seq_k } => {
                check_token_count("queries of the ranges", batch, seq_q)?;
                check_token_count("keys of the ranges", batch, seq_k)?;
            }
            Self::Packed { query, key } if query.batch() != key.batch() => {
                return Err(Error::CuSeqlens {
                    argument: "cu_seqlens_k",
                    expected: format!("as many sequences as cu_seqlens_q, {}", query.batch()),
                    got: key.batch().to_string(),
                });
            }
            Self::Packed { .. } => {}
        }
        Ok(())
    }

    fn batch(&self) -> usize {
        match self {
            Self::Padded { batch, .. } => *batch,
            Self::Packed { query, .. } => query.batch(),
        }
    }

    fn row(&self, b: usize) -> Row {
        match self {
            Self::Padded { seq_q, seq_k, .. } => Row { queries: *seq_q, keys: *seq_k },
            Self::Packed { query, key } => Row { queries: query.rows(b).len(), keys: key.rows(b).len() },
        }
    }

    /// Number of queries of all rows.
    fn total(&self) -> usize {
        match self {
            Self::Padded { batch, seq_q, .. } => batch * seq_q,
            Self::Packed { query, .. } => query.total(),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Padded { batch, seq_q, seq_k }, Self::Padded { batch: b, seq_q: q, seq_k: k }) => {
                (batch, seq_q, seq_k) == (b, q, k)
            }
            (Self::Packed { query, key }, Self::Packed { query: q, key: k }) => {
                query.as_slice() == q.as_slice() && key.as_slice() == k.as_slice()
            }
            _ => false,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Padded { batch, seq_q, seq_k } => format!("[B, Sq, Sk] = [{batch}, {seq_q}, {seq_k}]"),
            Self::Packed { query, key } => {
                format!("{} packed sequences of {} queries and {} keys", query.batch(), query.total(), key.total())
            }
        }
    }
}

/// A range of keys for each query: query i of a batch row sees the kept keys j of its row with `first(i) <= j < end(i)`. Built once
/// per request on the host, in O(B·Sq); devices keep their copy of it. Clones share the ranges.
///
/// In padded calls, positions are those of the padded tensors: the result is that of dense attention under the boolean mask
/// `kept[j] && first(i) <= j && j < end(i)`. In packed calls they count from the first key of the sequence. A query that sees no key
/// gives +0.0.
///
/// ```
/// use varlen_fa::KeyRanges;
///
/// let causal = KeyRanges::causal([1, 4, 4])?;
/// let local = KeyRanges::window([1, 4, 4], Some(1), Some(1))?;
/// let both = causal.intersect(&local)?;
/// assert_eq!(both.row(0), [[0, 1], [0, 2], [1, 3], [2, 4]]);
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct KeyRanges(Arc<Ranges>);

/// What clones of ranges share.
#[derive(Debug)]
struct Ranges {
    /// Tells ranges apart.
    id: u64,
    of: RangesOf,
    /// `[first, end)` of each query. Padded ones with the same ranges in every batch row are kept once.
    ranges: Vec<[u32; 2]>,
    /// Whether all batch rows share the ranges of the first.
    is_shared: bool,
    /// Those of packed rows, by the ids of the metadata of queries and keys.
    packed: FifoCache<[u64; 2], KeyRanges>,
    copies: DeviceCopies,
}

impl KeyRanges {
    /// Query i sees the keys up to its own place. Where queries and keys differ in number, the last query sees the last key, as in
    /// flash-attention: `j <= i + Sk - Sq`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the tokens do not fit an `i32`, [`Error::CuSeqlens`] if the sides have other numbers of sequences,
    /// [`Error::OutOfMemory`].
    pub fn causal(of: impl Into<RangesOf>) -> Result<Self> {
        Self::window(of, None, Some(0))
    }

    /// Query i sees `left` keys before its own place and `right` keys after it; `None` is no limit on that side. Where queries and
    /// keys differ in number, the place of query i is `i + Sk - Sq`, as in flash-attention.
    ///
    /// # Errors
    /// As [`causal`](Self::causal).
    pub fn window(of: impl Into<RangesOf>, left: Option<usize>, right: Option<usize>) -> Result<Self> {
        Self::by_query(of.into(), |Row { queries, keys }, i| {
            // What is before the first key, or past the last one, counts from there.
            let first = match left {
                Some(left) => (i + keys).saturating_sub(queries.saturating_add(left)),
                None => 0,
            };
            let end = match right {
                Some(right) => (i + keys).saturating_add(right).saturating_add(1).saturating_sub(queries),
                None => keys,
            };
            first..end
        })
    }

    /// Every query sees the first `count` keys, and the others as in [`causal`](Self::causal): a prefix language model.
    ///
    /// # Errors
    /// As [`causal`](Self::causal).
    pub fn prefix(of: impl Into<RangesOf>, count: usize) -> Result<Self> {
        Self::by_query(of.into(), |Row { queries, keys }, i| 0..(i + keys + 1).saturating_sub(queries).max(count))
    }

    /// Self-attention within documents: tokens with the same number see one another. `[B, S]` numbers, row-major; the tokens of a
    /// document lie together. Tokens numbered 0 are in no document and see nothing.
    /// [`VarlenMeta::from_document_ids`](crate::VarlenMeta::from_document_ids) masks them too.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of elements, [`Error::MaskRow`] for a document in two pieces; as
    /// [`causal`](Self::causal).
    pub fn from_document_ids(batch: usize, seq: usize, ids: &[u32]) -> Result<Self> {
        let of = RangesOf::from([batch, seq, seq]);
        of.check()?;
        expect_length("document_ids", batch * seq, ids.len())?;
        let mut ranges = reserve(ids.len())?;
        let mut seen: Vec<u32> = reserve(seq)?;
        for (row, ids) in ids.chunks_exact(seq.max(1)).enumerate() {
            seen.clear();
            let mut first = 0;
            for document in ids.chunk_by(|a, b| a == b) {
                let end = first + document.len();
                let id = document.first().filter(|&&id| id != 0);
                let range = if id.is_some() { [first as u32, end as u32] } else { [0, 0] };
                ranges.extend(std::iter::repeat_n(range, document.len()));
                // Tokens of no document may lie anywhere.
                seen.extend(id);
                first = end;
            }
            seen.sort_unstable();
            if let Some(twice) = seen.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(Error::MaskRow {
                    argument: "document_ids",
                    row,
                    expected: "the tokens of a document together".to_owned(),
                    got: format!("document {} in two places", twice[0]),
                });
            }
        }
        Ok(Self::new(of, ranges, false))
    }

    /// Ranges of the caller's own: `[first, end]` of each query, `[B, Sq, 2]` for padded tensors, `[total_q, 2]` for packed rows.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of ranges, [`Error::MaskRow`] for one that ends before it starts or past the keys; as
    /// [`causal`](Self::causal).
    pub fn from_ranges(of: impl Into<RangesOf>, ranges: &[[usize; 2]]) -> Result<Self> {
        let of = of.into();
        of.check()?;
        expect_length("ranges", of.total(), ranges.len())?;
        let mut checked = reserve(ranges.len())?;
        let mut rest = ranges;
        for row in 0..of.batch() {
            let Row { queries, keys } = of.row(row);
            let (own, later) = rest.split_at(queries);
            for (i, &[first, end]) in own.iter().enumerate() {
                if first > end || end > keys {
                    return Err(Error::MaskRow {
                        argument: "ranges",
                        row,
                        expected: format!("a range inside 0..{keys} for query {i}"),
                        got: format!("{first}..{end}"),
                    });
                }
                checked.push([first as u32, end as u32]);
            }
            rest = later;
        }
        Ok(Self::new(of, checked, false))
    }

    /// The keys that both see.
    ///
    /// # Errors
    /// [`Error::RangesSize`] if the other ranges are for other sizes, [`Error::OutOfMemory`].
    pub fn intersect(&self, other: &Self) -> Result<Self> {
        if !self.0.of.is_same(&other.0.of) {
            return Err(Error::RangesSize {
                argument: "other",
                expected: self.0.of.describe(),
                got: other.0.of.describe(),
            });
        }
        let is_shared = self.0.is_shared && other.0.is_shared;
        let count = if is_shared { self.0.ranges.len() } else { self.0.of.total() };
        let mut ranges = reserve(count)?;
        let both = |([a, b], [c, d]): ([u32; 2], [u32; 2])| {
            let first = a.max(c);
            [first, b.min(d).max(first)]
        };
        match self.0.is_shared == other.0.is_shared {
            true => ranges.extend(self.0.ranges.iter().copied().zip(other.0.ranges.iter().copied()).map(both)),
            false => {
                for b in 0..self.0.of.batch() {
                    ranges.extend(self.row(b).iter().copied().zip(other.row(b).iter().copied()).map(both));
                }
            }
        }
        Ok(Self::new(self.0.of.clone(), ranges, is_shared))
    }

    /// `[first, end)` of each query of a batch row or sequence; none if there is no such row.
    #[must_use]
    pub fn row(&self, b: usize) -> &[[u32; 2]] {
        if b >= self.0.of.batch() {
            return &[];
        }
        match &self.0.of {
            RangesOf::Padded { .. } if self.0.is_shared => &self.0.ranges,
            RangesOf::Padded { seq_q, .. } => &self.0.ranges[b * seq_q..][..*seq_q],
            RangesOf::Packed { query, .. } => &self.0.ranges[query.rows(b)],
        }
    }

    /// Number of batch rows of which each may have other ranges than the ones before.
    pub(crate) fn distinct_rows(&self) -> usize {
        if self.0.is_shared { self.0.of.batch().min(1) } else { self.0.of.batch() }
    }

    /// Those of all packed rows, one after another.
    pub(crate) fn packed_rows(&self) -> &[[u32; 2]] {
        &self.0.ranges
    }

    /// Those of the [`distinct_rows`](Self::distinct_rows), or of all packed rows, one after another.
    #[cfg(feature = "cuda")]
    pub(crate) fn distinct(&self) -> &[[u32; 2]] {
        &self.0.ranges
    }

    /// The range of a query of batch row `b`: a token of the padded row, or a packed row of the whole batch.
    #[inline]
    pub(crate) fn of_token(&self, b: usize, token: usize) -> [u32; 2] {
        match self.0.of {
            RangesOf::Padded { seq_q, .. } if !self.0.is_shared => self.0.ranges[b * seq_q + token],
            RangesOf::Padded { .. } | RangesOf::Packed { .. } => self.0.ranges[token],
        }
    }

    /// The queries and keys that the ranges are for.
    #[must_use]
    pub fn of(&self) -> &RangesOf {
        &self.0.of
    }

    /// Pairs of query and key that the ranges allow, masked or not.
    pub(crate) fn pairs(&self) -> u64 {
        let of_row = |b| self.row(b).iter().map(|[first, end]| u64::from(end - first)).sum::<u64>();
        match self.0.is_shared {
            true => of_row(0) * self.0.of.batch() as u64,
            false => (0..self.0.of.batch()).map(of_row).sum(),
        }
    }

    /// The ranges of the packed rows of padded tensors, among which the valid keys of a row are numbered in order. Made once for
    /// each pair of metadata.
    ///
    /// `pin` keeps them from being evicted: a captured graph may hold the addresses of their copy.
    pub(crate) fn of_packed_rows(&self, query: &VarlenMeta, key: &VarlenMeta, pin: bool) -> Result<Arc<Self>> {
        self.0.packed.get_or_make([query.id(), key.id()], pin, || {
            let ranks = Ranks::new(key.key_mask())?;
            let mut ranges = reserve(query.total_valid())?;
            for b in 0..query.batch() {
                let own = self.row(b);
                for run in query.runs(b) {
                    let numbers = |range: &[u32; 2]| range.map(|position| ranks.of(b, position));
                    ranges.extend(own[run.start as usize..run.end()].iter().map(numbers));
                }
            }
            Ok(Self::new(RangesOf::from((query.cu_seqlens(), key.cu_seqlens())), ranges, false))
        })
    }

    /// Checks that the ranges are for padded tensors of this size.
    pub(crate) fn expect_padded(&self, batch: usize, seq_q: usize, seq_k: usize) -> Result<()> {
        self.expect(&RangesOf::Padded { batch, seq_q, seq_k })
    }

    /// Checks that the ranges are for these packed sequences.
    pub(crate) fn expect_packed(&self, query: &CuSeqlens, key: &CuSeqlens) -> Result<()> {
        self.expect(&RangesOf::from((query, key)))
    }

    fn expect(&self, of: &RangesOf) -> Result<()> {
        if self.0.of.is_same(of) {
            return Ok(());
        }
        Err(Error::RangesSize { argument: "ranges", expected: of.describe(), got: self.0.of.describe() })
    }

    /// Tells ranges apart.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    pub(crate) fn copies(&self) -> &DeviceCopies {
        &self.0.copies
    }

    fn new(of: RangesOf, ranges: Vec<[u32; 2]>, is_shared: bool) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Self(Arc::new(Ranges {
            id,
            of,
            ranges,
            is_shared,
            packed: FifoCache::default(),
            copies: DeviceCopies::default(),
        }))
    }

    /// Ranges that a row's sizes and the query's number give; what reaches past the keys is cut.
    fn by_query(of: RangesOf, range: impl Fn(Row, usize) -> Range<usize>) -> Result<Self> {
        of.check()?;
        let is_shared = matches!(of, RangesOf::Padded { .. });
        let rows = if is_shared { of.batch().min(1) } else { of.batch() };
        let mut ranges = reserve(if is_shared { of.row(0).queries * rows } else { of.total() })?;
        for b in 0..rows {
            let row = of.row(b);
            ranges.extend((0..row.queries).map(|i| {
                let Range { start, end } = range(row, i);
                let first = start.min(row.keys);
                // Both fit: `check` bounds the keys by i32::MAX.
                [first as u32, end.clamp(first, row.keys) as u32]
            }));
        }
        Ok(Self::new(of, ranges, is_shared))
    }
}

fn expect_length(argument: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Length { argument, expected, got })
}
