//! Ranks in several processes or hosts, whose GPUs send and receive by NCCL.

use std::ffi::c_void;
use std::time::Duration;

use super::communicator::{Communicator, DeviceBytes, Exchange, Incoming, Outgoing, Transfer, TransferMut};
use super::host::HostCommunicator;
use crate::backends::cuda::{self, NcclRank};
use crate::cache::DeviceId;
use crate::device::Device;
use crate::error::{Error, Result};

/// A [`Communicator`] by NCCL, with the feature `nccl`: one CUDA device a rank, in processes of one host or of several. It has run
/// on two GPUs of one host, in threads and in processes, and never between hosts.
///
/// The library is loaded at run time (`libnccl.so.2`, version 2.14 or later). Ranks first meet as those of a [`HostCommunicator`],
/// by TCP or a file, or as threads; that one carries NCCL's id to all, and later what is in host memory and why a rank gave up.
///
/// Sends and receives run on a stream beside the device's own, so what `meanwhile` of [`exchange`](Communicator::exchange) launches
/// runs at the same time. Nothing waits for the GPU on the host. A thread watches: what is not done within the time-out, or has failed on
/// any rank, is aborted, on the device too, and later calls fail. So the time-out must be longer than the device's work between two
/// exchanges. Tags are not compared: ranks that call in another order are noticed by sizes or by the time-out.
///
/// Calls can be captured into a CUDA graph, after a first direct call of their request and with the output given: every rank then starts
/// its graph, in the same order. Nobody watches over what a graph sends.
///
/// ```no_run
/// use std::time::Duration;
/// use varlen_fa::dist::{HostCommunicator, NcclCommunicator, Rendezvous};
/// use varlen_fa::{Device, DeviceChoice, Result};
///
/// fn join(rank: usize, world: usize) -> Result<NcclCommunicator> {
///     let meeting = Rendezvous::File("/tmp/meeting".into());
///     let control = HostCommunicator::connect(&meeting, rank, world, Duration::from_secs(60))?;
///     NcclCommunicator::new(control, &Device::new(DeviceChoice::Cuda(rank))?)
/// }
/// ```
#[derive(Debug)]
pub struct NcclCommunicator {
    // Ends before the peers hear that this rank has.
    nccl: NcclRank,
    control: HostCommunicator,
    device: DeviceId,
}

impl NcclCommunicator {
    /// A rank for a CUDA device: the library's, or one over the caller's context and stream. Every rank calls it, each with a GPU of
    /// its own; it returns when all have. The time-out is that of `control`.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] without NCCL, with what to install; [`Error::DeviceKind`]; [`Error::Backend`] with NCCL's
    /// words; those of [`HostCommunicator`]. Every rank gets one if any does.
    pub fn new(mut control: HostCommunicator, device: &Device) -> Result<Self> {
        let made = Self::join(&mut control, device);
        let nccl = made.inspect_err(|why| control.abort(&why.to_string()))?;
        Ok(Self { nccl, device: device.backend()?.id(), control })
    }

    fn join(control: &mut HostCommunicator, device: &Device) -> Result<NcclRank> {
        const OPERATION: &str = "sharing an NCCL id";
        let (rank, world) = (control.rank(), control.world_size());
        let backend = device.backend()?;
        let mut id = [0; 128];
        let (mut sends, mut receives) = (Vec::new(), Vec::new());
        let made;
        if rank == 0 {
            made = cuda::nccl_id(backend)?;
            id = made;
            sends.extend((1..world).map(|to| Outgoing { to, from: Transfer::Host(&made) }));
        } else {
            receives.push(Incoming { from: 0, to: TransferMut::Host(&mut id) });
        }
        control.exchange(Exchange { operation: OPERATION, tag: [0; 16], sends, receives }, &mut || Ok(()))?;
        cuda::nccl_rank(backend, id, (rank, world), control.time_out(), control.cause())
    }

