//! A rank of an NCCL communicator: sends and receives on a stream beside the device's own. Nothing waits for the GPU on the host,
//! and nothing hangs: a thread watches, and aborts what takes longer than the time-out or what has failed on any rank.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::call::memory::DeviceBuffer;
use crate::error::{Error, Result};

use super::capture::RelaxedCapture;
use super::context::Context;
use super::lane::{Lane, Mark};
use super::nccl_library::{Nccl, Progress, RawComm};

pub use super::nccl_library::UniqueId;

/// Between two looks of what watches.
const WATCH: Duration = Duration::from_millis(20);
/// Between two looks of a call that waits for NCCL itself.
const PAUSE: Duration = Duration::from_micros(20);
/// How long such a call looks again and again before it sleeps between two looks.
const LOOKS: Duration = Duration::from_micros(300);
/// What is under way may still end for so long after a rank has ended or given up.
const GRACE: Duration = Duration::from_secs(1);
/// How long a communicator may take to end in an orderly way.
const GOODBYE: Duration = Duration::from_secs(2);

/// Bytes of the device's memory for a peer, or from one.
pub type PeerBytes<'a> = (usize, &'a dyn DeviceBuffer, Range<u64>);

/// Why peers gave up, if they did.
pub type Cause = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// A rank.
pub struct NcclRank(Arc<Shared>);

impl fmt::Debug for NcclRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclRank").field("lane", &self.0.lane).finish_non_exhaustive()
    }
}

/// What the thread that watches has too.
struct Shared {
    nccl: &'static Nccl,
    context: Arc<Context>,
    /// Where it runs: it outlives the communicator.
    lane: Lane,
    state: Mutex<State>,
    cause: Cause,
}

struct State {
    /// None after it was aborted.
    comm: Option<RawComm>,
    /// Whether it is to be destroyed here: not the application's.
    is_own: bool,
    limit: Duration,
    /// The ends of what is under way, and when it began.
    pending: VecDeque<(Mark, Instant)>,
    /// What failed first.
    failure: Option<String>,
}

// SAFETY: the communicator is used under the lock alone, from any thread, one at a time.
unsafe impl Send for State {}

/// The id of a new communicator, for all its ranks.
pub fn unique_id(device: &str) -> Result<UniqueId> {
    let nccl = library(device)?;
    nccl.unique_id().map_err(|why| failed(device, "making an NCCL id", why))
}

fn library(device: &str) -> Result<&'static Nccl> {
    Nccl::get().map_err(|why| Error::DeviceUnavailable { device: format!("NCCL for {device}"), why })
}

fn failed(device: &str, operation: &'static str, why: String) -> Error {
    Error::Backend { device: device.to_owned(), operation, why }
}

impl NcclRank {
    /// Joins the communicator of an id as rank `rank` of `world`. Returns when all have.
    pub fn open(
        (context, lane): (&Arc<Context>, Lane),
        id: UniqueId,
        (rank, world): (usize, usize),
        limit: Duration,
        cause: Cause,
    ) -> Result<Self> {
        let device = context.faults.device_name();
        let nccl = library(device)?;
        log::info!("NCCL {} for {device}", nccl.version().unwrap_or_else(|why| why));
        let started = Instant::now();
        let comm = {
            let _current = context.enter()?;
            // Both fit: ranks are threads or processes.
            nccl.init(id, rank as c_int, world as c_int).map_err(|why| failed(device, "joining NCCL", why))?
        };
        let joined = Self::over(nccl, (context, lane), (comm, true), limit, cause)?;
        joined.0.lock().wait_for(&joined.0, started, "joining NCCL")?;
        Ok(joined)
    }

