//! The mask of an attention call: [`AttentionMask`], as the application gives it, and as checks, plan and launch take it.

use std::sync::Arc;

use crate::call::memory::Input;
use crate::call::op::{DeviceTables, Rows};
use crate::call::path::Path;
use crate::call::problem::{AttentionProblem, DeviceMetaInfo, MaskInfo, TokenInfo};
use crate::error::{Error, Result};
use crate::mask::every_query::EveryQuery;
use crate::mask::key_mask::KeyMask;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::score_modifiers::ScoreModifiers;
use crate::tensor::TensorView;
use crate::tensor::device_meta::DeviceVarlenMeta;

/// Which queries attend to which keys of padded tensors: which tokens count, which of them each query sees, and what is added to
/// the scores.
///
/// ```
/// use varlen_fa::{AttentionMask, KeyMask, KeyRanges, VarlenMeta};
///
/// let mask = KeyMask::from_lengths(128, &[100, 77])?;
/// let meta = VarlenMeta::from_key_mask(&mask)?;
/// let causal = KeyRanges::causal([2, 128, 128])?;
/// let _ = AttentionMask::varlen(&meta).with_ranges(&causal);
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct AttentionMask<'a> {
    tokens: Tokens<'a>,
    ranges: Option<&'a KeyRanges>,
    modifiers: Option<&'a ScoreModifiers>,
    bias: Option<TensorView<'a>>,
}

/// Which tokens count.
#[derive(Debug, Clone, Copy)]
enum Tokens<'a> {
    All,
    Key(&'a KeyMask),
    Varlen { query: Metadata<'a>, key: Metadata<'a> },
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
    /// Every query attends to every key.
    #[must_use]
    pub fn none() -> Self {
        Self { tokens: Tokens::All, ranges: None, modifiers: None, bias: None }
    }

    /// Every query attends to the kept keys of its batch row, `[B, Sk]`. Rows of dropped queries are computed like any other, as
    /// PyTorch's SDPA does. NaN and Inf in dropped keys and values never matter. It costs what the mask keeps: keep the mask for
    /// all calls of a request, since it keeps what devices are told of it.
    #[must_use]
    pub fn key(mask: &'a KeyMask) -> Self {
        Self { tokens: Tokens::Key(mask), ..Self::none() }
    }

    /// A bias and no other mask: see [`with_bias`](Self::with_bias).
    pub fn bias(bias: impl Into<TensorView<'a>>) -> Self {
        Self::none().with_bias(bias)
    }

    /// Self-attention among the valid tokens of `[B, S]`; the rows of the others are exactly zero in the output.
    pub fn varlen(meta: impl Into<Metadata<'a>>) -> Self {
        let meta = meta.into();
        Self::varlen_cross(meta, meta)
    }

    /// Cross-attention of the valid queries, `[B, Sq]`, to the valid keys of their batch row, `[B, Sk]`; other rows are exactly
    /// zero in the output. Both are built on the host, or both on the device.
    pub fn varlen_cross(query: impl Into<Metadata<'a>>, key: impl Into<Metadata<'a>>) -> Self {
        Self { tokens: Tokens::Varlen { query: query.into(), key: key.into() }, ..Self::none() }
    }

    /// Each query sees the kept keys of its range alone: causal masks, windows, documents. A query that sees none gives zeros. NaN
    /// and Inf in keys and values that a query does not see never matter to it.
    #[must_use]
    pub fn with_ranges(mut self, ranges: &'a KeyRanges) -> Self {
        self.ranges = Some(ranges);
        self
    }

    /// What else happens to the scores: a soft cap, ALiBi, attention sinks. A cap and ALiBi come before the bias.
    #[must_use]
    pub fn with_modifiers(mut self, modifiers: &'a ScoreModifiers) -> Self {
        self.modifiers = Some(modifiers);
        self
    }

    /// A floating-point tensor that is added to the scaled scores, broadcast over `[B, H, Sq, Sk]`; of the tensors' element
    /// type or f32. A row whose every entry is −∞ gives zeros. −∞ hides a score, NaN and +∞ included, but not the value: 0 · NaN is
    /// NaN. Drop keys by a mask where padding may hold anything.
    #[must_use]
    pub fn with_bias(mut self, bias: impl Into<TensorView<'a>>) -> Self {
        self.bias = Some(bias.into());
        self
    }

    /// What is added to the scores.
    pub(crate) fn bias_view(&self) -> Option<&TensorView<'a>> {
        self.bias.as_ref()
    }

    /// The mask as checks, plan and launch take it.
    pub(crate) fn resolve(self) -> Result<ResolvedMask<'a>> {
        let tokens = self.tokens.resolve()?;
        let ranges = match tokens {
            ResolvedTokens::Varlen { query, key } if query.id() == key.id() => query.ranges_within(self.ranges)?,
            ResolvedTokens::Varlen { query, key } if query.documents().or(key.documents()).is_some() => {
                return Err(Error::NotApplicable {
                    argument: "mask",
                    got: "metadata of documents in cross-attention".to_owned(),
                    why: "documents are for self-attention; give cross-attention ranges of its own".to_owned(),
                });
            }
            _ => self.ranges.cloned(),
        };
        Ok(ResolvedMask {
            tokens,
            ranges,
            modifiers: self.modifiers.filter(|modifiers| !modifiers.set().is_empty()),
            bias: self.bias,
        })
    }
}

