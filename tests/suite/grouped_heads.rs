//! Many batch rows of few queries, whose heads share keys: kernels may fill a tile with the queries of several heads.

use anyhow::Result;
use varlen_fa_testkit::OracleShape;

use super::call::{Call, Mask};
use super::head_dims;
use super::masks::{bernoulli, mask};
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path("grouped_heads/masks", masks);
    trials.each_path("grouped_heads/cross", cross);
    trials.each_path("grouped_heads/group_sizes", group_sizes);
    trials.each_kernel("grouped_heads/no_mask_and_key_masks", no_mask_and_key_masks);
}

/// Batch rows: enough that tiles of single heads would not all run at once on a large GPU.
const BATCH: usize = 36;

/// Four heads on each of three key/value heads.
fn shape(seq_q: usize, seq_k: usize, head_dim: usize) -> OracleShape {
    OracleShape { batch: BATCH, seq_q, seq_k, heads: 12, kv_heads: 3, head_dim }
}

/// On a GPU those that the widths of tiles hold; elsewhere one, since no tile there has several heads.
fn head_dims(variant: &Variant) -> Vec<usize> {
    let is_gpu = !variant.device.capabilities().is_software;
    match is_gpu {
        true => head_dims::of(variant, &[40, 64, 72, 128, 192, 256]).collect(),
        false => vec![head_dims::or_narrow(variant, 40)],
    }
}

/// Rows without a token, with some in a row, with all, and with holes.
fn keep(seq: usize) -> Result<Vec<bool>> {
    let random = bernoulli(61, BATCH * seq, 0.7)?;
    Ok(mask(BATCH, seq, |row, token| match row % 6 {
        0 => true,
        1 => token < 1 + row % seq,
        2 => token >= row % seq,
        3 => random[row * seq + token],
        4 => token % 16 != row % 16,
        _ => false,
    }))
}

fn masks(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        for seq in [37, 70] {
            Call::random(shape(seq, seq, head_dim), Mask::Varlen(keep(seq)?), variant.dtype, 62).check_lse(variant)?;
        }
    }
    Ok(())
}

fn cross(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(1, 90), (20, 170), (70, 9)] {
        let keep_all = vec![true; BATCH * seq_q];
        for query in [keep(seq_q)?, keep_all] {
            let mask = Mask::Cross { query, key: keep(seq_k)? };
            Call::random(shape(seq_q, seq_k, 64), mask, variant.dtype, 63).check_lse(variant)?;
        }
    }
    Ok(())
}

/// Three heads, whose groups do not divide a tile; all on one; more than a tile has groups.
fn group_sizes(variant: &Variant) -> Result<()> {
    for (heads, kv_heads) in [(6, 2), (8, 1), (26, 1)] {
        let head_dim = head_dims::or_narrow(variant, 104);
        let shape = OracleShape { batch: BATCH, seq_q: 19, seq_k: 19, heads, kv_heads, head_dim };
        Call::random(shape, Mask::Varlen(keep(19)?), variant.dtype, 64).check_lse(variant)?;
    }
    Ok(())
}

fn no_mask_and_key_masks(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        for mask in [Mask::None, Mask::Key(keep(37)?)] {
            Call::random(shape(37, 37, head_dim), mask, variant.dtype, 65).check_lse(variant)?;
        }
    }
    Ok(())
}
