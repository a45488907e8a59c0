//! One attention call on padded tensors: its inputs, what surrounds them in memory, and its run.

use anyhow::{Context, Result, ensure};
use varlen_fa::{
    AttentionMask, AttentionOutputs, DType, Device, DeviceMemory, DeviceVarlenMeta, KeyMask, Layout, MaskDType, Path,
    Plan, RangesOf, Reason, Tensor, TensorView, TensorViewMut, VarlenMeta,
};
use varlen_fa_testkit::{OracleShape, random};

use super::memory::{download, narrow, poison, precision, sentinel, upload, widen};
use super::modifying::Modifying;
use super::placement::Placement;
use super::rule::Rule;
use super::trials::Variant;

/// Which tokens count, as plain booleans.
#[derive(Debug, Clone)]
pub enum Mask {
    /// All of them.
    None,
    /// `AttentionMask::key`: `[B, Sk]`.
    Key(Vec<bool>),
    /// `AttentionMask::varlen`: `[B, S]`.
    Varlen(Vec<bool>),
    /// `AttentionMask::VarlenCross`: `[B, Sq]` and `[B, Sk]`.
    Cross {
        /// Queries.
        query: Vec<bool>,
        /// Keys.
        key: Vec<bool>,
    },
    /// `AttentionMask::varlen`: `[B, S]`.
    Device(Vec<bool>),
    /// `AttentionMask::DeviceVarlenCross`: `[B, Sq]` and `[B, Sk]`.
    DeviceCross {
        /// Queries.
        query: Vec<bool>,
        /// Keys.
        key: Vec<bool>,
    },
}

impl Mask {
    /// Which queries have an output; none if all have.
    pub fn query_keep(&self) -> Option<&[bool]> {
        match self {
            Self::None | Self::Key(_) => None,
            Self::Varlen(keep)
            | Self::Cross { query: keep, .. }
            | Self::Device(keep)
            | Self::DeviceCross { query: keep, .. } => Some(keep),
        }
    }

    /// Which keys are attended to; none if all are.
    pub fn key_keep(&self) -> Option<&[bool]> {
        match self {
            Self::None => None,
            Self::Key(keep)
            | Self::Varlen(keep)
            | Self::Cross { key: keep, .. }
            | Self::Device(keep)
            | Self::DeviceCross { key: keep, .. } => Some(keep),
        }
    }
}

/// How q, k and v lie in memory.
#[expect(clippy::large_enum_variant, reason = "there is one of it in each call, and it is copied about")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inputs {
    /// Each in memory of its own: q, k, v.
    Apart([Placement; 3]),
    /// One fused projection `[B, S, H + 2·Hkv, D]`.
    FusedQkv,
}

/// A call, apart from the device it runs on.
#[derive(Debug, Clone)]
pub struct Call {
    /// Extents.
    pub shape: OracleShape,
    /// Element type of all tensors.
    pub dtype: DType,
    /// The scale to give to the layer; its default if there is none.
    pub scale: Option<f32>,
    /// The mask.
    pub mask: Mask,
    /// Which keys each query sees; all if there is none.
    pub rule: Option<Rule>,
    /// What else happens to the scores.
    pub modifying: Modifying,
    /// `[B, H, Sq, Sk]` for the oracle; whoever sets it gives the layer its own form of it.
    pub bias: Option<Vec<f32>>,
    /// q, k and v, row-major, values that `dtype` holds exactly.
    pub values: [Vec<f32>; 3],
    /// Where the inputs lie.
    pub inputs: Inputs,
    /// Where the output lies.
    pub output: Placement,
}

impl Call {
    /// A call on standard normal values.
    pub fn random(shape: OracleShape, mask: Mask, dtype: DType, seed: u64) -> Self {
        let [q, k, _] = tensor_shapes(shape).map(|shape| shape.iter().product());
        let [q, k, v] = std::thread::scope(|scope| {
            [q, k, k]
                .into_iter()
                .enumerate()
                .map(|(stream, len)| {
                    scope.spawn(move || random::normal_rounded(seed, stream as u64, len, precision(dtype)))
                })
                .collect::<Vec<_>>()
                .into_iter()
                .map(|thread| thread.join().unwrap_or_default())
                .collect::<Vec<_>>()
                .try_into()
                .unwrap_or_default()
        });
        Self::new(shape, mask, dtype, [q, k, v])
    }

    /// A call on given values.
    pub fn new(shape: OracleShape, mask: Mask, dtype: DType, values: [Vec<f32>; 3]) -> Self {
        Self {
            shape,
            dtype,
            scale: None,
            mask,
            rule: None,
            modifying: Modifying::default(),
            bias: None,
            values,
            inputs: Inputs::Apart([Placement::CONTIGUOUS; 3]),
            output: Placement::CONTIGUOUS,
        }
    }

