//! The primitives: pack and scatter, bit for bit, and attention over packed rows.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{
    CuSeqlens, DType, Device, KeyMask, KeyRanges, RangesOf, Tensor, TensorViewMut, VarlenMeta, VarlenOptions, pack,
    pack_into, pack_qkv, pack_qkv_into, scatter_to_padded, scatter_to_padded_into, varlen_attention,
    varlen_attention_into,
};
use varlen_fa_testkit::{
    CASES, OracleShape, PackedOutput, PackedProblem, Tolerance, Yardsticks, attend_packed, check_close, check_relative,
    random,
};

use super::call::{Call, Inputs, Mask};
use super::check::Rules;
use super::head_dims;
use super::masks::{LENGTHS, mask};
use super::memory::{download, narrow, poison, precision, sentinel, upload, widen};
use super::modifying::Modifying;
use super::placement::Placement;
use super::rule::Rule;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_dtype("pack/bit_for_bit", pack_bit_for_bit);
    trials.each_dtype("pack/named_cases", pack_and_scatter_named_cases);
    trials.each_dtype("pack/strided_inputs", pack_strided_inputs);
    trials.each_dtype("pack/nothing", pack_and_scatter_nothing);
    trials.each_dtype("pack/more_rows_than_workgroups", pack_and_scatter_many_rows);
    trials.each_dtype("scatter/bit_for_bit", scatter_bit_for_bit);
    trials.each_dtype("scatter/strided_input", scatter_strided_input);
    trials.each_dtype("pack/into_views", pack_into_views);
    trials.each_dtype("scatter/into_views", scatter_into_views);
    trials.each_kernel("varlen_attention/into_views", varlen_attention_into_views);
    trials.each_kernel("varlen_attention/separate_lengths", separate_lengths);
    trials.each_kernel("varlen_attention/empty_sequences", empty_sequences);
    trials.each_kernel("varlen_attention/lengths_around_tiles", lengths_around_tiles);
    trials.each_kernel("varlen_attention/few_queries_and_many_keys", few_queries_and_many_keys);
    trials.each_kernel("varlen_attention/many_sequences", many_sequences);
    trials.each_kernel("varlen_attention/softmax_scales", softmax_scales);
    trials.each_kernel("varlen_attention/strided_views", strided_views);
    trials.each_kernel("varlen_attention/overflowing_scores", overflowing_scores);
    trials.each_kernel("varlen_attention/same_bits_with_and_without_lse", same_bits_with_and_without_lse);
    trials.each_kernel("varlen_attention/is_the_packed_path", is_the_packed_path);
    trials.each_kernel("varlen_attention/key_tiles", key_tiles);
    trials.each_path("packed/valid_sides", valid_sides);
}

/// Bit patterns that a careless copy changes: −0.0, NaN of every kind with payloads, subnormals, infinities.
fn awkward_bits(dtype: DType, seed: u64, len: usize) -> Vec<u32> {
    let special: [u32; 10] = match dtype {
        DType::F16 => [0x8000, 0x7e01, 0xfe5a, 0x7c01, 0xfd55, 0x0001, 0x83ff, 0x7c00, 0xfc00, 0x7bff],
        DType::Bf16 => [0x8000, 0x7fc1, 0xffda, 0x7f81, 0xffa5, 0x0001, 0x807f, 0x7f80, 0xff80, 0x7f7f],
        _ => [
            0x8000_0000,
            0x7fc0_0001,
            0xffc5_a5a5,
            0x7f80_0001,
            0xff95_5555,
            0x0000_0001,
            0x807f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7f7f_ffff,
        ],
    };
    let normal = random::normal(seed, len);
    (0..len).map(|at| if at % 3 == 0 { special[at / 3 % 10] } else { narrow(normal[at], dtype) }).collect()
}

/// The rows that `keep` keeps, one after another: what pack must give.
fn gather(bits: &[u32], keep: &[bool], row: usize) -> Vec<u32> {
    bits.chunks(row).zip(keep).filter(|(_, keep)| **keep).flat_map(|(row, _)| row).copied().collect()
}

/// Packed rows at the places that `keep` keeps, zeros at the others: what scatter must give.
fn spread(packed: &[u32], keep: &[bool], row: usize) -> Vec<u32> {
    let mut rows = packed.chunks(row);
    keep.iter().flat_map(|&keep| if keep { rows.next().unwrap_or(&[]).to_vec() } else { vec![0; row] }).collect()
}

fn meta_of(batch: usize, seq: usize, keep: &[bool]) -> Result<VarlenMeta> {
    Ok(VarlenMeta::from_key_mask(&KeyMask::from_bool(batch, seq, keep)?)?)
}

