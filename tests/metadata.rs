//! Masks, metadata and layouts against naive readings of the same booleans. No device is needed.

#![allow(clippy::single_range_in_vec_init, reason = "one run of tokens is meant")]

use std::ops::Range;

use anyhow::{Context, Result};
use proptest::prelude::*;
use varlen_fa::{CuSeqlens, Error, KeyMask, Layout, Run, VarlenMeta};
use varlen_fa_testkit::{CASES, random};

/// Metadata, one token at a time.
#[derive(Debug, PartialEq)]
struct Naive {
    indices: Vec<u32>,
    inv_indices: Vec<i32>,
    cu_seqlens: Vec<i32>,
    max_seqlen: usize,
    runs: Vec<Vec<Range<usize>>>,
}

impl Naive {
    fn new(batch: usize, seq: usize, keep: &[bool]) -> Self {
        let mut naive = Self { indices: vec![], inv_indices: vec![], cu_seqlens: vec![0], max_seqlen: 0, runs: vec![] };
        for row in 0..batch {
            let mut runs: Vec<Range<usize>> = vec![];
            let mut valid = 0;
            for token in 0..seq {
                let flat = row * seq + token;
                if !keep[flat] {
                    naive.inv_indices.push(-1);
                    continue;
                }
                naive.inv_indices.push(naive.indices.len() as i32);
                naive.indices.push(flat as u32);
                valid += 1;
                match runs.last_mut() {
                    Some(run) if run.end == token => run.end += 1,
                    _ => runs.push(token..token + 1),
                }
            }
            naive.cu_seqlens.push(naive.indices.len() as i32);
            naive.max_seqlen = naive.max_seqlen.max(valid);
            naive.runs.push(runs);
        }
        naive
    }

    fn read(meta: &VarlenMeta) -> Result<Self> {
        Ok(Self {
            indices: meta.indices()?.to_vec(),
            inv_indices: meta.inv_indices()?.to_vec(),
            cu_seqlens: meta.cu_seqlens().as_slice().to_vec(),
            max_seqlen: meta.max_seqlen(),
            runs: (0..meta.batch()).map(|row| meta.runs(row).iter().map(|run| run.range()).collect()).collect(),
        })
    }
}

/// Everything that mask and metadata say, against the booleans.
fn check(batch: usize, seq: usize, keep: &[bool]) -> Result<()> {
    let mask = KeyMask::from_bool(batch, seq, keep)?;
    let meta = VarlenMeta::from_key_mask(&mask)?;
    let naive = Naive::new(batch, seq, keep);
    let kept = keep.iter().filter(|&&keep| keep).count();
    assert_eq!(Naive::read(&meta)?, naive);
    assert_eq!(Naive::read(&meta.clone())?, naive);
    assert_eq!((meta.batch(), meta.seq(), meta.total_valid()), (batch, seq, kept));
    assert_eq!((meta.is_empty(), meta.is_all_valid()), (kept == 0, kept == batch * seq));
    let cu_seqlens = meta.cu_seqlens();
    assert_eq!((cu_seqlens.batch(), cu_seqlens.total(), cu_seqlens.max_seqlen()), (batch, kept, naive.max_seqlen));

    assert_eq!(meta.key_mask(), &mask);
    assert_eq!((mask.batch(), mask.seq(), mask.total_kept()), (batch, seq, kept));
    assert_eq!((mask.is_empty(), mask.is_all_kept()), (kept == 0, kept == batch * seq));
    for row in 0..batch {
        let tokens: Vec<bool> = (0..seq).map(|token| mask.keeps(row, token)).collect();
        assert_eq!(tokens, keep[row * seq..][..seq]);
        assert_eq!(mask.runs(row).collect::<Vec<_>>(), meta.runs(row));
        assert!(mask.runs(row).all(|Run { len, .. }| len > 0));
    }
    // Outside the mask nothing is kept.
    assert!(!mask.keeps(batch, 0) && !mask.keeps(0, seq) && !mask.keeps(usize::MAX, usize::MAX));
    assert!(mask.runs(batch).next().is_none() && meta.runs(batch).is_empty());

    // The same mask from its runs, and from integers of which no kept one is 1.
    assert_eq!(KeyMask::from_runs(seq, &naive.runs)?, mask);
    let integers: Vec<i32> = keep.iter().enumerate().map(|(at, &keep)| if keep { -2 - at as i32 } else { 0 }).collect();
    assert_eq!(KeyMask::from_integers(batch, seq, &integers)?, mask);
    Ok(())
}

#[test]
fn named_cases() -> Result<()> {
    for case in &CASES {
        check(case.batch, case.seq(), &case.mask()).context(case.name)?;
    }
    Ok(())
}

