//! Ranks that exchange bytes of host memory: threads of one process, or processes joined by sockets.

use std::net::Shutdown;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::communicator::{Communicator, Exchange, Outgoing, Transfer, TransferMut};
use super::frame::{self, Frame};
use super::mailbox::{Mailbox, Message};
use super::rendezvous::{self, MeetingPoint, Rendezvous};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernel::BackendKind;
use crate::process;

/// A [`Communicator`] over host memory: between threads of one process ([`threads`](Self::threads)), or between processes joined
/// by TCP ([`connect`](Self::connect)), on one machine or several.
///
/// Tensors of other devices than the CPU are copied to the host and back. Messages carry a tag and their length, so ranks that call in
/// another order or with other shapes are noticed at once. In a child made by `fork` it is an error.
#[derive(Debug)]
pub struct HostCommunicator {
    rank: usize,
    limit: Duration,
    mailbox: Arc<Mailbox<Vec<u8>>>,
    /// One for each rank; none to itself.
    links: Vec<Option<Link>>,
    /// The rank because of which this one gave up, and why.
    aborted: Option<(usize, String)>,
    process: usize,
}

/// The way to a peer.
#[derive(Debug)]
enum Link {
    /// Its mailbox, in this process.
    Thread(Arc<Mailbox<Vec<u8>>>),
    /// A socket, from which a thread of this rank reads.
    Socket(TcpStream),
}

impl HostCommunicator {
    /// The time-out of communicators that are given no other.
    pub const TIME_OUT: Duration = Duration::from_secs(60);

    /// `world_size` ranks of one process, in order, one for each of its threads.
    ///
    /// # Errors
    /// [`Error::Sharding`] for a world without a rank.
    pub fn threads(world_size: usize) -> Result<Vec<Self>> {
        if world_size == 0 {
            return Err(no_ranks());
        }
        let mailboxes: Vec<_> = (0..world_size).map(|_| Arc::new(Mailbox::new(world_size))).collect();
        let link = |own: usize, peer: usize| (own != peer).then(|| Link::Thread(Arc::clone(&mailboxes[peer])));
        let of_rank = |rank: usize| Self {
            rank,
            limit: Self::TIME_OUT,
            mailbox: Arc::clone(&mailboxes[rank]),
            links: (0..world_size).map(|peer| link(rank, peer)).collect(),
            aborted: None,
            process: process::current(),
        };
        Ok((0..world_size).map(of_rank).collect())
    }

    /// Rank `rank` of `world_size` processes that meet at a rendezvous, and are then joined each with each by TCP. Returns when all are
    /// there. `limit` is for this, and the time-out afterwards.
    ///
    /// Nothing is encrypted and nobody is asked who he is: use networks that you trust.
    ///
    /// # Errors
    /// [`Error::Sharding`] for a rank outside the world; [`Error::RankTimedOut`] that names a rank which did not come;
    /// [`Error::RanksDiffer`] if ranks know of other world sizes, or two of them are the same rank; [`Error::RankLost`];
    /// [`Error::Backend`] if the system refuses a socket, a file or a thread.
    pub fn connect(rendezvous: &Rendezvous, rank: usize, world_size: usize, limit: Duration) -> Result<Self> {
        if rank >= world_size {
            let expected = format!("a rank below the world size, {world_size}");
            return Err(Error::Sharding { argument: "rank", expected, got: rank.to_string() });
        }
        Self::over(rendezvous::meet(rendezvous, (rank, world_size), limit)?, rank, limit)
    }