/// Masks of `[3, 50]`.
fn masks() -> Result<Vec<Vec<bool>>> {
    Ok(vec![
        vec![true; 150],
        random::bernoulli_mask(1, 150, 0.5)?,
        mask(3, 50, |row, token| row == 2 && token == 49),
        mask(3, 50, |row, token| row != 1 && !(20..30).contains(&token)),
    ])
}

fn pack_bit_for_bit(device: &Device, dtype: DType) -> Result<()> {
    for keep in masks()? {
        let meta = meta_of(3, 50, &keep)?;
        for (heads, dim) in [(1, 8), (3, 40), (4, 64), (2, 256), (3, 1), (2, 59), (1, 511)] {
            let bits = awkward_bits(dtype, 2, 150 * heads * dim);
            let padded = upload(device, dtype, &bits, &[3, 50, heads, dim])?;
            let packed = pack(device, &padded, &meta)?;
            ensure!(packed.shape() == [meta.total_valid(), heads, dim] && packed.dtype() == dtype, "got {packed:?}");
            ensure!(download(&packed)? == gather(&bits, &keep, heads * dim), "{heads} × {dim}");
        }
        // Three tensors in one launch, the second and third with fewer heads.
        let bits = [(4, 3), (2, 4), (2, 5)].map(|(heads, seed)| awkward_bits(dtype, seed, 150 * heads * 24));
        let tensor = |at: usize, heads| upload(device, dtype, &bits[at], &[3, 50, heads, 24]);
        let packed = pack_qkv(device, &tensor(0, 4)?, &tensor(1, 2)?, &tensor(2, 2)?, &meta)?;
        for ((packed, bits), heads) in packed.iter().zip(&bits).zip([4, 2, 2]) {
            ensure!(packed.shape() == [meta.total_valid(), heads, 24], "got {packed:?}");
            ensure!(download(packed)? == gather(bits, &keep, heads * 24), "pack_qkv, {heads} heads");
        }
    }
    Ok(())
}

/// The named cases' masks, with as many heads as keep this quick.
fn pack_and_scatter_named_cases(device: &Device, dtype: DType) -> Result<()> {
    for case in &CASES {
        let (heads, dim, keep) = (case.heads.min(4), case.head_dim, case.mask());
        let meta = meta_of(case.batch, case.seq(), &keep)?;
        let bits = awkward_bits(dtype, 6, keep.len() * heads * dim);
        let padded = upload(device, dtype, &bits, &[case.batch, case.seq(), heads, dim])?;
        let packed = pack(device, &padded, &meta)?;
        let expected = gather(&bits, &keep, heads * dim);
        ensure!(download(&packed)? == expected, "pack of {}", case.name);
        let scattered = scatter_to_padded(device, &packed, &meta)?;
        ensure!(download(&scattered)? == spread(&expected, &keep, heads * dim), "scatter of {}", case.name);
    }
    Ok(())
}

fn pack_strided_inputs(device: &Device, dtype: DType) -> Result<()> {
    let (shape, keep) = ([3, 50, 4, 40], random::bernoulli_mask(7, 150, 0.6)?);
    let meta = meta_of(3, 50, &keep)?;
    let bits = awkward_bits(dtype, 8, shape.iter().product());
    for placement in [Placement::HEADS_OUTSIDE, Placement::ROOM_AROUND, Placement::TURNED, Placement::among_heads(4, 8)]
    {
        let mut memory: Vec<u32> = (0..placement.memory_len(shape)).map(|place| poison(place, dtype)).collect();
        for (row, start) in placement.rows(shape).into_iter().enumerate() {
            memory[start..start + 40].copy_from_slice(&bits[row * 40..][..40]);
        }
        let holder = upload(device, dtype, &memory, &placement.memory_shape(shape))?;
        let view = || placement.view(holder.view(), shape);
        let expected = gather(&bits, &keep, 160);
        ensure!(download(&pack(device, view()?, &meta)?)? == expected, "pack, {placement:?}");
        for packed in pack_qkv(device, view()?, view()?, view()?, &meta)? {
            ensure!(download(&packed)? == expected, "pack_qkv, {placement:?}");
        }
    }
    Ok(())
}

fn pack_and_scatter_nothing(device: &Device, dtype: DType) -> Result<()> {
    for (batch, seq) in [(2, 16), (0, 16), (2, 0)] {
        let meta = meta_of(batch, seq, &vec![false; batch * seq])?;
        let padded = upload(device, dtype, &vec![sentinel(dtype); batch * seq * 4 * 64], &[batch, seq, 4, 64])?;
        for packed in pack_qkv(device, &padded, &padded, &padded, &meta)? {
            ensure!(packed.shape() == [0, 4, 64], "got {packed:?}");
            ensure!(download(&packed)?.is_empty());
            let scattered = scatter_to_padded(device, &packed, &meta)?;
            ensure!(scattered.shape() == [batch, seq, 4, 64], "got {scattered:?}");
            ensure!(download(&scattered)?.iter().all(|&bits| bits == 0), "scatter of nothing is not all +0.0");
        }
    }
    Ok(())
}

