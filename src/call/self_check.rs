//! One kernel compared with another on small calls, before it is trusted on a device: a chip,
//! driver or compiler that it was not tested with must not make results wrong. The two may be
//! kernels of one device or of two.
//!
//! Sizes pass tiles of 64 and 128 rows, and rings of four key tiles. Masked rows hold NaN, and so
//! does the output before it is written.
//!
//! ```text
//!                0        133            300                      645
//!   queries, row 0  ██████
//!            row 1  █·██·█
//!            row 2  ·█████
//!   keys,    row 0  ██████████████████████·█·██████████████████
//!            row 1  ·████·██████████████··█···············
//!            row 2  ██·██·██·██·██·██·██·██·██·██·██·██·██·██·█    later keys are larger, so that the
//!                                                                maximum of a row keeps growing
//! ```
//!
//! Dense and packed calls without a mask take the unmasked start of row 0 as tensors of their own.
//!
//! All cases allocate a few MB and take some milliseconds where a call takes microseconds.

use std::iter;
use std::ops::Range;
use std::slice;
#[cfg(not(target_arch = "wasm32"))]
use std::{
    pin::pin,
    task::{Context, Poll, Waker},
};

use half::{bf16, f16};

use crate::call::memory::{Input, Output, Storage};
use crate::call::op::{Attention, Backend, Op, Rows};
use crate::call::path::Path;
use crate::call::plan::{Plan, Reason};
use crate::call::problem::{AttentionProblem, AttentionShape};
use crate::call::segments::{Cuts, Segmented};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::layout::Layout;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

const BATCH: usize = 3;
const QUERIES: usize = 133;
const KEYS: usize = 645;
/// Keys in front of the first row that are all kept, as is every query of it.
const WHOLE_KEYS: usize = 300;
/// The batch row in which later keys are larger.
const GROWING_ROW: usize = 2;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
/// NaN in either type.
const POISON: u16 = 0x7fff;

/// A kernel of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    device: &'a dyn Backend,
    kernel: Kernel,
    shorter_tiles: fn(Kernel, usize) -> Vec<u16>,
}

impl<'a> Subject<'a> {
    pub(crate) fn new(device: &'a dyn Backend, kernel: Kernel) -> Self {
        Self { device, kernel, shorter_tiles: |_, _| Vec::new() }
    }

    /// With tiles beside the longest ones of a head dimension, which are compared too: their keys.
    #[cfg_attr(
        all(not(test), any(not(feature = "cuda"), target_arch = "wasm32")),
        expect(dead_code, reason = "only CUDA kernels have tiles of several lengths")
    )]
    pub(crate) fn with_shorter_tiles(self, shorter_tiles: fn(Kernel, usize) -> Vec<u16>) -> Self {
        Self { shorter_tiles, ..self }
    }
}

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Padded tensors without a mask.
    Dense,
    /// Padded tensors, every pair of a query and a key computed or masked.
    Masked,
    Packed,
    Fused,
}

impl Form {
    /// Whether the call is of whole batch rows with masked tokens.
    fn is_padded(self) -> bool {
        matches!(self, Self::Masked | Self::Fused)
    }

    fn path(self) -> Path {
        match self {
            Self::Dense | Self::Masked => Path::Dense,
            Self::Packed => Path::Packed,
            Self::Fused => Path::Fused,
        }
    }

    /// The same result in the oldest form of the reference: masks of a dense call do what
    /// metadata does.
    fn of_reference(self) -> Self {
        if self == Self::Fused { Self::Masked } else { self }
    }
}

/// The calls of a comparison: each form with each element type and head dimension that the
/// kernels have.
#[derive(Debug)]
pub(crate) struct Cases {
    forms: &'static [Form],
    dtypes: &'static [DType],
    head_dims: &'static [usize],
}

