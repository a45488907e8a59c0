//! The CPU device, and views of candle's vectors.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Error, Layout, Result};
use varlen_fa::{Config, Device, DeviceChoice, TensorView, bf16, f16};

use crate::layout;

/// The process's CPU device. `VARLEN_FA`, `VARLEN_FA_CPU` and `VARLEN_FA_THREADS` are read when it is first asked for.
pub fn device() -> Result<Device> {
    static DEVICE: Mutex<Option<Device>> = Mutex::new(None);
    // A panic while it is held leaves nothing half done.
    let mut kept = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = &*kept {
        return Ok(device.clone());
    }
    let config = Config::from_env_for(DeviceChoice::Cpu).map_err(Error::wrap)?;
    Ok(kept.insert(Device::with_config(config).map_err(Error::wrap)?).clone())
}

/// An element type that both libraries have.
pub trait Shared: varlen_fa::Element {
    /// Candle's storage of the elements.
    fn storage(elements: Vec<Self>) -> CpuStorage;
    /// The elements of a storage, where they are of this type.
    fn elements(storage: &CpuStorage) -> Option<&[Self]>;
}

macro_rules! shared {
    ($($element:ty: $variant:ident),*) => {$(
        impl Shared for $element {
            fn storage(elements: Vec<Self>) -> CpuStorage {
                CpuStorage::$variant(elements)
            }

            fn elements(storage: &CpuStorage) -> Option<&[Self]> {
                match storage {
                    CpuStorage::$variant(elements) => Some(elements),
                    _ => None,
                }
            }
        }
    )*};
}
shared!(f32: F32, f16: F16, bf16: BF16);

/// A storage where it lies.
pub fn view<'a, T: Shared>(argument: &str, storage: &'a CpuStorage, at: &Layout) -> Result<TensorView<'a>> {
    let Some(elements) = T::elements(storage) else {
        let got = candle_core::backend::BackendStorage::dtype(storage);
        candle_core::bail!("`{argument}`: expected elements of type {}, those of q, got {}", T::DTYPE, got.as_str());
    };
    Ok(TensorView::from_host_strided(elements, layout::of(at)?))
}
