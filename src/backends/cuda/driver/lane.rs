//! Copies from the memory of other GPUs of the process, beside the device's own work: on a stream of
//! their own, ordered with the devices' streams by events. Nothing here waits on the host.
//!
//! ```text
//!   lender's stream   … what writes the memory ─ mark ───────── … ──── take back ─ reuses it
//!                                                  ╲                    ╱
//!   reader's lane                                   ╲─ copy ─ event ───╱
//!                                                  ╱             ╲
//!   reader's stream   … what frees the room ─ mark ─── … ──────── join ─ reads what came
//! ```
//!
//! An event is recorded before anyone is given it, and a wait for it is enqueued after that: whatever
//! ranks do, streams cannot wait for one another in a circle.

use std::fmt;
#[cfg(feature = "nccl")]
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::DriverError;
use cudarc::driver::result::{self, event, stream};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUevent_flags, CUevent_wait_flags, CUmemorytype, CUresult,
    CUstream,
};

use crate::cache::DeviceId;
use crate::call::block::{Block, BlockCopy, Lines};
use crate::call::memory::{DeviceBuffer, Source};
use crate::error::Result;

use super::context::Context;
use super::count::{self, Count};
use super::graph::{Graph, Steps};
use super::memory::CudaBuffer;

/// An event of a context, without a time.
pub struct Event {
    raw: CUevent,
    context: Arc<Context>,
}

// SAFETY: an event may be used from any thread, and its context lives as long.
unsafe impl Send for Event {}
// SAFETY: as above; the driver locks it.
unsafe impl Sync for Event {}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {:p}", self.raw)
    }
}

impl Event {
    /// The context is current.
    fn new(context: &Arc<Context>) -> Result<Self> {
        let made = event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Self { raw: context.check(made, "making an event")?, context: Arc::clone(context) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: the event is live, and this is its only owner; the driver lets what waits for it run.
        let destroyed = unsafe { event::destroy(self.raw) };
        if let Err(error) = destroyed {
            log::debug!("an event is not destroyed: {error}");
        }
    }
}

/// How far a stream has come. The event is used again when nobody has the mark any more.
#[derive(Debug, Clone)]
pub struct Mark(Arc<Event>);

impl Mark {
    /// Whether both are the same place of the same stream.
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether the stream has come past it, or will never: the context is current.
    #[cfg(feature = "nccl")]
    pub(super) fn is_past(&self) -> bool {
        // SAFETY: the event is live and was recorded.
        let asked = unsafe { event::query(self.0.raw) };
        asked != Err(DriverError(CUresult::CUDA_ERROR_NOT_READY))
    }
}

/// A stream beside a device's own, which copies from other GPUs.
pub struct Lane {
    context: Arc<Context>,
    device: DeviceId,
    side: CUstream,
    events: Mutex<Vec<Arc<Event>>>,
    /// The end of the last copy that the device's stream does not wait for yet.
    last_copy: Mutex<Option<Mark>>,
    /// Where the device's work finds what has come, if it can look.
    arrivals: Option<Arrivals>,
}

/// A `u32` of the device's memory, which counts what copies have brought.
///
/// Each call of [`Lane::copy_blocks`] counts from 0 or from 2^31, in turns: half of the range away from all that the number has been
/// since it was there last. Who waits for it looks at the sign of the difference, so it takes none of the old numbers for a new one.
/// Thus every other call sets the same numbers, and what was described for one can be launched for another.
struct Arrivals {
    count: Count,
    turn: Mutex<Turn>,
}

/// Whose turn it is, and what was described for earlier calls, the last one at the end.
#[derive(Default)]
struct Turn {
    is_upper: bool,
    described: Vec<Described>,
    /// Whether the driver takes no such graphs.
    no_graphs: bool,
}

/// Copies of pieces that came at least once: what is the same in all such calls.
struct Described {
    /// Of each loan.
    places: Vec<Place>,
    pieces: Vec<PieceCopy>,
    /// How many of them come before what is written later.
    first: usize,
    /// Of each turn, from the second such call on: the first pieces, and the others.
    graphs: [Option<[Option<Graph>; 2]>; 2],
}

/// Where a loan lies and goes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    of: CUcontext,
    /// Of each part.
    from: Vec<u64>,
    to: u64,
}

