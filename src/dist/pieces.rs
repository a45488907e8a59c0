//! In which pieces keys and values travel that attention begins with before all of them have come: [`Pieces`].

use std::ops::Range;

use crate::call::block::Block;

/// Query rows times heads that a GPU computes at once: 128 by each of 132 multiprocessors.
const ROWS_AT_ONCE: usize = 132 * 128;

/// Keys and values of some heads of some batch rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub batches: Range<usize>,
    /// All of them, where there are several batch rows.
    pub heads: Range<usize>,
    /// Whether it is among what attention begins with.
    pub is_first: bool,
}

/// Pieces of `[2, Hkv, B, S, D]`, keys before values, in the order in which attention reads them: the heads of one batch row after those
/// of the row before. The first ones are as large as what a GPU computes at once, which nothing hides; each chunk after them is larger
/// than the one before, under whose attention it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pieces {
    heads: usize,
    batch: usize,
    all: Vec<Piece>,
}

impl Pieces {
    /// Of `heads` heads of keys and `batch` batch rows, none of them 0. `rows`: the rank's query rows of a batch row and head of keys.
    pub(super) fn new((heads, batch): (usize, usize), rows: usize, chunks: usize) -> Self {
        let first = ROWS_AT_ONCE.div_ceil(rows.max(1));
        let mut all = Vec::new();
        let mut start = 0;
        for (at, end) in ends(heads * batch, first, chunks).into_iter().enumerate() {
            while start < end {
                let (row, head) = (start / heads, start % heads);
                let whole_rows = (end - start) / heads;
                let (rows, of_heads) = match head {
                    0 if whole_rows > 0 => (whole_rows, 0..heads),
                    _ => (1, head..heads.min(head + end - start)),
                };
                start += rows * of_heads.len();
                all.push(Piece { batches: row..row + rows, heads: of_heads, is_first: at == 0 });
            }
        }
        Self { heads, batch, all }
    }

    pub(super) fn all(&self) -> &[Piece] {
        &self.all
    }

    /// The heads of all batch rows that the first pieces are of.
    pub(super) fn first_heads(&self) -> Range<usize> {
        let first = self.all.iter().take_while(|piece| piece.is_first);
        0..first.map(|piece| piece.heads.end).max().unwrap_or(0)
    }

    /// Where a piece lies in so many bytes of a rank.
    pub(super) fn block(&self, piece: &Piece, bytes: u64) -> Block {
        let (heads, batch) = (self.heads as u64, self.batch as u64);
        let row = bytes / (2 * heads * batch);
        let [first_batch, first_head] = [piece.batches.start as u64, piece.heads.start as u64];
        let (batches, of_heads) = (piece.batches.len() as u64, piece.heads.len() as u64);
        let start = (first_head * batch + first_batch) * row;
        match batches == batch {
            // Heads lie one after another.
            true => Block {
                start,
                width: of_heads * batch * row,
                pitch: heads * batch * row,
                rows: 2,
                slice_rows: 2,
                slices: 1,
            },
            false => {
                Block { start, width: batches * row, pitch: batch * row, rows: of_heads, slice_rows: heads, slices: 2 }
            }
        }
    }
}

/// Where each of so many chunks of `count` ends, at least one each. The first one has `first`, or less where chunks would else shrink;
/// each other one grows by the same factor.
fn ends(count: usize, first: usize, chunks: usize) -> Vec<usize> {
    let first = first.clamp(1, (count / chunks).max(1)) as f64;
    let sums = |growth: f64| {
        (0..chunks).scan((0.0, first), move |(sum, size), _| {
            *sum += *size;
            *size *= growth;
            Some(*sum)
        })
    };
    // The factor with which they have all of it.
    let (mut least, mut most) = (1.0, count as f64);
    for _ in 0..50 {
        let middle = f64::midpoint(least, most);
        match sums(middle).last() {
            Some(sum) if sum < count as f64 => least = middle,
            _ => most = middle,
        }
    }
    let mut before = 0;
    let all = sums(most).enumerate().map(|(at, sum)| {
        let left = chunks - 1 - at;
        before = match left {
            0 => count,
            _ => (sum.round() as usize).clamp(before + 1, count.saturating_sub(left).max(before + 1)),
        };
        before
    });
    all.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every head of every batch row comes once, in order, and the first of them first.
    #[test]
    fn pieces_have_all_heads_in_the_order_of_work() {
        for (heads, batch, rows) in [(1, 1, 1), (24, 2, 2304), (24, 1, 8192), (8, 3, 64), (2, 5, 100_000), (3, 7, 9000)]
        {
            for chunks in 1..=4.min(heads) {
                let pieces = Pieces::new((heads, batch), rows, chunks);
                let mut place = 0;
                for piece in pieces.all() {
                    assert_eq!(piece.batches.start * heads + piece.heads.start, place, "{pieces:?}");
                    assert!(piece.batches.len() == 1 || piece.heads == (0..heads), "{pieces:?}");
                    place += piece.batches.len() * piece.heads.len();
                    assert_eq!((piece.batches.end - 1) * heads + piece.heads.end, place, "{pieces:?}");
                    assert!(!piece.is_first || piece.heads.end <= pieces.first_heads().end);
                }
                assert_eq!(place, heads * batch, "{pieces:?}");
                assert!(pieces.all()[0].is_first && !pieces.first_heads().is_empty());
            }
        }
    }

    /// The joint layer of 1024² in a batch of two, and a video of 16k tokens, on two ranks.
    #[test]
    fn chunks_grow_from_what_a_gpu_computes_at_once() {
        assert_eq!(ends(48, 8, 3), [8, 22, 48]);
        assert_eq!(ends(24, 3, 3), [3, 10, 24]);
        // Even ones, where the first would be the largest; as many as there are.
        assert_eq!(ends(12, 100, 3), [4, 8, 12]);
        assert_eq!(ends(3, 1, 3), [1, 2, 3]);
        assert_eq!(ends(5, 1, 1), [5]);
    }

    /// Blocks of all pieces cover the memory, each byte once.
    #[test]
    fn blocks_cover_the_memory() {
        for (heads, batch, rows, chunks) in [(24, 2, 2304, 3), (5, 3, 9000, 2), (4, 1, 64, 4), (2, 4, 50_000, 2)] {
            let pieces = Pieces::new((heads, batch), rows, chunks);
            let row = 3;
            let bytes = (2 * heads * batch * row) as u64;
            let mut covered = vec![0; bytes as usize];
            for (at, piece) in pieces.all().iter().enumerate() {
                let Block { start, width, pitch, rows, slice_rows, slices } = pieces.block(piece, bytes);
                for line in (0..slices).flat_map(|slice| (0..rows).map(move |row| slice * slice_rows + row)) {
                    let first = (start + line * pitch) as usize;
                    for (byte, times) in covered.iter_mut().enumerate().skip(first).take(width as usize) {
                        *times += 1;
                        // Of which head and batch row it is.
                        let of_row = byte / row % (heads * batch);
                        let (head, batch_row) = (of_row / batch, of_row % batch);
                        assert!(piece.heads.contains(&head) && piece.batches.contains(&batch_row), "piece {at}");
                    }
                }
            }
            assert!(covered.iter().all(|&times| times == 1), "{pieces:?}");
        }
    }
}
