//! Devices.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;

use varlen::{BackendKind, Config, Device, DeviceChoice};

use crate::arguments::{Name, Place, choose, text};
use crate::cuda;
use crate::failure::{Failure, guard};
use crate::handles::{self, handle};
use crate::names::value_of;
use crate::types::{
    varlen_fa_device, varlen_fa_device_info, varlen_fa_device_kind, varlen_fa_dtype, varlen_fa_kernel, varlen_fa_status,
};

handle!(varlen_fa_device, 1, Device);

/// Opens a device. Environment variables apply: with VARLEN_FA=0 it computes everything densely,
/// with the same results; with VARLEN_FA_KERNEL (e.g. `sm80`) it uses that kernel only, and opening
/// fails with NOT_APPLICABLE if the device does not have it; VARLEN_FA_CPU and VARLEN_FA_THREADS
/// are the CPU device's instruction set and number of threads.
///
/// `kind`: where to compute. AUTO takes the device that VARLEN_FA_DEVICE names (`cuda`, `cuda:N`,
/// `wgpu` or `cpu`), or the best device present.
/// `ordinal`: which CUDA device; 0 for other kinds.
/// `device`: receives the handle, to be given to varlen_fa_device_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_device_open(
    kind: MaybeUninit<varlen_fa_device_kind>,
    ordinal: u32,
    device: *mut *mut varlen_fa_device,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("device"), device) }?;
        let backend = choose(Name::of("kind"), kind)?.meaning;
        if ordinal != 0 && backend != Some(BackendKind::Cuda) {
            let expected = "0, since only CUDA devices are numbered";
            return Err(Failure::argument(varlen_fa_status::BadValue, "ordinal", expected, ordinal));
        }
        let opened = match backend {
            None => Device::from_env()?,
            Some(BackendKind::Cuda) => Device::new(DeviceChoice::Cuda(ordinal as usize))?,
            Some(backend) => Device::new(backend.into())?,
        };
        place.put(handles::issue(opened));
        Ok(())
    })
}

/// Opens the CPU device with a number of threads. They start with the first call that is worth
/// them, and all devices of one number share them. Where they cannot be started there are fewer, at
/// worst the calling thread alone; more than 256, or than there are processors, are never started.
///
/// `threads`: how many threads a call uses, at most. With 1 no thread is ever started; 0 means
/// VARLEN_FA_THREADS or, where it is unset, one for each processor.
/// `device`: receives the handle, to be given to varlen_fa_device_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_device_open_cpu(
    threads: u32,
    device: *mut *mut varlen_fa_device,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("device"), device) }?;
        let config = Config::from_env()?.with_device(DeviceChoice::Cpu);
        let threads = NonZeroUsize::new(threads as usize).or(config.threads);
        place.put(handles::issue(Device::with_config(config.with_threads(threads))?));
        Ok(())
    })
}

/// Opens a CUDA device over an external context and stream. All work is launched on that stream, in
/// order with the application's own work. Calls do not wait for it, unless tensors are in host
/// memory. While the stream is captured into a graph, varlen_fa_forward over CUDA memory is
/// captured too. The library destroys neither context nor stream; both must outlive the device and
/// everything used with it.
///
/// `context`: a live CUcontext. NULL means the stream's context or, with the default stream, the
/// context that is current in this thread.
/// `stream`: a live CUstream or cudaStream_t of that context; NULL is the legacy default stream.
/// CU_STREAM_PER_THREAD is refused.
/// `device`: receives the handle, to be given to varlen_fa_device_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_device_open_cuda(
    context: *mut c_void,
    stream: *mut c_void,
    device: *mut *mut varlen_fa_device,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("device"), device) }?;
        // SAFETY: by the header, each is null or live, the stream is of the context, and both
        // outlive the device.
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
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("info"), info) }?;
        let device = handles::get(Name::of("device"), device)?;
        let capabilities = device.capabilities();
        let kind = value_of(Some(capabilities.backend)).ok_or_else(|| {
            let expected = "a device of a kind that the header lists";
            Failure::argument(varlen_fa_status::Refused, "device", expected, capabilities.backend)
        })?;
        let bit_of_dtype = |&dtype| value_of(dtype).map_or(0, |dtype: varlen_fa_dtype| 1 << dtype as u32);
        let bit_of_kernel = |&kernel| value_of(Some(kernel)).map_or(0, |kernel: varlen_fa_kernel| 1 << kernel as u32);
        place.put(varlen_fa_device_info {
            kind,
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

/// Waits for all work launched on the device so far, and returns its first failure.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_device_synchronize(device: *const varlen_fa_device) -> varlen_fa_status {
    guard(|| Ok(handles::get(Name::of("device"), device)?.synchronize()?))
}

/// Closes a device; NULL is ignored. Work that was launched goes on.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_device_free(device: *mut varlen_fa_device) -> varlen_fa_status {
    guard(|| handles::free(Name::of("device"), device))
}
