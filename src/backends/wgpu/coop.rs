//! The kernel on cooperative matrices: whether a device has what it needs, which tile it takes, and the check against the
//! portable kernel that it must pass before it is offered.

use half::f16;
#[cfg(not(target_arch = "wasm32"))]
use wgpu::Backends;
use wgpu::{Adapter, CooperativeScalarType, ExperimentalFeatures, Features};

use crate::call::op::{Attention, Backend, Input, Op, Output, Rows, Storage};
use crate::call::plan::{Path, Plan, Reason};
use crate::call::problem::{AttentionProblem, AttentionShape};
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::layout::Layout;
use crate::mask::key_mask::KeyMask;

use super::WgpuDevice;
use super::shader::CoopTile;

/// What the kernel is written with.
pub(super) const FEATURES: Features =
    Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(Features::SHADER_F16).union(Features::SUBGROUP);
/// Less workgroup memory than this has no room for the keys and values of large head dimensions.
const LEAST_WORKGROUP_BYTES: u32 = 32 << 10;

/// Cooperative matrices of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Coop {
    /// Rows and columns of a matrix.
    shape: u32,
    subgroup_size: u32,
    workgroup_bytes: u32,
    invocations: u32,
}

impl Coop {
    /// What an adapter has, if the kernel runs on it: square matrices of f16 with f32 accumulators, and subgroups that are all of
    /// one size, since the kernel counts on which rows a subgroup owns.
    pub fn of(adapter: &Adapter) -> Option<Self> {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        // Metal's loads take pointers to elements, and the shader's point to vectors of four, which tells of their alignment.
        if info.backend != wgpu::Backend::Vulkan || !adapter.features().contains(FEATURES) {
            return None;
        }
        let properties = adapter.cooperative_matrix_properties();
        let is_usable = |size: u32| {
            let wanted = (size, size, size, CooperativeScalarType::F16, CooperativeScalarType::F32);
            properties.iter().any(|p| (p.m_size, p.n_size, p.k_size, p.ab_type, p.cr_type) == wanted)
        };
        let shape = [16, 8].into_iter().find(|&size| is_usable(size))?;
        let coop = Self {
            shape,
            subgroup_size: info.subgroup_min_size,
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
            invocations: limits.max_compute_invocations_per_workgroup,
        };
        let is_one_size = info.subgroup_min_size == info.subgroup_max_size && coop.subgroup_size >= shape;
        (is_one_size && coop.workgroup_bytes >= LEAST_WORKGROUP_BYTES).then_some(coop)
    }

    /// What an application's device has. A device does not tell the shapes of its matrices, so its adapter is looked up.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn of_device(device: &wgpu::Device) -> Option<Self> {
        let limits = device.limits();
        if !device.features().contains(FEATURES) || limits.max_compute_workgroup_storage_size < LEAST_WORKGROUP_BYTES {
            return None;
        }
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
        let adapters = pollster::block_on(instance.enumerate_adapters(Backends::PRIMARY));
        let info = device.adapter_info();
        let coop = adapters.iter().find(|adapter| adapter.get_info() == info).and_then(Self::of)?;
        let workgroup_bytes = limits.max_compute_workgroup_storage_size;
        Some(Self { workgroup_bytes, invocations: limits.max_compute_invocations_per_workgroup, ..coop })
    }

    /// WebGPU has no cooperative matrices.
    #[cfg(target_arch = "wasm32")]
    pub fn of_device(_device: &wgpu::Device) -> Option<Self> {
        None
    }

    /// The tile for a head dimension: the first of the list that fits. The last one always does.
    pub fn tile(self, head_dim: usize) -> CoopTile {
        let Self { shape, subgroup_size, .. } = self;
        let tile = |subgroups, keys| CoopTile { shape, subgroup_size, subgroups, keys };
        let fits = |tile: &CoopTile| {
            tile.workgroup_bytes(head_dim) <= self.workgroup_bytes
                && tile.subgroups * tile.subgroup_size <= self.invocations
        };
        // Devices with matrices of 8 are processors, which take seconds to compile large tiles.
        let subgroups = if shape == 8 { 4 } else { 8 };
        // In the order of their speed on an H100 (docs/log/wgsl-coop.md).
        let tiles = [tile(subgroups, 32), tile(8, 16), tile(4, 32), tile(2, 16)];
        tiles.into_iter().find(fits).unwrap_or(tile(1, 16))
    }
}

