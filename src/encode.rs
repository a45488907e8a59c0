//! Calls that are recorded into the application's wgpu commands instead of being launched.

use crate::attention::MaskedAttention;
use crate::attention_mask::AttentionMask;
use crate::attention_outputs::AttentionOutputs;
use crate::backends::wgpu::Recorder;
use crate::call::plan::Plan;
use crate::device::Device;
use crate::error::Result;
use crate::joint::{JointAttention, JointPlan, JointSegment};
use crate::mask::meta::VarlenMeta;
use crate::merge::merge;
use crate::prepare_qk::{QkSegment, TokenMask, prepare};
use crate::primitives::{pack_all, scatter};
use crate::tensor::device_meta::{DeviceVarlenMeta, MaskView};
use crate::tensor::{Segments, TensorView, TensorViewMut};

impl MaskedAttention {
    /// Records attention into a command encoder or a compute pass of the application, without a submission and without a wait;
    /// [`forward_into`](Self::forward_into) otherwise. The layer's device is a wgpu device, opened here or made by
    /// [`Device::from_wgpu`]; encoder or pass are of the same `wgpu::Device`.
    ///
    /// The call runs when the application submits the commands, after what was recorded before it and before what is recorded
    /// after it. Command buffers with calls may be submitted in any order, on any thread, or never: each call has parameters of
    /// its own, and scratch that calls share is written by each before it reads it. Metadata that is used for the first time is
    /// uploaded with the next submission of any kind. The commands keep all buffers alive, so tensors, metadata, layer and
    /// device may be dropped before they are submitted. Tensors must not be overwritten on the way: `q`, `k`, `v` and `out` are
    /// borrowed only while the call is recorded, and read and written when it runs.
    ///
    /// What is known is checked here, and nothing is recorded on an error. What wgpu checks later comes out where it checks: an
    /// encoder of another device when it is finished; a buffer that is destroyed or mapped meanwhile, and a device that was
    /// lost, when the commands are submitted. [`Device::time`] does not see the call.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into); [`Error::DeviceKind`](crate::Error::DeviceKind) if the layer's device is not a
    /// wgpu device.
    pub fn encode_into<'r, 'a, 'o>(
        &self,
        recorder: impl Into<Recorder<'r>>,
        q: impl Into<Segments<'a>>,
        k: impl Into<Segments<'a>>,
        v: impl Into<Segments<'a>>,
        mask: AttentionMask<'_>,
        out: impl Into<AttentionOutputs<'o>>,
    ) -> Result<Plan> {
        let (mut recorder, inputs, outputs) = (recorder.into(), [q.into(), k.into(), v.into()], out.into());
        let backend = self.device().wgpu_backend()?;
        let (problem, plan, mask) = {
            let (out, lse) = outputs.infos();
            self.prepare(&inputs, mask, (&out, lse.as_ref()))?
        };
        self.launch(problem, plan, inputs, mask, outputs, |op| backend.encode(op, recorder.reborrow()))?;
        Ok(plan)
    }
}

impl JointAttention {
    /// Records QK-norm, rotary embedding and attention of a joint layer. See [`MaskedAttention::encode_into`] for when it runs,
    /// and [`forward_into`](Self::forward_into) for what it does.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into), with nothing recorded; [`Error::DeviceKind`](crate::Error::DeviceKind) if the
    /// layer's device is not a wgpu device.
    pub fn encode_into<'r, 'a>(
        &self,
        recorder: impl Into<Recorder<'r>>,
        segments: impl IntoIterator<Item = JointSegment<'a>>,
        mask: AttentionMask<'_>,
    ) -> Result<JointPlan> {
        let (recorder, backend) = (recorder.into(), self.device().wgpu_backend()?);
        self.run(segments, mask, |steps| backend.encode_all(steps, recorder))
    }
}

