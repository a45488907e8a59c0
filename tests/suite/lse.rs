//! The log-sum-exp of padded calls: on every path, beside every mask, of queries that see no key or are masked.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{
    AttentionMask, AttentionOutputs, DType, Device, DeviceVarlenMeta, KeyMask, Layout, Path, Plan, Tensor,
    TensorViewMut, VarlenMeta,
};
use varlen_fa_testkit::{OracleShape, Tolerance, check_close};

use super::call::{Call, Mask};
use super::check::Rules;
use super::masks::{bernoulli, mask};
use super::memory::{download, sentinel, upload};
use super::modifying::Modifying;
use super::rule::Rule;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path("lse/masks", masks);
    trials.each_path("lse/cross", cross);
    trials.each_path("lse/head_dims", head_dims);
    trials.each_path("lse/long_rows", long_rows);
    trials.each_path("lse/softmax_scales", softmax_scales);
    trials.each_path("lse/overflowing_scores", overflowing_scores);
    trials.each_path_with_ranges("lse/ranges", ranges);
    trials.each_path_with_ranges("lse/ranges_across", ranges_across);
    trials.each_kernel("lse/no_mask_and_key_masks", no_mask_and_key_masks);
    trials.each_kernel("lse/no_keys", no_keys);
    trials.each_kernel("lse/forward_returns_it", forward_returns_it);
    trials.each_kernel_with_bias("lse/bias", bias);
    trials.each_kernel_with_ranges("lse/ranges_and_key_masks", ranges_and_key_masks);
    trials.each_path_of_device_meta("lse/device_meta", device_meta);
    trials.each_path_with_modifiers("lse/sinks", sinks);
    trials.each_kernel_with_modifiers("lse/sinks_without_keys", sinks_without_keys);
    trials.each_kernel_with_modifiers("lse/sinks_and_device_meta", sinks_and_device_meta);
}

const SHAPE: OracleShape = OracleShape { batch: 3, seq_q: 75, seq_k: 75, heads: 4, kv_heads: 2, head_dim: 32 };

/// The output's bits and the log-sum-exp.
type Outputs = (Vec<u32>, Vec<f32>);

/// `[B, H, S]` f32 inside memory whose every other element must keep its bits.
pub struct LseMemory {
    memory: Tensor,
    shape: [usize; 3],
}

impl LseMemory {
    /// All of it the sentinel.
    pub fn new(device: &Device, shape: [usize; 3]) -> Result<Self> {
        let [batch, heads, seq] = shape;
        let holder = [batch + 1, heads + 2, seq + 5];
        let bits = vec![sentinel(DType::F32); holder.iter().product()];
        Ok(Self { memory: upload(device, DType::F32, &bits, &holder)?, shape })
    }

    /// Rows start beside words of 16 bytes.
    pub fn view(&mut self) -> Result<TensorViewMut<'_>> {
        let [batch, heads, seq] = self.shape;
        let view = self.memory.view_mut().slice(0, 1..1 + batch)?;
        Ok(view.slice(1, 1..1 + heads)?.slice(2, 3..3 + seq)?)
    }

    /// The values; an error if anything around them was written.
    pub fn read(&self) -> Result<Vec<f32>> {
        let [batch, heads, seq] = self.shape;
        let mut values = Vec::with_capacity(batch * heads * seq);
        for (row, bits) in download(&self.memory)?.chunks(seq + 5).enumerate() {
            let (b, h) = (row / (heads + 2), row % (heads + 2));
            let is_inside = b >= 1 && (1..1 + heads).contains(&h);
            for (s, &bits) in bits.iter().enumerate() {
                if is_inside && (3..3 + seq).contains(&s) {
                    values.push(f32::from_bits(bits));
                } else {
                    ensure!(bits == sentinel(DType::F32), "element [{b}, {h}, {s}] beside the lse was written");
                }
            }
        }
        Ok(values)
    }
}

