//! Metadata that the device builds of a mask in its own memory.

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Completion;
use varlen_fa::{
    AttentionMask, BackendKind, DType, Device, DeviceMemory, DeviceVarlenMeta, Error, Kernel, Layout, MaskDType,
    MaskedAttention, Path, RangesOf, Reason, VarlenMeta,
};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask, device_meta};
use super::check::Rules;
use super::head_dims;
use super::masks::{bernoulli, mask};
use super::memory::{download, narrow, upload};
use super::rule::Rule;
use super::trials::{Trials, Variant, is_emulated_gpu};

pub fn register(trials: &mut Trials) {
    let is_wgpu = trials.device().capabilities().backend == BackendKind::Wgpu;
    trials.each_path_of_device_meta("device_meta/masks", masks);
    trials.each_path_of_device_meta("device_meta/cross", cross);
    trials.each_path_of_device_meta("device_meta/rows_longer_than_a_chunk", rows_longer_than_a_chunk);
    trials.each_path_of_device_meta("device_meta/more_rows_than_are_ordered", more_rows_than_are_ordered);
    trials.each_path_of_device_meta("device_meta/same_bits_as_the_host", same_bits_as_the_host);
    trials.each_path_of_device_meta("device_meta/rebuilt", rebuilt);
    trials.each_path_of_device_meta("device_meta/each_side_rebuilt", each_side_rebuilt);
    let has_ranges = Kernel::has_ranges;
    trials.each_path_of_more_with_device_meta(has_ranges, "device_meta/ranges", ranges);
    trials.each_path_of_more_with_device_meta(has_ranges, "device_meta/ranges_cross", ranges_cross);
    trials.each_path_of_more_with_device_meta(has_ranges, "device_meta/ranges_as_the_host", ranges_as_the_host);
    trials.each_path_of_more_with_device_meta(has_ranges, "device_meta/ranges_of_many_rows", ranges_of_many_rows);
    trials.each_path_of_more_with_device_meta(Kernel::has_bias, "device_meta/bias", bias);
    trials.each_path("device_meta/paths_that_need_the_host", paths_that_need_the_host);
    trials.each_path_of_device_meta("device_meta/nothing_valid_at_first", nothing_valid_at_first);
    trials.once("device_meta/bias_beside_lse", bias_beside_lse);
    trials.once("device_meta/mask_types_and_strides", mask_types_and_strides);
    trials.once("device_meta/refusals", refusals);
    trials.once("device_meta/no_token_at_all", no_token_at_all);
    trials.once("device_meta/plan", plan);
    if is_wgpu {
        trials.once("device_meta/more_words_than_one_scan", more_words_than_one_scan);
    }
}

fn paths_that_need_the_host(variant: &Variant) -> Result<Completion> {
    if !variant.kernel.works_by_tile_lists() || variant.path != Some(Path::Dense) {
        return Ok(Completion::ignored_with("not refused: see device_meta/masks"));
    }
    match masks(variant).as_ref().map_err(|error| error.downcast_ref()) {
        Err(Some(Error::NotApplicable { why, .. })) if why.contains("built on the host") => Ok(Completion::Completed),
        outcome => bail!("expected a refusal, got {outcome:?}"),
    }
}

fn masks(variant: &Variant) -> Result<()> {
    let (batch, seq) = (3, 130);
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 4, kv_heads: 2, head_dim: 32 };
    for keep in [
        bernoulli(3, batch * seq, 0.5)?,
        mask(batch, seq, |row, token| token < 40 * row || token >= 100),
        mask(batch, seq, |row, token| row != 1 && token % 2 == 0),
        vec![false; batch * seq],
        vec![true; batch * seq],
        mask(batch, seq, |row, token| (row, token) == (2, 129)),
    ] {
        Call::random(shape, Mask::Device(keep), variant.dtype, 7).check(variant)?;
    }
    Ok(())
}

fn cross(variant: &Variant) -> Result<()> {
    let (batch, seq_q, seq_k) = (3, 70, 41);
    let shape = OracleShape { batch, seq_q, seq_k, heads: 4, kv_heads: 4, head_dim: 40 };
    let query = bernoulli(4, batch * seq_q, 0.6)?;
    let key = mask(batch, seq_k, |row, token| row != 0 && token < 20 * row);
    Call::random(shape, Mask::DeviceCross { query, key }, variant.dtype, 8).check(variant)
}

