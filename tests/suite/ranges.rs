//! Ranges of keys: causal masks, windows, prefixes, documents, beside every mask of tokens.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{AttentionMask, DType, Kernel, KeyMask, KeyRanges, Path, RangesOf, Reason, VarlenMeta};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::check::Rules;
use super::head_dims;
use super::masks::{LENGTHS, bernoulli, mask};
use super::packed::Packed;
use super::rule::Rule;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path_with_ranges("ranges/every_rule", every_rule);
    trials.each_path_with_ranges("ranges/lengths_around_tiles", lengths_around_tiles);
    trials.each_path_with_ranges("ranges/windows_around_tiles", windows_around_tiles);
    trials.each_path_with_ranges("ranges/more_queries_or_more_keys", more_queries_or_more_keys);
    trials.each_path_with_ranges("ranges/long_rows", long_rows);
    trials.each_path_with_ranges("ranges/random", random_ranges);
    trials.each_path_with_ranges("ranges/every_tile_width", every_tile_width);
    trials.each_path_with_ranges("ranges/unseen_keys_are_never_read", unseen_keys_are_never_read);
    trials.each_path_with_ranges("ranges/nan_reaches_only_queries_that_see_it", nan_reaches_only_queries_that_see_it);
    trials.each_path_with_ranges("ranges/one_infinite_value", one_infinite_value);
    trials.each_path_with_ranges("ranges/overflowing_scores", overflowing_scores);
    trials.each_kernel_with_ranges("ranges/no_mask_and_key_masks", no_mask_and_key_masks);
    trials.each_kernel_with_ranges("ranges/with_bias", with_bias);
    trials.each_kernel_with_ranges("ranges/packed_rows", packed_rows);
    trials.each_kernel_with_ranges("ranges/plans", plans);
    trials.each_path_with_ranges("ranges/documents_of_metadata", documents_of_metadata);
}

/// Rules of every kind, for `[B, Sq, Sk]`.
fn rules([batch, seq_q, seq_k]: [usize; 3]) -> Vec<Rule> {
    let own = (0..batch * seq_q)
        .map(|at| {
            let first = at * 31 % (seq_k + 1);
            [first, first + at * 17 % (seq_k + 1 - first)]
        })
        .collect();
    let mut rules = vec![
        Rule::Causal,
        Rule::Window(Some(3), Some(5)),
        Rule::Window(Some(20), Some(0)),
        Rule::Window(None, Some(7)),
        Rule::Window(Some(0), None),
        Rule::Window(Some(0), Some(0)),
        Rule::Window(None, None),
        Rule::Window(Some(seq_k + seq_q), Some(seq_k + seq_q)),
        Rule::Prefix(0),
        Rule::Prefix(seq_k / 3),
        Rule::Prefix(seq_k + 1),
        Rule::Own(own),
    ];
    if seq_q == seq_k {
        // Documents of 1 to 9 tokens, and masked tokens among them.
        let id = |s: usize| if s % 23 == 22 { 0 } else { (s / 5 + s / 7 + s / 23) as u32 + 1 };
        let documents = Rule::Documents((0..batch * seq_k).map(|at| id(at % seq_k)).collect());
        rules.push(documents.clone().and(Rule::Causal));
        rules.push(documents);
    }
    rules.push(Rule::Window(Some(9), Some(9)).and(Rule::Causal));
    rules
}

fn check(variant: &Variant, mut call: Call, rule: Rule) -> Result<()> {
    let what = format!("{rule:?}");
    call.rule = Some(rule);
    call.check(variant).with_context(|| what)
}

fn every_rule(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 3, seq_q: 75, seq_k: 75, heads: 4, kv_heads: 2, head_dim: 32 };
    let masks = [
        mask(3, 75, |row, token| token < 75 - 20 * row),
        mask(3, 75, |row, token| token >= 20 * row),
        mask(3, 75, |row, token| token < 20 || token >= 50 + row),
        bernoulli(5, 3 * 75, 0.6)?,
    ];
    for keep in masks {
        for rule in rules([3, 75, 75]) {
            check(variant, Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 31), rule)?;
        }
    }
    Ok(())
}

fn lengths_around_tiles(variant: &Variant) -> Result<()> {
    for seq in LENGTHS {
        let shape = OracleShape { batch: 2, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 40 };
        for rule in [Rule::Causal, Rule::Window(Some(8), Some(8)), Rule::Prefix(seq / 2)] {
            let keep = bernoulli(seq as u64, 2 * seq, 0.8)?;
            check(variant, Call::random(shape, Mask::Varlen(keep), variant.dtype, 32), rule)
                .with_context(|| format!("length {seq}"))?;
        }
    }
    Ok(())
}

