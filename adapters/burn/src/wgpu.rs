//! burn's wgpu runtime: its buffers are read and written where they lie, in the order of its queue.

use std::sync::{Mutex, PoisonError};

use burn_cubecl::CubeDevice;
use burn_cubecl::cubecl::client::Client;
use burn_cubecl::cubecl::server::{Handle, ServerError};
use burn_cubecl::cubecl::wgpu::{AutoCompiler, WgpuResource, WgpuServer};
use burn_cubecl::cubecl::zspace::metadata::Metadata;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_dispatch::DispatchDevice;
use burn_tensor::{DType, Shape, StreamId};
use varlen_fa::{Config, Device, DeviceChoice, DeviceMemory, TensorView, wgpu};

use crate::call::Call;
use crate::error::{Error, Result};
use crate::layout;

/// Devices of burn, and the library's of the same wgpu device.
static SHARED: Mutex<Vec<(CubeDevice, Device)>> = Mutex::new(Vec::new());

/// Says which wgpu device and queue `device` of burn computes with. Tensors know their buffers and not these, so attention on a
/// wgpu tensor needs this call once before it. A second call for the same device changes nothing.
///
/// It compares the library's shaders with the CPU on a small call, and waits for that; `VARLEN_FA_…` variables are read here.
///
/// ```no_run
/// use burn_tensor::Device;
/// use varlen_fa_burn::share_wgpu;
///
/// let (device, setup) = Device::wgpu_options().init_with_setup()?;
/// share_wgpu(&device, &setup.device, &setup.queue)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Tensor`] if `device` is not of burn's wgpu runtime; what [`varlen_fa::Device::from_wgpu`] names.
pub fn share_wgpu(device: &burn_tensor::Device, of_wgpu: &wgpu::Device, queue: &wgpu::Queue) -> Result<()> {
    let DispatchDevice::Cube(key @ CubeDevice::Wgpu(_)) = device.as_dispatch() else {
        return Err(Error::Tensor {
            argument: "device",
            expected: "a device of burn's wgpu runtime without autodiff".to_owned(),
            got: format!("{device:?}"),
        });
    };
    // A panic while it is held leaves nothing half done.
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if shared.iter().all(|(other, _)| other != key) {
        let config = Config::from_env_for(DeviceChoice::Wgpu)?;
        shared.push((key.clone(), Device::from_wgpu(of_wgpu, queue, config)?));
    }
    Ok(())
}

fn shared(key: &CubeDevice) -> Result<Device> {
    let refused = |expected: &str| Error::Tensor {
        argument: "q",
        expected: expected.to_owned(),
        got: format!("a tensor on {key:?}"),
    };
    if !matches!(key, CubeDevice::Wgpu(_)) {
        return Err(refused("a tensor of burn's wgpu runtime"));
    }
    let shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let found = shared.iter().find(|(other, _)| other == key);
    found.map(|(_, device)| device.clone()).ok_or_else(|| refused("a tensor on a device that share_wgpu was told of"))
}

/// What burn has for a float tensor of its runtimes, with fusion and without.
#[diagnostic::on_unimplemented(
    message = "burn is built with its feature `fusion`, so varlen-fa-burn needs its own feature `fusion`"
)]
pub trait Primitive: Sized {
    /// The tensor in memory, once all that it is made of is launched.
    fn resolve(self) -> CubeTensor;
    /// A tensor in memory, as one of burn's operations gives it.
    fn of(tensor: CubeTensor) -> Self;
}

impl Primitive for CubeTensor {
    fn resolve(self) -> CubeTensor {
        self
    }

    fn of(tensor: CubeTensor) -> Self {
        tensor
    }
}

#[cfg(feature = "fusion")]
impl Primitive for burn_fusion::FusionTensor<burn_cubecl::fusion::FusionCubeRuntime> {
    fn resolve(self) -> CubeTensor {
        self.client.clone().resolve_tensor_float::<burn_cubecl::CubeBackend>(self)
    }

    fn of(tensor: CubeTensor) -> Self {
        use burn_cubecl::CubeBackend;
        use burn_fusion::{NoOp, get_client};
        use burn_ir::{InitOperationIr, OperationIr};

        let client = get_client::<CubeBackend>(&tensor.device);
        let (shape, dtype) = (tensor.meta.shape().clone(), tensor.dtype);
        let created = InitOperationIr::create(shape, dtype, || client.register_tensor_handle(tensor.into()));
        let mut outputs = client.register(StreamId::current(), OperationIr::Init(created), NoOp::<CubeBackend>::new());
        // The operation has one output.
        outputs.remove(0)
    }
}