    /// Rank 0 of `world_size` processes, which listens already. The others [`connect`](Self::connect) to its address, by
    /// [`Rendezvous::Tcp`]. So the application can tell them an address that the system chose.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn lead(point: &MeetingPoint, world_size: usize, limit: Duration) -> Result<Self> {
        if world_size == 0 {
            return Err(no_ranks());
        }
        Self::over(rendezvous::lead(point, world_size, limit)?, 0, limit)
    }

    /// A rank with a socket to each other one.
    fn over(sockets: Vec<Option<TcpStream>>, rank: usize, limit: Duration) -> Result<Self> {
        let world_size = sockets.len();
        let mailbox = Arc::new(Mailbox::new(world_size));
        let refused = |why: std::io::Error| frame::system(frame::OPERATION, &why);
        let mut links = Vec::new();
        for (peer, socket) in sockets.into_iter().enumerate() {
            let Some(socket) = socket else {
                links.push(None);
                continue;
            };
            socket.set_read_timeout(None).map_err(refused)?;
            socket.set_write_timeout(Some(limit)).map_err(refused)?;
            let (reads, mailbox) = (socket.try_clone().map_err(refused)?, Arc::clone(&mailbox));
            let reader = move || read_all(reads, peer, &mailbox);
            thread::Builder::new().name(format!("from rank {peer}")).spawn(reader).map_err(refused)?;
            links.push(Some(Link::Socket(socket)));
        }
        Ok(Self { rank, limit, mailbox, links, aborted: None, process: process::current() })
    }

    /// With another time-out: how long an exchange waits for the peers.
    #[must_use]
    pub fn with_time_out(mut self, limit: Duration) -> Self {
        self.limit = limit;
        for link in self.links.iter().flatten() {
            if let Link::Socket(socket) = link {
                // Zero is no time-out in the socket's terms. A refusal leaves the longer one.
                let _ = socket.set_write_timeout(Some(limit.max(Duration::from_millis(1))));
            }
        }
        self
    }

    /// The time-out.
    #[cfg(feature = "nccl")]
    pub(super) fn time_out(&self) -> Duration {
        self.limit
    }

    /// What says why peers gave up or are lost, once one is.
    #[cfg(feature = "nccl")]
    pub(super) fn cause(&self) -> Box<dyn Fn() -> Option<String> + Send + Sync> {
        let mailbox = Arc::clone(&self.mailbox);
        Box::new(move || mailbox.trouble())
    }

    pub(super) fn check(&self, exchange: &Exchange<'_>) -> Result<()> {
        exchange.check_peers(self.rank, self.links.len())?;
        if self.process != process::current() {
            let why = "the process was forked from the one that the communicator belongs to".to_owned();
            return Err(Error::RankLost { operation: exchange.operation, rank: self.rank, why });
        }
        match &self.aborted {
            Some((rank, why)) => Err(Error::RankLost { operation: exchange.operation, rank: *rank, why: why.clone() }),
            None => Ok(()),
        }
    }

    fn send(&self, Exchange { operation, tag, sends, .. }: &Exchange<'_>) -> Result<()> {
        for Outgoing { to, from } in sends {
            let Transfer::Host(bytes) = *from else { return Err(device_memory()) };
            match &self.links[*to] {
                Some(Link::Thread(mailbox)) => {
                    let bytes = crate::host_vec::copied(bytes)?;
                    mailbox.put(self.rank, Message { tag: *tag, body: bytes });
                }
                Some(Link::Socket(socket)) => frame::write(socket, Frame::Data { tag, bytes }).map_err(|why| {
                    // A peer that gave up says why before it closes, to the thread that reads.
                    let (lost, wait) = match frame::is_time_out(&why) {
                        true => (Error::RankTimedOut { operation, rank: *to, limit: self.limit }, Duration::ZERO),
                        false => (Error::RankLost { operation, rank: *to, why: why.to_string() }, self.limit),
                    };
                    self.mailbox.check_last_word(operation, *to, wait).err().unwrap_or(lost)
                })?,
                None => {}
            }
        }
        Ok(())
    }
}

