//! QK-norm and rotary embedding of the segments of a joint layer: [`prepare_qk`].

use std::sync::Arc;

use crate::call::op::Op;
use crate::call::prepare_qk::{
    HeadNorm, HeadRotary, PrepareQk, PrepareSegment, PreparedRows, RotaryPairing, RowsInfo, SegmentInfo,
    check_prepare_qk, is_same,
};
use crate::call::segments::{MAX_SEGMENTS, SEGMENT_NAMES};
use crate::device::Device;
use crate::error::Result;
use crate::layout::Layout;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;
use crate::tensor::{TensorView, TensorViewMut};

/// Tokens whose q, `[B, S, H, D]`, and k, `[B, S, Hkv, D]`, lie together: the text or the image of a
/// joint layer. Each view has its own memory and strides.
#[derive(Debug)]
pub struct QkSegment<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    norm: Option<QkNorm<'a>>,
    rotary: Option<Rotary<'a>>,
}

/// q or k: what is read, unless it is what is written.
#[derive(Debug)]
struct Rows<'a> {
    input: Option<TensorView<'a>>,
    output: TensorViewMut<'a>,
}

/// RMSNorm of each head: `x · weight / sqrt(mean(x²) + eps)`.
#[derive(Debug, Clone, Copy)]
pub struct QkNorm<'a> {
    weights: [TensorView<'a>; 2],
    eps: f32,
}

/// Rotary embedding: a rotation of pairs of elements by the angles of the token.
#[derive(Debug, Clone, Copy)]
pub struct Rotary<'a> {
    cos: TensorView<'a>,
    sin: TensorView<'a>,
    pairing: RotaryPairing,
}

/// Which tokens of all segments, one after another, count: `[B, S]`, a key mask or metadata, or every token.
#[derive(Debug, Clone, Copy)]
pub struct TokenMask<'a>(Option<&'a KeyMask>);

impl<'a> QkSegment<'a> {
    /// Segments that one call takes, at most.
    pub const MAX: usize = MAX_SEGMENTS;

    /// q and k that are replaced by what comes out.
    pub fn in_place(q: impl Into<TensorViewMut<'a>>, k: impl Into<TensorViewMut<'a>>) -> Self {
        Self::of([None, None], [q.into(), k.into()])
    }

    /// q and k that stay, and where the results go: views of the same shapes and element type that share no memory with an
    /// input.
    pub fn copied(
        q: impl Into<TensorView<'a>>,
        k: impl Into<TensorView<'a>>,
        q_out: impl Into<TensorViewMut<'a>>,
        k_out: impl Into<TensorViewMut<'a>>,
    ) -> Self {
        Self::of([Some(q.into()), Some(k.into())], [q_out.into(), k_out.into()])
    }

    fn of([q, k]: [Option<TensorView<'a>>; 2], [q_out, k_out]: [TensorViewMut<'a>; 2]) -> Self {
        let (q, k) = (Rows { input: q, output: q_out }, Rows { input: k, output: k_out });
        Self { q, k, norm: None, rotary: None }
    }

    /// With a norm, which comes before the rotation.
    #[must_use]
    pub fn with_norm(mut self, norm: QkNorm<'a>) -> Self {
        self.norm = Some(norm);
        self
    }

    /// With a rotary embedding.
    #[must_use]
    pub fn with_rotary(mut self, rotary: Rotary<'a>) -> Self {
        self.rotary = Some(rotary);
        self
    }
}

impl<'a> QkNorm<'a> {
    /// Of q and of k: weights of `[D]`, each f32 or of the tensors' element type. `eps` is finite and not negative.
    pub fn new(q_weight: impl Into<TensorView<'a>>, k_weight: impl Into<TensorView<'a>>, eps: f32) -> Self {
        Self { weights: [q_weight.into(), k_weight.into()], eps }
    }
}