impl Cases {
    /// For kernels that come as machine code: every form that they have, both 16-bit element
    /// types, and a head dimension for each width that they are compiled for. The second is
    /// narrower than its width.
    #[cfg_attr(
        all(not(test), any(not(feature = "cuda"), target_arch = "wasm32")),
        expect(dead_code, reason = "only CUDA kernels come as machine code")
    )]
    pub(crate) const COMPLETE: Self = Self {
        forms: &[Form::Dense, Form::Packed, Form::Fused],
        dtypes: &[DType::F16, DType::Bf16],
        head_dims: &[64, 88, 128, 192, 256],
    };
    /// For kernels that a driver compiles variant by variant, which can take it seconds: one call
    /// with masks and a head dimension that fills no tile.
    #[cfg_attr(all(not(test), not(feature = "wgpu")), expect(dead_code, reason = "only wgpu's drivers compile"))]
    pub(crate) const QUICK: Self = Self { forms: &[Form::Masked], dtypes: &[DType::F16], head_dims: &[24] };
}

/// One call.
#[derive(Debug, Clone, Copy)]
struct Case {
    form: Form,
    dtype: DType,
    head_dim: usize,
    /// Keys of the kernel's tiles; the longest if it says none.
    tile_keys: Option<u16>,
}

/// Why a kernel did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Doubt {
    /// A sentence that says what failed or differs first.
    pub why: String,
    /// Whether that is for lack of memory or of the device, and may come out otherwise next time.
    pub is_passing: bool,
}

impl Doubt {
    fn of(error: &Error, why: String) -> Self {
        Self { why, is_passing: matches!(error, Error::OutOfMemory { .. } | Error::DeviceLost { .. }) }
    }
}

/// [`compare`] where no device gives up the thread: nothing is pending there.
///
/// # Errors
/// What failed or differs first.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn compare_now(tested: Subject<'_>, reference: Subject<'_>, cases: &Cases) -> Result<(), String> {
    let comparison = pin!(compare(tested, reference, cases));
    match comparison.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => outcome.map_err(|doubt| doubt.why),
        Poll::Pending => Err(format!("{} gave up the thread", tested.kernel)),
    }
}

/// Runs every case with both kernels. In a browser it gives the thread back while it waits.
///
/// # Errors
/// What failed or differs first.
pub(crate) async fn compare(tested: Subject<'_>, reference: Subject<'_>, cases: &Cases) -> Result<(), Doubt> {
    let in_words = |error: Error| Doubt::of(&error, error.to_string());
    let max_head_dim = tested.kernel.max_head_dim().min(reference.kernel.max_head_dim());
    let head_dims = cases.head_dims.iter().copied().filter(|&head_dim| head_dim <= max_head_dim);
    let widest = head_dims.clone().max().unwrap_or(0);
    let masks = Masks::new().map_err(in_words)?;
    let mut tested_bench = Bench::new(tested, &masks, widest).map_err(in_words)?;
    let mut reference_bench = Bench::new(reference, &masks, widest).map_err(in_words)?;
    for &dtype in cases.dtypes {
        for head_dim in head_dims.clone() {
            let inputs = Inputs::new(&masks, dtype, head_dim);
            tested_bench.fill(&inputs).map_err(in_words)?;
            reference_bench.fill(&inputs).map_err(in_words)?;
            let shorter_tiles = (tested.shorter_tiles)(tested.kernel, head_dim);
            for &form in cases.forms {
                let explain = |kernel: Kernel, tile_keys: Option<u16>, why: String| {
                    let tiles = tile_keys.map(|keys| format!(" in tiles of {keys} keys")).unwrap_or_default();
                    format!("{form:?} {dtype}, head_dim {head_dim}: {kernel}{tiles} {why}")
                };
                let failed = |kernel: Kernel, tile_keys: Option<u16>| {
                    move |error: Error| Doubt::of(&error, explain(kernel, tile_keys, format!("failed: {error}")))
                };
                let of_reference = Case { form: form.of_reference(), dtype, head_dim, tile_keys: None };
                let expected = reference_bench.run(of_reference).await.map_err(failed(reference.kernel, None))?;
                for tile_keys in iter::once(None).chain(shorter_tiles.iter().copied().map(Some)) {
                    let case = Case { form, dtype, head_dim, tile_keys };
                    let got = tested_bench.run(case).await.map_err(failed(tested.kernel, tile_keys))?;
                    judge(case, &masks, &got, &expected)
                        .map_err(|why| Doubt { why: explain(tested.kernel, tile_keys, why), is_passing: false })?;
                }
            }
        }
    }
    Ok(())
}

