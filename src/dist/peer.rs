//! Ranks that are threads of one process, whose GPUs copy from one another.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::communicator::{
    Communicator, DeviceBytes, Exchange, ExchangeInPieces, InPieces, Incoming, Outgoing, Part, Transfer, TransferMut,
};
use super::digest::Tag;
use super::host::HostCommunicator;
use super::mailbox::{Mailbox, Message};
use super::peer_lane::{Lane, PeerLane, lanes};
use crate::cache::DeviceId;
use crate::call::op::Backend;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::host_vec;
use crate::process::{self, OfProcess};

/// A [`Communicator`] between threads of one process, each with a CUDA device: the library's, or one over the caller's context and
/// stream. Tensors go from GPU to GPU, over NVLink or PCIe where the GPUs have access to one another's memory, else through host
/// memory by the driver. Several ranks may share a GPU.
///
/// Nothing waits for a GPU on the host: ranks hand one another addresses and events. Each rank copies what it receives on a stream
/// beside its device's own, so what `meanwhile` of [`exchange`](Communicator::exchange) launches runs at the same time. What the
/// device does later comes after what came, and after the peers' copies of what was sent.
///
/// Where each rank has a GPU of its own with direct access to the others, a gather of shards without masked tokens launches attention
/// while keys still come: its blocks wait on the GPU, for copies that are under way.
///
/// Making the ranks enables access between their contexts, which stays. While the device's stream is being captured into a graph an
/// exchange is refused with [`Error::StreamCaptured`]. In a child made by `fork` it is an error.
///
/// ```no_run
/// use varlen_fa::dist::PeerCommunicator;
/// use varlen_fa::{Device, DeviceChoice, Result};
///
/// let devices: Vec<Device> = (0..2).map(|rank| Device::new(DeviceChoice::Cuda(rank))).collect::<Result<_>>()?;
/// let ranks = PeerCommunicator::of_devices(&devices)?; // one for each thread
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug)]
pub struct PeerCommunicator {
    device: DeviceId,
    ranked: Ranked<Lane>,
}

/// How long a rank looks for a peer's message before it sleeps.
const LOOKS: Duration = Duration::from_millis(1);

/// How long a rank that takes back what it lent may take to say why.
const LAST_WORD: Duration = Duration::from_secs(1);

impl PeerCommunicator {
    /// A rank for each device, in order.
    ///
    /// # Errors
    /// [`Error::Sharding`] without a device, [`Error::DeviceKind`] for one that is not a CUDA device, [`Error::DeviceLost`],
    /// [`Error::Backend`].
    pub fn of_devices(devices: &[Device]) -> Result<Vec<Self>> {
        if devices.is_empty() {
            let (expected, got) = ("at least one device".to_owned(), "none".to_owned());
            return Err(Error::Sharding { argument: "devices", expected, got });
        }
        let backends = devices.iter().map(Device::backend).collect::<Result<Vec<&dyn Backend>>>()?;
        let ranked = Ranked::ranks(lanes(&backends)?);
        let ids = backends.iter().map(|backend| backend.id());
        Ok(ids.zip(ranked).map(|(device, ranked)| Self { device, ranked }).collect())
    }

    /// With another time-out: how long an exchange waits for the peers. It is [`HostCommunicator::TIME_OUT`] else.
    #[must_use]
    pub fn with_time_out(mut self, limit: Duration) -> Self {
        self.ranked.limit = limit;
        self
    }
}

impl Communicator for PeerCommunicator {
    fn rank(&self) -> usize {
        self.ranked.rank
    }

    fn world_size(&self) -> usize {
        self.ranked.mailboxes.len()
    }

    fn moves_memory_of(&self, device: &Device) -> bool {
        device.backend().is_ok_and(|backend| backend.id() == self.device)
    }

    fn exchange(&mut self, exchange: Exchange<'_>, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.ranked.exchange(exchange, meanwhile)
    }

    fn abort(&mut self, why: &str) {
        self.ranked.abort(why);
    }

    fn in_pieces(&mut self) -> Option<&mut dyn ExchangeInPieces> {
        // All lanes count, or none.
        self.ranked.lane.arrivals().is_some().then_some(self)
    }
}

