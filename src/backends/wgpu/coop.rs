//! Cooperative matrices: whether a device has what the kernel on them needs, and which tile it
//! takes.

#[cfg(not(target_arch = "wasm32"))]
use wgpu::Backends;
use wgpu::{Adapter, CooperativeScalarType, ExperimentalFeatures, Features};

use super::shader::CoopTile;

/// What the kernel uses.
pub(super) const FEATURES: Features =
    Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(Features::SHADER_F16).union(Features::SUBGROUP);
/// With less workgroup memory, keys and values of large head dimensions do not fit.
const LEAST_WORKGROUP_BYTES: u32 = 32 << 10;

/// Cooperative matrices of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Coop {
    /// Rows and columns of a matrix.
    shape: u32,
    subgroup_size: u32,
    workgroup_bytes: u32,
    invocations: u32,
}

impl Coop {
    /// The matrices of an adapter; `None` if the kernel cannot run there. It needs square
    /// matrices of f16 with f32 accumulators, and subgroups that all have the same size, since it
    /// relies on which rows a subgroup owns.
    pub fn of(adapter: &Adapter) -> Option<Self> {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        // Metal's loads take pointers to elements. The shader's point to vectors of four, which
        // tells the driver their alignment.
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

    /// The matrices of an external device. It does not say the shapes of its matrices, so its
    /// adapter is looked up.
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

    /// The tile for a head dimension.
    pub fn tile(self, head_dim: usize) -> CoopTile {
        // Devices with matrices of 8 are processors, which compile large tiles for seconds.
        let subgroups = if self.shape == 8 { 4 } else { 8 };
        // In the order of their speed on an H100 (docs/log/wgsl-coop.md).
        self.first_that_fits(&[(subgroups, 32), (8, 16), (4, 32), (2, 16)], head_dim)
    }

    /// The same for queries that see few keys each: a smaller one, of which several share a multiprocessor, so that some work
    /// while others start or end.
    pub fn tile_for_few_keys(self, head_dim: usize) -> CoopTile {
        if self.shape == 8 { self.tile(head_dim) } else { self.first_that_fits(&[(4, 16), (2, 16)], head_dim) }
    }

    /// The first tile of a list of subgroups and keys that fits, or the smallest, which always does.
    fn first_that_fits(self, tiles: &[(u32, u32)], head_dim: usize) -> CoopTile {
        let Self { shape, subgroup_size, .. } = self;
        let tile = |(subgroups, keys)| CoopTile { shape, subgroup_size, subgroups, keys };
        let fits = |tile: &CoopTile| {
            tile.workgroup_bytes(head_dim) <= self.workgroup_bytes
                && tile.subgroups * tile.subgroup_size <= self.invocations
        };
        tiles.iter().copied().map(tile).find(fits).unwrap_or(tile((1, 16)))
    }
}

/// The promise to wgpu that goes with asking for an adapter's experimental features.
pub(super) fn experimental() -> ExperimentalFeatures {
    // SAFETY: wgpu wants its callers to know that experimental features have bugs, and undefined
    // behaviour where they are misused. Of them only cooperative matrices are used, in one shader
    // whose loads and stores stay inside their arrays (see `Launcher::compile`), with a shape
    // that the adapter reports, and only after its results were compared with the portable
    // kernel's.
    unsafe { ExperimentalFeatures::enabled() }
}
