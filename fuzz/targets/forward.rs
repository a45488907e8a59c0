//! Calls on the CPU device against the f64 oracle: any small shape, mask, element type, scale and
//! strides. What must not matter holds NaN: dropped keys, masked query rows, the gaps between rows,
//! and the output before it is written.
#![no_main]

use std::sync::OnceLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use varlen_fa::{
    AttentionMask, AttentionOutputs, Config, Device, DeviceChoice, Element, KeyMask, Layout, MaskedAttention,
};
use varlen_fa::{ScoreModifiers, TensorView, TensorViewMut, VarlenMeta, bf16, f16};
use varlen_fa_testkit::oracle::Modifiers;
use varlen_fa_testkit::{Oracle, OracleProblem, OracleShape, Precision, check_field_rule, naive_low_precision, random};

#[derive(Debug, Arbitrary)]
struct Input {
    seed: u64,
    batch: u8,
    seq_q: u8,
    seq_k: u8,
    kv_heads: u8,
    group: u8,
    head_dim: u8,
    scale: Scale,
    dtype: Type,
    mask: Mask,
    force_dense: bool,
    modifiers: Modifying,
    /// Elements between rows of q, k, v and the output, in steps of 8.
    gaps: [u8; 4],
    /// Heads outside of the sequence, as in `[B, H, S, D]`.
    heads_first: [bool; 4],
    /// Whether to ask for the log-sum-exp.
    lse: bool,
}

#[derive(Debug, Arbitrary)]
enum Scale {
    Default,
    Zero,
    Of(i8),
}

