//! Masks of every kind, with poison in all that they drop.

use anyhow::{Context, Result};
use varlen_fa::KeyMask;
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::trials::{Trials, Variant};

/// Lengths around the sizes of tiles, vectors and mask words.
pub const LENGTHS: [usize; 17] = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129];

pub fn register(trials: &mut Trials) {
    trials.each_path("masks/one_row_without_any_token", one_row_without_any_token);
    trials.each_path("masks/no_token_at_all", no_token_at_all);
    trials.each_path("masks/every_token", every_token);
    trials.each_path("masks/interior_holes", interior_holes);
    trials.each_path("masks/every_other_token", every_other_token);
    trials.each_path("masks/one_token_of_each_tile", one_token_of_each_tile);
    trials.each_path("masks/one_token_of_each_row", one_token_of_each_row);
    trials.each_path("masks/one_hole_in_each_row", one_hole_in_each_row);
    trials.each_path("masks/random", random_masks);
    trials.each_path("masks/lengths_around_tiles", lengths_around_tiles);
    trials.each_path("masks/runs_around_tiles", runs_around_tiles);
    trials.each_path("masks/integers_other_than_one", integers_other_than_one);
    trials.each_path("cross/masks_that_differ", cross_masks_that_differ);
    trials.each_path("cross/lengths_that_differ", cross_lengths_that_differ);
    trials.each_path("cross/rows_without_keys_or_queries", cross_rows_without_keys_or_queries);
    trials.each_path("cross/long_queries_few_keys", cross_long_queries_few_keys);
}

/// A `[rows, seq]` mask, token by token.
pub fn mask(rows: usize, seq: usize, keep: impl Fn(usize, usize) -> bool) -> Vec<bool> {
    (0..rows * seq).map(|at| keep(at / seq, at % seq)).collect()
}

pub fn bernoulli(seed: u64, len: usize, p: f64) -> Result<Vec<bool>> {
    Ok(random::bernoulli_mask(seed, len, p)?)
}

/// Self-attention under a mask, 4 query heads on 2 key heads of 32.
fn check_self(variant: &Variant, batch: usize, seq: usize, keep: Vec<bool>) -> Result<()> {
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 4, kv_heads: 2, head_dim: 32 };
    Call::random(shape, Mask::Varlen(keep), variant.dtype, 7).check(variant)
}

fn check_cross(variant: &Variant, [seq_q, seq_k]: [usize; 2], query: Vec<bool>, key: Vec<bool>) -> Result<()> {
    let batch = query.len() / seq_q;
    let shape = OracleShape { batch, seq_q, seq_k, heads: 4, kv_heads: 4, head_dim: 40 };
    Call::random(shape, Mask::Cross { query, key }, variant.dtype, 8).check(variant)
}

fn one_row_without_any_token(variant: &Variant) -> Result<()> {
    for empty in 0..3 {
        check_self(variant, 3, 100, mask(3, 100, |row, token| row != empty && token < 40 + 30 * row))?;
    }
    Ok(())
}

/// `B2 S16 H4 D64`, one of the named cases.
fn no_token_at_all(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(2, 16, 4, 64);
    Call::random(shape, Mask::Varlen(vec![false; 32]), variant.dtype, 9).check(variant)
}

fn every_token(variant: &Variant) -> Result<()> {
    check_self(variant, 2, 129, vec![true; 2 * 129])
}

fn interior_holes(variant: &Variant) -> Result<()> {
    let holes: [&[usize]; 3] = [&[10, 20, 64, 70], &[0, 1, 63, 128, 150, 151], &[31, 33, 95, 160, 199, 200]];
    let keep = mask(3, 200, |row, token| !holes[row].chunks(2).any(|hole| (hole[0]..hole[1]).contains(&token)));
    check_self(variant, 3, 200, keep)
}

fn every_other_token(variant: &Variant) -> Result<()> {
    check_self(variant, 2, 150, mask(2, 150, |row, token| token % 2 == row))
}

/// Tiles of 16, 32 and 64 tokens of which one is valid, at either end or inside.
fn one_token_of_each_tile(variant: &Variant) -> Result<()> {
    for tile in [16, 32, 64, 128] {
        for at in [0, tile / 2 - 1, tile - 1] {
            check_self(
                variant,
                2,
                2 * tile + 3,
                mask(2, 2 * tile + 3, |row, token| token % tile == (at + row) % tile),
            )?;
        }
    }
    Ok(())
}