/// Masks of all cases.
struct Masks {
    query: VarlenMeta,
    key: VarlenMeta,
    packed: [CuSeqlens; 2],
}

impl Masks {
    fn new() -> Result<Self> {
        let meta = |seq, rows: &[&[Range<usize>]]| VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, rows)?);
        // A dropped key in each word of the mask.
        let holes: Vec<_> = (0..KEYS).step_by(23).map(|start| start..KEYS.min(start + 22)).collect();
        Ok(Self {
            query: meta(
                QUERIES,
                &[slice::from_ref(&(0..QUERIES)), &[0..7, 20..97, 131..QUERIES], slice::from_ref(&(5..QUERIES))],
            )?,
            key: meta(KEYS, &[&[0..310, 313..314, 341..KEYS], &[5..134, 150..279, 290..291], &holes])?,
            packed: [CuSeqlens::from_lengths(&[4, QUERIES - 4])?, CuSeqlens::from_lengths(&[171, WHOLE_KEYS - 171])?],
        })
    }
}

/// Inputs of a head dimension: q, k and v.
struct Inputs([Vec<u16>; 3]);

impl Inputs {
    fn new(masks: &Masks, dtype: DType, head_dim: usize) -> Self {
        let values = values();
        let tensor = |stream: usize, meta: &VarlenMeta, heads: usize, scale: &dyn Fn(usize, usize) -> f32| {
            let token = heads * head_dim;
            let mut bits = vec![POISON; BATCH * meta.seq() * token];
            for (at, row) in bits.chunks_exact_mut(token).enumerate() {
                let (batch, position) = (at / meta.seq(), at % meta.seq());
                if meta.key_mask().keeps(batch, position) {
                    let first = (stream * values.len() / 3 + at * token) % (values.len() - token);
                    let scale = scale(batch, position);
                    row.iter_mut().zip(&values[first..]).for_each(|(bits, value)| *bits = narrow(dtype, value * scale));
                }
            }
            bits
        };
        let growing = |batch, position| if batch == GROWING_ROW { 1.0 + position as f32 / 64.0 } else { 1.0 };
        Self([
            tensor(0, &masks.query, HEADS, &|_, _| 1.0),
            tensor(1, &masks.key, KV_HEADS, &growing),
            tensor(2, &masks.key, KV_HEADS, &|_, _| 1.0),
        ])
    }
}

/// A kernel with memory for all cases.
struct Bench<'a> {
    subject: Subject<'a>,
    masks: &'a Masks,
    q: Storage,
    k: Storage,
    v: Storage,
    out: Storage,
}

impl<'a> Bench<'a> {
    fn new(subject: Subject<'a>, masks: &'a Masks, widest: usize) -> Result<Self> {
        let alloc = |tokens: usize, heads: usize| subject.device.alloc((2 * BATCH * tokens * heads * widest) as u64);
        Ok(Self {
            subject,
            masks,
            q: alloc(QUERIES, HEADS)?,
            k: alloc(KEYS, KV_HEADS)?,
            v: alloc(KEYS, KV_HEADS)?,
            out: alloc(QUERIES, HEADS)?,
        })
    }

    fn fill(&mut self, Inputs([q, k, v]): &Inputs) -> Result<()> {
        for (memory, bits) in [(&mut self.q, q), (&mut self.k, k), (&mut self.v, v)] {
            self.subject.device.upload(memory.sink(), bytemuck::cast_slice(bits))?;
        }
        Ok(())
    }

