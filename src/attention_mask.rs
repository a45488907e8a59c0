//! The mask of an attention call: [`AttentionMask`], as the application gives it, and as checks, plan and launch take it.

use std::sync::Arc;

use crate::call::op::{DeviceTables, Rows};
use crate::call::plan::Path;
use crate::call::problem::{AttentionProblem, DeviceMetaInfo, MaskInfo};
use crate::error::{Error, Result};
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;
use crate::tensor::TensorView;
use crate::tensor::device_meta::DeviceVarlenMeta;

/// Which queries attend to which keys of padded tensors.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum AttentionMask<'a> {
    /// Every query attends to every key.
    None,
    /// Every query attends to the kept keys of its batch row, `[B, Sk]`. Rows of dropped queries are computed like any other,
    /// as PyTorch's SDPA does. NaN and Inf in dropped keys and values never matter.
    Key(&'a KeyMask),
    /// A floating-point tensor that is added to the scaled scores, broadcast over `[B, H, Sq, Sk]`; of the tensors' element
    /// type or f32. A row whose every entry is −∞ gives zeros. −∞ hides a score, NaN and +∞ included, but not the value: 0 · NaN is
    /// NaN. Drop keys by a mask where padding may hold anything.
    Bias(TensorView<'a>),
    /// The valid queries attend to the valid keys of their batch row; the rows of other queries are exactly zero in the output.
    /// [`varlen`](Self::varlen) is self-attention, [`varlen_cross`](Self::varlen_cross) cross-attention.
    Varlen {
        /// Which queries are valid, `[B, Sq]`.
        query: Metadata<'a>,
        /// Which keys are valid, `[B, Sk]`.
        key: Metadata<'a>,
    },
}

/// Metadata of one side of an attention call.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Metadata<'a> {
    /// Built on the host.
    Host(&'a VarlenMeta),
    /// Built by the device, of a mask in its memory.
    Device(&'a DeviceVarlenMeta),
}

impl<'a> From<&'a VarlenMeta> for Metadata<'a> {
    fn from(meta: &'a VarlenMeta) -> Self {
        Self::Host(meta)
    }
}

impl<'a> From<&'a DeviceVarlenMeta> for Metadata<'a> {
    fn from(meta: &'a DeviceVarlenMeta) -> Self {
        Self::Device(meta)
    }
}

/// Metadata is often shared among the layers and threads of a request.
impl<'a> From<&'a Arc<VarlenMeta>> for Metadata<'a> {
    fn from(meta: &'a Arc<VarlenMeta>) -> Self {
        Self::Host(meta)
    }
}

impl<'a> AttentionMask<'a> {
    /// Self-attention among the valid tokens of `[B, S]`; the rows of the others are exactly zero in the output.
    pub fn varlen(meta: impl Into<Metadata<'a>>) -> Self {
        let meta = meta.into();
        Self::Varlen { query: meta, key: meta }
    }

    /// Cross-attention of the valid queries, `[B, Sq]`, to the valid keys of their batch row, `[B, Sk]`; other rows are exactly
    /// zero in the output. Both are built on the host, or both on the device.
    pub fn varlen_cross(query: impl Into<Metadata<'a>>, key: impl Into<Metadata<'a>>) -> Self {
        Self::Varlen { query: query.into(), key: key.into() }
    }

    /// The mask as checks, plan and launch take it.
    pub(crate) fn resolve(self) -> Result<ResolvedMask<'a>> {
        let (query, key) = match self {
            Self::None => return Ok(ResolvedMask::None),
            Self::Key(mask) => return Ok(ResolvedMask::Key(mask)),
            Self::Bias(bias) => return Ok(ResolvedMask::Bias(bias)),
            Self::Varlen { query, key } => (query, key),
        };
        if let (Some(query), Some(key)) = (query.on_host(), key.on_host()) {
            return Ok(ResolvedMask::Varlen { query, key });
        }
        if let (Some(query), Some(key)) = (query.on_device(), key.on_device()) {
            return Ok(ResolvedMask::DeviceVarlen { query, key });
        }
        Err(Error::NotApplicable {
            argument: "mask",
            got: "metadata of the host for one side and of the device for the other".to_owned(),
            why: "both sides must be built on the host, or both on the device".to_owned(),
        })
    }
}

impl<'a> Metadata<'a> {
    /// The metadata in host memory, where a device whose memory is the host's keeps it too.
    fn on_host(self) -> Option<&'a VarlenMeta> {
        match self {
            Self::Host(meta) => Some(meta),
            Self::Device(meta) => meta.on_host(),
        }
    }

    fn on_device(self) -> Option<DeviceSide<'a>> {
        match self {
            Self::Host(_) => None,
            Self::Device(meta) => Some(DeviceSide { info: meta.info(), tables: meta.on_device()? }),
        }
    }
}

/// One side's metadata in tables of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceSide<'a> {
    info: DeviceMetaInfo<'a>,
    tables: DeviceTables<'a>,
}

/// An [`AttentionMask`] whose metadata was looked up.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ResolvedMask<'a> {
    None,
    Key(&'a KeyMask),
    Bias(TensorView<'a>),
    Varlen { query: &'a VarlenMeta, key: &'a VarlenMeta },
    DeviceVarlen { query: DeviceSide<'a>, key: DeviceSide<'a> },
}

impl<'a> ResolvedMask<'a> {
    /// What checks and plan need.
    pub(crate) fn info(&self) -> MaskInfo<'_> {
        match *self {
            Self::None => MaskInfo::None,
            Self::Key(mask) => MaskInfo::Key(mask),
            Self::Bias(ref bias) => MaskInfo::Bias(bias.info()),
            Self::Varlen { query, key } => MaskInfo::Varlen { query, key },
            Self::DeviceVarlen { query, key } => MaskInfo::DeviceVarlen { query: query.info, key: key.info },
        }
    }

    /// The rows of a launch on this path. On the dense path masks do the work of metadata, and masks that keep all are left out.
    pub(crate) fn rows(self, problem: &AttentionProblem, path: Path) -> Rows<'a> {
        let (key_mask, zero_rows, bias) = match self {
            Self::Varlen { query, key } if path != Path::Dense => return Rows::Varlen { query, key },
            Self::DeviceVarlen { query, key } => return Rows::DeviceVarlen { query: query.tables, key: key.tables },
            Self::None => (None, None, None),
            Self::Key(mask) => (Some(mask), None, None),
            Self::Bias(bias) => (None, None, problem.bias.map(|layout| bias.with_layout(layout).input())),
            Self::Varlen { query, key } => (Some(key.key_mask()), Some(query.key_mask()), None),
        };
        let unless_full = |mask: &&KeyMask| !mask.is_all_kept();
        Rows::Dense { key_mask: key_mask.filter(unless_full), bias, zero_rows: zero_rows.filter(unless_full) }
    }
}
