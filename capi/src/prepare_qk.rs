//! QK-norm and rotary embedding of the segments of a joint layer.

use varlen::{Device, Error, QkNorm, QkSegment, Rotary, RotaryPairing, TokenMask, prepare_qk};

use crate::arguments::{Name, choose, expect_zeros, slice};
use crate::failure::{Failure, Result, guard};
use crate::handles;
use crate::names::number;
use crate::tensors::{Described, Input, Output, expect_apart, finish};
use crate::types::{
    varlen_fa_device, varlen_fa_key_mask, varlen_fa_meta, varlen_fa_qk_segment, varlen_fa_status, varlen_fa_tensor,
};

/// QK-norm and rotary embedding of 1 to 8 segments in one call: each head of q and k is normalised,
/// x * weight / sqrt(mean(x^2) + eps), then rotated: of a pair (a, b) of its first R elements comes
/// (a cos - b sin, b cos + a sin). All in f32, and rounded once.
///
/// `segments`: `count` of them. They agree in B, H, Hkv, D and element type.
/// `key_mask`, `meta`: which tokens count, of [B, S] over the segments one after another; at most one
/// of them, NULL for every token. Rows of the others are neither read nor written. Give the metadata
/// that attention gets, and no key mask where attention computes every query.
///
/// Outputs share no memory with one another or with an input, but for the input that they replace.
/// CUDA devices have no kernel for it yet: NOT_APPLICABLE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_prepare_qk(
    device: *const varlen_fa_device,
    segments: *const varlen_fa_qk_segment,
    count: u64,
    key_mask: *const varlen_fa_key_mask,
    meta: *const varlen_fa_meta,
) -> varlen_fa_status {
    guard(|| {
        let device = handles::get(Name::of("device"), device)?;
        let limit = QkSegment::MAX;
        if count == 0 || count > limit as u64 {
            let got = usize::try_from(count).unwrap_or(usize::MAX);
            return Err(Error::SegmentCount { argument: "segments", limit, got }.into());
        }
        // SAFETY: the caller obeys the header's rules for pointers.
        let segments = unsafe { slice(Name::of("segments"), segments, count) }?;
        let mut described = Vec::with_capacity(limit);
        for (segment, names) in segments.iter().zip(&NAMES) {
            // SAFETY: as above.
            described.push(unsafe { Segment::read(segment, names) }?);
        }
        let outputs: Vec<_> = described.iter().flat_map(|segment| segment.rows.each_ref().map(Rows::output)).collect();
        let inputs: Vec<_> = described.iter().flat_map(Segment::inputs).collect();
        expect_apart(&outputs, &inputs)?;
        let (key_mask, meta) = match (key_mask.is_null(), meta.is_null()) {
            (true, true) => (None, None),
            (false, true) => (Some(handles::get(Name::of("key_mask"), key_mask)?), None),
            (true, false) => (None, Some(handles::get(Name::of("meta"), meta)?)),
            (false, false) => {
                let expected = "NULL beside a key mask";
                return Err(Failure::argument(varlen_fa_status::BadValue, "meta", expected, "metadata"));
            }
        };
        let mask = match (&key_mask, &meta) {
            (Some(key_mask), _) => TokenMask::from(&**key_mask),
            (None, Some(meta)) => TokenMask::from(&**meta),
            (None, None) => TokenMask::all(),
        };
        let mut opened = Vec::with_capacity(limit);
        for segment in &described {
            opened.push(Opened::new(&device, segment)?);
        }
        let calls = opened.iter_mut().map(Opened::call).collect::<Result<Vec<_>>>()?;
        prepare_qk(&device, calls, mask)?;
        finish(opened.into_iter().flat_map(|opened| opened.outputs).collect::<Vec<_>>())
    })
}

