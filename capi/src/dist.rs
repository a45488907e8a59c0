//! Sequence parallelism: attention over a sequence that is divided among ranks.

use std::ffi::{CStr, c_char, c_void};
use std::net::SocketAddr;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[cfg(not(feature = "nccl"))]
use varlen::Error;
#[cfg(feature = "nccl")]
use varlen::dist::NcclCommunicator;
use varlen::dist::{
    Communicator, Heads, HostCommunicator, Mode, ParallelCall, ParallelNeeds, ParallelRequest, PeerCommunicator,
    Rendezvous, SequenceParallel, ShardedMeta, Shards,
};
use varlen::{Device, ScoreModifiers};

use crate::arguments::{Name, Place, choose, expect_zeros, read, read_optional, reserve, size, slice, text};
use crate::failure::{Failure, Result, guard};
use crate::handles::{self, handle};
use crate::key_ranges;
use crate::outputs::Outputs;
use crate::score_modifiers;
use crate::segments::{self, List, views};
use crate::tensors::{Described, Input, expect_apart};
use crate::types::{
    varlen_fa_communicator, varlen_fa_device, varlen_fa_key_mask, varlen_fa_key_ranges, varlen_fa_parallel_mode,
    varlen_fa_parallel_options, varlen_fa_parallel_plan, varlen_fa_parallel_request, varlen_fa_parallel_scores,
    varlen_fa_segments, varlen_fa_sharded_meta, varlen_fa_shards, varlen_fa_status, varlen_fa_tensor,
};

/// A rank of any transport.
type Rank = Box<dyn Communicator>;

handle!(varlen_fa_communicator, 8, Mutex<Rank>);
handle!(varlen_fa_sharded_meta, 9, ShardedMeta);
handle!(varlen_fa_parallel_request, 10, Request);

/// A request, and the layer that it was prepared by.
#[derive(Debug)]
pub(crate) struct Request {
    device: Device,
    layer: SequenceParallel,
    request: ParallelRequest,
}

/// What a panic left behind is noticed by the peers, as any rank that does not answer.
fn lock(communicator: &Mutex<Rank>) -> MutexGuard<'_, Rank> {
    communicator.lock().unwrap_or_else(PoisonError::into_inner)
}

fn time_out(milliseconds: u64) -> Duration {
    match milliseconds {
        0 => HostCommunicator::TIME_OUT,
        _ => Duration::from_millis(milliseconds),
    }
}

/// Creates the ranks of one process: one handle for each of its threads, in order.
///
/// `time_out_ms`: how long a call waits for other ranks, in milliseconds; 0 for a minute.
/// `communicators`: receives `world_size` handles, each to be given to varlen_fa_communicator_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_communicator_threads(
    world_size: u64,
    time_out_ms: u64,
    communicators: *mut *mut varlen_fa_communicator,
) -> varlen_fa_status {
    guard(|| {
        let ranks = HostCommunicator::threads(size(Name::of("world_size"), world_size)?)?;
        let ranks = ranks.into_iter().map(|rank| Box::new(rank.with_time_out(time_out(time_out_ms))) as Rank);
        // SAFETY: the caller obeys the header's rules for pointers: there is room for each.
        unsafe { issue(ranks, communicators) }
    })
}

/// # Safety
/// The header's rules for pointers: there is room for each rank.
unsafe fn issue(ranks: impl ExactSizeIterator<Item = Rank>, to: *mut *mut varlen_fa_communicator) -> Result<()> {
    let mut places = reserve(ranks.len())?;
    for rank in 0..ranks.len() {
        // SAFETY: by this function's contract.
        places.push(unsafe { Place::new(Name::of("communicators"), to.wrapping_add(rank)) }?);
    }
    for (place, rank) in places.into_iter().zip(ranks) {
        place.put(handles::issue(Mutex::new(rank)));
    }
    Ok(())
}

