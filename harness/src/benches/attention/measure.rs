//! The measured calls of one workload.

use std::time::Duration;

use anyhow::Result;
use rayon::prelude::*;
use varlen_fa::{
    AttentionMask, Device, Element, Kernel, KeyMask, MaskedAttention, Path, Plan, Tensor, VarlenMeta, VarlenOptions,
    pack_qkv, scatter_to_padded, varlen_attention,
};
use varlen_fa_testkit::oracle::Modifiers;
use varlen_fa_testkit::{CompareError, Value, check_masked_rows_zero};

use crate::arguments::Problem;
use crate::check::{Comparison, Queries, compare};
use crate::progress::Progress;
use crate::random::standard_normal;
use crate::times::Times;

/// Input sets are rotated until they take this much memory, more than any last-level cache holds.
const ROTATED_BYTES: u64 = 256 << 20;

/// The most calls of one sample.
const MAX_CALLS: u64 = 64;

/// How often calls are repeated.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// Samples of each row of the table.
    pub samples: usize,
    /// Calls before them.
    pub warmup: usize,
    /// Calls that take less are repeated within a sample: one alone would show the cost of launching and waiting.
    sample_time: Duration,
    /// The most input sets that calls rotate among.
    max_sets: u64,
}

impl Schedule {
    pub fn smoke() -> Self {
        Self { samples: 1, warmup: 1, sample_time: Duration::ZERO, max_sets: 2 }
    }

    /// One input set: what a CPU leaves in its caches is what the next layer of a model would find there.
    pub fn software() -> Self {
        Self { samples: 5, warmup: 1, sample_time: Duration::from_millis(20), max_sets: 1 }
    }

    pub fn hardware() -> Self {
        Self { samples: 20, warmup: 5, sample_time: Duration::from_millis(5), max_sets: 16 }
    }
}

/// What a row of the table times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// Attention under the key mask.
    Dense,
    /// Attention with metadata, on the path that the device plans.
    Varlen,
    /// The same on a path that it does not plan.
    Forced(Path),
    /// `pack_qkv`.
    Pack,
    /// `varlen_attention` on packed rows.
    PackedAttention,
    /// `scatter_to_padded`.
    Scatter,
}

impl Row {
    /// How the table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense, key mask",
            Self::Varlen => "varlen",
            Self::Forced(Path::Fused) => "varlen, fused forced",
            Self::Forced(Path::Packed) => "varlen, packed forced",
            Self::Forced(_) => "varlen, path forced",
            Self::Pack => "pack_qkv",
            Self::PackedAttention => "varlen_attention",
            Self::Scatter => "scatter_to_padded",
        }
    }
}

/// What a call has to do at least.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// Floating-point operations on valid pairs of query and key.
    Operations(f64),
    /// Bytes read and written.
    Bytes(f64),
}

/// One row of the table.
#[derive(Debug)]
pub struct Timed {
    pub row: Row,
    pub times: Times,
    pub by_device: bool,
    work: Work,
}

impl Timed {
    /// TFLOP/s of the median, for attention.
    pub fn tflops(&self) -> Option<f64> {
        match self.work {
            Work::Operations(operations) => self.rate(operations / 1e12),
            Work::Bytes(_) => None,
        }
    }

    /// GB/s of the median, for copies.
    pub fn gbs(&self) -> Option<f64> {
        match self.work {
            Work::Operations(_) => None,
            Work::Bytes(bytes) => self.rate(bytes / 1e9),
        }
    }

    /// None where the work is too quick for the clock.
    fn rate(&self, amount: f64) -> Option<f64> {
        Some(amount / self.times.median.as_secs_f64()).filter(|rate| rate.is_finite())
    }
}

/// All of one workload.
#[derive(Debug)]
pub struct Measured {
    /// The plan of [`Row::Varlen`].
    pub plan: Plan,
    pub rows: Vec<Timed>,
    /// Input sets that calls rotated among.
    pub sets: usize,
    /// The output of [`Row::Varlen`] against the oracle's.
    pub varlen: Comparison,
    /// The output of [`Row::Dense`] against the oracle's.
    pub dense: Comparison,
    /// Whether the masked rows of [`Row::Varlen`] are exactly zero.
    pub masked_rows: Result<(), CompareError>,
}

impl Measured {
    /// The row, if it was measured.
    pub fn find(&self, row: Row) -> Option<&Timed> {
        self.rows.iter().find(|timed| timed.row == row)
    }

