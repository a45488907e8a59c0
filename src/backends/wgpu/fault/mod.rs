//! What goes wrong outside of a call's return value: wgpu's errors and the loss of the device.
//!
//! Every wgpu call of this backend that can fail runs inside error scopes. These belong to the
//! calling thread, so the call that caused an error returns it, and no handler of the application
//! sees it. wgpu keeps one uncaptured-error handler and one device-lost callback per device, and
//! setting one replaces the one before. Both are set on devices that were opened here, and
//! neither on external devices. Their loss is found by asking, with [`Faults::probe`].
//!
//! A browser reports what a scope caught only after the thread has returned to it. There a later
//! call of this backend returns the error, at the latest the next one that is awaited. In a
//! browser any number of callbacks hear of a loss, so ours is set on external devices too, and
//! nothing needs to be asked.
//!
//! A submission also runs callbacks of the application that were waiting, on our thread and
//! inside our scopes: our call returns an error that one of them raises.

#[cfg(target_arch = "wasm32")]
mod closed_scopes;

use std::sync::{Arc, Mutex, PoisonError};

#[cfg(not(target_arch = "wasm32"))]
use wgpu::BufferUsages;

use crate::error::{Error, Result};

#[cfg(target_arch = "wasm32")]
use closed_scopes::{Caught, ClosedScopes};

/// Collects the faults of one device.
#[derive(Debug)]
pub(super) struct Faults {
    device: wgpu::Device,
    device_name: Arc<str>,
    /// The first error that no scope caught since the last check.
    first: Mutex<Option<Error>>,
    /// Why the device was lost. Never cleared.
    lost: Mutex<Option<String>>,
    #[cfg(target_arch = "wasm32")]
    closed: ClosedScopes,
}

impl Faults {
    /// For a device whose handlers stay as they are.
    pub fn of(device: &wgpu::Device, device_name: &Arc<str>) -> Arc<Self> {
        let faults = Arc::new(Self {
            device: device.clone(),
            device_name: Arc::clone(device_name),
            first: Mutex::new(None),
            lost: Mutex::new(None),
            #[cfg(target_arch = "wasm32")]
            closed: ClosedScopes::default(),
        });
        #[cfg(target_arch = "wasm32")]
        faults.listen_to_loss();
        faults
    }

    /// Sets the device's handlers: for devices that were opened here.
    pub fn listen(self: &Arc<Self>) {
        // The device owns its handlers: a strong reference to what owns the device would keep
        // both alive.
        let listener = Arc::downgrade(self);
        self.device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let Some(faults) = listener.upgrade() else { return };
            let error = faults.error_of(error, "a launch", 0);
            faults.report(error);
        }));
        #[cfg(not(target_arch = "wasm32"))]
        self.listen_to_loss();
    }

    fn listen_to_loss(self: &Arc<Self>) {
        let listener = Arc::downgrade(self);
        self.device.set_device_lost_callback(move |reason, message| {
            if let Some(faults) = listener.upgrade() {
                faults.lose(format!("{reason:?}: {message}"));
            }
        });
    }

    /// The device's loss, or the first error since the last check.
    pub fn check(&self) -> Result<()> {
        self.check_lost()?;
        #[cfg(target_arch = "wasm32")]
        if let Some(caught) = self.closed.first_caught() {
            self.report_caught(caught);
        }
        match self.first.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    pub fn check_lost(&self) -> Result<()> {
        match &*self.lost.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => Err(Error::DeviceLost { device: self.device_name.to_string(), why: why.clone() }),
            None => Ok(()),
        }
    }

    fn report(&self, error: Error) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    pub fn lose(&self, why: String) {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }

    /// Asks whether the device is still there. wgpu reports no errors of a lost device, but it
    /// cannot map memory of one. Costs a small allocation.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn probe(&self) -> Result<()> {
        self.check_lost()?;
        let descriptor = wgpu::BufferDescriptor {
            label: Some("probe"),
            size: 16,
            usage: BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        };
        let is_mapped = self.scoped("asking whether the device is there", 16, || {
            self.device.create_buffer(&descriptor).get_mapped_range(..).is_ok()
        })?;
        if !is_mapped {
            self.lose("it was destroyed, or its driver gave it up".to_owned());
        }
        self.check_lost()
    }

    /// Browsers report the loss.
    #[cfg(target_arch = "wasm32")]
    pub fn probe(&self) -> Result<()> {
        self.check_lost()
    }

    /// Runs `make` and returns its result, unless wgpu reports an error meanwhile.
    pub fn capture<T>(&self, operation: &'static str, requested: u64, make: impl FnOnce() -> T) -> Result<T> {
        self.check_lost()?;
        self.scoped(operation, requested, make).map_err(|error| match self.probe() {
            // On a lost device the loss is the cause.
            Err(lost @ Error::DeviceLost { .. }) => lost,
            _ => error,
        })
    }

    fn scoped<T>(&self, operation: &'static str, requested: u64, make: impl FnOnce() -> T) -> Result<T> {
        let scopes = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory]
            .map(|filter| self.device.push_error_scope(filter));
        let made = make();
        self.close(scopes, operation, requested)?;
        Ok(made)
    }

    /// Closes the scopes, in reverse order, and returns the error that one of them caught.
    #[cfg(not(target_arch = "wasm32"))]
    fn close(&self, scopes: [wgpu::ErrorScopeGuard; 3], operation: &'static str, requested: u64) -> Result<()> {
        let mut error = None;
        for scope in scopes.into_iter().rev() {
            error = pollster::block_on(scope.pop()).or(error);
        }
        match error {
            None => Ok(()),
            Some(error) => Err(self.error_of(error, operation, requested)),
        }
    }

    /// Closes the scopes, in reverse order. A later check returns what they caught.
    #[cfg(target_arch = "wasm32")]
    fn close(&self, scopes: [wgpu::ErrorScopeGuard; 3], operation: &'static str, requested: u64) -> Result<()> {
        for scope in scopes.into_iter().rev() {
            self.closed.close(scope, operation, requested);
        }
        Ok(())
    }

    #[cfg(target_arch = "wasm32")]
    fn report_caught(&self, Caught { error, operation, requested }: Caught) {
        self.report(self.error_of(error, operation, requested));
    }

    /// Waits for what error scopes caught, and returns the first error since the last check.
    #[cfg(target_arch = "wasm32")]
    pub async fn settle(&self) -> Result<()> {
        if let Some(caught) = self.closed.settle().await {
            self.report_caught(caught);
        }
        self.check()
    }

    /// The error of an operation that failed without one.
    pub fn explain(&self, operation: &'static str, why: String) -> Error {
        match self.probe().and_then(|()| self.check()) {
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