impl Communicator for HostCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.links.len()
    }

    fn moves_memory_of(&self, device: &Device) -> bool {
        device.capabilities().backend == BackendKind::Cpu
    }

    fn exchange(&mut self, exchange: Exchange<'_>, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.check(&exchange)?;
        let started = Instant::now();
        let by_socket = exchange.sends.iter().any(|send| matches!(self.links[send.to], Some(Link::Socket(_))));
        if by_socket {
            // Sockets hold little: what is sent goes out while this thread works.
            let (this, sent) = (&*self, &exchange);
            thread::scope(|scope| {
                let name = format!("to the peers of rank {}", self.rank);
                let sender = thread::Builder::new().name(name).spawn_scoped(scope, move || this.send(sent));
                let sender = sender.map_err(|why| frame::system(exchange.operation, &why))?;
                let worked = meanwhile();
                sender.join().unwrap_or_else(|_| Err(panicked(exchange.operation, self.rank)))?;
                worked
            })?;
        } else {
            self.send(&exchange)?;
            meanwhile()?;
        }
        let Exchange { operation, tag, receives, .. } = exchange;
        for receive in receives {
            let TransferMut::Host(into) = receive.to else { return Err(device_memory()) };
            let rank = receive.from;
            let message = self.mailbox.take(operation, rank, (started, self.limit))?;
            let differ = |what: String| Error::RanksDiffer { operation, own_rank: self.rank, rank, what };
            if message.tag != tag {
                return Err(differ("calls, masks or settings".to_owned()));
            }
            if message.body.len() != into.len() {
                return Err(differ(format!("shapes ({} bytes where {} fit)", message.body.len(), into.len())));
            }
            into.copy_from_slice(&message.body);
        }
        Ok(())
    }

    fn abort(&mut self, why: &str) {
        if self.aborted.is_some() || self.process != process::current() {
            return;
        }
        // Where another rank was the first to give up, that is the reason.
        let (rank, why) = self.mailbox.cause().unwrap_or_else(|| (self.rank, format!("it gave up: {why}")));
        for link in self.links.iter().flatten() {
            match link {
                Link::Thread(mailbox) => mailbox.abort(rank, &why),
                Link::Socket(socket) => {
                    // As well as it goes: a peer that cannot be told sees that the socket closes.
                    let _ = socket.set_write_timeout(Some(Duration::from_millis(200)));
                    let _ = frame::write(socket, Frame::Abort { rank, why: &why });
                    let _ = socket.shutdown(Shutdown::Write);
                }
            }
        }
        self.aborted = Some((rank, why));
    }
}

impl Drop for HostCommunicator {
    fn drop(&mut self) {
        // A child made by `fork` shares its parent's sockets.
        if self.process != process::current() {
            return;
        }
        for link in self.links.iter().flatten() {
            match link {
                Link::Thread(mailbox) => mailbox.lose(self.rank, "its communicator was dropped"),
                // Ends the thread that reads, too.
                Link::Socket(socket) => _ = socket.shutdown(Shutdown::Both),
            }
        }
    }
}

/// Puts what a peer sends into the mailbox, until it closes.
fn read_all(socket: TcpStream, peer: usize, mailbox: &Mailbox<Vec<u8>>) {
    loop {
        match frame::read(&socket) {
            Ok(frame::Received::Data { tag, bytes }) => mailbox.put(peer, Message { tag, body: bytes }),
            Ok(frame::Received::Abort { rank, why }) => return mailbox.abort(rank, &why),
            Err(why) => return mailbox.lose(peer, &format!("its connection ended: {why}")),
        }
    }
}

fn no_ranks() -> Error {
    let (expected, got) = ("at least one rank".to_owned(), "none".to_owned());
    Error::Sharding { argument: "world_size", expected, got }
}

fn device_memory() -> Error {
    let (expected, got) = ("host memory".to_owned(), "memory of a device".to_owned());
    Error::Handle { argument: "exchange", expected, got }
}

fn panicked(operation: &'static str, rank: usize) -> Error {
    Error::RankLost { operation, rank, why: "a thread of this rank panicked".to_owned() }
}
