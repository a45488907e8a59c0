//! Two kernels of a device compared on small calls, before the newer one is trusted there: a chip, driver or compiler that it was not
//! tested with must not make results wrong.
//!
//! Every form that a kernel has is tried with both 16-bit element types and each compiled width. Sizes pass tiles of 64 and 128 rows,
//! and rings of four key tiles; dropped rows and the output before it is written hold NaN.
//!
//! ```text
//!                0        133            300                      645
//!   queries, row 0  ██████                                             dense and packed calls take the whole rows in front
//!            row 1  █·██·█                                             alone, as tensors of their own
//!   keys,    row 0  ██████████████████████·█·██████████████████
//!            row 1  ·████·██████████████··█···············
//! ```
//!
//! It allocates a few MB, and takes some milliseconds where calls take microseconds.

use std::slice;

use half::{bf16, f16};

use crate::call::op::{Attention, Backend, Input, Op, Output, Rows, Storage};
use crate::call::plan::{Path, Plan, Reason};
use crate::call::problem::{AttentionProblem, AttentionShape};
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::layout::Layout;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::{CuSeqlens, VarlenMeta};

const BATCH: usize = 2;
const QUERIES: usize = 133;
const KEYS: usize = 645;
/// Keys in front of the first row that are all kept, as every query of it is.
const WHOLE_KEYS: usize = 300;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
/// One for each width that kernels are compiled for; the second is narrower than its own.
const HEAD_DIMS: [usize; 5] = [64, 88, 128, 192, 256];
const DTYPES: [DType; 2] = [DType::F16, DType::Bf16];
/// NaN in either type.
const POISON: u16 = 0x7fff;

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Dense,
    Packed,
    Fused,
}

/// A call of a form.
#[derive(Debug, Clone, Copy)]
struct Case {
    form: Form,
    dtype: DType,
    head_dim: usize,
}

/// Runs every case with both kernels.
///
/// # Errors
/// In words, what failed or differs first.
pub(crate) fn compare(device: &dyn Backend, kernel: Kernel, reference: Kernel) -> Result<(), String> {
    let in_words = |error: crate::Error| error.to_string();
    let mut bench = Bench::new(device, kernel.max_head_dim()).map_err(in_words)?;
    for dtype in DTYPES {
        for head_dim in HEAD_DIMS.into_iter().filter(|&head_dim| head_dim <= kernel.max_head_dim()) {
            bench.fill(dtype, head_dim).map_err(in_words)?;
            for form in [Form::Dense, Form::Packed, Form::Fused] {
                let case = Case { form, dtype, head_dim };
                let explain =
                    |kernel: Kernel, why: String| format!("{form:?} {dtype}, head_dim {head_dim}: {kernel} {why}");
                let mut run = |kernel, path| {
                    bench.run(case, kernel, path).map_err(|error| explain(kernel, format!("failed: {error}")))
                };
                // The oldest form of the reference: masks of a dense call do what metadata does.
                let expected = run(reference, if form == Form::Packed { Path::Packed } else { Path::Dense })?;
                let got = run(
                    kernel,
                    match form {
                        Form::Dense => Path::Dense,
                        Form::Packed => Path::Packed,
                        Form::Fused => Path::Fused,
                    },
                )?;
                bench.judge(case, &got, &expected).map_err(|why| explain(kernel, why))?;
            }
        }
    }
    Ok(())
}

/// Memory and masks of all cases.
struct Bench<'a> {
    device: &'a dyn Backend,
    q: Storage,
    k: Storage,
    v: Storage,
    out: Storage,
    query: VarlenMeta,
    key: VarlenMeta,
    packed: [CuSeqlens; 2],
}