fn pack_and_scatter_many_rows(device: &Device, dtype: DType) -> Result<()> {
    // 140,000 tokens; WebGPU launches at most 65,535 workgroups in one dimension.
    let keep: Vec<bool> = (0..140_000).map(|at| at % 5 != 2).collect();
    let meta = meta_of(2, 70_000, &keep)?;
    let bits = awkward_bits(dtype, 9, 140_000 * 8);
    let packed = pack(device, &upload(device, dtype, &bits, &[2, 70_000, 1, 8])?, &meta)?;
    let expected = gather(&bits, &keep, 8);
    ensure!(download(&packed)? == expected, "pack");
    ensure!(download(&scatter_to_padded(device, &packed, &meta)?)? == spread(&expected, &keep, 8), "scatter");
    Ok(())
}

fn scatter_bit_for_bit(device: &Device, dtype: DType) -> Result<()> {
    for keep in masks()? {
        let meta = meta_of(3, 50, &keep)?;
        for (heads, dim) in [(1, 8), (3, 40), (4, 64), (2, 256), (3, 1), (2, 59), (1, 511)] {
            let bits = awkward_bits(dtype, 10, meta.total_valid() * heads * dim);
            let packed = upload(device, dtype, &bits, &[meta.total_valid(), heads, dim])?;
            // Memory that holds something else, if the device hands it out again.
            drop(upload(device, dtype, &vec![sentinel(dtype); 150 * heads * dim], &[150 * heads * dim])?);
            let padded = scatter_to_padded(device, &packed, &meta)?;
            ensure!(padded.shape() == [3, 50, heads, dim] && padded.dtype() == dtype, "got {padded:?}");
            ensure!(download(&padded)? == spread(&bits, &keep, heads * dim), "{heads} × {dim}");
        }
    }
    Ok(())
}

fn scatter_strided_input(device: &Device, dtype: DType) -> Result<()> {
    let keep = random::bernoulli_mask(11, 150, 0.6)?;
    let meta = meta_of(3, 50, &keep)?;
    let (total, dim) = (meta.total_valid(), 24);
    // The middle 2 of 5 heads, from the third row on.
    let bits = awkward_bits(dtype, 12, (total + 4) * 5 * dim);
    let holder = upload(device, dtype, &bits, &[total + 4, 5, dim])?;
    let view = holder.view().slice(0, 3..3 + total)?.slice(1, 2..4)?;
    let rows: Vec<u32> =
        bits.chunks(5 * dim).skip(3).take(total).flat_map(|row| &row[2 * dim..4 * dim]).copied().collect();
    ensure!(download(&scatter_to_padded(device, view, &meta)?)? == spread(&rows, &keep, 2 * dim));
    // Head after head instead of row after row.
    let holder = upload(device, dtype, &bits[..2 * total * dim], &[2, total, dim])?;
    let rows: Vec<u32> = (0..total)
        .flat_map(|row| [0, 1].map(|head| (head * total + row) * dim))
        .flat_map(|start| &bits[start..start + dim])
        .copied()
        .collect();
    let view = holder.view().permute(&[1, 0, 2])?;
    ensure!(download(&scatter_to_padded(device, view, &meta)?)? == spread(&rows, &keep, 2 * dim), "head after head");
    Ok(())
}

/// Memory of sentinels, in which an output of rows `[rows, heads, dim]` lies with two rows before it, one after it, a head before
/// and two heads after each row.
struct Around {
    memory: Tensor,
    shape: [usize; 3],
}

impl Around {
    fn new(device: &Device, dtype: DType, shape: [usize; 3]) -> Result<Self> {
        let [rows, heads, dim] = shape;
        let holder = [rows + 3, heads + 3, dim];
        let memory = upload(device, dtype, &vec![sentinel(dtype); holder.iter().product()], &holder)?;
        Ok(Self { memory, shape })
    }

    fn view(&mut self) -> Result<TensorViewMut<'_>> {
        let [rows, heads, _] = self.shape;
        Ok(self.memory.view_mut().slice(0, 2..2 + rows)?.slice(1, 1..1 + heads)?)
    }

    /// The output's bits; an error if what surrounds them was written.
    fn read(&self) -> Result<Vec<u32>> {
        let ([rows, heads, dim], dtype) = (self.shape, self.memory.dtype());
        let mut bits = Vec::new();
        for (place, row) in download(&self.memory)?.chunks(dim).enumerate() {
            let (token, head) = (place / (heads + 3), place % (heads + 3));
            if (2..2 + rows).contains(&token) && (1..1 + heads).contains(&head) {
                bits.extend_from_slice(row);
            } else {
                ensure!(row.iter().all(|&bits| bits == sentinel(dtype)), "row {token}, head {head} was written");
            }
        }
        Ok(bits)
    }
}

