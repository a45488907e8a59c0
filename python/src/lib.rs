//! The extension module `varlen_fa._native`: the Rust library for Python. `varlen_fa/__init__.py`
//! passes on what is here, and `_native.pyi` says what it takes.

mod arrays;
mod attention;
mod device;
mod dist;
mod dlpack;
mod errors;
mod masks;
mod memory;
mod parts;
mod prepare_qk;
mod primitives;
mod results;
mod scores;
mod tensor;

/// The Rust library for Python.
#[pyo3::pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::attention::{Plan, attention, plan};
    #[pymodule_export]
    use crate::device::{Device, list_devices};
    #[pymodule_export]
    use crate::dist::{
        Communicator, MeetingPoint, ParallelPlan, ShardedMeta, Shards, parallel_attention, parallel_plan,
    };
    #[pymodule_export]
    use crate::masks::{CuSeqlens, DeviceMeta, KeyMask, Meta};
    #[pymodule_export]
    use crate::prepare_qk::{QkSegment, prepare_qk};
    #[pymodule_export]
    use crate::primitives::{merge_attention, pack, pack_qkv, scatter_to_padded, varlen_attention};
    #[pymodule_export]
    use crate::scores::{KeyRanges, ScoreModifiers, alibi_slopes};
    #[pymodule_export]
    use crate::tensor::Tensor;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("KERNELS", varlen_fa::Kernel::ALL.iter().map(|kernel| kernel.name()).collect::<Vec<_>>())
    }
}
