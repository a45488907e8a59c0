//! What moves bytes between ranks: the trait [`Communicator`], and what it is given.

use std::fmt::Debug;
use std::ops::Range;

use super::pieces::Pieces;
use crate::call::block::Lines;
use crate::call::memory::{DeviceBuffer, Sink, Source};
use crate::device::Device;
use crate::error::{Error, Result};

/// One member of a group of ranks that exchange bytes. [`HostCommunicator`](super::HostCommunicator) is one over host memory.
///
/// There is one operation, [`exchange`](Self::exchange): each rank names, for each peer, what it sends there and what it receives
/// from there. All that sequence parallelism needs is a list of such transfers:
///
/// | collective | sends | receives |
/// |---|---|---|
/// | all-gather | the same bytes to every peer | from every peer, of its length |
/// | all-to-all | other bytes to each peer | from every peer, of its length |
/// | step of a ring | to the next rank | from the one before |
///
/// Lengths may differ for each pair; ranks that have nothing for one another do not name one another. The n-th transfer to a peer is
/// the n-th that the peer receives, so NCCL's grouped `ncclSend` and `ncclRecv` are one implementation. Addresses may be of the host or
/// of a device: see [`moves_memory_of`](Self::moves_memory_of).
///
/// Nothing waits for ever: a rank that does not answer within the communicator's time-out, or is lost, is an error. After an error a
/// communicator takes no more calls, on any rank; make a new one.
pub trait Communicator: Debug + Send {
    /// This rank, below [`world_size`](Self::world_size).
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Whether [`exchange`](Self::exchange) takes memory of this device. If not, tensors are copied to the host and back; host
    /// memory is always taken.
    fn moves_memory_of(&self, device: &Device) -> bool;

    /// Sends and receives. `meanwhile` is called once, on this thread, and may run while bytes move: it computes on what is being
    /// sent, or on something else. What is received is there when the call returns; with memory of a device, for later work on the
    /// device's stream.
    ///
    /// # Errors
    /// [`Error::RankLost`], [`Error::RankTimedOut`], [`Error::RanksDiffer`]; [`Error::Sharding`] for a rank that does not exist;
    /// those of `meanwhile`, and of the transport.
    fn exchange(&mut self, exchange: Exchange<'_>, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// Makes every later call fail, and calls of peers too that miss something from this rank. For a rank that cannot go on;
    /// `why` is part of the peers' error.
    fn abort(&mut self, why: &str);

    /// The 16 bytes of every rank, by rank. Host memory; for checks once a request.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn all_gather_16(&mut self, operation: &'static str, own: [u8; 16]) -> Result<Vec<[u8; 16]>> {
        let (rank, world) = (self.rank(), self.world_size());
        let mut all = vec![[0; 16]; world];
        let peers = (0..world).filter(|&peer| peer != rank);
        let sends = peers.map(|to| Outgoing { to, from: Transfer::Host(&own) }).collect();
        let receives = all.iter_mut().enumerate().filter(|&(peer, _)| peer != rank);
        let receives = receives.map(|(from, bytes)| Incoming { from, to: TransferMut::Host(bytes) }).collect();
        self.exchange(Exchange { operation, tag: [0; 16], sends, receives }, &mut || Ok(()))?;
        all[rank] = own;
        Ok(all)
    }

    /// This, where one call of attention may begin before all of its keys have come: on every rank or on none.
    #[doc(hidden)]
    fn in_pieces(&mut self) -> Option<&mut dyn ExchangeInPieces> {
        None
    }

    /// Waits for every rank.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn barrier(&mut self) -> Result<()> {
        self.all_gather_16("barrier", [0; 16]).map(drop)
    }
}

/// A communicator whose bytes come while a device's kernel that reads them runs. Of this library alone.
#[doc(hidden)]
pub trait ExchangeInPieces {
    /// Whether peers can copy from this memory of the device, which need not be the communicator's own.
    fn can_lend(&self, memory: &DeviceBytes<'_>) -> bool;

    /// Sends and receives in pieces, the first of which are written now. `write_rest` writes the others, if there are some. `attend` works on what comes:
    /// a `u32` of the device's memory counts the heads that are there, from the other argument on. The device's work that `attend` starts
    /// may wait for it on every multiprocessor; what comes after `attend` finds everything there.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    fn exchange_in_pieces(
        &mut self,
        exchange: InPieces<'_>,
        write_rest: &mut dyn FnMut() -> Result<bool>,
        attend: &mut dyn FnMut(DeviceBytes<'_>, u32) -> Result<()>,
    ) -> Result<()>;
}

/// Keys and values that go round in pieces, while attention to them is under way.
#[derive(Debug)]
pub struct InPieces<'a> {
    pub(super) operation: &'static str,
    pub(super) tag: [u8; 16],
    /// What every peer gets, all of it, in parts as `Pieces::copies` takes them; none if this rank has no row.
    pub(super) own: Vec<Part<'a>>,
    /// Its bytes, without what lies between rows.
    pub(super) own_bytes: u64,
    pub(super) to: Vec<usize>,
    /// Room for all that each peer has.
    pub(super) rooms: Vec<(usize, DeviceBytes<'a>)>,
    pub(super) pieces: &'a Pieces,
}

/// Memory that peers copy rows from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    pub memory: DeviceBytes<'a>,
    /// Bytes from token to token, and tokens from batch row to batch row, where that is looked at.
    pub pitch: u64,
    pub slice_rows: u64,
}

