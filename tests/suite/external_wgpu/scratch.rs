//! Scratch of calls: kept from one to the next, given back when asked, and never read before it is written.

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::Completion;
use varlen_fa::wgpu;
use varlen_fa::{
    AttentionMask, AttentionOutputs, Config, DType, Device, KeyMask, Layout, MaskedAttention, Path, Plan, Tensor,
    TensorView, VarlenMeta,
};
use varlen_fa_testkit::random;

use super::super::memory::{download, narrow, sentinel, upload};
use super::super::trials::Trials;
use super::application::{Application, portable};

pub fn register(trials: &mut Trials) {
    trials.once("external_wgpu/scratch/is_kept", is_kept);
    trials.once("external_wgpu/scratch/is_written_before_it_is_read", is_written_before_it_is_read);
    trials.once("external_wgpu/scratch/of_two_threads", of_two_threads);
}

const HEADS: usize = 2;
const DIM: usize = 32;
const DTYPE: DType = DType::F16;
/// Lengths of segments of a call that needs much scratch, and of one that needs little.
const LARGE: [usize; 3] = [65, 16, 119];
const SMALL: [usize; 3] = [15, 1, 17];

/// Self-attention over segments, some rows of which do not start at words: every tensor may be copied.
struct Segmented {
    inputs: [Vec<Tensor>; 3],
    out: Vec<Tensor>,
    meta: VarlenMeta,
    layer: MaskedAttention,
}

impl Segmented {
    /// With NaN for all numbers if `is_poison`.
    fn new(layer: &MaskedAttention, lengths: &[usize], seed: u64, is_poison: bool) -> Result<Self> {
        let device = layer.device();
        let seq: usize = lengths.iter().sum();
        let keep = random::bernoulli_mask(seed, 2 * seq, 0.8)?;
        let tensor = |number: u64, seq: usize, is_output: bool| {
            let values = random::normal_stream(seed, number, 2 * seq * HEADS * DIM + 1);
            let bits: Vec<u32> = values
                .into_iter()
                .map(|value| match (is_output, is_poison) {
                    (true, _) => sentinel(DTYPE),
                    (_, true) => narrow(f32::NAN, DTYPE),
                    (_, false) => narrow(value, DTYPE),
                })
                .collect();
            upload(device, DTYPE, &bits, &[bits.len()])
        };
        let cut = |which: u64, is_output: bool| {
            let of = |(index, &seq): (usize, &usize)| tensor(10 * which + index as u64, seq, is_output);
            lengths.iter().enumerate().map(of).collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            inputs: [cut(0, false)?, cut(1, false)?, cut(2, false)?],
            out: cut(3, true)?,
            meta: VarlenMeta::from_key_mask(&KeyMask::from_bool(2, seq, &keep)?)?,
            layer: layer.clone(),
        })
    }

    /// The layout in a tensor of as many elements and one; `first` elements lie before.
    fn layout(tensor: &Tensor, first: u64) -> Result<Layout> {
        let seq = (tensor.shape()[0] - 1) / (2 * HEADS * DIM);
        let contiguous = Layout::contiguous(&[2, seq, HEADS, DIM])?;
        Ok(Layout::strided(contiguous.shape(), contiguous.strides(), first)?)
    }

    /// The inputs; the second segment of each starts inside of a word.
    fn views(&self) -> Result<[Vec<TensorView<'_>>; 3]> {
        let [q, k, v] = self.inputs.each_ref().map(|tensors| {
            let mut views = Vec::new();
            for (at, tensor) in tensors.iter().enumerate() {
                views.push(tensor.view().with_layout(Self::layout(tensor, u64::from(at == 1))?));
            }
            anyhow::Ok(views)
        });
        Ok([q?, k?, v?])
    }

    /// Runs or records the call.
    fn call(
        &mut self,
        run: impl FnOnce(
            &MaskedAttention,
            [Vec<TensorView<'_>>; 3],
            AttentionMask<'_>,
            AttentionOutputs<'_>,
        ) -> varlen_fa::Result<Plan>,
    ) -> Result<()> {
        let mut out = std::mem::take(&mut self.out);
        {
            let views = out.iter_mut().map(|tensor| {
                let layout = Self::layout(tensor, 0)?;
                Ok(tensor.view_mut().with_layout(layout))
            });
            let outputs = AttentionOutputs::new(views.collect::<Result<Vec<_>>>()?);
            run(&self.layer, self.views()?, AttentionMask::varlen(&self.meta), outputs)?;
        }
        self.out = out;
        Ok(())
    }

    fn record(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        self.call(|layer, [q, k, v], mask, out| layer.encode_into(encoder, q, k, v, mask, out))
    }

    fn launch(&mut self) -> Result<()> {
        self.call(|layer, [q, k, v], mask, out| layer.forward_into(q, k, v, mask, out))
    }

    fn output(&self) -> Result<Vec<Vec<u32>>> {
        self.out.iter().map(download).collect()
    }

    /// What the call gives on a device whose scratch is new.
    fn expected(&mut self) -> Result<Vec<Vec<u32>>> {
        self.layer.device().release_scratch()?;
        self.launch()?;
        let output = self.output()?;
        let is_number = |bits: &u32| *bits != sentinel(DTYPE) && *bits != 0;
        ensure!(output.iter().flatten().any(is_number), "no number in the output: nothing is tested");
        Ok(output)
    }
}