/// Windows as long as tiles, one shorter and one longer; some lie wholly in padding.
fn windows_around_tiles(variant: &Variant) -> Result<()> {
    let seq = 270;
    let shape = OracleShape { batch: 2, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 1, head_dim: 64 };
    let keep = mask(2, seq, |row, token| if row == 0 { token < 200 } else { !(60..200).contains(&token) });
    for tile in [16, 32, 64, 120, 128] {
        for side in [tile - 1, tile, tile + 1] {
            for rule in [Rule::Window(Some(side), Some(side)), Rule::Window(Some(side), Some(0))] {
                check(variant, Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 33), rule)?;
            }
        }
    }
    Ok(())
}

fn more_queries_or_more_keys(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(1, 90), (90, 1), (40, 130), (130, 40), (64, 65), (65, 64)] {
        let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim: 16 };
        for rule in rules([2, seq_q, seq_k]) {
            let (query, key) = (bernoulli(6, 2 * seq_q, 0.8)?, bernoulli(7, 2 * seq_k, 0.7)?);
            check(variant, Call::random(shape, Mask::Cross { query, key }, variant.dtype, 34), rule)
                .with_context(|| format!("{seq_q} queries, {seq_k} keys"))?;
        }
    }
    Ok(())
}

/// More keys than any tile has, and query tiles of which most keys are out of sight.
fn long_rows(variant: &Variant) -> Result<()> {
    let seq = 1100;
    let shape = OracleShape { batch: 2, seq_q: seq, seq_k: seq, heads: 1, kv_heads: 1, head_dim: 32 };
    let keep = mask(2, seq, |row, token| if row == 0 { token >= 300 } else { token % 64 != 63 });
    let documents = (0..2 * seq).map(|at| (at % seq / 170 + 1) as u32).collect();
    for rule in
        [Rule::Causal, Rule::Window(Some(64), Some(64)), Rule::Window(Some(700), Some(0)), Rule::Documents(documents)]
    {
        check(variant, Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 35), rule)?;
    }
    Ok(())
}

