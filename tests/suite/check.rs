//! What an output is held against: the f64 oracle, by three rules, and exact zeros.

use anyhow::{Context, Result, anyhow, ensure};
use varlen_fa::DType;
use varlen_fa_testkit::{
    CompareError, Oracle, OracleProblem, OracleShape, RowIndex, Tolerance, Yardsticks, check_close, check_field_rule,
    check_masked_rows_zero, check_relative, naive_low_precision_rows,
};

use super::call::Call;
use super::memory::{narrow, precision};
use super::trials::Variant;

/// How far from the oracle an output may be.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Element by element: `atol + rtol · |reference|`.
    pub fixed: Tolerance,
    /// The field's rule and the whole tensor's: both take the inputs for standard normal, scores for moderate.
    pub yardsticks: Option<Yardsticks>,
}

impl Rules {
    /// For standard normal inputs and the default scale.
    pub fn standard(dtype: DType) -> Self {
        let precision = precision(dtype);
        Self { fixed: Tolerance::fixed(precision), yardsticks: Some(Yardsticks::standard(precision)) }
    }

    /// For inputs under which the naive run is no yardstick: the fixed rule alone, with at least this `atol`.
    pub fn fixed_only(dtype: DType, atol: f64) -> Self {
        let fixed = Tolerance::fixed(precision(dtype));
        Self { fixed: Tolerance { atol: fixed.atol.max(atol), ..fixed }, yardsticks: None }
    }
}

/// The oracle's answer for some rows of a call's output, or for all of them.
#[derive(Debug)]
pub struct Reference {
    rows: Vec<RowIndex>,
    offsets: Vec<usize>,
    is_whole: bool,
    /// Whether the row attends to no key at all.
    is_empty: Vec<bool>,
    expected: Vec<f64>,
    low_precision: Vec<f32>,
}

impl Call {
    /// Runs the call and judges every row of its output by the standard rules.
    pub fn check(&self, variant: &Variant) -> Result<()> {
        self.check_by(variant, Rules::standard(self.dtype))
    }

    /// Runs the call and judges every row of its output.
    pub fn check_by(&self, variant: &Variant, rules: Rules) -> Result<()> {
        let bits = self.run(variant)?;
        self.judge(&bits, &self.reference(usize::MAX)?, rules)
    }

    /// The answer for all rows, or for a sample if there are more than `limit`.
    pub fn reference(&self, limit: usize) -> Result<Reference> {
        let sees = self.sees();
        let oracle = self.oracle(sees.as_deref())?;
        let shape = oracle.output_shape();
        let rows = oracle.sample_rows(1, limit);
        let answers = oracle.attend_rows(&rows)?;
        let is_empty = answers.iter().map(|row| !row.sees_keys).collect();
        let expected = answers.into_iter().flat_map(|row| row.out).collect();
        let low_precision = naive_low_precision_rows(&oracle, precision(self.dtype), &rows)?;
        let offsets = rows.iter().map(|&row| oracle.output_offset(row)).collect();
        let is_whole = rows.len() == shape[..3].iter().product();
        Ok(Reference { rows, offsets, is_whole, is_empty, expected, low_precision })
    }

    /// The log-sum-exp of every row, `[B, H, Sq]`.
    pub fn reference_lse(&self) -> Result<Vec<f64>> {
        let sees = self.sees();
        Ok(self.oracle(sees.as_deref())?.lse_all())
    }

    fn oracle<'a>(&'a self, sees: Option<&'a [bool]>) -> Result<Oracle<'a>> {
        let problem = OracleProblem::new(self.shape, &self.values[0], &self.values[1], &self.values[2]);
        Ok(Oracle::new(OracleProblem {
            softmax_scale: self.scale.map_or(problem.softmax_scale, f64::from),
            key_keep: self.mask.key_keep(),
            query_keep: self.mask.query_keep(),
            sees,
            bias: self.bias.as_deref(),
            modifiers: self.modifying.of_oracle(),
            ..problem
        })?)
    }