/// The upstream test of `inv_indices`: a Bernoulli(0.6) mask of 2 × 32.
#[test]
fn bernoulli_mask_of_2_by_32() -> Result<()> {
    let keep = random::bernoulli_mask(0, 64, 0.6)?;
    check(2, 32, &keep)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(2, 32, &keep)?)?;
    for (flat, &inverse) in meta.inv_indices()?.iter().enumerate() {
        match usize::try_from(inverse) {
            Ok(packed) => assert_eq!((meta.indices()?[packed] as usize, keep[flat]), (flat, true)),
            Err(_) => assert_eq!((inverse, keep[flat]), (-1, false)),
        }
    }
    Ok(())
}

#[test]
fn lengths_around_words() -> Result<()> {
    for seq in [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193] {
        check(2, seq, &vec![true; 2 * seq])?;
        check(2, seq, &vec![false; 2 * seq])?;
        for place in [0, seq / 2, seq - 1] {
            check(1, seq, &(0..seq).map(|token| token == place).collect::<Vec<_>>())?;
            check(1, seq, &(0..seq).map(|token| token != place).collect::<Vec<_>>())?;
        }
    }
    Ok(())
}

#[test]
fn sizes_of_nothing() -> Result<()> {
    for (batch, seq) in [(0, 0), (0, 5), (3, 0)] {
        check(batch, seq, &[])?;
    }
    let none = VarlenMeta::from_key_mask(&KeyMask::all(3, 0)?)?;
    // Vacuously both: every one of no tokens is valid, and none is.
    assert!(none.is_empty() && none.is_all_valid());
    Ok(())
}

#[test]
fn every_integer_but_zero_keeps() -> Result<()> {
    let expected = KeyMask::from_bool(1, 4, &[true, false, true, true])?;
    assert_eq!(KeyMask::from_integers(1, 4, &[1_u8, 0, 2, u8::MAX])?, expected);
    assert_eq!(KeyMask::from_integers(1, 4, &[1_i8, 0, -1, i8::MIN])?, expected);
    assert_eq!(KeyMask::from_integers(1, 4, &[1_u16, 0, 256, u16::MAX])?, expected);
    assert_eq!(KeyMask::from_integers(1, 4, &[1_i16, 0, 256, i16::MIN])?, expected);
    assert_eq!(KeyMask::from_integers(1, 4, &[1_u32, 0, 1 << 16, u32::MAX])?, expected);
    assert_eq!(KeyMask::from_integers(1, 4, &[1_i32, 0, 1 << 16, i32::MIN])?, expected);
    assert_eq!(KeyMask::from_integers(1, 4, &[1_u64, 0, 1 << 32, u64::MAX])?, expected);
    assert_eq!(KeyMask::from_integers(1, 4, &[1_i64, 0, 1 << 32, i64::MIN])?, expected);
    Ok(())
}

#[test]
fn lengths_and_runs_may_be_anything_that_fits() -> Result<()> {
    let lengths = [0, 1, 63, 64, 65, 70];
    let keep: Vec<bool> = lengths.iter().flat_map(|&length| (0..70).map(move |token| token < length)).collect();
    assert_eq!(KeyMask::from_lengths(70, &lengths)?, KeyMask::from_bool(6, 70, &keep)?);
    // Empty runs, runs that touch, overlap, or come in any order.
    let runs = [vec![5..5, 60..70, 0..3, 3..10, 8..12, 65..66], vec![70..70, 0..0]];
    let keep: Vec<bool> = (0..140).map(|at| at < 12 || (60..70).contains(&at)).collect();
    let mask = KeyMask::from_runs(70, &runs)?;
    assert_eq!(mask, KeyMask::from_bool(2, 70, &keep)?);
    assert_eq!(mask.runs(0).map(Run::range).collect::<Vec<_>>(), [0..12, 60..70]);
    assert_ne!(KeyMask::all(2, 3)?, KeyMask::all(3, 2)?);
    Ok(())
}

#[test]
fn masks_that_do_not_fit_are_refused() {
    let length = |got| Some(Error::Length { argument: "mask", expected: 6, got });
    assert_eq!(KeyMask::from_bool(2, 3, &[true; 5]).err(), length(5));
    assert_eq!(KeyMask::from_bool(2, 3, &[true; 7]).err(), length(7));
    assert_eq!(KeyMask::from_integers(2, 3, &[1_u8; 4]).err(), length(4));
    let row = |argument, row, expected: &str, got: &str| {
        Some(Error::MaskRow { argument, row, expected: expected.to_owned(), got: got.to_owned() })
    };
    assert_eq!(KeyMask::from_lengths(4, &[4, 5]).err(), row("lengths", 1, "a length of at most 4", "5"));
    assert_eq!(KeyMask::from_runs(4, &[vec![0..4], vec![3..5]]).err(), row("runs", 1, "a range inside 0..4", "3..5"));
    let backwards = Range { start: 3, end: 2 };
    assert_eq!(KeyMask::from_runs(4, &[[backwards]]).err(), row("runs", 0, "a range inside 0..4", "3..2"));
    assert_eq!(KeyMask::from_runs(4, &[[5..5]]).err(), row("runs", 0, "a range inside 0..4", "5..5"));
}

