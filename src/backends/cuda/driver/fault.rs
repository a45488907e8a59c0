//! Driver errors as [`Error`]s. Some mean that the context is lost: then all of its memory is gone
//! and no later call succeeds. The first such error is kept, and every later call returns it.

use std::sync::{Arc, OnceLock};

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::error::{Error, Result};

/// Collects the faults of one context.
#[derive(Debug)]
pub struct Faults {
    device_name: Arc<str>,
    /// What lost the context.
    lost: OnceLock<String>,
}

impl Faults {
    pub fn new(device_name: &Arc<str>) -> Self {
        Self { device_name: Arc::clone(device_name), lost: OnceLock::new() }
    }

    pub fn device_name(&self) -> &Arc<str> {
        &self.device_name
    }

    /// The context's loss, if it is lost.
    pub fn check(&self) -> Result<()> {
        match self.lost.get() {
            Some(why) => Err(Error::DeviceLost { device: self.device_name.to_string(), why: why.clone() }),
            None => Ok(()),
        }
    }

    /// Converts a driver error; `requested` is the number of bytes that were asked for, if any.
    pub fn explain(&self, error: DriverError, operation: &'static str, requested: u64) -> Error {
        self.error_of(error.0, operation, requested, describe(error))
    }

    fn error_of(&self, code: CUresult, operation: &'static str, requested: u64, why: String) -> Error {
        let device = self.device_name.to_string();
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Error::OutOfMemory { device, requested, why };
        }
        if !is_sticky(code) {
            return Error::Backend { device, operation, why };
        }
        // A kernel's fault is reported by whatever call waits for it, so `operation` need not be
        // its cause.
        let why = self.lost.get_or_init(|| format!("the CUDA context is lost: {why}, reported by {operation}"));
        Error::DeviceLost { device, why: why.clone() }
    }
}

/// The driver's words for an error, and its name.
pub fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(words) => format!("{} ({:?})", words.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// Whether every later call of the context fails after this error, by the driver API's reference.
fn is_sticky(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_EXTERNAL_DEVICE
            | CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults() -> Faults {
        Faults::new(&Arc::from("cuda (a GPU)"))
    }

    #[test]
    fn a_lost_context_stays_lost_for_its_first_reason() {
        let faults = faults();
        let first = faults.error_of(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "waiting", 0, "bad address".to_owned());
        assert!(matches!(&first, Error::DeviceLost { why, .. } if why.contains("bad address") && why.contains("lost")));
        let second = faults.error_of(CUresult::CUDA_ERROR_LAUNCH_FAILED, "a launch", 0, "launch failed".to_owned());
        assert_eq!(first, second);
        assert_eq!(faults.check(), Err(first));
    }

    #[test]
    fn other_errors_leave_the_context_as_it_is() {
        let faults = faults();
        let error = faults.error_of(CUresult::CUDA_ERROR_OUT_OF_MEMORY, "allocating", 123, "full".to_owned());
        assert!(matches!(error, Error::OutOfMemory { requested: 123, .. }));
        let error = faults.error_of(CUresult::CUDA_ERROR_INVALID_VALUE, "a launch", 0, "bad value".to_owned());
        assert!(matches!(error, Error::Backend { operation: "a launch", .. }));
        assert_eq!(faults.check(), Ok(()));
    }
}