fn random_ranges(variant: &Variant) -> Result<()> {
    for seed in 0..6 {
        let numbers: Vec<f32> = random::normal(seed, 4);
        let size = |at: usize, limit: usize| 1 + (numbers[at].to_bits() as usize) % limit;
        let (batch, seq_q, seq_k) = (size(0, 3), size(1, 200), size(2, 200));
        let places: Vec<f32> = random::normal(seed + 100, 2 * batch * seq_q);
        let own = places
            .chunks_exact(2)
            .map(|pair| {
                let [a, b] = [pair[0], pair[1]].map(|x| x.to_bits() as usize % (seq_k + 1));
                [a.min(b), a.max(b)]
            })
            .collect();
        let shape = OracleShape { batch, seq_q, seq_k, heads: 2, kv_heads: 2, head_dim: 24 };
        let (query, key) = (bernoulli(seed, batch * seq_q, 0.7)?, bernoulli(seed + 50, batch * seq_k, 0.7)?);
        check(variant, Call::random(shape, Mask::Cross { query, key }, variant.dtype, seed), Rule::Own(own))
            .with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

/// A head dimension for each width of tiles that kernels are compiled for.
fn every_tile_width(variant: &Variant) -> Result<()> {
    let seq = 150;
    for head_dim in head_dims::of(variant, &[32, 64, 96, 128, 192, 256, 300, 512]) {
        let shape = OracleShape { batch: 2, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 1, head_dim };
        for rule in [Rule::Causal, Rule::Window(Some(20), Some(5)), Rule::Prefix(70)] {
            let keep = mask(2, seq, |row, token| token >= 20 * row);
            check(variant, Call::random(shape, Mask::Varlen(keep), variant.dtype, 43), rule)
                .with_context(|| format!("head dimension {head_dim}"))?;
        }
    }
    Ok(())
}

/// Keys that no query sees hold NaN and infinities.
fn unseen_keys_are_never_read(variant: &Variant) -> Result<()> {
    let (seq, hidden) = (140, 50..90);
    let shape = OracleShape { batch: 2, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 32 };
    let mut call = Call::random(shape, Mask::Varlen(vec![true; 2 * seq]), variant.dtype, 36);
    let row = shape.kv_heads * shape.head_dim;
    for tensor in &mut call.values[1..] {
        for (token, row) in tensor.chunks_exact_mut(row).enumerate() {
            if hidden.contains(&(token % seq)) {
                row.fill(if token % 3 == 0 { f32::INFINITY } else { f32::NAN });
            }
        }
    }
    // Queries of the first half see keys before the hidden ones, the others keys after them.
    let own = (0..2 * seq).map(|at| if at % seq < 70 { [0, 50] } else { [90, seq] }).collect();
    check(variant, call, Rule::Own(own))
}

/// One key's value, or the key itself, is NaN: exactly the queries that see it are NaN.
fn nan_reaches_only_queries_that_see_it(variant: &Variant) -> Result<()> {
    let seq = 200;
    let keep = mask(1, seq, |_, token| token % 11 != 10);
    for (head_dim, rule, at) in [
        (16, Rule::Causal, 100),
        (16, Rule::Causal, 0),
        (16, Rule::Window(Some(10), Some(10)), 64),
        (16, Rule::Window(Some(40), Some(40)), 130),
        (16, Rule::Prefix(30), 15),
        (16, Rule::Prefix(30), 150),
        (64, Rule::Window(Some(40), Some(40)), 130),
        (96, Rule::Window(Some(40), Some(40)), 130),
        (128, Rule::Causal, 100),
        (192, Rule::Window(Some(40), Some(40)), 130),
        (256, Rule::Causal, 100),
        (512, Rule::Window(Some(40), Some(40)), 130),
    ] {
        if !head_dims::of(variant, &[head_dim]).any(|of| of == head_dim) {
            continue;
        }
        let shape = OracleShape { batch: 1, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 1, head_dim };
        let width = shape.heads * head_dim;
        for (tensor, value) in [(1, f32::NAN), (2, f32::NAN), (2, f32::INFINITY)] {
            let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 37);
            call.rule = Some(rule.clone());
            let reference = call.reference(usize::MAX)?;
            let row = shape.kv_heads * shape.head_dim;
            call.values[tensor][at * row..(at + 1) * row].fill(value);
            let bits = call.run(variant)?;
            let mut out = call.widen(&bits);
            for (query, rows) in out.chunks_exact_mut(width).enumerate() {
                let sees = keep[query] && keep[at] && rule.sees(0, query, at, [seq, seq]);
                let is_hit = |x: &f32| if value.is_nan() { x.is_nan() } else { !x.is_finite() };
                if sees {
                    ensure!(rows.iter().all(is_hit), "query {query} sees key {at} and is {:?}: {rule:?}", rows[0]);
                    rows.fill(0.0);
                }
            }
            let spread = out.iter().position(|x| !x.is_finite());
            ensure!(spread.is_none(), "{value} of key {at} in tensor {tensor} reached {spread:?}: {rule:?}");
            // The others are what they are without it.
            let clean = {
                let mut clean = call.clone();
                clean.values = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 37).values;
                clean.run(variant)?
            };
            call.judge(&clean, &reference, Rules::standard(variant.dtype))?;
            for (query, (got, clean)) in bits.chunks_exact(width).zip(clean.chunks_exact(width)).enumerate() {
                let sees = keep[at] && rule.sees(0, query, at, [seq, seq]);
                let is_same = got.iter().zip(clean).all(|(&got, &clean)| is_same(variant, &call, got, clean));
                ensure!(sees || is_same, "query {query} changed with key {at}: {rule:?}");
            }
        }
    }
    Ok(())
}

/// Whether an element is what it is without a NaN elsewhere. Kernels with tile lists compute a block again, by another softmax, where
/// it holds NaN: that may differ by the rounding of probabilities.
fn is_same(variant: &Variant, call: &Call, got: u32, clean: u32) -> bool {
    if got == clean || !variant.kernel.works_by_tile_lists() {
        return got == clean;
    }
    let (got, clean) = (call.widen(&[got])[0], call.widen(&[clean])[0]);
    let rounding = if variant.dtype == DType::F16 { 2f32.powi(-9) } else { 2f32.powi(-6) };
    (got - clean).abs() <= rounding * clean.abs().max(1.0)
}