/// Ranges are made on the host, and count padded positions: those of each batch row's own, and one row's for all.
fn ranges(variant: &Variant) -> Result<()> {
    let (batch, seq) = (3, 130);
    let own =
        (0..batch * seq).map(|at| (at * 31 % (seq + 1), at % 50)).map(|(first, count)| [first, seq.min(first + count)]);
    let rules = [
        Rule::Causal,
        Rule::Window(Some(20), Some(5)),
        Rule::Prefix(50),
        Rule::Own(own.collect()),
        Rule::Documents((0..batch * seq).map(|at| (at % seq / 37 + 1) as u32).collect()),
    ];
    let masks = [
        bernoulli(20, batch * seq, 0.6)?,
        mask(batch, seq, |row, token| token >= 50 * row),
        mask(batch, seq, |row, token| row != 1 && token % 2 == 0),
        vec![false; batch * seq],
        vec![true; batch * seq],
        mask(batch, seq, |row, token| token < 130 - 60 * row),
        mask(batch, seq, |row, token| (row, token) == (2, 129)),
    ];
    // An emulated GPU compiles for seconds for each head dimension, with a log-sum-exp and without.
    let head_dims = match variant.kernel.works_by_tile_lists() {
        true => [32, 256, 64, 128, 192, 96, 128],
        false if is_emulated_gpu(&variant.device) => [32, 257, 32, 32, 257, 32, 32],
        false => [32, 257, 64, 128, 512, 64, 64],
    };
    let head_dims = head_dims.map(|head_dim| head_dim.min(variant.kernel.max_head_dim()));
    let most = if is_emulated_gpu(&variant.device) { 5 } else { masks.len() };
    for (keep, head_dim) in masks.into_iter().zip(head_dims).take(most) {
        for rule in &rules {
            let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 4, kv_heads: 2, head_dim };
            let mut call = Call::random(shape, Mask::Device(keep.clone()), variant.dtype, 21);
            call.rule = Some(rule.clone());
            call.check(variant).with_context(|| format!("{rule:?}, head_dim {head_dim}"))?;
            call.check_lse(variant).with_context(|| format!("{rule:?}, head_dim {head_dim}, lse"))?;
        }
    }
    Ok(())
}

fn ranges_cross(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(70, 141), (141, 70), (1, 50), (50, 1)] {
        let head_dim = head_dims::or_narrow(variant, 40);
        let shape = OracleShape { batch: 3, seq_q, seq_k, heads: 4, kv_heads: 4, head_dim };
        let query = bernoulli(22, 3 * seq_q, 0.8)?;
        let key = mask(3, seq_k, |row, token| row != 0 && (token < 20 * row || token % 3 == 1));
        for rule in [Rule::Causal, Rule::Window(Some(30), Some(9)), Rule::Window(Some(0), Some(0)), Rule::Prefix(9)] {
            let mask = Mask::DeviceCross { query: query.clone(), key: key.clone() };
            let mut call = Call::random(shape, mask, variant.dtype, 23);
            call.rule = Some(rule.clone());
            call.check(variant).with_context(|| format!("{rule:?}, {seq_q} queries, {seq_k} keys"))?;
        }
    }
    Ok(())
}