/// Positions are an `i32` in `cu_seqlens` and `inv_indices`: past that an error, and nothing is allocated first.
#[test]
fn token_counts_past_32_bits_are_refused() {
    let limit = i32::MAX as u64;
    let too_large = |got| Some(Error::TooLarge { argument: "mask", limit_name: "an i32 of batch · seq", limit, got });
    for (batch, seq, got) in [
        (1 << 16, 1 << 15, 1 << 31),
        (1, 1 << 31, 1 << 31),
        (1 << 31, 1, 1 << 31),
        (1 << 31, 0, 1 << 31),
        (3, 1 << 62, 3 << 62),
        (usize::MAX, usize::MAX, u64::MAX),
    ] {
        assert_eq!(KeyMask::all(batch, seq).err(), too_large(got), "{batch} × {seq}");
        assert_eq!(KeyMask::from_bool(batch, seq, &[]).err(), too_large(got), "{batch} × {seq}");
    }
    assert_eq!(KeyMask::from_lengths(1 << 31, &[3]).err(), too_large(1 << 31));
}

/// The largest mask of one token in each of many rows, and of one row: cheap, since it is bits.
#[test]
fn the_largest_masks_are_masks() -> Result<()> {
    let wide = KeyMask::from_runs(i32::MAX as usize, &[[i32::MAX as usize - 1..i32::MAX as usize]])?;
    assert_eq!(wide.total_kept(), 1);
    let run = wide.runs(0).next().context("the last token is kept")?;
    assert_eq!(run.range(), i32::MAX as usize - 1..i32::MAX as usize);
    Ok(())
}

#[test]
fn cu_seqlens_say_what_is_wrong() -> Result<()> {
    let error = |expected: &str, got: &str| {
        Some(Error::CuSeqlens { argument: "cu_seqlens", expected: expected.to_owned(), got: got.to_owned() })
    };
    assert_eq!(CuSeqlens::new(&[]).err(), error("a first value of 0", "no values"));
    assert_eq!(CuSeqlens::new(&[1, 2]).err(), error("a first value of 0", "1"));
    assert_eq!(CuSeqlens::new(&[-1, 2]).err(), error("a first value of 0", "-1"));
    assert_eq!(CuSeqlens::new(&[0, 3, 2]).err(), error("values that never fall", "2 after 3 at position 2"));
    assert_eq!(CuSeqlens::new(&[0, -1]).err(), error("values that never fall", "-1 after 0 at position 1"));
    let good = CuSeqlens::new(&[0, 0, 5, 5, i32::MAX])?;
    assert_eq!((good.batch(), good.total(), good.max_seqlen()), (4, i32::MAX as usize, i32::MAX as usize - 5));
    assert_eq!(CuSeqlens::from_lengths(&[0, 5, 0, i32::MAX as usize - 5])?.as_slice(), good.as_slice());
    let limit = i32::MAX as u64;
    let too_large = |got| Some(Error::TooLarge { argument: "lengths", limit_name: "an i32 of the sum", limit, got });
    assert_eq!(CuSeqlens::from_lengths(&[1, i32::MAX as usize]).err(), too_large(1 << 31));
    assert_eq!(CuSeqlens::from_lengths(&[usize::MAX, usize::MAX]).err(), too_large(u64::MAX));
    let none = CuSeqlens::from_lengths(&[])?;
    assert_eq!((none.as_slice(), none.batch(), none.total(), none.max_seqlen()), (&[0][..], 0, 0, 0));
    Ok(())
}

/// Every place that a layout reaches, element by element in row-major order.
fn places(layout: &Layout) -> Vec<u64> {
    let mut places = vec![layout.offset()];
    for (&size, &stride) in layout.shape().iter().zip(layout.strides()) {
        places = places.iter().flat_map(|&place| (0..size as u64).map(move |index| place + index * stride)).collect();
    }
    places
}