/// One element of one value is infinite or NaN: in queries that see it, that element is; all else is what it is without it. With
/// the large scale scores grow from step to step, and a query that gives the key no weight may be spared.
fn one_infinite_value(variant: &Variant) -> Result<()> {
    let (seq, column) = (110, 37);
    let shape = OracleShape { batch: 1, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 40 };
    let keep = mask(1, seq, |_, token| token % 11 != 10);
    for (rule, at) in [
        (Rule::Causal, 70),
        (Rule::Causal, 109),
        (Rule::Window(Some(20), Some(20)), 80),
        (Rule::Window(Some(3), Some(3)), 0),
        (Rule::Own((0..seq).map(|query| if query % 5 == 0 { [0, seq] } else { [query, query] }).collect()), 32),
    ] {
        for scale in [None, Some(4.0)] {
            let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 43);
            (call.rule, call.scale) = (Some(rule.clone()), scale);
            let clean = call.run(variant)?;
            for value in [f32::NAN, f32::NEG_INFINITY] {
                call.values[2][at * 2 * 40 + column] = value;
                let bits = call.run(variant)?;
                for (place, (&got, &clean)) in bits.iter().zip(&clean).enumerate() {
                    let query = place / (2 * 40);
                    let sees = keep[query] && keep[at] && rule.sees(0, query, at, [seq, seq]);
                    let is_hit = !call.widen(&[got])[0].is_finite();
                    let is_same = is_same(variant, &call, got, clean);
                    let is_right = match sees && place % (2 * 40) == column {
                        true => is_hit || (scale.is_some() && is_same),
                        false => is_same,
                    };
                    ensure!(is_right, "element {place}, query {query}: {got:#x}, {clean:#x} without {value}: {rule:?}");
                }
            }
        }
    }
    Ok(())
}

/// Products of q and k beyond f32: +∞ among the scores of the keys that a query sees makes it NaN, and so does −∞ alone. A query
/// that sees no key stays +0.0.
fn overflowing_scores(variant: &Variant) -> Result<Completion> {
    if variant.dtype == DType::F16 {
        return Ok(Completion::ignored_with("no product of f16 is beyond f32"));
    }
    let (batch, seq, far) = (2, 100, 2f32.powi(100));
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 16 };
    let keep = mask(batch, seq, |_, token| token % 7 != 3 && token > 4);
    let row = shape.heads * shape.head_dim;
    // In the second batch row, every third key has a score of 0.
    let is_far = |b: usize, key: usize| b == 0 || !key.is_multiple_of(3);
    let own = (0..batch * seq).map(|at| [at * 7 % (seq - 3), at * 7 % (seq - 3) + at / 3 % 4]).collect();
    for rule in [Rule::Causal, Rule::Window(Some(2), Some(0)), Rule::Window(Some(30), Some(30)), Rule::Own(own)] {
        let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 44);
        for (at, value) in call.values[0].iter_mut().enumerate() {
            *value = if at % 16 == 0 { [-far, 0.0, far][at / row % seq % 3] } else { 0.0 };
        }
        for (at, value) in call.values[1].iter_mut().enumerate() {
            if at % 16 == 0 {
                *value = if is_far(at / row / seq, at / row % seq) { far } else { 0.0 };
            }
        }
        call.rule = Some(rule.clone());
        let is_nan = |b: usize, query: usize| {
            let sees = |&key: &usize| keep[b * seq + key] && rule.sees(b, query, key, [seq, seq]);
            let mut seen = (0..seq).filter(sees).map(|key| is_far(b, key)).peekable();
            keep[b * seq + query]
                && match query % 3 {
                    0 => seen.peek().is_some() && seen.all(|far| far),
                    1 => false,
                    _ => seen.any(|far| far),
                }
        };
        let rules = Rules::fixed_only(variant.dtype, 1e-3);
        call.judge_beside_nan(&call.run(variant)?, &call.reference(usize::MAX)?, rules, is_nan)
            .with_context(|| format!("{rule:?}"))?;
    }
    Ok(Completion::Completed)
}

fn no_mask_and_key_masks(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(75, 75), (40, 130), (130, 40)] {
        let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim: 32 };
        for rule in rules([2, seq_q, seq_k]) {
            for mask in [Mask::None, Mask::Key(bernoulli(8, 2 * seq_k, 0.6)?)] {
                check(variant, Call::random(shape, mask, variant.dtype, 38), rule.clone())?;
            }
        }
    }
    Ok(())
}

