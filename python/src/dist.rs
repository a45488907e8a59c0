//! `varlen_fa.dist`: attention over a sequence that is divided among ranks.

use std::net::{IpAddr, SocketAddr};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use pyo3::prelude::*;
use varlen_fa::dist::{
    Communicator as Transport, Heads, HostCommunicator, Machine, Mode, ParallelCall, ParallelNeeds, ParallelRequest,
    Rendezvous, SequenceParallel,
};
use varlen_fa::{AttentionOutputs, Error};

use crate::arrays::Array;
use crate::device::{self, Device};
use crate::errors::{Cause, OrRaise};
use crate::masks::{KeyMask, Meta};
use crate::memory::Input;
use crate::parts::{Parts, segments, segments_mut};
use crate::results::{LseArgument, Opened, Results};
use crate::scores::{KeyRanges, ScoreModifiers};

/// How the tokens of a sequence are divided among ranks: a prefix and a suffix that every rank has, and
/// between them one shard for each rank.
#[pyclass(frozen, module = "varlen_fa.dist", eq)]
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shards(varlen_fa::dist::Shards);

#[pymethods]
impl Shards {
    /// Shards of these lengths, one for each rank; any may be 0.
    #[new]
    #[pyo3(signature = (lengths, *, prefix=0, suffix=0))]
    fn new(lengths: Vec<usize>, prefix: usize, suffix: usize) -> PyResult<Self> {
        Self::around(varlen_fa::dist::Shards::from_lengths(&lengths), prefix, suffix)
    }

    /// `tokens` tokens in `ranks` shards; where they do not divide, the first have one token more.
    #[staticmethod]
    #[pyo3(signature = (tokens, ranks, *, prefix=0, suffix=0))]
    fn equal(tokens: usize, ranks: usize, prefix: usize, suffix: usize) -> PyResult<Self> {
        Self::around(varlen_fa::dist::Shards::equal(tokens, ranks), prefix, suffix)
    }

    /// Number of ranks.
    #[getter]
    fn ranks(&self) -> usize {
        self.0.ranks()
    }

    /// Tokens of the whole sequence.
    #[getter]
    fn seq(&self) -> usize {
        self.0.seq()
    }

    /// Tokens of the prefix.
    #[getter]
    fn prefix(&self) -> usize {
        self.0.prefix()
    }

    /// Tokens of the suffix.
    #[getter]
    fn suffix(&self) -> usize {
        self.0.suffix()
    }

    /// (start, end) of a rank's shard in the whole sequence; empty if there is no such rank.
    fn shard(&self, rank: usize) -> (usize, usize) {
        let shard = self.0.shard(rank);
        (shard.start, shard.end)
    }

    /// Tokens of a rank's local tensors: prefix, shard and suffix.
    fn local_len(&self, rank: usize) -> usize {
        self.0.local_len(rank)
    }

    fn __repr__(&self) -> String {
        let lengths: Vec<_> = (0..self.ranks()).map(|rank| self.0.shard(rank).len()).collect();
        format!("varlen_fa.dist.Shards({lengths:?}, prefix={}, suffix={})", self.prefix(), self.suffix())
    }
}

impl Shards {
    fn around(shards: varlen_fa::Result<varlen_fa::dist::Shards>, prefix: usize, suffix: usize) -> PyResult<Self> {
        shards.and_then(|shards| shards.with_prefix(prefix)?.with_suffix(suffix)).map(Self).or_raise()
    }
}

/// Where the valid tokens of a divided sequence lie, as one rank sees it. Every rank makes it once a
/// request, from the mask of the whole sequence, and gives it to every call; nothing is sent.
#[pyclass(frozen, module = "varlen_fa.dist")]
#[derive(Debug)]
pub(crate) struct ShardedMeta {
    meta: varlen_fa::dist::ShardedMeta,
    /// What calls have prepared, the last one at the end.
    prepared: Mutex<Vec<Arc<Prepared>>>,
}