/// How many of them a lane keeps: the layers of a model may each have memory of their own.
const MOST_DESCRIBED: usize = 64;

/// Fewer copies are enqueued one by one: the driver takes as long for a graph of two.
const LEAST_DESCRIBED: usize = 3;

/// What one piece copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceCopy {
    /// Of each loan.
    pub blocks: Vec<Vec<BlockCopy>>,
    /// Whether the loans' first marks are enough for it. Such pieces come before others.
    pub is_first: bool,
    /// What to add to the count when it is there.
    pub heads: u32,
}

// SAFETY: the stream may be used from any thread, and its context lives as long.
unsafe impl Send for Lane {}
// SAFETY: as above; what changes is behind locks.
unsafe impl Sync for Lane {}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("context", &self.context).field("side", &self.side).finish_non_exhaustive()
    }
}

/// Memory of a device that other devices may copy from until it is taken back.
#[derive(Debug)]
pub struct Loan {
    context: Arc<Context>,
    /// Where each part begins, and how its rows lie.
    addresses: Vec<u64>,
    lines: Vec<Lines>,
    /// Of all parts, without what lies between rows.
    bytes: u64,
    /// Where the lender's stream has written what is copied first, and all of it.
    ready: Mark,
    all_ready: Mark,
    state: Mutex<LoanState>,
}

#[derive(Debug)]
enum LoanState {
    Open,
    /// A copy was enqueued, whose end this is.
    Copied(Mark),
    /// The lender took it back before anyone came.
    Over,
}

impl Loan {
    /// Whether a peer has enqueued its copy.
    pub fn is_copied(&self) -> bool {
        matches!(*self.lock(), LoanState::Copied(_))
    }

    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How the rows of each part lie.
    pub fn lines(&self) -> &[Lines] {
        &self.lines
    }

    fn lock(&self) -> MutexGuard<'_, LoanState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lane {
    /// A lane of the device with an id, whose context this is.
    pub fn new(context: &Arc<Context>, device: DeviceId) -> Result<Self> {
        let _current = context.enter()?;
        let side = context.check(stream::create(stream::StreamKind::NonBlocking), "making a stream")?;
        let (events, last_copy) = (Mutex::default(), Mutex::default());
        Ok(Self { context: Arc::clone(context), device, side, events, last_copy, arrivals: None })
    }

    /// Lets this lane read memory of another one's device without the host, where the GPUs can. Where they cannot,
    /// the driver copies through host memory: slower, and as right. Whether it is another GPU and access is direct: then
    /// copy engines alone move what is copied.
    pub fn reach(&self, other: &Self) -> Result<bool> {
        if self.context.raw() == other.context.raw() {
            return Ok(false);
        }
        let (own_device, their_device) = (self.ordinal()?, other.ordinal()?);
        if own_device == their_device {
            return Ok(false);
        }
        let can = self.context.check(can_reach(own_device, their_device), "asking about access between GPUs")?;
        if !can {
            log::info!("GPU {own_device} has no access to GPU {their_device}: copies go through host memory");
            return Ok(false);
        }
        {
            let _current = self.context.enter()?;
            // SAFETY: both contexts are live: the lanes keep them.
            let reached = unsafe { enable_access(other.context.raw()) };
            self.context.check(reached, "enabling access between GPUs")?;
        }
        let _current = other.context.enter()?;
        // Memory of pools has rights of its own.
        let allowed = other.context.pool().let_read(own_device);
        other.context.check(allowed, "enabling access to a memory pool")?;
        Ok(true)
    }

    /// Counts from now on what [`copy_blocks`](Self::copy_blocks) brings; false where the driver sets no numbers on streams.
    pub fn count_arrivals(&mut self) -> Result<bool> {
        let _current = self.context.enter()?;
        if self.context.is_captured()? {
            return Ok(false);
        }
        let count = Count::new(&self.context, self.device)?;
        // SAFETY: the number is this device's, and so is the stream.
        let set = unsafe { count::set(&self.context, self.side, count.buffer().address(), 0) };
        match set {
            Ok(()) => self.arrivals = Some(Arrivals { count, turn: Mutex::default() }),
            Err(why) => log::info!("attention does not begin before all keys have come: {why}"),
        }
        Ok(self.arrivals.is_some())
    }