fn pack_into_views(device: &Device, dtype: DType) -> Result<()> {
    for (keep, dim) in masks()?.into_iter().zip([24, 24, 11, 11]) {
        let meta = meta_of(3, 50, &keep)?;
        let total = meta.total_valid();
        let bits = [(4, 20), (2, 21), (2, 22)].map(|(heads, seed)| awkward_bits(dtype, seed, 150 * heads * dim));
        let tensor = |at: usize, heads| upload(device, dtype, &bits[at], &[3, 50, heads, dim]);
        let (q, k, v) = (tensor(0, 4)?, tensor(1, 2)?, tensor(2, 2)?);
        let around = |heads| Around::new(device, dtype, [total, heads, dim]);
        let (mut packed_q, mut packed_k, mut packed_v) = (around(4)?, around(2)?, around(2)?);
        pack_qkv_into(device, &q, &k, &v, &meta, [packed_q.view()?, packed_k.view()?, packed_v.view()?])?;
        for ((packed, bits), heads) in [packed_q, packed_k, packed_v].iter().zip(&bits).zip([4, 2, 2]) {
            ensure!(packed.read()? == gather(bits, &keep, heads * dim), "pack_qkv_into, {heads} heads");
        }
        let mut packed = around(4)?;
        pack_into(device, &q, &meta, packed.view()?)?;
        ensure!(packed.read()? == gather(&bits[0], &keep, 4 * dim), "pack_into");
    }
    Ok(())
}

fn scatter_into_views(device: &Device, dtype: DType) -> Result<()> {
    for (keep, dim) in masks()?.into_iter().zip([40, 40, 13, 13]) {
        let meta = meta_of(3, 50, &keep)?;
        let bits = awkward_bits(dtype, 23, meta.total_valid() * 2 * dim);
        let packed = upload(device, dtype, &bits, &[meta.total_valid(), 2, dim])?;
        // Into the middle 2 of 5 heads, heads outside tokens.
        let mut memory = upload(device, dtype, &vec![sentinel(dtype); 3 * 5 * 50 * dim], &[3, 5, 50, dim])?;
        let view = memory.view_mut().slice(1, 2..4)?.permute(&[0, 2, 1, 3])?;
        scatter_to_padded_into(device, &packed, &meta, view)?;
        let expected = spread(&bits, &keep, 2 * dim);
        for (place, row) in download(&memory)?.chunks(dim).enumerate() {
            let (batch, head, token) = (place / 250, place / 50 % 5, place % 50);
            if (2..4).contains(&head) {
                let start = ((batch * 50 + token) * 2 + head - 2) * dim;
                ensure!(*row == expected[start..start + dim], "batch row {batch}, head {head}, token {token}");
            } else {
                ensure!(row.iter().all(|&bits| bits == sentinel(dtype)), "head {head} was written");
            }
        }
    }
    Ok(())
}

/// Packed inputs and the lengths of their sequences.
pub struct Packed {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    scale: Option<f32>,
    /// Which keys of its sequence each query sees; all if there is none.
    pub rule: Option<Rule>,
    /// What else happens to the scores.
    pub modifying: Modifying,
    lengths_q: Vec<usize>,
    lengths_k: Vec<usize>,
    values: [Vec<f32>; 3],
    dtype: DType,
}

impl Packed {
    pub fn random(dtype: DType, [heads, kv_heads, dim]: [usize; 3], lengths_q: &[usize], lengths_k: &[usize]) -> Self {
        let [total_q, total_k] = [lengths_q, lengths_k].map(|lengths| lengths.iter().sum::<usize>());
        let lens = [total_q * heads * dim, total_k * kv_heads * dim, total_k * kv_heads * dim];
        let values = [0, 1, 2].map(|input| random::normal_rounded(13, input as u64, lens[input], precision(dtype)));
        let (lengths_q, lengths_k) = (lengths_q.to_vec(), lengths_k.to_vec());
        let (scale, rule, modifying) = (None, None, Modifying::default());
        Self { heads, kv_heads, dim, scale, rule, modifying, lengths_q, lengths_k, values, dtype }
    }