    /// A rank of the application's communicator, which stays the application's.
    ///
    /// # Safety
    /// The communicator is live until this is dropped, and nobody else uses it meanwhile.
    pub unsafe fn external(
        (context, lane): (&Arc<Context>, Lane),
        comm: RawComm,
        (rank, world): (usize, usize),
        limit: Duration,
        cause: Cause,
    ) -> Result<Self> {
        let device = context.faults.device_name();
        if comm.is_null() {
            let expected = "an ncclComm_t".to_owned();
            return Err(Error::Handle { argument: "comm", expected, got: "null".to_owned() });
        }
        let nccl = library(device)?;
        let _current = context.enter()?;
        // SAFETY: live by the caller's promise.
        let described =
            unsafe { nccl.describe(comm) }.map_err(|why| failed(device, "asking about a communicator", why))?;
        let ordinal = lane.ordinal()?;
        let expected = [rank as c_int, world as c_int, ordinal];
        if described != expected {
            let name = |[rank, world, ordinal]: [c_int; 3]| format!("rank {rank} of {world} on GPU {ordinal}");
            let (expected, got) = (name(expected), name(described));
            return Err(Error::Handle { argument: "comm", expected, got });
        }
        Self::over(nccl, (context, lane), (comm, false), limit, cause)
    }

    fn over(
        nccl: &'static Nccl,
        (context, lane): (&Arc<Context>, Lane),
        (comm, is_own): (RawComm, bool),
        limit: Duration,
        cause: Cause,
    ) -> Result<Self> {
        let state = State { comm: Some(comm), is_own, limit, pending: VecDeque::new(), failure: None };
        let shared = Shared { nccl, context: Arc::clone(context), lane, state: Mutex::new(state), cause };
        let shared = Arc::new(shared);
        let watched = Arc::downgrade(&shared);
        let watch = thread::Builder::new().name("varlen-fa NCCL".to_owned()).spawn(move || watch(&watched));
        watch.map_err(|why| failed(context.faults.device_name(), "starting a thread", why.to_string()))?;
        Ok(Self(shared))
    }

    pub fn set_limit(&self, limit: Duration) {
        self.0.lock().limit = limit;
    }

    /// Starts to send and receive, after the device's work so far and beside what it does later.
    pub fn start(&self, sends: &[PeerBytes<'_>], receives: &[PeerBytes<'_>]) -> Result<()> {
        let shared = &*self.0;
        let lane = &shared.lane;
        lane.fork()?;
        let _current = shared.context.enter()?;
        let is_captured = shared.context.is_captured()?;
        let mut state = shared.lock();
        let comm = state.live(shared)?;
        let (nccl, side) = (shared.nccl, lane.side());
        let operation = "sending to other ranks";
        let enqueue = || -> Result<(), String> {
            for (to, buffer, bytes) in sends {
                let from = lane.address_of(*buffer, bytes)?;
                // SAFETY: the communicator is live under the lock; the memory is in bounds, and whoever exchanges keeps it
                // until the stream has come past this.
                unsafe { nccl.send(from, bytes.end - bytes.start, *to as c_int, comm, side) }?;
            }
            for (from, buffer, bytes) in receives {
                let to = lane.address_of(*buffer, bytes)?;
                // SAFETY: as above.
                unsafe { nccl.receive(to, bytes.end - bytes.start, *from as c_int, comm, side) }?;
            }
            Ok(())
        };
        let started = Instant::now();
        let grouped = nccl.start_group().and_then(|()| {
            let enqueued = enqueue();
            // A group is ended whatever is in it.
            nccl.end_group().and_then(|progress| enqueued.map(|()| progress))
        });
        let taken = match grouped {
            Ok(Progress::Done) => Ok(()),
            Ok(Progress::Going) => state.wait_for(shared, started, operation),
            Err(why) => Err(state.fail(shared, why, operation)),
        };
        // In any case: some of it may be under way.
        let end = lane.note_copies();
        taken?;
        let end = end?;
        // What a graph holds runs when the application says: nobody knows how long it may take.
        if !is_captured {
            state.pending.push_back((end, started));
        }
        Ok(())
    }

    /// Later work of the device comes after all that was started.
    pub fn join(&self) -> Result<()> {
        self.0.lane.join()
    }

    /// Why the communicator takes no more calls, if it does not.
    pub fn failure(&self) -> Option<String> {
        self.0.lock().failure.clone()
    }