    /// Counts no more.
    pub fn count_nothing(&mut self) {
        self.arrivals = None;
    }

    /// The `u32` that counts them, if something does.
    pub fn arrivals(&self) -> Option<&dyn DeviceBuffer> {
        self.arrivals.as_ref().map(|arrivals| arrivals.count.buffer() as &dyn DeviceBuffer)
    }

    /// The stream beside the device's own.
    #[cfg(feature = "nccl")]
    pub(super) fn side(&self) -> CUstream {
        self.side
    }

    /// Where bytes of the device's memory lie, or what is wrong with them.
    #[cfg(feature = "nccl")]
    pub(super) fn address_of(&self, buffer: &dyn DeviceBuffer, bytes: &Range<u64>) -> Result<u64, String> {
        let buffer = self.own(buffer).map_err(|error| error.to_string())?;
        match bytes.start <= bytes.end && bytes.end <= buffer.size() {
            true => Ok(buffer.address() + bytes.start),
            false => Err(format!("bytes {bytes:?} of {}", buffer.size())),
        }
    }

    /// The end of what was enqueued on the lane so far, which [`join`](Self::join) waits for. The context is current.
    #[cfg(feature = "nccl")]
    pub(super) fn note_copies(&self) -> Result<Mark> {
        let end = self.record(self.side)?;
        *self.last_copy.lock().unwrap_or_else(PoisonError::into_inner) = Some(end.clone());
        Ok(end)
    }

    /// The index of the context's GPU.
    pub(super) fn ordinal(&self) -> Result<CUdevice> {
        let _current = self.context.enter()?;
        let mut device = 0;
        // SAFETY: a context is current, and the pointer is to a device.
        let asked = unsafe { sys::cuCtxGetDevice(&mut device) }.result();
        self.context.check(asked, "asking for the context's device")?;
        Ok(device)
    }

    /// Where the device's stream has come to. Copies of this lane come after that.
    pub fn mark(&self) -> Result<Mark> {
        let mark = self.note()?;
        let _current = self.context.enter()?;
        self.wait(self.side, &mark)?;
        Ok(mark)
    }

    /// What the stream beside the device's own does later comes after the device's work so far; in a graph too that the device's
    /// stream is being captured into, which the other one then is as well until [`join`](Self::join).
    #[cfg(feature = "nccl")]
    pub(super) fn fork(&self) -> Result<()> {
        let _current = self.context.enter()?;
        let mark = self.record(self.context.stream())?;
        self.wait(self.side, &mark)
    }

    /// Where the device's stream has come to, for others.
    pub fn note(&self) -> Result<Mark> {
        let _current = self.context.enter()?;
        self.context.expect_no_capture("exchanging with other ranks")?;
        self.record(self.context.stream())
    }

    /// Whether peers can copy from this memory: they have been given access to the library's own. Other memory need not be such that
    /// access to the context is enough.
    pub fn can_lend(&self, memory: &dyn DeviceBuffer) -> bool {
        self.own(memory).is_ok_and(CudaBuffer::is_own)
    }

    /// Lends parts of the device's memory, each from a byte on, which hold so many bytes. Those that are copied first are written where
    /// the first mark is, and all where the other one is. Whoever lends them [takes them back](Self::take_back) before the memory is
    /// given up or written.
    pub fn lend<'b>(
        &self,
        parts: impl Iterator<Item = (&'b dyn DeviceBuffer, u64, Lines)>,
        bytes: u64,
        [mark, all]: [&Mark; 2],
    ) -> Result<Loan> {
        let (mut addresses, mut lines) = (Vec::new(), Vec::new());
        for (buffer, start, of_part) in parts {
            let buffer = self.own(buffer)?;
            let start = start.min(buffer.size());
            addresses.push(buffer.address() + start);
            // What is not there is not copied: it does not fit.
            lines.push(Lines { bytes: of_part.bytes.min(buffer.size() - start), ..of_part });
        }
        Ok(Loan {
            context: Arc::clone(&self.context),
            addresses,
            lines,
            bytes,
            ready: mark.clone(),
            all_ready: all.clone(),
            state: Mutex::new(LoanState::Open),
        })
    }