    fn shapes(&self) -> [[usize; 3]; 3] {
        let [total_q, total_k] = [&self.lengths_q, &self.lengths_k].map(|lengths| lengths.iter().sum::<usize>());
        let kv = [total_k, self.kv_heads, self.dim];
        [[total_q, self.heads, self.dim], kv, kv]
    }

    fn options(&self, variant: &Variant) -> VarlenOptions<'static> {
        let options = VarlenOptions::default().with_kernel(variant.kernel);
        let options = variant.tile_keys.into_iter().fold(options, VarlenOptions::with_tile_keys);
        self.scale.map_or(options, |scale| options.with_softmax_scale(scale))
    }

    fn ranges(&self) -> Result<Option<KeyRanges>> {
        let [query, key] = self.cu_seqlens()?;
        self.rule.as_ref().map(|rule| rule.ranges(&RangesOf::from((&query, &key)))).transpose()
    }

    /// For each packed row of the queries, whether it sees each key of its sequence.
    fn sees(&self) -> Option<Vec<Vec<bool>>> {
        let rule = self.rule.as_ref()?;
        let of_sequence = |(&queries, &keys): (&usize, &usize)| {
            let of_query = move |i| (0..keys).map(|j| rule.sees(0, i, j, [queries, keys])).collect();
            (0..queries).map(of_query).collect::<Vec<Vec<bool>>>()
        };
        Some(self.lengths_q.iter().zip(&self.lengths_k).flat_map(of_sequence).collect())
    }

    pub fn tensors(&self, device: &Device) -> Result<[Tensor; 3]> {
        let [q, k, v] = [0, 1, 2].map(|input| {
            let bits: Vec<u32> = self.values[input].iter().map(|&value| narrow(value, self.dtype)).collect();
            upload(device, self.dtype, &bits, &self.shapes()[input])
        });
        Ok([q?, k?, v?])
    }

    fn cu_seqlens(&self) -> Result<[CuSeqlens; 2]> {
        Ok([CuSeqlens::from_lengths(&self.lengths_q)?, CuSeqlens::from_lengths(&self.lengths_k)?])
    }

    fn answer(&self) -> Result<PackedOutput> {
        let starts = |lengths: &[usize]| {
            let mut total = 0;
            let ends = lengths.iter().map(|&length| {
                total += length as i32;
                total
            });
            [0].into_iter().chain(ends).collect::<Vec<_>>()
        };
        let (cu_seqlens_q, cu_seqlens_k) = (starts(&self.lengths_q), starts(&self.lengths_k));
        Ok(attend_packed(&PackedProblem {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.dim,
            softmax_scale: self.scale.map_or(1.0 / (self.dim as f64).sqrt(), f64::from),
            cu_seqlens_q: &cu_seqlens_q,
            cu_seqlens_k: &cu_seqlens_k,
            q: &self.values[0],
            k: &self.values[1],
            v: &self.values[2],
            sees: self.sees().as_deref(),
            modifiers: self.modifying.of_oracle(),
        })?)
    }

    /// Judges an output and its log-sum-exp; rows without keys are +0.0 and −∞.
    pub fn judge(&self, out: &Tensor, lse: Option<&Tensor>, rules: Rules) -> Result<()> {
        let [total_q, heads, dim] = self.shapes()[0];
        let answer = self.answer()?;
        ensure!(out.shape() == [total_q, heads, dim] && out.dtype() == self.dtype, "got {out:?}");
        let got: Vec<f32> = download(out)?.into_iter().map(|bits| widen(bits, self.dtype)).collect();
        let shape = [1, total_q, heads, dim];
        check_close("out", shape, &got, &answer.out, rules.fixed)?;
        if let Some(Yardsticks { relative, .. }) = rules.yardsticks {
            check_relative("out", shape, &got, &answer.out, relative)?;
        }
        let lse_of = |row: usize, head: usize| answer.lse[head * total_q + row];
        for (at, values) in got.chunks(dim).enumerate() {
            // A sink is the log-sum-exp of a row without keys.
            let has_keys = lse_of(at / heads, at % heads) != f64::NEG_INFINITY;
            ensure!(
                has_keys || values.iter().all(|value| value.to_bits() == 0),
                "row {}, head {} has no key: expected +0.0, got {values:?}",
                at / heads,
                at % heads
            );
        }
        let Some(lse) = lse else { return Ok(()) };
        ensure!(lse.shape() == [heads, total_q] && lse.dtype() == DType::F32, "got {lse:?}");
        let got = lse.to_vec::<f32>()?;
        // −∞ equals itself and is near nothing.
        let (got, expected): (Vec<_>, Vec<_>) = got
            .into_iter()
            .zip(answer.lse)
            .filter(|&(got, expected)| f64::from(got) != expected || expected.is_finite())
            .unzip();
        let tolerance = Tolerance { rtol: 1e-5, atol: 2e-5 };
        check_close("lse, rows with keys", [1, 1, 1, got.len()], &got, &expected, tolerance)?;
        Ok(())
    }

    pub fn check(&self, variant: &Variant) -> Result<()> {
        self.check_by(variant, Rules::standard(self.dtype))
    }

    fn check_by(&self, variant: &Variant, rules: Rules) -> Result<()> {
        let ([q, k, v], [cu_q, cu_k]) = (self.tensors(&variant.device)?, self.cu_seqlens()?);
        let mut options = self.options(variant).with_lse();
        let ranges = self.ranges()?;
        if let Some(ranges) = &ranges {
            options = options.with_ranges(ranges);
        }
        let modifiers = self.modifying.modifiers();
        options = options.with_modifiers(&modifiers);
        let attended = varlen_attention(&variant.device, [&q, &k, &v], &cu_q, &cu_k, options)?;
        let lse = attended.lse.context("lse was asked for")?;
        self.judge(&attended.out, Some(&lse), rules)
            .with_context(|| format!("queries {:?}, keys {:?}", self.lengths_q, self.lengths_k))
    }
}

