//! What goes wrong outside of a call's own return value: uncaptured errors and the loss of the device. wgpu reports both by
//! callback; they are kept here and come out of the next call.

use std::sync::{Arc, Mutex, PoisonError};

use wgpu::PollType;

use crate::error::{Error, Result};

/// Collects the faults of one device.
#[derive(Debug)]
pub(super) struct Faults {
    device_name: Arc<str>,
    /// The first error since the last check.
    first: Mutex<Option<Error>>,
    /// Why the device was lost; for good.
    lost: Mutex<Option<String>>,
}

impl Faults {
    /// Listens to a device.
    pub fn watch(device: &wgpu::Device, device_name: &Arc<str>) -> Arc<Self> {
        let (first, lost) = (Mutex::new(None), Mutex::new(None));
        let faults = Arc::new(Self { device_name: Arc::clone(device_name), first, lost });
        let listener = Arc::clone(&faults);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let error = listener.error_of(error, "a launch", 0);
            listener.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }));
        let listener = Arc::clone(&faults);
        device.set_device_lost_callback(move |reason, message| {
            let why = format!("{reason:?}: {message}");
            listener.lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        });
        faults
    }

    /// The device's loss, or the first error since the last check.
    pub fn check(&self) -> Result<()> {
        self.check_lost()?;
        match self.first.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn check_lost(&self) -> Result<()> {
        match &*self.lost.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => Err(Error::DeviceLost { device: self.device_name.to_string(), why: why.clone() }),
            None => Ok(()),
        }
    }

    /// Runs `make` and gives its result unless wgpu reports an error meanwhile.
    pub fn capture<T>(
        &self,
        device: &wgpu::Device,
        operation: &'static str,
        requested: u64,
        make: impl FnOnce() -> T,
    ) -> Result<T> {
        self.check_lost()?;
        let scopes = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory]
            .map(|filter| device.push_error_scope(filter));
        let made = make();
        // Scopes close in reverse order.
        let mut error = None;
        for scope in scopes.into_iter().rev() {
            error = pollster::block_on(scope.pop()).or(error);
        }
        match error {
            None => Ok(made),
            Some(error) => {
                // A lost device fails in other words; the callback that says so may only wait to be called.
                let _ = device.poll(PollType::Poll);
                self.check_lost()?;
                Err(self.error_of(error, operation, requested))
            }
        }
    }

    /// What came of an operation whose failure says nothing itself.
    pub fn explain(&self, device: &wgpu::Device, operation: &'static str, why: String) -> Error {
        let _ = device.poll(PollType::Poll);
        match self.check() {
            Err(error) => error,
            Ok(()) => Error::Backend { device: self.device_name.to_string(), operation, why },
        }
    }

    fn error_of(&self, error: wgpu::Error, operation: &'static str, requested: u64) -> Error {
        let (device, why) = (self.device_name.to_string(), error.to_string());
        match error {
            wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory { device, requested, why },
            _ => Error::Backend { device, operation, why },
        }
    }
}