impl ExchangeInPieces for PeerCommunicator {
    fn can_lend(&self, memory: &DeviceBytes<'_>) -> bool {
        self.ranked.can_lend(memory)
    }

    fn exchange_in_pieces(
        &mut self,
        exchange: InPieces<'_>,
        write_rest: &mut dyn FnMut() -> Result<bool>,
        attend: &mut dyn FnMut(DeviceBytes<'_>, u32) -> Result<()>,
    ) -> Result<()> {
        self.ranked.exchange_in_pieces(exchange, write_rest, attend)
    }
}

/// What one rank gives another.
#[derive(Debug)]
enum Parcel<L> {
    Bytes(Vec<u8>),
    Loan(Arc<L>),
}

type Mailboxes<L> = Arc<Vec<Mailbox<Parcel<<L as PeerLane>::Loan>>>>;

/// One rank: its lane, and the mailboxes of all.
#[derive(Debug)]
struct Ranked<L: PeerLane> {
    rank: usize,
    limit: Duration,
    lane: OfProcess<L>,
    mailboxes: Mailboxes<L>,
    /// The rank because of which this one gave up, and why.
    aborted: Option<(usize, String)>,
    process: usize,
}

/// What a rank has lent in one exchange. However that ends, all of it is taken back, and later work of the device comes after
/// every copy.
#[derive(Debug)]
struct Lending<'a, L: PeerLane> {
    lane: &'a L,
    /// To whom, in order.
    loans: Vec<(usize, Arc<L::Loan>)>,
}

impl<L: PeerLane> Lending<'_, L> {
    fn end(&mut self) -> Result<()> {
        let taken = self.lane.take_back(self.loans.iter().map(|(_, loan)| &**loan));
        self.loans.clear();
        self.lane.join().and(taken)
    }
}

impl<L: PeerLane> Drop for Lending<'_, L> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::debug!("an exchange between GPUs is not ended: {error}");
        }
    }
}

impl<L: PeerLane> Ranked<L> {
    fn ranks(lanes: Vec<L>) -> Vec<Self> {
        let world = lanes.len();
        let mailboxes = Arc::new((0..world).map(|_| Mailbox::new(world).looking(LOOKS)).collect::<Vec<_>>());
        let of_rank = |(rank, lane)| Self {
            rank,
            limit: HostCommunicator::TIME_OUT,
            lane: OfProcess::new(Arc::new(lane)),
            mailboxes: Arc::clone(&mailboxes),
            aborted: None,
            process: process::current(),
        };
        lanes.into_iter().enumerate().map(of_rank).collect()
    }

