//! Whether an output is right, by the rules of the project's tests.

use anyhow::{Result, ensure};
use varlen_fa_testkit::oracle::Modifiers;
use varlen_fa_testkit::{
    Oracle, OracleProblem, OracleShape, Tolerance, Yardsticks, check_close, check_field_rule, check_masked_rows_zero,
    check_relative, naive_low_precision,
};

use super::call::Call;

/// With fewer output rows, a naive run may be exact by luck, and is no yardstick.
const LEAST_ROWS: usize = 16;

/// The tolerance of log-sum-exps, which are f32 whatever the element type is.
const LSE: Tolerance = Tolerance { rtol: 1e-5, atol: 2e-5 };

/// The tensors of a call, contiguous `[B, S, H, D]`, before masked tokens are hidden.
#[derive(Debug)]
pub struct Values {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// Of the call's shape.
    pub bias: Option<Vec<f32>>,
}

/// Judges an output `[B, Sq, H, D]` and a log-sum-exp `[B, H, Sq]`: rows of masked queries and rows without a key are +0.0, others
/// near the oracle's.
///
/// # Errors
/// What is wrong.
pub fn judge(call: &Call, values: &Values, out: &[f32], lse: Option<&[f32]>) -> Result<()> {
    let OracleShape { batch, seq_q, seq_k, heads, head_dim, .. } = call.shape;
    let sees = call.rule.map(|rule| -> Vec<bool> {
        let pairs = (0..batch * seq_q).flat_map(|row| (0..seq_k).map(move |j| [row % seq_q, j]));
        pairs.map(|pair| rule.sees(pair, [seq_q, seq_k])).collect()
    });
    let bias = values
        .bias
        .as_ref()
        .zip(call.bias)
        .map(|(values, shape)| broadcast(values, shape, [batch, heads, seq_q, seq_k]));
    let problem = OracleProblem::new(call.shape, &values.q, &values.k, &values.v);
    let oracle = Oracle::new(OracleProblem {
        softmax_scale: call.scale.map_or(problem.softmax_scale, f64::from),
        key_keep: call.tokens.key_keep(),
        query_keep: call.tokens.query_keep(),
        sees: sees.as_deref(),
        bias: bias.as_deref(),
        modifiers: Modifiers {
            softcap: (call.softcap != 0.0).then_some(f64::from(call.softcap)),
            slopes: call.slopes.as_deref(),
            sinks: call.sinks.as_deref(),
        },
        ..problem
    })?;
    let shape = oracle.output_shape();

    if let Some(keep) = call.tokens.query_keep() {
        // Widening keeps the sign of zero, so these are the bits of the output's own type.
        check_masked_rows_zero("rows of masked queries", shape, out, keep)?;
    }
    let expected = oracle.attend_all();
    for (row, (out, expected)) in out.chunks(head_dim).zip(expected.chunks(head_dim)).enumerate() {
        let place = format!("batch row {}, query {}, head {}", row / heads / seq_q, row / heads % seq_q, row % heads);
        ensure!(out.iter().all(|value| value.is_finite()), "{place}: expected numbers, got {out:?}");
        let is_empty = expected.iter().all(|&value| value == 0.0);
        ensure!(!is_empty || out.iter().all(|value| value.to_bits() == 0), "{place}: expected +0.0, got {out:?}");
    }
    let far = distances(call);
    let fixed = Tolerance::fixed(call.precision());
    check_close("the output", shape, out, &expected, Tolerance { atol: fixed.atol + far, ..fixed })?;
    if batch * seq_q * heads >= LEAST_ROWS {
        let Yardsticks { field, relative } = Yardsticks::standard(call.precision());
        let largest = expected.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
        let naive = naive_low_precision(&oracle, call.precision());
        check_field_rule("the output", shape, out, &naive, &expected, field * largest)?;
        check_relative("the output", shape, out, &expected, relative + far)?;
    }
    let Some(lse) = lse else { return Ok(()) };
    let expected = oracle.lse_all();
    let are_empty = |(got, expected): (&f32, &f64)| (*expected == f64::NEG_INFINITY) == (*got == f32::NEG_INFINITY);
    ensure!(
        lse.iter().zip(&expected).all(are_empty),
        "the log-sum-exp: −∞ is in other rows than in those without a key"
    );
    let (lse, expected): (Vec<f32>, Vec<f64>) =
        lse.iter().zip(expected).filter(|(_, expected)| *expected != f64::NEG_INFINITY).unzip();
    check_close("the log-sum-exp", [1, 1, 1, lse.len()], &lse, &expected, Tolerance { atol: LSE.atol + far, ..LSE })?;
    Ok(())
}

