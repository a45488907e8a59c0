//! The WGSL device: compute shaders on Vulkan, Metal, DirectX 12 and WebGPU adapters.
//!
//! It needs no optional feature. Where an adapter has cooperative matrices, attention runs on them.

mod adapter;
mod attention;
mod buffer;
mod context;
mod coop;
mod copy;
mod device;
mod device_meta;
mod dispatch;
mod external;
mod fault;
mod head_table;
mod launcher;
mod launches;
mod lse;
mod metadata;
mod pace;
mod params;
mod placement;
mod prepare_qk;
mod ranges;
mod recorder;
mod scratch;
mod segments;
mod shader;
mod sides;
mod splits;
mod tilings;
mod timer;
mod transfer;
mod trust;
mod wait;
mod work;

pub(crate) use device::WgpuDevice;
pub use recorder::Recorder;
