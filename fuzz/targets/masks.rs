//! Masks and metadata from any constructor and any arguments, against one `bool` a token.
#![no_main]

use std::ops::Range;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use varlen_fa::{CuSeqlens, KeyMask, VarlenMeta};

/// The arguments of one constructor. Sizes are small or wild, so that both answers and refusals are
/// seen.
#[derive(Debug, Arbitrary)]
enum Input {
    Bools { batch: u8, seq: u8, keep: Vec<bool> },
    Integers { batch: u8, seq: u8, keep: Vec<i16> },
    Lengths { seq: u8, lengths: Vec<u8> },
    Runs { seq: u8, rows: Vec<Vec<(u8, u8)>> },
    All { batch: u32, seq: u32 },
    CuSeqlens { values: Vec<i32> },
    Additive { batch: u8, seq: u8, values: Vec<Value>, rows: u8 },
    Strict { batch: u8, seq: u8, values: Vec<i8> },
}

/// A value of an additive mask: mostly one that masks have.
#[derive(Debug, Arbitrary)]
enum Value {
    Kept,
    Dropped,
    Infinite,
    Any(f32),
}

impl Value {
    fn get(&self) -> f32 {
        match *self {
            Self::Kept => 0.0,
            Self::Dropped => -1e4,
            Self::Infinite => f32::NEG_INFINITY,
            Self::Any(value) => value,
        }
    }
}

/// The largest mask whose every token is read.
const MAX_TOKENS: usize = 1 << 16;

fuzz_target!(|input: Input| run(input));

fn run(input: Input) {
    match input {
        Input::Bools { batch, seq, keep } => {
            let (batch, seq) = (batch.into(), seq.into());
            let mask = KeyMask::from_bool(batch, seq, &keep);
            assert_eq!(mask.is_ok(), keep.len() == batch * seq, "{mask:?}");
            check(mask.ok(), batch, seq, |row, token| keep[row * seq + token]);
        }
        Input::Integers { batch, seq, keep } => {
            let (batch, seq) = (batch.into(), seq.into());
            let mask = KeyMask::from_integers(batch, seq, &keep);
            assert_eq!(mask.is_ok(), keep.len() == batch * seq, "{mask:?}");
            check(mask.ok(), batch, seq, |row, token| keep[row * seq + token] != 0);
        }
        Input::Lengths { seq, lengths } => {
            let seq = seq.into();
            let lengths: Vec<usize> = lengths.into_iter().map(usize::from).collect();
            let mask = KeyMask::from_lengths(seq, &lengths);
            assert_eq!(mask.is_ok(), lengths.iter().all(|&length| length <= seq), "{mask:?}");
            check(mask.ok(), lengths.len(), seq, |row, token| token < lengths[row]);
        }
        Input::Runs { seq, rows } => {
            let seq = seq.into();
            // Any ranges: reversed, empty, overlapping, past the end.
            let range = |&(start, end): &(u8, u8)| start.into()..end.into();
            let rows: Vec<Vec<Range<usize>>> = rows.iter().map(|row| row.iter().map(range).collect()).collect();
            let mask = KeyMask::from_runs(seq, &rows);
            check(mask.ok(), rows.len(), seq, |row, token| rows[row].iter().any(|run| run.contains(&token)));
        }
        Input::All { batch, seq } => {
            let (batch, seq) = (batch as usize, seq as usize);
            // Large sizes are asked for by their refusal alone; those between would fill the memory.
            // Rows without tokens count as rows.
            let tokens = batch.saturating_mul(seq.max(1));
            if (MAX_TOKENS..=i32::MAX as usize).contains(&tokens) {
                return;
            }
            let mask = KeyMask::all(batch, seq);
            assert_eq!(mask.is_ok(), tokens <= i32::MAX as usize, "{mask:?}");
            check(mask.ok(), batch, seq, |_, _| true);
        }
        Input::Additive { batch, seq, values, rows } => {
            let (batch, seq): (usize, usize) = (batch.into(), seq.into());
            let values: Vec<f32> = values.iter().map(Value::get).collect();
            let mask = KeyMask::from_additive(batch, seq, &values);
            let is_sound = values.iter().all(|&value| value == 0.0 || value <= -1000.0);
            assert_eq!(mask.is_ok(), values.len() == batch * seq && is_sound, "{mask:?}");
            let Ok(mask) = mask else { return };
            let (rows, broadcast) = (rows.into(), mask.broadcast(rows.into()));
            assert_eq!(broadcast.is_ok(), batch == 1 || batch == rows, "{broadcast:?}");
            check(broadcast.ok(), rows, seq, |row, token| values[row % batch * seq + token] == 0.0);
            check(Some(mask), batch, seq, |row, token| values[row * seq + token] == 0.0);
        }
        Input::Strict { batch, seq, values } => {
            let (batch, seq) = (batch.into(), seq.into());
            let mask = KeyMask::from_integers_strict(batch, seq, &values);
            let is_sound = values.iter().all(|value| [0, 1].contains(value));
            assert_eq!(mask.is_ok(), values.len() == batch * seq && is_sound, "{mask:?}");
            check(mask.ok(), batch, seq, |row, token| values[row * seq + token] == 1);
        }
        Input::CuSeqlens { values } => {
            let rises = values.first() == Some(&0) && values.is_sorted();
            let cu_seqlens = CuSeqlens::new(&values);
            assert_eq!(cu_seqlens.is_ok(), rises, "{values:?}: {cu_seqlens:?}");
            if let Ok(cu_seqlens) = cu_seqlens {
                let lengths = values.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
                assert_eq!(cu_seqlens.as_slice(), values);
                assert_eq!(cu_seqlens.batch(), values.len() - 1);
                assert_eq!(cu_seqlens.total(), values.last().map_or(0, |&last| last as usize));
                assert_eq!(cu_seqlens.max_seqlen(), lengths.clone().max().unwrap_or(0));
                let again = CuSeqlens::from_lengths(&lengths.collect::<Vec<_>>()).expect("lengths of sound sequences");
                assert_eq!(again.as_slice(), values);
            }
        }
    }
}

