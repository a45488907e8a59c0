//! The mask of an attention call, as C describes it.

use std::sync::{Arc, RwLockReadGuard};

use varlen::{AttentionMask, Device, DeviceVarlenMeta, KeyMask, KeyRanges, Metadata, ScoreModifiers, VarlenMeta};

use crate::arguments::{Name, choose, expect_zeros, read_optional};
use crate::device_meta::DeviceMeta;
use crate::failure::{Failure, Result};
use crate::handles;
use crate::key_ranges;
use crate::score_modifiers;
use crate::tensors::{Described, Input, expect_apart};
use crate::types::{
    varlen_fa_attention_mask, varlen_fa_device_meta, varlen_fa_mask_kind, varlen_fa_meta, varlen_fa_status,
};

/// A checked mask. It keeps the objects of its handles alive during the call.
#[derive(Debug)]
pub(crate) struct Mask<'a> {
    tokens: Tokens,
    ranges: Option<Arc<KeyRanges>>,
    modifiers: Option<Arc<ScoreModifiers>>,
    bias: Option<Input<'a>>,
}

/// Which tokens count.
#[derive(Debug)]
enum Tokens {
    All,
    Key(Arc<KeyMask>),
    /// No `key` is self-attention.
    Varlen {
        query: Meta,
        key: Option<Meta>,
    },
}

impl<'a> Mask<'a> {
    /// Reads the mask; a bias must overlap no output.
    ///
    /// # Safety
    /// `mask` is null, misaligned, or points to a mask that C initialised, whose bias obeys
    /// [`Described::new`].
    pub unsafe fn read(
        device: &Device,
        mask: *const varlen_fa_attention_mask,
        outputs: &[&Described<'_>],
    ) -> Result<Self> {
        // SAFETY: by this function's contract.
        let Some(mask) = unsafe { read_optional(Name::of("mask"), mask) }? else {
            return Ok(Self { tokens: Tokens::All, ranges: None, modifiers: None, bias: None });
        };
        let kind = checked_kind(&mask)?;
        let mut bias = None;
        if kind == varlen_fa_mask_kind::Bias || !mask.bias.is_null() {
            // SAFETY: by this function's contract.
            let described = unsafe { Described::new("bias", mask.bias) }?;
            expect_apart(outputs, &[&described])?;
            bias = Some(Input::of_any_strides(device, &described)?);
        }
        let ranges = key_ranges::optional(Name::of("mask.ranges"), mask.ranges)?;
        let modifiers = score_modifiers::optional(Name::of("mask.modifiers"), mask.modifiers)?;
        Ok(Self { tokens: Tokens::read(kind, &mask)?, ranges, modifiers, bias })
    }

    /// Calls `attend` with the mask. Device metadata is locked meanwhile, so that no thread
    /// rebuilds it.
    pub fn with<R>(&self, attend: impl FnOnce(AttentionMask<'_>) -> R) -> R {
        self.tokens.with(|tokens| attend(self.joined(tokens)))
    }

    /// A mask of tokens with ranges, modifiers and a bias.
    fn joined<'m>(&'m self, mut mask: AttentionMask<'m>) -> AttentionMask<'m> {
        if let Some(ranges) = &self.ranges {
            mask = mask.with_ranges(ranges);
        }
        if let Some(modifiers) = &self.modifiers {
            mask = mask.with_modifiers(modifiers);
        }
        if let Some(bias) = &self.bias {
            mask = mask.with_bias(bias.view());
        }
        mask
    }
}

impl Tokens {
    fn read(kind: varlen_fa_mask_kind, mask: &varlen_fa_attention_mask) -> Result<Self> {
        match kind {
            varlen_fa_mask_kind::None | varlen_fa_mask_kind::Bias => Ok(Self::All),
            varlen_fa_mask_kind::Key => Ok(Self::Key(handles::get(Name::of("mask.key_mask"), mask.key_mask)?)),
            varlen_fa_mask_kind::Varlen => {
                Ok(Self::Varlen { query: Meta::host("mask.query_meta", mask.query_meta)?, key: None })
            }
            varlen_fa_mask_kind::VarlenCross => Ok(Self::Varlen {
                query: Meta::host("mask.query_meta", mask.query_meta)?,
                key: Some(Meta::host("mask.key_meta", mask.key_meta)?),
            }),
            varlen_fa_mask_kind::DeviceVarlen => {
                Ok(Self::Varlen { query: Meta::device("mask.query_device_meta", mask.query_device_meta)?, key: None })
            }
            varlen_fa_mask_kind::DeviceVarlenCross => Ok(Self::Varlen {
                query: Meta::device("mask.query_device_meta", mask.query_device_meta)?,
                key: Some(Meta::device("mask.key_device_meta", mask.key_device_meta)?),
            }),
        }
    }

    fn with<R>(&self, attend: impl FnOnce(AttentionMask<'_>) -> R) -> R {
        match self {
            Self::All => attend(AttentionMask::none()),
            Self::Key(key_mask) => attend(AttentionMask::key(key_mask)),
            Self::Varlen { query, key } => {
                let query_lock = query.lock();
                // Metadata that is both is locked once: a thread that waits to rebuild it would
                // block the second lock.
                let key_lock = key.as_ref().filter(|key| !query.is(key)).map(Meta::lock);
                let key_lock = key_lock.as_ref().unwrap_or(&query_lock);
                attend(AttentionMask::varlen_cross(query_lock.metadata(), key_lock.metadata()))
            }
        }
    }
}

/// Metadata of one side of a call.
#[derive(Debug)]
pub(crate) enum Meta {
    Host(Arc<VarlenMeta>),
    Device(Arc<DeviceMeta>),
}

impl Meta {
    fn host(argument: &'static str, handle: *const varlen_fa_meta) -> Result<Self> {
        Ok(Self::Host(handles::get(Name::of(argument), handle)?))
    }

    fn device(argument: &'static str, handle: *const varlen_fa_device_meta) -> Result<Self> {
        Ok(Self::Device(handles::get(Name::of(argument), handle)?))
    }

    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Host(this), Self::Host(other)) => Arc::ptr_eq(this, other),
            (Self::Device(this), Self::Device(other)) => Arc::ptr_eq(this, other),
            (Self::Host(_), Self::Device(_)) | (Self::Device(_), Self::Host(_)) => false,
        }
    }