/// Rules and masks whose tiles begin and end everywhere: the same bits as with metadata from the host, also in segments.
fn ranges_as_the_host(variant: &Variant) -> Result<Completion> {
    if variant.path == Some(Path::Dense) {
        return Ok(Completion::ignored_with("a kernel may pass over dropped keys that the host knows of"));
    }
    let is_by_tiles = variant.kernel.works_by_tile_lists();
    // The lengths are for tile lists; devices without them are slow at wide heads. Longer keys beside few queries may be split by a
    // host that knows them, for other bits.
    let (sizes, head_dims): (&[[usize; 2]], &[usize]) = if is_by_tiles {
        (&[[1201, 1201], [300, 700], [700, 300]], &[64, 128])
    } else {
        (&[[150, 150], [60, 110]], &[8])
    };
    for (&[seq_q, seq_k], &head_dim) in sizes.iter().flat_map(|size| head_dims.iter().map(move |dim| (size, dim))) {
        let batch = 5;
        let shape = OracleShape { batch, seq_q, seq_k, heads: 2, kv_heads: 1, head_dim };
        let own = (0..batch * seq_q).map(|at| (at * 31 % (seq_k + 1), at * 17 % 400));
        let rules = [
            Rule::Causal,
            Rule::Window(Some(64), Some(64)),
            Rule::Window(Some(3), Some(0)),
            Rule::Prefix(170),
            Rule::Window(None, None),
            Rule::Own(own.map(|(first, count)| [first, seq_k.min(first + count)]).collect()),
        ];
        let masks = |seq: usize| {
            anyhow::Ok([
                // Padding on the left and on the right, a row without a token, a hole after each few, short runs.
                mask(batch, seq, |row, token| token >= [seq - 3, 0, seq, seq * 2 / 5, 17][row]),
                mask(batch, seq, |row, token| token < [3, seq, 0, seq * 3 / 5, seq - 17][row]),
                mask(batch, seq, |row, token| token % [16, 17, 18, 160, 162][row] != 5),
                bernoulli(30, batch * seq, 0.95)?,
                bernoulli(31, batch * seq, 0.05)?,
            ])
        };
        for (at, (query, key)) in masks(seq_q)?.into_iter().zip(masks(seq_k)?).enumerate() {
            for rule in &rules {
                let what = || format!("{seq_q} queries, {seq_k} keys, head_dim {head_dim}, mask {at}, {rule:?}");
                let (host, device) = match seq_q == seq_k {
                    true => (Mask::Varlen(key.clone()), Mask::Device(key.clone())),
                    false => (
                        Mask::Cross { query: query.clone(), key: key.clone() },
                        Mask::DeviceCross { query: query.clone(), key: key.clone() },
                    ),
                };
                let mut call = Call::random(shape, host, variant.dtype, 32);
                call.rule = Some(rule.clone());
                let expected = call.run(variant)?;
                call.mask = device;
                ensure!(call.run(variant)? == expected, "{}: other bits than with metadata from the host", what());
                if at < 3 && matches!(rule, Rule::Causal) {
                    call.check_segments(variant, &[3]).with_context(what)?;
                }
            }
        }
    }
    Ok(Completion::Completed)
}

/// More batch rows than are put in order, and more query tiles of a row: each is computed.
fn ranges_of_many_rows(variant: &Variant) -> Result<()> {
    let long = if variant.kernel.works_by_tile_lists() { 40_000 } else { 3000 };
    for (batch, seq) in [(1030, 3), (300, 40), (1, long)] {
        let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 1, head_dim: 40 };
        let keep = mask(batch, seq, |row, token| (row * 7 + token) % 19 != 3);
        let mut call = Call::random(shape, Mask::Device(keep), variant.dtype, 33);
        call.rule = Some(Rule::Window(Some(30), Some(0)));
        call.check(variant).with_context(|| format!("[{batch}, {seq}]"))?;
    }
    Ok(())
}

/// A kernel without a binding for both takes the dense path, as with metadata from the host: the same bits.
fn bias_beside_lse(device: &Device) -> Result<Completion> {
    let capabilities = device.capabilities();
    if capabilities.backend == BackendKind::Cpu {
        return Ok(Completion::ignored_with("metadata of the CPU device is the host's, and planned as such"));
    }
    let adds_bias = |kernel: &Kernel| kernel.takes_all_with_device_meta() && kernel.has_bias();
    let Some(kernel) = capabilities.kernels.iter().copied().find(adds_bias) else {
        return Ok(Completion::ignored_with("no kernel adds a bias beside metadata that the device built"));
    };
    let (batch, seq, dtype) = (2, 90, DType::F16);
    let keep = bernoulli(27, batch * seq, 0.7)?;
    let bits = |seed: u64, count: usize| -> Vec<u32> {
        random::normal(seed, count).into_iter().map(|value| narrow(value, dtype)).collect()
    };
    let shape = [batch, seq, 2, 32];
    let x = upload(device, dtype, &bits(28, shape.iter().product()), &shape)?;
    let bias = upload(device, dtype, &bits(29, seq * seq), &[seq, seq])?;
    let host = VarlenMeta::from_key_mask(&varlen_fa::KeyMask::from_bool(batch, seq, &keep)?)?;
    let meta = device_meta(device, batch, seq, &keep)?;
    let layer = MaskedAttention::new(device).with_kernel(kernel).with_lse();
    let causal = varlen_fa::KeyRanges::causal([batch, seq, seq])?;
    for ranges in [None, Some(&causal)] {
        let run = |mask: AttentionMask<'_>| {
            let mask = mask.with_bias(&bias);
            let mask = ranges.map_or(mask, |ranges| mask.with_ranges(ranges));
            let attended = layer.forward(&x, &x, &x, mask)?;
            let lse = attended.lse.context("the lse was asked for")?;
            anyhow::Ok((attended.plan.path, download(&attended.out)?, download(&lse)?))
        };
        let (of_host, of_device) = (run(AttentionMask::varlen(&host))?, run(AttentionMask::varlen(&meta))?);
        ensure!(of_host.1.iter().any(|&bits| bits != 0), "the output is all zeros: nothing is tested");
        ensure!(of_device == of_host, "{} and {}: other bits", of_host.0, of_device.0);
    }
    Ok(Completion::Completed)
}