    /// The output of a call.
    async fn run(&mut self, case: Case) -> Result<Vec<u16>> {
        let Case { form, dtype, head_dim, tile_keys } = case;
        let Subject { device, kernel, .. } = self.subject;
        let Masks { query, key, packed: [packed_query, packed_key] } = self.masks;
        let (batch, seq_k) = if form.is_padded() { (BATCH, KEYS) } else { (1, WHOLE_KEYS) };
        let layout = |tokens, heads| match form {
            Form::Packed => Layout::contiguous(&[tokens, heads, head_dim]),
            _ => Layout::contiguous(&[batch, tokens, heads, head_dim]),
        };
        let (of_queries, of_keys) = (layout(QUERIES, HEADS)?, layout(seq_k, KV_HEADS)?);
        let mut bits = vec![POISON; of_queries.numel()];
        device.upload(self.out.sink(), bytemuck::cast_slice(&bits))?;
        let rows = match form {
            Form::Dense => Rows::Dense { key_mask: None, zero_rows: None },
            Form::Masked => {
                let (key_mask, zero_rows) = (Some(key.key_mask()), Some(query.key_mask()));
                Rows::Dense { key_mask, zero_rows }
            }
            Form::Packed => Rows::Packed { query: packed_query, key: packed_key },
            Form::Fused => Rows::Varlen { query, key },
        };
        let batch = if form == Form::Packed { packed_query.batch() } else { batch };
        let problem = AttentionProblem {
            shape: AttentionShape { batch, seq_q: QUERIES, seq_k, num_heads: HEADS, num_kv_heads: KV_HEADS, head_dim },
            dtype,
            softmax_scale: 1.0 / (head_dim as f32).sqrt(),
            bias: None,
            cuts: Cuts::None,
            lse: false,
        };
        device.execute(Op::Attention(Attention {
            problem: &problem,
            plan: Plan {
                path: form.path(),
                kernel,
                reason: Reason::PathForced,
                copies_segments: false,
                tile_keys,
                estimate: None,
            },
            q: Segmented::One(Input { memory: self.q.source(), layout: of_queries, dtype }),
            k: Segmented::One(Input { memory: self.k.source(), layout: of_keys, dtype }),
            v: Segmented::One(Input { memory: self.v.source(), layout: of_keys, dtype }),
            out: Segmented::One(Output { memory: self.out.sink(), layout: of_queries, dtype }),
            lse: None,
            rows,
            ranges: None,
            modifiers: None,
            bias: None,
            arrivals: None,
        }))?;
        device.download_async(self.out.source(), bytemuck::cast_slice_mut(&mut bits)).await?;
        Ok(bits)
    }
}

/// Compares two outputs.
///
/// # Errors
/// Where they differ first.
fn judge(case: Case, masks: &Masks, got: &[u16], expected: &[u16]) -> Result<(), String> {
    let token = HEADS * case.head_dim;
    // The distance of numbers between 1 and 2.
    let spacing: f32 = if case.dtype == DType::Bf16 { 1.0 / 128.0 } else { 1.0 / 1024.0 };
    for (at, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let row = at / token;
        let (batch, position) = (row / QUERIES, row % QUERIES);
        let is_kept = !case.form.is_padded() || masks.query.key_mask().keeps(batch, position);
        if !is_kept {
            if got != 0 {
                return Err(format!("gives {} in the masked row {row}, expected 0", widen(case.dtype, got)));
            }
            continue;
        }
        // Kernels round weights and outputs to the element type: outputs by half a spacing of
        // themselves, and so do their weights' sums. Roundings of weights average out over many
        // keys. Where few keys have all the weight, they do not: each kernel errs by half a
        // spacing of the largest value.
        let of_weights = if case.form.is_padded() && batch == GROWING_ROW { LARGEST } else { 0.5 };
        let (got, expected) = (widen(case.dtype, got), widen(case.dtype, expected));
        let is_close = (got - expected).abs() <= spacing * (of_weights + 2.0 * expected.abs());
        // NaN never passes either.
        if !is_close {
            return Err(format!("gives {got} at element {at}, expected {expected}"));
        }
    }
    Ok(())
}

