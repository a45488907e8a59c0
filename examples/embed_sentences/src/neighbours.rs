//! Nearest neighbours among unit vectors, by cosine.

use rayon::prelude::*;
use serde::Serialize;

/// A neighbour of some row: its index, and the cosine to it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Neighbour {
    /// Row of the neighbour.
    pub index: usize,
    /// Cosine to it.
    pub cosine: f32,
}

/// For each row of `embeddings`, `[rows, width]` of unit vectors, its `top` nearest other rows, nearest first; equally
/// near ones in their order.
pub fn nearest(embeddings: &[f32], width: usize, top: usize) -> Vec<Vec<Neighbour>> {
    let rows: Vec<&[f32]> = embeddings.chunks_exact(width.max(1)).collect();
    rows.par_iter()
        .enumerate()
        .map(|(index, row)| {
            let mut others: Vec<Neighbour> = rows
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index)
                .map(|(index, other)| Neighbour { index, cosine: dot(row, other) })
                .collect();
            let nearer = |a: &Neighbour, b: &Neighbour| b.cosine.total_cmp(&a.cosine).then(a.index.cmp(&b.index));
            if top < others.len() {
                others.select_nth_unstable_by(top, nearer);
                others.truncate(top);
            }
            others.sort_unstable_by(nearer);
            others
        })
        .collect()
}

/// The dot product, in eight partial sums so that it vectorises.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: [[f32; 2]; 4] = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]];

    fn indices(top: usize) -> Vec<Vec<usize>> {
        let found = nearest(ROWS.as_flattened(), 2, top);
        found.iter().map(|row| row.iter().map(|neighbour| neighbour.index).collect()).collect()
    }

    #[test]
    fn the_nearest_comes_first_and_never_the_row_itself() {
        assert_eq!(indices(1), [[1], [2], [1], [2]]);
        assert_eq!(indices(3), [[1, 2, 3], [2, 0, 3], [1, 0, 3], [2, 1, 0]]);
        assert_eq!(nearest(ROWS.as_flattened(), 2, 1)[1][0], Neighbour { index: 2, cosine: 0.8 });
    }

    #[test]
    fn more_neighbours_than_rows_gives_all_the_others() {
        assert_eq!(indices(9), indices(3));
        assert_eq!(nearest(&[1.0, 0.0], 2, 3), [[]]);
        assert!(nearest(&[], 2, 3).is_empty());
        assert_eq!(indices(0), [[0_usize; 0]; 4]);
    }

    #[test]
    fn equally_near_rows_keep_their_order() {
        let found = nearest(&[1.0, 1.0, 1.0, 1.0], 1, 2);
        assert_eq!(found[2].iter().map(|neighbour| neighbour.index).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn dot_products_cover_the_tail() {
        let row: Vec<f32> = (1..=19_u8).map(f32::from).collect();
        assert_eq!(dot(&row, &row), 2470.0);
    }
}
