//! What a joint layer checks beside the checks of its two operations: both see a part of its
//! tensors.

use super::prepare_qk::SegmentInfo;
use super::problem::{
    DeviceInfo, ViewInfo, expect_apart, expect_dtype, expect_input, expect_output, expect_outputs_apart, expect_shape,
};
use super::segments::SEGMENT_NAMES;
use crate::error::Result;

/// A segment of a joint layer, without its memory.
#[derive(Debug)]
pub(crate) struct JointInfo<'a> {
    pub v: ViewInfo<'a>,
    pub out: ViewInfo<'a>,
}

/// Checks segments whose q and k have passed their own checks: v and the output have the tokens of
/// q and k, and nothing that is still to be read is written.
pub(crate) fn check_joint(
    device: DeviceInfo<'_>,
    segments: &[(SegmentInfo<'_>, JointInfo<'_>)],
    bias: Option<&ViewInfo<'_>>,
) -> Result<()> {
    for (names, (qk, JointInfo { v, out })) in SEGMENT_NAMES.iter().zip(segments) {
        let (q, k) = (qk.q.source(), qk.k.source());
        for (name, view, like) in [(names.v, v, k), (names.out, out, q)] {
            expect_shape(name, view, like.layout.shape())?;
            expect_dtype(name, view, q.dtype)?;
            expect_input(name, view, device)?;
        }
        expect_output(names.out, out, device)?;
    }
    for (names, (qk, JointInfo { out, .. })) in SEGMENT_NAMES.iter().zip(segments) {
        for (name, out_name, rows) in [(names.q, names.q_out, &qk.q), (names.k, names.k_out, &qk.k)] {
            let output_name = rows.output_name(name, out_name);
            for (others, (_, other)) in SEGMENT_NAMES.iter().zip(segments) {
                // Of one fused projection, q and k may be written beside v.
                expect_outputs_apart(output_name, &rows.output, others.v, &other.v)?;
                expect_apart(others.out, &other.out, output_name, &rows.output)?;
            }
            if let Some(bias) = bias {
                expect_apart(output_name, &rows.output, "bias", bias)?;
            }
        }
        // Outputs share no memory with any input, those of the norm and the rotation among them.
        for (others, (other, _)) in SEGMENT_NAMES.iter().zip(segments) {
            let rows = [(others.q, &other.q), (others.k, &other.k)];
            let sources = rows.into_iter().filter_map(|(name, rows)| Some((name, rows.input.as_ref()?)));
            let weights = other.norm.iter().flat_map(|([q, k], _)| [(others.q_weight, q), (others.k_weight, k)]);
            let tables = other.rotary.iter().flat_map(|[cos, sin]| [(others.cos, cos), (others.sin, sin)]);
            for (name, input) in sources.chain(weights).chain(tables) {
                expect_apart(names.out, out, name, input)?;
            }
        }
    }
    Ok(())
}