/// A request that all ranks of a communicator have agreed on.
#[derive(Debug)]
struct Prepared {
    /// What it was agreed by. It is not kept open for the request's sake.
    communicator: Weak<Mutex<Rank>>,
    device: varlen_fa::Device,
    settings: Settings,
    layer: SequenceParallel,
    request: ParallelRequest,
}

/// What a request is prepared for, beside the metadata.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Settings {
    heads: Heads,
    needs: ParallelNeeds,
    scale: Option<f32>,
    mode: Option<Mode>,
    chunks: Option<usize>,
}

#[pymethods]
impl ShardedMeta {
    /// `mask`: a KeyMask or a tensor [B, S] of the whole sequence, the same on every rank. `ranges`: which
    /// keys each query sees, [B, S, S] of the whole sequence.
    #[new]
    #[pyo3(signature = (mask, shards, rank, *, ranges=None))]
    fn new(
        mask: &Bound<'_, PyAny>,
        shards: &Bound<'_, Shards>,
        rank: usize,
        ranges: Option<&Bound<'_, KeyRanges>>,
    ) -> PyResult<Self> {
        let mask = KeyMask::of_object(mask)?;
        let meta = varlen_fa::dist::ShardedMeta::new(&mask.0, &shards.get().0, rank).or_raise()?;
        let meta = match ranges {
            Some(ranges) => meta.with_ranges(&ranges.get().0).or_raise()?,
            None => meta,
        };
        Ok(Self { meta, prepared: Mutex::default() })
    }

    /// How the sequence is divided.
    #[getter]
    fn shards(&self) -> Shards {
        Shards(self.meta.shards().clone())
    }

    /// This rank.
    #[getter]
    fn rank(&self) -> usize {
        self.meta.rank()
    }

    /// Number of batch rows.
    #[getter]
    fn batch(&self) -> usize {
        self.meta.batch()
    }

    /// Metadata of this rank's tokens: [B, prefix + shard + suffix].
    #[getter]
    fn query(&self) -> Meta {
        Meta(self.meta.query().clone())
    }

    /// Metadata of all tokens: [B, S].
    #[getter]
    fn keys(&self) -> Meta {
        Meta(self.meta.keys().clone())
    }

    fn __repr__(&self) -> String {
        format!("varlen_fa.dist.ShardedMeta({}, rank={})", self.shards().__repr__(), self.rank())
    }
}

/// The most requests that metadata keeps: of layers that differ in heads, scale or mode.
const MOST_PREPARED: usize = 16;

impl ShardedMeta {
    /// The request of a call, prepared with the other ranks if none of this kind was. Ranks make the same
    /// calls, so all of them come to prepare, or none.
    fn prepared(
        &self,
        communicator: &Arc<Mutex<Rank>>,
        rank: &mut Rank,
        device: &varlen_fa::Device,
        settings: Settings,
    ) -> varlen_fa::Result<Arc<Prepared>> {
        let mut kept = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |kept: &Arc<Prepared>| {
            let is_same_device = ptr::eq(kept.device.capabilities(), device.capabilities());
            ptr::eq(kept.communicator.as_ptr(), Arc::as_ptr(communicator))
                && is_same_device
                && kept.settings == settings
        };
        if let Some(found) = kept.iter().find(|kept| is_it(kept)) {
            return Ok(Arc::clone(found));
        }
        let Settings { heads, needs, scale, mode, chunks } = settings;
        let layer = SequenceParallel::new(device).with_needs(needs);
        let layer = scale.into_iter().fold(layer, SequenceParallel::with_softmax_scale);
        let layer = mode.into_iter().fold(layer, SequenceParallel::with_mode);
        let layer = chunks.into_iter().fold(layer, SequenceParallel::with_chunks);
        let request = layer.prepare(&mut **rank.open()?, &self.meta, &heads)?;
        let communicator = Arc::downgrade(communicator);
        let made = Arc::new(Prepared { communicator, device: device.clone(), settings, layer, request });
        if kept.len() == MOST_PREPARED {
            kept.remove(0);
        }
        kept.push(Arc::clone(&made));
        Ok(made)
    }
}