/// A bias, ranges and metadata at once, on every path that adds a bias.
fn with_bias(variant: &Variant) -> Result<Completion> {
    if !variant.kernel.has_bias() {
        return Ok(Completion::ignored_with("the kernel adds no bias"));
    }
    let (batch, seq) = (2, 90);
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 32 };
    let keep = bernoulli(9, batch * seq, 0.7)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(batch, seq, &keep)?)?;
    let bias = random::normal(39, 2 * seq * seq);
    let tensor = super::memory::upload(
        &variant.device,
        DType::F32,
        &bias.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
        &[2, seq, seq],
    )?;
    for rule in [None, Some(Rule::Causal), Some(Rule::Window(Some(12), Some(12)))] {
        let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 40);
        call.bias = Some([&bias[..], &bias[..]].concat());
        call.rule = rule.clone();
        let of = RangesOf::from([batch, seq, seq]);
        let ranges = rule.as_ref().map(|rule| rule.ranges(&of)).transpose()?;
        let mut mask = AttentionMask::varlen(&meta).with_bias(&tensor);
        if let Some(ranges) = &ranges {
            mask = mask.with_ranges(ranges);
        }
        let reference = call.reference(usize::MAX)?;
        for path in [None, Some(Path::Dense)] {
            let variant = Variant { path, ..variant.clone() };
            let (plan, bits) = call.run_as(&variant, mask)?;
            ensure!(plan.kernel == variant.kernel, "got {plan}");
            let taken = if variant.kernel.has_fused_bias() { Path::Fused } else { Path::Dense };
            ensure!(plan.path == path.unwrap_or(taken), "got {plan}");
            call.judge(&bits, &reference, Rules::standard(variant.dtype))
                .with_context(|| format!("{plan} {rule:?}"))?;
        }
    }
    Ok(Completion::Completed)
}

/// Ranges of packed rows count from the first key of each sequence.
fn packed_rows(variant: &Variant) -> Result<()> {
    for (queries, keys) in [
        (&[40, 1, 0, 70, 129][..], &[40, 1, 5, 70, 129][..]),
        (&[30, 64, 7], &[65, 30, 0]),
        (&[1, 1, 1], &[200, 1, 64]),
    ] {
        for rule in [Rule::Causal, Rule::Window(Some(9), Some(4)), Rule::Window(Some(0), None), Rule::Prefix(20)] {
            let what = format!("{rule:?}, queries {queries:?}, keys {keys:?}");
            let mut packed = Packed::random(variant.dtype, [4, 2, 64], queries, keys);
            packed.rule = Some(rule);
            packed.check(variant).with_context(|| what)?;
        }
    }
    Ok(())
}

/// What ranges change of a plan, and what they do not.
fn plans(variant: &Variant) -> Result<()> {
    let (batch, seq) = (2, 40);
    let shape = OracleShape::self_attention(batch, seq, 2, 32);
    let causal = KeyRanges::causal([batch, seq, seq])?;
    let keep = mask(batch, seq, |row, token| token < 30 + row);
    let key = KeyMask::from_bool(batch, seq, &keep)?;
    let meta = VarlenMeta::from_key_mask(&key)?;
    let plan = |mask, expected| -> Result<()> {
        let call = Call::random(shape, Mask::None, variant.dtype, 41);
        let (plan, _) = call.run_as(variant, mask)?;
        ensure!((plan.path, plan.reason) == expected, "got {plan}");
        Ok(())
    };
    plan(AttentionMask::none().with_ranges(&causal), (Path::Dense, Reason::KeyRanges))?;
    // The CPU's dense path passes over dropped keys itself.
    let of_key_mask = if variant.kernel == Kernel::CpuTiled { Path::Dense } else { Path::Fused };
    plan(AttentionMask::key(&key).with_ranges(&causal), (of_key_mask, Reason::KeyMask))?;
    plan(AttentionMask::varlen(&meta).with_ranges(&causal), (Path::Fused, Reason::Fused))
}

/// Metadata made of documents keeps them apart by itself, also beside other ranges.
fn documents_of_metadata(variant: &Variant) -> Result<()> {
    let (batch, seq) = (2, 100);
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 32 };
    let id = |token: usize| if token % 19 < 2 { 0 } else { (token / 19 + 1) as u32 };
    let ids: Vec<u32> = (0..batch * seq).map(|at| id(at % seq)).collect();
    let meta = VarlenMeta::from_document_ids(batch, seq, &ids)?;
    let causal = KeyRanges::causal([batch, seq, seq])?;
    let keep: Vec<bool> = ids.iter().map(|&id| id != 0).collect();
    for rule in [Rule::Documents(ids.clone()), Rule::Documents(ids.clone()).and(Rule::Causal)] {
        let mut mask = AttentionMask::varlen(&meta);
        if matches!(rule, Rule::Both(..)) {
            mask = mask.with_ranges(&causal);
        }
        let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 42);
        call.rule = Some(rule);
        let (plan, bits) = call.run_as(variant, mask)?;
        ensure!(Some(plan.path) == variant.path, "got {plan}");
        call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;
    }
    Ok(())
}