fn separate_lengths(variant: &Variant) -> Result<()> {
    for (heads, kv_heads, dim) in [(4, 4, 64), (6, 2, 40), (8, 1, 128)] {
        let sizes = [heads, kv_heads, dim];
        Packed::random(variant.dtype, sizes, &[40, 1, 70, 129], &[40, 1, 70, 129]).check(variant)?;
        Packed::random(variant.dtype, sizes, &[40, 1, 70, 129], &[3, 200, 64, 65]).check(variant)?;
    }
    Ok(())
}

fn empty_sequences(variant: &Variant) -> Result<()> {
    let sizes = [4, 2, 32];
    for (queries, keys) in [
        (&[5, 0, 7, 3, 0][..], &[4, 6, 0, 9, 0][..]),
        (&[0, 0, 33], &[0, 65, 1]),
        (&[3, 4], &[0, 0]),
        (&[0, 0], &[3, 4]),
        (&[0], &[0]),
        (&[], &[]),
    ] {
        Packed::random(variant.dtype, sizes, queries, keys).check(variant)?;
    }
    Ok(())
}

fn lengths_around_tiles(variant: &Variant) -> Result<()> {
    let backwards: Vec<usize> = LENGTHS.into_iter().rev().collect();
    for (queries, keys) in [(&LENGTHS[..], &LENGTHS[..]), (&LENGTHS, &backwards)] {
        Packed::random(variant.dtype, [2, 2, 48], queries, keys).check(variant)?;
    }
    Ok(())
}

/// A device may share the keys of a query out.
fn few_queries_and_many_keys(variant: &Variant) -> Result<()> {
    for sizes in [[4, 2, 64], [2, 2, 128]] {
        Packed::random(variant.dtype, sizes, &[100, 3], &[1500, 1700]).check(variant)?;
    }
    Ok(())
}

/// More sequences than one dimension of a launch has workgroups.
fn many_sequences(variant: &Variant) -> Result<()> {
    let lengths: Vec<usize> = (0..66_000).map(|at| at % 3).collect();
    Packed::random(variant.dtype, [1, 1, 8], &lengths, &lengths).check(variant)
}

fn softmax_scales(variant: &Variant) -> Result<()> {
    for scale in [0.0, 1.0, -0.25] {
        let mut packed = Packed::random(variant.dtype, [4, 4, 32], &[30, 70], &[70, 30]);
        packed.scale = Some(scale);
        let rules = if scale == 1.0 { Rules::fixed_only(variant.dtype, 1e-3) } else { Rules::standard(variant.dtype) };
        packed.check_by(variant, rules).with_context(|| format!("softmax_scale {scale}"))?;
    }
    Ok(())
}

/// Parts of a packed, fused QKV projection `[total, 3H, D]`.
fn strided_views(variant: &Variant) -> Result<()> {
    let (heads, dim, lengths) = (4, 40, [30, 0, 65, 1]);
    let packed = Packed::random(variant.dtype, [heads, heads, dim], &lengths, &lengths);
    let total = lengths.iter().sum::<usize>();
    let mut bits: Vec<u32> = (0..(total + 2) * 3 * heads * dim).map(|place| poison(place, variant.dtype)).collect();
    for (input, values) in packed.values.iter().enumerate() {
        for (row, values) in values.chunks(heads * dim).enumerate() {
            let start = ((row + 1) * 3 + input) * heads * dim;
            bits[start..start + heads * dim]
                .iter_mut()
                .zip(values)
                .for_each(|(bits, &value)| *bits = narrow(value, variant.dtype));
        }
    }
    let fused = upload(&variant.device, variant.dtype, &bits, &[total + 2, 3 * heads, dim])?;
    let view = |input: usize| fused.view().slice(0, 1..1 + total)?.slice(1, input * heads..(input + 1) * heads);
    let [cu_q, cu_k] = packed.cu_seqlens()?;
    let views = [view(0)?, view(1)?, view(2)?];
    let attended = varlen_attention(&variant.device, views, &cu_q, &cu_k, packed.options(variant))?;
    ensure!(attended.lse.is_none(), "lse was not asked for");
    packed.judge(&attended.out, None, Rules::standard(variant.dtype))
}

