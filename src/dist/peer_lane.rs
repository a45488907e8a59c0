//! What copies between the devices of one process: [`PeerLane`], and that of CUDA.

use std::fmt::Debug;

use super::communicator::{DeviceBytes, Part};
#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
use super::pieces::Piece;
use super::pieces::Pieces;
#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
pub(super) use crate::backends::cuda::{Lane, lanes};
use crate::call::memory::DeviceBuffer;
use crate::error::Result;
#[cfg(any(not(feature = "cuda"), target_arch = "wasm32"))]
pub(super) use without_cuda::{Lane, lanes};

/// How a rank's device copies from the devices of others.
pub(super) trait PeerLane: Debug + Send + Sync + 'static {
    /// Memory that others may copy from.
    type Loan: Debug + Send + Sync;
    /// How far the device's work has come.
    type Mark: Clone;
    /// How far it has come now. Copies come after that.
    fn mark(&self) -> Result<Self::Mark>;
    /// How far it has come now, for peers alone.
    fn note(&self) -> Result<Self::Mark>;
    /// Whether others can copy from this memory.
    fn can_lend(&self, memory: &dyn DeviceBuffer) -> bool;
    /// Lends parts of memory that hold so many bytes: what is copied first is written at the first mark, and all at the other one. They
    /// are taken back before the memory is given up.
    fn lend(&self, parts: &[Part<'_>], bytes: u64, marks: [&Self::Mark; 2]) -> Result<Self::Loan>;
    fn bytes_of(loan: &Self::Loan) -> u64;
    /// Copies all that one peer lends, each in one part, beside the device's work; false, and nothing is copied, if any of it was taken
    /// back before.
    fn copy(&self, loans: &[(&Self::Loan, DeviceBytes<'_>)]) -> Result<bool>;
    /// The number that counts the heads which [`copy_pieces`](Self::copy_pieces) brings, if this lane and those of all peers count:
    /// where copies need nothing but copy engines.
    fn arrivals(&self) -> Option<&dyn DeviceBuffer>;
    /// Copies what each peer lends in pieces, beside the device's work, which comes after all is written on the peers' side alone. What
    /// the number says before the first piece; nothing, and nothing is copied, if something was taken back before.
    fn copy_pieces(&self, loans: &[(&Self::Loan, DeviceBytes<'_>)], pieces: &Pieces) -> Result<Option<u32>>;
    fn is_copied(loan: &Self::Loan) -> bool;
    /// Later work of the device comes after all copies.
    fn join(&self) -> Result<()>;
    /// Nobody copies from them any more, and later work of the device comes after whoever did.
    fn take_back<'l>(&self, loans: impl Iterator<Item = &'l Self::Loan>) -> Result<()>;
}

#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
mod with_cuda {
    use super::{DeviceBuffer, DeviceBytes, Lane, Part, PeerLane, Piece, Pieces, Result};
    use crate::backends::cuda::{Loan, Mark, PieceCopy};

    impl PeerLane for Lane {
        type Loan = Loan;
        type Mark = Mark;

        fn mark(&self) -> Result<Mark> {
            self.mark()
        }

        fn note(&self) -> Result<Mark> {
            self.note()
        }

        fn can_lend(&self, memory: &dyn DeviceBuffer) -> bool {
            self.can_lend(memory)
        }

        fn lend(&self, parts: &[Part<'_>], bytes: u64, marks: [&Mark; 2]) -> Result<Loan> {
            let parts = parts.iter().map(|part| (part.memory.buffer(), part.memory.range().start, part.lines()));
            self.lend(parts, bytes, marks)
        }

        fn bytes_of(loan: &Loan) -> u64 {
            loan.bytes()
        }

        fn copy(&self, loans: &[(&Loan, DeviceBytes<'_>)]) -> Result<bool> {
            let places: Vec<_> = loans.iter().map(|(loan, to)| (*loan, to.buffer(), to.range().start)).collect();
            self.copy(&places)
        }

        fn arrivals(&self) -> Option<&dyn DeviceBuffer> {
            self.arrivals()
        }

        fn copy_pieces(&self, loans: &[(&Loan, DeviceBytes<'_>)], pieces: &Pieces) -> Result<Option<u32>> {
            let places: Vec<_> = loans.iter().map(|(loan, to)| (*loan, to.buffer(), to.range().start)).collect();
            let of_piece = |piece: &Piece| PieceCopy {
                blocks: loans.iter().map(|(loan, to)| pieces.copies(piece, loan.lines(), to.len())).collect(),
                is_first: piece.is_first,
                // Fits: heads and batch rows are counted in 32 bits by kernels.
                heads: (piece.batches.len() * piece.heads.len()) as u32,
            };
            self.copy_blocks(&places, pieces.all().iter().map(of_piece).collect())
        }

        fn is_copied(loan: &Loan) -> bool {
            loan.is_copied()
        }

        fn join(&self) -> Result<()> {
            self.join()
        }

        fn take_back<'l>(&self, loans: impl Iterator<Item = &'l Loan>) -> Result<()> {
            self.take_back(loans)
        }
    }
}

/// A library that is built without CUDA has no device whose memory others copy.
#[cfg(any(not(feature = "cuda"), target_arch = "wasm32"))]
mod without_cuda {
    use super::{DeviceBuffer, DeviceBytes, Part, PeerLane, Pieces, Result};
    use crate::call::op::Backend;
    use crate::error::Error;

    /// There is none.
    #[derive(Debug)]
    pub(in crate::dist) enum Lane {}

    pub(in crate::dist) fn lanes(devices: &[&dyn Backend]) -> Result<Vec<Lane>> {
        match devices.first() {
            None => Ok(Vec::new()),
            Some(device) => {
                Err(Error::DeviceKind { argument: "devices", expected: "cuda", got: device.name().to_owned() })
            }
        }
    }

    impl PeerLane for Lane {
        type Loan = ();
        type Mark = ();

        fn mark(&self) -> Result<()> {
            match *self {}
        }

        fn note(&self) -> Result<()> {
            match *self {}
        }

        fn can_lend(&self, _: &dyn DeviceBuffer) -> bool {
            match *self {}
        }

        fn lend(&self, _: &[Part<'_>], _: u64, _: [&(); 2]) -> Result<()> {
            match *self {}
        }

        fn bytes_of((): &()) -> u64 {
            0
        }

        fn copy(&self, _: &[(&(), DeviceBytes<'_>)]) -> Result<bool> {
            match *self {}
        }

        fn arrivals(&self) -> Option<&dyn DeviceBuffer> {
            match *self {}
        }

        fn copy_pieces(&self, _: &[(&(), DeviceBytes<'_>)], _: &Pieces) -> Result<Option<u32>> {
            match *self {}
        }

        fn is_copied((): &()) -> bool {
            false
        }

        fn join(&self) -> Result<()> {
            match *self {}
        }

        fn take_back<'l>(&self, _: impl Iterator<Item = &'l ()>) -> Result<()> {
            match *self {}
        }
    }
}