    /// What is wrong with the outputs.
    pub fn failures(&self) -> impl Iterator<Item = String> {
        let rows = self.masked_rows.as_ref().err().map(ToString::to_string);
        [self.dense.failure.clone(), self.varlen.failure.clone(), rows].into_iter().flatten()
    }

    /// The row of a path, planned or forced.
    pub fn path(&self, path: Path) -> Option<&Timed> {
        self.find(if self.plan.path == path { Row::Varlen } else { Row::Forced(path) })
    }
}

/// Measures one workload.
pub fn run<T: Element + Value>(
    device: &Device,
    problem: &Problem,
    kernel: Option<Kernel>,
    schedule: &Schedule,
) -> Result<Measured> {
    let workload = &problem.workload;
    let mask = KeyMask::from_bool(workload.batch, workload.seq, &workload.mask)?;
    let meta = VarlenMeta::from_key_mask(&mask)?;
    let (dense, varlen) = (AttentionMask::key(&mask), AttentionMask::varlen(&meta));
    let mut attention = MaskedAttention::new(device);
    let mut options = VarlenOptions::default();
    if let Some(kernel) = kernel {
        attention = attention.with_kernel(kernel);
        options = options.with_kernel(kernel);
    }

    // A call on zeros comes first: what does not fit is refused before anything takes long.
    let shapes = [problem.shape(), problem.kv_shape(), problem.kv_shape()];
    let mut first = InputSet::zeros::<T>(device, shapes)?;
    let plan = first.attend(&attention, varlen)?;
    let host: [Vec<T>; 3] = [0, 1, 2].map(|index| random_values(index as u64, shapes[index].iter().product()));
    first.write(&host)?;
    // The path that reads every key, whatever the plan would be under a key mask.
    let every_row = attention.clone().with_path(Path::Dense);
    let (dense_comparison, _) = check(&every_row, problem, (dense, Queries::All), &mut first, &host)?;
    let (varlen_comparison, out) = check(&attention, problem, (varlen, Queries::Valid), &mut first, &host)?;
    let masked_rows = check_masked_rows_zero("varlen", problem.shape(), &out, &workload.mask);
    drop(out);

    let [q_bytes, kv_bytes, _] = shapes.map(|shape| (shape.iter().product::<usize>() * size_of::<T>()) as u64);
    let set_count = ROTATED_BYTES.div_ceil((2 * q_bytes + 2 * kv_bytes).max(1)).clamp(1, schedule.max_sets);
    let mut sets = vec![first];
    for _ in 1..set_count {
        let mut set = InputSet::zeros::<T>(device, shapes)?;
        set.write(&host)?;
        sets.push(set);
    }
    drop(host);

    let operations = Work::Operations(workload.attention_flops(problem.heads, problem.head_dim));
    let forced: Vec<Path> =
        [Path::Fused, Path::Packed].into_iter().filter(|&path| path != plan.path && !meta.is_empty()).collect();
    let primitives = if meta.is_empty() { 0 } else { 3 };
    let progress = Progress::new(2 + forced.len() + primitives);
    let mut timer = Timer { device, schedule, progress, set_count: sets.len(), rows: Vec::new() };

    timer.time(Row::Dense, operations, 0, |set| sets[set].attend(&every_row, dense))?;
    timer.time(Row::Varlen, operations, 0, |set| sets[set].attend(&attention, varlen))?;
    for path in forced {
        let attention = attention.clone().with_path(path);
        timer.time(Row::Forced(path), operations, 0, |set| sets[set].attend(&attention, varlen))?;
    }
    if !meta.is_empty() {
        let valid = meta.total_valid() as u64;
        let tokens = workload.mask.len() as u64;
        let packed_q = q_bytes / tokens * valid;
        let packed_qkv = packed_q + 2 * (kv_bytes / tokens * valid);
        timer.time(Row::Pack, Work::Bytes(2.0 * packed_qkv as f64), packed_qkv, |set| {
            let [q, k, v] = &sets[set].qkv;
            pack_qkv(device, q, k, v, &meta)
        })?;
        let pack = |InputSet { qkv: [q, k, v], .. }: &InputSet| pack_qkv(device, q, k, v, &meta);
        let packed = sets.iter().map(pack).collect::<Result<Vec<_>, _>>()?;
        timer.time(Row::PackedAttention, operations, packed_q, |set| {
            varlen_attention(device, packed[set].each_ref(), meta.cu_seqlens(), meta.cu_seqlens(), options)
        })?;
        // What is scattered does not matter to the time: packed queries have the output's shape.
        timer.time(Row::Scatter, Work::Bytes((packed_q + q_bytes) as f64), q_bytes, |set| {
            scatter_to_padded(device, &packed[set][0], &meta)
        })?;
    }
    let (varlen, dense) = (varlen_comparison, dense_comparison);
    Ok(Measured { plan, rows: timer.rows, sets: sets.len(), varlen, dense, masked_rows })
}