#[test]
fn layouts_refuse_what_they_cannot_hold() -> Result<()> {
    let too_large = |layout: varlen_fa::Result<Layout>| {
        matches!(layout, Err(Error::TooLarge { argument: "shape", limit_name: "the address space", .. }))
    };
    assert!(too_large(Layout::contiguous(&[usize::MAX, 2])));
    assert!(too_large(Layout::contiguous(&[1 << 20, 1 << 20, 1 << 20, 8])));
    assert!(too_large(Layout::strided(&[2, 2], &[u64::MAX, 1], 0)));
    assert!(too_large(Layout::strided(&[2], &[1], u64::MAX)));
    // Larger than any memory, and still a layout.
    let large = Layout::contiguous(&[1 << 15, 1 << 15, 1 << 15, 8])?;
    assert_eq!((large.numel(), large.end()), (1 << 48, 1 << 48));
    let rank = |argument, expected, got| Some(Error::Rank { argument, expected, got });
    assert_eq!(Layout::contiguous(&[]).err(), rank("shape", "1 to 4", 0));
    assert_eq!(Layout::contiguous(&[2; 5]).err(), rank("shape", "1 to 4", 5));
    assert_eq!(Layout::strided(&[2, 3], &[1], 0).err(), rank("strides", "as many as the shape has", 1));
    let layout = Layout::contiguous(&[2, 3])?;
    for order in [&[0][..], &[0, 0], &[0, 2], &[0, 1, 2]] {
        assert!(matches!(layout.permute(order), Err(Error::View { argument: "order", .. })), "{order:?}");
    }
    for (dim, range) in [(2, 0..1), (0, 0..3), (1, 4..4), (1, Range { start: 2, end: 1 })] {
        assert!(
            matches!(layout.slice(dim, range.clone()), Err(Error::View { argument: "range", .. })),
            "{dim} {range:?}"
        );
    }
    Ok(())
}

fn small_layout() -> impl Strategy<Value = Layout> {
    let dims = prop::collection::vec((0_usize..=4, 0_u64..=12), 1..=4);
    (dims, 0_u64..10).prop_filter_map("a layout", |(dims, offset)| {
        let (shape, strides): (Vec<_>, Vec<_>) = dims.into_iter().unzip();
        Layout::strided(&shape, &strides, offset).ok()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn metadata_agrees_with_a_naive_reading(batch in 0_usize..6, seq in 0_usize..200, p in 0.0..=1.0, seed in 0_u64..1000) {
        let keep = random::bernoulli_mask(seed, batch * seq, p).map_err(|error| TestCaseError::fail(error.to_string()))?;
        check(batch, seq, &keep).map_err(|error| TestCaseError::fail(error.to_string()))?;
    }

    #[test]
    fn masks_of_long_runs_agree_too(len in 1_usize..100, phase in 0_usize..100, seq in 1_usize..300) {
        let keep: Vec<bool> = (0..2 * seq).map(|at| ((at % seq + phase) / len).is_multiple_of(2)).collect();
        check(2, seq, &keep).map_err(|error| TestCaseError::fail(error.to_string()))?;
    }

    #[test]
    fn layouts_agree_with_naive_places(layout in small_layout(), dim in 0_usize..4, start in 0_usize..5, len in 0_usize..5) {
        let all = places(&layout);
        prop_assert_eq!(layout.numel(), all.len());
        prop_assert_eq!(layout.end(), all.iter().max().map_or(layout.offset(), |last| last + 1));
        let row_major = (0..all.len() as u64).map(|at| at + layout.offset());
        prop_assert_eq!(layout.is_contiguous(), all.iter().copied().eq(row_major));

        // Never "no" where two elements share a place; "yes" may be wrong for interleaved layouts.
        let mut distinct = all.clone();
        distinct.sort_unstable();
        distinct.dedup();
        prop_assert!(layout.self_overlaps() || distinct.len() == all.len());

        let dim = dim % layout.rank();
        let size = layout.shape()[dim];
        match layout.slice(dim, start..start + len) {
            Err(_) => prop_assert!(start + len > size),
            Ok(sliced) => {
                prop_assert!(start + len <= size);
                let inner: usize = layout.shape()[dim + 1..].iter().product();
                let kept = all.iter().enumerate().filter(|(at, _)| (start..start + len).contains(&(at / inner.max(1) % size.max(1))));
                prop_assert_eq!(places(&sliced), kept.map(|(_, &place)| place).collect::<Vec<_>>());
            }
        }

        let reversed: Vec<usize> = (0..layout.rank()).rev().collect();
        let turned = layout.permute(&reversed).map_err(|error| TestCaseError::fail(error.to_string()))?;
        let mut turned_places = places(&turned);
        let mut places = all;
        turned_places.sort_unstable();
        places.sort_unstable();
        prop_assert_eq!(turned_places, places);
        prop_assert_eq!(turned.permute(&reversed).ok(), Some(layout));
    }
}
