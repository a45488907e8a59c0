//! Launches that normalise and rotate q and k: one for each of the two and each segment. One of both
//! would bind nine buffers where q and k are copied; so q and k may also lie in one buffer.

use crate::call::memory::{Input, Output};
use crate::call::prepare_qk::{HeadRotary, PrepareQk, PrepareSegment, PreparedRows, RotaryPairing};
use crate::dtype::DType;
use crate::error::Result;
use crate::layout::Layout;
use crate::mask::key_mask::KeyMask;

use super::context::Context;
use super::dispatch::{Launch, MAX_GROUPS};
use super::launches::Launches;
use super::params::PrepareQkParams;
use super::placement::{FirstDim, Operand, split_batch};
use super::shader::{INVOCATIONS, PrepareQkShader, Shader};
use super::sides::Kept;

/// Elements of a head that one invocation takes, at most.
const ELEMENTS_OF_LANE: usize = 8;

pub(super) fn prepare_qk(context: &Context, call: &PrepareQk<'_>, launches: &mut Launches<'_>) -> Result<()> {
    for segment in &call.segments {
        let PrepareSegment { names, q, k, norm, rotary, first_token } = segment;
        let eps = norm.as_ref().map_or(0.0, |norm| norm.eps);
        let [q_weight, k_weight] = match norm {
            None => [None, None],
            Some(norm) => norm.weights.each_ref().map(Some),
        };
        let of_q = [names.q, names.q_out, names.q_weight];
        let of_k = [names.k, names.k_out, names.k_weight];
        for (rows, weight, [input, output, weight_name]) in [(q, q_weight, of_q), (k, k_weight, of_k)] {
            let heads = Heads {
                from: match rows {
                    PreparedRows::InPlace(_) => None,
                    PreparedRows::Copied(from, _) => Some(of_elements(context, input, from)?),
                },
                to: match rows {
                    PreparedRows::InPlace(to) => output_of_elements(context, input, to)?,
                    PreparedRows::Copied(_, to) => output_of_elements(context, output, to)?,
                },
                weight: weight.map(|weight| of_elements(context, weight_name, weight)).transpose()?,
                eps,
                tables: match rotary {
                    None => None,
                    Some(HeadRotary { cos, sin, .. }) => {
                        Some([of_elements(context, names.cos, cos)?, of_elements(context, names.sin, sin)?])
                    }
                },
                is_interleaved: rotary.as_ref().is_some_and(|it| it.pairing == RotaryPairing::Interleaved),
                first_token: *first_token,
            };
            heads.launch(context, call.mask, launches)?;
        }
    }
    Ok(())
}

fn of_elements<'a>(context: &Context, name: &'static str, input: &Input<'a>) -> Result<Operand<'a>> {
    Operand::input(context, name, input, FirstDim::BatchOfElements)
}

fn output_of_elements<'a>(context: &Context, name: &'static str, output: &Output<'a>) -> Result<Operand<'a>> {
    Operand::output(context, name, output, FirstDim::BatchOfElements)
}

/// q or k of a segment.
struct Heads<'a> {
    /// None in place.
    from: Option<Operand<'a>>,
    to: Operand<'a>,
    weight: Option<Operand<'a>>,
    eps: f32,
    /// Cosines and sines.
    tables: Option<[Operand<'a>; 2]>,
    is_interleaved: bool,
    first_token: usize,
}