/// Device memory of one call.
struct InputSet {
    qkv: [Tensor; 3],
    out: Tensor,
}

impl InputSet {
    fn zeros<T: Element>(device: &Device, shapes: [[usize; 4]; 3]) -> Result<Self> {
        let zeros = |shape: &[usize; 4]| Tensor::zeros(device, T::DTYPE, shape);
        let [q, k, v] = &shapes;
        Ok(Self { qkv: [zeros(q)?, zeros(k)?, zeros(v)?], out: zeros(q)? })
    }

    fn write<T: Element>(&mut self, host: &[Vec<T>; 3]) -> varlen_fa::Result<()> {
        self.qkv.iter_mut().zip(host).try_for_each(|(tensor, values)| tensor.write(values))
    }

    fn attend(&mut self, attention: &MaskedAttention, mask: AttentionMask<'_>) -> varlen_fa::Result<Plan> {
        let [q, k, v] = &self.qkv;
        attention.forward_into(q, k, v, mask, &mut self.out)
    }
}

/// Compares the output of one call with the oracle's; gives the output too.
fn check<T: Element + Value>(
    attention: &MaskedAttention,
    problem: &Problem,
    (mask, queries): (AttentionMask<'_>, Queries),
    set: &mut InputSet,
    host: &[Vec<T>; 3],
) -> Result<(Comparison, Vec<T>)> {
    // What the call leaves unwritten stays NaN and fails.
    set.out.write(&vec![T::from_f32(f32::NAN); problem.shape().iter().product()])?;
    set.attend(attention, mask)?;
    let out = set.out.to_vec::<T>()?;
    let [q, k, v] = host.each_ref().map(|values| values.par_iter().map(|value| value.to_f32()).collect::<Vec<_>>());
    Ok((compare(problem, [&q, &k, &v], (queries, None, Modifiers::default()), &out, 0)?, out))
}

fn random_values<T: Element>(seed: u64, len: usize) -> Vec<T> {
    standard_normal(seed, len).into_par_iter().map(T::from_f32).collect()
}

/// Times calls by a schedule.
struct Timer<'a> {
    device: &'a Device,
    schedule: &'a Schedule,
    progress: Progress,
    set_count: usize,
    rows: Vec<Timed>,
}

impl Timer<'_> {
    /// Times `call`, which is given the input set to use. It makes new tensors of `allocated` bytes.
    fn time<R>(
        &mut self,
        row: Row,
        work: Work,
        allocated: u64,
        mut call: impl FnMut(usize) -> varlen_fa::Result<R>,
    ) -> Result<()> {
        self.progress.begin(row.name());
        let mut sets = (0..self.set_count).cycle();
        let mut calls = |count: u64| {
            self.device.time(|| {
                let sets = sets.by_ref().take(count as usize);
                sets.map(&mut call).try_for_each(|made| made.map(drop))
            })
        };
        let mut once = Duration::ZERO;
        for _ in 0..self.schedule.warmup {
            once = calls(1)?.1.duration;
        }
        // Memory that a call allocates may come back only when the whole sample is done.
        let most = MAX_CALLS.min(ROTATED_BYTES / allocated.max(1)).max(1);
        let wanted = self.schedule.sample_time.as_nanos() / once.as_nanos().max(1);
        let count = if self.schedule.warmup == 0 { 1 } else { (wanted as u64).clamp(1, most) };

        let (mut samples, mut by_device) = (Vec::with_capacity(self.schedule.samples), false);
        for _ in 0..self.schedule.samples {
            let ((), timing) = calls(count)?;
            samples.push(timing.duration.div_f64(count as f64));
            by_device = timing.by_device;
        }
        self.progress.end();
        self.rows.push(Timed { row, times: Times::of(samples), by_device, work });
        Ok(())
    }
}