/// What messages call the tensors of a segment.
struct Names {
    q: [&'static str; 2],
    k: [&'static str; 2],
    weights: [&'static str; 2],
    tables: [&'static str; 2],
    eps: &'static str,
    pairing: &'static str,
    reserved: &'static str,
}

macro_rules! names {
    ($($index:literal)*) => {
        static NAMES: [Names; QkSegment::MAX] = [$(Names {
            q: [concat!("segments[", $index, "].q"), concat!("segments[", $index, "].q_out")],
            k: [concat!("segments[", $index, "].k"), concat!("segments[", $index, "].k_out")],
            weights: [concat!("segments[", $index, "].q_weight"), concat!("segments[", $index, "].k_weight")],
            tables: [concat!("segments[", $index, "].cos"), concat!("segments[", $index, "].sin")],
            eps: concat!("segments[", $index, "].eps"),
            pairing: concat!("segments[", $index, "].pairing"),
            reserved: concat!("segments[", $index, "].reserved"),
        }),*];
    };
}
names!(0 1 2 3 4 5 6 7);

/// q or k.
struct Rows<'a> {
    /// None in place.
    input: Option<Described<'a>>,
    output: Described<'a>,
}

impl<'a> Rows<'a> {
    /// # Safety
    /// As [`Described::new`].
    unsafe fn read(
        [name, out_name]: [&'static str; 2],
        tensor: *const varlen_fa_tensor,
        out: *const varlen_fa_tensor,
    ) -> Result<Self> {
        // SAFETY: by this function's contract; as in the line below.
        let input = unsafe { Described::new(name, tensor) }?;
        // SAFETY: as above.
        let output = unsafe { Described::optional(out_name, out) }?;
        Ok(match output.filter(|output| !output.is_same(&input)) {
            None => Self { input: None, output: input },
            Some(output) => Self { input: Some(input), output },
        })
    }

    fn output(&self) -> &Described<'a> {
        &self.output
    }
}

/// A checked segment.
struct Segment<'a> {
    rows: [Rows<'a>; 2],
    norm: Option<([Described<'a>; 2], f32)>,
    rotary: Option<([Described<'a>; 2], RotaryPairing)>,
}

impl<'a> Segment<'a> {
    /// # Safety
    /// The segment's tensors obey [`Described::new`].
    unsafe fn read(segment: &varlen_fa_qk_segment, names: &Names) -> Result<Self> {
        expect_zeros(Name::of(names.reserved), &segment.reserved)?;
        // SAFETY: by this function's contract; as in the lines below.
        let q = unsafe { Rows::read(names.q, segment.q, segment.q_out) }?;
        // SAFETY: as above.
        let k = unsafe { Rows::read(names.k, segment.k, segment.k_out) }?;
        if q.input.is_none() != k.input.is_none() {
            let of = |rows: &Rows<'_>| if rows.input.is_none() { "in place" } else { "elsewhere" };
            let (expected, got) = (format!("{}, as q's", of(&q)), of(&k));
            return Err(Failure::argument(varlen_fa_status::BadValue, names.k[1], expected, got));
        }
        // SAFETY: as above.
        let norm = unsafe { both(names.weights, segment.q_weight, segment.k_weight) }?;
        // SAFETY: as above.
        let tables = unsafe { both(names.tables, segment.cos, segment.sin) }?;
        if norm.is_none() && segment.eps != 0.0 {
            let expected = "0 without a norm";
            return Err(Failure::argument(varlen_fa_status::BadValue, names.eps, expected, segment.eps));
        }
        let rotary = match tables {
            Some(tables) => Some((tables, choose(Name::of(names.pairing), segment.pairing)?.meaning)),
            None => {
                expect_zeros(Name::of(names.pairing), &[u64::from(number(segment.pairing))])?;
                None
            }
        };
        Ok(Self { rows: [q, k], norm: norm.map(|norm| (norm, segment.eps)), rotary })
    }

    fn inputs(&self) -> impl Iterator<Item = &Described<'a>> {
        let rows = self.rows.iter().filter_map(|rows| rows.input.as_ref());
        let weights = self.norm.iter().flat_map(|(weights, _)| weights);
        rows.chain(weights).chain(self.rotary.iter().flat_map(|(tables, _)| tables))
    }
}

/// Two tensors that come together, or neither.
///
/// # Safety
/// As [`Described::new`].
unsafe fn both<'a>(
    names: [&'static str; 2],
    first: *const varlen_fa_tensor,
    second: *const varlen_fa_tensor,
) -> Result<Option<[Described<'a>; 2]>> {
    if first.is_null() && second.is_null() {
        return Ok(None);
    }
    // SAFETY: by this function's contract; as in the line below.
    let first = unsafe { Described::new(names[0], first) }?;
    // SAFETY: as above.
    Ok(Some([first, unsafe { Described::new(names[1], second) }?]))
}

/// A segment in memory that the device uses.
struct Opened<'a> {
    inputs: [Option<Input<'a>>; 2],
    outputs: [Output<'a>; 2],
    norm: Option<([Input<'a>; 2], f32)>,
    rotary: Option<([Input<'a>; 2], RotaryPairing)>,
}

impl<'a> Opened<'a> {
    fn new(device: &Device, segment: &Segment<'a>) -> Result<Self> {
        let [q, k] = &segment.rows;
        let input = |rows: &Rows<'a>| rows.input.as_ref().map(|input| Input::new(device, input)).transpose();
        let pair = |[first, second]: &[Described<'a>; 2]| -> Result<_> {
            Ok([Input::new(device, first)?, Input::new(device, second)?])
        };
        Ok(Self {
            inputs: [input(q)?, input(k)?],
            outputs: [Output::holding(device, &q.output)?, Output::holding(device, &k.output)?],
            norm: segment.norm.as_ref().map(|(weights, eps)| Ok::<_, Failure>((pair(weights)?, *eps))).transpose()?,
            rotary: segment
                .rotary
                .as_ref()
                .map(|(tables, pairing)| Ok::<_, Failure>((pair(tables)?, *pairing)))
                .transpose()?,
        })
    }

    fn call(&mut self) -> Result<QkSegment<'_>> {
        let Self { inputs: [q, k], outputs: [q_out, k_out], norm, rotary } = self;
        let (q_out, k_out) = (q_out.view_mut()?, k_out.view_mut()?);
        let mut segment = match (q, k) {
            (Some(q), Some(k)) => QkSegment::copied(q.view(), k.view(), q_out, k_out),
            _ => QkSegment::in_place(q_out, k_out),
        };
        if let Some(([q_weight, k_weight], eps)) = norm {
            segment = segment.with_norm(QkNorm::new(q_weight.view(), k_weight.view(), *eps));
        }
        if let Some(([cos, sin], pairing)) = rotary {
            segment = segment.with_rotary(Rotary::new(cos.view(), sin.view(), *pairing));
        }
        Ok(segment)
    }
}