impl<'a> Bench<'a> {
    fn new(device: &'a dyn Backend, max_head_dim: usize) -> Result<Self> {
        let alloc = |tokens: usize, heads: usize| device.alloc((2 * BATCH * tokens * heads * max_head_dim) as u64);
        let meta = |seq, rows: &[&[std::ops::Range<usize>]]| VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, rows)?);
        Ok(Self {
            device,
            q: alloc(QUERIES, HEADS)?,
            k: alloc(KEYS, KV_HEADS)?,
            v: alloc(KEYS, KV_HEADS)?,
            out: alloc(QUERIES, HEADS)?,
            query: meta(QUERIES, &[slice::from_ref(&(0..QUERIES)), &[0..7, 20..97, 131..QUERIES]])?,
            key: meta(KEYS, &[&[0..310, 313..314, 341..KEYS], &[5..134, 150..279, 290..291]])?,
            packed: [CuSeqlens::from_lengths(&[4, QUERIES - 4])?, CuSeqlens::from_lengths(&[171, WHOLE_KEYS - 171])?],
        })
    }

    /// Writes the inputs of a head dimension.
    fn fill(&mut self, dtype: DType, head_dim: usize) -> Result<()> {
        let values = values(dtype);
        for (stream, (memory, meta, heads)) in
            [(&mut self.q, &self.query, HEADS), (&mut self.k, &self.key, KV_HEADS), (&mut self.v, &self.key, KV_HEADS)]
                .into_iter()
                .enumerate()
        {
            let token = heads * head_dim;
            let mut bits = vec![POISON; BATCH * meta.seq() * token];
            for (at, row) in bits.chunks_exact_mut(token).enumerate() {
                if meta.key_mask().keeps(at / meta.seq(), at % meta.seq()) {
                    let first = (stream * values.len() / 3 + at * token) % (values.len() - token);
                    row.copy_from_slice(&values[first..][..token]);
                }
            }
            self.device.upload(memory.sink(), bytemuck::cast_slice(&bits))?;
        }
        Ok(())
    }

    /// The output of a call.
    fn run(&mut self, case: Case, kernel: Kernel, path: Path) -> Result<Vec<u16>> {
        let Case { form, dtype, head_dim } = case;
        let (batch, seq_k) = if form == Form::Fused { (BATCH, KEYS) } else { (1, WHOLE_KEYS) };
        let layout = |tokens, heads| match form {
            Form::Packed => Layout::contiguous(&[tokens, heads, head_dim]),
            _ => Layout::contiguous(&[batch, tokens, heads, head_dim]),
        };
        let (of_queries, of_keys) = (layout(QUERIES, HEADS)?, layout(seq_k, KV_HEADS)?);
        let mut bits = vec![POISON; of_queries.numel()];
        self.device.upload(self.out.sink(), bytemuck::cast_slice(&bits))?;
        let [query, key] = &self.packed;
        let rows = match (form, path) {
            (Form::Packed, _) => Rows::Packed { query, key },
            (Form::Fused, Path::Fused) => Rows::Varlen { query: &self.query, key: &self.key },
            (Form::Fused, _) => {
                let (key_mask, zero_rows) = (Some(self.key.key_mask()), Some(self.query.key_mask()));
                Rows::Dense { key_mask, bias: None, zero_rows }
            }
            (Form::Dense, _) => Rows::Dense { key_mask: None, bias: None, zero_rows: None },
        };
        let batch = if form == Form::Packed { query.batch() } else { batch };
        let problem = AttentionProblem {
            shape: AttentionShape { batch, seq_q: QUERIES, seq_k, num_heads: HEADS, num_kv_heads: KV_HEADS, head_dim },
            dtype,
            softmax_scale: 1.0 / (head_dim as f32).sqrt(),
            bias: None,
        };
        self.device.execute(Op::Attention(Attention {
            problem: &problem,
            plan: Plan { path, kernel, reason: Reason::PathForced },
            q: Input { memory: self.q.source(), layout: of_queries, dtype },
            k: Input { memory: self.k.source(), layout: of_keys, dtype },
            v: Input { memory: self.v.source(), layout: of_keys, dtype },
            out: Output { memory: self.out.sink(), layout: of_queries, dtype },
            lse: None,
            rows,
        }))?;
        self.device.download(self.out.source(), bytemuck::cast_slice_mut(&mut bits))?;
        Ok(bits)
    }

    /// Compares two outputs; in words, where they differ.
    fn judge(&self, case: Case, got: &[u16], expected: &[u16]) -> Result<(), String> {
        let token = HEADS * case.head_dim;
        // Both round probabilities and outputs to the element type, and sums of rounded probabilities may differ by an error of
        // each. The spacing of numbers from 1 to 2:
        let (spacing, widen): (f32, fn(u16) -> f32) = match case.dtype {
            DType::Bf16 => (1.0 / 128.0, |bits| bf16::from_bits(bits).to_f32()),
            _ => (1.0 / 1024.0, |bits| f16::from_bits(bits).to_f32()),
        };
        for (at, (&got, &expected)) in got.iter().zip(expected).enumerate() {
            let row = at / token;
            let is_kept = case.form != Form::Fused || self.query.key_mask().keeps(row / QUERIES, row % QUERIES);
            if !is_kept {
                if got != 0 {
                    return Err(format!("gives {} in the masked row {row}, expected 0", widen(got)));
                }
                continue;
            }
            let (got, expected) = (widen(got), widen(expected));
            let is_close = (got - expected).abs() <= spacing * (0.5 + 2.0 * expected.abs());
            // Nor is NaN.
            if !is_close {
                return Err(format!("gives {got} at element {at}, expected {expected}"));
            }
        }
        Ok(())
    }
}