    /// `[B, Sq, H, D]`.
    pub fn output_shape(&self) -> [usize; 4] {
        tensor_shapes(self.shape)[0]
    }

    /// Runs the call with its own mask and gives the output's bits, row-major.
    ///
    /// Everything that must not matter holds NaN or infinities: masked rows, the memory around the tensors, and the output
    /// before it is written.
    pub fn run(&self, variant: &Variant) -> Result<Vec<u32>> {
        self.under_mask(variant, |mask| self.run_as(variant, mask))
    }

    /// What `run` gives under the call's own mask and ranges; the plan must be the variant's.
    pub fn under_mask<T>(&self, variant: &Variant, run: impl Fn(AttentionMask<'_>) -> Result<(Plan, T)>) -> Result<T> {
        let OracleShape { batch, seq_q, seq_k, .. } = self.shape;
        let key_mask = |seq, keep: &[bool]| KeyMask::from_bool(batch, seq, keep);
        let meta = |seq, keep: &[bool]| VarlenMeta::from_key_mask(&key_mask(seq, keep)?);
        let of = RangesOf::from([batch, seq_q, seq_k]);
        let ranges = self.rule.as_ref().map(|rule| rule.ranges(&of)).transpose()?;
        let modifiers = self.modifying.modifiers();
        let run = |mask: AttentionMask<'_>| {
            let mask = mask.with_modifiers(&modifiers);
            match &ranges {
                Some(ranges) => run(mask.with_ranges(ranges)),
                None => run(mask),
            }
        };
        let (plan, result) = match &self.mask {
            Mask::None => run(AttentionMask::none())?,
            Mask::Key(keep) => run(AttentionMask::key(&key_mask(seq_k, keep)?))?,
            Mask::Varlen(keep) => run(AttentionMask::varlen(&meta(seq_k, keep)?))?,
            Mask::Cross { query, key } => {
                let (query, key) = (meta(seq_q, query)?, meta(seq_k, key)?);
                run(AttentionMask::varlen_cross(&query, &key))?
            }
            Mask::Device(keep) => {
                let meta = device_meta(&variant.device, batch, seq_k, keep)?;
                run(AttentionMask::varlen(&meta))?
            }
            Mask::DeviceCross { query, key } => {
                let query = device_meta(&variant.device, batch, seq_q, query)?;
                let key = device_meta(&variant.device, batch, seq_k, key)?;
                run(AttentionMask::varlen_cross(&query, &key))?
            }
        };
        ensure!(plan.kernel == variant.kernel, "forced kernel {}, but the plan is {plan}", variant.kernel);
        match variant.path {
            Some(path) => ensure!(
                (plan.path, plan.reason) == (path, Reason::PathForced),
                "forced path {path}, but the plan is {plan}"
            ),
            None if self.mask.query_keep().is_some() => {}
            // What the mask keeps is all that a kernel should touch: which path does that depends on the kernel.
            None if matches!(self.mask, Mask::Key(_)) => {}
            None => ensure!(matches!(plan.path, Path::Dense | Path::Zero), "expected a dense call, got {plan}"),
        }
        Ok(result)
    }

    /// The same with the mask in the layer's own form.
    pub fn run_as(&self, variant: &Variant, mask: AttentionMask<'_>) -> Result<(Plan, Vec<u32>)> {
        self.run_with(variant, mask, None)
    }

    /// The same with a `[B, H, Sq]` view that receives the log-sum-exp.
    pub fn run_with(
        &self,
        variant: &Variant,
        mask: AttentionMask<'_>,
        lse: Option<TensorViewMut<'_>>,
    ) -> Result<(Plan, Vec<u32>)> {
        let device = &variant.device;
        let shapes = tensor_shapes(self.shape);
        let mut layer = variant.layer();
        if let Some(scale) = self.scale {
            layer = layer.with_softmax_scale(scale);
        }
        let (memories, placements) = self.upload_inputs(device).context("uploading the inputs")?;
        let view = |input: usize| -> Result<TensorView<'_>> {
            let memory = memories.get(input).unwrap_or(&memories[0]);
            placements[input].view(memory.view(), shapes[input])
        };
        let [q, k, v] = [view(0)?, view(1)?, view(2)?];

