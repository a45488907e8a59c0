//! Memory that the calls of a request use again: [`Kept`].

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::layout::Layout;
use crate::tensor::Tensor;

/// Tensors that no call uses at the moment. Calls of a request need the same ones in the same order, so from the second call on each
/// finds its own. All their uses are in the order of one device's stream, so the next use may be launched while an earlier one is under
/// way, as with memory that is freed and allocated.
#[derive(Debug, Default)]
pub(super) struct Kept(Mutex<Vec<Tensor>>);

/// What a call takes memory from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room<'a> {
    pub device: &'a Device,
    pub kept: &'a Kept,
}

/// A tensor in use; it is kept when it is dropped.
#[derive(Debug)]
pub(super) struct Lent<'a> {
    /// None only while it is dropped.
    tensor: Option<Tensor>,
    kept: &'a Kept,
}

impl Kept {
    /// Gives all memory up.
    pub(super) fn clear(&self) {
        let tensors = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        // Freed without the lock.
        drop(tensors);
    }

    /// How much of it there is.
    pub(super) fn bytes(&self) -> u64 {
        let tensors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tensors.iter().map(|tensor| byte_len(tensor) as u64).sum()
    }

    /// One of the device that a call is made on, which need not be that of the call before.
    fn take(&self, device: &Device, bytes: usize) -> Option<Tensor> {
        let is_it = |tensor: &Tensor| byte_len(tensor) == bytes && tensor.device().info().id == device.info().id;
        let mut tensors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = tensors.iter().position(is_it)?;
        // The order stays: it is that of their uses.
        Some(tensors.remove(at))
    }

    fn put(&self, tensor: Tensor) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(tensor);
    }
}

impl<'a> Room<'a> {
    /// A row-major tensor whose contents are not specified.
    pub(super) fn tensor(self, dtype: DType, shape: &[usize]) -> Result<Lent<'a>> {
        let layout = Layout::contiguous(shape)?;
        let tensor = match self.kept.take(self.device, layout.numel() * dtype.size()) {
            Some(tensor) => tensor.with_form(dtype, layout),
            None => Tensor::uninit(self.device, dtype, shape)?,
        };
        Ok(Lent { tensor: Some(tensor), kept: self.kept })
    }
}

pub(super) fn byte_len(tensor: &Tensor) -> usize {
    tensor.view().layout().numel() * tensor.dtype().size()
}

impl Deref for Lent<'_> {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        match &self.tensor {
            Some(tensor) => tensor,
            None => unreachable!("it is there until it is dropped"),
        }
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut Tensor {
        match &mut self.tensor {
            Some(tensor) => tensor,
            None => unreachable!("it is there until it is dropped"),
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(tensor) = self.tensor.take() {
            self.kept.put(tensor);
        }
    }
}