/// One rank's end of a transport.
#[derive(Debug)]
struct Rank {
    rank: usize,
    /// None after it was closed.
    transport: Option<Box<dyn Transport>>,
}

impl Rank {
    fn open(&mut self) -> varlen_fa::Result<&mut Box<dyn Transport>> {
        let rank = self.rank;
        self.transport.as_mut().ok_or_else(|| Error::RankLost {
            operation: "using a communicator",
            rank,
            why: "its communicator was closed".to_owned(),
        })
    }
}

/// One rank of several that exchange rows. After an error it takes no more calls, on any rank.
#[pyclass(frozen, module = "varlen_fa.dist")]
#[derive(Debug)]
pub(crate) struct Communicator {
    rank: usize,
    world: usize,
    kind: &'static str,
    inner: Arc<Mutex<Rank>>,
}

#[pymethods]
impl Communicator {
    /// The ranks of one process, in order, one for each of its threads. `timeout`: how many seconds a
    /// call waits for other ranks.
    #[staticmethod]
    #[pyo3(signature = (world_size, *, timeout=60.0))]
    fn threads(world_size: usize, timeout: f64) -> PyResult<Vec<Self>> {
        let limit = seconds(timeout)?;
        let ranks = HostCommunicator::threads(world_size).or_raise()?;
        Ok(ranks.into_iter().map(|rank| Self::over("host", Box::new(rank.with_time_out(limit)))).collect())
    }

    /// One of `world_size` processes, joined by TCP; returns when all are there. `meeting`: an address on
    /// which rank 0 listens, such as "127.0.0.1:4321", or "file:" and the path of a file that rank 0
    /// writes, for processes of one machine; on rank 0 also a MeetingPoint. Nothing is encrypted or
    /// authenticated: use networks that you trust.
    ///
    /// `device`, `nccl_comm`: a CUDA device, and the address of the application's ncclComm_t of the same
    /// ranks, by which rows travel then; None makes one.
    #[staticmethod]
    #[pyo3(signature = (meeting, rank, world_size, *, timeout=60.0, device=None, nccl_comm=None))]
    fn connect(
        py: Python<'_>,
        meeting: &Bound<'_, PyAny>,
        rank: usize,
        world_size: usize,
        timeout: f64,
        device: Option<&Bound<'_, Device>>,
        nccl_comm: Option<usize>,
    ) -> PyResult<Self> {
        let limit = seconds(timeout)?;
        let point = meeting.cast::<MeetingPoint>().ok().map(Bound::get);
        if point.is_some() && rank != 0 {
            return Err(Cause::Value.argument("meeting", "an address on other ranks than 0", "a MeetingPoint"));
        }
        let rendezvous = match point {
            Some(_) => None,
            None => Some(rendezvous(meeting.extract()?)?),
        };
        let device = device.map(|device| device.get().0.clone());
        if device.is_none() && nccl_comm.is_some() {
            return Err(Cause::Value.argument("device", "a CUDA device beside `nccl_comm`", "None"));
        }
        py.detach(|| {
            let met = match (point, &rendezvous) {
                (Some(point), _) => HostCommunicator::lead(&point.0, world_size, limit)?,
                (None, Some(rendezvous)) => HostCommunicator::connect(rendezvous, rank, world_size, limit)?,
                (None, None) => return Ok(None),
            };
            Ok(Some(match device {
                None => Self::over("host", Box::new(met)),
                // SAFETY: the caller gives the address of a live communicator, as the docstring asks.
                Some(device) => Self::over("nccl", unsafe { nccl::over(met, &device, nccl_comm) }?),
            }))
        })
        .or_raise()?
        .ok_or_else(|| Cause::Value.argument("meeting", "an address, or file: and a path", "neither"))
    }

