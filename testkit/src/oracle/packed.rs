//! The oracle of packed rows: sequences one after another, told apart by cumulative lengths.

use super::error::{OracleError, check_heads, check_len, check_positive, check_scale};
use super::modifiers::Modifiers;
use super::row;
use crate::parallel::fill_rows;

/// Varlen attention: query sequence `s` is `cu_seqlens_q[s]..cu_seqlens_q[s + 1]` of `q`, and attends to the keys
/// `cu_seqlens_k[s]..cu_seqlens_k[s + 1]` of `k` and `v`.
#[derive(Clone, Copy, Debug)]
pub struct PackedProblem<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `h` reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// The factor of `q·k`.
    pub softmax_scale: f64,
    /// Starts of the query sequences, and the total.
    pub cu_seqlens_q: &'a [i32],
    /// Starts of the key sequences, and the total.
    pub cu_seqlens_k: &'a [i32],
    /// `[total_q, heads, head_dim]`.
    pub q: &'a [f32],
    /// `[total_k, kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// `[total_k, kv_heads, head_dim]`.
    pub v: &'a [f32],
    /// For each packed row of the queries, whether it sees each key of its sequence.
    pub sees: Option<&'a [Vec<bool>]>,
    /// What else happens to the scores; positions count from the start of each sequence.
    pub modifiers: Modifiers<'a>,
}

/// The answer to a [`PackedProblem`].
#[derive(Clone, Debug, PartialEq)]
pub struct PackedOutput {
    /// `[total_q, heads, head_dim]`.
    pub out: Vec<f64>,
    /// `[heads, total_q]`: the log-sum-exp of each row; -inf where its sequence has no key and its head no sink.
    pub lse: Vec<f64>,
}

/// Attention within each packed sequence; a sequence without keys gives zeros.
///
/// # Errors
/// [`OracleError`] names the argument, what was expected and what came.
pub fn attend_packed(problem: &PackedProblem<'_>) -> Result<PackedOutput, OracleError> {
    let &PackedProblem { heads, kv_heads, head_dim, softmax_scale, q, k, v, modifiers, .. } = problem;
    check_heads(heads, kv_heads)?;
    check_positive("head_dim", head_dim)?;
    check_scale(softmax_scale)?;
    let queries = check_cu_seqlens("cu_seqlens_q", problem.cu_seqlens_q)?;
    let keys = check_cu_seqlens("cu_seqlens_k", problem.cu_seqlens_k)?;
    if keys.len() != queries.len() {
        let expected = format!("{} entries, as in cu_seqlens_q", queries.len());
        return Err(OracleError::CuSeqlens {
            argument: "cu_seqlens_k",
            expected,
            got: format!("{} entries", keys.len()),
        });
    }
    let (total_q, total_k) = (queries[queries.len() - 1], keys[keys.len() - 1]);
    check_len("q", &[total_q, heads, head_dim], q.len())?;
    check_len("k", &[total_k, kv_heads, head_dim], k.len())?;
    check_len("v", &[total_k, kv_heads, head_dim], v.len())?;

    modifiers.check(heads)?;
    if let Some(sees) = problem.sees {
        check_len("sees", &[total_q], sees.len())?;
    }
    let mut rows = vec![row::AttendedRow::default(); total_q * heads];
    fill_rows(&mut rows, 1, |index, answer| {
        let (token, head) = (index / heads, index % heads);
        // Starts never decrease, so the last sequence that starts at or before the token is the one that holds it.
        let sequence = queries.partition_point(|&start| start <= token) - 1;
        let kv_head = head / (heads / kv_heads);
        let first = keys[sequence];
        let kept = (first..keys[sequence + 1])
            .filter(|key| problem.sees.is_none_or(|sees| sees[token][key - first]))
            .map(|key| {
                let place = [token - queries[sequence], key - first];
                let counts = [&queries, &keys].map(|starts| starts[sequence + 1] - starts[sequence]);
                ((key * kv_heads + kv_head) * head_dim, modifiers.alibi(head, place, counts))
            });
        answer[0] = row::attend(&q[index * head_dim..][..head_dim], k, v, softmax_scale, (&modifiers, head), kept);
    });
    let lse = (0..heads).flat_map(|head| rows.iter().skip(head).step_by(heads).map(|row| row.lse)).collect();
    Ok(PackedOutput { out: rows.into_iter().flat_map(|row| row.out).collect(), lse })
}