    /// Copies what a peer has lent to the device's memory: each loan to a buffer, from a byte on. False, and nothing is
    /// copied, if one of them was taken back before, or does not fit.
    pub fn copy(&self, loans: &[(&Loan, &dyn DeviceBuffer, u64)]) -> Result<bool> {
        let mut copies = Vec::with_capacity(loans.len());
        for &(loan, to, start) in loans {
            // While it is locked it is not taken back.
            let (to, state) = (self.own(to)?, loan.lock());
            let fits = start.checked_add(loan.bytes).is_some_and(|end| end <= to.size());
            let (&[from], &[Lines { bytes, .. }]) = (&loan.addresses[..], &loan.lines[..]) else { return Ok(false) };
            if !matches!(*state, LoanState::Open) || !fits || bytes != loan.bytes {
                return Ok(false);
            }
            copies.push((loan, from, to.address() + start, state));
        }
        let _current = self.context.enter()?;
        let mut waited: Option<&Mark> = None;
        let enqueued = copies.iter().try_for_each(|&(loan, from, to, _)| {
            // A peer lends all messages of one exchange at one mark.
            if waited.is_none_or(|mark| !mark.is(&loan.ready)) {
                self.wait(self.side, &loan.ready)?;
                waited = Some(&loan.ready);
            }
            self.enqueue(loan, from, to)
        });
        // Recorded in any case: part of what was refused may be under way.
        let end = self.record(self.side)?;
        *self.last_copy.lock().unwrap_or_else(PoisonError::into_inner) = Some(end.clone());
        for (.., state) in &mut copies {
            **state = LoanState::Copied(end.clone());
        }
        enqueued.map(|()| true)
    }

    /// Copies pieces of what peers have lent, one piece of all after the other, and counts each. The device's later work comes after all
    /// is written on the peers' side, so it waits for copy engines alone. What the count says before the first piece; nothing, and
    /// nothing is copied, if a loan was taken back before, or does not fit, or nothing counts.
    pub fn copy_blocks(
        &self,
        loans: &[(&Loan, &dyn DeviceBuffer, u64)],
        pieces: Vec<PieceCopy>,
    ) -> Result<Option<u32>> {
        let Some(Arrivals { count, turn }) = &self.arrivals else { return Ok(None) };
        let mut lent = Vec::with_capacity(loans.len());
        for (at, &(loan, to, start)) in loans.iter().enumerate() {
            // While it is locked it is not taken back.
            let (to, state) = (self.own(to)?, loan.lock());
            let room = to.size().checked_sub(start).map_or(0, |room| room.min(loan.bytes));
            let fits = |copy: &BlockCopy| {
                let lent = loan.lines.get(copy.part).map_or(0, |lines| lines.bytes);
                let ends_by = |block: &Block, limit| block.end().is_some_and(|end| end <= limit);
                ends_by(&copy.from, lent) && ends_by(&copy.to, room)
            };
            let all_fit = |piece: &PieceCopy| piece.blocks.get(at).is_some_and(|blocks| blocks.iter().all(fits));
            if !matches!(*state, LoanState::Open) || !pieces.iter().all(all_fit) {
                return Ok(None);
            }
            lent.push((loan, to.address() + start, state));
        }
        let _current = self.context.enter()?;
        let mut turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        turn.is_upper = !turn.is_upper;
        let before = if turn.is_upper { 1 << 31 } else { 0 };
        let place = |loan: &Loan, to: u64| Place { of: loan.context.raw(), from: loan.addresses.clone(), to };
        let places: Vec<_> = lent.iter().map(|(loan, to, _)| place(loan, *to)).collect();
        let enqueue = || -> Result<()> {
            let Turn { is_upper, described, no_graphs } = &mut *turn;
            let is_all_written = lent.iter().all(|(loan, ..)| loan.ready.is(&loan.all_ready));
            let first = pieces.iter().take_while(|piece| piece.is_first || is_all_written).count();
            let (described, is_known) = remembered(described, (places, pieces, first));
            let Described { places, pieces, first, graphs } = described;
            let counted = Counted { count: count.buffer().address(), before };
            let (first, others) = pieces.split_at(*first);
            let graphs = &mut graphs[usize::from(*is_upper)];
            let copies: usize = pieces.iter().flat_map(|piece| &piece.blocks).map(Vec::len).sum();
            if is_known && graphs.is_none() && copies >= LEAST_DESCRIBED && !*no_graphs {
                match self.describe(places, [first, others], counted) {
                    Ok(made) => *graphs = Some(made),
                    Err(why) => {
                        log::info!("copies between GPUs are enqueued one by one: {why}");
                        *no_graphs = true;
                    }
                }
            }
            let heads_of = |pieces: &[PieceCopy]| pieces.iter().map(|piece| piece.heads).sum::<u32>();
            let all_counted = Counted { before: before.wrapping_add(heads_of(first)), ..counted };
            for (at, (pieces, counted)) in [(first, counted), (others, all_counted)].into_iter().enumerate() {
                if pieces.is_empty() {
                    continue;
                }
                for (loan, ..) in &lent {
                    self.wait(self.side, if at == 0 { &loan.ready } else { &loan.all_ready })?;
                }
                match graphs.as_ref().and_then(|graphs| graphs[at].as_ref()) {
                    // SAFETY: the stream is this lane's. The loans' memory and the rooms are those that were described, and in
                    // bounds; lenders keep theirs until the loans are over, and so does whoever made the rooms.
                    Some(graph) => unsafe { graph.launch(self.side) }?,
                    None => self.enqueue_pieces(places, pieces, counted)?,
                }
            }
            // Only copy engines are waited for from then on: the device's own work may take every multiprocessor and wait.
            lent.iter().try_for_each(|(loan, ..)| self.wait(self.context.stream(), &loan.all_ready))
        };
        let enqueued = enqueue();
        // Recorded in any case: part of what was refused may be under way.
        let end = self.record(self.side)?;
        *self.last_copy.lock().unwrap_or_else(PoisonError::into_inner) = Some(end.clone());
        for (_, _, state) in &mut lent {
            **state = LoanState::Copied(end.clone());
        }
        enqueued.map(|()| Some(before))
    }