    /// Fails after an error, and in another process.
    fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.process != process::current() {
            let why = "the process was forked from the one that the communicator belongs to".to_owned();
            return Err(Error::RankLost { operation, rank: self.rank, why });
        }
        match &self.aborted {
            Some((rank, why)) => Err(Error::RankLost { operation, rank: *rank, why: why.clone() }),
            None => Ok(()),
        }
    }

    fn can_lend(&self, memory: &DeviceBytes<'_>) -> bool {
        self.lane.can_lend(memory.buffer())
    }

    /// An exchange in pieces, the first of which are written now. `write_rest` writes the others; `attend` works on what comes: the
    /// first argument counts the heads that are there, from the other one on. On the host it waits for nothing but what peers say
    /// before they attend themselves.
    fn exchange_in_pieces(
        &mut self,
        InPieces { operation, tag, own, own_bytes, to, rooms, pieces }: InPieces<'_>,
        write_rest: &mut dyn FnMut() -> Result<bool>,
        attend: &mut dyn FnMut(DeviceBytes<'_>, u32) -> Result<()>,
    ) -> Result<()> {
        self.check_open(operation)?;
        let within = (Instant::now(), self.limit);
        let lane = &**self.lane;
        let first = lane.mark()?;
        let all = if write_rest()? { lane.note()? } else { first.clone() };
        let mut lending = Lending { lane, loans: Vec::with_capacity(to.len()) };
        for to in to {
            if own.is_empty() {
                continue;
            }
            let loan = Arc::new(lane.lend(&own, own_bytes, [&first, &all])?);
            lending.loans.push((to, Arc::clone(&loan)));
            self.mailboxes[to].put(self.rank, Message { tag, body: Parcel::Loan(loan) });
        }
        let mut lent = Vec::with_capacity(rooms.len());
        for (rank, room) in &rooms {
            let message = self.mailboxes[self.rank].take(operation, *rank, within)?;
            lent.push((self.expect_loan((operation, tag), *rank, message, room.len())?, *room));
        }
        let loans: Vec<_> = lent.iter().map(|(loan, room)| (&**loan, *room)).collect();
        let copied = lane.copy_pieces(&loans, pieces)?;
        rooms.iter().for_each(|(rank, _)| self.mailboxes[*rank].wake());
        match (copied, lane.arrivals()) {
            (Some(before), Some(count)) => attend(DeviceBytes::first(count, 4), before)?,
            _ => {
                // One has given up, and says so after it took back what it lent.
                let rank = rooms.first().map_or(self.rank, |(rank, _)| *rank);
                self.mailboxes[self.rank].check_last_word(operation, rank, LAST_WORD)?;
                return Err(Error::RankLost { operation, rank, why: "it took back what it sent".to_owned() });
            }
        }
        for (to, loan) in &lending.loans {
            self.mailboxes[self.rank].wait_until(operation, *to, within, || L::is_copied(loan))?;
        }
        lending.end()
    }

    /// The loan of so many bytes that a message has to be.
    fn expect_loan(
        &self,
        (operation, tag): (&'static str, Tag),
        rank: usize,
        message: Message<Parcel<L::Loan>>,
        room: u64,
    ) -> Result<Arc<L::Loan>> {
        let differ = |what: String| Error::RanksDiffer { operation, own_rank: self.rank, rank, what };
        if message.tag != tag {
            return Err(differ("calls, masks or settings".to_owned()));
        }
        match message.body {
            Parcel::Loan(loan) if L::bytes_of(&loan) == room => Ok(loan),
            Parcel::Loan(loan) => Err(differ(format!("shapes ({} bytes where {room} fit)", L::bytes_of(&loan)))),
            Parcel::Bytes(_) => Err(differ("devices (one sends host memory, and one that of a GPU)".to_owned())),
        }
    }

    fn exchange(&mut self, exchange: Exchange<'_>, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        exchange.check_peers(self.rank, self.mailboxes.len())?;
        let operation = exchange.operation;
        self.check_open(operation)?;
        let within = (Instant::now(), self.limit);
        let is_of_device = exchange.sends.iter().any(|send| matches!(send.from, Transfer::Device(_)))
            || exchange.receives.iter().any(|receive| matches!(receive.to, TransferMut::Device(_)));
        let mark = if is_of_device { Some(self.lane.mark()?) } else { None };
        let mut lending = Lending { lane: &**self.lane, loans: Vec::with_capacity(exchange.sends.len()) };
        self.send(&exchange, mark.as_ref(), &mut lending)?;
        meanwhile()?;
        self.receive(exchange, within)?;
        for (to, loan) in &lending.loans {
            self.mailboxes[self.rank].wait_until(operation, *to, within, || L::is_copied(loan))?;
        }
        lending.end()
    }

    fn send(&self, exchange: &Exchange<'_>, mark: Option<&L::Mark>, lending: &mut Lending<'_, L>) -> Result<()> {
        for Outgoing { to, from } in &exchange.sends {
            let body = match (from, mark) {
                (Transfer::Device(memory), Some(mark)) => {
                    let loan = Arc::new(self.lane.lend(&[Part::whole(*memory)], memory.len(), [mark, mark])?);
                    lending.loans.push((*to, Arc::clone(&loan)));
                    Parcel::Loan(loan)
                }
                (Transfer::Host(bytes), _) => Parcel::Bytes(host_vec::copied(bytes)?),
                // There is a mark wherever there is device memory.
                (Transfer::Device(_), None) => continue,
            };
            self.mailboxes[*to].put(self.rank, Message { tag: exchange.tag, body });
        }
        Ok(())
    }

    fn receive(&self, exchange: Exchange<'_>, within: (Instant, Duration)) -> Result<()> {
        let Exchange { operation, tag, mut receives, .. } = exchange;
        let world = self.mailboxes.len();
        // Each from another one first, so that not all copy from the same GPU. The order of one peer's messages stays.
        receives.sort_by_key(|receive| (receive.from + world - self.rank) % world);
        let mut receives = receives.into_iter().peekable();
        let mut lent = Vec::new();
        while let Some(Incoming { from: rank, to }) = receives.next() {
            let message = self.mailboxes[self.rank].take(operation, rank, within)?;
            let differ = |what: String| Error::RanksDiffer { operation, own_rank: self.rank, rank, what };
            if message.tag != tag {
                return Err(differ("calls, masks or settings".to_owned()));
            }
            let expect_len = |got: u64, room: u64| match got == room {
                true => Ok(()),
                false => Err(differ(format!("shapes ({got} bytes where {room} fit)"))),
            };
            match (message.body, to) {
                (Parcel::Bytes(bytes), TransferMut::Host(into)) => {
                    expect_len(bytes.len() as u64, into.len() as u64)?;
                    into.copy_from_slice(&bytes);
                }
                (Parcel::Loan(loan), TransferMut::Device(into)) => {
                    expect_len(L::bytes_of(&loan), into.len())?;
                    lent.push((loan, into));
                }
                _ => return Err(differ("devices (one sends host memory, and one that of a GPU)".to_owned())),
            }
            // All that one peer lends at once: to mark where each copy ends would take the host longer.
            if receives.peek().is_none_or(|next| next.from != rank) && !lent.is_empty() {
                self.copy(operation, rank, &lent)?;
                lent.clear();
            }
        }
        Ok(())
    }

    fn copy(&self, operation: &'static str, rank: usize, lent: &[(Arc<L::Loan>, DeviceBytes<'_>)]) -> Result<()> {
        let loans: Vec<_> = lent.iter().map(|(loan, to)| (&**loan, *to)).collect();
        let is_copied = self.lane.copy(&loans)?;
        self.mailboxes[rank].wake();
        if is_copied {
            return Ok(());
        }
        // It has given up, and says so after it took back what it lent.
        self.mailboxes[self.rank].check_last_word(operation, rank, LAST_WORD)?;
        Err(Error::RankLost { operation, rank, why: "it took back what it sent".to_owned() })
    }

    fn abort(&mut self, why: &str) {
        if self.aborted.is_some() || self.process != process::current() {
            return;
        }
        // Where another rank was the first to give up, that is the reason.
        let cause = self.mailboxes[self.rank].cause();
        let (rank, why) = cause.unwrap_or_else(|| (self.rank, format!("it gave up: {why}")));
        for (peer, mailbox) in self.mailboxes.iter().enumerate() {
            if peer != self.rank {
                mailbox.abort(rank, &why);
            }
        }
        self.aborted = Some((rank, why));
    }
}

