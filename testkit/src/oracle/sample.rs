//! Which rows to check where checking all of them would take too long.

use std::collections::BTreeSet;

use super::{Oracle, OracleShape, RowIndex};
use crate::random::{below, generator};

impl Oracle<'_> {
    /// `count` different rows, or all of them if there are fewer, in order; the same for the same seed.
    ///
    /// Half of them lie at a boundary, where kernels go wrong: a batch row's first and last query, and both sides of
    /// each place where the query mask changes. The others are kept rows, and any rows once those run out.
    pub fn sample_rows(&self, seed: u64, count: usize) -> Vec<RowIndex> {
        let OracleShape { batch, seq_q, heads, .. } = self.problem.shape;
        let total = batch * seq_q * heads;
        if count >= total {
            return (0..total).map(|row| self.row_at(row)).collect();
        }
        let mut rng = generator(seed, 0);
        let tokens = || (0..batch).flat_map(|b| (0..seq_q).map(move |i| (b, i)));
        let mut boundary: Vec<_> = tokens().filter(|&(b, i)| self.is_boundary(b, i)).collect();
        let kept: Vec<_> = tokens().filter(|&(b, i)| self.query_kept(b, i)).collect();

        let mut rows = BTreeSet::new();
        while rows.len() < count.div_ceil(2) && !boundary.is_empty() {
            let (batch, query) = boundary.swap_remove(below(&mut rng, boundary.len()));
            rows.insert(RowIndex { batch, head: below(&mut rng, heads), query });
        }
        // Draws repeat more and more as the kept rows fill up, hence the limit; the rest is then taken in order.
        for _ in 0..8 * count {
            if rows.len() < count && !kept.is_empty() {
                let (batch, query) = kept[below(&mut rng, kept.len())];
                rows.insert(RowIndex { batch, head: below(&mut rng, heads), query });
            }
        }
        let mut in_order = (0..total).map(|row| self.row_at(row));
        while rows.len() < count {
            let Some(row) = in_order.next() else { break };
            rows.insert(row);
        }
        rows.into_iter().collect()
    }

    fn is_boundary(&self, batch: usize, query: usize) -> bool {
        let last = self.problem.shape.seq_q - 1;
        let here = self.query_kept(batch, query);
        query == 0
            || query == last
            || self.query_kept(batch, query - 1) != here
            || self.query_kept(batch, query + 1) != here
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::OracleProblem;

    #[test]
    fn samples_are_distinct_kept_and_at_boundaries() {
        let shape = OracleShape::self_attention(2, 40, 3, 1);
        let zeros = vec![0.0; 2 * 40 * 3];
        let keep: Vec<bool> = (0..80).map(|at| !(25..50).contains(&at)).collect();
        let problem = OracleProblem { query_keep: Some(&keep), ..OracleProblem::new(shape, &zeros, &zeros, &zeros) };
        let oracle = Oracle::new(problem).unwrap();

        let rows = oracle.sample_rows(1, 30);
        assert_eq!(rows.len(), 30);
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "sorted and distinct");
        assert_eq!(rows, oracle.sample_rows(1, 30));
        assert_ne!(rows, oracle.sample_rows(2, 30));
        oracle.attend_rows(&rows).unwrap();
        for (batch, query) in [(0, 0), (0, 24), (0, 25), (0, 39), (1, 0), (1, 9), (1, 10), (1, 39)] {
            assert!(rows.iter().any(|row| (row.batch, row.query) == (batch, query)), "missing {batch} {query}");
        }
        let inside_gap = |row: &&RowIndex| matches!((row.batch, row.query), (0, 26..39) | (1, 1..9));
        assert_eq!(rows.iter().find(inside_gap), None);

        // More than the kept rows hold, then more than there are.
        assert_eq!(oracle.sample_rows(1, 239).len(), 239);
        assert_eq!(oracle.sample_rows(1, 1000).len(), 240);
        assert_eq!(oracle.sample_rows(1, 0), []);
    }

    #[test]
    fn a_mask_without_any_query_still_gives_rows() {
        let shape = OracleShape::self_attention(1, 10, 1, 1);
        let (zeros, keep) = ([0.0; 10], [false; 10]);
        let problem = OracleProblem { query_keep: Some(&keep), ..OracleProblem::new(shape, &zeros, &zeros, &zeros) };
        assert_eq!(Oracle::new(problem).unwrap().sample_rows(0, 4).len(), 4);
    }
}