/// Everything that a mask and its metadata say, one token at a time.
fn check(mask: Option<KeyMask>, batch: usize, seq: usize, keeps: impl Fn(usize, usize) -> bool) {
    let Some(mask) = mask else { return };
    let meta = VarlenMeta::from_key_mask(&mask).expect("metadata of a sound mask");
    let (mut indices, mut inv_indices, mut cu_seqlens) = (vec![], vec![], vec![0]);
    let mut longest = 0;
    for row in 0..batch {
        let mut runs: Vec<Range<usize>> = vec![];
        for token in 0..seq {
            assert_eq!(mask.keeps(row, token), keeps(row, token), "row {row}, token {token}");
            if !keeps(row, token) {
                inv_indices.push(-1);
                continue;
            }
            inv_indices.push(indices.len() as i32);
            indices.push((row * seq + token) as u32);
            match runs.last_mut() {
                Some(run) if run.end == token => run.end += 1,
                _ => runs.push(token..token + 1),
            }
        }
        longest = longest.max(indices.len() - cu_seqlens[row] as usize);
        cu_seqlens.push(indices.len() as i32);
        assert_eq!(mask.runs(row).map(|run| run.range()).collect::<Vec<_>>(), runs);
        assert_eq!(meta.runs(row).iter().map(|run| run.range()).collect::<Vec<_>>(), runs);
    }
    assert!(!mask.keeps(batch, 0) && !mask.keeps(0, seq));
    assert_eq!((mask.batch(), mask.seq(), mask.total_kept()), (batch, seq, indices.len()));
    assert_eq!((meta.batch(), meta.seq(), meta.total_valid()), (batch, seq, indices.len()));
    assert_eq!((mask.is_empty(), mask.is_all_kept()), (indices.is_empty(), indices.len() == batch * seq));
    assert_eq!((meta.is_empty(), meta.is_all_valid()), (mask.is_empty(), mask.is_all_kept()));
    assert_eq!(meta.key_mask(), &mask);
    assert_eq!((meta.indices(), meta.inv_indices()), (Ok(&indices[..]), Ok(&inv_indices[..])));
    assert_eq!((meta.cu_seqlens().as_slice(), meta.max_seqlen()), (&cu_seqlens[..], longest));
}