/// Computes. A tensor is copied first, by burn's own kernel, if its last dimension is not contiguous.
pub fn attend<P: Primitive>(call: &Call<'_>, tensors: [P; 3]) -> Result<P> {
    let [q, k, v] = tensors.map(P::resolve);
    let device = shared(&q.device)?;
    for (argument, tensor) in [("k", &k), ("v", &v)] {
        if tensor.device != q.device {
            let (expected, got) = (format!("a tensor on {:?}, as q", q.device), format!("one on {:?}", tensor.device));
            return Err(Error::Tensor { argument, expected, got });
        }
    }
    let dtypes = [element_type("q", q.dtype)?, element_type("k", k.dtype)?, element_type("v", v.dtype)?];
    let tensors = [q, k, v].map(with_contiguous_rows);
    let [q, k, v] = &tensors;
    let client = &q.client;
    let inputs = [place(client, &q.handle)?, place(client, &k.handle)?, place(client, &v.handle)?];
    let shape = q.meta.shape().to_vec();
    let (handle, output) = place_output(client, shape.iter().product::<usize>() * dtypes[0].size(), &inputs)?;
    // All that burn has to do there must be submitted before attention is. burn's runtime does so today where it looks a place up,
    // but promises it for this call alone.
    let mut streams = vec![StreamId::current()];
    streams.extend(tensors.each_ref().map(|tensor| tensor.handle.stream));
    streams.sort_unstable();
    streams.dedup();
    for stream in streams {
        stream.executes(|| client.flush()).map_err(failed)?;
    }

    let [q_memory, k_memory, v_memory] = inputs.each_ref().map(|place| place.memory(&device));
    let memories = [q_memory?, k_memory?, v_memory?];
    let view = |at: usize| -> Result<TensorView<'_>> {
        let (meta, dtype) = (&tensors[at].meta, dtypes[at]);
        let strides = meta.strides().iter().map(|&stride| stride as u64);
        Ok(memories[at].view(dtype, layout::of(meta.shape(), strides, inputs[at].first_element(dtype))?))
    };
    let strides = layout::token_major(&shape);
    let mut memory = output.memory(&device)?;
    let sink = layout::of(&shape, strides.iter().map(|&stride| stride as u64), output.first_element(dtypes[0]))?;
    call.launch(&device, [view(0)?, view(1)?, view(2)?], memory.view_mut(dtypes[0], sink))?;

    let metadata = Metadata::new(Shape::from(shape), strides);
    Ok(P::of(CubeTensor::new(client.clone(), handle, metadata, q.device.clone(), q.dtype)))
}

fn element_type(argument: &'static str, dtype: DType) -> Result<varlen_fa::DType> {
    match dtype {
        DType::F32 => Ok(varlen_fa::DType::F32),
        DType::F16 => Ok(varlen_fa::DType::F16),
        DType::BF16 => Ok(varlen_fa::DType::Bf16),
        other => Err(Error::Tensor {
            argument,
            expected: "elements of type f32, f16 or bf16".to_owned(),
            got: other.name().to_owned(),
        }),
    }
}

fn with_contiguous_rows(tensor: CubeTensor) -> CubeTensor {
    let strides = tensor.meta.strides().iter().map(|&stride| stride as isize);
    let lies_well = !tensor.meta.is_tiled() && layout::has_contiguous_rows(tensor.meta.shape(), strides);
    if lies_well { tensor } else { into_contiguous(tensor) }
}

/// Where memory of burn lies.
struct Place<Hold> {
    buffer: wgpu::Buffer,
    /// Where it begins in the buffer, in bytes.
    offset: u64,
    /// While this is there, burn does not move the memory, nor use it for something else. Commands that are submitted come before
    /// all that burn does afterwards.
    _hold: Hold,
}

impl<Hold> Place<Hold> {
    fn memory(&self, device: &Device) -> varlen_fa::Result<DeviceMemory> {
        DeviceMemory::from_wgpu(device, self.buffer.clone())
    }

    fn first_element(&self, dtype: varlen_fa::DType) -> u64 {
        self.offset / dtype.size() as u64
    }
}

/// Finds memory of burn, once all that writes it is recorded.
fn place(client: &Client, handle: &Handle) -> Result<Place<impl Sized + use<>>> {
    let hold = client.get_resource::<WgpuServer<AutoCompiler>>(handle.clone()).map_err(failed)?;
    let WgpuResource { buffer, offset, .. } = hold.resource().clone();
    Ok(Place { buffer, offset, _hold: hold })
}

/// New memory of burn for an output. wgpu lets no launch read and write one buffer, and burn puts several tensors into one: where
/// the memory that burn has at hand is in the buffer of an input, the output gets a buffer of its own.
fn place_output<Hold>(
    client: &Client,
    bytes: usize,
    inputs: &[Place<Hold>],
) -> Result<(Handle, Place<impl Sized + use<Hold>>)> {
    let handle = client.empty(bytes);
    let found = place(client, &handle)?;
    if inputs.iter().all(|input| input.buffer != found.buffer) {
        return Ok((handle, found));
    }
    let handle = client.memory_dedicated_allocation((), |()| client.empty(bytes));
    let found = place(client, &handle)?;
    Ok((handle, found))
}

fn failed(error: ServerError) -> Error {
    Error::Runtime(error.to_string())
}