/// The cumulative lengths as positions: at least one, from 0, never decreasing.
fn check_cu_seqlens(argument: &'static str, cu_seqlens: &[i32]) -> Result<Vec<usize>, OracleError> {
    let refuse =
        |expected: &str, got: String| Err(OracleError::CuSeqlens { argument, expected: expected.to_owned(), got });
    match cu_seqlens.first() {
        None => return refuse("at least one entry", "none".to_owned()),
        Some(0) => {}
        Some(first) => return refuse("0 as the first entry", first.to_string()),
    }
    if let Some(at) = cu_seqlens.windows(2).position(|pair| pair[1] < pair[0]) {
        return refuse("entries that never decrease", format!("{} after {}", cu_seqlens[at + 1], cu_seqlens[at]));
    }
    // Not negative, since the first is 0 and none is less than the one before.
    Ok(cu_seqlens.iter().map(|&start| start.unsigned_abs() as usize).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{Oracle, OracleProblem, OracleShape};
    use crate::random;

    #[test]
    fn agrees_with_the_padded_oracle_sequence_by_sequence() {
        let (heads, kv_heads, head_dim) = (4, 2, 3);
        let (cu_q, cu_k) = ([0, 2, 2, 5, 7], [0, 3, 4, 4, 9]);
        let q = random::normal_stream(5, 0, 7 * heads * head_dim);
        let k = random::normal_stream(5, 1, 9 * kv_heads * head_dim);
        let v = random::normal_stream(5, 2, 9 * kv_heads * head_dim);
        let problem = PackedProblem {
            heads,
            kv_heads,
            head_dim,
            softmax_scale: 0.5,
            cu_seqlens_q: &cu_q,
            cu_seqlens_k: &cu_k,
            q: &q,
            k: &k,
            v: &v,
            sees: None,
            modifiers: Modifiers::default(),
        };
        let packed = attend_packed(&problem).unwrap();
        let mut expected = Vec::new();
        let mut lse = vec![Vec::new(); heads];
        for sequence in 0..4 {
            let (q_start, q_end) = (cu_q[sequence] as usize, cu_q[sequence + 1] as usize);
            let (k_start, k_end) = (cu_k[sequence] as usize, cu_k[sequence + 1] as usize);
            let shape =
                OracleShape { batch: 1, seq_q: q_end - q_start, seq_k: k_end - k_start, heads, kv_heads, head_dim };
            let (q_row, k_row) = (heads * head_dim, kv_heads * head_dim);
            let k_range = k_start * k_row..k_end * k_row;
            let padded =
                OracleProblem::new(shape, &q[q_start * q_row..q_end * q_row], &k[k_range.clone()], &v[k_range]);
            let oracle = Oracle::new(OracleProblem { softmax_scale: 0.5, ..padded }).unwrap();
            expected.extend(oracle.attend_all());
            for (index, value) in oracle.lse_all().into_iter().enumerate() {
                lse[index / shape.seq_q].push(value);
            }
        }
        assert_eq!(packed.out, expected);
        assert_eq!(packed.lse, lse.concat());
        // The third sequence has queries but no keys.
        assert!(packed.out[2 * heads * head_dim..5 * heads * head_dim].iter().all(|value| value.to_bits() == 0));
        assert_eq!(packed.lse[2], f64::NEG_INFINITY);
    }

    #[test]
    fn nothing_packed_gives_nothing() {
        let problem = PackedProblem {
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            softmax_scale: 1.0,
            cu_seqlens_q: &[0],
            cu_seqlens_k: &[0],
            q: &[],
            k: &[],
            v: &[],
            sees: None,
            modifiers: Modifiers::default(),
        };
        assert_eq!(attend_packed(&problem), Ok(PackedOutput { out: vec![], lse: vec![] }));
    }

    #[test]
    fn bad_cumulative_lengths_are_named() {
        for (cu_seqlens, message) in [
            (&[][..], "cu: expected at least one entry, got none"),
            (&[1, 2][..], "cu: expected 0 as the first entry, got 1"),
            (&[0, 3, 2][..], "cu: expected entries that never decrease, got 2 after 3"),
        ] {
            assert_eq!(check_cu_seqlens("cu", cu_seqlens).unwrap_err().to_string(), message);
        }
        let one = [0.0];
        let problem = PackedProblem {
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            softmax_scale: 1.0,
            cu_seqlens_q: &[0, 1],
            cu_seqlens_k: &[0, 0, 1],
            q: &one,
            k: &one,
            v: &one,
            sees: None,
            modifiers: Modifiers::default(),
        };
        let message = attend_packed(&problem).unwrap_err().to_string();
        assert_eq!(message, "cu_seqlens_k: expected 2 entries, as in cu_seqlens_q, got 3 entries");
        let long = PackedProblem { cu_seqlens_k: &[0, 2], ..problem };
        assert_eq!(attend_packed(&long).unwrap_err().to_string(), "k: expected 2 elements ([2, 1, 1]), got 1");
    }
}