/// What ALiBi adds to the error: the distances that it takes from scores are large numbers, and scores are f32. Four units in the
/// last place of the largest.
fn distances(call: &Call) -> f64 {
    let steepest = call.slopes.iter().flatten().fold(0.0, |steepest: f64, &slope| steepest.max(f64::from(slope)));
    steepest * call.shape.seq_q.max(call.shape.seq_k) as f64 * 2f64.powi(-22)
}

/// `values` of `shape`, whose dimensions are 1 or those of `full`, as a tensor of `full`.
fn broadcast(values: &[f32], shape: [usize; 4], full: [usize; 4]) -> Vec<f32> {
    let at = |flat: usize| {
        let (mut rest, mut place, mut stride) = (flat, 0, 1);
        for dim in (0..4).rev() {
            if shape[dim] != 1 {
                place += rest % full[dim] * stride;
            }
            stride *= shape[dim];
            rest /= full[dim];
        }
        values[place]
    };
    (0..full.iter().product()).map(at).collect()
}

#[cfg(test)]
mod tests {
    use varlen_fa::{Config, Device, DeviceChoice};

    use super::*;
    use crate::check::call::{Choices, Tokens};

    /// Metadata over the first three of four tokens, and the right answer to it.
    fn answered() -> (Call, Values, Vec<f32>, Vec<f32>) {
        let device = Device::with_config(Config::default().with_device(DeviceChoice::Cpu)).unwrap();
        let choices = Choices::of(&device, None, None).unwrap();
        let shape = OracleShape { batch: 1, seq_q: 4, seq_k: 4, heads: 4, kv_heads: 4, head_dim: 2 };
        let call = Call {
            shape,
            dtype: varlen_fa::DType::F32,
            tokens: Tokens::Varlen(vec![true, true, true, false]),
            rule: None,
            softcap: 0.0,
            slopes: None,
            sinks: None,
            bias: None,
            scale: None,
            lse: true,
            ..Call::draw(0, &choices)
        };
        let values = |first: usize| (0..32).map(|at| ((first + at) * 7 % 11) as f32 / 8.0 - 0.5).collect::<Vec<_>>();
        let values = Values { q: values(1), k: values(2), v: values(3), bias: None };
        let keep = call.tokens.key_keep();
        let problem = OracleProblem::new(shape, &values.q, &values.k, &values.v);
        let oracle = Oracle::new(OracleProblem { key_keep: keep, query_keep: keep, ..problem }).unwrap();
        let (out, lse) = (oracle.attend_all(), oracle.lse_all());
        let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
        (call, values, narrow(out), narrow(lse))
    }

    #[test]
    fn the_right_answer_is_right() {
        let (call, values, out, lse) = answered();
        judge(&call, &values, &out, Some(&lse)).unwrap();
    }

    #[test]
    fn wrong_answers_are_told() {
        let (call, values, out, lse) = answered();
        let judged = |change: &dyn Fn(&mut [f32], &mut [f32])| {
            let (mut out, mut lse) = (out.clone(), lse.clone());
            change(&mut out, &mut lse);
            judge(&call, &values, &out, Some(&lse)).unwrap_err().to_string()
        };
        assert!(judged(&|out, _| out[3] += 1e-3).contains("the output"));
        assert!(judged(&|out, _| out[3] = f32::NAN).contains("expected numbers"));
        assert!(judged(&|out, _| out[31] = -0.0).contains("rows of masked queries"));
        assert!(judged(&|_, lse| lse[0] += 1e-3).contains("the log-sum-exp"));
        assert!(judged(&|_, lse| lse[3] = 0.0).contains("−∞"));
        // A small error everywhere.
        assert!(judged(&|out, _| out.iter_mut().for_each(|value| *value *= 1.0 + 4e-5)).contains("the output"));
    }

    #[test]
    fn biases_are_broadcast() {
        assert_eq!(broadcast(&[1.0, 2.0], [1, 2, 1, 1], [1, 2, 1, 2]), [1.0, 1.0, 2.0, 2.0]);
        assert_eq!(broadcast(&[1.0, 2.0], [1, 1, 1, 2], [1, 2, 1, 2]), [1.0, 2.0, 1.0, 2.0]);
        assert_eq!(broadcast(&[3.0], [1; 4], [1, 1, 2, 1]), [3.0, 3.0]);
    }
}
