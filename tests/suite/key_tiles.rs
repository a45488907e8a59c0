//! Kernels that have key tiles of several lengths for a head dimension: each of them, forced, around its own edges.

use anyhow::{Context, Result};
use libtest_mimic::Completion;
use varlen_fa_testkit::OracleShape;

use super::call::{Call, Mask};
use super::check::Rules;
use super::masks::mask;
use super::rule::Rule;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path("key_tiles/self", self_attention);
    trials.each_path("key_tiles/cross", cross);
    trials.each_path("key_tiles/grouped_heads", grouped_heads);
    trials.each_kernel("key_tiles/few_query_tiles", few_query_tiles);
    trials.each_path("key_tiles/many_query_tiles", many_query_tiles);
    trials.each_path_with_ranges("key_tiles/many_ranged_query_tiles", many_ranged_query_tiles);
    trials.each_kernel("key_tiles/pairs_of_query_tiles", pairs_of_query_tiles);
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

/// Several query tiles for each block of a large GPU, of no keys, and of one tile of keys to four. What a block leaves in shared memory
/// at the end of one must be gone before the next one's keys and values come there.
fn many_query_tiles(variant: &Variant) -> Result<Completion> {
    many(variant, |shape, keys| {
        let (batch, seq_q, seq_k) = (shape.batch, shape.seq_q, shape.seq_k);
        let key = mask(batch, seq_k, |row, token| token < row * keys / 8 && (row % 3 > 0 || token % 32 != 9));
        (Mask::Cross { query: mask(batch, seq_q, |row, token| row % 5 > 0 || token < 60), key }, None)
    })
}

/// The same under a window, whose query tiles pass some key tiles on.
fn many_ranged_query_tiles(variant: &Variant) -> Result<Completion> {
    many(variant, |shape, keys| {
        let (query, key) = (vec![true; shape.batch * shape.seq_q], vec![true; shape.batch * shape.seq_k]);
        let own = (0..shape.batch * shape.seq_q).map(|at| {
            let (row, query) = (at / shape.seq_q, at % shape.seq_q);
            let first = if query < 64 { 0 } else { row % 4 * keys };
            [first, (first + row * keys / 16 + query % 3).min(shape.seq_k)]
        });
        (Mask::Cross { query, key }, Some(Rule::Own(own.collect())))
    })
}

/// Runs a test of many query tiles under a mask, which may depend on how many keys the longest tiles have; also with scores so large that
/// a block computes all of its query tiles again.
fn many(variant: &Variant, mask: impl Fn(OracleShape, usize) -> (Mask, Option<Rule>)) -> Result<Completion> {
    let capabilities = variant.device.capabilities();
    if capabilities.is_software {
        return Ok(Completion::ignored_with("no tile waits for another one on a processor"));
    }
    for head_dim in super::head_dims::of(variant, &[192, 256]) {
        let Some(keys) = capabilities.tilings(variant.kernel, head_dim).map(|tiling| tiling.keys).max() else {
            continue;
        };
        let shape = OracleShape { batch: 32, seq_q: 66, seq_k: 4 * keys, heads: 12, kv_heads: 12, head_dim };
        let (mask, rule) = mask(shape, keys);
        let mut call = Call { rule, ..Call::random(shape, mask, variant.dtype, 75) };
        let variant = Variant { tile_keys: Some(keys), ..variant.clone() };
        call.check_lse(&variant).with_context(|| format!("head dimension {head_dim}"))?;
        make_twins(&mut call, 19, [65, 0]);
        call.check_by(&variant, Rules::fixed_only(variant.dtype, 1e-2))
            .with_context(|| format!("head dimension {head_dim}, large scores"))?;
    }
    Ok(Completion::Completed)
}

/// Makes a query and a key of one batch row alike and large, so that their score is beyond the range of a kernel's fast softmax.
fn make_twins(call: &mut Call, row: usize, [query, key]: [usize; 2]) {
    let OracleShape { seq_q, seq_k, heads, kv_heads, head_dim, .. } = call.shape;
    let tokens = [(row * seq_q + query, heads * head_dim), (row * seq_k + key, kv_heads * head_dim)];
    for (values, (token, width)) in call.values.iter_mut().zip(tokens) {
        for (at, value) in values[token * width..(token + 1) * width].iter_mut().enumerate() {
            *value = if at % 3 == 0 { -30_000.0 } else { 30_000.0 };
        }
    }
}

/// Calls without a mask that have an even number of query tiles for each head, twice as many in all as a large GPU has multiprocessors, and
/// many key tiles: `sm90` computes them by pairs of blocks, and splits the last ones. Also with scores so large in one query tile of a pair
/// that both of its blocks compute theirs again.
fn pairs_of_query_tiles(variant: &Variant) -> Result<Completion> {
    each(variant, |variant, head_dim, keys| {
        if head_dim != 128 || keys < 128 {
            return Ok(());
        }
        for (seq_q, seq_k, kv_heads) in [(129, 12 * keys + 1, 12), (250, 12 * keys, 3)] {
            let shape = OracleShape { batch: 12, seq_q, seq_k, heads: 12, kv_heads, head_dim };
            let mut call = Call::random(shape, Mask::None, variant.dtype, 76);
            call.check_lse(variant).with_context(|| format!("{shape:?}"))?;
            make_twins(&mut call, 4, [128, 9]);
            call.check_by(variant, Rules::fixed_only(variant.dtype, 1e-2))
                .with_context(|| format!("{shape:?}, large scores"))?;
        }
        Ok(())
    })
}