impl<'a> Part<'a> {
    /// All that lies there.
    pub(super) fn whole(memory: DeviceBytes<'a>) -> Self {
        Self { memory, pitch: 0, slice_rows: 0 }
    }

    /// How its rows lie.
    pub(super) fn lines(&self) -> Lines {
        Lines { bytes: self.memory.len, pitch: self.pitch, slice_rows: self.slice_rows }
    }
}

/// What a rank sends and receives in one [`Communicator::exchange`].
#[derive(Debug)]
pub struct Exchange<'a> {
    /// What it is for, in messages.
    pub operation: &'static str,
    /// Tells exchanges apart. A communicator that can compares it with the peers': [`Error::RanksDiffer`].
    pub tag: [u8; 16],
    /// What to send.
    pub sends: Vec<Outgoing<'a>>,
    /// What to receive.
    pub receives: Vec<Incoming<'a>>,
}

impl Exchange<'_> {
    /// Fails if a peer is this rank, or none of so many.
    pub(super) fn check_peers(&self, rank: usize, world: usize) -> Result<()> {
        let peers = self.sends.iter().map(|send| send.to);
        let mut peers = peers.chain(self.receives.iter().map(|receive| receive.from));
        match peers.find(|&peer| peer >= world || peer == rank) {
            None => Ok(()),
            Some(peer) => {
                let expected = format!("a rank below {world}, other than {rank}");
                Err(Error::Sharding { argument: "peer", expected, got: peer.to_string() })
            }
        }
    }
}

/// Bytes for a peer.
#[derive(Debug)]
pub struct Outgoing<'a> {
    /// The peer.
    pub to: usize,
    /// Where the bytes lie.
    pub from: Transfer<'a>,
}

/// Room for the bytes of a peer.
#[derive(Debug)]
pub struct Incoming<'a> {
    /// The peer.
    pub from: usize,
    /// Where the bytes go.
    pub to: TransferMut<'a>,
}

/// Consecutive bytes to send.
#[derive(Debug, Clone, Copy)]
pub enum Transfer<'a> {
    /// Of the host.
    Host(&'a [u8]),
    /// Of a device that the communicator [moves memory of](Communicator::moves_memory_of).
    Device(DeviceBytes<'a>),
}

/// Consecutive bytes to receive.
#[derive(Debug)]
pub enum TransferMut<'a> {
    /// Of the host.
    Host(&'a mut [u8]),
    /// Of a device that the communicator [moves memory of](Communicator::moves_memory_of).
    Device(DeviceBytes<'a>),
}

/// Consecutive bytes of a device's memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceBytes<'a> {
    buffer: &'a dyn DeviceBuffer,
    start: u64,
    len: u64,
}

impl<'a> DeviceBytes<'a> {
    /// The first ones of a buffer, which has as many.
    pub(super) fn first(buffer: &'a dyn DeviceBuffer, len: u64) -> Self {
        Self { buffer, start: 0, len }
    }

    /// Some of a buffer's, which has them.
    pub(super) fn of(buffer: &'a dyn DeviceBuffer, bytes: Range<u64>) -> Self {
        Self { buffer, start: bytes.start, len: bytes.end.saturating_sub(bytes.start) }
    }

    /// The memory that they are part of.
    pub(super) fn buffer(&self) -> &'a dyn DeviceBuffer {
        self.buffer
    }

    /// Which bytes of it.
    #[cfg(any(test, all(feature = "cuda", not(target_arch = "wasm32"))))]
    pub(super) fn range(&self) -> Range<u64> {
        self.start..self.start + self.len
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device address of the first byte, where the device has such: on CUDA.
    #[must_use]
    pub fn cuda_address(&self) -> Option<u64> {
        Some(self.buffer.cuda_address()? + self.start)
    }
}

impl Transfer<'_> {
    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Host(bytes) => bytes.len() as u64,
            Self::Device(bytes) => bytes.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl TransferMut<'_> {
    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Host(bytes) => bytes.len() as u64,
            Self::Device(bytes) => bytes.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Part of memory to send. The caller has checked that it is there.
pub(super) fn outgoing(memory: Source<'_>, bytes: Range<u64>) -> Transfer<'_> {
    match memory {
        Source::Host(host) => Transfer::Host(&host[bytes.start as usize..bytes.end as usize]),
        Source::Device(buffer) => {
            Transfer::Device(DeviceBytes { buffer, start: bytes.start, len: bytes.end - bytes.start })
        }
    }
}

/// Part of memory to receive. The caller has checked that it is there.
pub(super) fn incoming(memory: Sink<'_>, bytes: Range<u64>) -> TransferMut<'_> {
    match memory {
        Sink::Host(host) => TransferMut::Host(&mut host[bytes.start as usize..bytes.end as usize]),
        Sink::Device(buffer) => {
            TransferMut::Device(DeviceBytes { buffer, start: bytes.start, len: bytes.end - bytes.start })
        }
    }
}