/// Creates the ranks of one process whose CUDA devices copy from one another: one handle for each of
/// its threads, in the order of the devices. Several ranks may share a device. Access between the
/// devices' contexts is enabled and stays.
///
/// `devices`: `world_size` CUDA devices. Each rank's requests are prepared with its own.
/// `time_out_ms`: as of varlen_fa_communicator_threads.
/// `communicators`: receives `world_size` handles, each to be given to varlen_fa_communicator_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_communicator_peers(
    devices: *const *const varlen_fa_device,
    world_size: u64,
    time_out_ms: u64,
    communicators: *mut *mut varlen_fa_communicator,
) -> varlen_fa_status {
    guard(|| {
        let name = Name::of("devices");
        // SAFETY: the caller obeys the header's rules for pointers.
        let given = unsafe { slice(name, devices, world_size) }?;
        let mut opened = reserve(given.len())?;
        for device in given {
            opened.push(Device::clone(&*handles::get(name, *device)?));
        }
        let ranks = PeerCommunicator::of_devices(&opened)?;
        let ranks = ranks.into_iter().map(|rank| Box::new(rank.with_time_out(time_out(time_out_ms))) as Rank);
        // SAFETY: as above: there is room for each.
        unsafe { issue(ranks, communicators) }
    })
}

/// Joins processes by TCP: this one is rank `rank` of `world_size`. Returns when all are there.
///
/// `meeting`: an address on which rank 0 listens, such as "127.0.0.1:4321", or "file:" and the path
/// of a file that rank 0 writes, for processes of one machine. Nothing is encrypted or
/// authenticated: use networks that you trust.
/// `time_out_ms`: as of varlen_fa_communicator_threads; for the meeting too.
/// `communicator`: receives the handle, to be given to varlen_fa_communicator_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_communicator_connect(
    meeting: *const c_char,
    rank: u64,
    world_size: u64,
    time_out_ms: u64,
    communicator: *mut *mut varlen_fa_communicator,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("communicator"), communicator) }?;
        // SAFETY: as above.
        let met = unsafe { meet(meeting, (rank, world_size), time_out_ms) }?;
        place.put(handles::issue(Mutex::new(Box::new(met) as Rank)));
        Ok(())
    })
}

/// # Safety
/// The header's rules for pointers.
unsafe fn meet(meeting: *const c_char, (rank, world_size): (u64, u64), time_out_ms: u64) -> Result<HostCommunicator> {
    let name = Name::of("meeting");
    // SAFETY: by this function's contract; one character is read, to check the pointer.
    unsafe { slice(name, meeting, 1) }?;
    // SAFETY: by the header, a text that ends with 0.
    let given = unsafe { CStr::from_ptr(meeting) }.to_string_lossy();
    let rendezvous = match given.strip_prefix("file:") {
        Some(path) => Rendezvous::File(path.into()),
        None => Rendezvous::Tcp(given.parse::<SocketAddr>().map_err(|_| {
            let expected = "an address such as 127.0.0.1:4321, or file: and a path";
            Failure::argument(varlen_fa_status::BadValue, name, expected, format!("{given:?}"))
        })?),
    };
    let (rank, world) = (size(Name::of("rank"), rank)?, size(Name::of("world_size"), world_size)?);
    Ok(HostCommunicator::connect(&rendezvous, rank, world, time_out(time_out_ms))?)
}

/// Joins processes whose CUDA devices send and receive by NCCL (libnccl.so.2, loaded at run time):
/// this one is rank `rank` of `world_size`. Returns when all are there. Run on two GPUs of one host, and never between hosts.
///
/// `device`: a CUDA device, on a GPU of its own. Requests of this rank are prepared with it.
/// `meeting`, `time_out_ms`: as of varlen_fa_communicator_connect. What takes longer than the time-out
/// is aborted, on the device too.
/// `comm`: an ncclComm_t of the caller's, of the same rank and ranks and on the same GPU, which stays
/// the caller's; NULL makes one. Nobody else uses it during a call, and it lives until the
/// communicator is freed.
/// `communicator`: receives the handle, to be given to varlen_fa_communicator_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_communicator_nccl(
    device: *const varlen_fa_device,
    meeting: *const c_char,
    rank: u64,
    world_size: u64,
    time_out_ms: u64,
    comm: *mut c_void,
    communicator: *mut *mut varlen_fa_communicator,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("communicator"), communicator) }?;
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: as above.
        let met = unsafe { meet(meeting, (rank, world_size), time_out_ms) }?;
        // SAFETY: by the caller's promise, NULL or a live ncclComm_t.
        let made = unsafe { over_nccl(met, &device, comm) }?;
        place.put(handles::issue(Mutex::new(made)));
        Ok(())
    })
}