/// A bias counts padded positions, with ranges and without; −∞ hides keys, and rows.
fn bias(variant: &Variant) -> Result<Completion> {
    if variant.path == Some(Path::Packed) {
        return Ok(Completion::ignored_with("packed rows take no bias"));
    }
    let (batch, seq) = (2, 90);
    let head_dim = head_dims::or_narrow(variant, 48);
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 1, head_dim };
    let keep = bernoulli(24, batch * seq, 0.7)?;
    let meta = device_meta(&variant.device, batch, seq, &keep)?;
    let hides = |at: usize| at.is_multiple_of(7) || at / seq % seq == 20;
    let normal = random::normal(25, 2 * seq * seq).into_iter().enumerate();
    let values: Vec<f32> = normal.map(|(at, value)| if hides(at) { f32::NEG_INFINITY } else { value }).collect();
    let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
    let tensor = upload(&variant.device, DType::F32, &bits, &[2, seq, seq])?;
    for rule in [None, Some(Rule::Causal), Some(Rule::Window(Some(12), Some(12)))] {
        let mut call = Call::random(shape, Mask::Device(keep.clone()), variant.dtype, 26);
        call.bias = Some([&values[..], &values[..]].concat());
        call.rule = rule.clone();
        let ranges = rule.as_ref().map(|rule| rule.ranges(&RangesOf::from([batch, seq, seq]))).transpose()?;
        let mut mask = AttentionMask::varlen(&meta).with_bias(&tensor);
        if let Some(ranges) = &ranges {
            mask = mask.with_ranges(ranges);
        }
        let (plan, bits) = call.run_as(variant, mask)?;
        ensure!(plan.kernel == variant.kernel && Some(plan.path) == variant.path, "got {plan}");
        call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))
            .with_context(|| format!("{plan} {rule:?}"))?;
    }
    Ok(Completion::Completed)
}

fn rows_longer_than_a_chunk(variant: &Variant) -> Result<()> {
    let (batch, seq) = (2, 2500);
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 1, kv_heads: 1, head_dim: 16 };
    let keep = mask(batch, seq, |row, token| token % 97 == 5 || (2040..2060 + row).contains(&token) || token == 2499);
    Call::random(shape, Mask::Device(keep), variant.dtype, 9).check(variant)
}

fn more_rows_than_are_ordered(variant: &Variant) -> Result<()> {
    let (batch, seq) = (1030, 3);
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 1, kv_heads: 1, head_dim: 16 };
    Call::random(shape, Mask::Device(bernoulli(5, batch * seq, 0.5)?), variant.dtype, 10).check(variant)
}

