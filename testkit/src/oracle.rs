//! Naive attention in f64, with its own reading of the mask.
//!
//! One query row at a time: score every kept key, take the softmax, add up the values. Keys that the mask drops are
//! skipped before anything of theirs is read, so NaN there cannot matter.

mod error;
mod modifiers;
mod packed;
mod prepared;
mod row;
mod sample;

pub use error::OracleError;
pub use modifiers::Modifiers;
pub use packed::{PackedOutput, PackedProblem, attend_packed};
pub use prepared::{Pairs, Turn, prepared_head};
pub use row::AttendedRow;

use crate::parallel::fill_rows;
use error::{check_heads, check_len, check_positive, check_scale};

/// The extents of a padded problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OracleShape {
    /// Batch rows.
    pub batch: usize,
    /// Query tokens of a batch row.
    pub seq_q: usize,
    /// Key tokens of a batch row.
    pub seq_k: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `h` reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

impl OracleShape {
    /// Self-attention with as many key as query heads.
    pub fn self_attention(batch: usize, seq: usize, heads: usize, head_dim: usize) -> Self {
        Self { batch, seq_q: seq, seq_k: seq, heads, kv_heads: heads, head_dim }
    }
}

/// An attention problem on contiguous `[batch, seq, heads, head_dim]` tensors. For 16-bit tensors pass the values
/// already rounded: the oracle takes them as exact.
#[derive(Clone, Copy, Debug)]
pub struct OracleProblem<'a> {
    /// The extents of every slice below.
    pub shape: OracleShape,
    /// The factor of `q·k`.
    pub softmax_scale: f64,
    /// `[batch, seq_q, heads, head_dim]`.
    pub q: &'a [f32],
    /// `[batch, seq_k, kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// `[batch, seq_k, kv_heads, head_dim]`.
    pub v: &'a [f32],
    /// `[batch, seq_k]`: false drops the key.
    pub key_keep: Option<&'a [bool]>,
    /// `[batch, seq_q]`: false makes the output row exactly 0.
    pub query_keep: Option<&'a [bool]>,
    /// `[batch, seq_q, seq_k]`: whether the query sees the key, if it is kept at all.
    pub sees: Option<&'a [bool]>,
    /// `[batch, heads, seq_q, seq_k]`, added to the scaled scores; -inf drops the key like the mask does.
    pub bias: Option<&'a [f32]>,
    /// What else happens to the scores.
    pub modifiers: Modifiers<'a>,
}

impl<'a> OracleProblem<'a> {
    /// A problem without mask, bias or modifiers, scaled by `1 / sqrt(head_dim)`; set the other fields as needed.
    pub fn new(shape: OracleShape, q: &'a [f32], k: &'a [f32], v: &'a [f32]) -> Self {
        let softmax_scale = 1.0 / (shape.head_dim as f64).sqrt();
        let modifiers = Modifiers::default();
        Self { shape, softmax_scale, q, k, v, key_keep: None, query_keep: None, sees: None, bias: None, modifiers }
    }
}

/// The place of one output row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowIndex {
    /// Batch row.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query token.
    pub query: usize,
}

/// A checked problem, ready to be answered.
#[derive(Clone, Debug)]
pub struct Oracle<'a> {
    problem: OracleProblem<'a>,
    /// Kept key positions of each batch row.
    kept: Vec<Vec<usize>>,
}

impl<'a> Oracle<'a> {
    /// Checks the extents and the length of every slice.
    ///
    /// # Errors
    /// [`OracleError`] names the argument, what was expected and what came.
    pub fn new(problem: OracleProblem<'a>) -> Result<Self, OracleError> {
        let OracleShape { batch, seq_q, seq_k, heads, kv_heads, head_dim } = problem.shape;
        check_heads(heads, kv_heads)?;
        check_positive("head_dim", head_dim)?;
        check_scale(problem.softmax_scale)?;
        check_len("q", &[batch, seq_q, heads, head_dim], problem.q.len())?;
        check_len("k", &[batch, seq_k, kv_heads, head_dim], problem.k.len())?;
        check_len("v", &[batch, seq_k, kv_heads, head_dim], problem.v.len())?;
        if let Some(keep) = problem.key_keep {
            check_len("key_keep", &[batch, seq_k], keep.len())?;
        }
        if let Some(keep) = problem.query_keep {
            check_len("query_keep", &[batch, seq_q], keep.len())?;
        }
        if let Some(sees) = problem.sees {
            check_len("sees", &[batch, seq_q, seq_k], sees.len())?;
        }
        if let Some(bias) = problem.bias {
            check_len("bias", &[batch, heads, seq_q, seq_k], bias.len())?;
        }
        problem.modifiers.check(heads)?;
        let keeps = |b: usize, j: usize| problem.key_keep.is_none_or(|keep| keep[b * seq_k + j]);
        let kept = (0..batch).map(|b| (0..seq_k).filter(|&j| keeps(b, j)).collect()).collect();
        Ok(Self { problem, kept })
    }

