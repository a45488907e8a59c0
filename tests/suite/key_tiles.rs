//! Kernels that have key tiles of several lengths for a head dimension: each of them, forced, around its own edges.

use anyhow::{Context, Result};
use libtest_mimic::Completion;
use varlen_fa_testkit::OracleShape;

use super::call::{Call, Mask};
use super::masks::mask;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path("key_tiles/self", self_attention);
    trials.each_path("key_tiles/cross", cross);
    trials.each_path("key_tiles/grouped_heads", grouped_heads);
    trials.each_kernel("key_tiles/few_query_tiles", few_query_tiles);
}

/// Those that the widths of tiles hold, and one that fills none.
const HEAD_DIMS: &[usize] = &[64, 72, 96, 128, 192, 256];

/// Runs a test for every head dimension and each length of tiles, forced; its last argument is the length.
fn each(variant: &Variant, test: fn(&Variant, usize, usize) -> Result<()>) -> Result<Completion> {
    let lengths = |head_dim| variant.device.capabilities().tilings(variant.kernel, head_dim).map(|tiling| tiling.keys);
    if HEAD_DIMS.iter().all(|&head_dim| lengths(head_dim).count() < 2) {
        return Ok(Completion::ignored_with(format!("{} has tiles of one length", variant.kernel)));
    }
    for head_dim in super::head_dims::of(variant, HEAD_DIMS) {
        for keys in lengths(head_dim) {
            let forced = Variant { tile_keys: Some(keys), ..variant.clone() };
            test(&forced, head_dim, keys)
                .with_context(|| format!("head dimension {head_dim}, tiles of {keys} keys"))?;
        }
    }
    Ok(Completion::Completed)
}

/// Everything; a run from the left; one from the right; holes; nothing.
fn keep(batch: usize, seq: usize) -> Vec<bool> {
    mask(batch, seq, |row, token| match row % 5 {
        0 => true,
        1 => token < seq.div_ceil(2),
        2 => token >= seq / 3,
        3 => token % 7 != 3,
        _ => false,
    })
}

fn self_attention(variant: &Variant) -> Result<Completion> {
    each(variant, |variant, head_dim, keys| {
        for seq in [1, 17, keys - 1, keys, keys + 1, 3 * keys + 2] {
            let shape = OracleShape { batch: 5, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim };
            for mask in [Mask::Varlen(keep(5, seq)), Mask::Varlen(vec![true; 5 * seq])] {
                Call::random(shape, mask, variant.dtype, 71).check_lse(variant)?;
            }
        }
        Ok(())
    })
}

fn cross(variant: &Variant) -> Result<Completion> {
    each(variant, |variant, head_dim, keys| {
        for (seq_q, seq_k) in [(300, 1), (130, keys - 15), (200, keys), (65, 2 * keys + 1)] {
            let shape = OracleShape { batch: 5, seq_q, seq_k, heads: 2, kv_heads: 1, head_dim };
            for query in [keep(5, seq_q), vec![true; 5 * seq_q]] {
                let mask = Mask::Cross { query, key: keep(5, seq_k) };
                Call::random(shape, mask, variant.dtype, 72).check_lse(variant)?;
            }
        }
        Ok(())
    })
}

/// So many tiles that heads share them.
fn grouped_heads(variant: &Variant) -> Result<Completion> {
    each(variant, |variant, head_dim, keys| {
        let seq = keys / 2 + 3;
        let shape = OracleShape { batch: 36, seq_q: seq, seq_k: seq, heads: 12, kv_heads: 3, head_dim };
        Call::random(shape, Mask::Varlen(keep(36, seq)), variant.dtype, 73).check_lse(variant)
    })
}

/// Calls without a mask that leave most multiprocessors without a query tile of the usual size: `sm90` has smaller ones at head
/// dimension 64, of as many keys.
fn few_query_tiles(variant: &Variant) -> Result<()> {
    let forced = Variant { tile_keys: Some(128), ..variant.clone() };
    for (seq_q, seq_k) in [(256, 256), (300, 300), (512, 511), (1, 257), (130, 400)] {
        for kv_heads in [2, 6] {
            let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 6, kv_heads, head_dim: 64 };
            Call::random(shape, Mask::None, variant.dtype, 74).check_lse(&forced)?;
        }
    }
    Ok(())
}
