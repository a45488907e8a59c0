//! The layer: [`SequenceParallel`].

use super::call::ParallelCall;
use super::communicator::Communicator;
use super::digest::{Digest, Tag};
use super::gather::Gather;
use super::kept::{Kept, Room};
use super::local::{Local, LocalMut, places};
use super::mode::{Heads, Mode, Outer};
use super::needs::ParallelNeeds;
use super::plan::{Machine, ParallelPlan};
use super::request::{AmongGroups, ParallelRequest};
use super::ring::Ring;
use super::scores::OnScores;
use super::sharded_meta::ShardedMeta;
use super::transfer::{Steps, copy_rows};
use super::ulysses::Group;
use crate::attention::MaskedAttention;
use crate::attention_outputs::AttentionOutputs;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernel::{BackendKind, Kernel};
use crate::primitives::VarlenOptions;
use crate::tensor::{Segments, Tensor, TensorViewMut};

/// Masked self-attention over a sequence that is divided among ranks.
///
/// Once a request every rank makes a [`ShardedMeta`] and calls [`prepare`](Self::prepare). Then every rank calls
/// [`forward`](Self::forward) in each layer and step, in the same order, with its local tensors `[B, prefix + shard + suffix, H, D]`.
/// The rows of masked tokens come out as exactly +0.0, and only valid rows travel. Prefix and suffix must hold the same on every rank;
/// their keys count once, and every rank has their output.
///
/// With [`Mode::Gather`] and [`Mode::Ulysses`] the CPU device gives the bits of one device where no ranges are given; with ranges, and in
/// a ring, sums are of other blocks, and the last bits may differ.
///
/// ```
/// use std::thread;
/// use varlen_fa::dist::{Communicator, Heads, HostCommunicator, SequenceParallel, ShardedMeta, Shards};
/// use varlen_fa::{DType, Device, DeviceChoice, KeyMask, Result, Tensor};
///
/// let mask = KeyMask::from_lengths(10, &[9])?;
/// let shards = Shards::equal(10, 2)?;
/// let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 8, dtype: DType::F32 };
/// let rank = |mut communicator: HostCommunicator| -> Result<Vec<f32>> {
///     let device = Device::new(DeviceChoice::Cpu)?;
///     // Once a request.
///     let meta = ShardedMeta::new(&mask, &shards, communicator.rank())?;
///     let parallel = SequenceParallel::new(&device);
///     let request = parallel.prepare(&mut communicator, &meta, &heads)?;
///     // In every layer and step.
///     let q = Tensor::from_slice(&device, &vec![0.5_f32; 5 * 4 * 8], &[1, 5, 4, 8])?;
///     let k = Tensor::from_slice(&device, &vec![0.5_f32; 5 * 2 * 8], &[1, 5, 2, 8])?;
///     parallel.forward(&mut communicator, &request, &q, &k, &k)?.to_vec()
/// };
/// let outputs: Vec<Vec<f32>> = thread::scope(|scope| {
///     let ranks: Vec<_> = HostCommunicator::threads(2)?.into_iter().map(|rank_of| scope.spawn(|| rank(rank_of))).collect();
///     ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect::<Result<_>>()
/// })?;
/// assert!((outputs[1][0] - 0.5).abs() < 1e-6);
/// assert!(outputs[1][4 * 4 * 8..].iter().all(|&masked| masked == 0.0));
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SequenceParallel {
    device: Device,
    softmax_scale: Option<f32>,
    kernel: Option<Kernel>,
    needs: ParallelNeeds,
    mode: Option<Mode>,
    chunks: Option<usize>,
    machine: Machine,
}