/// Runs and holes around the edges of groups, of tiles, and of the words and warps that find them: the same bits as with metadata
/// from the host, also in segments.
fn same_bits_as_the_host(variant: &Variant) -> Result<Completion> {
    if variant.path == Some(Path::Dense) {
        return Ok(Completion::ignored_with("a kernel may pass over dropped keys that the host knows of"));
    }
    let (batch, seq) = (5, 1201);
    // The lengths are for tile lists; devices without them are slow at wide heads.
    let (heads, head_dim) = if variant.kernel.works_by_tile_lists() { (2, 64) } else { (1, 8) };
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads, kv_heads: 1, head_dim };
    let masks = [
        // Rows of different lengths, so that the order of work is not their own; one without a token.
        mask(batch, seq, |row, token| token < [3, 1201, 0, 700, 701][row]),
        // A hole after each 15, 16, 17, 159 or 161 tokens.
        mask(batch, seq, |row, token| token % [16, 17, 18, 160, 162][row] != 5),
        // Runs of a tile and one more or less, from places of every kind.
        mask(batch, seq, |row, token| (token + 31 * row) % (200 + row) < [127, 160, 161, 319, 33][row]),
        // Few and far between: longer without a token than a warp looks at once.
        mask(batch, seq, |row, token| token == [0, 1200, 1024, 32, 31][row] || token == 1100 + row),
        bernoulli(14, batch * seq, 0.95)?,
        bernoulli(15, batch * seq, 0.05)?,
    ];
    for (at, keep) in masks.into_iter().enumerate() {
        let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 16);
        let expected = call.run(&variant.with_longest_tiles())?;
        call.mask = Mask::Device(keep);
        ensure!(call.run(variant)? == expected, "mask {at}: other bits than with metadata from the host");
        call.check_segments(variant, &[3])?;
    }
    Ok(Completion::Completed)
}

/// wgpu devices scan 256 blocks of 256 words of 32 tokens at a time; here are a few more, of short rows and of a long one.
/// The packed path, which reads most tables, gives what it gives with metadata from the host.
fn more_words_than_one_scan(device: &Device) -> Result<()> {
    let variant = Variant::of_dtype(device, DType::F16, Some(Path::Packed))?;
    for (batch, seq) in [(33_000, 33), (1, 300_000)] {
        let keep =
            mask(batch, seq, |row, token| (row * seq + token) % 1009 == 7 || row + 1 == batch && token + 3 > seq);
        let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 1, kv_heads: 1, head_dim: 8 };
        let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 13);
        let expected = call.run(&variant)?;
        ensure!(expected.iter().any(|&bits| bits != 0), "the output is all zeros: nothing was tested");
        call.mask = Mask::Device(keep);
        ensure!(call.run(&variant)? == expected, "[{batch}, {seq}]: other bits than with metadata from the host");
    }
    Ok(())
}

/// The same metadata, filled again, gives what metadata from the host gives.
fn rebuilt(variant: &Variant) -> Result<()> {
    let (batch, seq) = (2, 100);
    let layout = Layout::contiguous(&[batch, seq])?;
    let shape = OracleShape::self_attention(batch, seq, 2, 64);
    let mut memory = DeviceMemory::alloc(&variant.device, (batch * seq) as u64)?;
    let mut meta = DeviceVarlenMeta::new(&variant.device, batch, seq)?;
    for seed in 0..3 {
        let keep = bernoulli(seed, batch * seq, 0.3 + 0.2 * seed as f64)?;
        let call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, seed);
        memory.write(&keep.iter().map(|&keep| u8::from(keep)).collect::<Vec<_>>())?;
        meta.rebuild(memory.mask_view(MaskDType::U8, layout))?;
        let (_, bits) = call.run_as(variant, AttentionMask::varlen(&meta))?;
        if variant.path == Some(Path::Dense) {
            // A kernel may pass over dropped keys that the host knows of: its sums are in another order.
            call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;
        } else {
            let expected = call.run(&variant.with_longest_tiles())?;
            ensure!(bits == expected, "rebuild {seed}: other bits than with metadata from the host");
        }
    }
    Ok(())
}

