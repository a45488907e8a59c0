//! The encoder's attention: the one place that calls `varlen-fa`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use varlen_fa::{
    AttentionMask, BackendKind, DType, Device, Element, KeyMask, MaskedAttention, Plan, Tensor, TensorView,
    TensorViewMut, VarlenMeta, f16,
};

/// What the layer is told of the padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// A key mask: padded keys are dropped, padded queries computed like any other.
    KeyMask,
    /// Metadata: padded queries are dropped too, and the device skips what is masked.
    Varlen,
}

impl Padding {
    /// `dense` or `varlen`.
    pub fn name(self) -> &'static str {
        match self {
            Self::KeyMask => "dense",
            Self::Varlen => "varlen",
        }
    }
}

/// The padding of one batch, built once and used by every layer.
#[derive(Debug)]
pub enum BatchMask {
    /// For [`Padding::KeyMask`].
    KeyMask(KeyMask),
    /// For [`Padding::Varlen`].
    Varlen(VarlenMeta),
}

impl BatchMask {
    /// The mask of a batch of `lengths.len()` rows of `seq` tokens, the first `lengths[b]` of each valid.
    pub fn new(padding: Padding, seq: usize, lengths: &[usize]) -> Result<Self> {
        let mask = KeyMask::from_lengths(seq, lengths)?;
        Ok(match padding {
            Padding::KeyMask => Self::KeyMask(mask),
            Padding::Varlen => Self::Varlen(VarlenMeta::from_key_mask(&mask)?),
        })
    }

    fn as_attention_mask(&self) -> AttentionMask<'_> {
        match self {
            Self::KeyMask(mask) => AttentionMask::key(mask),
            Self::Varlen(meta) => AttentionMask::varlen(meta),
        }
    }
}

/// How a projection reaches the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transfer {
    /// The CPU device reads it where it is, and writes its output where we want it.
    Borrow,
    /// Copied.
    F32,
    /// Rounded and copied: the device takes 16-bit elements alone.
    F16,
}

/// Self-attention on a device, with the time that it takes. A device measures one caller's time: no other thread may use
/// one on the same device at the same moment.
#[derive(Debug)]
pub struct SelfAttention {
    device: Device,
    layer: MaskedAttention,
    transfer: Transfer,
    time: Duration,
    time_with_copies: Duration,
    plans: BTreeMap<String, usize>,
}

impl SelfAttention {
    /// Attention on `device`, with the usual scale of `1/√head_dim`.
    pub fn new(device: &Device) -> Self {
        let capabilities = device.capabilities();
        let transfer = match capabilities.dtypes.contains(&DType::F32) {
            true if capabilities.backend == BackendKind::Cpu => Transfer::Borrow,
            true => Transfer::F32,
            false => Transfer::F16,
        };
        Self {
            device: device.clone(),
            layer: MaskedAttention::new(device),
            transfer,
            time: Duration::ZERO,
            time_with_copies: Duration::ZERO,
            plans: BTreeMap::new(),
        }
    }

    /// Attention of a fused projection `qkv`, `shape` = `[batch, seq, 3·heads, head_dim]` with the query heads first, then
    /// the key heads, then the value heads. Gives `[batch, seq, heads, head_dim]`.
    pub fn forward(&mut self, qkv: &[f32], shape: [usize; 4], mask: &BatchMask) -> Result<Vec<f32>> {
        let start = Instant::now();
        let [batch, seq, heads, head_dim] = shape;
        let out_shape = [batch, seq, heads / 3, head_dim];
        let out = match self.transfer {
            Transfer::Borrow => {
                let mut out = vec![0.0; out_shape.iter().product()];
                let sink = TensorViewMut::from_host(&mut out, &out_shape)?;
                self.attend(TensorView::from_host(qkv, &shape)?, |layer, [q, k, v]| {
                    Ok(((), layer.forward_into(q, k, v, mask.as_attention_mask(), sink)?))
                })?;
                out
            }
            Transfer::F32 => self.attend_on_device(qkv, &shape, mask)?.to_vec()?,
            Transfer::F16 => {
                let qkv: Vec<f16> = qkv.iter().copied().map(f16::from_f32).collect();
                let out = self.attend_on_device(&qkv, &shape, mask)?.to_vec::<f16>()?;
                out.into_iter().map(Element::to_f32).collect()
            }
        };
        self.time_with_copies += start.elapsed();
        Ok(out)
    }

    fn attend_on_device<T: Element>(&mut self, qkv: &[T], shape: &[usize], mask: &BatchMask) -> Result<Tensor> {
        let qkv = Tensor::from_slice(&self.device, qkv, shape)?;
        self.attend(qkv.view(), |layer, [q, k, v]| {
            let attended = layer.forward(q, k, v, mask.as_attention_mask())?;
            Ok((attended.out, attended.plan))
        })
    }

    /// Slices the projection into queries, keys and values, without a copy, and times `call` on them.
    fn attend<'a, R>(
        &mut self,
        qkv: TensorView<'a>,
        call: impl FnOnce(&MaskedAttention, [TensorView<'a>; 3]) -> varlen_fa::Result<(R, Plan)>,
    ) -> Result<R> {
        let heads = qkv.shape()[2] / 3;
        let part = |index: usize| qkv.slice(2, index * heads..(index + 1) * heads);
        let parts = [part(0)?, part(1)?, part(2)?];
        let ((out, plan), timing) = self.device.time(|| call(&self.layer, parts))?;
        self.time += timing.duration;
        *self.plans.entry(plan.to_string()).or_default() += 1;
        Ok(out)
    }

    /// Time of all calls so far: on the device where it can measure its own work.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// The same on the host's clock, with the copies to and from the device.
    pub fn time_with_copies(&self) -> Duration {
        self.time_with_copies
    }

    /// The plans of all calls so far (path, kernel and reason), each with its number of calls.
    pub fn plans(&self) -> &BTreeMap<String, usize> {
        &self.plans
    }

    /// Forgets times and plans.
    pub fn reset(&mut self) {
        self.time = Duration::ZERO;
        self.time_with_copies = Duration::ZERO;
        self.plans.clear();
    }

    /// How the projections reach the device, in words.
    pub fn transfer(&self) -> &'static str {
        match self.transfer {
            Transfer::Borrow => "f32, read and written in place",
            Transfer::F32 => "f32, copied to and from the device",
            Transfer::F16 => "f16, copied to and from the device",
        }
    }
}
