//! burn's CPU backend: its vectors are read and written where they lie.

use std::sync::{Mutex, PoisonError};

use burn_flex::{FlexTensor, Layout};
use burn_tensor::{Bytes, DType, Shape};
use varlen_fa::{Config, Device, DeviceChoice, TensorView, TensorViewMut, bf16, f16};

use crate::call::Call;
use crate::error::{Error, Result};
use crate::layout;

/// Computes. A tensor is copied first if its last dimension is not contiguous, or if a stride is negative (after a flip).
pub fn attend(call: &Call<'_>, tensors: [FlexTensor; 3]) -> Result<FlexTensor> {
    match tensors[0].dtype() {
        DType::F32 => attend_in::<f32>(call, tensors),
        DType::F16 => attend_in::<f16>(call, tensors),
        DType::BF16 => attend_in::<bf16>(call, tensors),
        other => Err(Error::Tensor {
            argument: "q",
            expected: "elements of type f32, f16 or bf16".to_owned(),
            got: other.name().to_owned(),
        }),
    }
}

fn attend_in<T: varlen_fa::Element>(call: &Call<'_>, tensors: [FlexTensor; 3]) -> Result<FlexTensor> {
    let dtype = tensors[0].dtype();
    let [q, k, v] = tensors.map(with_contiguous_rows);
    let views = [view::<T>("q", &q, dtype)?, view::<T>("k", &k, dtype)?, view::<T>("v", &v, dtype)?];
    let shape = q.layout().shape().to_vec();
    let strides = layout::token_major(&shape);
    let at = layout::of(&shape, strides.iter().map(|&stride| stride as u64), 0)?;
    let mut out = bytemuck::try_zeroed_vec::<T>(at.numel())
        .map_err(|()| Error::Runtime(format!("no memory for an output of shape {shape:?}")))?;
    call.launch(&device()?, views, TensorViewMut::from_host_strided(&mut out, at))?;
    let strides = strides.into_iter().map(|stride| stride as isize).collect();
    Ok(FlexTensor::new(Bytes::from_elems(out), Layout::new(Shape::from(shape), strides, 0), dtype))
}

fn with_contiguous_rows(tensor: FlexTensor) -> FlexTensor {
    let at = tensor.layout();
    if layout::has_contiguous_rows(at.shape(), at.strides().iter().copied()) { tensor } else { tensor.to_contiguous() }
}

/// A tensor where it lies.
fn view<'a, T: varlen_fa::Element>(
    argument: &'static str,
    tensor: &'a FlexTensor,
    expected: DType,
) -> Result<TensorView<'a>> {
    let refused = |expected: String, got: String| Error::Tensor { argument, expected, got };
    if tensor.dtype() != expected {
        let expected = format!("elements of type {}, those of q", expected.name());
        return Err(refused(expected, tensor.dtype().name().to_owned()));
    }
    let elements = bytemuck::try_cast_slice::<u8, T>(tensor.bytes())
        .map_err(|error| refused("memory aligned to its elements".to_owned(), error.to_string()))?;
    let at = tensor.layout();
    let strides = at.strides().iter().map(|&stride| stride.unsigned_abs() as u64);
    Ok(TensorView::from_host_strided(elements, layout::of(at.shape(), strides, at.start_offset() as u64)?))
}

/// The process's CPU device. `VARLEN_FA`, `VARLEN_FA_CPU` and `VARLEN_FA_THREADS` are read when it is first asked for.
fn device() -> Result<Device> {
    static DEVICE: Mutex<Option<Device>> = Mutex::new(None);
    // A panic while it is held leaves nothing half done.
    let mut kept = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = &*kept {
        return Ok(device.clone());
    }
    let device = Device::with_config(Config::from_env_for(DeviceChoice::Cpu)?)?;
    Ok(kept.insert(device).clone())
}