/// What is kept between calls is that of the latest build of each side: the bits are those of metadata from the host.
fn each_side_rebuilt(variant: &Variant) -> Result<()> {
    let (batch, seqs) = (3, [150, 190]);
    let [seq_q, seq_k] = seqs;
    let shape = OracleShape { batch, seq_q, seq_k, heads: 2, kv_heads: 1, head_dim: 64 };
    let device = &variant.device;
    let mut memory = DeviceMemory::alloc(device, (batch * seq_k) as u64)?;
    let mut sides = [DeviceVarlenMeta::new(device, batch, seq_q)?, DeviceVarlenMeta::new(device, batch, seq_k)?];
    let mut keeps = seqs.map(|seq| vec![false; batch * seq]);
    let takes_ranges = variant.kernel.has_ranges() && variant.kernel.takes_all_with_device_meta();
    let rules = [None, Some(Rule::Causal), Some(Rule::Window(Some(20), Some(5)))];
    // The same ones for all builds.
    let of = RangesOf::from([batch, seq_q, seq_k]);
    let rules = rules.into_iter().filter(|rule| rule.is_none() || takes_ranges).map(|rule| {
        let ranges = rule.as_ref().map(|rule| rule.ranges(&of)).transpose()?;
        anyhow::Ok((rule, ranges))
    });
    let rules = rules.collect::<Result<Vec<_>>>()?;
    for (step, built) in [&[0, 1][..], &[1], &[0], &[], &[1], &[0, 1]].into_iter().enumerate() {
        for &side in built {
            let (seq, p) = (seqs[side], [0.9, 0.5, 0.97, 0.2][(step + side) % 4]);
            keeps[side] = bernoulli((10 * step + side) as u64, batch * seq, p)?;
            memory.write(&keeps[side].iter().map(|&keep| u8::from(keep)).collect::<Vec<_>>())?;
            sides[side].rebuild(memory.mask_view(MaskDType::U8, Layout::contiguous(&[batch, seq])?))?;
        }
        let [query, key] = &keeps;
        for (rule, ranges) in &rules {
            let mask = Mask::Cross { query: query.clone(), key: key.clone() };
            let mut call = Call::random(shape, mask, variant.dtype, step as u64);
            call.rule = rule.clone();
            let expected = call.run(&variant.with_longest_tiles())?;
            for time in 0..2 {
                let what = || format!("step {step}, {rule:?}, time {time}");
                let mask = AttentionMask::varlen_cross(&sides[0], &sides[1]);
                let mask = ranges.as_ref().map_or(mask, |ranges| mask.with_ranges(ranges));
                let (_, bits) = call.run_as(variant, mask)?;
                if variant.path == Some(Path::Dense) {
                    // As in `rebuilt`.
                    call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))
                        .with_context(what)?;
                } else {
                    ensure!(bits == expected, "{}: other bits than with metadata from the host", what());
                }
            }
        }
    }
    Ok(())
}

/// The output under metadata of `meta`, with every other thing fixed.
fn output(device: &Device, batch: usize, seq: usize, attention: AttentionMask<'_>) -> Result<Vec<u32>> {
    let variant = Variant::first(device, Some(Path::Packed));
    let call = Call::random(OracleShape::self_attention(batch, seq, 2, 16), Mask::None, variant.dtype, 11);
    Ok(call.run_as(&variant, attention)?.1)
}

fn mask_types_and_strides(device: &Device) -> Result<()> {
    let (batch, seq) = (3, 50);
    let keep = bernoulli(6, batch * seq, 0.5)?;
    let expected = device_meta(device, batch, seq, &keep)?;
    let expected = output(device, batch, seq, AttentionMask::varlen(&expected))?;
    // Values with only one bit set, in turn at the low and the high end; between the elements lies what keeps everything.
    for (dtype, bytes) in [(MaskDType::U8, 1), (MaskDType::U16, 2), (MaskDType::U32, 4), (MaskDType::U64, 8)] {
        for (strides, offset) in [([50, 1], 0), ([1, 3], 0), ([150, 3], 5), ([53, 1], 1)] {
            let elements = offset + (batch - 1) * strides[0] + (seq - 1) * strides[1] + 1;
            let mut memory = vec![0xff_u8; elements * bytes];
            for (at, &keep) in keep.iter().enumerate() {
                let element = offset + at / seq * strides[0] + at % seq * strides[1];
                let value = &mut memory[element * bytes..][..bytes];
                value.fill(0);
                value[if at % 2 == 0 { 0 } else { bytes - 1 }] = if keep { 0x80 } else { 0 };
            }
            let mut on_device = DeviceMemory::alloc(device, memory.len() as u64)?;
            on_device.write(&memory)?;
            let layout = Layout::strided(&[batch, seq], &strides.map(|stride| stride as u64), offset as u64)?;
            let mut meta = DeviceVarlenMeta::new(device, batch, seq)?;
            meta.rebuild(on_device.mask_view(dtype, layout))?;
            let got = output(device, batch, seq, AttentionMask::varlen(&meta))?;
            ensure!(got == expected, "{dtype:?}, strides {strides:?}, offset {offset}: another mask was read");
        }
    }
    Ok(())
}