/// Buffers of scratch that exist, by wgpu's own report. None if the backend makes no report.
fn scratch_buffers(application: &Application) -> Result<Option<usize>> {
    application.device.poll(wgpu::PollType::wait_indefinitely())?;
    let report = application.device.generate_allocator_report();
    Ok(report.map(|report| report.allocations.iter().filter(|allocation| allocation.name == "scratch").count()))
}

/// Calls that are recorded and not yet submitted have as many buffers as the first of them; so have calls that are submitted.
/// Work that is cut into parts needs no more.
fn is_kept(own: &Device) -> Result<Completion> {
    for (operations, path) in [(None, None), (Some(1), None), (None, Some(Path::Packed))] {
        let application = Application::new(own)?;
        if scratch_buffers(&application)?.is_none() {
            return Ok(Completion::ignored_with("wgpu reports no allocations of this backend"));
        }
        let count = || scratch_buffers(&application)?.context("a report, as before");
        let config = Config::default();
        let config = operations.map_or(config, |operations| config.with_max_dispatch_operations(operations));
        let device = application.attach_with(config)?;
        let mut layer = portable(&device);
        if let Some(path) = path {
            layer = layer.with_path(path);
        }
        let (mut large, mut small) =
            (Segmented::new(&layer, &LARGE, 1, false)?, Segmented::new(&layer, &SMALL, 2, false)?);
        device.synchronize()?;
        device.release_scratch()?;
        ensure!(count()? == 0, "{} buffers after all was given back", count()?);
        let mut recorded = Vec::new();
        let mut record = |call: &mut Segmented| {
            let mut encoder = application.encoder();
            call.record(&mut encoder)?;
            recorded.push(encoder.finish());
            anyhow::Ok(())
        };
        record(&mut large)?;
        let first = count()?;
        ensure!(first > 0, "the call needs no scratch: nothing is tested");
        for _ in 0..5 {
            record(&mut small)?;
            record(&mut large)?;
        }
        ensure!(count()? == first, "{} buffers after the first call, {} after 11", first, count()?);
        application.queue.submit(recorded.drain(..));
        large.launch()?;
        let submitted = count()?;
        for _ in 0..5 {
            small.launch()?;
            large.launch()?;
        }
        ensure!(count()? == submitted, "{} buffers after the first submission, {} after 11", submitted, count()?);
        // Those of recordings and those of submissions, which other work may come between.
        ensure!(submitted <= 2 * first, "{first} buffers of recordings, {submitted} with those of submissions");
        device.release_scratch()?;
        ensure!(count()? == 0, "{} buffers after all was given back", count()?);
        application.expect_quiet()?;
    }
    Ok(Completion::Completed)
}

/// Calls of other sizes have filled the scratch with NaN, in whatever order commands are recorded and submitted.
fn is_written_before_it_is_read(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    for operations in [None, Some(1)] {
        let config = Config::default();
        let config = operations.map_or(config, |operations| config.with_max_dispatch_operations(operations));
        let device = application.attach_with(config)?;
        for path in [Path::Fused, Path::Packed, Path::Dense] {
            let layer = portable(&device).with_path(path);
            let mut calls = [Segmented::new(&layer, &SMALL, 3, false)?, Segmented::new(&layer, &LARGE, 4, false)?];
            let expected = [calls[0].expected()?, calls[1].expected()?];
            let mut poison = [Segmented::new(&layer, &LARGE, 5, true)?, Segmented::new(&layer, &SMALL, 6, true)?];
            for first in [0, 1] {
                // By launches.
                poison[first].launch()?;
                calls[first].launch()?;
                ensure!(calls[first].output()? == expected[first], "{path}, launched: other bits");
                // Recorded: poison, a call, poison, another call; submitted in any order.
                let mut recorded = Vec::new();
                for at in [first, 1 - first] {
                    for call in [&mut poison[at], &mut calls[at]] {
                        let mut encoder = application.encoder();
                        call.record(&mut encoder)?;
                        recorded.push(encoder.finish());
                    }
                }
                let mut recorded: Vec<_> = recorded.into_iter().map(Some).collect();
                for at in [2, 1, 0, 3] {
                    application.queue.submit(recorded[at].take());
                    // Launches come between.
                    poison[first].launch()?;
                }
                for (call, expected) in calls.iter().zip(&expected) {
                    ensure!(call.output()? == *expected, "{path}, recorded: other bits");
                }
            }
        }
    }
    application.expect_quiet()
}

/// Two threads record and launch, and submit in an order that is not theirs.
fn of_two_threads(own: &Device) -> Result<()> {
    let application = Application::new(own)?;
    let device = application.attach_with(Config::default().with_max_dispatch_operations(1 << 20))?;
    let layer = portable(&device);
    let run = |seed: u64| -> Result<()> {
        for round in 0..4 {
            let (lengths, others) = if (round + seed).is_multiple_of(2) { (SMALL, LARGE) } else { (LARGE, SMALL) };
            let mut call = Segmented::new(&layer, &lengths, 10 * seed + round, false)?;
            let mut poison = Segmented::new(&layer, &others, 10 * seed + round, true)?;
            call.launch()?;
            let expected = call.output()?;
            let mut commands = Vec::new();
            for call in [&mut call, &mut poison] {
                let mut encoder = application.encoder();
                call.record(&mut encoder)?;
                commands.push(encoder.finish());
            }
            while let Some(commands) = commands.pop() {
                poison.launch()?;
                application.queue.submit([commands]);
            }
            ensure!(call.output()? == expected, "thread {seed}, round {round}: other bits");
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads = [1, 2].map(|seed| scope.spawn(move || run(seed)));
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    })?;
    application.expect_quiet()
}