impl<'a> Tokens<'a> {
    fn resolve(self) -> Result<ResolvedTokens<'a>> {
        let (query, key) = match self {
            Self::All => return Ok(ResolvedTokens::All),
            Self::Key(mask) => return Ok(ResolvedTokens::Key(mask)),
            Self::Varlen { query, key } => (query, key),
        };
        if let (Some(query), Some(key)) = (query.on_host(), key.on_host()) {
            return Ok(ResolvedTokens::Varlen { query, key });
        }
        if let (Some(query), Some(key)) = (query.on_device(), key.on_device()) {
            return Ok(ResolvedTokens::DeviceVarlen { query, key });
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
#[derive(Debug, Clone)]
pub(crate) struct ResolvedMask<'a> {
    tokens: ResolvedTokens<'a>,
    ranges: Option<KeyRanges>,
    modifiers: Option<&'a ScoreModifiers>,
    bias: Option<TensorView<'a>>,
}

#[derive(Debug, Clone, Copy)]
enum ResolvedTokens<'a> {
    All,
    Key(&'a KeyMask),
    Varlen { query: &'a VarlenMeta, key: &'a VarlenMeta },
    DeviceVarlen { query: DeviceSide<'a>, key: DeviceSide<'a> },
}

impl<'a> ResolvedMask<'a> {
    /// What checks and plan need.
    pub(crate) fn info(&self) -> MaskInfo<'_> {
        let tokens = match self.tokens {
            ResolvedTokens::All => TokenInfo::All,
            ResolvedTokens::Key(mask) => TokenInfo::Key(mask),
            ResolvedTokens::Varlen { query, key } => TokenInfo::Varlen { query, key },
            ResolvedTokens::DeviceVarlen { query, key } => TokenInfo::DeviceVarlen { query: query.info, key: key.info },
        };
        MaskInfo {
            tokens,
            ranges: self.ranges.as_ref(),
            modifiers: self.modifiers,
            bias: self.bias.as_ref().map(TensorView::info),
        }
    }

    /// The tokens of which neither q nor k matters otherwise, where they have the same tokens; none where each may matter, or
    /// only the device knows.
    pub(crate) fn tokens_of_both(&self) -> Option<&'a KeyMask> {
        match self.tokens {
            ResolvedTokens::Varlen { query, key } if query.id() == key.id() => Some(query.key_mask()),
            _ => None,
        }
    }

    /// Metadata that stands for a key mask, where the path reads metadata.
    pub(crate) fn every_query(&self, path: Path, seq_q: usize) -> Result<Option<Arc<EveryQuery>>> {
        match self.tokens {
            ResolvedTokens::Key(mask) if path != Path::Dense => mask.every_query(seq_q).map(Some),
            _ => Ok(None),
        }
    }

    /// The rows of a launch on this path, with what [`every_query`](Self::every_query) gave. On the dense path masks do the work
    /// of metadata, and masks that keep all are left out.
    pub(crate) fn rows<'r>(&'r self, path: Path, every_query: Option<&'r EveryQuery>) -> Rows<'r> {
        if let Some(EveryQuery { query, key }) = every_query {
            return Rows::Varlen { query, key };
        }
        let (key_mask, zero_rows) = match self.tokens {
            ResolvedTokens::Varlen { query, key } if path != Path::Dense => return Rows::Varlen { query, key },
            ResolvedTokens::DeviceVarlen { query, key } => {
                return Rows::DeviceVarlen { query: query.tables, key: key.tables };
            }
            ResolvedTokens::All => (None, None),
            ResolvedTokens::Key(mask) => (Some(mask), None),
            ResolvedTokens::Varlen { query, key } => (Some(key.key_mask()), Some(query.key_mask())),
        };
        let unless_full = |mask: &&KeyMask| !mask.is_all_kept();
        Rows::Dense { key_mask: key_mask.filter(unless_full), zero_rows: zero_rows.filter(unless_full) }
    }

    /// The bias of a launch.
    pub(crate) fn bias(&self, problem: &AttentionProblem) -> Option<Input<'a>> {
        Some(self.bias?.with_layout(problem.bias?).input())
    }

    /// The score modifiers of a launch.
    pub(crate) fn modifiers(&self) -> Option<&'a ScoreModifiers> {
        self.modifiers
    }

    /// The ranges of a launch.
    pub(crate) fn ranges(&self) -> Option<&KeyRanges> {
        self.ranges.as_ref()
    }
}
