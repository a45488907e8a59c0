//! The attention layer of a joint transformer: [`JointAttention`].

use std::fmt;

use crate::attention::MaskedAttention;
use crate::attention_mask::AttentionMask;
use crate::attention_outputs::AttentionOutputs;
use crate::call::joint::{JointInfo, check_joint};
use crate::call::op::{Op, Steps};
use crate::call::plan::Plan;
use crate::call::prepare_qk::check_prepare_qk;
use crate::device::Device;
use crate::error::Result;
use crate::prepare_qk::{QkSegment, operation};
use crate::tensor::{Segments, SegmentsMut, TensorView, TensorViewMut};

/// Tokens of a joint layer whose tensors lie together, the text or the image: q and k with their
/// norm and rotary embedding, v, and where the output goes.
#[derive(Debug)]
pub struct JointSegment<'a> {
    qk: QkSegment<'a>,
    v: TensorView<'a>,
    out: TensorViewMut<'a>,
}

impl<'a> JointSegment<'a> {
    /// `v` is a view of the shape of k, `[B, S, Hkv, D]`, and `out` one of the shape of q, `[B, S,
    /// H, D]`, both of their element type. The output shares no memory with any tensor of the call,
    /// and no segment's q or k is written where a v lies.
    pub fn new(qk: QkSegment<'a>, v: impl Into<TensorView<'a>>, out: impl Into<TensorViewMut<'a>>) -> Self {
        Self { qk, v: v.into(), out: out.into() }
    }
}

/// Attention over text and image together, each in tensors of its own: QK-norm, rotary embedding
/// and attention in one call, without a concatenation before it or a split after it.
///
/// It does what [`prepare_qk`](crate::prepare_qk()) and [`MaskedAttention`] do one after the other.
/// Either part of the preparation may be absent, in each segment; q and k are prepared in place or
/// into views of the caller.
///
/// ```
/// use varlen_fa::{
///     AttentionMask, DType, Device, DeviceChoice, JointAttention, JointSegment, KeyMask, QkNorm, QkSegment, Rotary,
///     RotaryPairing, Tensor, VarlenMeta,
/// };
///
/// let device = Device::new(DeviceChoice::Cpu)?;
/// let (batch, text, image, heads, dim) = (2, 3, 5, 4, 8);
/// let filled = |seq: usize| {
///     let shape = [batch, seq, heads, dim];
///     Tensor::from_slice(&device, &vec![0.5_f32; shape.iter().product()], &shape)
/// };
/// let weight = Tensor::from_slice(&device, &vec![1.0_f32; dim], &[dim])?;
/// let cos = Tensor::from_slice(&device, &vec![1.0_f32; image * dim / 2], &[image, dim / 2])?;
/// let sin = Tensor::zeros(&device, DType::F32, &[image, dim / 2])?;
///
/// // Once per request: the second prompt has one token.
/// let mask = KeyMask::from_runs(text + image, &[vec![0..8], vec![0..1, 3..8]])?;
/// let meta = VarlenMeta::from_key_mask(&mask)?;
///
/// // In every layer and step. Here the text is not rotated.
/// let (mut text_q, mut text_k, text_v, mut text_out) = (filled(text)?, filled(text)?, filled(text)?, filled(text)?);
/// let (mut q, mut k, v, mut out) = (filled(image)?, filled(image)?, filled(image)?, filled(image)?);
/// let norm = QkNorm::new(&weight, &weight, 1e-6);
/// let segments = [
///     JointSegment::new(QkSegment::in_place(&mut text_q, &mut text_k).with_norm(norm), &text_v, &mut text_out),
///     JointSegment::new(
///         QkSegment::in_place(&mut q, &mut k)
///             .with_norm(norm)
///             .with_rotary(Rotary::new(&cos, &sin, RotaryPairing::Interleaved)),
///         &v,
///         &mut out,
///     ),
/// ];
/// let plan = JointAttention::new(&device).forward_into(segments, AttentionMask::varlen(&meta))?;
/// println!("{plan}");
/// assert!(out.to_vec::<f32>()?.iter().all(|value| (value - 0.5).abs() < 1e-6));
/// let masked = &text_out.to_vec::<f32>()?[(text + 1) * heads * dim..];
/// assert!(masked.iter().all(|&value| value == 0.0));
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct JointAttention {
    attention: MaskedAttention,
}

/// What was decided for a call of [`JointAttention`]. [`Display`](fmt::Display) says it in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct JointPlan {
    /// What is done to q and k before attention.
    pub preparation: Preparation,
    /// How attention is computed.
    pub attention: Plan,
}