fn refusals(device: &Device) -> Result<()> {
    let mut memory = DeviceMemory::alloc(device, 64)?;
    memory.write(&[1_u8; 64])?;
    let mut meta = DeviceVarlenMeta::new(device, 2, 8)?;
    meta.rebuild(memory.mask_view(MaskDType::U8, Layout::contiguous(&[2, 8])?))?;
    let before = output(device, 2, 8, AttentionMask::varlen(&meta))?;

    let larger = Layout::contiguous(&[2, 9])?;
    let error = meta.rebuild(memory.mask_view(MaskDType::U8, larger)).err();
    ensure!(
        error == Some(Error::MaskSize { argument: "mask", expected: [2, 8], got: [2, 9] }),
        "a mask that changed its size: {error:?}"
    );
    let error = meta.rebuild(memory.mask_view(MaskDType::U64, Layout::contiguous(&[2, 8])?)).err();
    ensure!(
        matches!(error, Some(Error::BufferTooSmall { argument: "mask", expected: 128, .. })),
        "a mask that leaves its memory: {error:?}"
    );
    let error = meta.rebuild(memory.mask_view(MaskDType::U8, Layout::contiguous(&[16])?)).err();
    ensure!(matches!(error, Some(Error::Rank { argument: "mask", .. })), "a mask of one dimension: {error:?}");
    if device.capabilities().backend != BackendKind::Cpu {
        let host = varlen_fa::MaskView::from_host(&[0_u8; 16], 2, 8)?;
        let error = meta.rebuild(host).err();
        ensure!(
            matches!(error, Some(Error::DeviceMismatch { argument: "mask", .. })),
            "a mask of another device: {error:?}"
        );
    }
    let error = DeviceVarlenMeta::new(device, 1 << 20, 1 << 20).err();
    ensure!(matches!(error, Some(Error::TooLarge { .. })), "more tokens than an i32: {error:?}");
    // The metadata is as it was.
    ensure!(output(device, 2, 8, AttentionMask::varlen(&meta))? == before, "a refusal changed the metadata");

    let error = output(device, 2, 9, AttentionMask::varlen(&meta)).err();
    let error = error.as_ref().and_then(|error| error.downcast_ref::<Error>());
    ensure!(matches!(error, Some(Error::MaskSize { .. })), "tensors of another size: {error:?}");
    Ok(())
}

/// Before the first mask every row is zero, of every batch row: the output holds NaN before.
fn nothing_valid_at_first(variant: &Variant) -> Result<()> {
    let meta = DeviceVarlenMeta::new(&variant.device, 3, 9)?;
    for head_dim in [16, 64] {
        let shape = OracleShape::self_attention(3, 9, 4, head_dim);
        let call = Call::random(shape, Mask::Device(vec![false; 27]), variant.dtype, 8);
        let (plan, bits) = call.run_as(variant, AttentionMask::varlen(&meta))?;
        ensure!(bits.iter().all(|&bits| bits == 0), "head_dim {head_dim}, {plan}: not all zeros");
    }
    Ok(())
}

fn no_token_at_all(device: &Device) -> Result<()> {
    let mut empty = DeviceVarlenMeta::new(device, 0, 8)?;
    let memory = DeviceMemory::alloc(device, 0)?;
    empty.rebuild(memory.mask_view(MaskDType::U8, Layout::contiguous(&[0, 8])?))?;
    Ok(())
}

fn plan(device: &Device) -> Result<Completion> {
    let keep = vec![true; 16];
    let meta = device_meta(device, 2, 8, &keep)?;
    if device.capabilities().backend == BackendKind::Cpu {
        return Ok(Completion::ignored_with("metadata of the CPU device is the host's, and planned as such"));
    }
    let variant = Variant::first(device, None);
    let call = Call::random(OracleShape::self_attention(2, 8, 2, 16), Mask::None, variant.dtype, 12);
    let (plan, _) = call.run_as(&variant, AttentionMask::varlen(&meta))?;
    ensure!((plan.path, plan.reason) == (Path::Fused, Reason::Fused), "{plan}");
    // What the host knows it uses.
    let host = VarlenMeta::from_key_mask(&varlen_fa::KeyMask::from_bool(2, 8, &keep)?)?;
    let (plan, _) = call.run_as(&variant, AttentionMask::varlen(&host))?;
    ensure!((plan.path, plan.reason) == (Path::Dense, Reason::AllValid), "{plan}");
    Ok(Completion::Completed)
}