        let mut out = self.output_memory(device)?;
        let mut into = AttentionOutputs::new(self.output.view_mut(out.view_mut(), self.output_shape())?);
        if let Some(lse) = lse {
            into = into.with_lse(lse);
        }
        let plan = layer.forward_into(q, k, v, mask, into).context("forward_into")?;
        Ok((plan, self.read_output(&out)?))
    }

    /// Tensors that hold the inputs, and where each lies in its own or in the only one.
    fn upload_inputs(&self, device: &Device) -> Result<(Vec<Tensor>, [Placement; 3])> {
        let shapes = tensor_shapes(self.shape);
        let keeps = [self.mask.query_keep(), self.mask.key_keep(), self.mask.key_keep()];
        let fill = |memory: &mut [u32], input: usize, placement: &Placement| {
            let [_, _, heads, dim] = shapes[input];
            for (index, start) in placement.rows(shapes[input]).into_iter().enumerate() {
                // Masked rows keep the poison that is there.
                if keeps[input].is_none_or(|keep| keep[index / heads]) {
                    for (bits, &value) in memory[start..].iter_mut().zip(&self.values[input][index * dim..][..dim]) {
                        *bits = narrow(value, self.dtype);
                    }
                }
            }
        };
        let poisoned = |len: usize| (0..len).map(|place| poison(place, self.dtype)).collect::<Vec<_>>();
        match self.inputs {
            Inputs::Apart(placements) => {
                let mut memories = Vec::with_capacity(3);
                for (input, placement) in placements.iter().enumerate() {
                    let mut memory = poisoned(placement.memory_len(shapes[input]));
                    fill(&mut memory, input, placement);
                    memories.push(upload(device, self.dtype, &memory, &placement.memory_shape(shapes[input]))?);
                }
                Ok((memories, placements))
            }
            Inputs::FusedQkv => {
                let (q, kv) = (self.shape.heads, self.shape.kv_heads);
                let placements = [(0, 2 * kv), (q, kv), (q + kv, 0)].map(|(b, a)| Placement::among_heads(b, a));
                let mut memory = poisoned(placements[0].memory_len(shapes[0]));
                for (input, placement) in placements.iter().enumerate() {
                    fill(&mut memory, input, placement);
                }
                let fused = upload(device, self.dtype, &memory, &placements[0].memory_shape(shapes[0]))?;
                Ok((vec![fused], placements))
            }
        }
    }

    /// Memory for the output and its surroundings, all of it the sentinel.
    pub fn output_memory(&self, device: &Device) -> Result<Tensor> {
        let shape = self.output_shape();
        let memory = vec![sentinel(self.dtype); self.output.memory_len(shape)];
        upload(device, self.dtype, &memory, &self.output.memory_shape(shape)).context("uploading the output's memory")
    }

    /// The output's bits, row-major; an error if anything around it was written.
    pub fn read_output(&self, out: &Tensor) -> Result<Vec<u32>> {
        let mut memory = download(out).context("downloading the output")?;
        let sentinel = sentinel(self.dtype);
        let (shape, dim) = (self.output_shape(), self.shape.head_dim);
        let mut bits = Vec::with_capacity(shape.iter().product());
        for start in self.output.rows(shape) {
            let row = &mut memory[start..start + dim];
            bits.extend_from_slice(row);
            row.fill(sentinel);
        }
        let overwritten = memory.iter().position(|&bits| bits != sentinel);
        ensure!(
            overwritten.is_none(),
            "element {overwritten:?} of the output's memory lies outside the view and was written; {:?}",
            self.output
        );
        Ok(bits)
    }

    /// Bits as values.
    pub fn widen(&self, bits: &[u32]) -> Vec<f32> {
        bits.iter().map(|&bits| widen(bits, self.dtype)).collect()
    }
}

/// Metadata that the device builds of a mask in its memory.
pub fn device_meta(device: &Device, batch: usize, seq: usize, keep: &[bool]) -> Result<DeviceVarlenMeta> {
    let mut memory = DeviceMemory::alloc(device, keep.len() as u64)?;
    memory.write(&keep.iter().map(|&keep| if keep { 0xff } else { 0_u8 }).collect::<Vec<_>>())?;
    let mut meta = DeviceVarlenMeta::new(device, batch, seq)?;
    meta.rebuild(memory.mask_view(MaskDType::U8, Layout::contiguous(&[batch, seq])?))?;
    Ok(meta)
}

/// Shapes of q, k and v.
pub fn tensor_shapes(shape: OracleShape) -> [[usize; 4]; 3] {
    let OracleShape { batch, seq_q, seq_k, heads, kv_heads, head_dim } = shape;
    let kv = [batch, seq_k, kv_heads, head_dim];
    [[batch, seq_q, heads, head_dim], kv, kv]
}
