//! Which kernels of an adapter are used: those whose results agree with another kernel's on that very
//! adapter and driver.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use wgpu::AdapterInfo;

use crate::call::op::Instant;
use crate::call::self_check::{self, Cases, Subject};
use crate::kernel::Kernel;

use super::coop::Coop;

/// What a verdict holds for: a kernel on an adapter and driver, with the device's cooperative
/// matrices if the kernel uses them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Defendant {
    pub adapter: AdapterInfo,
    pub kernel: Kernel,
    pub coop: Option<Coop>,
}

/// Verdicts of a process: nothing, or what the kernel does wrong.
#[derive(Debug, Default)]
pub(super) struct Verdicts(Mutex<Option<HashMap<Defendant, Result<(), String>>>>);

/// However many devices are opened on an adapter, its kernels are compared once.
pub(super) static VERDICTS: Verdicts = Verdicts(Mutex::new(None));

impl Verdicts {
    /// Whether a kernel passed. Compares it with the reference if nobody did before. Threads that
    /// ask at the same time may each compare: no lock is held meanwhile, since a browser gives up
    /// the thread. What failed for lack of memory, or with the device, is tried again next time.
    ///
    /// # Errors
    /// What the kernel does wrong.
    pub async fn of(&self, defendant: &Defendant, tested: Subject<'_>, reference: Subject<'_>) -> Result<(), String> {
        let known =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().get(defendant).cloned();
        if let Some(verdict) = known {
            return verdict;
        }
        let started = Instant::now();
        let verdict = match self_check::compare(tested, reference, &Cases::QUICK).await {
            Ok(()) => {
                let Defendant { adapter, kernel, .. } = defendant;
                log::debug!("{}: kernel {kernel} passed its self-check in {:?}", adapter.name, started.elapsed());
                Ok(())
            }
            Err(doubt) if doubt.is_passing => return Err(doubt.why),
            Err(doubt) => Err(doubt.why),
        };
        let mut verdicts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        verdicts.get_or_insert_default().insert(defendant.clone(), verdict.clone());
        verdict
    }
}

#[cfg(test)]
mod tests {
    use wgpu::{Backend, DeviceType};

    use super::*;
    use crate::backends::cpu::CpuDevice;
    use crate::call::self_check::tests::device_of_portable_calls;

    #[test]
    fn a_verdict_holds_for_its_adapter_and_driver_alone() {
        let verdicts = Verdicts::default();
        let cpu = CpuDevice::shared();
        let verdict = |is_wrong: bool, driver: &str| {
            let adapter = AdapterInfo {
                driver_info: driver.to_owned(),
                ..AdapterInfo::new(DeviceType::DiscreteGpu, Backend::Vulkan)
            };
            let defendant = Defendant { adapter, kernel: Kernel::WgslPortable, coop: None };
            let (device, kernel) = device_of_portable_calls(is_wrong);
            let reference = Subject::new(&*cpu, Kernel::CpuTiled);
            pollster::block_on(verdicts.of(&defendant, Subject::new(&device, kernel), reference))
        };
        assert!(verdict(true, "1").is_err());
        assert!(verdict(false, "1").is_err(), "a wrong adapter is not given another chance");
        assert_eq!(verdict(false, "2"), Ok(()));
        assert_eq!(verdict(true, "2"), Ok(()), "compared twice");
    }
}