    /// This rank.
    #[getter]
    fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    #[getter]
    fn world_size(&self) -> usize {
        self.world
    }

    /// How rows travel: "host" or "nccl".
    #[getter]
    fn kind(&self) -> &'static str {
        self.kind
    }

    /// Waits for every rank.
    fn barrier(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.lock().open()?.barrier()).or_raise()
    }

    /// Leaves the other ranks: those that still wait for this one get an error.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().transport.take()));
    }

    fn __repr__(&self) -> String {
        format!("<varlen_fa.dist.Communicator: rank {} of {} by {}>", self.rank, self.world, self.kind)
    }
}

impl Communicator {
    fn over(kind: &'static str, transport: Box<dyn Transport>) -> Self {
        let (rank, world) = (transport.rank(), transport.world_size());
        let inner = Rank { rank, transport: Some(transport) };
        Self { rank, world, kind, inner: Arc::new(Mutex::new(inner)) }
    }

    /// What a panic left behind is noticed by the peers, as any rank that does not answer.
    fn lock(&self) -> MutexGuard<'_, Rank> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the peers that this rank does not take part in a call.
    fn give_up(&self, py: Python<'_>, error: &PyErr) {
        let why = error.value(py).to_string();
        py.detach(|| {
            if let Some(transport) = &mut self.lock().transport {
                transport.abort(&why);
            }
        });
    }
}

/// Where rank 0 listens, so that it can tell the others before they come.
#[pyclass(frozen, module = "varlen_fa.dist")]
#[derive(Debug)]
pub(crate) struct MeetingPoint(varlen_fa::dist::MeetingPoint);

#[pymethods]
impl MeetingPoint {
    /// `host`: an IP address of this machine that the other ranks reach. The system chooses a port unless
    /// there is one.
    #[new]
    #[pyo3(signature = (host, *, port=0))]
    fn new(host: &str, port: u16) -> PyResult<Self> {
        let ip: Result<IpAddr, _> = host.parse();
        let ip = ip.map_err(|_| Cause::Value.argument("host", "an IP address", format!("{host:?}")))?;
        varlen_fa::dist::MeetingPoint::listen(SocketAddr::new(ip, port)).map(Self).or_raise()
    }

    /// The address for the other ranks.
    #[getter]
    fn address(&self) -> PyResult<String> {
        self.0.address().map(|address| address.to_string()).or_raise()
    }
}

/// The mode of a request, and why it was chosen. Its text says all of it in words.
#[pyclass(frozen, module = "varlen_fa.dist", eq)]
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParallelPlan(varlen_fa::dist::ParallelPlan);

#[pymethods]
impl ParallelPlan {
    /// "gather", "ulysses", "ring", "ulysses-gather:N" or "ulysses-ring:N", with N ranks a group.
    #[getter]
    fn mode(&self) -> String {
        self.0.mode.to_string()
    }

    /// In how many chunks a rank computes its heads.
    #[getter]
    fn chunks(&self) -> usize {
        self.0.chunks
    }

    /// Why.
    #[getter]
    fn reason(&self) -> String {
        self.0.reason.to_string()
    }

    /// Of each mode that was looked at the estimated seconds, or why it cannot be taken.
    #[getter]
    fn candidates(&self) -> Vec<(String, Option<f64>, Option<String>)> {
        let of_one = |(mode, estimate): &(Mode, Result<varlen_fa::dist::ModeEstimate, String>)| {
            (mode.to_string(), estimate.as_ref().ok().map(|estimate| estimate.seconds), estimate.clone().err())
        };
        self.0.candidates.iter().map(of_one).collect()
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("<varlen_fa.dist.ParallelPlan: {}>", self.0)
    }
}

/// A call's tensors, and what a request of it is prepared for.
struct Call<'py> {
    device: varlen_fa::Device,
    qkv: [Parts<'py>; 3],
    settings: Settings,
}