/// # Safety
/// `comm` is null or a live `ncclComm_t`.
#[cfg(feature = "nccl")]
unsafe fn over_nccl(met: HostCommunicator, device: &Device, comm: *mut c_void) -> Result<Rank> {
    let made = match comm.is_null() {
        true => NcclCommunicator::new(met, device),
        // SAFETY: by this function's contract.
        false => unsafe { NcclCommunicator::from_raw(met, device, comm) },
    };
    Ok(Box::new(made?))
}

#[cfg(not(feature = "nccl"))]
unsafe fn over_nccl(mut met: HostCommunicator, device: &Device, _comm: *mut c_void) -> Result<Rank> {
    let why = "the library was built without its feature `nccl`".to_owned();
    met.abort(&why);
    Err(Error::DeviceUnavailable { device: format!("NCCL for {}", device.name()), why }.into())
}

/// Frees a communicator. NULL is ignored. Other ranks that still wait for this one get an error.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_communicator_free(communicator: *mut varlen_fa_communicator) -> varlen_fa_status {
    guard(|| handles::free(Name::of("communicator"), communicator))
}

/// Creates the metadata of a sequence that is divided among ranks, as rank `rank` sees it. Every
/// rank does so once per request, from the mask of the whole sequence; nothing is sent.
///
/// `key_mask`: [B, S], S = prefix + the sum of the lengths + suffix; the same on every rank.
/// `ranges`: [B, S, S], of the whole sequence; NULL for none.
/// `sharded_meta`: receives the handle, to be given to varlen_fa_sharded_meta_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_sharded_meta_create(
    key_mask: *const varlen_fa_key_mask,
    shards: *const varlen_fa_shards,
    rank: u64,
    ranges: *const varlen_fa_key_ranges,
    sharded_meta: *mut *mut varlen_fa_sharded_meta,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("sharded_meta"), sharded_meta) }?;
        let key_mask = handles::get(Name::of("key_mask"), key_mask)?;
        let name = Name::of("shards");
        // SAFETY: as above.
        let given = unsafe { read(name, shards) }?;
        expect_zeros(name.field("reserved"), &given.reserved)?;
        // SAFETY: as above: there are as many lengths.
        let lengths = unsafe { slice(name.field("lengths"), given.lengths, given.ranks) }?;
        let mut sizes = reserve(lengths.len())?;
        for &length in lengths {
            sizes.push(size(name.field("lengths"), length)?);
        }
        let shards = Shards::from_lengths(&sizes)?
            .with_prefix(size(name.field("prefix"), given.prefix)?)?
            .with_suffix(size(name.field("suffix"), given.suffix)?)?;
        let mut made = ShardedMeta::new(&key_mask, &shards, size(Name::of("rank"), rank)?)?;
        if let Some(ranges) = key_ranges::optional(Name::of("ranges"), ranges)? {
            made = made.with_ranges(&ranges)?;
        }
        place.put(handles::issue(made));
        Ok(())
    })
}

/// Frees sharded metadata. NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_sharded_meta_free(sharded_meta: *mut varlen_fa_sharded_meta) -> varlen_fa_status {
    guard(|| handles::free(Name::of("sharded_meta"), sharded_meta))
}

/// Prepares a request: chooses a mode, and checks that all ranks were given the same. Every rank
/// calls it once per request. After an error the communicator takes no more calls, on any rank.
///
/// `request`: receives the handle, to be given to varlen_fa_parallel_request_free. It keeps device and
/// metadata alive.
/// `plan`: receives the mode and why it was chosen; may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_parallel_prepare(
    device: *const varlen_fa_device,
    communicator: *const varlen_fa_communicator,
    sharded_meta: *const varlen_fa_sharded_meta,
    options: *const varlen_fa_parallel_options,
    request: *mut *mut varlen_fa_parallel_request,
    plan: *mut varlen_fa_parallel_plan,
) -> varlen_fa_status {
    guard(|| {
        let communicator = handles::get(Name::of("communicator"), communicator)?;
        let mut communicator = lock(&communicator);
        // SAFETY: the caller obeys the header's rules for pointers.
        let prepared = unsafe { prepare(device, &mut **communicator, sharded_meta, options, request, plan) };
        prepared.inspect_err(|failure| communicator.abort(&failure.message))
    })
}