/// Values against the oracle's: −∞ and NaN where those are.
pub fn judge(got: &[f32], expected: &[f64]) -> Result<()> {
    ensure!(got.len() == expected.len(), "{} values, expected {}", got.len(), expected.len());
    for (at, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let is_same_kind = match expected {
            f64::NEG_INFINITY => got == f32::NEG_INFINITY,
            expected if expected.is_nan() => got.is_nan(),
            _ => got.is_finite(),
        };
        ensure!(is_same_kind, "element {at} of the lse: expected {expected}, got {got}");
    }
    let (got, expected): (Vec<_>, Vec<_>) =
        got.iter().copied().zip(expected.iter().copied()).filter(|(_, expected)| expected.is_finite()).unzip();
    let tolerance = Tolerance { rtol: 1e-5, atol: 2e-5 };
    check_close("lse, rows with keys", [1, 1, 1, got.len()], &got, &expected, tolerance)?;
    Ok(())
}

impl Call {
    /// Judges output and log-sum-exp; the output's bits are those of the call without it.
    pub fn check_lse(&self, variant: &Variant) -> Result<()> {
        self.check_lse_by(variant, Rules::standard(self.dtype))
    }

    fn check_lse_by(&self, variant: &Variant, rules: Rules) -> Result<()> {
        let (bits, lse) = self.under_mask(variant, |mask| self.run_for_lse(variant, mask))?;
        self.judge(&bits, &self.reference(usize::MAX)?, rules)?;
        judge(&lse, &self.reference_lse()?).with_context(|| format!("{:?}, {}", self.shape, self.dtype))?;
        ensure!(self.run(variant)? == bits, "asking for the lse changed the output");
        Ok(())
    }

    fn run_for_lse(&self, variant: &Variant, mask: AttentionMask<'_>) -> Result<(Plan, Outputs)> {
        let OracleShape { batch, seq_q, heads, .. } = self.shape;
        let mut lse = LseMemory::new(&variant.device, [batch, heads, seq_q])?;
        let (plan, bits) = self.run_with(variant, mask, Some(lse.view()?))?;
        Ok((plan, (bits, lse.read()?)))
    }
}

/// Padding on the right, on the left, between, at random; a batch row without a token.
fn keeps(batch: usize, seq: usize) -> Result<Vec<Vec<bool>>> {
    Ok(vec![
        mask(batch, seq, |row, token| token < seq - seq / 4 * row),
        mask(batch, seq, |row, token| token >= seq / 4 * row),
        mask(batch, seq, |row, token| token < seq / 3 || token >= seq / 2 + row),
        mask(batch, seq, |row, _| row != 1),
        bernoulli(5, batch * seq, 0.6)?,
        vec![true; batch * seq],
    ])
}

fn masks(variant: &Variant) -> Result<()> {
    for (heads, kv_heads) in [(4, 2), (3, 3), (4, 1)] {
        for keep in keeps(3, 75)? {
            let shape = OracleShape { heads, kv_heads, ..SHAPE };
            Call::random(shape, Mask::Varlen(keep), variant.dtype, 41).check_lse(variant)?;
        }
    }
    Ok(())
}

fn cross(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(1, 90), (90, 1), (40, 130), (130, 40), (64, 65)] {
        let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim: 16 };
        // The second batch row has queries, but no keys.
        let (query, some) = (bernoulli(6, 2 * seq_q, 0.8)?, bernoulli(7, 2 * seq_k, 0.7)?);
        for key in [mask(2, seq_k, |row, token| row == 0 && some[token]), some.clone(), vec![true; 2 * seq_k]] {
            for query in [query.clone(), vec![true; 2 * seq_q]] {
                Call::random(shape, Mask::Cross { query, key: key.clone() }, variant.dtype, 42).check_lse(variant)?;
            }
        }
    }
    Ok(())
}

