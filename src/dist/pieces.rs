//! In which pieces keys and values travel that attention begins with before all of them have come: [`Pieces`].

use std::ops::Range;

use crate::call::block::{Block, BlockCopy, Lines};

/// Query rows times heads that a GPU computes at once: 128 by each of 132 multiprocessors.
const ROWS_AT_ONCE: usize = 132 * 128;
/// Bytes of the narrowest rows that copy engines are given: rows that lie apart come nearly as fast as wider ones from there on.
const NARROW_ROW: usize = 768;

/// Keys and values of some heads of some batch rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub batches: Range<usize>,
    /// All of them, where there are several batch rows.
    pub heads: Range<usize>,
    /// Whether it is among what attention begins with.
    pub is_first: bool,
}

/// Pieces of keys and values in the order in which attention reads them: the heads of one batch row after those of the row before. The
/// first ones are as large as what a GPU computes at once, which nothing hides; each chunk after them is larger than the one before,
/// under whose attention it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pieces {
    heads: usize,
    batch: usize,
    head_bytes: usize,
    all: Vec<Piece>,
}

impl Pieces {
    /// Of `heads` heads of keys and `batch` batch rows, none of them 0, each row of a head of so many bytes. `rows`: query rows of a batch
    /// row and head of keys, on the rank with the most: all ranks have the same pieces.
    pub(super) fn new((heads, batch): (usize, usize), head_bytes: usize, rows: usize, chunks: usize) -> Self {
        let narrow = NARROW_ROW.div_ceil(head_bytes.max(1)).min(heads);
        let first = ROWS_AT_ONCE.div_ceil(rows.max(1)).max(narrow);
        let mut ends = ends(heads * batch, first, chunks);
        // No piece is much narrower than the first.
        let wide = ends.first().map_or(narrow, |&first| first.clamp(narrow, heads));
        widen(&mut ends, wide);
        let mut all = Vec::new();
        let mut start = 0;
        for (at, end) in ends.into_iter().enumerate() {
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
        Self { heads, batch, head_bytes, all }
    }

    pub(super) fn all(&self) -> &[Piece] {
        &self.all
    }

    /// The heads of all batch rows that the first pieces are of.
    pub(super) fn first_heads(&self) -> Range<usize> {
        let first = self.all.iter().take_while(|piece| piece.is_first);
        0..first.map(|piece| piece.heads.end).max().unwrap_or(0)
    }

    /// The copies of a piece to room of so many bytes. `parts` is what the rank lent: keys and values.
    pub(super) fn copies(&self, piece: &Piece, parts: &[Lines], room: u64) -> Vec<BlockCopy> {
        parts.iter().enumerate().map(|part| self.copy_of(piece, part, room)).collect()
    }

    fn copy_of(&self, piece: &Piece, (part, lines): (usize, &Lines), room: u64) -> BlockCopy {
        let (heads, batch, head_bytes) = (self.heads as u64, self.batch as u64, self.head_bytes as u64);
        let (row, half) = (heads * head_bytes, room / 2);
        let tokens = half / (batch * row);
        let (first_batch, first_head) = (piece.batches.start as u64, piece.heads.start as u64);
        let (width, slices) = (piece.heads.len() as u64 * head_bytes, piece.batches.len() as u64);
        // With one batch row the distance to the next one is not looked at.
        let slice_rows = if slices > 1 { lines.slice_rows } else { tokens };
        let from = Block {
            start: first_batch * lines.slice_rows * lines.pitch + first_head * head_bytes,
            width,
            pitch: lines.pitch,
            rows: tokens,
            slice_rows,
            slices,
        };
        let to = Block {
            start: part as u64 * half + first_batch * tokens * row + first_head * head_bytes,
            pitch: row,
            slice_rows: tokens,
            ..from
        };
        BlockCopy { part, from, to }.merged()
    }
}

/// Makes each chunk end at a multiple of so many heads, or where all end. There may be fewer then.
fn widen(ends: &mut Vec<usize>, wide: usize) {
    let Some(&count) = ends.last() else { return };
    for end in ends.iter_mut().filter(|end| **end < count) {
        *end = (*end + wide / 2) / wide * wide;
    }
    ends.retain(|&end| (1..=count).contains(&end));
    ends.dedup();
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

    const HEAD_BYTES: usize = 256;

    /// Every head of every batch row comes once, in order, and the first of them first.
    #[test]
    fn pieces_have_all_heads_in_the_order_of_work() {
        for (heads, batch, rows) in [(1, 1, 1), (24, 2, 2304), (24, 1, 8192), (8, 3, 64), (2, 5, 100_000), (3, 7, 9000)]
        {
            for chunks in 1..=4.min(heads) {
                let pieces = Pieces::new((heads, batch), HEAD_BYTES, rows, chunks);
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

    /// No piece is left that is much narrower than the first.
    #[test]
    fn pieces_are_about_as_wide_as_the_first() {
        let of_rows = |heads, batch, rows, chunks, head_bytes| {
            let pieces = Pieces::new((heads, batch), head_bytes, rows, chunks);
            pieces.all().iter().map(|piece| piece.heads.len()).collect::<Vec<_>>()
        };
        assert_eq!(of_rows(24, 2, 2304, 3, HEAD_BYTES), [8, 16, 24]);
        assert_eq!(of_rows(24, 1, 8192, 3, HEAD_BYTES), [3, 6, 15]);
        assert_eq!(of_rows(24, 1, 8192, 1, HEAD_BYTES), [24]);
        // Narrow heads: as many as are wide enough, or all.
        assert_eq!(of_rows(24, 1, 100_000, 2, NARROW_ROW / 4), [4, 20]);
        assert_eq!(of_rows(2, 5, 100_000, 1, 2), [2]);
        let mut ends = vec![3, 9, 11, 20];
        widen(&mut ends, 8);
        assert_eq!(ends, [8, 20]);
    }

    /// The bytes of a block, in order.
    fn bytes_of(Block { start, width, pitch, rows, slice_rows, slices }: Block) -> Vec<usize> {
        let lines = (0..slices).flat_map(|slice| (0..rows).map(move |row| slice * slice_rows + row));
        lines.flat_map(|line| start + line * pitch..start + line * pitch + width).map(|byte| byte as usize).collect()
    }

    /// The copies of all pieces fill the room, each byte once and from the right one; the room has no other order than it says.
    #[test]
    fn copies_fill_the_room() {
        for (heads, batch, rows, chunks, head_bytes) in [
            (24, 2, 2304, 3, 256),
            (24, 2, 2304, 1, 256),
            (5, 3, 9000, 2, 2),
            (4, 1, 64, 4, 1024),
            (2, 4, 50_000, 2, 2048),
            (3, 4, 50_000, 2, 1024),
        ] {
            let pieces = Pieces::new((heads, batch), head_bytes, rows, chunks);
            let tokens = 3;
            let room = 2 * heads * batch * tokens * head_bytes;
            // Rows that lie apart, and batch rows too.
            let lines = Lines {
                bytes: (2 * batch * tokens * 3 * heads * head_bytes) as u64,
                pitch: (3 * heads * head_bytes) as u64,
                slice_rows: 2 * tokens as u64,
            };
            let parts = [lines; 2];
            let mut filled = vec![false; room];
            for piece in pieces.all() {
                for BlockCopy { part, from, to } in pieces.copies(piece, &parts, room as u64) {
                    assert!(from.end().unwrap() <= parts[part].bytes && to.end().unwrap() <= room as u64);
                    for (from, to) in bytes_of(from).into_iter().zip(bytes_of(to)) {
                        assert!(!std::mem::replace(&mut filled[to], true), "{pieces:?}");
                        let byte = to % head_bytes;
                        let at = to / head_bytes;
                        let (head, at) = (at % heads, at / heads);
                        let (which, batch_row, token) = (at / tokens / batch, at / tokens % batch, at % tokens);
                        assert!(piece.heads.contains(&head) && piece.batches.contains(&batch_row), "{piece:?}");
                        let line = batch_row * lines.slice_rows as usize + token;
                        let place = line * lines.pitch as usize + head * head_bytes + byte;
                        assert_eq!((part, from), (which, place));
                    }
                }
            }
            assert!(filled.iter().all(|&is_there| is_there), "{pieces:?}");
        }
    }

    /// Nothing lies between whole rows: they are one.
    #[test]
    fn whole_tensors_are_one_row() {
        let pieces = Pieces::new((4, 2), 64, 1, 1);
        let room = 2 * 4 * 2 * 10 * 64_u64;
        let lines = Lines { bytes: room / 2, pitch: 4 * 64, slice_rows: 10 };
        let copies = pieces.copies(&pieces.all()[0], &[lines; 2], room);
        let rows: Vec<_> = copies.iter().map(|copy| (copy.from.rows, copy.to.start, copy.to.width)).collect();
        assert_eq!(rows, [(1, 0, room / 2), (1, room / 2, room / 2)]);
    }
}