/// Numbers with variance 1, so many that rows which begin at different places in them have nothing in common.
fn values(dtype: DType) -> Vec<u16> {
    const COUNT: u64 = 4099;
    let narrow: fn(f32) -> u16 = match dtype {
        DType::Bf16 => |value| bf16::from_f32(value).to_bits(),
        _ => |value| f16::from_f32(value).to_bits(),
    };
    let number = |at: u64| {
        // The mixing of Steele and others' SplitMix (2014); the sum of three uniform numbers in [-1, 1).
        let mut z = at.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let part = |shift: u32| (z >> shift & 0x1f_ffff) as f32 / 1_048_576.0 - 1.0;
        narrow(part(0) + part(21) + part(42))
    };
    (0..COUNT).map(number).collect()
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;
    use crate::backends::cpu::CpuDevice;
    use crate::cache::DeviceId;
    use crate::call::op::{Sink, Source, Timing};
    use crate::call::plan::Capabilities;
    use crate::error::Error;

    const KERNEL: Kernel = Kernel::CudaSm100;
    const REFERENCE: Kernel = Kernel::CudaSm80;

    /// What the kernel does instead of its work.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Lie {
        /// Its work.
        None,
        /// One more thing: the last element that it writes is another number.
        Element,
        /// One more thing: a masked row is not quite zero. Only in place.
        MaskedRow,
        /// Nothing, and nobody hears of it.
        Nothing,
        /// It fails.
        Failure,
        /// Another softmax scale.
        Scale,
    }

    /// The CPU device, which takes no notice of the kernel of a plan; but one of them lies in one case.
    #[derive(Debug)]
    struct Liar {
        honest: Arc<dyn Backend>,
        lie: Lie,
        case: Case,
    }

    impl Liar {
        fn tells(&self, attention: &Attention<'_>) -> bool {
            let form = match attention.plan.path {
                Path::Dense => Form::Dense,
                Path::Packed => Form::Packed,
                _ => Form::Fused,
            };
            let problem = attention.problem;
            attention.plan.kernel == KERNEL
                && (form, problem.dtype, problem.shape.head_dim)
                    == (self.case.form, self.case.dtype, self.case.head_dim)
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
                Lie::None | Lie::Element | Lie::MaskedRow => {}
            }
            let Output { memory: Sink::Host(bytes), layout, dtype } = attention.out else { unreachable!() };
            let out = Output { memory: Sink::Host(&mut *bytes), layout, dtype };
            self.honest.execute(Op::Attention(Attention { problem: &problem, out, ..attention }))?;
            let bits: &mut [u16] = bytemuck::cast_slice_mut(&mut bytes[..2 * layout.numel()]);
            match self.lie {
                // An eighth, which is no mean of so many numbers but by chance.
                Lie::Element => bits[layout.numel() - 1] = if dtype == DType::Bf16 { 0x3e00 } else { 0x3000 },
                // Row 10 of the second batch row.
                Lie::MaskedRow => bits[(QUERIES + 10) * HEADS * problem.shape.head_dim] = 1,
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

    fn outcome(lie: Lie, case: Case) -> Result<(), String> {
        compare(&Liar { honest: CpuDevice::shared(), lie, case }, KERNEL, REFERENCE)
    }

    #[test]
    fn an_honest_kernel_passes_at_every_width() {
        let case = Case { form: Form::Fused, dtype: DType::F16, head_dim: 64 };
        assert_eq!(outcome(Lie::None, case), Ok(()));
        // As wide as kernels are.
        assert_eq!(compare(&*CpuDevice::shared(), Kernel::CudaSm90, REFERENCE), Ok(()));
    }

    #[test]
    fn a_lie_in_any_case_is_noticed_and_located() {
        let widths = HEAD_DIMS.into_iter().filter(|&head_dim| head_dim <= KERNEL.max_head_dim());
        assert_eq!(widths.clone().count(), 3);
        for form in [Form::Dense, Form::Packed, Form::Fused] {
            for dtype in DTYPES {
                for head_dim in widths.clone() {
                    let case = Case { form, dtype, head_dim };
                    let said = outcome(Lie::Element, case);
                    let expected = format!("{form:?} {dtype}, head_dim {head_dim}: sm100 gives ");
                    assert!(said.as_ref().is_err_and(|said| said.starts_with(&expected)), "{case:?}: {said:?}");
                }
            }
        }
    }

    #[test]
    fn every_kind_of_lie_is_noticed() {
        let case = Case { form: Form::Fused, dtype: DType::Bf16, head_dim: 88 };
        for (lie, expected) in [
            (Lie::MaskedRow, "in the masked row 143, expected 0"),
            (Lie::Nothing, "sm100 gives NaN"),
            (Lie::Failure, "sm100 failed: `q`: head_dim must"),
            (Lie::Scale, "sm100 gives "),
        ] {
            let said = outcome(lie, case);
            assert!(said.as_ref().is_err_and(|said| said.contains(expected)), "{lie:?}: {said:?}");
        }
    }
}
