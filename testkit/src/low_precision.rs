//! A naive run in the working precision: the yardstick of the field's tolerance rule.

use crate::oracle::{Oracle, OracleError, RowIndex};
use crate::parallel::fill_rows;
use crate::precision::Precision;

/// Attention as PyTorch's math path computes it in `precision`, `[batch, seq_q, heads, head_dim]`.
///
/// Sums run in f32; the scores, the capped and the biased scores, the softmax and the output are each rounded to `precision`, since each
/// is a tensor there. The scale is applied before the one rounding of the scores, where PyTorch rounds scaled q and k
/// as well: this yardstick is the stricter one. Mask, modifiers, bias and rows without keys are read as by the oracle.
pub fn naive_low_precision(oracle: &Oracle<'_>, precision: Precision) -> Vec<f32> {
    let shape = oracle.output_shape();
    let mut out = vec![0.0; shape.iter().product()];
    fill_rows(&mut out, shape[3], |row, values| attend(oracle, precision, oracle.row_at(row), values));
    out
}

/// The rows asked for of [`naive_low_precision`], in their order, `[rows, head_dim]`.
///
/// # Errors
/// [`OracleError::RowOutOfRange`] if one lies outside the output.
pub fn naive_low_precision_rows(
    oracle: &Oracle<'_>,
    precision: Precision,
    rows: &[RowIndex],
) -> Result<Vec<f32>, OracleError> {
    rows.iter().try_for_each(|&at| oracle.check_row(at))?;
    let head_dim = oracle.problem().shape.head_dim;
    let mut out = vec![0.0; rows.len() * head_dim];
    fill_rows(&mut out, head_dim, |index, values| attend(oracle, precision, rows[index], values));
    Ok(out)
}

/// Writes row `at` to `out`, which holds zeros.
fn attend(oracle: &Oracle<'_>, precision: Precision, at: RowIndex, out: &mut [f32]) {
    if !oracle.query_kept(at.batch, at.query) {
        return;
    }
    let problem = oracle.problem();
    let (q, dim, scale) = (oracle.query(at), problem.shape.head_dim, problem.softmax_scale as f32);
    let mut keys: Vec<(usize, f32)> = oracle
        .kept_keys(at)
        .map(|(start, bias, alibi)| {
            let score = precision.round(scale * dot(q, &problem.k[start..start + dim]));
            let capped = precision.round(problem.modifiers.capped(f64::from(score)) as f32);
            (start, precision.round(precision.round(capped + alibi as f32) + bias))
        })
        .collect();
    // `f32::max` passes over NaN, so look for it first.
    if keys.iter().any(|&(_, score)| score.is_nan()) {
        return out.fill(f32::NAN);
    }
    let max = keys.iter().fold(f32::NEG_INFINITY, |max, &(_, score)| max.max(score));
    if max == f32::NEG_INFINITY {
        return;
    }
    let sink = precision.round(problem.modifiers.sink(at.head) as f32);
    let max = max.max(sink);
    let mut sum = (sink - max).exp();
    for (_, score) in &mut keys {
        *score = (*score - max).exp();
        sum += *score;
    }
    for (start, weight) in keys {
        let probability = precision.round(weight / sum);
        for (out, &value) in out.iter_mut().zip(&problem.v[start..start + dim]) {
            *out += probability * value;
        }
    }
    precision.round_all(out);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{OracleProblem, OracleShape};
    use crate::random;

    /// max |naive − oracle| over a random joint-like problem, in a precision.
    fn worst(precision: Precision) -> f64 {
        let shape = OracleShape::self_attention(2, 96, 2, 64);
        let len = 2 * 96 * 2 * 64;
        let [q, k, v] = [0, 1, 2].map(|stream| random::normal_rounded(1, stream, len, precision));
        let keep: Vec<bool> = (0..2 * 96).map(|at| at % 96 < 20 || at % 96 >= 40).collect();
        let problem = OracleProblem { key_keep: Some(&keep), ..OracleProblem::new(shape, &q, &k, &v) };
        let oracle = Oracle::new(problem).unwrap();
        let naive = naive_low_precision(&oracle, precision);
        let error = |(&got, expected): (&f32, f64)| (f64::from(got) - expected).abs();
        naive.iter().zip(oracle.attend_all()).map(error).fold(0.0, f64::max)
    }

    #[test]
    fn each_precision_errs_by_its_own_step() {
        let [f32_error, f16_error, bf16_error] = Precision::ALL.map(worst);
        assert!(f32_error > 0.0 && f32_error < 1e-5, "{f32_error}");
        assert!(f16_error > 1e-4 && f16_error < 2e-3, "{f16_error}");
        assert!(bf16_error > 1e-3 && bf16_error < 2e-2, "{bf16_error}");
    }

    #[test]
    fn every_intermediate_is_rounded() {
        // Probabilities: 1/3 thrice, which bf16 rounds to 171/512. So 255.5 becomes 85.33, rounded 85.5, and not 85.17,
        // rounded 85. The output: three of them sum to 513/512, rounded 1.
        let shape = OracleShape { batch: 1, seq_q: 1, seq_k: 3, heads: 1, kv_heads: 1, head_dim: 2 };
        let problem = OracleProblem::new(shape, &[0.0; 2], &[1.0; 6], &[255.0, 1.0, 0.5, 1.0, 0.0, 1.0]);
        let out = naive_low_precision(&Oracle::new(problem).unwrap(), Precision::Bf16);
        assert_eq!(out, [85.5, 1.0]);
        // Scores, where the step is 0.5: 64.125 becomes 64, and with its bias 64.25, a tie that becomes 64 again. Left
        // unrounded, either would part the two keys.
        let (shape, bias) = (OracleShape { seq_k: 2, head_dim: 1, ..shape }, [0.0, 0.25]);
        let problem = OracleProblem::new(shape, &[1.0], &[64.0, 64.125], &[1.0, -1.0]);
        let oracle = Oracle::new(OracleProblem { bias: Some(&bias), ..problem }).unwrap();
        assert_eq!(naive_low_precision(&oracle, Precision::Bf16), [0.0]);
    }

    #[test]
    fn masks_are_read_like_the_oracle_reads_them() {
        let shape = OracleShape::self_attention(3, 2, 1, 1);
        let nan = f32::NAN;
        let (q, k, v) =
            ([1.0, 1.0, 1.0, nan, 1.0, 1.0], [1.0, nan, 1.0, 1.0, nan, nan], [2.0, nan, 4.0, 4.0, nan, nan]);
        let key_keep = [true, false, true, true, false, false];
        let query_keep = [true, false, true, true, true, true];
        let problem = OracleProblem {
            key_keep: Some(&key_keep),
            query_keep: Some(&query_keep),
            ..OracleProblem::new(shape, &q, &k, &v)
        };
        let oracle = Oracle::new(problem).unwrap();
        let out = naive_low_precision(&oracle, Precision::F16);
        let bits: Vec<u32> = out.iter().map(|value| value.to_bits()).collect();
        assert_eq!([bits[0], bits[1], bits[2]], [2f32.to_bits(), 0, 4f32.to_bits()]);
        assert!(out[3].is_nan());
        assert_eq!(bits[4..], [0, 0]);

        let rows = [RowIndex { batch: 1, head: 0, query: 0 }, RowIndex { batch: 0, head: 0, query: 0 }];
        assert_eq!(naive_low_precision_rows(&oracle, Precision::F16, &rows), Ok(vec![4.0, 2.0]));
        let outside = RowIndex { batch: 3, head: 0, query: 0 };
        assert!(naive_low_precision_rows(&oracle, Precision::F16, &[outside]).is_err());
    }
}
