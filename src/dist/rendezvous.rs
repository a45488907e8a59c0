//! How processes find one another: [`Rendezvous`].
//!
//! Rank 0 listens. Each other rank connects, says who it is and where it listens itself, and is welcomed. When all have come, rank 0
//! sends each the addresses of all, and each rank connects to those between rank 0 and itself.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use super::digest::Tag;
use super::frame::{self, Frame, OPERATION, Received, system};
use crate::error::{Error, Result};

/// Where the processes of a [`HostCommunicator`](super::HostCommunicator) meet. The application carries it to each of them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rendezvous {
    /// An address on which rank 0 listens.
    Tcp(SocketAddr),
    /// A file that rank 0 writes, for processes of one machine: the others wait for it. A file that an earlier run left is noticed
    /// and replaced. It is removed when all have come.
    File(PathBuf),
}

/// Where rank 0 listens already, for applications that have a way of their own to tell the others: see
/// [`HostCommunicator::lead`](super::HostCommunicator::lead).
#[derive(Debug)]
pub struct MeetingPoint(TcpListener);

impl MeetingPoint {
    /// Listens. Port 0 takes one that is free.
    ///
    /// # Errors
    /// [`Error::Backend`] if the system refuses the address.
    pub fn listen(address: SocketAddr) -> Result<Self> {
        listen(address).map(Self)
    }

    /// Where: what the other ranks take for [`Rendezvous::Tcp`]. The host is the one that was given, which they must be able to reach.
    ///
    /// # Errors
    /// [`Error::Backend`].
    pub fn address(&self) -> Result<SocketAddr> {
        self.0.local_addr().map_err(refused)
    }
}

/// Comes first in what a rank says of itself.
const HELLO: &Tag = b"varlen-fa hello1";
/// The answer to it.
const WELCOME: &Tag = b"varlen-fa enter1";
/// The answer to that: whoever waited too long for the welcome has gone, and comes again.
const CONFIRM: &Tag = b"varlen-fa here 1";
/// Comes first in the addresses of all.
const TABLE: &Tag = b"varlen-fa ranks1";
/// How long the other side of a new connection may take to answer.
const GREETING: Duration = Duration::from_secs(3);
/// How long whoever connects to rank 0 may take to say who it is: others wait meanwhile, and a rank that is turned away comes again.
const HELLO_LIMIT: Duration = Duration::from_millis(500);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);
/// The most bytes of what a rank says of itself, and of its address.
const LONGEST_LINE: u64 = 128;

/// A connection to each of the other ranks.
pub(super) fn meet(
    rendezvous: &Rendezvous,
    (rank, world): (usize, usize),
    limit: Duration,
) -> Result<Vec<Option<TcpStream>>> {
    let meeting = Meeting { rank, world, started: Instant::now(), limit };
    match (world, rank, rendezvous) {
        (1, ..) => Ok(vec![None]),
        (_, 0, Rendezvous::Tcp(address)) => lead(&MeetingPoint::listen(*address)?, world, limit),
        (_, 0, Rendezvous::File(path)) => {
            let listener = listen((Ipv4Addr::LOCALHOST, 0).into())?;
            let id = RandomState::new().build_hasher().finish();
            write_whole(path, &format!("{} {id}\n", local(&listener)?)).map_err(refused)?;
            let sockets = meeting.lead(&listener, id);
            // Whether or not all came: nobody is waited for any more.
            let _ = fs::remove_file(path);
            sockets
        }
        _ => meeting.join(rendezvous),
    }
}

/// A connection to each of the other ranks, who come to where rank 0 listens.
pub(super) fn lead(point: &MeetingPoint, world: usize, limit: Duration) -> Result<Vec<Option<TcpStream>>> {
    Meeting { rank: 0, world, started: Instant::now(), limit }.lead(&point.0, 0)
}

/// One rank's way through the rendezvous.
#[derive(Debug, Clone, Copy)]
struct Meeting {
    rank: usize,
    world: usize,
    started: Instant,
    limit: Duration,
}

/// What a rank says of itself.
#[derive(Debug)]
struct Hello {
    id: u64,
    rank: usize,
    world: usize,
    /// Where it listens.
    port: u16,
}