    /// Graphs of some pieces, if there are any, and of those after them. The context is current.
    fn describe(
        &self,
        places: &[Place],
        parts: [&[PieceCopy]; 2],
        Counted { count, before }: Counted,
    ) -> Result<[Option<Graph>; 2], DriverError> {
        let mut number = before;
        let mut of_part = |pieces: &[PieceCopy]| {
            if pieces.is_empty() {
                return Ok(None);
            }
            let mut steps = Steps::new(&self.context)?;
            for PieceCopy { blocks, heads, .. } in pieces {
                for (place, block) in each_block(places, blocks) {
                    if let Some(copy) = copy_of(place, block) {
                        // SAFETY: whoever launches it sees to the memory. Access between the devices is enabled: else nothing counts.
                        unsafe { steps.copy(&copy) }?;
                    }
                }
                number = number.wrapping_add(*heads);
                // SAFETY: the number is the lane's, which keeps it as long as its graphs.
                unsafe { steps.set(count, number) }?;
            }
            steps.finish().map(Some)
        };
        Ok([of_part(parts[0])?, of_part(parts[1])?])
    }

    /// Pieces of loans that are locked and fit, one by one. The context is current.
    fn enqueue_pieces(&self, places: &[Place], pieces: &[PieceCopy], Counted { count, before }: Counted) -> Result<()> {
        let mut number = before;
        for PieceCopy { blocks, heads, .. } in pieces {
            for (place, block) in each_block(places, blocks) {
                self.enqueue_block(place, block)?;
            }
            number = number.wrapping_add(*heads);
            // SAFETY: the number is this device's, and so is the stream.
            unsafe { count::set(&self.context, self.side, count, number) }?;
        }
        Ok(())
    }