fn head_dims(variant: &Variant) -> Result<()> {
    for head_dim in super::head_dims::of(variant, &[8, 40, 64, 96, 128, 192, 256, 300, 512]) {
        let shape = OracleShape { batch: 2, seq_q: 150, seq_k: 150, heads: 2, kv_heads: 1, head_dim };
        let keep = mask(2, 150, |row, token| if row == 0 { token < 131 } else { !(20..60).contains(&token) });
        Call::random(shape, Mask::Varlen(keep), variant.dtype, 43).check_lse(variant)?;
    }
    Ok(())
}

/// More keys than any tile has, and more query tiles than one: a device may share the keys of a query out.
fn long_rows(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 2, seq_q: 300, seq_k: 1700, heads: 2, kv_heads: 1, head_dim: 64 };
    let query = mask(2, 300, |row, token| row == 0 || token >= 40);
    let key = mask(2, 1700, |row, token| if row == 0 { token < 1500 } else { token % 64 != 63 });
    Call::random(shape, Mask::Cross { query, key }, variant.dtype, 44).check_lse(variant)
}

fn softmax_scales(variant: &Variant) -> Result<()> {
    for scale in [0.0, 1.0, -0.25] {
        let keep = mask(3, 75, |row, token| token >= 20 * row);
        let mut call = Call::random(SHAPE, Mask::Varlen(keep), variant.dtype, 45);
        call.scale = Some(scale);
        let rules = if scale == 1.0 { Rules::fixed_only(variant.dtype, 1e-3) } else { Rules::standard(variant.dtype) };
        call.check_lse_by(variant, rules).with_context(|| format!("softmax_scale {scale}"))?;
    }
    Ok(())
}

/// Products of q and k beyond f32: NaN where the output is; masked queries have −∞ all the same.
fn overflowing_scores(variant: &Variant) -> Result<Completion> {
    if variant.dtype == DType::F16 {
        return Ok(Completion::ignored_with("products of f16 are numbers in f32"));
    }
    let keep = mask(3, 75, |row, token| token >= 20 * row);
    let mut call = Call::random(SHAPE, Mask::Varlen(keep.clone()), variant.dtype, 46);
    let (far, dim) = (2f32.powi(100), SHAPE.head_dim);
    for (input, sign) in [-1.0, 1.0].into_iter().enumerate() {
        call.values[input].iter_mut().step_by(dim).for_each(|value| *value = sign * far);
    }
    let (bits, lse) = call.under_mask(variant, |mask| call.run_for_lse(variant, mask))?;
    let out = call.widen(&bits);
    for (at, &lse) in lse.iter().enumerate() {
        let (b, h, s) = (at / 75 / SHAPE.heads, at / 75 % SHAPE.heads, at % 75);
        let row = &out[((b * 75 + s) * SHAPE.heads + h) * dim..][..dim];
        if keep[b * 75 + s] {
            ensure!(lse.is_nan() && row.iter().all(|value| value.is_nan()), "[{b}, {h}, {s}]: lse {lse}, {row:?}");
        } else {
            ensure!(lse == f32::NEG_INFINITY && row.iter().all(|value| value.to_bits() == 0), "[{b}, {h}, {s}]: {lse}");
        }
    }
    Ok(Completion::Completed)
}

fn some_rules([batch, seq_q, seq_k]: [usize; 3]) -> Vec<Rule> {
    let own = |at: usize| {
        let first = at * 31 % (seq_k + 1);
        [first, first + at * 17 % (seq_k + 1 - first)]
    };
    vec![
        Rule::Causal,
        Rule::Window(Some(3), Some(5)),
        Rule::Prefix(seq_k / 3),
        Rule::Own((0..batch * seq_q).map(own).collect()),
    ]
}

fn ranges(variant: &Variant) -> Result<()> {
    for keep in keeps(3, 75)? {
        for rule in some_rules([3, 75, 75]) {
            let mut call = Call::random(SHAPE, Mask::Varlen(keep.clone()), variant.dtype, 47);
            call.rule = Some(rule);
            call.check_lse(variant)?;
        }
    }
    Ok(())
}