/// # Safety
/// The header's rules for pointers.
unsafe fn prepare(
    device: *const varlen_fa_device,
    communicator: &mut dyn Communicator,
    sharded_meta: *const varlen_fa_sharded_meta,
    options: *const varlen_fa_parallel_options,
    request: *mut *mut varlen_fa_parallel_request,
    plan: *mut varlen_fa_parallel_plan,
) -> Result<()> {
    // SAFETY: by this function's contract; as in the lines below.
    let place = unsafe { Place::new(Name::of("request"), request) }?;
    // SAFETY: as above.
    let plan = unsafe { Place::optional(Name::of("plan"), plan) }?;
    let device = handles::get(Name::of("device"), device)?;
    let meta = handles::get(Name::of("sharded_meta"), sharded_meta)?;
    let name = Name::of("options");
    // SAFETY: as above.
    let options = unsafe { read(name, options) }?;
    expect_zeros(name.field("reserved"), &options.reserved)?;
    let heads = Heads {
        num_heads: size(name.field("num_heads"), options.num_heads)?,
        num_kv_heads: size(name.field("num_kv_heads"), options.num_kv_heads)?,
        head_dim: size(name.field("head_dim"), options.head_dim)?,
        dtype: choose(name.field("dtype"), options.dtype)?.meaning,
    };
    let mut layer = SequenceParallel::new(&device).with_needs(needs(name, &options)?);
    if flag(name.field("has_softmax_scale"), options.has_softmax_scale)? {
        layer = layer.with_softmax_scale(options.softmax_scale);
    }
    let ulysses = size(name.field("ulysses"), options.ulysses)?;
    let mode = choose(name.field("mode"), options.mode)?.value;
    let forced = match mode {
        varlen_fa_parallel_mode::Auto => None,
        varlen_fa_parallel_mode::Gather => Some(Mode::Gather),
        varlen_fa_parallel_mode::Ulysses => Some(Mode::Ulysses),
        varlen_fa_parallel_mode::Ring => Some(Mode::Ring),
        varlen_fa_parallel_mode::UlyssesGather => Some(Mode::UlyssesGather { ulysses }),
        varlen_fa_parallel_mode::UlyssesRing => Some(Mode::UlyssesRing { ulysses }),
    };
    let has_groups = matches!(mode, varlen_fa_parallel_mode::UlyssesGather | varlen_fa_parallel_mode::UlyssesRing);
    if ulysses != 0 && !has_groups {
        let expected = "0 for modes of one level";
        return Err(Failure::argument(varlen_fa_status::BadValue, name.field("ulysses"), expected, ulysses));
    }
    if let Some(mode) = forced {
        layer = layer.with_mode(mode);
    }
    let made = layer.prepare(communicator, &meta, &heads)?;
    if let Some(plan) = plan {
        let (mode, ulysses) = match made.plan().mode {
            Mode::Ulysses => (varlen_fa_parallel_mode::Ulysses, 0),
            Mode::Ring => (varlen_fa_parallel_mode::Ring, 0),
            Mode::UlyssesGather { ulysses } => (varlen_fa_parallel_mode::UlyssesGather, ulysses as u64),
            Mode::UlyssesRing { ulysses } => (varlen_fa_parallel_mode::UlyssesRing, ulysses as u64),
            _ => (varlen_fa_parallel_mode::Gather, 0),
        };
        let text = text(&made.plan().to_string());
        plan.put(varlen_fa_parallel_plan { mode, reserved_word: 0, ulysses, text, reserved: [0; 2] });
    }
    place.put(handles::issue(Request { device: Device::clone(&device), layer, request: made }));
    Ok(())
}

