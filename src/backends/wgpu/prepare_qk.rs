//! Launches that normalise and rotate q and k: one for each of the two and each segment. One of both
//! would bind nine buffers where q and k are copied; so q and k may also lie in one buffer.
//!
//! Where attention over several segments comes next, which reads whole tensors, the rows are written
//! a second time, to their places among those of all segments: that is half of the bytes of a copy,
//! and no pass of its own.

use crate::backends::rows::{RowShape, WORD_BYTES, has_filled_heads};
use crate::call::memory::{Input, Output};
use crate::call::prepare_qk::{HeadRotary, PrepareQk, PrepareSegment, PreparedRows, RotaryPairing};
use crate::call::segments::Role;
use crate::dtype::DType;
use crate::error::Result;
use crate::layout::Layout;
use crate::mask::key_mask::KeyMask;

use super::context::Context;
use super::dispatch::{Launch, MAX_GROUPS, Window};
use super::launches::{Joined, Launches};
use super::params::PrepareQkParams;
use super::placement::{FirstDim, Operand, split_batch};
use super::shader::{HeadAccess, INVOCATIONS, PrepareQkShader, Shader};
use super::sides::Kept;

/// Elements of a head that one invocation takes, at most.
const ELEMENTS_OF_LANE: usize = 8;
/// Heads of a token beside one another, at most: as was fastest (docs/log/wgsl-coop.md).
const HEADS_BESIDE: usize = 4;

pub(super) fn prepare_qk(context: &Context, call: &PrepareQk<'_>, launches: &mut Launches<'_>) -> Result<()> {
    let mut joints = [Joint::new(context, call, Role::Q, launches)?, Joint::new(context, call, Role::K, launches)?];
    for segment in &call.segments {
        let PrepareSegment { names, q, k, norm, rotary, first_token } = segment;
        let eps = norm.as_ref().map_or(0.0, |norm| norm.eps);
        let [q_weight, k_weight] = match norm {
            None => [None, None],
            Some(norm) => norm.weights.each_ref().map(Some),
        };
        let of_q = [names.q, names.q_out, names.q_weight];
        let of_k = [names.k, names.k_out, names.k_weight];
        let [joint_q, joint_k] = &mut joints;
        let of_both = [(q, q_weight, of_q, joint_q), (k, k_weight, of_k, joint_k)];
        for (rows, weight, [input, output, weight_name], joint) in of_both {
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
            heads.launch(context, call.mask, joint.as_mut(), launches)?;
        }
    }
    for (role, joint) in [Role::Q, Role::K].into_iter().zip(joints) {
        let Some(Joint { buffer, firsts, .. }) = joint else { continue };
        launches.leave_joined(role, Joined { buffer, firsts });
    }
    Ok(())
}

/// Where the heads of all segments of q or k are joined.
struct Joint {
    buffer: wgpu::Buffer,
    row: RowShape,
    seq: usize,
    /// First tokens of the segments that are there.
    firsts: Vec<usize>,
}

impl Joint {
    /// None if nobody reads it, or if it does not fit a binding.
    fn new(context: &Context, call: &PrepareQk<'_>, role: Role, launches: &mut Launches<'_>) -> Result<Option<Self>> {
        let (Some(seq), Some(segment)) = (call.joint_seq, call.segments.first()) else { return Ok(None) };
        let rows = if role == Role::Q { &segment.q } else { &segment.k };
        let layout = rows.layout();
        let row = RowShape::of(layout, call.dtype.size());
        let batch = layout.shape().first().copied().unwrap_or(0);
        let bytes = (batch as u64 * seq as u64).saturating_mul(row.bytes());
        if bytes == 0 || bytes > context.max_binding_bytes || !has_filled_heads(layout) {
            return Ok(None);
        }
        Ok(Some(Self { buffer: launches.take_scratch(bytes)?, row, seq, firsts: Vec::new() }))
    }