/// Products of q and k beyond f32, all of them below or above it: output and lse are NaN. The sequence without keys has zeros and −∞.
fn overflowing_scores(variant: &Variant) -> Result<Completion> {
    if variant.dtype == DType::F16 {
        return Ok(Completion::ignored_with("products of f16 are numbers in f32"));
    }
    let (heads, dim) = (4, 40);
    let mut packed = Packed::random(variant.dtype, [heads, 2, dim], &[4, 70, 3], &[70, 5, 0]);
    let far = 2f32.powi(100);
    for (input, of_row) in [|row: usize| if row < 4 { -1.0 } else { 1.0 }, |_| 1.0].into_iter().enumerate() {
        for (at, value) in packed.values[input].iter_mut().enumerate().step_by(dim) {
            *value = far * of_row(at / dim / heads);
        }
    }
    let [q, k, v] = packed.tensors(&variant.device)?;
    let cu_seqlens = [&packed.lengths_q, &packed.lengths_k].map(|lengths| CuSeqlens::from_lengths(lengths));
    let [cu_q, cu_k] = cu_seqlens;
    let options = packed.options(variant).with_lse();
    let attended = varlen_attention(&variant.device, [&q, &k, &v], &cu_q?, &cu_k?, options)?;
    let out: Vec<f32> = download(&attended.out)?.into_iter().map(|bits| widen(bits, variant.dtype)).collect();
    let lse = attended.lse.context("lse was asked for")?.to_vec::<f32>()?;
    for (row, out) in out.chunks(heads * dim).enumerate() {
        let lse: Vec<f32> = lse.iter().skip(row).step_by(77).copied().collect();
        if row < 74 {
            ensure!(out.iter().chain(&lse).all(|value| value.is_nan()), "row {row}: {out:?}, lse {lse:?}");
        } else {
            ensure!(out.iter().all(|value| value.to_bits() == 0), "row {row} has no key: {out:?}");
            ensure!(lse == [f32::NEG_INFINITY; 4], "row {row} has no key: lse {lse:?}");
        }
    }
    Ok(Completion::Completed)
}

fn same_bits_with_and_without_lse(variant: &Variant) -> Result<()> {
    let packed = Packed::random(variant.dtype, [4, 2, 64], &[50, 70, 3], &[50, 90, 3]);
    let ([q, k, v], [cu_q, cu_k]) = (packed.tensors(&variant.device)?, packed.cu_seqlens()?);
    let run = |options| varlen_attention(&variant.device, [&q, &k, &v], &cu_q, &cu_k, options);
    let (plain, with_lse) = (run(packed.options(variant))?, run(packed.options(variant).with_lse())?);
    ensure!(download(&plain.out)? == download(&with_lse.out)?, "asking for lse changed the output");
    Ok(())
}

fn varlen_attention_into_views(variant: &Variant) -> Result<()> {
    let (device, dtype) = (&variant.device, variant.dtype);
    let packed = Packed::random(dtype, [4, 2, 64], &[50, 0, 70, 3], &[50, 4, 90, 0]);
    let ([q, k, v], [cu_q, cu_k]) = (packed.tensors(device)?, packed.cu_seqlens()?);
    let options = packed.options(variant).with_lse();
    let owned = varlen_attention(device, [&q, &k, &v], &cu_q, &cu_k, options)?;
    let mut out = Around::new(device, dtype, [123, 4, 64])?;
    let mut lse = Around::new(device, DType::F32, [1, 4, 123])?;
    let lse_view = lse.view()?;
    let layout = lse_view.layout();
    let layout = varlen_fa::Layout::strided(&layout.shape()[1..], &layout.strides()[1..], layout.offset())?;
    let lse_view = lse_view.with_layout(layout);
    let plan = varlen_attention_into(device, [&q, &k, &v], &cu_q, &cu_k, options, out.view()?, Some(lse_view))?;
    ensure!(plan.kernel == variant.kernel && plan.reason == varlen_fa::Reason::AlreadyPacked, "got {plan}");
    ensure!(out.read()? == download(&owned.out)?, "the output differs from the owned one");
    let owned_lse = owned.lse.context("lse was asked for")?;
    ensure!(lse.read()? == download(&owned_lse)?, "the lse differs from the owned one");
    // Without a view there is no lse, whatever the options say.
    let mut out = Around::new(device, dtype, [123, 4, 64])?;
    let none = None::<TensorViewMut<'_>>;
    varlen_attention_into(device, [&q, &k, &v], &cu_q, &cu_k, options, out.view()?, none)?;
    ensure!(out.read()? == download(&owned.out)?, "the output differs without an lse");
    Ok(())
}