    /// A rank of the caller's communicator: an `ncclComm_t` of the same rank and number of ranks as `control`, and of the device's
    /// GPU. It stays the caller's and is never aborted or destroyed here; after an error, that is the caller's to do.
    ///
    /// # Errors
    /// [`Error::Handle`] for null, or a communicator of another rank, world or GPU; and as [`new`](Self::new).
    ///
    /// # Safety
    /// `comm` is a live `ncclComm_t` of the NCCL library that this process has loaded, until this is dropped. Nobody else uses it in
    /// between the calls of one request.
    pub unsafe fn from_raw(mut control: HostCommunicator, device: &Device, comm: *mut c_void) -> Result<Self> {
        let backend = device.backend()?;
        let place = (control.rank(), control.world_size());
        let (limit, cause) = (control.time_out(), control.cause());
        // SAFETY: by the caller's promise.
        let made = unsafe { cuda::external_nccl_rank(backend, comm, place, limit, cause) };
        let nccl = made.inspect_err(|why| control.abort(&why.to_string()))?;
        Ok(Self { nccl, device: backend.id(), control })
    }

    /// With another time-out: how long an exchange may take.
    #[must_use]
    pub fn with_time_out(mut self, limit: Duration) -> Self {
        self.control = self.control.with_time_out(limit);
        self.nccl.set_limit(limit);
        self
    }
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn world_size(&self) -> usize {
        self.control.world_size()
    }

    fn moves_memory_of(&self, device: &Device) -> bool {
        device.backend().is_ok_and(|backend| backend.id() == self.device)
    }

    fn exchange(&mut self, exchange: Exchange<'_>, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.control.check(&exchange)?;
        let Exchange { operation, tag, sends, receives } = exchange;
        if let Some(why) = self.nccl.failure() {
            return Err(Error::RankLost { operation, rank: self.control.rank(), why });
        }
        let (mut host, mut device) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        let of_device = |bytes: &DeviceBytes<'_>| bytes.range();
        for Outgoing { to, from } in sends {
            match from {
                Transfer::Host(_) => host.0.push(Outgoing { to, from }),
                Transfer::Device(bytes) => device.0.push((to, bytes.buffer(), of_device(&bytes))),
            }
        }
        for Incoming { from, to } in receives {
            match to {
                TransferMut::Host(_) => host.1.push(Incoming { from, to }),
                TransferMut::Device(bytes) => device.1.push((from, bytes.buffer(), of_device(&bytes))),
            }
        }
        if device.0.is_empty() && device.1.is_empty() {
            let exchange = Exchange { operation, tag, sends: host.0, receives: host.1 };
            return self.control.exchange(exchange, meanwhile);
        }
        let started = self.nccl.start(&device.0, &device.1);
        let worked = started.and_then(|()| match host.0.is_empty() && host.1.is_empty() {
            true => meanwhile(),
            false => {
                let exchange = Exchange { operation, tag, sends: host.0, receives: host.1 };
                self.control.exchange(exchange, meanwhile)
            }
        });
        // In any case: what was started uses the memory.
        let joined = self.nccl.join();
        worked.and(joined)
    }

    fn abort(&mut self, why: &str) {
        self.control.abort(why);
        self.nccl.abort(why);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::config::DeviceChoice;

    /// No rank waits for one that cannot join.
    #[test]
    fn a_rank_that_cannot_join_is_an_error_on_every_rank() -> Result<()> {
        let cpu = Device::new(DeviceChoice::Cpu)?;
        let results = thread::scope(|scope| {
            let ranks = HostCommunicator::threads(2).unwrap();
            let threads: Vec<_> =
                ranks.into_iter().map(|rank| scope.spawn(|| NcclCommunicator::new(rank, &cpu).err())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(matches!(results[0], Some(Error::DeviceKind { .. })), "{results:?}");
        assert!(matches!(results[1], Some(Error::RankLost { rank: 0, .. })), "{results:?}");
        Ok(())
    }
}