/// Soft cap, slopes and sinks, of which a few heads have one each.
#[derive(Debug, Arbitrary)]
struct Modifying {
    /// In units of 1/8.
    softcap: Option<u8>,
    /// In units of 1/64.
    slopes: Option<[i8; 6]>,
    /// In units of 1/4; the lowest is −∞.
    sinks: Option<[i8; 6]>,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Type {
    F32,
    F16,
    Bf16,
}

/// Each bit of the bytes is a token, over and over.
#[derive(Debug, Arbitrary)]
enum Mask {
    None,
    Key(Vec<u8>),
    Varlen(Vec<u8>),
    Cross(Vec<u8>, Vec<u8>),
}

fuzz_target!(|input: Input| match input.dtype {
    Type::F32 => run::<f32>(&input, Precision::F32, |value| value, |value| value),
    Type::F16 => run::<f16>(&input, Precision::F16, f16::from_f32, f16::to_f32),
    Type::Bf16 => run::<bf16>(&input, Precision::Bf16, bf16::from_f32, bf16::to_f32),
});

/// The devices: with metadata's own path, and with dense attention forced.
fn layer(force_dense: bool) -> MaskedAttention {
    static DEVICES: OnceLock<[Device; 2]> = OnceLock::new();
    let devices = DEVICES.get_or_init(|| {
        let open = |dense| {
            let config = Config::default().with_device(DeviceChoice::Cpu).with_force_dense(dense);
            Device::with_config(config).expect("the CPU device")
        };
        [open(false), open(true)]
    });
    MaskedAttention::new(&devices[usize::from(force_dense)])
}

fn run<T: Element>(input: &Input, precision: Precision, narrow: fn(f32) -> T, widen: fn(T) -> f32) {
    let shape = OracleShape {
        batch: usize::from(input.batch % 4),
        seq_q: usize::from(input.seq_q) % 80,
        seq_k: usize::from(input.seq_k) % 160,
        heads: usize::from(input.kv_heads % 2 + 1) * usize::from(input.group % 3 + 1),
        kv_heads: usize::from(input.kv_heads % 2 + 1),
        // Multiples of 8, others, and the widest.
        head_dim: match usize::from(input.head_dim) {
            255 => 512,
            any @ 128.. => any - 127,
            few => (few % 12 + 1) * 8,
        },
    };
    // Self-attention's metadata is of as many queries as keys.
    let shape = match input.mask {
        Mask::Varlen(_) => OracleShape { seq_q: shape.seq_k, ..shape },
        _ => shape,
    };
    let OracleShape { batch, seq_q, seq_k, heads, kv_heads, head_dim } = shape;
    let shapes = [[batch, seq_q, heads, head_dim], [batch, seq_k, kv_heads, head_dim]];
    let values =
        |stream, [b, s, h, d]: [usize; 4]| random::normal_rounded(input.seed, stream, b * s * h * d, precision);
    let (q, k, v) = (values(0, shapes[0]), values(1, shapes[1]), values(2, shapes[1]));

    let bits = |bytes: &[u8], seq: usize| -> Vec<bool> {
        let bit = |at: usize| bytes.get(at / 8 % bytes.len().max(1)).is_some_and(|byte| byte >> (at % 8) & 1 == 1);
        (0..batch * seq).map(bit).collect()
    };
    let (query_keep, key_keep) = match &input.mask {
        Mask::None => (None, None),
        Mask::Key(key) => (None, Some(bits(key, seq_k))),
        Mask::Varlen(keep) => (Some(bits(keep, seq_q)), Some(bits(keep, seq_k))),
        Mask::Cross(query, key) => (Some(bits(query, seq_q)), Some(bits(key, seq_k))),
    };
    let scale = match input.scale {
        Scale::Default => None,
        Scale::Zero => Some(0.0),
        Scale::Of(sixteenths) => Some(f32::from(sixteenths) / 16.0),
    };

    let softcap = input.modifiers.softcap.map_or(0.0, |eighths| f32::from(eighths) / 8.0);
    let of_heads = |values: &Option<[i8; 6]>, unit: f32| -> Option<Vec<f32>> {
        let value =
            |value: i8| if unit == 0.25 && value == i8::MIN { f32::NEG_INFINITY } else { f32::from(value) * unit };
        values.map(|values| values[..heads].iter().map(|&each| value(each)).collect())
    };
    let (slopes, sinks) = (of_heads(&input.modifiers.slopes, 1.0 / 64.0), of_heads(&input.modifiers.sinks, 0.25));
    let mut modifiers = ScoreModifiers::new().with_softcap(softcap);
    if let Some(slopes) = &slopes {
        modifiers = modifiers.with_alibi(slopes.as_slice());
    }
    if let Some(sinks) = &sinks {
        modifiers = modifiers.with_sinks(sinks.as_slice());
    }

    let placed = |at: usize, values: &[f32], shape, keep: Option<&[bool]>| {
        let layout = layout(shape, usize::from(input.gaps[at] % 4) * 8, input.heads_first[at]);
        (memory(&layout, shape, values, keep, narrow), layout)
    };
    let (q_memory, q_layout) = placed(0, &q, shapes[0], query_keep.as_deref());
    let (k_memory, k_layout) = placed(1, &k, shapes[1], key_keep.as_deref());
    let (v_memory, v_layout) = placed(2, &v, shapes[1], key_keep.as_deref());
    let out_layout = layout(shapes[0], usize::from(input.gaps[3] % 4) * 8, input.heads_first[3]);
    let mut out = vec![narrow(f32::NAN); out_layout.end() as usize + 3];

    let key_mask = |keep: &Option<Vec<bool>>, seq| {
        let keep = keep.as_deref().unwrap_or_default();
        KeyMask::from_bool(batch, seq, keep).expect("a mask of the right length")
    };
    let meta = |keep, seq| VarlenMeta::from_key_mask(&key_mask(keep, seq)).expect("metadata of a sound mask");
    let (key, query_meta, key_meta);
    let mask = match input.mask {
        Mask::None => AttentionMask::none(),
        Mask::Key(_) => {
            key = key_mask(&key_keep, seq_k);
            AttentionMask::key(&key)
        }
        Mask::Varlen(_) => {
            key_meta = meta(&key_keep, seq_k);
            AttentionMask::varlen(&key_meta)
        }
        Mask::Cross(..) => {
            (query_meta, key_meta) = (meta(&query_keep, seq_q), meta(&key_keep, seq_k));
            AttentionMask::varlen_cross(&query_meta, &key_meta)
        }
    };
    let mask = mask.with_modifiers(&modifiers);
    let mut attention = layer(input.force_dense);
    if let Some(scale) = scale {
        attention = attention.with_softmax_scale(scale);
    }
    let mut lse = vec![f32::NAN; batch * heads * seq_q];
    let mut outputs = AttentionOutputs::new(TensorViewMut::from_host_strided(&mut out, out_layout));
    let wants_lse = input.lse;
    if wants_lse {
        outputs = outputs.with_lse(TensorViewMut::from_host(&mut lse, &[batch, heads, seq_q]).expect("as long"));
    }
    let plan = attention
        .forward_into(
            TensorView::from_host_strided(&q_memory, q_layout),
            TensorView::from_host_strided(&k_memory, k_layout),
            TensorView::from_host_strided(&v_memory, v_layout),
            mask,
            outputs,
        )
        .expect("a sound call");

    let mut problem = OracleProblem::new(shape, &q, &k, &v);
    problem.softmax_scale = scale.map_or(problem.softmax_scale, f64::from);
    (problem.query_keep, problem.key_keep) = (query_keep.as_deref(), key_keep.as_deref());
    problem.modifiers = Modifiers {
        softcap: (softcap != 0.0).then_some(f64::from(softcap)),
        slopes: slopes.as_deref(),
        sinks: sinks.as_deref(),
    };
    let oracle = Oracle::new(problem).expect("a sound problem");
    let got: Vec<f32> = positions(&out_layout, shapes[0]).map(|at| widen(out[at])).collect();
    let case = plan.to_string();
    let (low, exact) = (naive_low_precision(&oracle, precision), oracle.attend_all());
    let floor = floor(&oracle, precision, &exact);
    check_field_rule(&case, shapes[0], &got, &low, &exact, floor).expect("the oracle's answer");
    if let Some(keep) = &query_keep {
        for (row, values) in got.chunks(heads * head_dim).enumerate().filter(|&(row, _)| !keep[row]) {
            assert!(values.iter().all(|value| value.to_bits() == 0), "row {row} is masked and not +0.0");
        }
    }
    for (got, expected) in lse.into_iter().map(f64::from).zip(oracle.lse_all()).filter(|_| wants_lse) {
        let is_near = (got - expected).abs() <= 1e-4 + 1e-5 * expected.abs();
        assert!(got == expected || is_near, "{case}: lse {got}, expected {expected}");
    }
    let mut written: Vec<bool> = vec![false; out.len()];
    positions(&out_layout, shapes[0]).for_each(|at| written[at] = true);
    assert!(
        out.iter().zip(written).all(|(&value, written)| written || widen(value).is_nan()),
        "wrote outside of the view"
    );
}

/// What the suite's rule, twice the error of a naive run in the element type, leaves out.
///
/// - The suite's own floor: two roundings of the output, or 1e-5 in f32, of the largest reference. Its inputs are standard
///   normal and its scores moderate, and so is the naive run's error there: over many rows it meets bad luck. Here a call may
///   be one row with two keys, on which the naive run happens to be exact.
/// - Scores may be large here: any scale up to 8. A score is a sum in f32, whose error grows with `|scale| · ‖q‖ · ‖k‖`, in
///   whatever order it is summed; an error of the score is a relative error of its key's weight, and moves the output by at
///   most that share of the largest value. Sums in another order than the naive run's need their own allowance: 4 units of
///   f32 for the sum, the scale, the conversion to base 2 and the exponential.
fn floor(oracle: &Oracle<'_>, precision: Precision, exact: &[f64]) -> f64 {
    let problem = oracle.problem();
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let norm = |values: &[f32]| {
        let norms =
            values.chunks(problem.shape.head_dim).map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>());
        largest(&mut { norms }).sqrt()
    };
    let rounding = match precision {
        Precision::F32 => 1e-5,
        Precision::F16 => 2.0 * 2f64.powi(-11),
        Precision::Bf16 => 2.0 * 2f64.powi(-8),
    };
    let score = problem.softmax_scale.abs() * norm(problem.q) * norm(problem.k);
    let value = largest(&mut problem.v.iter().map(|&value| f64::from(value).abs()));
    rounding * largest(&mut exact.iter().map(|value| value.abs())) + 4.0 * f64::from(f32::EPSILON) * score * value
}

