//! What goes over a socket: frames of a kind, a tag, a length and bytes.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;

use super::digest::Tag;
use crate::error::Error;
use crate::kernel::BackendKind;

/// What messages call the making of connections.
pub(super) const OPERATION: &str = "connecting the ranks";

const DATA: u8 = 1;
const ABORT: u8 = 2;
/// The most bytes that a reason has.
const LONGEST_WHY: usize = 4096;

/// A frame to write.
#[derive(Debug, Clone, Copy)]
pub(super) enum Frame<'a> {
    Data {
        tag: &'a Tag,
        bytes: &'a [u8],
    },
    /// The last one: the sender gave up, because of a rank.
    Abort {
        rank: usize,
        why: &'a str,
    },
}

/// A frame that was read.
#[derive(Debug)]
pub(super) enum Received {
    Data { tag: Tag, bytes: Vec<u8> },
    Abort { rank: usize, why: String },
}

pub(super) fn write(mut socket: &TcpStream, frame: Frame<'_>) -> io::Result<()> {
    let (kind, tag, bytes) = match frame {
        Frame::Data { tag, bytes } => (DATA, *tag, bytes),
        Frame::Abort { rank, why } => {
            let mut tag = [0; 16];
            tag[..8].copy_from_slice(&(rank as u64).to_le_bytes());
            (ABORT, tag, &why.as_bytes()[..why.len().min(LONGEST_WHY)])
        }
    };
    let mut header = [kind; 25];
    header[1..17].copy_from_slice(&tag);
    header[17..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    socket.write_all(&header)?;
    socket.write_all(bytes)
}

/// The next frame, of any length: from a rank.
pub(super) fn read(socket: &TcpStream) -> io::Result<Received> {
    read_up_to(socket, u64::MAX)
}

/// The next frame, of at most `limit` bytes: from whoever.
pub(super) fn read_up_to(mut socket: &TcpStream, limit: u64) -> io::Result<Received> {
    let mut header = [0; 25];
    socket.read_exact(&mut header)?;
    let [mut tag, mut len] = [[0; 16], [0; 16]];
    tag.copy_from_slice(&header[1..17]);
    len[..8].copy_from_slice(&header[17..]);
    let len = u128::from_le_bytes(len) as u64;
    let limit = if header[0] == ABORT { LONGEST_WHY as u64 } else { limit };
    if !(DATA..=ABORT).contains(&header[0]) || len > limit {
        return Err(io::Error::new(ErrorKind::InvalidData, "it is no rank of varlen-fa"));
    }
    let count = usize::try_from(len).map_err(|_| ErrorKind::OutOfMemory)?;
    let mut bytes = crate::host_vec::zeroed(count).map_err(io::Error::other)?;
    socket.read_exact(&mut bytes)?;
    Ok(match header[0] {
        ABORT => {
            let why = String::from_utf8_lossy(&bytes).into_owned();
            // No rank is beyond `usize`; of a stranger it is a number like any other.
            Received::Abort { rank: u128::from_le_bytes(tag) as usize, why }
        }
        _ => Received::Data { tag, bytes },
    })
}

/// Whether a socket's time-out ended the operation; systems have two words for it.
pub(super) fn is_time_out(why: &io::Error) -> bool {
    matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// A refusal of the operating system.
pub(super) fn system(operation: &'static str, why: &io::Error) -> Error {
    Error::Backend { device: BackendKind::Cpu.name().to_owned(), operation, why: why.to_string() }
}