    /// Ends what is under way, on the device too.
    pub fn abort(&self, why: &str) {
        self.0.lock().abort(&self.0, why.to_owned());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn live(&self, shared: &Shared) -> Result<RawComm> {
        let device = shared.context.faults.device_name();
        let why = || self.failure.clone().unwrap_or_else(|| "it was aborted".to_owned());
        self.comm.ok_or_else(|| failed(device, "exchanging by NCCL", why()))
    }

    /// Waits until the communicator has taken what it was asked. This is NCCL's own work on the host, such as to connect.
    fn wait_for(&mut self, shared: &Shared, started: Instant, operation: &'static str) -> Result<()> {
        loop {
            let comm = self.live(shared)?;
            // SAFETY: live under the lock.
            let why = match unsafe { shared.nccl.progress(comm) } {
                Ok(Progress::Done) => return Ok(()),
                Ok(Progress::Going) => match (shared.cause)() {
                    Some(cause) => cause,
                    None if started.elapsed() < self.limit => {
                        // Most of what is asked is done at once.
                        if started.elapsed() < LOOKS {
                            thread::yield_now();
                        } else {
                            thread::sleep(PAUSE);
                        }
                        continue;
                    }
                    None => format!("other ranks did not answer within {:?}", self.limit),
                },
                Err(why) => why,
            };
            return Err(self.fail(shared, why, operation));
        }
    }

    fn fail(&mut self, shared: &Shared, why: String, operation: &'static str) -> Error {
        self.abort(shared, why.clone());
        failed(shared.context.faults.device_name(), operation, why)
    }

    fn abort(&mut self, shared: &Shared, why: String) {
        self.failure.get_or_insert(why);
        // The application's is the application's to abort.
        let Some(comm) = self.comm.take().filter(|_| self.is_own) else { return };
        let _current = shared.context.enter();
        // SAFETY: it was live, and is taken: this is the last call with it.
        let aborted = unsafe { shared.nccl.abort(comm) };
        if let Err(why) = aborted {
            log::debug!("an NCCL communicator is not aborted: {why}");
        }
    }

    /// Forgets what has ended; aborts if something takes too long or has failed.
    fn look(&mut self, shared: &Shared) {
        let Some(comm) = self.comm else { return };
        let Ok(_current) = shared.context.enter() else { return };
        // Another thread may be capturing a stream.
        let Ok(_relaxed) = RelaxedCapture::enter() else { return };
        while self.pending.front().is_some_and(|(end, _)| end.is_past()) {
            self.pending.pop_front();
        }
        // SAFETY: live under the lock.
        if let Err(why) = unsafe { shared.nccl.progress(comm) } {
            return self.abort(shared, why);
        }
        let Some((_, since)) = self.pending.front() else { return };
        if let Some(why) = (shared.cause)().filter(|_| since.elapsed() > GRACE) {
            self.abort(shared, why);
        } else if since.elapsed() > self.limit {
            self.abort(shared, format!("what was sent or received is not done after {:?}", self.limit));
        }
    }
}

/// Looks after a communicator until it is dropped.
fn watch(shared: &Weak<Shared>) {
    loop {
        thread::sleep(WATCH);
        let Some(shared) = shared.upgrade() else { return };
        shared.lock().look(&shared);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let (nccl, context) = (self.nccl, Arc::clone(&self.context));
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(comm) = state.comm.take_if(|_| state.is_own) else { return };
        let Ok(_current) = context.enter() else { return };
        let started = Instant::now();
        // SAFETY: live, and asked nothing more than progress.
        let mut ended = unsafe { nccl.finalize(comm) };
        while ended == Ok(Progress::Going) && started.elapsed() < GOODBYE {
            thread::sleep(PAUSE);
            // SAFETY: as above.
            ended = unsafe { nccl.progress(comm) };
        }
        let freed = match ended {
            // SAFETY: finalized, and the last call.
            Ok(Progress::Done) => unsafe { nccl.destroy(comm) },
            // SAFETY: the last call.
            _ => unsafe { nccl.abort(comm) },
        };
        if let Err(why) = freed {
            log::debug!("an NCCL communicator is not freed: {why}");
        }
    }
}