    /// A block of a loan that is locked and fits. The context is current.
    fn enqueue_block(&self, place: &Place, block: &BlockCopy) -> Result<()> {
        let Some(copy) = copy_of(place, block) else { return Ok(()) };
        let copy = sys::CUDA_MEMCPY3D_PEER {
            srcXInBytes: 0,
            srcY: 0,
            srcZ: 0,
            srcLOD: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: ptr::null(),
            srcDevice: copy.srcDevice,
            srcArray: ptr::null_mut(),
            srcContext: place.of,
            srcPitch: copy.srcPitch,
            srcHeight: copy.srcHeight,
            dstXInBytes: 0,
            dstY: 0,
            dstZ: 0,
            dstLOD: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: copy.dstDevice,
            dstArray: ptr::null_mut(),
            dstContext: self.context.raw(),
            dstPitch: copy.dstPitch,
            dstHeight: copy.dstHeight,
            WidthInBytes: copy.WidthInBytes,
            Height: copy.Height,
            Depth: copy.Depth,
        };
        // SAFETY: the source is a buffer that its lender keeps until the loan is over; the destination is in bounds, as
        // checked by `copy_blocks`. Each is of its own context, which the loan and the lane keep. The struct is read before
        // the call returns.
        let copied = unsafe { sys::cuMemcpy3DPeerAsync(&copy, self.side) }.result();
        self.context.check(copied, "copying from another rank")
    }

    /// The copy of a loan that is locked and fits. The context is current.
    fn enqueue(&self, loan: &Loan, from: u64, to: u64) -> Result<()> {
        let (from_context, to_context) = (loan.context.raw(), self.context.raw());
        let bytes = loan.bytes as usize;
        let copied = match (bytes, from_context == to_context) {
            (0, _) => Ok(()),
            // SAFETY: the source is a buffer that its lender keeps until the loan is over; the destination is in bounds,
            // as checked by `copy`. Both are of the current context.
            (_, true) => unsafe { result::memcpy_dtod_async(to, from, bytes, self.side) },
            // SAFETY: as above, each of its own context, which the loan and the lane keep.
            (_, false) => unsafe { result::memcpy_peer_async(to_context, to, from_context, from, bytes, self.side) },
        };
        self.context.check(copied, "copying from another rank")
    }

    /// Later work of the device comes after all copies of this lane.
    pub fn join(&self) -> Result<()> {
        let last = self.last_copy.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(last) = last else { return Ok(()) };
        let _current = self.context.enter()?;
        self.wait(self.context.stream(), &last)
    }

    /// Ends loans of this lane: nobody copies from them any more, and later work of the device comes after whoever did.
    pub fn take_back<'l>(&self, loans: impl Iterator<Item = &'l Loan>) -> Result<()> {
        let current = self.context.enter();
        let mut waited: Option<Mark> = None;
        let mut done = Ok(());
        // Each is taken back, whatever becomes of the others.
        for loan in loans {
            let state = std::mem::replace(&mut *loan.lock(), LoanState::Over);
            let LoanState::Copied(end) = state else { continue };
            // A peer copies all messages of one exchange before one mark.
            if waited.as_ref().is_some_and(|mark| mark.is(&end)) {
                continue;
            }
            done = done.and_then(|()| current.as_ref().map_err(Clone::clone).map(drop));
            if current.is_ok() {
                done = self.wait(self.context.stream(), &end).and(done);
            }
            waited = Some(end);
        }
        done
    }

    fn own<'a>(&self, buffer: &'a dyn DeviceBuffer) -> Result<&'a CudaBuffer> {
        Source::Device(buffer).owned_by(self.device, self.context.faults.device_name())
    }

    /// The context is current.
    fn record(&self, stream: CUstream) -> Result<Mark> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let free = events.iter().find(|event| Arc::strong_count(event) == 1);
        let free = match free {
            Some(event) => Arc::clone(event),
            None => {
                let made = Arc::new(Event::new(&self.context)?);
                events.push(Arc::clone(&made));
                made
            }
        };
        drop(events);
        // SAFETY: event and stream are live and of the same context. Whatever waited for the event before has been
        // enqueued, and keeps to what it was then: nobody had its mark any more.
        let recorded = unsafe { event::record(free.raw, stream) };
        self.context.check(recorded, "recording an event")?;
        Ok(Mark(free))
    }

    /// Later work of a stream of this context comes after a mark of any. The context is current.
    fn wait(&self, stream: CUstream, mark: &Mark) -> Result<()> {
        // SAFETY: both are live; the event may be of another context.
        let waits = unsafe { stream::wait_event(stream, mark.0.raw, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) };
        self.context.check(waits, "waiting for another stream")
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: the stream is this lane's own; the driver lets it finish its work.
        let destroyed = unsafe { stream::destroy(self.side) };
        if let Err(error) = destroyed {
            log::debug!("a stream is not destroyed: {error}");
        }
    }
}

