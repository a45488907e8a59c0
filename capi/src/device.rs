//! Devices.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use varlen::{BackendKind, DType, Device, DeviceChoice, Kernel};

use crate::arguments::{Name, Place, choose, text};
use crate::cuda;
use crate::failure::{Failure, Result, border};
use crate::handles;
use crate::types::{
    varlen_fa_device, varlen_fa_device_info, varlen_fa_device_kind, varlen_fa_dtype, varlen_fa_kernel, varlen_fa_status,
};

/// Opens a device. VARLEN_FA=0 in the environment makes it compute everything densely, with the same results; VARLEN_FA_KERNEL (e.g.
/// `sm80`) makes it use that kernel alone, and is refused with NOT_APPLICABLE where the device does not have it.
///
/// `kind`: where to compute. AUTO takes what VARLEN_FA_DEVICE asks for (`cuda`, `cuda:N`, `wgpu` or `cpu`), or the best device
/// present.
/// `ordinal`: which CUDA device; 0 for other kinds.
/// `device`: receives the handle, to be given to varlen_fa_device_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_device_open(
    kind: MaybeUninit<varlen_fa_device_kind>,
    ordinal: u32,
    device: *mut *mut varlen_fa_device,
) -> varlen_fa_status {
    border(|| {
        // SAFETY: the caller keeps the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("device"), device) }?;
        let kind = choose(Name::of("kind"), kind)?;
        if ordinal != 0 && kind != varlen_fa_device_kind::Cuda {
            let expected = "0, since only CUDA devices are numbered";
            return Err(Failure::argument(varlen_fa_status::BadValue, "ordinal", expected, ordinal));
        }
        let opened = match kind {
            varlen_fa_device_kind::Auto => Device::from_env()?,
            varlen_fa_device_kind::Cpu => Device::new(DeviceChoice::Cpu)?,
            varlen_fa_device_kind::Wgpu => Device::new(DeviceChoice::Wgpu)?,
            varlen_fa_device_kind::Cuda => Device::new(DeviceChoice::Cuda(ordinal as usize))?,
        };
        place.put(handles::issue(opened));
        Ok(())
    })
}

/// A CUDA device over a context and a stream of the caller's. All work is launched on that stream, in order with the caller's own
/// work, and no call waits for it, unless tensors are in host memory. While the stream is being captured into a graph,
/// varlen_fa_forward over CUDA memory is captured. Neither context nor stream is destroyed here; both must outlive the device and
/// everything used with it.
///
/// `context`: a CUcontext, live. NULL takes the stream's context, or with the default stream the one that is current in this thread.
/// `stream`: a CUstream or cudaStream_t of that context, live; NULL is the legacy default stream. CU_STREAM_PER_THREAD is refused.
/// `device`: receives the handle, to be given to varlen_fa_device_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_device_open_cuda(
    context: *mut c_void,
    stream: *mut c_void,
    device: *mut *mut varlen_fa_device,
) -> varlen_fa_status {
    border(|| {
        // SAFETY: the caller keeps the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("device"), device) }?;
        // SAFETY: by the header, null or a live context and a live stream of it, which outlive the device.
        let opened = unsafe { cuda::device_over(context, stream) }?;
        place.put(handles::issue(opened));
        Ok(())
    })
}

/// What a device is and can do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_device_describe(
    device: *const varlen_fa_device,
    info: *mut varlen_fa_device_info,
) -> varlen_fa_status {
    border(|| {
        // SAFETY: the caller keeps the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("info"), info) }?;
        let device = handles::get(Name::of("device"), device)?;
        let capabilities = device.capabilities();
        let bit_of_dtype = |dtype: &DType| dtype_of(*dtype).map_or(0, |dtype| 1 << dtype as u32);
        let bit_of_kernel = |kernel: &Kernel| match kernel_of(*kernel) {
            varlen_fa_kernel::Unlisted => 0,
            kernel => 1 << kernel as u32,
        };
        place.put(varlen_fa_device_info {
            kind: kind_of(&device),
            is_software: u32::from(capabilities.is_software),
            dtypes: capabilities.dtypes.iter().map(bit_of_dtype).fold(0, |bits, bit| bits | bit),
            kernels: capabilities.kernels.iter().map(bit_of_kernel).fold(0, |bits, bit| bits | bit),
            max_buffer_bytes: capabilities.max_buffer_bytes,
            name: text(device.name()),
            adapter: text(&capabilities.adapter),
            reserved: [0; 4],
        });
        Ok(())
    })
}

/// Waits for all work launched so far on the device, and returns what failed of it.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_device_synchronize(device: *const varlen_fa_device) -> varlen_fa_status {
    border(|| Ok(handles::get(Name::of("device"), device)?.synchronize()?))
}

/// Closes a device; NULL is fine. Work that was launched goes on.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_device_free(device: *mut varlen_fa_device) -> varlen_fa_status {
    border(|| handles::free(Name::of("device"), device))
}

/// Where a device computes.
pub(crate) fn kind_of(device: &Device) -> varlen_fa_device_kind {
    match device.capabilities().backend {
        BackendKind::Cuda => varlen_fa_device_kind::Cuda,
        BackendKind::Wgpu => varlen_fa_device_kind::Wgpu,
        _ => varlen_fa_device_kind::Cpu,
    }
}

/// The header's name of an element type.
fn dtype_of(dtype: DType) -> Option<varlen_fa_dtype> {
    match dtype {
        DType::F32 => Some(varlen_fa_dtype::F32),
        DType::F16 => Some(varlen_fa_dtype::F16),
        DType::Bf16 => Some(varlen_fa_dtype::Bf16),
        _ => None,
    }
}

/// The header's name of a kernel.
pub(crate) fn kernel_of(kernel: Kernel) -> varlen_fa_kernel {
    match kernel {
        Kernel::CpuTiled => varlen_fa_kernel::CpuTiled,
        Kernel::WgslPortable => varlen_fa_kernel::WgslPortable,
        Kernel::WgslCoop => varlen_fa_kernel::WgslCoop,
        Kernel::CudaSm80 => varlen_fa_kernel::CudaSm80,
        Kernel::CudaSm90 => varlen_fa_kernel::CudaSm90,
        Kernel::CudaSm100 => varlen_fa_kernel::CudaSm100,
        _ => varlen_fa_kernel::Unlisted,
    }
}

/// The kernel that a caller forces, if any.
pub(crate) fn forced_kernel(kernel: varlen_fa_kernel) -> Result<Option<Kernel>> {
    match kernel {
        varlen_fa_kernel::Auto => Ok(None),
        varlen_fa_kernel::CpuTiled => Ok(Some(Kernel::CpuTiled)),
        varlen_fa_kernel::WgslPortable => Ok(Some(Kernel::WgslPortable)),
        varlen_fa_kernel::WgslCoop => Ok(Some(Kernel::WgslCoop)),
        varlen_fa_kernel::CudaSm80 => Ok(Some(Kernel::CudaSm80)),
        varlen_fa_kernel::CudaSm90 => Ok(Some(Kernel::CudaSm90)),
        varlen_fa_kernel::CudaSm100 => Ok(Some(Kernel::CudaSm100)),
        varlen_fa_kernel::Unlisted => {
            Err(Failure::argument(varlen_fa_status::BadValue, "options.kernel", "a kernel", "UNLISTED"))
        }
    }
}