impl SequenceParallel {
    /// A layer on this rank's device, with `softmax_scale` 1/√D. The plan is for [`Machine::H100`] on CUDA devices, and for
    /// [`Machine::CPU`] on others.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        let machine = match device.capabilities().backend {
            BackendKind::Cuda => Machine::H100,
            _ => Machine::CPU,
        };
        let (device, needs) = (device.clone(), ParallelNeeds::new());
        Self { device, softmax_scale: None, kernel: None, needs, mode: None, chunks: None, machine }
    }

    /// The factor on `q·kᵀ` before the softmax; any finite number, the same on every rank.
    #[must_use]
    pub fn with_softmax_scale(mut self, softmax_scale: f32) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// Runs this kernel whatever the plan would be; for tests and comparisons.
    #[must_use]
    pub fn with_kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// What calls carry beside `q`, `k` and `v`, the same on every rank: the plan takes a mode that computes it. A call may carry
    /// anything else that the mode computes, too.
    #[must_use]
    pub fn with_needs(mut self, needs: ParallelNeeds) -> Self {
        self.needs = needs;
        self
    }

    /// Takes this mode whatever the plan would be; the same on every rank.
    #[must_use]
    pub fn with_mode(mut self, mode: Mode) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Computes the heads of each rank in so many chunks, whatever the plan would be; the same on every rank. A ring does not look
    /// at it.
    #[must_use]
    pub fn with_chunks(mut self, chunks: usize) -> Self {
        self.chunks = Some(chunks);
        self
    }

    /// What the plan knows of devices and links; the same on every rank.
    #[must_use]
    pub fn with_machine(mut self, machine: Machine) -> Self {
        self.machine = machine;
        self
    }

    /// What the plan knows of devices and links.
    #[must_use]
    pub fn machine(&self) -> Machine {
        self.machine
    }

    /// Chooses a mode, makes the metadata of its steps, and checks that all ranks were given the same: 16 bytes of each go round.
    /// Every rank calls it once a request.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] on every rank if masks, shards, heads, ranges, needs, modes or scales differ; [`Error::Sharding`] if the metadata is of
    /// another rank or world; those of [`ParallelPlan::new`] and [`Communicator::exchange`]. The communicator takes no more calls
    /// afterwards, on any rank.
    pub fn prepare(
        &self,
        communicator: &mut dyn Communicator,
        meta: &ShardedMeta,
        heads: &Heads,
    ) -> Result<ParallelRequest> {
        let prepared = self.prepare_unguarded(communicator, meta, heads);
        prepared.inspect_err(|why| communicator.abort(&why.to_string()))
    }

    fn prepare_unguarded(
        &self,
        communicator: &mut dyn Communicator,
        meta: &ShardedMeta,
        heads: &Heads,
    ) -> Result<ParallelRequest> {
        let expected = (communicator.rank(), communicator.world_size());
        let got = (meta.rank(), meta.shards().ranks());
        if expected != got {
            let name = |(rank, world)| format!("metadata of rank {rank} of {world}");
            return Err(Error::Sharding { argument: "meta", expected: name(expected), got: name(got) });
        }
        let mut plan = ParallelPlan::new(meta, heads, self.needs, &self.machine, self.mode)?;
        let (ulysses, outer) = plan.mode.levels(meta.shards().ranks());
        if let (Some(chunks), Outer::Gather) = (self.chunks, outer) {
            if let Some(why) = heads.chunks_refusal(ulysses, chunks) {
                return Err(Error::NotApplicable { argument: "chunks", got: chunks.to_string(), why });
            }
            plan.chunks = chunks;
        }
        let tag = self.agree(communicator, meta, heads, &plan)?;

        let (group, at) = (meta.rank() / ulysses, meta.rank() % ulysses);
        let groups: Vec<_> =
            (0..meta.shards().ranks() / ulysses).map(|group| group * ulysses..(group + 1) * ulysses).collect();
        let among_groups = match outer {
            Outer::Gather => AmongGroups::Gather(Gather::new(meta, &groups, (group, at), (heads, plan.chunks))?),
            Outer::Ring => AmongGroups::Ring(Ring::new(meta, &groups, (group, at), heads)?),
        };
        let shards = meta.shards();
        Ok(ParallelRequest {
            group_lengths: [shards.prefix(), shards.shards_of(&groups[group]).len(), shards.suffix()],
            group: if ulysses > 1 {
                Some(Group::new(meta, groups[group].clone(), (heads, plan.chunks))?)
            } else {
                None
            },
            among_groups,
            plan,
            heads: *heads,
            meta: meta.clone(),
            tag,
            kept: Kept::default(),
        })
    }

    /// Checks that all ranks were given the same, by four bytes for each kind of thing that may differ. Gives a digest of all of it.
    fn agree(
        &self,
        communicator: &mut dyn Communicator,
        meta: &ShardedMeta,
        heads: &Heads,
        plan: &ParallelPlan,
    ) -> Result<Tag> {
        const OPERATION: &str = "agreeing on a request";
        let (rank, shards) = (meta.rank(), meta.shards());
        let of_shards = || Digest::new().sizes([shards.prefix(), shards.suffix()]).sizes(shards.lengths());
        let Heads { num_heads, num_kv_heads, head_dim, dtype } = *heads;
        let of_heads = || Digest::new().sizes([num_heads, num_kv_heads, head_dim]).bytes(dtype.name().as_bytes());
        let scale = self.softmax_scale.map(f32::to_bits).map_or([0; 5], |bits| {
            let [a, b, c, d] = bits.to_le_bytes();
            [1, a, b, c, d]
        });
        let of_settings = || {
            let digest = Digest::new().bytes(plan.mode.to_string().as_bytes()).sizes([plan.chunks]).bytes(&scale);
            self.needs.digest(digest)
        };
        // The order in which a reader would look: shards that differ make masks differ too.
        let kinds = [
            ("shards", of_shards().tag()),
            ("heads or element types", of_heads().tag()),
            ("masks or key ranges", meta.digest(Digest::new()).tag()),
            ("modes or settings", of_settings().tag()),
        ];
        let mut own = [0; 16];
        for (word, (_, tag)) in own.chunks_exact_mut(4).zip(&kinds) {
            word.copy_from_slice(&tag[..4]);
        }
        let all = communicator.all_gather_16(OPERATION, own)?;
        for (other, theirs) in all.iter().enumerate() {
            let differs = own.chunks_exact(4).zip(theirs.chunks_exact(4)).position(|(own, theirs)| own != theirs);
            if let Some(kind) = differs {
                let what = kinds[kind].0.to_owned();
                return Err(Error::RanksDiffer { operation: OPERATION, own_rank: rank, rank: other, what });
            }
        }
        Ok(kinds.iter().fold(Digest::new(), |digest, (_, tag)| digest.bytes(tag)).tag())
    }

    /// Attention into a new `[B, prefix + shard + suffix, H, D]` tensor. `q`, `k` and `v` are this rank's: `[B, prefix + shard + suffix, …]`
    /// with H and Hkv heads; each one tensor, or [`Segments`] that meet where prefix, shard and suffix do, such as text and image. Every
    /// rank calls it. `call` is a request, or a [`ParallelCall`] with a bias or modifiers beside.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::DTypeMismatch`] for tensors that do not fit the request; [`Error::NotApplicable`] for what its mode
    /// cannot compute; those of [`MaskedAttention::forward`] and [`Communicator::exchange`]. The communicator takes no more calls
    /// afterwards, on any rank: the others get an error too, within its time-out.
    pub fn forward<'a>(
        &self,
        communicator: &mut dyn Communicator,
        call: impl Into<ParallelCall<'a>>,
        q: impl Into<Segments<'a>>,
        k: impl Into<Segments<'a>>,
        v: impl Into<Segments<'a>>,
    ) -> Result<Tensor> {
        let call = call.into();
        let shape = call.request.local_shape(call.request.heads.num_heads);
        let made = Tensor::uninit(&self.device, call.request.heads.dtype, &shape);
        let mut out = made.inspect_err(|why| communicator.abort(&why.to_string()))?;
        self.forward_into(communicator, call, q, k, v, &mut out)?;
        Ok(out)
    }

    /// [`forward`](Self::forward) into memory of the caller: `out` is a `[B, prefix + shard + suffix, H, D]` view, or segments of one as
    /// those of the inputs, that shares no memory with the inputs. Every element of the view is written, and nothing else.
    /// [`AttentionOutputs`] with an `lse`, `[B, H, prefix + shard + suffix]` f32, have the log-sum-exp of this rank's rows over all keys
    /// written too, in [`Mode::Gather`].
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_into<'a, 'o>(
        &self,
        communicator: &mut dyn Communicator,
        call: impl Into<ParallelCall<'a>>,
        q: impl Into<Segments<'a>>,
        k: impl Into<Segments<'a>>,
        v: impl Into<Segments<'a>>,
        out: impl Into<AttentionOutputs<'o>>,
    ) -> Result<()> {
        let done = self.run(communicator, call.into(), [q.into(), k.into(), v.into()], out.into());
        done.inspect_err(|why| communicator.abort(&why.to_string()))
    }

    fn run(
        &self,
        communicator: &mut dyn Communicator,
        call: ParallelCall<'_>,
        inputs: [Segments<'_>; 3],
        AttentionOutputs { out, lse }: AttentionOutputs<'_>,
    ) -> Result<()> {
        let request = call.request;
        let expected = (request.meta.rank(), request.meta.shards().ranks());
        let got = (communicator.rank(), communicator.world_size());
        if expected != got {
            let name = |(rank, world)| format!("rank {rank} of {world}");
            return Err(Error::Sharding { argument: "communicator", expected: name(expected), got: name(got) });
        }
        let Heads { num_heads, num_kv_heads, .. } = request.heads;
        for ((argument, heads), tensor) in
            [("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)].into_iter().zip(&inputs)
        {
            let segments = tensor.views().iter().map(|view| (view.shape(), view.dtype()));
            request.expect_segments((argument, heads), segments)?;
        }
        let of_out = out.views().iter().map(|view| (view.shape(), view.dtype()));
        request.expect_segments(("out", num_heads), of_out)?;
        let (scores, tag) = call.on_scores(lse.is_some())?;
        let lengths = request.lengths();
        let [q, k, v] = &inputs;
        let inputs = [Local::new("q", q, lengths)?, Local::new("k", k, lengths)?, Local::new("v", v, lengths)?];
        let out = LocalMut::new("out", out, lengths)?;
        if let Some(lse) = &lse {
            let [batch, seq, heads, _] = request.local_shape(num_heads);
            let expected = [batch, heads, seq];
            if lse.shape() != expected {
                let got = lse.shape().to_vec();
                return Err(Error::Shape { argument: "lse", expected: expected.to_vec(), got });
            }
        }
        // Once for all that follows.
        let backend = self.device.backend()?;
        let _current = backend.stay_current()?;
        let room = Room { device: &self.device, kept: &request.kept };
        let done = self.run_in(Steps { communicator, room, tag }, (request, &scores), inputs, (out, lse));
        // Whoever failed may leave work behind that uses it.
        done.inspect_err(|_| request.kept.clear())
    }

    fn run_in(
        &self,
        mut steps: Steps<'_>,
        (request, scores): (&ParallelRequest, &OnScores<'_>),
        inputs: [Local<'_>; 3],
        (mut out, lse): (LocalMut<'_>, Option<TensorViewMut<'_>>),
    ) -> Result<()> {
        let room = steps.room;
        let Some(group) = &request.group else {
            return match &request.among_groups {
                AmongGroups::Gather(gather) => gather.attend(&mut steps, (&self.layer(), scores), inputs, out, lse),
                AmongGroups::Ring(ring) => {
                    let joined = inputs.each_ref().map(|tensor| tensor.joined(room, ring.parts()));
                    let [q, k, v] = joined;
                    let (q, k, v) = (q?, k?, v?);
                    let views = [q.view(), k.view(), v.view()];
                    ring.attend(&mut steps, self.options(scores), views, &mut out)
                }
            };
        };
        let in_segments = request.is_one_group() && group.fits_segments();
        if let (AmongGroups::Gather(all), true) = (&request.among_groups, in_segments) {
            return group.attend(&mut steps, (&self.layer(), all.mask_of_all(), scores), inputs, out);
        }
        let inputs = group.rows_for_heads(&mut steps, inputs)?;
        let [_, _, heads, dim] = inputs[0].shape() else { return Ok(()) };
        let shape = [request.meta.batch(), request.group_lengths.iter().sum(), *heads, *dim];
        let mut attended = room.tensor(request.heads.dtype, &shape)?;
        let views = inputs.each_ref().map(|tensor| tensor.view());
        let mut to = LocalMut::of_whole(attended.view_mut(), request.group_lengths);
        match &request.among_groups {
            AmongGroups::Gather(gather) => {
                let [q, k, v] = views.map(|view| Local::of_whole(view, request.group_lengths));
                gather.attend(&mut steps, (&self.layer(), scores), [q?, k?, v?], to, None)?;
            }
            AmongGroups::Ring(ring) => ring.attend(&mut steps, self.options(scores), views, &mut to)?,
        }
        if let Some(whole) = out.whole() {
            return group.heads_for_rows(&mut steps, &attended, whole);
        }
        let [batch, seq, heads, dim] = request.local_shape(request.heads.num_heads);
        let mut joined = room.tensor(request.heads.dtype, &[batch, seq, heads, dim])?;
        group.heads_for_rows(&mut steps, &attended, joined.view_mut())?;
        for ((at, place), meta) in places(request.lengths()).into_iter().enumerate().zip(group.parts()) {
            copy_rows(room, joined.view().slice(1, place)?, meta, out.part(at)?)?;
        }
        Ok(())
    }

    /// What a ring's calls on packed rows say.
    fn options<'a>(&self, scores: &OnScores<'a>) -> VarlenOptions<'a> {
        VarlenOptions {
            softmax_scale: self.softmax_scale,
            kernel: self.kernel,
            modifiers: scores.modifiers,
            ..VarlenOptions::default()
        }
    }

    fn layer(&self) -> MaskedAttention {
        let layer = MaskedAttention::new(&self.device);
        let layer = self.softmax_scale.into_iter().fold(layer, MaskedAttention::with_softmax_scale);
        self.kernel.into_iter().fold(layer, MaskedAttention::with_kernel)
    }
}