impl Meeting {
    /// Rank 0: waits for all, and tells them of one another.
    fn lead(self, listener: &TcpListener, id: u64) -> Result<Vec<Option<TcpStream>>> {
        let mut peers = self.accept(listener, id, 1..self.world)?;
        let mut table = format!("{id}");
        for (peer, port) in &peers {
            let ip = peer.peer_addr().map_err(refused)?.ip();
            table.push_str(&format!(" {}", SocketAddr::new(ip, *port)));
        }
        for (at, (peer, _)) in peers.iter().enumerate() {
            let told = frame::write(peer, Frame::Data { tag: TABLE, bytes: table.as_bytes() });
            told.map_err(|why| self.lost(at + 1, &why))?;
        }
        Ok([None].into_iter().chain(peers.drain(..).map(|(peer, _)| Some(peer))).collect())
    }

    /// Any other rank.
    fn join(self, rendezvous: &Rendezvous) -> Result<Vec<Option<TcpStream>>> {
        let (first, listener, id) = loop {
            // The file may not be there yet, be of an earlier run, or be replaced right now.
            let tried = read_address(rendezvous).and_then(|(address, id)| self.greet(address, id));
            match tried {
                Ok(Ok((socket, listener, id))) => break (socket, listener, id),
                Ok(Err(turned_away)) => return Err(turned_away),
                Err(_) if self.left().is_zero() => return Err(self.timed_out(0)),
                Err(_) => thread::sleep(PAUSE.min(self.left())),
            }
        };
        let (id, addresses) = self.read_table(&first, id)?;
        let mut sockets = vec![None, None];
        sockets[0] = Some(first);
        sockets.resize_with(self.world, || None);
        for peer in 1..self.rank {
            let lost = |why: io::Error| self.lost(peer, &why);
            let socket = self.connect(addresses[peer - 1]).map_err(lost)?;
            self.say_hello(&socket, id, 0).map_err(lost)?;
            sockets[peer] = Some(socket);
        }
        let later = self.accept(&listener, id, self.rank + 1..self.world)?;
        for (at, (socket, _)) in later.into_iter().enumerate() {
            sockets[self.rank + 1 + at] = Some(socket);
        }
        Ok(sockets)
    }

    /// Connects to rank 0 and is welcomed, or turned away for good.
    fn greet(self, address: SocketAddr, id: u64) -> io::Result<Result<(TcpStream, TcpListener, u64)>> {
        let socket = self.connect(address)?;
        let listener = TcpListener::bind((socket.local_addr()?.ip(), 0))?;
        listener.set_nonblocking(true)?;
        self.say_hello(&socket, id, listener.local_addr()?.port())?;
        socket.set_read_timeout(Some(self.left().min(GREETING).max(PAUSE)))?;
        match frame::read_up_to(&socket, LONGEST_LINE)? {
            Received::Data { tag, .. } if tag == *WELCOME => {
                frame::write(&socket, Frame::Data { tag: CONFIRM, bytes: &[] })?;
                Ok(Ok((socket, listener, id)))
            }
            Received::Data { .. } => Err(ErrorKind::InvalidData.into()),
            Received::Abort { why, .. } => Ok(Err(Error::RankLost { operation: OPERATION, rank: 0, why })),
        }
    }

    /// The addresses of ranks 1 and up.
    fn read_table(self, first: &TcpStream, id: u64) -> Result<(u64, Vec<SocketAddr>)> {
        let lost = |why: io::Error| self.lost(0, &why);
        first.set_read_timeout(Some(self.left().max(PAUSE))).map_err(refused)?;
        let read = frame::read_up_to(first, LONGEST_LINE * self.world as u64).map_err(lost)?;
        let Received::Data { tag, bytes } = read else {
            return Err(lost(io::Error::other("it gave up")));
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut words = text.split(' ');
        let same_id = words.next().is_some_and(|word| word == id.to_string());
        let addresses: Vec<SocketAddr> = words.filter_map(|word| word.parse().ok()).collect();
        if tag != *TABLE || !same_id || addresses.len() + 1 != self.world {
            return Err(lost(io::Error::new(ErrorKind::InvalidData, "it sent no list of ranks")));
        }
        Ok((id, addresses))
    }

    fn say_hello(self, socket: &TcpStream, id: u64, port: u16) -> io::Result<()> {
        let hello = format!("{id} {} {} {port}", self.rank, self.world);
        frame::write(socket, Frame::Data { tag: HELLO, bytes: hello.as_bytes() })
    }

    fn connect(self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = TcpStream::connect_timeout(&address, self.left().max(PAUSE))?;
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(self.left().max(PAUSE)))?;
        Ok(socket)
    }