fn ranges_across(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(40, 130), (130, 40)] {
        let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim: 16 };
        for rule in some_rules([2, seq_q, seq_k]) {
            let (query, key) = (bernoulli(6, 2 * seq_q, 0.8)?, bernoulli(7, 2 * seq_k, 0.7)?);
            let mut call = Call::random(shape, Mask::Cross { query, key }, variant.dtype, 48);
            call.rule = Some(rule);
            call.check_lse(variant)?;
        }
    }
    Ok(())
}

/// Rows of dropped queries are computed like any other.
fn no_mask_and_key_masks(variant: &Variant) -> Result<()> {
    Call::random(SHAPE, Mask::None, variant.dtype, 49).check_lse(variant)?;
    for keep in keeps(3, 75)? {
        Call::random(SHAPE, Mask::Key(keep), variant.dtype, 50).check_lse(variant)?;
    }
    Ok(())
}

fn ranges_and_key_masks(variant: &Variant) -> Result<()> {
    for rule in some_rules([3, 75, 75]) {
        for mask in keeps(3, 75)?.into_iter().map(Mask::Key).chain([Mask::None]) {
            let mut call = Call::random(SHAPE, mask, variant.dtype, 51);
            call.rule = Some(rule.clone());
            call.check_lse(variant)?;
        }
    }
    Ok(())
}

/// The plan has nothing to compute: zeros and −∞.
fn no_keys(variant: &Variant) -> Result<()> {
    let variant = Variant { path: None, ..variant.clone() };
    let nothing = vec![false; 3 * 75];
    let masks = [
        Mask::Varlen(nothing.clone()),
        Mask::Cross { query: nothing.clone(), key: vec![true; 3 * 75] },
        Mask::Cross { query: vec![true; 3 * 75], key: nothing },
    ];
    for mask in masks {
        Call::random(SHAPE, mask, variant.dtype, 52).check_lse(&variant)?;
    }
    let shape = OracleShape { seq_k: 0, ..SHAPE };
    let (device, [q, k]) = (&variant.device, [[3, 75, 4, 32], [3, 0, 2, 32]]);
    let [q, k] = [Tensor::zeros(device, variant.dtype, &q)?, Tensor::zeros(device, variant.dtype, &k)?];
    let attended = variant.layer().with_lse().forward(&q, &k, &k, AttentionMask::none())?;
    let lse = attended.lse.context("lse was asked for")?;
    ensure!(lse.shape() == [shape.batch, shape.heads, shape.seq_q], "got {lse:?}");
    ensure!(lse.to_vec::<f32>()?.iter().all(|&lse| lse == f32::NEG_INFINITY), "expected −∞");
    Ok(())
}

/// A finite sink, none, and one that is the largest score, by head.
fn sinking(heads: usize) -> Modifying {
    let sinks = (0..heads).map(|head| [0.5, f32::NEG_INFINITY, 20.0, -2.0][head % 4]).collect();
    Modifying { sinks: Some(sinks), ..Modifying::default() }
}

/// Queries that see no key have their head's sink, masked ones −∞: beside masks, ranges, and batch rows without keys.
fn sinks(variant: &Variant) -> Result<()> {
    let check = |shape: OracleShape, mask: Mask, rule: Option<Rule>| {
        let what = format!("{rule:?}");
        let mut call = Call::random(shape, mask, variant.dtype, 54);
        (call.modifying, call.rule) = (sinking(shape.heads), rule);
        call.check_lse(variant).context(what)
    };
    let rules = || {
        let rules = some_rules([3, 75, 75]).into_iter().map(Some);
        rules.chain([None]).filter(|rule| rule.is_none() || variant.kernel.has_ranges())
    };
    for keep in keeps(3, 75)? {
        check(SHAPE, Mask::Varlen(keep), None)?;
    }
    let (query, some) = (bernoulli(6, 3 * 75, 0.8)?, bernoulli(7, 3 * 75, 0.7)?);
    let key = mask(3, 75, |row, token| row != 1 && some[row * 75 + token]);
    for rule in rules() {
        check(SHAPE, Mask::Cross { query: query.clone(), key: key.clone() }, rule.clone())?;
        if variant.path == Some(Path::Dense) {
            check(SHAPE, Mask::Key(key.clone()), rule.clone())?;
            check(SHAPE, Mask::None, rule)?;
        }
    }
    Ok(())
}