fn narrow(dtype: DType, value: f32) -> u16 {
    match dtype {
        DType::Bf16 => bf16::from_f32(value).to_bits(),
        _ => f16::from_f32(value).to_bits(),
    }
}

fn widen(dtype: DType, bits: u16) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_bits(bits).to_f32(),
        _ => f16::from_bits(bits).to_f32(),
    }
}

/// No number of [`values`] is larger in magnitude.
const LARGEST: f32 = 3.0;

/// Numbers with variance 1, so many that rows which begin at different places in them have
/// nothing in common.
fn values() -> Vec<f32> {
    const COUNT: u64 = 4099;
    let number = |at: u64| {
        // The mixing of Steele and others' SplitMix (2014); the sum of three uniform numbers in
        // [-1, 1).
        let mut z = at.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let part = |shift: u32| (z >> shift & 0x1f_ffff) as f32 / 1_048_576.0 - 1.0;
        part(0) + part(21) + part(42)
    };
    (0..COUNT).map(number).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::any::Any;
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;
    use crate::backends::cpu::CpuDevice;
    use crate::cache::DeviceId;
    use crate::call::memory::{Sink, Source};
    use crate::call::op::Timing;
    use crate::call::plan::Capabilities;
    use crate::error::Error;

    const KERNEL: Kernel = Kernel::CudaSm100;
    const REFERENCE: Kernel = Kernel::CudaSm80;

    /// What the kernel does instead of its work.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Lie {
        /// Its work.
        None,
        /// One more thing: one element is another number, near the true one. The last in the
        /// batch rows whose keys do not grow.
        Element,
        /// One more thing: the last element is no mean of values. Only in padded forms with masks.
        GrowingRow,
        /// One more thing: a masked row is not quite zero. Only in padded forms with masks.
        MaskedRow,
        /// Nothing, without an error.
        Nothing,
        /// It returns an error.
        Failure,
        /// Another softmax scale.
        Scale,
    }

    /// The CPU device, which ignores the kernel of a plan, except that one kernel lies in one case.
    #[derive(Debug)]
    struct Liar {
        honest: Arc<dyn Backend>,
        lie: Lie,
        case: Case,
    }

    impl Liar {
        fn tells(&self, attention: &Attention<'_>) -> bool {
            let form = match (attention.plan.path, &attention.rows) {
                (Path::Dense, Rows::Dense { key_mask: None, .. }) => Form::Dense,
                (Path::Dense, _) => Form::Masked,
                (Path::Packed, _) => Form::Packed,
                _ => Form::Fused,
            };
            let problem = attention.problem;
            attention.plan.kernel == KERNEL
                && (form, problem.dtype, problem.shape.head_dim)
                    == (self.case.form, self.case.dtype, self.case.head_dim)
                && attention.plan.tile_keys == self.case.tile_keys
        }
    }

    impl Backend for Liar {
        fn id(&self) -> DeviceId {
            self.honest.id()
        }
        fn name(&self) -> &str {
            self.honest.name()
        }
        fn capabilities(&self) -> &Capabilities {
            self.honest.capabilities()
        }
        fn alloc(&self, bytes: u64) -> Result<Storage> {
            self.honest.alloc(bytes)
        }
        fn upload(&self, to: Sink<'_>, bytes: &[u8]) -> Result<()> {
            self.honest.upload(to, bytes)
        }
        fn download(&self, from: Source<'_>, into: &mut [u8]) -> Result<()> {
            self.honest.download(from, into)
        }
        fn execute(&self, op: Op<'_>) -> Result<()> {
            let Op::Attention(attention) = op else { return self.honest.execute(op) };
            if !self.tells(&attention) {
                return self.honest.execute(Op::Attention(attention));
            }
            let mut problem = attention.problem.clone();
            match self.lie {
                Lie::Nothing => return Ok(()),
                Lie::Failure => return Err(Error::HeadDim { got: 7 }),
                Lie::Scale => problem.softmax_scale *= 1.25,
                Lie::None | Lie::Element | Lie::GrowingRow | Lie::MaskedRow => {}
            }
            let Segmented::One(Output { memory: Sink::Host(bytes), layout, dtype }) = attention.out else {
                unreachable!()
            };
            let out = Segmented::One(Output { memory: Sink::Host(&mut *bytes), layout, dtype });
            self.honest.execute(Op::Attention(Attention { problem: &problem, out, ..attention }))?;
            let (form, token) = (self.case.form, HEADS * problem.shape.head_dim);
            let bits: &mut [u16] = bytemuck::cast_slice_mut(&mut bytes[..2 * layout.numel()]);
            match self.lie {
                // 1/8: means of many random numbers do not hit it.
                Lie::Element => {
                    let last = if form.is_padded() { GROWING_ROW * QUERIES * token } else { layout.numel() };
                    bits[last - 1] = narrow(dtype, 0.125);
                }
                Lie::GrowingRow => bits[layout.numel() - 1] = narrow(dtype, LARGEST + 1.0),
                // Row 10 of the second batch row.
                Lie::MaskedRow => bits[(QUERIES + 10) * token] = 1,
                _ => {}
            }
            Ok(())
        }
        fn synchronize(&self) -> Result<()> {
            self.honest.synchronize()
        }
        fn upload_meta(&self, meta: &VarlenMeta) -> Result<()> {
            self.honest.upload_meta(meta)
        }
        fn start_timer(&self) -> Result<Instant> {
            self.honest.start_timer()
        }
        fn stop_timer(&self, started: Instant) -> Result<Timing> {
            self.honest.stop_timer(started)
        }
        fn as_any(&self) -> &dyn Any {
            self
        }
    }

    /// A device whose kernel takes another softmax scale in the call of [`Cases::QUICK`], or none
    /// that does, and the kernel.
    pub(crate) fn device_of_portable_calls(is_wrong: bool) -> (impl Backend, Kernel) {
        let lie = if is_wrong { Lie::Scale } else { Lie::None };
        let case = Case { form: Form::Masked, dtype: DType::F16, head_dim: 24, tile_keys: None };
        (Liar { honest: CpuDevice::shared(), lie, case }, KERNEL)
    }

    fn compare_with(liar: &Liar, cases: &Cases) -> Result<(), String> {
        compare_now(Subject::new(liar, KERNEL), Subject::new(liar, REFERENCE), cases)
    }

    fn outcome(lie: Lie, case: Case) -> Result<(), String> {
        compare_with(&Liar { honest: CpuDevice::shared(), lie, case }, &Cases::COMPLETE)
    }

    #[test]
    fn an_honest_kernel_passes_at_every_width() {
        let case = Case { form: Form::Fused, dtype: DType::F16, head_dim: 64, tile_keys: None };
        assert_eq!(outcome(Lie::None, case), Ok(()));
        // As wide as kernels are.
        let cpu = CpuDevice::shared();
        let (tested, reference) = (Subject::new(&*cpu, Kernel::CudaSm90), Subject::new(&*cpu, REFERENCE));
        assert_eq!(compare_now(tested, reference, &Cases::COMPLETE), Ok(()));
        assert_eq!(compare_now(tested, reference, &Cases::QUICK), Ok(()));
    }

    #[test]
    fn a_lie_in_any_case_is_noticed_and_located() {
        for cases in [&Cases::COMPLETE, &Cases::QUICK] {
            let widths = cases.head_dims.iter().filter(|&&head_dim| head_dim <= KERNEL.max_head_dim());
            for &form in cases.forms {
                for &dtype in cases.dtypes {
                    for &head_dim in widths.clone() {
                        let case = Case { form, dtype, head_dim, tile_keys: None };
                        let liar = Liar { honest: CpuDevice::shared(), lie: Lie::Element, case };
                        let said = compare_with(&liar, cases);
                        let expected = format!("{form:?} {dtype}, head_dim {head_dim}: sm100 gives ");
                        assert!(said.as_ref().is_err_and(|said| said.starts_with(&expected)), "{case:?}: {said:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_lie_in_shorter_tiles_is_noticed_and_located() {
        let shorter = |_, head_dim| if head_dim == 128 { vec![112, 48] } else { Vec::new() };
        for (head_dim, keys, is_compared) in [(128, 112, true), (128, 48, true), (128, 80, false), (64, 48, false)] {
            let case = Case { form: Form::Packed, dtype: DType::Bf16, head_dim, tile_keys: Some(keys) };
            let liar = Liar { honest: CpuDevice::shared(), lie: Lie::Element, case };
            let tested = Subject::new(&liar, KERNEL).with_shorter_tiles(shorter);
            let said = compare_now(tested, Subject::new(&liar, REFERENCE), &Cases::COMPLETE);
            let expected = format!("Packed bf16, head_dim {head_dim}: sm100 in tiles of {keys} keys gives ");
            assert_eq!(said.as_ref().is_err_and(|said| said.starts_with(&expected)), is_compared, "{case:?}: {said:?}");
            assert_eq!(said.is_ok(), !is_compared, "{case:?}: {said:?}");
        }
    }

    #[test]
    fn every_kind_of_lie_is_noticed() {
        let fused = Case { form: Form::Fused, dtype: DType::Bf16, head_dim: 88, tile_keys: None };
        let masked = Case { form: Form::Masked, dtype: DType::F16, head_dim: 24, tile_keys: None };
        for (case, cases) in [(fused, &Cases::COMPLETE), (masked, &Cases::QUICK)] {
            for (lie, expected) in [
                (Lie::MaskedRow, "in the masked row 143, expected 0"),
                (Lie::GrowingRow, "sm100 gives 4 at element"),
                (Lie::Nothing, "sm100 gives NaN"),
                (Lie::Failure, "sm100 failed: `q`: head_dim must"),
                (Lie::Scale, "sm100 gives "),
            ] {
                let said = compare_with(&Liar { honest: CpuDevice::shared(), lie, case }, cases);
                assert!(said.as_ref().is_err_and(|said| said.contains(expected)), "{lie:?}: {said:?}");
            }
        }
    }

    #[test]
    fn the_reference_may_be_of_another_device() {
        let case = Case { form: Form::Masked, dtype: DType::F16, head_dim: 24, tile_keys: None };
        let cpu = CpuDevice::shared();
        for (lie, is_noticed) in [(Lie::None, false), (Lie::Scale, true)] {
            let liar = Liar { honest: CpuDevice::shared(), lie, case };
            let (tested, reference) = (Subject::new(&liar, KERNEL), Subject::new(&*cpu, Kernel::CpuTiled));
            assert_eq!(compare_now(tested, reference, &Cases::QUICK).is_err(), is_noticed, "{lie:?}");
        }
    }

    #[test]
    fn scores_of_the_growing_row_pass_thresholds_of_rescaling() {
        // A dot product of numbers of variance 1, times 1/sqrt(head_dim), has variance 1; keys
        // grow to 11 times that. Kernels let maxima grow by 2^8 before they rescale.
        let masks = Masks::new().unwrap_or_else(|error| panic!("{error}"));
        let Inputs([q, k, _]) = Inputs::new(&masks, DType::F16, 24);
        let row = |bits: &[u16], at: usize, heads: usize| -> Vec<f32> {
            bits[at * heads * 24..][..24].iter().map(|&bits| widen(DType::F16, bits)).collect()
        };
        let mut rescaled = 0;
        for query in 5..QUERIES {
            let q = row(&q, GROWING_ROW * QUERIES + query, HEADS);
            let (mut base, mut times) = (f32::NEG_INFINITY, 0);
            for key in (0..KEYS).filter(|&key| masks.key.key_mask().keeps(GROWING_ROW, key)) {
                let k = row(&k, GROWING_ROW * KEYS + key, KV_HEADS);
                let score: f32 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
                let score = score / 24_f32.sqrt() * std::f32::consts::LOG2_E;
                if score > base + 8.0 {
                    (base, times) = (score, times + 1);
                }
            }
            rescaled += usize::from(times > 1);
        }
        assert!(rescaled > QUERIES / 2, "{rescaled} rows");
    }
}