/// Kernels that have key tiles of several lengths: each of them, forced, around its own edges.
fn key_tiles(variant: &Variant) -> Result<Completion> {
    let mut count = 0;
    for head_dim in head_dims::of(variant, &[64, 72, 128, 192, 256]) {
        let tilings: Vec<_> = variant.device.capabilities().tilings(variant.kernel, head_dim).collect();
        for keys in tilings.iter().skip(1).map(|tiling| tiling.keys) {
            let forced = Variant { tile_keys: Some(keys), ..variant.clone() };
            let (queries, lengths) = ([1, 130, 64, 3, 200], [keys, 3 * keys + 1, 0, keys - 1, 17]);
            Packed::random(variant.dtype, [4, 2, head_dim], &queries, &lengths)
                .check(&forced)
                .with_context(|| format!("head dimension {head_dim}, tiles of {keys} keys"))?;
            count += 1;
        }
    }
    Ok(match count {
        0 => Completion::ignored_with(format!("{} has tiles of one length", variant.kernel)),
        _ => Completion::Completed,
    })
}

/// Sides of which every token is valid, which kernels may read where they lie: one tensor after the other batch row, and with room
/// between batch rows.
fn valid_sides(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 3, seq_q: 70, seq_k: 190, heads: 4, kv_heads: 2, head_dim: 64 };
    let all = |seq: usize| vec![true; shape.batch * seq];
    let some = |seq: usize| random::bernoulli_mask(18, shape.batch * seq, 0.6);
    for (query, key) in [
        (all(shape.seq_q), some(shape.seq_k)?),
        (some(shape.seq_q)?, all(shape.seq_k)),
        (all(shape.seq_q), all(shape.seq_k)),
    ] {
        for inputs in [Placement::CONTIGUOUS, Placement::ROOM_AROUND, Placement::HEADS_OUTSIDE] {
            for output in [Placement::CONTIGUOUS, Placement::ROOM_AROUND] {
                let mask = Mask::Cross { query: query.clone(), key: key.clone() };
                let mut call = Call::random(shape, mask, variant.dtype, 19);
                (call.inputs, call.output) = (Inputs::Apart([inputs; 3]), output);
                call.check(variant).with_context(|| format!("{inputs:?}, {output:?}"))?;
            }
        }
    }
    Ok(())
}

/// pack → varlen_attention → scatter is what the packed path does, bit for bit.
fn is_the_packed_path(variant: &Variant) -> Result<()> {
    let (shape, keep) = ([2, 90, 4, 64], random::bernoulli_mask(14, 180, 0.6)?);
    let meta = meta_of(2, 90, &keep)?;
    let len = shape.iter().product();
    let [q, k, v] = [15, 16, 17].map(|seed| {
        let values = random::normal_rounded(seed, 0, len, precision(variant.dtype));
        let bits: Vec<u32> = values.iter().map(|&value| narrow(value, variant.dtype)).collect();
        upload(&variant.device, variant.dtype, &bits, &shape)
    });
    let (q, k, v) = (q?, k?, v?);
    let device = &variant.device;
    let [packed_q, packed_k, packed_v] = pack_qkv(device, &q, &k, &v, &meta)?;
    // The plan may choose other tiles for rows that are packed already.
    let variant = &variant.with_longest_tiles();
    let options = VarlenOptions::default().with_kernel(variant.kernel).with_tile_keys(Variant::LONGEST_TILES);
    let cu = meta.cu_seqlens();
    let attended = varlen_attention(device, [&packed_q, &packed_k, &packed_v], cu, cu, options)?;
    let by_hand = scatter_to_padded(device, &attended.out, &meta)?;
    let layer = variant.layer().with_path(varlen_fa::Path::Packed);
    let whole = layer.forward(&q, &k, &v, varlen_fa::AttentionMask::varlen(&meta))?;
    let (by_hand, whole) = (download(&by_hand)?, download(&whole.out)?);
    ensure!(by_hand.iter().any(|&bits| bits != 0), "the output is all zeros: nothing was tested");
    ensure!(by_hand == whole, "the steps and the packed path differ");
    Ok(())
}