fn flag(name: Name, given: u32) -> Result<bool> {
    match given {
        0 => Ok(false),
        1 => Ok(true),
        got => Err(Failure::argument(varlen_fa_status::BadValue, name, "0 or 1", got)),
    }
}

/// What calls carry that not every mode computes.
fn needs(name: Name, options: &varlen_fa_parallel_options) -> Result<ParallelNeeds> {
    let mut needs = ParallelNeeds::new();
    if let Some(modifiers) = score_modifiers::optional(name.field("modifiers"), options.modifiers)? {
        needs = needs.with_modifiers(&modifiers);
    }
    if flag(name.field("has_bias"), options.has_bias)? {
        needs = needs.with_bias();
    }
    if flag(name.field("has_lse"), options.has_lse)? {
        needs = needs.with_lse();
    }
    Ok(needs)
}

/// Frees a request. NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_parallel_request_free(request: *mut varlen_fa_parallel_request) -> varlen_fa_status {
    guard(|| handles::free(Name::of("request"), request))
}

/// Attention of this rank's tokens to those of all ranks. Every rank calls it, in the same order.
///
/// `q`, `out`: [B, prefix + shard + suffix, H, D]. `out` lies in memory that no input shares; rows of
/// masked tokens are exactly zero.
/// `k`, `v`: [B, prefix + shard + suffix, Hkv, D].
///
/// Prefix and suffix hold the same on every rank. After an error, here or on another rank, the
/// communicator takes no more calls, on any rank; nothing waits longer than its time-out. `out` may
/// then hold anything.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_parallel_forward(
    communicator: *const varlen_fa_communicator,
    request: *const varlen_fa_parallel_request,
    q: *const varlen_fa_tensor,
    k: *const varlen_fa_tensor,
    v: *const varlen_fa_tensor,
    out: *const varlen_fa_tensor,
) -> varlen_fa_status {
    // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
    let q = || unsafe { segments::whole(&segments::Q, q) };
    // SAFETY: as above.
    let k = || unsafe { segments::whole(&segments::K, k) };
    // SAFETY: as above.
    let v = || unsafe { segments::whole(&segments::V, v) };
    // SAFETY: as above.
    let out = || unsafe { segments::whole(&segments::OUT, out) };
    let tensors = || Ok(([q()?, k()?, v()?], out()?));
    // SAFETY: as above.
    guard(|| unsafe { forward(communicator, request, tensors, ptr::null(), ptr::null()) })
}

/// varlen_fa_parallel_forward on tensors in segments along S, with a bias or score modifiers, and with
/// the log-sum-exp. docs/sequence-parallel.md says which modes compute what; others are refused with
/// NOT_APPLICABLE before anything is sent. To have a mode chosen that does, say so in the options of
/// varlen_fa_parallel_prepare.
///
/// `q`, `k`, `v`, `out`: each is cut where prefix, shard and suffix meet, or only at some of these
/// places; one segment is the whole tensor.
/// `scores`: NULL for neither a bias nor modifiers.
/// `lse`: [B, H, prefix + shard + suffix] f32, receives the log-sum-exp of this rank's rows over all
/// keys, as in varlen_fa_forward_with_lse; NULL for none.
///
/// Outputs share no memory with one another or with an input. Messages name a segment as in
/// `segments[1].k`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_parallel_forward_segments(
    communicator: *const varlen_fa_communicator,
    request: *const varlen_fa_parallel_request,
    q: *const varlen_fa_segments,
    k: *const varlen_fa_segments,
    v: *const varlen_fa_segments,
    scores: *const varlen_fa_parallel_scores,
    out: *const varlen_fa_segments,
    lse: *const varlen_fa_tensor,
) -> varlen_fa_status {
    // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
    let q = || unsafe { segments::parts(&segments::Q, q) };
    // SAFETY: as above.
    let k = || unsafe { segments::parts(&segments::K, k) };
    // SAFETY: as above.
    let v = || unsafe { segments::parts(&segments::V, v) };
    // SAFETY: as above.
    let out = || unsafe { segments::parts(&segments::OUT, out) };
    let tensors = || Ok(([q()?, k()?, v()?], out()?));
    // SAFETY: as above.
    guard(|| unsafe { forward(communicator, request, tensors, scores, lse) })
}