    fn lock(&self) -> LockedMeta<'_> {
        match self {
            Self::Host(meta) => LockedMeta::Host(meta),
            Self::Device(meta) => LockedMeta::Device(meta.read()),
        }
    }
}

enum LockedMeta<'a> {
    Host(&'a VarlenMeta),
    Device(RwLockReadGuard<'a, DeviceVarlenMeta>),
}

impl LockedMeta<'_> {
    fn metadata(&self) -> Metadata<'_> {
        match self {
            Self::Host(meta) => Metadata::Host(meta),
            Self::Device(meta) => Metadata::Device(meta),
        }
    }
}

/// The mask's kind. Pointers that the kind does not use must be NULL.
fn checked_kind(mask: &varlen_fa_attention_mask) -> Result<varlen_fa_mask_kind> {
    let name = Name::of("mask");
    let kind = choose(name.field("kind"), mask.kind)?;
    expect_zeros(name.field("reserved_word"), &[u64::from(mask.reserved_word)])?;
    expect_zeros(name.field("reserved"), &mask.reserved)?;
    use varlen_fa_mask_kind::{DeviceVarlen, DeviceVarlenCross, Key, Varlen, VarlenCross};
    for (field, is_null, kinds) in [
        ("key_mask", mask.key_mask.is_null(), &[Key][..]),
        ("query_meta", mask.query_meta.is_null(), &[Varlen, VarlenCross]),
        ("key_meta", mask.key_meta.is_null(), &[VarlenCross]),
        ("query_device_meta", mask.query_device_meta.is_null(), &[DeviceVarlen, DeviceVarlenCross]),
        ("key_device_meta", mask.key_device_meta.is_null(), &[DeviceVarlenCross]),
    ] {
        if !is_null && !kinds.contains(&kind.value) {
            let expected = format!("NULL with a mask of kind {} ({})", kind.number, kind.name.to_string_lossy());
            return Err(Failure::argument(varlen_fa_status::BadValue, name.field(field), expected, "a pointer"));
        }
    }
    Ok(kind.value)
}
