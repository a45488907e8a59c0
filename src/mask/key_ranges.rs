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
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::cache::DeviceCopies;
use crate::error::{Error, Result};
use crate::fifo_cache::FifoCache;
use crate::host_vec::{reserve, zeroed};
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::documents::{Documents, SPARE};
use crate::mask::key_mask::check_token_count;

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
    /// `KeyRanges::pairs`, once it was asked for.
    pairs: OnceLock<u64>,
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
        Error::expect_length("document_ids", batch * seq, ids.len())?;
        let mut ranges = zeroed(ids.len() + SPARE)?;
        let mut documents = Documents::new(seq)?;
        for (row, ids) in ids.chunks_exact(seq.max(1)).enumerate() {
            documents.write(row, ids, &mut ranges[row * seq..])?;
        }
        ranges.truncate(ids.len());
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
        Error::expect_length("ranges", of.total(), ranges.len())?;
        let mut checked = reserve(ranges.len())?;
        let mut rest = ranges;
        // Without queries there may be 2³¹ rows, of which none has a range.
        let rows = if ranges.is_empty() { 0 } else { of.batch() };
        for row in 0..rows {
            let Row { queries, keys } = of.row(row);
            let (own, later) = rest.split_at(queries);
            let is_outside = |&[first, end]: &[usize; 2]| (first > end) | (end > keys);
            // All of a row at once, which takes less time than one after another.
            if own.iter().fold(false, |any, range| any | is_outside(range)) {
                let mut outside = own.iter().enumerate().filter(|(_, range)| is_outside(range));
                let (i, [first, end]) = outside.next().unwrap_or((0, &[0, 0]));
                return Err(Error::MaskRow {
                    argument: "ranges",
                    row,
                    expected: format!("a range inside 0..{keys} for query {i}"),
                    got: format!("{first}..{end}"),
                });
            }
            // Both fit: `check` bounds the keys by i32::MAX.
            checked.extend(own.iter().map(|range| range.map(|position| position as u32)));
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
                let rows = if count == 0 { 0 } else { self.0.of.batch() };
                for b in 0..rows {
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
        *self.0.pairs.get_or_init(|| match self.0.is_shared {
            true => of_row(0) * self.0.of.batch() as u64,
            false => (0..self.0.of.batch()).map(of_row).sum(),
        })
    }

    /// Keys that a query sees, masked or not: the mean over all queries, 0 without any.
    pub(crate) fn mean_keys(&self) -> u64 {
        self.pairs().checked_div(self.0.of.total() as u64).unwrap_or(0)
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

    /// Ranges of packed rows that were made of these, by the ids of the metadata of queries and keys.
    pub(super) fn packed(&self) -> &FifoCache<[u64; 2], Self> {
        &self.0.packed
    }

    pub(super) fn new(of: RangesOf, ranges: Vec<[u32; 2]>, is_shared: bool) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Self(Arc::new(Ranges {
            id,
            of,
            ranges,
            is_shared,
            packed: FifoCache::default(),
            pairs: OnceLock::new(),
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

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [[usize; 3]; 9] =
        [[2, 5, 5], [1, 1, 1], [3, 4, 7], [2, 7, 4], [1, 1, 9], [2, 9, 1], [2, 0, 5], [2, 5, 0], [0, 5, 5]];

    /// `[Sq][Sk]` of a batch row or sequence, by a rule for queries and keys that are level at the end.
    fn naive([queries, keys]: [usize; 2], sees: impl Fn(i64, i64) -> bool) -> Vec<Vec<bool>> {
        let place = |i: usize| i as i64 + keys as i64 - queries as i64;
        (0..queries).map(|i| (0..keys).map(|j| sees(place(i), j as i64)).collect()).collect()
    }

    /// The same of ranges; none reaches past the keys or ends before it starts.
    fn booleans(ranges: &[[u32; 2]], keys: usize) -> Vec<Vec<bool>> {
        let row = |&[first, end]: &[u32; 2]| {
            assert!(first <= end && end as usize <= keys, "{first}..{end} of {keys} keys");
            (first..end).fold(vec![false; keys], |mut row, key| {
                row[key as usize] = true;
                row
            })
        };
        ranges.iter().map(row).collect()
    }

    /// `[B, Sq, Sk]` sizes, and packed sequences of these sizes and of no tokens.
    fn expect_rule(ranges: impl Fn(RangesOf) -> Result<KeyRanges>, sees: impl Fn(i64, i64) -> bool) -> Result<()> {
        for [batch, seq_q, seq_k] in SIZES {
            let made = ranges([batch, seq_q, seq_k].into())?;
            let expected = naive([seq_q, seq_k], &sees);
            for b in 0..batch {
                assert_eq!(booleans(made.row(b), seq_k), expected, "[{batch}, {seq_q}, {seq_k}], row {b}");
                assert!((0..seq_q).all(|i| made.of_token(b, i) == made.row(b)[i]));
            }
            assert!(made.row(batch).is_empty() && made.row(usize::MAX).is_empty());
            let pairs = expected.iter().flatten().filter(|&&sees| sees).count() * batch;
            assert_eq!(made.pairs(), pairs as u64, "[{batch}, {seq_q}, {seq_k}]");
            let mean = pairs.checked_div(batch * seq_q).unwrap_or(0);
            assert_eq!(made.mean_keys(), mean as u64, "[{batch}, {seq_q}, {seq_k}]");
            assert_eq!(made.distinct_rows(), batch.min(1));
        }
        let [query, key] = [1, 2].map(|side| SIZES.map(|sizes| sizes[side]));
        let (cu_q, cu_k) = (CuSeqlens::from_lengths(&query)?, CuSeqlens::from_lengths(&key)?);
        let made = ranges((&cu_q, &cu_k).into())?;
        for (b, (&queries, &keys)) in query.iter().zip(&key).enumerate() {
            assert_eq!(booleans(made.row(b), keys), naive([queries, keys], &sees), "sequence {b}");
            assert!((0..queries).all(|i| made.of_token(b, cu_q.rows(b).start + i) == made.row(b)[i]));
        }
        assert!(made.row(query.len()).is_empty());
        assert_eq!((made.packed_rows().len(), made.distinct_rows()), (cu_q.total(), query.len()));
        Ok(())
    }

    #[test]
    fn causal_is_what_a_triangle_says() -> Result<()> {
        expect_rule(KeyRanges::causal, |place, key| key <= place)
    }

    #[test]
    fn windows_are_what_bands_say() -> Result<()> {
        let sides = [None, Some(0), Some(1), Some(3), Some(100), Some(usize::MAX - 1), Some(usize::MAX)];
        for left in sides {
            for right in sides {
                let is_near =
                    |side: Option<usize>, distance: i64| side.is_none_or(|side| i128::from(distance) <= side as i128);
                expect_rule(
                    |of| KeyRanges::window(of, left, right),
                    |place, key| is_near(left, place - key) && is_near(right, key - place),
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn prefixes_are_what_a_triangle_with_columns_says() -> Result<()> {
        for count in [0, 1, 3, 5, 100, usize::MAX] {
            expect_rule(|of| KeyRanges::prefix(of, count), |place, key| (key as usize) < count || key <= place)?;
        }
        Ok(())
    }

    #[test]
    fn documents_see_themselves() -> Result<()> {
        let rows: [[u32; 7]; 5] = [
            [1, 1, 2, 2, 2, 0, 3],
            [0, 9, 0, 4, 4, 0, 0],
            [7; 7],
            [0; 7],
            // Numbers need not ascend, and may be those of another row.
            [u32::MAX, 3, 3, 2, 1, 9, 9],
        ];
        let ranges = KeyRanges::from_document_ids(rows.len(), 7, rows.as_flattened())?;
        for (b, ids) in rows.iter().enumerate() {
            let expected: Vec<Vec<bool>> =
                ids.iter().map(|&own| ids.iter().map(|&id| own != 0 && id == own).collect()).collect();
            assert_eq!(booleans(ranges.row(b), 7), expected, "{ids:?}");
        }
        assert_eq!(KeyRanges::from_document_ids(0, 7, &[])?.row(0), [[0_u32; 2]; 0]);
        assert_eq!(KeyRanges::from_document_ids(3, 0, &[])?.row(2), [[0_u32; 2]; 0]);
        Ok(())
    }

    /// Rows of many documents of one token, which are added together, beside longer ones.
    #[test]
    fn short_documents_see_themselves() -> Result<()> {
        let steps = |step: fn(u32) -> u32| (0..60).map(step).collect::<Vec<_>>();
        let rows = [
            steps(|at| at + 1),
            steps(|at| at),
            steps(|at| 60 - at),
            steps(|at| at - at / 6 - u32::from(at % 6 == 5) + 1),
            steps(|at| if at % 19 == 18 { 0 } else { at + 1 }),
            steps(|at| if at < 30 { at + 100 } else { at }),
            steps(|at| if at < 25 { at + 1 } else { 26 }),
            steps(|at| at.max(21)),
        ];
        for ids in &rows {
            let ranges = KeyRanges::from_document_ids(1, ids.len(), ids)?;
            let expected: Vec<Vec<bool>> =
                ids.iter().map(|&own| ids.iter().map(|&id| own != 0 && id == own).collect()).collect();
            assert_eq!(booleans(ranges.row(0), ids.len()), expected, "{ids:?}");
        }
        // The second piece follows, lies in, or ends many documents of one token.
        for at in [5, 20, 21, 22, 59] {
            let mut ids = rows[0].clone();
            ids[at] = 3;
            assert!(matches!(KeyRanges::from_document_ids(1, 60, &ids), Err(Error::MaskRow { row: 0, .. })), "{at}");
        }
        Ok(())
    }

    #[test]
    fn documents_in_two_places_and_other_lengths_are_refused() {
        let two_places = |row, document| {
            Some(Error::MaskRow {
                argument: "document_ids",
                row,
                expected: "the tokens of a document together".to_owned(),
                got: format!("document {document} in two places"),
            })
        };
        let refused = |batch, seq, ids: &[u32]| KeyRanges::from_document_ids(batch, seq, ids).err();
        assert_eq!(refused(2, 3, &[1, 1, 2, 5, 6, 5]), two_places(1, 5));
        assert_eq!(refused(2, 3, &[4, 0, 4, 1, 2, 1]), two_places(0, 4));
        assert_eq!(refused(1, 5, &[3, 2, 1, 2, 1]), two_places(0, 1));
        let length = |got| Some(Error::Length { argument: "document_ids", expected: 6, got });
        assert_eq!(refused(2, 3, &[1; 5]), length(5));
        assert_eq!(refused(2, 3, &[1; 7]), length(7));
        assert!(matches!(refused(usize::MAX, 2, &[]), Some(Error::TooLarge { .. })));
    }

    #[test]
    fn own_ranges_are_kept_and_checked() -> Result<()> {
        let own = [[0, 0], [1, 3], [3, 3], [0, 3]];
        let ranges = KeyRanges::from_ranges([2, 2, 3], &own)?;
        assert_eq!([ranges.row(0), ranges.row(1)].concat(), own.map(|range| range.map(|at| at as u32)));
        assert_eq!((ranges.pairs(), ranges.distinct_rows(), ranges.of_token(1, 1)), (5, 2, [0, 3]));

        let (cu_q, cu_k) = (CuSeqlens::from_lengths(&[1, 0, 2])?, CuSeqlens::from_lengths(&[3, 2, 4])?);
        let packed = RangesOf::from((&cu_q, &cu_k));
        let ranges = KeyRanges::from_ranges(packed.clone(), &[[1, 3], [2, 4], [0, 1]])?;
        assert_eq!((ranges.row(0), ranges.row(1), ranges.row(2)), (&[[1, 3]][..], &[][..], &[[2, 4], [0, 1]][..]));

        let outside = |row, expected: &str, got: &str| {
            let (expected, got) = (expected.to_owned(), got.to_owned());
            Some(Error::MaskRow { argument: "ranges", row, expected, got })
        };
        let refused = |of: RangesOf, own: &[[usize; 2]]| KeyRanges::from_ranges(of, own).err();
        let expected = "a range inside 0..3 for query 1";
        assert_eq!(refused([2, 2, 3].into(), &[[0, 3], [2, 1], [0, 0], [9, 9]]), outside(0, expected, "2..1"));
        assert_eq!(refused([2, 2, 3].into(), &[[0, 3], [0, 0], [1, 1], [0, 4]]), outside(1, expected, "0..4"));
        let got = format!("0..{}", usize::MAX);
        assert_eq!(refused([1, 2, 3].into(), &[[0, 0], [0, usize::MAX]]), outside(0, expected, &got));
        // A range that fits another sequence.
        let expected = "a range inside 0..3 for query 0";
        assert_eq!(refused(packed.clone(), &[[2, 4], [2, 4], [0, 1]]), outside(0, expected, "2..4"));
        let length = |expected, got| Some(Error::Length { argument: "ranges", expected, got });
        assert_eq!(refused(packed, &[[0, 0]; 4]), length(3, 4));
        assert_eq!(refused([2, 2, 3].into(), &[]), length(4, 0));
        Ok(())
    }

    /// Every pair of shared ranges and ranges of each row's own, against both masks at once.
    #[test]
    fn intersections_are_what_both_allow() -> Result<()> {
        let of = [2, 4, 5];
        let own = [[0, 5], [2, 2], [4, 5], [1, 4], [0, 0], [3, 5], [0, 2], [2, 3]];
        let all = [
            KeyRanges::causal(of)?,
            KeyRanges::window(of, Some(1), Some(1))?,
            KeyRanges::prefix(of, 3)?,
            KeyRanges::from_ranges(of, &own)?,
            KeyRanges::from_ranges(of, &[[1, 5]; 8])?,
        ];
        for one in &all {
            for other in &all {
                let both = one.intersect(other)?;
                for b in 0..2 {
                    let (x, y) = (booleans(one.row(b), 5), booleans(other.row(b), 5));
                    let and = |(x, y): (&Vec<bool>, &Vec<bool>)| x.iter().zip(y).map(|(x, y)| x & y).collect();
                    let expected: Vec<Vec<bool>> = x.iter().zip(&y).map(and).collect();
                    assert_eq!(booleans(both.row(b), 5), expected, "{:?} and {:?}", one.row(b), other.row(b));
                }
                assert_eq!(both.distinct_rows(), one.distinct_rows().max(other.distinct_rows()));
            }
        }
        let cu = CuSeqlens::from_lengths(&[2, 0, 3])?;
        let [x, y] = [KeyRanges::causal((&cu, &cu))?, KeyRanges::window((&cu, &cu), Some(0), None)?];
        assert_eq!(x.intersect(&y)?.packed_rows(), [[0, 1], [1, 2], [0, 1], [1, 2], [2, 3]]);
        Ok(())
    }

    #[test]
    fn ranges_for_other_sizes_do_not_intersect() -> Result<()> {
        let (cu, other) = (CuSeqlens::from_lengths(&[2, 2])?, CuSeqlens::from_lengths(&[1, 3])?);
        let padded = |sizes: [usize; 3]| RangesOf::from(sizes);
        let all = [
            (padded([2, 2, 2]), "[B, Sq, Sk] = [2, 2, 2]"),
            (padded([2, 2, 3]), "[B, Sq, Sk] = [2, 2, 3]"),
            (padded([2, 1, 2]), "[B, Sq, Sk] = [2, 1, 2]"),
            (padded([1, 2, 2]), "[B, Sq, Sk] = [1, 2, 2]"),
            (RangesOf::from((&cu, &cu)), "2 packed sequences of 4 queries and 4 keys"),
            (RangesOf::from((&cu, &other)), "2 packed sequences of 4 queries and 4 keys"),
        ];
        for (a, (one, expected)) in all.iter().enumerate() {
            for (b, (other, got)) in all.iter().enumerate() {
                let (one, other) = (KeyRanges::causal(one.clone())?, KeyRanges::causal(other.clone())?);
                let (expected, got) = ((*expected).to_owned(), (*got).to_owned());
                let error = (a != b).then_some(Error::RangesSize { argument: "other", expected, got });
                assert_eq!(one.intersect(&other).err(), error);
            }
        }
        Ok(())
    }

    #[test]
    fn sizes_past_an_i32_are_refused() -> Result<()> {
        let limit = i32::MAX as usize;
        let refused = |of: [usize; 3]| match KeyRanges::causal(of) {
            Err(Error::TooLarge { argument, .. }) => argument,
            other => panic!("expected an error, got {:?}", other.map(|made| made.row(0).len())),
        };
        assert_eq!(refused([1, limit + 1, 1]), "queries of the ranges");
        assert_eq!(refused([1, 1, limit + 1]), "keys of the ranges");
        assert_eq!(refused([limit + 1, 0, 0]), "queries of the ranges");
        assert_eq!(refused([usize::MAX, usize::MAX, usize::MAX]), "queries of the ranges");
        assert_eq!(refused([65_536, 1, 32_768]), "keys of the ranges");
        // The largest that fit.
        assert_eq!(KeyRanges::window([1, 1, limit], Some(usize::MAX), Some(0))?.row(0), [[0, limit as u32]]);
        assert_eq!(KeyRanges::window([1, 1, limit], Some(0), None)?.row(0), [[limit as u32 - 1, limit as u32]]);
        let shared = KeyRanges::causal([limit, 0, 1])?;
        let own = KeyRanges::from_ranges([limit, 0, 1], &[])?;
        assert!(shared.intersect(&own)?.row(limit - 1).is_empty());
        assert_eq!(KeyRanges::causal([limit, 1, 1])?.pairs(), limit as u64);
        Ok(())
    }

    #[test]
    fn packed_sides_have_as_many_sequences() -> Result<()> {
        let (two, three) = (CuSeqlens::from_lengths(&[1, 2])?, CuSeqlens::from_lengths(&[1, 1, 1])?);
        let expected = Error::CuSeqlens {
            argument: "cu_seqlens_k",
            expected: "as many sequences as cu_seqlens_q, 2".to_owned(),
            got: "3".to_owned(),
        };
        assert_eq!(KeyRanges::causal((&two, &three)).err(), Some(expected));
        Ok(())
    }
}