    /// A connection from each of these ranks, and where each listens. Whoever else connects is turned away.
    fn accept(self, listener: &TcpListener, id: u64, ranks: std::ops::Range<usize>) -> Result<Vec<(TcpStream, u16)>> {
        let mut peers: Vec<Option<(TcpStream, u16)>> = ranks.clone().map(|_| None).collect();
        while let Some(missing) = peers.iter().position(Option::is_none) {
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(_) if self.left().is_zero() => return Err(self.timed_out(ranks.start + missing)),
                Err(_) => {
                    thread::sleep(PAUSE.min(self.left()));
                    continue;
                }
            };
            let Ok(hello) = self.read_hello(&socket) else { continue };
            let turn_away = |why: &str| _ = frame::write(&socket, Frame::Abort { rank: self.rank, why });
            if hello.id != id {
                turn_away("this is another rendezvous");
                continue;
            }
            if hello.world != self.world {
                let what = format!("world size, {},", hello.world);
                let error = Error::RanksDiffer { operation: OPERATION, own_rank: self.rank, rank: hello.rank, what };
                turn_away(&error.to_string());
                return Err(error);
            }
            let place = hello.rank.checked_sub(ranks.start).and_then(|at| peers.get_mut(at));
            match place {
                Some(place @ None) => {
                    // Those who come later than rank 0 has said so need no welcome.
                    if self.rank == 0 && !self.welcome(&socket) {
                        continue;
                    }
                    *place = Some((socket, hello.port));
                }
                _ => turn_away(&format!("rank {} is there already, or none of the others", hello.rank)),
            }
        }
        Ok(peers.into_iter().flatten().collect())
    }

    /// Whether the rank is still there.
    fn welcome(self, socket: &TcpStream) -> bool {
        let confirmed = || -> io::Result<Received> {
            frame::write(socket, Frame::Data { tag: WELCOME, bytes: &[] })?;
            socket.set_read_timeout(Some(self.left().min(GREETING).max(PAUSE)))?;
            frame::read_up_to(socket, 0)
        };
        matches!(confirmed(), Ok(Received::Data { tag, .. }) if tag == *CONFIRM)
    }

    fn read_hello(self, socket: &TcpStream) -> io::Result<Hello> {
        // What accepts without waiting may give sockets that do not wait either.
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(self.left().max(PAUSE)))?;
        let patience = if self.rank == 0 { HELLO_LIMIT } else { GREETING };
        socket.set_read_timeout(Some(self.left().min(patience).max(PAUSE)))?;
        let invalid = || io::Error::from(ErrorKind::InvalidData);
        let Received::Data { tag, bytes } = frame::read_up_to(socket, LONGEST_LINE)? else { return Err(invalid()) };
        let text = String::from_utf8_lossy(&bytes);
        let words: Vec<u64> = text.split(' ').map_while(|word| word.parse().ok()).collect();
        let &[id, rank, world, port] = &words[..] else { return Err(invalid()) };
        if tag != *HELLO {
            return Err(invalid());
        }
        let size = |value: u64| usize::try_from(value).map_err(|_| invalid());
        let port = u16::try_from(port).map_err(|_| invalid())?;
        Ok(Hello { id, rank: size(rank)?, world: size(world)?, port })
    }

    fn left(self) -> Duration {
        self.limit.saturating_sub(self.started.elapsed())
    }

    fn timed_out(self, rank: usize) -> Error {
        Error::RankTimedOut { operation: OPERATION, rank, limit: self.limit }
    }

    fn lost(self, rank: usize, why: &io::Error) -> Error {
        match frame::is_time_out(why) {
            true => self.timed_out(rank),
            false => Error::RankLost { operation: OPERATION, rank, why: why.to_string() },
        }
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    Ok(listener)
}

fn local(listener: &TcpListener) -> Result<SocketAddr> {
    let port = listener.local_addr().map_err(refused)?.port();
    Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
}

/// The address of rank 0, and the number of its rendezvous.
fn read_address(rendezvous: &Rendezvous) -> io::Result<(SocketAddr, u64)> {
    let path = match rendezvous {
        Rendezvous::Tcp(address) => return Ok((*address, 0)),
        Rendezvous::File(path) => path,
    };
    let text = fs::read_to_string(path)?;
    let invalid = || io::Error::from(ErrorKind::InvalidData);
    let (address, id) = text.trim_end().split_once(' ').ok_or_else(invalid)?;
    Ok((address.parse().map_err(|_| invalid())?, id.parse().map_err(|_| invalid())?))
}

/// Writes a file that nobody ever sees half written.
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", process::id()));
    fs::write(&name, text)?;
    fs::rename(&name, path).inspect_err(|_| _ = fs::remove_file(&name))
}

fn refused(why: io::Error) -> Error {
    system(OPERATION, &why)
}
