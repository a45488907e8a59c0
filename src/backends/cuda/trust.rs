//! Which kernels of a GPU are used. A newer one is, once it has given what the sm80 kernel gives on that very GPU and driver.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::call::self_check::{self, Cases, Subject};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernel::Kernel;

use super::capture::Relaxed;
use super::device::CudaDevice;

/// What every other kernel is compared with.
const REFERENCE: Kernel = Kernel::CudaSm80;

/// Whether a kernel passed on the GPU with an index. GPUs are compared once a process, whatever contexts and devices there are on them.
static VERDICTS: Mutex<Option<HashMap<(i32, Kernel), bool>>> = Mutex::new(None);

impl CudaDevice {
    /// The device with one kernel alone, as it is; or with those that can be trusted.
    ///
    /// # Errors
    /// [`Error::NotApplicable`] if it does not have the kernel, [`Error::DeviceUnavailable`] if a kernel lost the context when it was
    /// tried.
    pub(super) fn with_trusted_kernels(mut self, index: i32, only: Option<Kernel>) -> Result<Self> {
        if let Some(kernel) = only {
            if !self.capabilities.kernels.contains(&kernel) {
                let why = format!("{} does not run it", self.capabilities);
                return Err(Error::NotApplicable { argument: "kernel", got: kernel.name().to_owned(), why });
            }
            self.capabilities.kernels = vec![kernel];
            return Ok(self);
        }
        let mut trusted = Vec::new();
        for &kernel in &self.capabilities.kernels {
            if kernel == REFERENCE || self.is_trusted(index, kernel)? {
                trusted.push(kernel);
            }
        }
        self.capabilities.kernels = trusted;
        Ok(self)
    }

    fn is_trusted(&self, index: i32, kernel: Kernel) -> Result<bool> {
        // Held during the comparison, so that it is made once. A panic leaves the map as it was.
        let mut verdicts = VERDICTS.lock().unwrap_or_else(PoisonError::into_inner);
        let verdicts = verdicts.get_or_insert_default();
        if let Some(&verdict) = verdicts.get(&(index, kernel)) {
            return Ok(verdict);
        }
        let (device, started) = (&self.capabilities, Instant::now());
        let outcome = self.compare(index, kernel)?;
        match &outcome {
            Ok(()) => log::debug!("kernel {kernel} passed its self-check on {device} in {:?}", started.elapsed()),
            Err(why) => log::warn!(
                "kernel {kernel} failed its self-check on {device} and is not used in this process; other kernels take its calls. \
                 Please report this line to the authors of varlen-fa, and the output of nvidia-smi: {why}"
            ),
        }
        verdicts.insert((index, kernel), outcome.is_ok());
        Ok(outcome.is_ok())
    }

    /// Compares a kernel with the reference, on a stream of the library's own; inside, how it failed.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] if the context is lost.
    fn compare(&self, index: i32, kernel: Kernel) -> Result<Result<(), String>> {
        let device = match self.on_own_stream(index) {
            Ok(device) => device,
            Err(error) => return Ok(Err(error.to_string())),
        };
        // Another stream of the caller's may be captured, in this thread or another.
        let _relaxed = device.context.done(Relaxed::enter(), "leaving captures alone")?;
        let (tested, reference) = (Subject::new(&device, kernel), Subject::new(&device, REFERENCE));
        let outcome = self_check::compare(tested, reference, &Cases::COMPLETE);
        device.check().map_err(|lost| Error::DeviceUnavailable {
            device: self.capabilities.to_string(),
            why: format!(
                "trying kernel {kernel} failed, which {REFERENCE} alone ({}={REFERENCE}) avoids: {lost}",
                Config::KERNEL_VARIABLE
            ),
        })?;
        Ok(outcome)
    }
}