/// One valid token: each output row is its value.
fn one_token_of_each_row(variant: &Variant) -> Result<()> {
    let places = [0, 1, 31, 32, 63, 64, 65, 127, 128];
    check_self(variant, places.len(), 129, mask(places.len(), 129, |row, token| token == places[row]))
}

fn one_hole_in_each_row(variant: &Variant) -> Result<()> {
    let places = [0, 1, 31, 32, 63, 64, 65, 127, 128];
    check_self(variant, places.len(), 129, mask(places.len(), 129, |row, token| token != places[row]))
}

fn random_masks(variant: &Variant) -> Result<()> {
    for (seed, p) in [(1, 0.02), (2, 0.3), (3, 0.6), (4, 0.98)] {
        check_self(variant, 2, 190, bernoulli(seed, 2 * 190, p)?).with_context(|| format!("p = {p}"))?;
    }
    Ok(())
}

fn lengths_around_tiles(variant: &Variant) -> Result<()> {
    for seq in LENGTHS {
        check_self(variant, 2, seq, bernoulli(seq as u64, 2 * seq, 0.8)?).with_context(|| format!("length {seq}"))?;
        check_self(variant, 1, seq, vec![true; seq]).with_context(|| format!("length {seq}, all valid"))?;
    }
    Ok(())
}

/// One run of each length, from an even and from an odd place on.
fn runs_around_tiles(variant: &Variant) -> Result<()> {
    for len in LENGTHS {
        let run = |row: usize, token: usize| (row..row + len).contains(&token);
        check_self(variant, 4, 133, mask(4, 133, run)).with_context(|| format!("runs of {len}"))?;
    }
    Ok(())
}

fn integers_other_than_one(variant: &Variant) -> Result<()> {
    let integers: Vec<i64> = (0..2 * 70).map(|at| [2, 0, -1, i64::MIN, 0, 256, 1 << 32][at % 7]).collect();
    let keep: Vec<bool> = integers.iter().map(|&integer| integer != 0).collect();
    let shape = OracleShape::self_attention(2, 70, 2, 16);
    let call = Call::random(shape, Mask::Varlen(keep), variant.dtype, 10);
    let meta = varlen_fa::VarlenMeta::from_key_mask(&KeyMask::from_integers(2, 70, &integers)?)?;
    let (_, bits) = call.run_as(variant, varlen_fa::AttentionMask::varlen(&meta))?;
    call.judge(&bits, &call.reference(usize::MAX)?, super::check::Rules::standard(variant.dtype))
}

fn cross_masks_that_differ(variant: &Variant) -> Result<()> {
    let (query, key) = (bernoulli(11, 3 * 96, 0.5)?, bernoulli(12, 3 * 96, 0.5)?);
    check_cross(variant, [96, 96], query, key)?;
    // Disjoint: what one keeps, the other drops.
    let query = bernoulli(13, 2 * 80, 0.5)?;
    let key = query.iter().map(|keep| !keep).collect();
    check_cross(variant, [80, 80], query, key)
}

fn cross_lengths_that_differ(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in LENGTHS.into_iter().zip(LENGTHS.into_iter().rev()) {
        let (query, key) = (bernoulli(seq_q as u64, 2 * seq_q, 0.7)?, bernoulli(seq_k as u64, 2 * seq_k, 0.7)?);
        check_cross(variant, [seq_q, seq_k], query, key).with_context(|| format!("{seq_q} queries, {seq_k} keys"))?;
    }
    Ok(())
}

/// Rows 0 to 3: both, keys alone, queries alone, neither.
fn cross_rows_without_keys_or_queries(variant: &Variant) -> Result<()> {
    let query = mask(4, 50, |row, token| matches!(row, 0 | 2) && token % 3 != 1);
    let key = mask(4, 70, |row, token| matches!(row, 0 | 1) && token > 20);
    check_cross(variant, [50, 70], query.clone(), key.clone())?;
    check_cross(variant, [50, 70], query, vec![false; 4 * 70])?;
    check_cross(variant, [50, 70], vec![false; 4 * 50], key)
}

/// As PixArt's: many queries to a short, padded text.
fn cross_long_queries_few_keys(variant: &Variant) -> Result<()> {
    let lengths = [3, 77, 20];
    let key = mask(3, 77, |row, token| token < lengths[row]);
    check_cross(variant, [300, 77], vec![true; 3 * 300], key)
}