impl Heads<'_> {
    fn launch(&self, context: &Context, mask: Option<&KeyMask>, launches: &mut Launches<'_>) -> Result<()> {
        let &[batch, seq, heads, dim] = self.to.layout.shape() else { return Ok(()) };
        if self.to.layout.numel() == 0 {
            return Ok(());
        }
        let shader = Shader::PrepareQk(self.shader());
        let lanes = dim.div_ceil(ELEMENTS_OF_LANE).next_power_of_two();
        let (kept, mask_words) = Kept::window(mask.map(Kept::Host), context)?;
        let unused = || (context.unused_read(), 0);
        let (weight, weight_offset) = match &self.weight {
            None => unused(),
            Some(weight) => weight.place_elements(&(0..dim))?,
        };
        let placed: Vec<_> = self.from.into_iter().chain([self.to]).chain(self.tables.into_iter().flatten()).collect();
        for range in split_batch(context.max_binding_bytes, batch, &placed, |_| 0)? {
            let source = self.from.map(|from| from.place_elements(&range)).transpose()?;
            let (target, dst_offset) = self.to.place_elements(&range)?;
            let [(cos, cos_offset), (sin, sin_offset)] = match &self.tables {
                None => [unused(), unused()],
                Some([cos, sin]) => [cos.place_elements(&range)?, sin.place_elements(&range)?],
            };
            let of_source = self.from.as_ref().unwrap_or(&self.to);
            let [src_stride_b, src_stride_s, src_stride_h] = strides(&of_source.layout);
            let [dst_stride_b, dst_stride_s, dst_stride_h] = strides(&self.to.layout);
            let [[cos_stride_b, cos_stride_s, _], [sin_stride_b, sin_stride_s, _]] = match &self.tables {
                None => [[0; 3]; 2],
                Some(tables) => tables.each_ref().map(|table| strides(&table.layout)),
            };
            // All fit: tokens and heads are counted in an i32, and a binding is below 2 GiB.
            let params = PrepareQkParams {
                src_offset: source.as_ref().map_or(dst_offset, |(_, offset)| *offset),
                src_stride_b,
                src_stride_s,
                src_stride_h,
                dst_offset,
                dst_stride_b,
                dst_stride_s,
                dst_stride_h,
                weight_offset,
                cos_offset,
                cos_stride_b,
                cos_stride_s,
                sin_offset,
                sin_stride_b,
                sin_stride_s,
                rows: (range.len() * seq) as u32,
                seq: seq as u32,
                heads: heads as u32,
                head_dim: dim as u32,
                lanes: lanes as u32,
                half: self.tables.map_or(0, |[cos, _]| cos.layout.shape().last().map_or(0, |&half| half as u32)),
                is_interleaved: u32::from(self.is_interleaved),
                weight_shift: self.weight.map_or(0, |weight| shift(weight.dtype)),
                table_shift: self.tables.map_or(0, |[cos, _]| shift(cos.dtype)),
                has_norm: u32::from(self.weight.is_some()),
                eps: self.eps,
                has_mask: u32::from(mask.is_some()),
                mask_words,
                first_token: self.first_token as u32,
                batch_base: range.start as u32,
            };
            let source = source.map(|(window, _)| window);
            let groups = (range.len() * seq * heads).div_ceil(INVOCATIONS / lanes);
            launches.push(Launch {
                shader,
                params: bytemuck::bytes_of(&params).to_vec(),
                windows: source.into_iter().chain([target, weight.clone(), cos, sin, kept.clone()]).collect(),
                groups: [groups.min(MAX_GROUPS) as u32, 1, 1],
                operations: 0,
            });
        }
        Ok(())
    }

    fn shader(&self) -> PrepareQkShader {
        let is_odd = |operand: &Operand<'_>| {
            let Operand { layout, .. } = operand;
            let (shape, strides) = (layout.shape(), layout.strides());
            let stepped = shape.iter().zip(strides).take(3).filter(|&(&size, _)| size > 1);
            let odd_size = shape.last().is_some_and(|dim| dim % 2 == 1);
            odd_size || layout.offset() % 2 == 1 || stepped.into_iter().any(|(_, stride)| stride % 2 == 1)
        };
        let is_16bit = self.to.dtype != DType::F32;
        PrepareQkShader {
            dtype: self.to.dtype,
            in_place: self.from.is_none(),
            odd: is_16bit && (is_odd(&self.to) || self.from.as_ref().is_some_and(is_odd)),
        }
    }
}

/// Elements of a u32, as a power of two.
fn shift(dtype: DType) -> u32 {
    u32::from(dtype != DType::F32)
}

/// Of batch row, token and head, in elements; those that are stepped over fit.
fn strides(layout: &Layout) -> [u32; 3] {
    let of = |dim: usize| layout.strides().get(dim).map_or(0, |&stride| stride as u32);
    [of(0), of(1), of(2)]
}
