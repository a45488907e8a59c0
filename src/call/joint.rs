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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::DeviceId;
    use crate::call::prepare_qk::RowsInfo;
    use crate::dtype::DType;
    use crate::error::Error;
    use crate::layout::Layout;

    const DEVICE: DeviceInfo<'_> = DeviceInfo { id: DeviceId::CPU, name: "cpu", dtypes: &[DType::F32] };

    /// A view in one of many memories of 4096 bytes.
    fn view(memory: u64, layout: Layout) -> ViewInfo<'static> {
        let touched = layout.offset() * 4..layout.end() * 4;
        let (dtype, device, device_name) = (DType::F32, DeviceId::CPU, "cpu");
        ViewInfo { layout, dtype, device, device_name, memory_bytes: 4096, space: memory, touched }
    }

    /// Two segments whose tensors each have memory of their own; q is copied, k is in place.
    fn segments() -> Result<Vec<(SegmentInfo<'static>, JointInfo<'static>)>> {
        let segment = |first: u64| {
            let rows = Layout::contiguous(&[1, 3, 2, 8])?;
            let of = |number: u64| view(first + number, rows);
            let (weight, table) = (Layout::contiguous(&[8])?, Layout::contiguous(&[3, 4])?);
            let qk = SegmentInfo {
                q: RowsInfo { input: Some(of(1)), output: of(2) },
                k: RowsInfo { input: None, output: of(3) },
                norm: Some(([view(first + 4, weight), view(first + 5, weight)], 1e-6)),
                rotary: Some([view(first + 6, table), view(first + 7, table)]),
            };
            Ok((qk, JointInfo { v: of(8), out: of(9) }))
        };
        [100, 200].map(segment).into_iter().collect()
    }

    fn refusal(
        change: impl FnOnce(&mut Vec<(SegmentInfo<'static>, JointInfo<'static>)>) -> Result<()>,
        bias: Option<ViewInfo<'_>>,
    ) -> Result<Option<Error>> {
        let mut segments = segments()?;
        change(&mut segments)?;
        Ok(check_joint(DEVICE, &segments, bias.as_ref()).err())
    }

    #[test]
    fn nothing_that_is_still_read_is_written() -> Result<()> {
        let rows = Layout::contiguous(&[1, 3, 2, 8])?;
        let bias = |memory| Some(view(memory, Layout::contiguous(&[6, 6]).ok()?));
        assert_eq!(refusal(|_| Ok(()), bias(1))?, None);
        // v or a bias where q or k is written, in place or elsewhere. The q that is copied may be
        // read as one.
        for (memory, refused) in [(202, Some("segments[1].q_out")), (103, Some("segments[0].k")), (201, None)] {
            let got = refusal(
                |segments| {
                    segments[0].1.v = view(memory, rows);
                    Ok(())
                },
                None,
            )?;
            let other = "segments[0].v";
            assert_eq!(got, refused.map(|argument| Error::Overlap { argument, other }), "{memory}");
            let got = refusal(|_| Ok(()), bias(memory))?;
            assert_eq!(got, refused.map(|argument| Error::Overlap { argument, other: "bias" }), "{memory}");
        }
        // The output where anything is read, or q and k lie.
        let inputs = [
            (101, "segments[0].q"),
            (202, "segments[1].q_out"),
            (203, "segments[1].k"),
            (104, "segments[0].q_weight"),
            (205, "segments[1].k_weight"),
            (106, "segments[0].cos"),
            (107, "segments[0].sin"),
        ];
        for (memory, other) in inputs {
            let got = refusal(
                |segments| {
                    segments[1].1.out = view(memory, rows);
                    Ok(())
                },
                None,
            )?;
            assert_eq!(got, Some(Error::Overlap { argument: "segments[1].out", other }), "{memory}");
        }
        Ok(())
    }

    #[test]
    fn of_one_fused_projection_k_is_written_beside_v() -> Result<()> {
        let fused = Layout::contiguous(&[1, 3, 4, 8])?;
        for (v, is_refused) in [(fused.slice(2, 2..4)?, false), (fused.slice(2, 1..3)?, true)] {
            let got = refusal(
                |segments| {
                    segments[0].0.k.output = view(103, fused.slice(2, 0..2)?);
                    segments[0].1.v = view(103, v);
                    Ok(())
                },
                None,
            )?;
            let overlap = Error::Overlap { argument: "segments[0].k", other: "segments[0].v" };
            assert_eq!(got, is_refused.then_some(overlap));
        }
        Ok(())
    }
}
