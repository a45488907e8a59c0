//! Tensor maps: how tensors are described to the copy engine (TMA, from compute capability 9.0 on),
//! by `cuTensorMapEncodeTiled`.

use std::ffi::c_void;

use cudarc::driver::DriverError;
use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use crate::backends::cuda::kernels::params::{ELEMENT_BYTES, TensorMap};
use crate::dtype::DType;

use super::placement::Placed;

/// The stride of a dimension of size 1: any that the driver accepts.
const UNUSED_STRIDE: u64 = 16;

/// A tensor as its map describes it: head dimension, tokens, heads, batch rows.
#[derive(Debug, Clone, Copy)]
pub struct MappedTensor {
    pub placed: Placed,
    pub dtype: DType,
    pub head_dim: usize,
    pub tokens: usize,
    pub heads: usize,
    /// 1 for packed tensors.
    pub batch: usize,
}

impl MappedTensor {
    /// The map of boxes of `rows` tokens of one head, `panel` columns wide and swizzled over their
    /// width. Elements outside the tensor are read as zeros and not written.
    pub fn encode(&self, panel: u32, rows: u32) -> Result<TensorMap, DriverError> {
        let strides = self.placed.strides;
        // The driver refuses an extent of 0. Nothing is read then.
        let sizes = [self.head_dim, self.tokens, self.heads, self.batch].map(|size| size.max(1) as u64);
        let stride = |size: u64, stride: i64| match size {
            1 => UNUSED_STRIDE,
            // Never negative: layouts count strides without a sign.
            _ => stride.unsigned_abs() * u64::from(ELEMENT_BYTES),
        };
        let strides =
            [stride(sizes[1], strides.token), stride(sizes[2], strides.head), stride(sizes[3], strides.batch)];
        let (boxed, steps) = ([panel, rows, 1, 1], [1_u32; 4]);
        let data_type = match self.dtype {
            DType::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let swizzle = match panel * ELEMENT_BYTES {
            128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        };
        let mut map = CUtensorMap { opaque: [0; 16] };
        // SAFETY: the map is the driver's own type; the arrays have an entry for each of the four
        // dimensions (the strides one less) and live through the call, which reads no memory at the
        // tensor's address.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                data_type,
                4,
                self.placed.address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxed.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()?;
        Ok(TensorMap(map.opaque))
    }
}