impl<'a> Rotary<'a> {
    /// Tables of `[S, R/2]`, or `[B, S, R/2]` where batch rows differ, S being the segment's own length; both f32 or both of the
    /// tensors' element type. Pair i of a token turns by the angle whose cosine and sine are `cos[s, i]` and `sin[s, i]`: of
    /// (a, b) comes (a·cos − b·sin, b·cos + a·sin). The first R elements of a head are in pairs, R ≤ D; the others stay as the
    /// norm left them.
    ///
    /// Tables of R columns, in which models with [`RotaryPairing::Halves`] write every angle twice, are given as their first
    /// half: `cos.slice(1, 0..R / 2)`.
    pub fn new(cos: impl Into<TensorView<'a>>, sin: impl Into<TensorView<'a>>, pairing: RotaryPairing) -> Self {
        Self { cos: cos.into(), sin: sin.into(), pairing }
    }
}

impl TokenMask<'_> {
    /// Every token counts.
    #[must_use]
    pub fn all() -> Self {
        Self(None)
    }
}

impl<'a> From<&'a KeyMask> for TokenMask<'a> {
    fn from(mask: &'a KeyMask) -> Self {
        Self(Some(mask))
    }
}

impl<'a> From<&'a VarlenMeta> for TokenMask<'a> {
    fn from(meta: &'a VarlenMeta) -> Self {
        Self(Some(meta.key_mask()))
    }
}

impl<'a> From<&'a Arc<VarlenMeta>> for TokenMask<'a> {
    fn from(meta: &'a Arc<VarlenMeta>) -> Self {
        Self(Some(meta.key_mask()))
    }
}

/// QK-norm and rotary embedding of 1 to 8 segments in one call, in place or into views of the caller: each head of q and k is
/// normalised, then rotated, in f32, and rounded once. A segment may have the one, the other, both or neither.
///
/// The segments agree in batch size, heads, head dimension and element type. Rows of tokens that the mask does not keep are
/// neither read nor written: whatever an output held there, it still holds. Give the metadata that attention gets, or
/// [`TokenMask::all`] where attention computes every query, as it does under [`AttentionMask::key`](crate::AttentionMask::key).
///
/// ```
/// use varlen_fa::{Device, DeviceChoice, DType, QkNorm, QkSegment, Rotary, RotaryPairing, Tensor, TokenMask, prepare_qk};
///
/// let device = Device::new(DeviceChoice::Cpu)?;
/// let mut q = Tensor::from_slice(&device, &[3.0_f32, 4.0], &[1, 1, 1, 2])?;
/// let mut k = Tensor::zeros(&device, DType::F32, &[1, 1, 1, 2])?;
/// let weight = Tensor::from_slice(&device, &[5.0_f32, 5.0], &[2])?;
/// let [cos, sin] = [0.0_f32, 1.0].map(|value| Tensor::from_slice(&device, &[value], &[1, 1]));
/// let (cos, sin) = (cos?, sin?);
/// let segment = QkSegment::in_place(&mut q, &mut k)
///     .with_norm(QkNorm::new(&weight, &weight, 1e-6))
///     .with_rotary(Rotary::new(&cos, &sin, RotaryPairing::Interleaved));
/// prepare_qk(&device, [segment], TokenMask::all())?;
/// // The norm divides by √12.5, and the rotation is by a quarter.
/// let root = 12.5_f32.sqrt();
/// for (got, expected) in q.to_vec::<f32>()?.iter().zip([-20.0 / root, 15.0 / root]) {
///     assert!((got - expected).abs() < 1e-5);
/// }
/// # Ok::<(), varlen_fa::Error>(())
/// ```
///
/// # Errors
/// An [`Error`](crate::Error) that names segment and argument, `segments[1].k` for example; then nothing was written.
pub fn prepare_qk<'a>(
    device: &Device,
    segments: impl IntoIterator<Item = QkSegment<'a>>,
    mask: impl Into<TokenMask<'a>>,
) -> Result<()> {
    prepare(device, segments.into_iter().collect(), mask.into(), |op| device.backend()?.execute(op))
}