/// The number that pieces are counted in, and what it says before them.
#[derive(Debug, Clone, Copy)]
struct Counted {
    count: CUdeviceptr,
    before: u32,
}

/// What was described for such copies, of which so many come first, and whether they came before. It is the last one then.
fn remembered(
    all: &mut Vec<Described>,
    (places, pieces, first): (Vec<Place>, Vec<PieceCopy>, usize),
) -> (&mut Described, bool) {
    let is_it =
        |described: &Described| described.places == places && described.pieces == pieces && described.first == first;
    let found = all.iter().rposition(is_it);
    let described = match found {
        Some(at) => all.remove(at),
        None => {
            if all.len() >= MOST_DESCRIBED {
                all.remove(0);
            }
            Described { places, pieces, first, graphs: [None, None] }
        }
    };
    all.push(described);
    let last = all.len() - 1;
    (&mut all[last], found.is_some())
}

/// The blocks of all loans, and of which loan each is.
fn each_block<'a>(
    places: &'a [Place],
    blocks: &'a [Vec<BlockCopy>],
) -> impl Iterator<Item = (&'a Place, &'a BlockCopy)> {
    places.iter().zip(blocks).flat_map(|(place, blocks)| blocks.iter().map(move |block| (place, block)))
}

/// The copy of a block of a loan, in memory that both GPUs have access to; none without bytes.
fn copy_of(place: &Place, BlockCopy { part, from, to }: &BlockCopy) -> Option<sys::CUDA_MEMCPY3D> {
    let source = place.from.get(*part)? + from.start;
    let Block { width, rows, slices, .. } = *from;
    let unified = CUmemorytype::CU_MEMORYTYPE_UNIFIED;
    (width > 0 && rows > 0 && slices > 0).then(|| sys::CUDA_MEMCPY3D {
        srcXInBytes: 0,
        srcY: 0,
        srcZ: 0,
        srcLOD: 0,
        srcMemoryType: unified,
        srcHost: ptr::null(),
        srcDevice: source,
        srcArray: ptr::null_mut(),
        reserved0: ptr::null_mut(),
        srcPitch: from.pitch as usize,
        srcHeight: from.slice_rows as usize,
        dstXInBytes: 0,
        dstY: 0,
        dstZ: 0,
        dstLOD: 0,
        dstMemoryType: unified,
        dstHost: ptr::null_mut(),
        dstDevice: place.to + to.start,
        dstArray: ptr::null_mut(),
        reserved1: ptr::null_mut(),
        dstPitch: to.pitch as usize,
        dstHeight: to.slice_rows as usize,
        WidthInBytes: width as usize,
        Height: rows as usize,
        Depth: slices as usize,
    })
}

/// Whether one GPU can have access to the memory of another.
fn can_reach(own: CUdevice, other: CUdevice) -> Result<bool, DriverError> {
    let mut can = 0;
    // SAFETY: both devices come from the driver, and the pointer is to an integer.
    unsafe { sys::cuDeviceCanAccessPeer(&mut can, own, other) }.result()?;
    Ok(can != 0)
}

/// Gives the current context access to another one's memory.
///
/// # Safety
/// The other context is live.
unsafe fn enable_access(other: CUcontext) -> Result<(), DriverError> {
    // SAFETY: by the caller's promise; there are no flags.
    match unsafe { sys::cuCtxEnablePeerAccess(other, 0) } {
        CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        // More GPUs than the system connects: the driver copies through host memory.
        CUresult::CUDA_ERROR_TOO_MANY_PEERS | CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED => Ok(()),
        outcome => outcome.result(),
    }
}