    /// Judges an output of which the rows of some queries, given by batch row and position, must be NaN throughout. The others
    /// are judged as [`judge`](Self::judge) does.
    pub fn judge_beside_nan(
        &self,
        bits: &[u32],
        reference: &Reference,
        rules: Rules,
        is_nan: impl Fn(usize, usize) -> bool,
    ) -> Result<()> {
        let ([_, queries, heads, dim], mut bits) = (self.output_shape(), bits.to_vec());
        for (&start, expected) in reference.offsets.iter().zip(reference.expected.chunks(dim)) {
            let (row, token) = (&mut bits[start..start + dim], start / dim / heads);
            let (batch, query) = (token / queries, token % queries);
            if is_nan(batch, query) {
                let out = self.widen(row);
                ensure!(out.iter().all(|value| value.is_nan()), "query {query} of batch row {batch}: got {out:?}");
                row.iter_mut().zip(expected).for_each(|(bits, &value)| *bits = narrow(value as f32, self.dtype));
            }
        }
        self.judge(&bits, reference, rules)
    }

    /// `[B, Sq, Sk]`: whether the query sees the key, where there is a rule.
    fn sees(&self) -> Option<Vec<bool>> {
        let rule = self.rule.as_ref()?;
        let OracleShape { batch, seq_q, seq_k, .. } = self.shape;
        let pairs = (0..batch).flat_map(|b| (0..seq_q).flat_map(move |i| (0..seq_k).map(move |j| (b, i, j))));
        Some(pairs.map(|(b, i, j)| rule.sees(b, i, j, [seq_q, seq_k])).collect())
    }

    /// Judges an output: masked rows are +0.0, all others finite, and those of the reference near it.
    pub fn judge(&self, bits: &[u32], reference: &Reference, rules: Rules) -> Result<()> {
        let (shape, out) = (self.output_shape(), self.widen(bits));
        // Widening keeps the sign of zero, so these are the bits of the output's own type.
        if let Some(keep) = self.mask.query_keep() {
            check_masked_rows_zero("masked rows", shape, &out, keep)?;
        }
        let unwritten = out.iter().position(|value| !value.is_finite());
        ensure!(unwritten.is_none(), "element {unwritten:?} of {shape:?} is {}", unwritten.map_or(0.0, |at| out[at]));
        reference.judge(&out, shape, rules).with_context(|| format!("{:?}, {}", self.shape, self.dtype))
    }
}

impl Reference {
    fn judge(&self, out: &[f32], shape: [usize; 4], rules: Rules) -> Result<()> {
        let Self { rows, offsets, is_whole, is_empty, expected, low_precision } = self;
        let dim = shape[3];
        let sampled: Vec<f32> = offsets.iter().flat_map(|&start| &out[start..start + dim]).copied().collect();
        let shape = if *is_whole { shape } else { [1, rows.len(), 1, dim] };
        let empty_rows = sampled.chunks(dim).zip(is_empty).zip(rows).filter(|((_, is_empty), _)| **is_empty);
        for ((row, _), at) in empty_rows {
            ensure!(
                row.iter().all(|value| value.to_bits() == 0),
                "{at:?} attends to no key: expected +0.0, got {row:?}"
            );
        }
        // Rows of a sample are counted in the second dimension.
        let explain = |error: CompareError| match &error {
            CompareError::NotClose { at, .. } | CompareError::Relative { at, .. } if !is_whole => {
                anyhow!("{error}; that row is {:?}", rows[at[1]])
            }
            _ => anyhow!(error),
        };
        check_close("valid rows", shape, &sampled, expected, rules.fixed).map_err(explain)?;
        if let Some(Yardsticks { field, relative }) = rules.yardsticks {
            let largest = expected.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
            check_field_rule("valid rows", shape, &sampled, low_precision, expected, field * largest)
                .map_err(explain)?;
            check_relative("valid rows", shape, &sampled, expected, relative).map_err(explain)?;
        }
        Ok(())
    }
}