impl DeviceVarlenMeta {
    /// Records that the metadata of a mask is built anew, without a submission and without a wait; [`rebuild`](Self::rebuild)
    /// otherwise. See [`MaskedAttention::encode_into`] for when it runs. Calls see the metadata that the device has when they run:
    /// those recorded or launched before and submitted earlier as it was, later ones as it is then.
    ///
    /// # Errors
    /// As [`rebuild`](Self::rebuild); [`Error::DeviceKind`](crate::Error::DeviceKind) if the metadata's device is not a wgpu
    /// device.
    pub fn encode_rebuild<'r>(&mut self, recorder: impl Into<Recorder<'r>>, mask: MaskView<'_>) -> Result<()> {
        let device = self.device().clone();
        let (recorder, backend) = (recorder.into(), device.wgpu_backend()?);
        self.rebuild_by(mask, |op| backend.encode(op, recorder))
    }
}

/// Records a copy of the valid rows of a padded `[B, S, H, D]` tensor to a packed `[total_valid, H, D]` one. See
/// [`MaskedAttention::encode_into`] for when it runs, and [`pack`](crate::pack()) for what it does.
///
/// # Errors
/// As [`pack`](crate::pack()); [`Error::DeviceKind`](crate::Error::DeviceKind) if `device` is not a wgpu device.
pub fn encode_pack<'r, 'a, 'o>(
    device: &Device,
    recorder: impl Into<Recorder<'r>>,
    padded: impl Into<TensorView<'a>>,
    meta: &VarlenMeta,
    packed: impl Into<TensorViewMut<'o>>,
) -> Result<()> {
    let (recorder, backend) = (recorder.into(), device.wgpu_backend()?);
    let copy = ("padded", padded.into(), "packed", packed.into());
    pack_all(device, [copy], meta, |op| backend.encode(op, recorder))
}

/// Records a copy of packed `[total_valid, H, D]` rows to the valid rows of a padded `[B, S, H, D]` tensor, and +0.0 to the
/// masked ones. See [`MaskedAttention::encode_into`] for when it runs.
///
/// # Errors
/// As [`scatter_to_padded`](crate::scatter_to_padded); [`Error::DeviceKind`](crate::Error::DeviceKind) if `device` is not a
/// wgpu device.
pub fn encode_scatter<'r, 'a, 'o>(
    device: &Device,
    recorder: impl Into<Recorder<'r>>,
    packed: impl Into<TensorView<'a>>,
    meta: &VarlenMeta,
    padded: impl Into<TensorViewMut<'o>>,
) -> Result<()> {
    let (recorder, backend) = (recorder.into(), device.wgpu_backend()?);
    scatter(device, packed.into(), meta, padded.into(), |op| backend.encode(op, recorder))
}

/// Records QK-norm and rotary embedding. See [`MaskedAttention::encode_into`] for when it runs, and
/// [`prepare_qk`](crate::prepare_qk()) for what it does.
///
/// # Errors
/// As [`prepare_qk`](crate::prepare_qk()); [`Error::DeviceKind`](crate::Error::DeviceKind) if `device` is not a wgpu device.
pub fn encode_prepare_qk<'r, 'a>(
    device: &Device,
    recorder: impl Into<Recorder<'r>>,
    segments: impl IntoIterator<Item = QkSegment<'a>>,
    mask: impl Into<TokenMask<'a>>,
) -> Result<()> {
    let (recorder, backend) = (recorder.into(), device.wgpu_backend()?);
    prepare(device, segments.into_iter().collect(), mask.into(), |op| backend.encode(op, recorder))
}

/// Records the merge of attention over two parts of the keys. See [`MaskedAttention::encode_into`] for when it runs, and
/// [`merge_attention`](crate::merge_attention) for what it does.
///
/// # Errors
/// As [`merge_attention_into`](crate::merge_attention_into); [`Error::DeviceKind`](crate::Error::DeviceKind) if `device` is not
/// a wgpu device.
pub fn encode_merge_attention<'r, 'a, 'o>(
    device: &Device,
    recorder: impl Into<Recorder<'r>>,
    out1: impl Into<TensorView<'a>>,
    lse1: impl Into<TensorView<'a>>,
    out2: impl Into<TensorView<'a>>,
    lse2: impl Into<TensorView<'a>>,
    outputs: impl Into<AttentionOutputs<'o>>,
) -> Result<()> {
    let (recorder, backend) = (recorder.into(), device.wgpu_backend()?);
    let parts = [out1.into(), lse1.into(), out2.into(), lse2.into()];
    merge(device, parts, outputs.into(), |op| backend.encode(op, recorder))
}