    /// The place of a segment's batch rows from `batch_row` on, and strides of batch row, token and head, in elements.
    fn place(&self, first_token: usize, batch_row: usize, dtype: DType) -> [u32; 4] {
        let elements = |words: usize| words * WORD_BYTES as usize / dtype.size();
        let head = elements(self.row.head_words);
        let token = self.row.heads * head;
        // All fit: a binding is below 2 GiB.
        [(batch_row * self.seq + first_token) * token, self.seq * token, token, head].map(|count| count as u32)
    }
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
    fn launch(
        &self,
        context: &Context,
        mask: Option<&KeyMask>,
        joint: Option<&mut Joint>,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let &[batch, seq, heads, dim] = self.to.layout.shape() else { return Ok(()) };
        if self.to.layout.numel() == 0 {
            return Ok(());
        }
        let lanes = dim.div_ceil(ELEMENTS_OF_LANE).next_power_of_two();
        let heads_beside = heads.next_power_of_two().min(HEADS_BESIDE).min(INVOCATIONS / lanes);
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
            let [joint_offset, joint_stride_b, joint_stride_s, joint_stride_h] =
                joint.as_ref().map_or([0; 4], |joint| joint.place(self.first_token, range.start, self.to.dtype));
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
                heads_beside: heads_beside as u32,
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
                joint_offset,
                joint_stride_b,
                joint_stride_s,
                joint_stride_h,
            };
            let access = self.access(&params);
            let shader =
                PrepareQkShader { dtype: self.to.dtype, in_place: self.from.is_none(), access, joins: joint.is_some() };
            let joined = joint.as_ref().map(|joint| Window::whole(&joint.buffer));
            let others = [target, weight.clone(), cos, sin, kept.clone()];
            let source = source.map(|(window, _)| window);
            let (rows, at_once) = (range.len() * seq, INVOCATIONS / lanes);
            let groups = match access {
                HeadAccess::Octets => rows.div_ceil(at_once / heads_beside),
                HeadAccess::Pairs | HeadAccess::Elements => (rows * heads).div_ceil(at_once),
            };
            launches.push(Launch {
                shader: Shader::PrepareQk(shader),
                params: bytemuck::bytes_of(&params).to_vec(),
                windows: source.into_iter().chain(others).chain(joined).collect(),
                groups: [groups.min(MAX_GROUPS) as u32, 1, 1],
                operations: 0,
            });
        }
        if let Some(joint) = joint {
            joint.firsts.push(self.first_token);
        }
        Ok(())
    }

    /// How the heads of a launch can be read and written.
    fn access(&self, params: &PrepareQkParams) -> HeadAccess {
        let [batch, seq, heads] = [0, 1, 2].map(|dim| self.to.layout.shape().get(dim).copied().unwrap_or(0));
        // Strides that nobody steps over may be anything.
        let stepped = |size: usize, stride: u32| if size > 1 { stride } else { 0 };
        let of_heads = |[offset, b, s, h]: [u32; 4]| [offset, stepped(batch, b), stepped(seq, s), stepped(heads, h)];
        let src = of_heads([params.src_offset, params.src_stride_b, params.src_stride_s, params.src_stride_h]);
        let dst = of_heads([params.dst_offset, params.dst_stride_b, params.dst_stride_s, params.dst_stride_h]);
        let is_multiple = |numbers: &[u32], of: u32| numbers.iter().all(|number| number.is_multiple_of(of));
        let are_multiples = |of: u32| is_multiple(&src, of) && is_multiple(&dst, of);
        // Elements of 16 bytes, of which a u32 holds 1 << shift.
        let of_word = |shift: u32| 4 << shift;
        let weight = is_multiple(&[params.weight_offset], of_word(params.weight_shift));
        let tables = [
            params.cos_offset,
            stepped(batch, params.cos_stride_b),
            stepped(seq, params.cos_stride_s),
            params.sin_offset,
            stepped(batch, params.sin_stride_b),
            stepped(seq, params.sin_stride_s),
        ];
        let tables = is_multiple(&tables, of_word(params.table_shift));
        // Octets have both of every pair, or half as many octets are the other ones of all pairs.
        let pairs = params.half.is_multiple_of(if params.is_interleaved == 1 { 4 } else { 8 });
        let shift = shift(self.to.dtype);
        if params.head_dim.is_multiple_of(8) && are_multiples(of_word(shift)) && weight && tables && pairs {
            HeadAccess::Octets
        } else if shift == 0 || (params.head_dim.is_multiple_of(2) && are_multiples(2)) {
            HeadAccess::Pairs
        } else {
            HeadAccess::Elements
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