impl<'py> Call<'py> {
    fn new(
        [q, k, v]: [&Bound<'py, PyAny>; 3],
        device: Option<&Bound<'py, Device>>,
        (needs, scale): (ParallelNeeds, Option<f32>),
        (mode, chunks): (Option<&str>, Option<usize>),
    ) -> PyResult<Self> {
        let qkv = [Parts::new("q", q)?, Parts::new("k", k)?, Parts::new("v", v)?];
        let (like, array) = qkv[0].first();
        let device = device::of_call(device, like, array)?.0;
        let ([_, _, num_heads, head_dim], [_, _, num_kv_heads, _]) = (qkv[0].shape()?, qkv[1].shape()?);
        let heads = Heads { num_heads, num_kv_heads, head_dim, dtype: array.dtype()? };
        let mode = mode.map(str::parse).transpose().or_raise()?;
        Ok(Self { device, qkv, settings: Settings { heads, needs, scale, mode, chunks } })
    }
}

/// Attention of this rank's tokens to those of all ranks: q [B, prefix + shard + suffix, H, D], k and v
/// [B, prefix + shard + suffix, Hkv, D]. Each, and `out`, may be a list of segments that meet where
/// prefix, shard and suffix do. Every rank calls it, in the same order.
///
/// `bias`: of the whole sequence, broadcast over [B, H, S, S], on every rank; `modifiers`: of all H heads.
/// `lse`: True, or a tensor [B, H, prefix + shard + suffix] f32 to write to: the call returns (out, lse).
#[pyfunction]
#[pyo3(signature = (
    q, k, v, *, meta, communicator, scale=None, modifiers=None, bias=None, lse=None, mode=None, chunks=None, out=None,
    device=None
))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
pub(crate) fn parallel_attention<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    meta: &Bound<'py, ShardedMeta>,
    communicator: &Bound<'py, Communicator>,
    scale: Option<f32>,
    modifiers: Option<&Bound<'py, ScoreModifiers>>,
    bias: Option<&Bound<'py, PyAny>>,
    lse: Option<&Bound<'py, PyAny>>,
    mode: Option<&str>,
    chunks: Option<usize>,
    out: Option<&Bound<'py, PyAny>>,
    device: Option<&Bound<'py, Device>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (meta, communicator) = (meta.get(), communicator.get());
    let run = || -> PyResult<_> {
        let bias = Array::optional("bias", bias)?;
        let modifiers = modifiers.map(|modifiers| &modifiers.get().0);
        let lse = LseArgument::new(lse);
        let needs = needs(bias.is_some(), modifiers, lse.is_wanted());
        let Call { device, qkv, settings } = Call::new([q, k, v], device, (needs, scale), (mode, chunks))?;
        let shape @ [batch, seq, heads, _] = qkv[0].shape()?;
        let results = Results::new(qkv[0].first(), (out, &shape), (&lse, &[batch, heads, seq]))?;
        let inputs: Vec<&Array> = qkv.iter().flat_map(Parts::arrays).chain(&bias).collect();
        results.write(py, &device, &inputs, |Opened { out, lse }| {
            let [q, k, v] = &qkv;
            let opened = [q.inputs(&device)?, k.inputs(&device)?, v.inputs(&device)?];
            let bias = bias.as_ref().map(|bias| Input::new(&device, bias)).transpose()?;
            let bias = bias.as_ref().map(Input::view);
            let [q, k, v] = opened.each_ref().map(|inputs| segments(inputs));
            let outputs = AttentionOutputs::new(segments_mut(out));
            let outputs = lse.iter_mut().fold(outputs, |outputs, lse| outputs.with_lse(lse.view_mut()));
            py.detach(|| {
                let mut rank = communicator.lock();
                let Prepared { layer, request, .. } =
                    &*meta.prepared(&communicator.inner, &mut rank, &device, settings)?;
                let call = bias.into_iter().fold(ParallelCall::from(request), ParallelCall::with_bias);
                let call = modifiers.into_iter().fold(call, ParallelCall::with_modifiers);
                layer.forward_into(&mut **rank.open()?, call, q, k, v, outputs)
            })
            .or_raise()
        })
    };
    run().inspect_err(|error| communicator.give_up(py, error))
}