/// The call, which `execute` launches or records.
pub(crate) fn prepare<'a>(
    device: &Device,
    segments: Vec<QkSegment<'a>>,
    TokenMask(mask): TokenMask<'a>,
    execute: impl FnOnce(Op<'a>) -> Result<()>,
) -> Result<()> {
    {
        let infos: Vec<_> = segments.iter().map(QkSegment::info).collect();
        check_prepare_qk(device.info(), &infos, mask)?;
    }
    operation(segments, mask)?.map_or(Ok(()), |call| execute(Op::PrepareQk(call)))
}

/// The operation of a checked call; none if no row would be other than it is.
pub(crate) fn operation<'a>(segments: Vec<QkSegment<'a>>, mask: Option<&'a KeyMask>) -> Result<Option<PrepareQk<'a>>> {
    let dtype = segments.first().map_or(crate::DType::F32, |segment| segment.q.output.dtype());
    let mut first_token = 0;
    let mut checked = Vec::new();
    for (names, segment) in SEGMENT_NAMES.iter().zip(segments) {
        let QkSegment { q, k, norm, rotary } = segment;
        let &[batch, seq, ..] = q.output.shape() else { continue };
        checked.push(PrepareSegment {
            names,
            first_token,
            q: q.prepared(),
            k: k.prepared(),
            norm: norm.map(|QkNorm { weights, eps }| HeadNorm { weights: weights.map(TensorView::input), eps }),
            // Tables without columns rotate nothing.
            rotary: rotary
                .filter(|rotary| rotary.cos.shape().last().is_some_and(|&half| half > 0))
                .map(|rotary| rotary.of_batch(batch))
                .transpose()?,
        });
        first_token += seq;
    }
    checked.retain(|segment| !segment.is_idle());
    if checked.is_empty() || mask.is_some_and(KeyMask::is_empty) {
        return Ok(None);
    }
    Ok(Some(PrepareQk { segments: checked, dtype, mask: mask.filter(|mask| !mask.is_all_kept()), joint_seq: None }))
}

impl QkSegment<'_> {
    /// The same segment, for a shorter time.
    pub(crate) fn reborrow(&mut self) -> QkSegment<'_> {
        QkSegment { q: self.q.reborrow(), k: self.k.reborrow(), norm: self.norm, rotary: self.rotary }
    }

    /// q and k as they come out.
    pub(crate) fn prepared(&self) -> [TensorView<'_>; 2] {
        [self.q.output.as_view(), self.k.output.as_view()]
    }

    pub(crate) fn info(&self) -> SegmentInfo<'_> {
        SegmentInfo {
            q: self.q.info(),
            k: self.k.info(),
            norm: self.norm.as_ref().map(|norm| (norm.weights.each_ref().map(TensorView::info), norm.eps)),
            rotary: self.rotary.as_ref().map(|rotary| [rotary.cos.info(), rotary.sin.info()]),
        }
    }
}

impl<'a> Rows<'a> {
    fn info(&self) -> RowsInfo<'_> {
        RowsInfo { input: self.input.as_ref().map(TensorView::info), output: self.output.info() }
    }

    fn reborrow(&mut self) -> Rows<'_> {
        Rows { input: self.input, output: self.output.reborrow() }
    }

    /// A view that is written where it is read is given to devices once.
    fn prepared(self) -> PreparedRows<'a> {
        let input = self.input.filter(|input| !is_same(&self.output.info(), &input.info()));
        match input {
            None => PreparedRows::InPlace(self.output.output()),
            Some(input) => PreparedRows::Copied(input.input(), self.output.output()),
        }
    }
}

impl<'a> Rotary<'a> {
    /// With tables of each batch row.
    fn of_batch(self, batch: usize) -> Result<HeadRotary<'a>> {
        let of_batch = |table: TensorView<'a>| -> Result<TensorView<'a>> {
            let layout = *table.layout();
            Ok(match (layout.shape(), layout.strides()) {
                (&[seq, half], &[row, inner]) => {
                    table.with_layout(Layout::strided(&[batch, seq, half], &[0, row, inner], layout.offset())?)
                }
                _ => table,
            })
        };
        let (cos, sin) = (of_batch(self.cos)?.input(), of_batch(self.sin)?.input());
        Ok(HeadRotary { cos, sin, pairing: self.pairing })
    }
}