/// That an adapter's experimental features may be asked for.
pub(super) fn experimental() -> ExperimentalFeatures {
    // SAFETY: wgpu asks for the promise that its experimental features are known to have bugs, and undefined behaviour where they
    // are misused. Of them only cooperative matrices are used, in one shader whose loads and stores stay inside their arrays (see
    // `Launcher::compile`), with a shape that the adapter reports, and only after a check of its results against the portable
    // kernel.
    unsafe { ExperimentalFeatures::enabled() }
}

/// How far the kernels' outputs may be apart: they are means of values in -1..1, rounded to f16, of weights rounded to f16.
const MOST_APART: f32 = 4e-3;

/// Of the call that is checked. Small, since drivers take long to compile large ones; one that fills no matrix of 16.
const HEAD_DIM: usize = 24;

/// Computes one small call by this kernel and by the portable one. Gives the largest difference if it is too large.
pub(super) fn differs(device: &WgpuDevice) -> Result<Option<f32>> {
    // Rows and keys that fill no tile, two heads to a key/value head, a dropped key in each word of the mask.
    let shape = AttentionShape { batch: 1, seq_q: 75, seq_k: 139, num_heads: 2, num_kv_heads: 1, head_dim: HEAD_DIM };
    let keep: Vec<bool> = (0..shape.seq_k).map(|key| key % 23 != 7).collect();
    let mask = KeyMask::from_bool(1, shape.seq_k, &keep)?;
    let tensor = |seq: usize, heads: usize, value: &dyn Fn(usize) -> f32| -> Result<_> {
        let (len, layout) = (seq * heads * HEAD_DIM, Layout::contiguous(&[1, seq, heads, HEAD_DIM])?);
        let values: Vec<f16> = (0..len).map(|at| f16::from_f32(value(at))).collect();
        let mut memory = device.alloc(size_of_val(&values[..]) as u64)?;
        device.upload(memory.sink(), bytemuck::cast_slice(&values))?;
        Ok((memory, layout))
    };
    // In -1..1, by a multiplicative hash.
    let noise = |at: usize| ((at as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
    // Later keys are larger, so that maxima grow past the threshold at which outputs are scaled.
    let q = tensor(shape.seq_q, 2, &|at| 2.0 * noise(at))?;
    let k = tensor(shape.seq_k, 1, &|at| noise(at + 77) * (1.0 + (at / HEAD_DIM) as f32 / 16.0))?;
    let v = tensor(shape.seq_k, 1, &|at| noise(at + 991))?;
    let mut outputs = Vec::new();
    for kernel in [Kernel::WgslPortable, Kernel::WgslCoop] {
        let (mut out, layout) = tensor(shape.seq_q, 2, &|_| f32::NAN)?;
        let [q, k, v] = [&q, &k, &v].map(|(memory, layout)| {
            let (memory, layout): (&Storage, &Layout) = (memory, layout);
            Input { memory: memory.source(), layout: *layout, dtype: DType::F16 }
        });
        device.execute(Op::Attention(Attention {
            problem: &AttentionProblem { shape, dtype: DType::F16, softmax_scale: 0.5, bias: None },
            plan: Plan { path: Path::Dense, kernel, reason: Reason::KeyMask },
            q,
            k,
            v,
            out: Output { memory: out.sink(), layout, dtype: DType::F16 },
            lse: None,
            rows: Rows::Dense { key_mask: Some(&mask), bias: None, zero_rows: None },
        }))?;
        let mut values = vec![f16::ZERO; layout.numel()];
        device.download(out.source(), bytemuck::cast_slice_mut(&mut values))?;
        outputs.push(values);
    }
    let apart = outputs[0].iter().zip(&outputs[1]).map(|(a, b)| (a.to_f32() - b.to_f32()).abs());
    // Not `f32::max`, which drops NaN.
    let largest = apart.fold(0.0, |largest: f32, apart| if apart <= largest { largest } else { apart });
    Ok((largest.is_nan() || largest > MOST_APART).then_some(largest))
}
