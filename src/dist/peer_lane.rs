//! What copies between the devices of one process: [`PeerLane`], and that of CUDA.

use std::fmt::Debug;

use super::communicator::DeviceBytes;
#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
pub(super) use crate::backends::cuda::{Lane, lanes};
use crate::error::Result;
#[cfg(any(not(feature = "cuda"), target_arch = "wasm32"))]
pub(super) use without_cuda::{Lane, lanes};

/// How a rank's device copies from the devices of others.
pub(super) trait PeerLane: Debug + Send + Sync + 'static {
    /// Memory that others may copy from.
    type Loan: Debug + Send + Sync;
    /// How far the device's work has come.
    type Mark;
    /// How far it has come now. Copies come after that.
    fn mark(&self) -> Result<Self::Mark>;
    /// Lends what is written at the mark. It is taken back before the memory is given up.
    fn lend(&self, memory: &DeviceBytes<'_>, mark: &Self::Mark) -> Result<Self::Loan>;
    fn bytes_of(loan: &Self::Loan) -> u64;
    /// Copies all that one peer lends, beside the device's work; false, and nothing is copied, if any of it was taken back before.
    fn copy(&self, loans: &[(&Self::Loan, DeviceBytes<'_>)]) -> Result<bool>;
    fn is_copied(loan: &Self::Loan) -> bool;
    /// Later work of the device comes after all copies.
    fn join(&self) -> Result<()>;
    /// Nobody copies from them any more, and later work of the device comes after whoever did.
    fn take_back<'l>(&self, loans: impl Iterator<Item = &'l Self::Loan>) -> Result<()>;
}

#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
mod with_cuda {
    use super::{DeviceBytes, Lane, PeerLane, Result};
    use crate::backends::cuda::{Loan, Mark};

    impl PeerLane for Lane {
        type Loan = Loan;
        type Mark = Mark;

        fn mark(&self) -> Result<Mark> {
            self.mark()
        }

        fn lend(&self, memory: &DeviceBytes<'_>, mark: &Mark) -> Result<Loan> {
            self.lend(memory.buffer(), memory.range(), mark)
        }

        fn bytes_of(loan: &Loan) -> u64 {
            loan.bytes()
        }

        fn copy(&self, loans: &[(&Loan, DeviceBytes<'_>)]) -> Result<bool> {
            let places: Vec<_> = loans.iter().map(|(loan, to)| (*loan, to.buffer(), to.range().start)).collect();
            self.copy(&places)
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
    use super::{DeviceBytes, PeerLane, Result};
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

        fn lend(&self, _: &DeviceBytes<'_>, (): &()) -> Result<()> {
            match *self {}
        }

        fn bytes_of((): &()) -> u64 {
            0
        }

        fn copy(&self, _: &[(&(), DeviceBytes<'_>)]) -> Result<bool> {
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