    /// The problem being answered.
    pub fn problem(&self) -> &OracleProblem<'a> {
        &self.problem
    }

    /// `[batch, seq_q, heads, head_dim]`: the shape of the output.
    pub fn output_shape(&self) -> [usize; 4] {
        let OracleShape { batch, seq_q, heads, head_dim, .. } = self.problem.shape;
        [batch, seq_q, heads, head_dim]
    }

    /// One output row and its log-sum-exp.
    ///
    /// # Errors
    /// [`OracleError::RowOutOfRange`] if `at` lies outside the output.
    pub fn attend_row(&self, at: RowIndex) -> Result<AttendedRow, OracleError> {
        self.check_row(at)?;
        Ok(self.row(at))
    }

    /// The rows asked for, in their order.
    ///
    /// # Errors
    /// [`OracleError::RowOutOfRange`] if one lies outside the output.
    pub fn attend_rows(&self, rows: &[RowIndex]) -> Result<Vec<AttendedRow>, OracleError> {
        rows.iter().try_for_each(|&at| self.check_row(at))?;
        let mut answers = vec![AttendedRow::default(); rows.len()];
        fill_rows(&mut answers, 1, |index, answer| answer[0] = self.row(rows[index]));
        Ok(answers)
    }

    /// The whole output, `[batch, seq_q, heads, head_dim]`.
    pub fn attend_all(&self) -> Vec<f64> {
        let [batch, seq_q, heads, head_dim] = self.output_shape();
        let mut out = vec![0.0; batch * seq_q * heads * head_dim];
        fill_rows(&mut out, head_dim, |row, values| values.copy_from_slice(&self.row(self.row_at(row)).out));
        out
    }

    /// The log-sum-exp of every row, `[batch, heads, seq_q]`; -inf where no key is kept or the query is not.
    pub fn lse_all(&self) -> Vec<f64> {
        let OracleShape { batch, seq_q, heads, .. } = self.problem.shape;
        let mut lse = vec![0.0; batch * heads * seq_q];
        fill_rows(&mut lse, 1, |index, value| {
            let (outer, query) = (index / seq_q, index % seq_q);
            value[0] = self.row(RowIndex { batch: outer / heads, head: outer % heads, query }).lse;
        });
        lse
    }

    /// Where row `at` starts in the output of [`Oracle::attend_all`].
    pub fn output_offset(&self, at: RowIndex) -> usize {
        let OracleShape { seq_q, heads, head_dim, .. } = self.problem.shape;
        ((at.batch * seq_q + at.query) * heads + at.head) * head_dim
    }

    /// The place of the `row`-th row in the order of the output.
    pub(crate) fn row_at(&self, row: usize) -> RowIndex {
        let OracleShape { seq_q, heads, .. } = self.problem.shape;
        let (token, head) = (row / heads, row % heads);
        RowIndex { batch: token / seq_q, head, query: token % seq_q }
    }

    pub(crate) fn check_row(&self, at: RowIndex) -> Result<(), OracleError> {
        let OracleShape { batch, seq_q, heads, .. } = self.problem.shape;
        for (argument, limit, got) in [("batch", batch, at.batch), ("head", heads, at.head), ("query", seq_q, at.query)]
        {
            if got >= limit {
                return Err(OracleError::RowOutOfRange { argument, limit, got });
            }
        }
        Ok(())
    }

    /// Whether the row of that query is computed at all.
    pub(crate) fn query_kept(&self, batch: usize, query: usize) -> bool {
        self.problem.query_keep.is_none_or(|keep| keep[batch * self.problem.shape.seq_q + query])
    }

    /// The query of row `at`.
    pub(crate) fn query(&self, at: RowIndex) -> &'a [f32] {
        let start = self.output_offset(at);
        &self.problem.q[start..start + self.problem.shape.head_dim]
    }

    /// For each kept key that row `at` sees: where it starts in `k` and `v`, its bias, and what ALiBi adds. Keys under a bias of
    /// -inf are left out.
    pub(crate) fn kept_keys(&self, at: RowIndex) -> impl Iterator<Item = (usize, f32, f64)> {
        let OracleShape { seq_q, seq_k, heads, kv_heads, head_dim, .. } = self.problem.shape;
        let kv_head = at.head / (heads / kv_heads);
        let bias_row = ((at.batch * heads + at.head) * seq_q + at.query) * seq_k;
        let seen_row = (at.batch * seq_q + at.query) * seq_k;
        self.kept[at.batch]
            .iter()
            .filter(move |&&j| self.problem.sees.is_none_or(|sees| sees[seen_row + j]))
            .map(move |&j| {
                let start = ((at.batch * seq_k + j) * kv_heads + kv_head) * head_dim;
                let alibi = self.problem.modifiers.alibi(at.head, [at.query, j], [seq_q, seq_k]);
                (start, self.problem.bias.map_or(0.0, |bias| bias[bias_row + j]), alibi)
            })
            .filter(|&(_, bias, _)| bias != f32::NEG_INFINITY)
    }

    fn row(&self, at: RowIndex) -> AttendedRow {
        if !self.query_kept(at.batch, at.query) {
            return AttendedRow::without_keys(self.problem.shape.head_dim);
        }
        let keys = self.kept_keys(at).map(|(start, bias, alibi)| (start, alibi + f64::from(bias)));
        let OracleProblem { k, v, softmax_scale, modifiers, .. } = self.problem;
        row::attend(self.query(at), k, v, softmax_scale, (&modifiers, at.head), keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    const ROW: RowIndex = RowIndex { batch: 0, head: 0, query: 0 };

    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-12, "got {got}, expected {expected}");
        }
    }

    /// Standard normal q, k and v of a shape.
    fn inputs(shape: OracleShape) -> [Vec<f32>; 3] {
        let q = shape.batch * shape.seq_q * shape.heads * shape.head_dim;
        let kv = shape.batch * shape.seq_k * shape.kv_heads * shape.head_dim;
        [random::normal_stream(1, 0, q), random::normal_stream(1, 1, kv), random::normal_stream(1, 2, kv)]
    }

    #[test]
    fn two_by_two_by_hand() {
        // Scores of query 0: 1·[1, 0] = [ln 3, 0] with scale ln 3, so the weights are 3/4 and 1/4. Query 1: [0, 0], a mean.
        let shape = OracleShape::self_attention(1, 2, 1, 2);
        let (q, k, v) = ([1.0, 0.0, 0.0, 0.0], [1.0, 5.0, 0.0, 7.0], [4.0, 8.0, 0.0, -4.0]);
        let problem = OracleProblem { softmax_scale: 3f64.ln(), ..OracleProblem::new(shape, &q, &k, &v) };
        let oracle = Oracle::new(problem).unwrap();
        close(&oracle.attend_all(), &[3.0, 5.0, 2.0, 2.0]);
        close(&oracle.lse_all(), &[4f64.ln(), 2f64.ln()]);

        // A bias of ln 3 on key 1 levels query 0 and tips query 1.
        let bias = [0.0, 3f32.ln(), 0.0, 3f32.ln()];
        let biased = Oracle::new(OracleProblem { bias: Some(&bias), ..problem }).unwrap().attend_all();
        for (got, expected) in biased.iter().zip([2.0, 2.0, 1.0, -1.0]) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }

        // One key left: its value, whatever the scores.
        let keep = [false, true];
        let oracle = Oracle::new(OracleProblem { key_keep: Some(&keep), ..problem }).unwrap();
        close(&oracle.attend_all(), &[0.0, -4.0, 0.0, -4.0]);
        close(&oracle.lse_all(), &[0.0, 0.0]);
    }

    #[test]
    fn modifiers_by_hand() {
        // Scores [ln 3, 0] as above; one more score of ln 4 leaves the keys 3/8 and 1/8.
        let shape = OracleShape::self_attention(1, 2, 1, 2);
        let (q, k, v) = ([1.0, 0.0, 0.0, 0.0], [1.0, 5.0, 0.0, 7.0], [4.0, 8.0, 0.0, -4.0]);
        let problem = OracleProblem { softmax_scale: 3f64.ln(), ..OracleProblem::new(shape, &q, &k, &v) };
        let with = |modifiers| Oracle::new(OracleProblem { modifiers, ..problem }).unwrap();
        let near = |got: &[f64], expected: &[f64]| {
            let is_near = got.iter().zip(expected).all(|(got, expected)| (got - expected).abs() < 1e-6);
            assert!(is_near && got.len() == expected.len(), "{got:?} {expected:?}");
        };
        let sinks = [4f32.ln()];
        let sunk = with(Modifiers { sinks: Some(&sinks), ..Modifiers::default() });
        near(&sunk.attend_all(), &[1.5, 2.5, 4.0 / 6.0, 4.0 / 6.0]);
        near(&sunk.lse_all(), &[8f64.ln(), 6f64.ln()]);
        // Without a key, the sink alone.
        let dropped = OracleProblem { key_keep: Some(&[false; 2]), ..*sunk.problem() };
        near(&Oracle::new(dropped).unwrap().attend_all(), &[0.0; 4]);
        near(&Oracle::new(dropped).unwrap().lse_all(), &[f64::from(sinks[0]); 2]);
        // A distance of 1 costs ln 3: query 0 has scores [ln 3, −ln 3], query 1 [−ln 3, 0].
        let slopes = [3f32.ln()];
        let linear = with(Modifiers { slopes: Some(&slopes), ..Modifiers::default() });
        near(&linear.attend_all(), &[3.6, 6.8, 1.0, -1.0]);
        // A cap of 1e-9 makes all scores equal, and one of 1e9 none different.
        near(&with(Modifiers { softcap: Some(1e-9), ..Modifiers::default() }).attend_all(), &[2.0; 4]);
        near(&with(Modifiers { softcap: Some(1e9), ..Modifiers::default() }).attend_all(), &[3.0, 5.0, 2.0, 2.0]);
        let short = Modifiers { sinks: Some(&[]), ..Modifiers::default() };
        let refused = Oracle::new(OracleProblem { modifiers: short, ..problem }).unwrap_err();
        assert_eq!(refused.to_string(), "sinks: expected 1 elements ([1]), got 0");
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let shape = OracleShape::self_attention(1, 2, 1, 1);
        let oracle = Oracle::new(OracleProblem::new(shape, &[1e4, -1e4], &[1e4, 0.0], &[2.0, 3.0])).unwrap();
        close(&oracle.attend_all(), &[2.0, 3.0]);
    }

    #[test]
    fn masked_keys_are_never_touched() {
        let shape = OracleShape { batch: 2, seq_q: 3, seq_k: 5, heads: 4, kv_heads: 2, head_dim: 3 };
        let [q, k, v] = inputs(shape);
        let keep = [true, false, true, false, true, false, false, true, true, false];
        let plain = OracleProblem { key_keep: Some(&keep), ..OracleProblem::new(shape, &q, &k, &v) };
        let expected = Oracle::new(plain).unwrap().attend_all();
        assert!(expected.iter().all(|value| value.is_finite()));

        for garbage in [f32::NAN, f32::INFINITY, 1e30] {
            let poison = |values: &[f32]| -> Vec<f32> {
                let row = shape.kv_heads * shape.head_dim;
                values.iter().enumerate().map(|(at, &value)| if keep[at / row] { value } else { garbage }).collect()
            };
            let (k, v) = (poison(&k), poison(&v));
            assert_eq!(Oracle::new(OracleProblem { k: &k, v: &v, ..plain }).unwrap().attend_all(), expected);
            // The same keys dropped by a bias of -inf.
            let bias: Vec<f32> = (0..2 * 4 * 3 * 5)
                .map(|at| if keep[at / (4 * 3 * 5) * 5 + at % 5] { 0.0 } else { f32::NEG_INFINITY })
                .collect();
            let biased = OracleProblem { k: &k, v: &v, key_keep: None, bias: Some(&bias), ..plain };
            assert_eq!(Oracle::new(biased).unwrap().attend_all(), expected);
        }
    }

    #[test]
    fn rows_without_keys_and_dropped_queries_are_positive_zero() {
        let shape = OracleShape::self_attention(2, 2, 1, 2);
        let [mut q, k, v] = inputs(shape);
        q[..2].fill(f32::NAN);
        let key_keep = [false, false, true, true];
        let query_keep = [true, true, true, false];
        let masked = OracleProblem { key_keep: Some(&key_keep), ..OracleProblem::new(shape, &q, &k, &v) };
        let out = Oracle::new(OracleProblem { query_keep: Some(&query_keep), ..masked }).unwrap();
        let values = out.attend_all();
        for at in [0, 1, 2, 3, 6, 7] {
            assert_eq!(values[at].to_bits(), 0, "element {at}");
        }
        assert!(values[4] != 0.0 && values[5] != 0.0);
        let lse = out.lse_all();
        assert!(lse[2].is_finite());
        assert!([0, 1, 3].iter().all(|&at| lse[at] == f64::NEG_INFINITY), "{lse:?}");

        let bias = [f32::NEG_INFINITY; 8];
        let all_minus_infinity = Oracle::new(OracleProblem { bias: Some(&bias), key_keep: None, ..masked }).unwrap();
        assert!(all_minus_infinity.attend_all().iter().all(|value| value.to_bits() == 0));
    }

    #[test]
    fn a_nan_query_gives_a_nan_row_and_no_other() {
        let shape = OracleShape::self_attention(1, 3, 1, 2);
        let [mut q, k, v] = inputs(shape);
        q[3] = f32::NAN;
        let oracle = Oracle::new(OracleProblem::new(shape, &q, &k, &v)).unwrap();
        let nan: Vec<bool> = oracle.attend_all().iter().map(|value| value.is_nan()).collect();
        assert_eq!(nan, [false, false, true, true, false, false]);
        assert!(oracle.attend_row(RowIndex { query: 1, ..ROW }).unwrap().lse.is_nan());
    }

    #[test]
    fn grouped_heads_read_consecutive_key_heads() {
        let shape = OracleShape { batch: 1, seq_q: 2, seq_k: 3, heads: 6, kv_heads: 2, head_dim: 4 };
        let [q, k, v] = inputs(shape);
        let grouped = Oracle::new(OracleProblem::new(shape, &q, &k, &v)).unwrap().attend_all();
        let repeat =
            |values: &[f32]| -> Vec<f32> { values.chunks(4).flat_map(|head| [head; 3]).flatten().copied().collect() };
        let (k, v) = (repeat(&k), repeat(&v));
        let full = OracleShape { kv_heads: 6, ..shape };
        assert_eq!(Oracle::new(OracleProblem::new(full, &q, &k, &v)).unwrap().attend_all(), grouped);
    }

    #[test]
    fn rows_agree_with_the_whole() {
        let shape = OracleShape { batch: 2, seq_q: 3, seq_k: 4, heads: 2, kv_heads: 1, head_dim: 5 };
        let [q, k, v] = inputs(shape);
        let oracle = Oracle::new(OracleProblem::new(shape, &q, &k, &v)).unwrap();
        let (all, lse) = (oracle.attend_all(), oracle.lse_all());
        let rows = [RowIndex { batch: 1, head: 0, query: 2 }, RowIndex { batch: 0, head: 1, query: 1 }];
        for (at, answer) in rows.iter().zip(oracle.attend_rows(&rows).unwrap()) {
            let start = ((at.batch * 3 + at.query) * 2 + at.head) * 5;
            assert_eq!(oracle.output_offset(*at), start);
            assert_eq!(answer.out, all[start..start + 5]);
            assert_eq!(answer.lse, lse[(at.batch * 2 + at.head) * 3 + at.query]);
        }
    }

    #[test]
    fn bad_problems_are_named() {
        let shape = OracleShape::self_attention(1, 2, 1, 2);
        let (four, three) = ([0.0; 4], [0.0; 3]);
        let good = OracleProblem::new(shape, &four, &four, &four);
        let refused = |problem| Oracle::new(problem).unwrap_err().to_string();
        assert_eq!(refused(OracleProblem { k: &three, ..good }), "k: expected 4 elements ([1, 2, 1, 2]), got 3");
        let keep = [true; 3];
        assert!(refused(OracleProblem { key_keep: Some(&keep), ..good }).starts_with("key_keep: expected 2 elements"));
        assert!(refused(OracleProblem { query_keep: Some(&keep), ..good }).starts_with("query_keep: expected 2"));
        assert!(refused(OracleProblem { bias: Some(&three), ..good }).starts_with("bias: expected 4 elements"));
        assert!(refused(OracleProblem { softmax_scale: f64::NAN, ..good }).starts_with("softmax_scale: "));
        let kv_heads = |kv_heads| OracleProblem { shape: OracleShape { kv_heads, ..shape }, ..good };
        assert!(refused(kv_heads(2)).starts_with("kv_heads: expected a divisor of heads = 1"));
        assert!(refused(kv_heads(0)).starts_with("kv_heads: expected at least 1"));
        let huge = OracleShape { batch: usize::MAX, ..shape };
        assert!(refused(OracleProblem { shape: huge, ..good }).starts_with("q: expected fewer elements"));
        let row = Oracle::new(good).unwrap().attend_row(RowIndex { query: 2, ..ROW }).unwrap_err();
        assert_eq!(row, OracleError::RowOutOfRange { argument: "query", limit: 2, got: 2 });
    }
}