/// What a call carries that not every mode computes.
fn needs(bias: bool, modifiers: Option<&varlen_fa::ScoreModifiers>, lse: bool) -> ParallelNeeds {
    let needs = modifiers.into_iter().fold(ParallelNeeds::new(), ParallelNeeds::with_modifiers);
    let needs = if bias { needs.with_bias() } else { needs };
    if lse { needs.with_lse() } else { needs }
}

/// The mode that `attention` would take with these tensors, and why. Nothing is sent. `bias` and `lse` say
/// whether the call has them.
#[pyfunction]
#[pyo3(signature = (q, k, v, *, meta, modifiers=None, bias=false, lse=false, mode=None, device=None))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
pub(crate) fn parallel_plan<'py>(
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    meta: &Bound<'py, ShardedMeta>,
    modifiers: Option<&Bound<'py, ScoreModifiers>>,
    bias: bool,
    lse: bool,
    mode: Option<&str>,
    device: Option<&Bound<'py, Device>>,
) -> PyResult<ParallelPlan> {
    let needs = needs(bias, modifiers.map(|modifiers| &modifiers.get().0), lse);
    let Call { device, settings, .. } = Call::new([q, k, v], device, (needs, None), (mode, None))?;
    let machine: Machine = SequenceParallel::new(&device).machine();
    let Settings { heads, needs, mode, .. } = settings;
    let plan = varlen_fa::dist::ParallelPlan::new(&meta.get().meta, &heads, needs, &machine, mode);
    plan.map(ParallelPlan).or_raise()
}

fn seconds(timeout: f64) -> PyResult<Duration> {
    let given = Duration::try_from_secs_f64(timeout).ok().filter(|limit| !limit.is_zero());
    given.ok_or_else(|| Cause::Value.argument("timeout", "a number of seconds, more than 0", timeout))
}

fn rendezvous(meeting: &str) -> PyResult<Rendezvous> {
    if let Some(path) = meeting.strip_prefix("file:") {
        return Ok(Rendezvous::File(path.into()));
    }
    let expected = "an address such as 127.0.0.1:4321, or file: and a path";
    let address = meeting.parse().map_err(|_| Cause::Value.argument("meeting", expected, format!("{meeting:?}")))?;
    Ok(Rendezvous::Tcp(address))
}

/// Ranks by NCCL, or an error in a build without the feature `nccl`.
mod nccl {
    use varlen_fa::Device;
    use varlen_fa::dist::{Communicator, HostCommunicator};

    /// # Safety
    /// `comm` is none, or the address of a live `ncclComm_t` that nobody else uses during a call.
    #[cfg(feature = "nccl")]
    pub(super) unsafe fn over(
        met: HostCommunicator,
        device: &Device,
        comm: Option<usize>,
    ) -> varlen_fa::Result<Box<dyn Communicator>> {
        use std::ptr::with_exposed_provenance_mut;
        use varlen_fa::dist::NcclCommunicator;

        Ok(Box::new(match comm {
            None => NcclCommunicator::new(met, device)?,
            // SAFETY: by this function's contract.
            Some(comm) => unsafe { NcclCommunicator::from_raw(met, device, with_exposed_provenance_mut(comm)) }?,
        }))
    }

    #[cfg(not(feature = "nccl"))]
    pub(super) unsafe fn over(
        mut met: HostCommunicator,
        device: &Device,
        _comm: Option<usize>,
    ) -> varlen_fa::Result<Box<dyn Communicator>> {
        let why = "varlen-fa was built without its feature `nccl`".to_owned();
        met.abort(&why);
        Err(varlen_fa::Error::DeviceUnavailable { device: format!("NCCL for {}", device.name()), why })
    }
}