/// Without a key in the whole call, there is a kernel to write sinks, unless every query is masked.
fn sinks_without_keys(variant: &Variant) -> Result<()> {
    let variant = Variant { path: None, ..variant.clone() };
    let (nothing, some) = (vec![false; 3 * 75], mask(3, 75, |row, token| token > 20 * row));
    let masks = [
        Mask::Varlen(nothing.clone()),
        Mask::Key(nothing.clone()),
        Mask::Cross { query: nothing.clone(), key: some.clone() },
        Mask::Cross { query: vec![true; 3 * 75], key: nothing.clone() },
        Mask::Cross { query: some, key: nothing },
    ];
    for mask in masks {
        let mut call = Call::random(SHAPE, mask, variant.dtype, 55);
        call.modifying = sinking(SHAPE.heads);
        call.check_lse(&variant)?;
    }
    // Tensors without keys.
    let (device, [q, k]) = (&variant.device, [[3, 75, 4, 32], [3, 0, 2, 32]]);
    let [q, k] = [Tensor::zeros(device, variant.dtype, &q)?, Tensor::zeros(device, variant.dtype, &k)?];
    let sinks = sinking(4).modifiers();
    let attended = variant.layer().with_lse().forward(&q, &k, &k, AttentionMask::none().with_modifiers(&sinks))?;
    let lse = attended.lse.context("lse was asked for")?.to_vec::<f32>()?;
    let expected: Vec<f64> =
        (0..3 * 4 * 75).map(|at| f64::from([0.5, f32::NEG_INFINITY, 20.0, -2.0][at / 75 % 4])).collect();
    judge(&lse, &expected)?;
    ensure!(download(&attended.out)?.iter().all(|&bits| bits == 0), "expected zeros");
    Ok(())
}

fn sinks_and_device_meta(variant: &Variant) -> Result<Completion> {
    if DeviceVarlenMeta::new(&variant.device, 1, 1).is_err() {
        return Ok(Completion::ignored_with("the device builds no metadata"));
    }
    // The second batch row has no key.
    let some = bernoulli(8, 3 * 75, 0.7)?;
    for path in [Path::Dense, Path::Fused] {
        let variant = Variant { path: Some(path), ..variant.clone() };
        let keep = mask(3, 75, |row, token| row != 1 && some[row * 75 + token]);
        let mut call = Call::random(SHAPE, Mask::Device(keep), variant.dtype, 56);
        call.modifying = sinking(SHAPE.heads);
        call.check_lse(&variant)?;
    }
    Ok(Completion::Completed)
}