/// What happens to q and k before attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Preparation {
    /// Nothing: there is neither a norm nor a rotation, and q and k stay where they are; or no row
    /// to do it to.
    Nothing,
    /// Rows of valid tokens are prepared. Those of the others are neither read nor written.
    ValidTokens,
    /// All rows are prepared: every token is valid, or the mask does not say on the host which rows
    /// of q do not matter.
    AllTokens,
}

impl fmt::Display for JointPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.preparation, self.attention)
    }
}

impl fmt::Display for Preparation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "q and k as they are",
            Self::ValidTokens => "q and k prepared, valid tokens alone",
            Self::AllTokens => "q and k prepared, every token",
        })
    }
}

/// A layer with the scale, the path and the kernel of another.
impl From<MaskedAttention> for JointAttention {
    fn from(attention: MaskedAttention) -> Self {
        Self { attention }
    }
}

impl JointAttention {
    /// A layer on a device. One whose scale is another is made of a [`MaskedAttention`], by
    /// `into()`.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        MaskedAttention::new(device).into()
    }

    /// The layer's device.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.attention.device()
    }

    /// The layer on 1 to 8 segments, which follow one another along S in the mask, a bias and
    /// ranges. They agree in batch size, heads, head dimension and element type. Every element of
    /// their outputs is written: rows of masked queries are zeros.
    ///
    /// Under [`AttentionMask::varlen`] with metadata of the host, rows of masked tokens are not
    /// read, and their q and k stay as they are. Every token is prepared under
    /// [`AttentionMask::key`], which computes the queries of dropped tokens too, under
    /// [`AttentionMask::varlen_cross`] with two metadata, and with metadata that is in a GPU's
    /// memory. What dropped keys and values hold never matters to the output then either.
    ///
    /// On wgpu devices all is in one submission, unless the work is long.
    ///
    /// # Errors
    /// An [`Error`](crate::Error) that names segment and argument, `segments[1].k` for example, or
    /// the argument of [`MaskedAttention::forward`], if the arguments do not fit one another or the
    /// device; nothing was written then. Where memory is exhausted or the device lost, q and k may
    /// have been prepared. So they may on a CUDA device that refuses the output of a single segment
    /// since its rows do not start at multiples of 16 bytes.
    pub fn forward_into<'a>(
        &self,
        segments: impl IntoIterator<Item = JointSegment<'a>>,
        mask: AttentionMask<'_>,
    ) -> Result<JointPlan> {
        self.run(segments, mask, |steps| self.device().backend()?.execute_all(steps))
    }

    /// The call, whose operations `execute_all` launches or records.
    pub(crate) fn run<'a>(
        &self,
        segments: impl IntoIterator<Item = JointSegment<'a>>,
        mask: AttentionMask<'_>,
        execute_all: impl FnOnce(Steps<'_>) -> Result<()>,
    ) -> Result<JointPlan> {
        let (mut qk, (v, out)): (Vec<_>, (Vec<_>, Vec<_>)) =
            segments.into_iter().map(|JointSegment { qk, v, out }| (qk, (v, out))).unzip();
        let device = self.device().info();
        {
            let infos: Vec<_> = qk.iter().map(QkSegment::info).collect();
            // Attention checks the mask.
            check_prepare_qk(device, &infos, None)?;
            let others = v.iter().zip(&out).map(|(v, out)| JointInfo { v: v.info(), out: out.info() });
            let bias = mask.bias_view().map(TensorView::info);
            check_joint(device, &infos.into_iter().zip(others).collect::<Vec<_>>(), bias.as_ref())?;
        }
        let v = Segments::from(v);
        let outputs = AttentionOutputs::new(SegmentsMut::from(out));
        let (problem, attention, mask) = {
            let (out, lse) = outputs.infos();
            self.attention.prepare(&inputs(&qk, &v), mask, (&out, lse.as_ref()))?
        };
        let mut preparation = Preparation::Nothing;
        let joint_seq = (qk.len() > 1).then_some(problem.shape.seq_q);
        execute_all(Box::new(|execute| {
            let segments = qk.iter_mut().map(QkSegment::reborrow).collect();
            if let Some(mut call) = operation(segments, mask.tokens_of_both())? {
                call.joint_seq = joint_seq;
                preparation = match call.mask {
                    Some(_) => Preparation::ValidTokens,
                    None => Preparation::AllTokens,
                };
                execute(Op::PrepareQk(call))?;
            }
            self.attention.launch(problem, attention, inputs(&qk, &v), mask, outputs, execute)
        }))?;
        Ok(JointPlan { preparation, attention })
    }
}

/// The inputs of attention: q and k as they come out, and v.
fn inputs<'q>(qk: &'q [QkSegment<'_>], v: &Segments<'q>) -> [Segments<'q>; 3] {
    let [q, k] = [0, 1].map(|which| qk.iter().map(|segment| segment.prepared()[which]).collect());
    [q, k, v.clone()]
}