/// A `[B, S, H, D]` view with `gap` elements behind each row of a head, in either order of heads
/// and tokens.
fn layout([batch, seq, heads, dim]: [usize; 4], gap: usize, heads_first: bool) -> Layout {
    let row = (dim + gap) as u64;
    let [token, head] = if heads_first { [row, row * seq as u64] } else { [row * heads as u64, row] };
    Layout::strided(&[batch, seq, heads, dim], &[row * (seq * heads) as u64, token, head, 1], 0)
        .expect("a small layout")
}

fn positions(layout: &Layout, [batch, seq, heads, dim]: [usize; 4]) -> impl Iterator<Item = usize> + use<> {
    let [b, s, h] = [0, 1, 2].map(|dim| layout.strides()[dim] as usize);
    (0..batch * seq * heads * dim).map(move |index| {
        let (element, rest) = (index % dim, index / dim);
        let (head, rest) = (rest % heads, rest / heads);
        rest / seq * b + rest % seq * s + head * h + element
    })
}

/// The memory of a view: NaN between its rows and in masked tokens.
fn memory<T: Element>(
    layout: &Layout,
    shape: [usize; 4],
    values: &[f32],
    keep: Option<&[bool]>,
    narrow: fn(f32) -> T,
) -> Vec<T> {
    let mut memory = vec![narrow(f32::NAN); layout.end() as usize];
    for (index, at) in positions(layout, shape).enumerate() {
        let token = index / (shape[2] * shape[3]);
        if keep.is_none_or(|keep| keep[token]) {
            memory[at] = narrow(values[index]);
        }
    }
    memory
}