/// `forward` gives what `forward_into` writes, if it was asked for.
fn forward_returns_it(variant: &Variant) -> Result<()> {
    let device = &variant.device;
    let call = Call::random(SHAPE, Mask::None, variant.dtype, 53);
    let tensor = |input: usize, heads: usize| {
        let bits: Vec<u32> =
            call.values[input].iter().map(|&value| super::memory::narrow(value, variant.dtype)).collect();
        upload(device, variant.dtype, &bits, &[3, 75, heads, 32])
    };
    let (q, k, v) = (tensor(0, 4)?, tensor(1, 2)?, tensor(2, 2)?);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(75, &[75, 1, 40])?)?;
    let mask = AttentionMask::varlen(&meta);
    let plain = variant.layer().forward(&q, &k, &v, mask)?;
    ensure!(plain.lse.is_none(), "lse was not asked for");
    let attended = variant.layer().with_lse().forward(&q, &k, &v, mask)?;
    let lse = attended.lse.context("lse was asked for")?;
    ensure!(lse.shape() == [3, 4, 75] && lse.dtype() == DType::F32, "got {lse:?}");
    ensure!(download(&plain.out)? == download(&attended.out)?, "the output differs");
    let mut out = Tensor::zeros(device, variant.dtype, &[3, 75, 4, 32])?;
    let mut written = LseMemory::new(device, [3, 4, 75])?;
    let outputs = AttentionOutputs::new(&mut out).with_lse(written.view()?);
    variant.layer().forward_into(&q, &k, &v, mask, outputs)?;
    ensure!(download(&out)? == download(&attended.out)?, "forward_into: the output differs");
    let bits: Vec<u32> = written.read()?.into_iter().map(f32::to_bits).collect();
    ensure!(bits == download(&lse)?, "forward_into: the lse differs");
    // Heads of an lse may lie farther apart than batch rows.
    let mut across = Tensor::zeros(device, DType::F32, &[4, 3, 75])?;
    let layout = Layout::contiguous(&[4, 3, 75])?.permute(&[1, 0, 2])?;
    let outputs = AttentionOutputs::new(&mut out).with_lse(across.view_mut().with_layout(layout));
    variant.layer().forward_into(&q, &k, &v, mask, outputs)?;
    let across = download(&across)?;
    for (at, &expected) in bits.iter().enumerate() {
        let (b, h, s) = (at / 300, at / 75 % 4, at % 75);
        ensure!(across[(h * 3 + b) * 75 + s] == expected, "permuted: element [{b}, {h}, {s}] differs");
    }
    Ok(())
}

/// A bias of −∞ hides keys, and whole rows have no key but those that it hides.
fn bias(variant: &Variant) -> Result<()> {
    let OracleShape { batch, seq_q, seq_k, heads, .. } = SHAPE;
    let mut values = varlen_fa_testkit::random::normal(54, batch * heads * seq_q * seq_k);
    for (row, values) in values.chunks_mut(seq_k).enumerate() {
        for (key, value) in values.iter_mut().enumerate() {
            if row % 7 == 3 || (row + key) % 5 == 1 {
                *value = f32::NEG_INFINITY;
            }
        }
    }
    let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
    let tensor = upload(&variant.device, DType::F32, &bits, &[batch, heads, seq_q, seq_k])?;
    let keep = mask(3, 75, |row, token| token >= 20 * row);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(3, 75, &keep)?)?;
    let key_mask = KeyMask::from_bool(3, 75, &keep)?;
    let ranges = Rule::Causal.ranges(&[3, 75, 75].into())?;
    for (of_tokens, mask) in [
        (Mask::None, AttentionMask::none()),
        (Mask::Key(keep.clone()), AttentionMask::key(&key_mask)),
        (Mask::Varlen(keep.clone()), AttentionMask::varlen(&meta)),
    ] {
        for is_causal in [false, true] {
            if is_causal && !variant.kernel.has_ranges() {
                continue;
            }
            let mut call = Call::random(SHAPE, of_tokens.clone(), variant.dtype, 55);
            call.bias = Some(values.clone());
            call.rule = is_causal.then_some(Rule::Causal);
            let mask = if is_causal { mask.with_ranges(&ranges) } else { mask }.with_bias(&tensor);
            let (_, (bits, lse)) = call.run_for_lse(variant, mask)?;
            call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;
            judge(&lse, &call.reference_lse()?).with_context(|| format!("{of_tokens:?}, causal: {is_causal}"))?;
        }
    }
    Ok(())
}

fn device_meta(variant: &Variant) -> Result<()> {
    for keep in keeps(3, 75)? {
        Call::random(SHAPE, Mask::Device(keep), variant.dtype, 56).check_lse(variant)?;
    }
    let (query, key) = (bernoulli(6, 3 * 75, 0.8)?, mask(3, 75, |row, token| row != 1 && token < 60));
    Call::random(SHAPE, Mask::DeviceCross { query, key }, variant.dtype, 57).check_lse(variant)
}