impl<L: PeerLane> Drop for Ranked<L> {
    fn drop(&mut self) {
        if self.process == process::current() {
            let others = self.mailboxes.iter().enumerate().filter(|&(peer, _)| peer != self.rank);
            others.for_each(|(_, mailbox)| mailbox.lose(self.rank, "its communicator was dropped"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::ops::Range;
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::thread;

    use super::*;
    use crate::call::block::{Block, BlockCopy, Lines};
    use crate::call::memory::{DeviceBuffer, Sink, Source};
    use crate::dist::communicator::{incoming, outgoing};
    use crate::dist::pieces::Pieces;

    /// Memory of a device that is none: what a lane moves, without a GPU.
    #[derive(Debug, Default, Clone)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    /// A rank that failed says so itself.
    fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
        shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    impl Memory {
        fn of(bytes: &[u8]) -> Self {
            Self(Arc::new(Mutex::new(bytes.to_vec())))
        }

        fn bytes(&self) -> Vec<u8> {
            locked(&self.0).clone()
        }
    }

    impl DeviceBuffer for Memory {
        fn device(&self) -> DeviceId {
            DeviceId::CPU
        }
        fn device_name(&self) -> &str {
            "none"
        }
        fn size(&self) -> u64 {
            locked(&self.0).len() as u64
        }
        fn space(&self) -> u64 {
            1
        }
        fn touched(&self, bytes: Range<u64>) -> Range<u64> {
            bytes
        }
        fn as_any(&self) -> &dyn Any {
            self
        }
    }

    /// Copies at once, and counts what is not ended.
    #[derive(Debug, Default)]
    struct TestLane {
        lent: Arc<Mutex<usize>>,
        unjoined: Mutex<usize>,
        /// What counts arrivals, and what it says.
        arrivals: Memory,
        counted: Mutex<u32>,
    }

    #[derive(Debug)]
    struct TestLoan {
        parts: Vec<(Memory, Range<usize>, Lines)>,
        bytes: u64,
        state: Mutex<Option<bool>>,
    }

    fn memory_of(bytes: &DeviceBytes<'_>) -> (Memory, Range<usize>) {
        let memory: &Memory = bytes.buffer().as_any().downcast_ref().unwrap();
        (memory.clone(), bytes.range().start as usize..bytes.range().end as usize)
    }

    /// Where the rows of a block lie.
    fn rows_of(block: Block, first: usize) -> impl Iterator<Item = Range<usize>> {
        let Block { start, width, pitch, rows, slice_rows, slices } = block;
        let lines = (0..slices).flat_map(move |slice| (0..rows).map(move |row| slice * slice_rows + row));
        lines.map(move |line| {
            let start = first + (start + line * pitch) as usize;
            start..start + width as usize
        })
    }

    impl TestLane {
        /// False if something was taken back before.
        fn copy_each(
            &self,
            loans: &[(&TestLoan, DeviceBytes<'_>)],
            copy: impl Fn(&TestLoan, &DeviceBytes<'_>),
        ) -> bool {
            let mut states: Vec<_> = loans.iter().map(|(loan, _)| locked(&loan.state)).collect();
            if states.iter().any(|state| **state != Some(false)) {
                return false;
            }
            for ((loan, to), state) in loans.iter().zip(&mut states) {
                copy(loan, to);
                *locked(&self.unjoined) += 1;
                **state = Some(true);
            }
            true
        }
    }

    impl PeerLane for TestLane {
        type Loan = TestLoan;
        type Mark = ();

        fn mark(&self) -> Result<()> {
            Ok(())
        }

        fn note(&self) -> Result<()> {
            Ok(())
        }

        fn arrivals(&self) -> Option<&dyn DeviceBuffer> {
            Some(&self.arrivals)
        }

        fn copy_pieces(&self, loans: &[(&TestLoan, DeviceBytes<'_>)], pieces: &Pieces) -> Result<Option<u32>> {
            let copied = self.copy_each(loans, |loan, to| {
                let lines: Vec<_> = loan.parts.iter().map(|(_, _, lines)| *lines).collect();
                let (to, room) = memory_of(to);
                let copies = pieces.all().iter().flat_map(|piece| pieces.copies(piece, &lines, room.len() as u64));
                for BlockCopy { part, from, to: into } in copies {
                    let (memory, range, _) = &loan.parts[part];
                    let from = rows_of(from, range.start).zip(rows_of(into, room.start));
                    for (from, into) in from {
                        let bytes = memory.bytes()[from].to_vec();
                        locked(&to.0)[into].copy_from_slice(&bytes);
                    }
                }
            });
            if !copied {
                return Ok(None);
            }
            let heads: usize = pieces.all().iter().map(|piece| piece.batches.len() * piece.heads.len()).sum();
            let mut counted = locked(&self.counted);
            let before = *counted;
            *counted += heads as u32;
            Ok(Some(before))
        }

        fn can_lend(&self, _: &dyn DeviceBuffer) -> bool {
            true
        }

        fn lend(&self, parts: &[Part<'_>], bytes: u64, _: [&(); 2]) -> Result<TestLoan> {
            let of_part = |part: &Part<'_>| {
                let (memory, range) = memory_of(&part.memory);
                (memory, range, part.lines())
            };
            *locked(&self.lent) += 1;
            Ok(TestLoan { parts: parts.iter().map(of_part).collect(), bytes, state: Mutex::new(Some(false)) })
        }

        fn bytes_of(loan: &TestLoan) -> u64 {
            loan.bytes
        }

        fn copy(&self, loans: &[(&TestLoan, DeviceBytes<'_>)]) -> Result<bool> {
            Ok(self.copy_each(loans, |loan, to| {
                let (memory, range, _) = &loan.parts[0];
                let from = memory.bytes()[range.clone()].to_vec();
                let (to, range) = memory_of(to);
                locked(&to.0)[range].copy_from_slice(&from);
            }))
        }

        fn is_copied(loan: &TestLoan) -> bool {
            *locked(&loan.state) == Some(true)
        }

        fn join(&self) -> Result<()> {
            *locked(&self.unjoined) = 0;
            Ok(())
        }

        fn take_back<'l>(&self, loans: impl Iterator<Item = &'l TestLoan>) -> Result<()> {
            for loan in loans {
                *locked(&loan.state) = None;
                *locked(&self.lent) -= 1;
            }
            Ok(())
        }
    }

    fn ranks(world: usize, limit: Duration) -> Vec<Ranked<TestLane>> {
        let mut ranks = Ranked::ranks((0..world).map(|_| TestLane::default()).collect());
        ranks.iter_mut().for_each(|rank| rank.limit = limit);
        ranks
    }

    const LONG: Duration = Duration::from_secs(60);

    /// Each rank sends two bytes to each, and receives two of each.
    fn all_to_all(rank: &mut Ranked<TestLane>, tag: u8, meanwhile: Result<()>) -> Result<Vec<u8>> {
        let (own, world) = (rank.rank, rank.mailboxes.len());
        let sent = Memory::of(&(0..world).flat_map(|to| [own as u8, to as u8]).collect::<Vec<_>>());
        let came = Memory::of(&vec![0xff; 2 * world]);
        let peers = || (0..world).filter(|&peer| peer != own);
        let place = |peer: usize| 2 * peer as u64..2 * peer as u64 + 2;
        let sends = peers().map(|to| Outgoing { to, from: outgoing(Source::Device(&sent), place(to)) }).collect();
        let receives = peers().map(|from| Incoming { from, to: incoming(Sink::Device(&came), place(from)) }).collect();
        let done =
            rank.exchange(Exchange { operation: "test", tag: [tag; 16], sends, receives }, &mut || meanwhile.clone());
        assert_eq!((*locked(&rank.lane.lent), *locked(&rank.lane.unjoined)), (0, 0), "all is ended");
        done.inspect_err(|why| rank.abort(&why.to_string()))?;
        Ok(came.bytes())
    }

    fn on_ranks<T: Send>(ranks: Vec<Ranked<TestLane>>, run: impl Fn(Ranked<TestLane>) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let run = &run;
            let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || run(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn what_is_lent_arrives_and_is_taken_back() {
        let all = on_ranks(ranks(4, LONG), |mut rank| {
            for call in 0..50 {
                let came = all_to_all(&mut rank, call, Ok(())).unwrap();
                for from in (0..4).filter(|&from| from != rank.rank) {
                    assert_eq!(came[2 * from..2 * from + 2], [from as u8, rank.rank as u8]);
                }
            }
        });
        assert_eq!(all.len(), 4);
    }

    #[test]
    fn a_rank_that_fails_meanwhile_is_lost_to_the_others() {
        let why = Error::HeadDim { got: 0 };
        let results = on_ranks(ranks(3, LONG), |mut rank| {
            let meanwhile = if rank.rank == 1 { Err(why.clone()) } else { Ok(()) };
            all_to_all(&mut rank, 0, meanwhile).and_then(|_| all_to_all(&mut rank, 1, Ok(())))
        });
        assert_eq!(results[1], Err(why));
        for other in [0, 2] {
            assert!(matches!(&results[other], Err(Error::RankLost { rank: 1, why, .. }) if why.contains("gave up")));
        }
    }

    #[test]
    fn a_rank_that_never_comes_is_timed_out() {
        let results = on_ranks(ranks(2, Duration::from_millis(30)), |mut rank| match rank.rank {
            0 => all_to_all(&mut rank, 0, Ok(())).map(drop),
            _ => {
                thread::sleep(Duration::from_millis(200));
                all_to_all(&mut rank, 0, Ok(())).map(drop)
            }
        });
        assert!(matches!(results[0], Err(Error::RankTimedOut { rank: 1, .. })), "{results:?}");
        // What the other one lent was taken back: the late one copies nothing.
        assert!(matches!(results[1], Err(Error::RankLost { rank: 0, .. })), "{results:?}");
    }

    #[test]
    fn other_calls_and_other_shapes_are_noticed() {
        let results = on_ranks(ranks(2, LONG), |mut rank| {
            let tag = rank.rank as u8;
            all_to_all(&mut rank, tag, Ok(()))
        });
        assert!(results.iter().any(|result| matches!(result, Err(Error::RanksDiffer { .. }))), "{results:?}");
        assert!(results.iter().all(Result::is_err), "{results:?}");

        let results = on_ranks(ranks(2, LONG), |mut rank| {
            let (memory, peer) = (Memory::of(&[1; 8]), 1 - rank.rank);
            let to = incoming(Sink::Device(&memory), 4..8);
            let from = outgoing(Source::Device(&memory), 0..2 + 2 * rank.rank as u64);
            let exchange = Exchange {
                operation: "test",
                tag: [0; 16],
                sends: vec![Outgoing { to: peer, from }],
                receives: vec![Incoming { from: peer, to }],
            };
            let done = rank.exchange(exchange, &mut || Ok(()));
            done.inspect_err(|why| rank.abort(&why.to_string()))
        });
        assert!(matches!(&results[1], Err(Error::RanksDiffer { what, .. }) if what.contains("2 bytes")), "{results:?}");
        assert!(results[0].is_err(), "{results:?}");
    }

    #[test]
    fn a_rank_that_is_dropped_is_lost() {
        let mut ranks = ranks(2, LONG);
        drop(ranks.pop());
        let result = all_to_all(&mut ranks[0], 0, Ok(()));
        assert!(matches!(result, Err(Error::RankLost { rank: 1, .. })), "{result:?}");
        // And it takes no more calls.
        assert!(all_to_all(&mut ranks[0], 0, Ok(())).is_err());
    }

    #[test]
    fn a_panic_meanwhile_takes_back_what_was_lent() {
        let lost = on_ranks(ranks(2, LONG), |mut rank| {
            if rank.rank == 1 {
                let lent = Arc::clone(&rank.lane.lent);
                let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    let memory = Memory::of(&[1; 8]);
                    let sends = vec![Outgoing { to: 0, from: outgoing(Source::Device(&memory), 0..2) }];
                    let exchange = Exchange { operation: "test", tag: [0; 16], sends, receives: vec![] };
                    rank.exchange(exchange, &mut || std::panic::panic_any("on purpose"))
                }));
                assert!(panicked.is_err());
                assert_eq!(*locked(&lent), 0);
                return None;
            }
            Some(all_to_all(&mut rank, 0, Ok(())))
        });
        assert!(matches!(lost[0], Some(Err(Error::RankLost { rank: 1, .. }))), "{lost:?}");
    }

    /// Each rank has two heads, keys and values of so many bytes, and gets what the others have. Also what the count said before. They lie
    /// as in tensors: `[k, -, v, -]` of both heads, of which `-` does not travel.
    fn in_pieces(
        rank: &mut Ranked<TestLane>,
        tag: u8,
        head_bytes: usize,
        attended: Result<()>,
    ) -> Result<(Vec<Vec<u8>>, u32)> {
        let (own_rank, world) = (rank.rank, rank.mailboxes.len());
        let peers: Vec<_> = (0..world).filter(|&peer| peer != own_rank).collect();
        let pieces = Pieces::new((2, 1), head_bytes, 1 << 20, 2);
        let bytes = 4 * head_bytes;
        let half = bytes / 2;
        let own = [own_rank as u8, 0xee, own_rank as u8, 0xee].map(|byte| vec![byte; half]).concat();
        let own = Memory::of(&own);
        let part = |which: usize| Part {
            memory: DeviceBytes::of(&own, (2 * which * half) as u64..((2 * which + 1) * half) as u64),
            pitch: 2 * half as u64,
            slice_rows: 1,
        };
        let parts = vec![part(0), part(1)];
        let rooms: Vec<_> = peers.iter().map(|_| Memory::of(&vec![0xff; bytes])).collect();
        let exchange = InPieces {
            operation: "test",
            tag: [tag; 16],
            own: parts,
            own_bytes: bytes as u64,
            to: peers.clone(),
            rooms: peers
                .iter()
                .zip(&rooms)
                .map(|(&from, room)| (from, DeviceBytes::first(room, bytes as u64)))
                .collect(),
            pieces: &pieces,
        };
        let mut before = None;
        // What is written last comes too.
        let last = 3 * half - 1;
        let mut write_rest = || -> Result<bool> {
            locked(&own.0)[last] = 100 + own_rank as u8;
            Ok(true)
        };
        let mut attend = |_: DeviceBytes<'_>, count: u32| -> Result<()> {
            before = Some(count);
            attended.clone()
        };
        let done = rank.exchange_in_pieces(exchange, &mut write_rest, &mut attend);
        assert_eq!((*locked(&rank.lane.lent), *locked(&rank.lane.unjoined)), (0, 0), "all is ended");
        done.inspect_err(|why| rank.abort(&why.to_string()))?;
        Ok((rooms.iter().map(Memory::bytes).collect(), before.unwrap()))
    }

    #[test]
    fn pieces_come_from_every_rank_and_are_counted() {
        on_ranks(ranks(3, LONG), |mut rank| {
            for call in 0..20_u8 {
                // Heads that come together, since they are narrow, and wide ones.
                let head_bytes = [2, 4096][usize::from(call % 2)];
                let (came, before) = in_pieces(&mut rank, call, head_bytes, Ok(())).unwrap();
                let peers = (0..3).filter(|&peer| peer != rank.rank as u8);
                let of_peer = |peer: u8| [vec![peer; 4 * head_bytes - 1], vec![100 + peer]].concat();
                assert_eq!((came, before), (peers.map(of_peer).collect(), 2 * u32::from(call)));
            }
        });
    }

    #[test]
    fn a_rank_that_fails_or_differs_in_pieces_is_an_error_on_the_others() {
        let why = Error::HeadDim { got: 0 };
        let results = on_ranks(ranks(3, LONG), |mut rank| {
            let attended = if rank.rank == 1 { Err(why.clone()) } else { Ok(()) };
            in_pieces(&mut rank, 0, 2, attended).and_then(|_| in_pieces(&mut rank, 1, 2, Ok(())))
        });
        assert_eq!(results[1], Err(why));
        for other in [0, 2] {
            assert!(matches!(&results[other], Err(Error::RankLost { rank: 1, why, .. }) if why.contains("gave up")));
        }
        let results = on_ranks(ranks(2, LONG), |mut rank| {
            let tag = rank.rank as u8;
            in_pieces(&mut rank, tag, 2, Ok(()))
        });
        assert!(results.iter().any(|result| matches!(result, Err(Error::RanksDiffer { .. }))), "{results:?}");
        assert!(results.iter().all(Result::is_err), "{results:?}");
        // One that comes too late finds that what it was lent is taken back.
        let results = on_ranks(ranks(2, Duration::from_millis(30)), |mut rank| {
            thread::sleep(Duration::from_millis(200 * rank.rank as u64));
            in_pieces(&mut rank, 0, 2, Ok(()))
        });
        assert!(matches!(results[0], Err(Error::RankTimedOut { rank: 1, .. })), "{results:?}");
        assert!(matches!(results[1], Err(Error::RankLost { rank: 0, .. })), "{results:?}");
    }

    #[test]
    fn only_cuda_devices_are_ranks() -> Result<()> {
        assert!(matches!(PeerCommunicator::of_devices(&[]), Err(Error::Sharding { argument: "devices", .. })));
        let cpu = Device::new(crate::config::DeviceChoice::Cpu)?;
        assert!(matches!(PeerCommunicator::of_devices(&[cpu]), Err(Error::DeviceKind { expected: "cuda", .. })));
        Ok(())
    }
}