/// The call on q, k, v and the output, which `tensors` reads. A rank that fails tells the others.
///
/// # Safety
/// The header's rules for pointers.
unsafe fn forward<'a>(
    communicator: *const varlen_fa_communicator,
    request: *const varlen_fa_parallel_request,
    tensors: impl FnOnce() -> Result<([List<Described<'a>>; 3], List<Described<'a>>)>,
    scores: *const varlen_fa_parallel_scores,
    lse: *const varlen_fa_tensor,
) -> Result<()> {
    let communicator = handles::get(Name::of("communicator"), communicator)?;
    let mut communicator = lock(&communicator);
    // SAFETY: by this function's contract.
    let done = unsafe { attend(&mut **communicator, request, tensors, scores, lse) };
    done.inspect_err(|failure| communicator.abort(&failure.message))
}

/// # Safety
/// The header's rules for pointers.
unsafe fn attend<'a>(
    communicator: &mut dyn Communicator,
    request: *const varlen_fa_parallel_request,
    tensors: impl FnOnce() -> Result<([List<Described<'a>>; 3], List<Described<'a>>)>,
    scores: *const varlen_fa_parallel_scores,
    lse: *const varlen_fa_tensor,
) -> Result<()> {
    let request = handles::get(Name::of("request"), request)?;
    let Request { device, layer, request } = &*request;
    let (inputs, out) = tensors()?;
    // SAFETY: by this function's contract.
    let lse = unsafe { Described::optional("lse", lse) }?;
    let outputs: Vec<_> = out.as_slice().iter().chain(&lse).collect();
    expect_apart(&outputs, &inputs.iter().flat_map(List::as_slice).collect::<Vec<_>>())?;
    // SAFETY: as above.
    let scores = unsafe { Scores::read(device, scores, &outputs) }?;
    let [q, k, v] = inputs;
    let [q, k, v] = [segments::inputs(device, &q)?, segments::inputs(device, &k)?, segments::inputs(device, &v)?];
    let mut outputs = Outputs::new(device, &out, lse.as_ref())?;
    let written = outputs.of_attention()?;
    layer.forward_into(communicator, scores.on(request), views(&q), views(&k), views(&v), written)?;
    outputs.finish()
}

/// What a call does to the scores, checked. It keeps the objects of its handles alive during the call.
#[derive(Debug, Default)]
struct Scores<'a> {
    bias: Option<Input<'a>>,
    modifiers: Option<Arc<ScoreModifiers>>,
}

impl<'a> Scores<'a> {
    /// Reads them; a bias must overlap no output.
    ///
    /// # Safety
    /// `scores` is null, misaligned, or points to what C initialised, whose bias obeys
    /// [`Described::new`].
    unsafe fn read(
        device: &Device,
        scores: *const varlen_fa_parallel_scores,
        outputs: &[&Described<'_>],
    ) -> Result<Self> {
        let name = Name::of("scores");
        // SAFETY: by this function's contract.
        let Some(scores) = unsafe { read_optional(name, scores) }? else { return Ok(Self::default()) };
        expect_zeros(name.field("reserved"), &scores.reserved)?;
        let mut bias = None;
        // SAFETY: as above.
        if let Some(described) = unsafe { Described::optional("bias", scores.bias) }? {
            expect_apart(outputs, &[&described])?;
            bias = Some(Input::of_any_strides(device, &described)?);
        }
        let modifiers = score_modifiers::optional(name.field("modifiers"), scores.modifiers)?;
        Ok(Self { bias, modifiers })
    }

    /// The call of a request.
    fn on<'s>(&'s self, request: &'s ParallelRequest) -> ParallelCall<'s> {
        let mut call = ParallelCall::from(request);
        if let Some(bias) = &self.bias {
            call = call.with_bias(bias.view());
        }
        if let Some(modifiers) = &self.modifiers {
            call = call.with_modifiers(modifiers);
        }
        call
    }
}
