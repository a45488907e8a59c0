//! Norm and rotary embedding of q and k: a task takes tokens, and works head by head on a row of f32
//! in the cache.

use half::{bf16, f16};

use super::copy::worth;
use super::host::{HostInput, HostOutput};
use super::processor::Processor;
use super::rows::RowElement;
use super::threads::Threads;
use crate::call::memory::Input;
use crate::call::prepare_qk::{HeadNorm, HeadRotary, PrepareQk, PrepareSegment, PreparedRows, RotaryPairing};
use crate::dtype::DType;
use crate::error::Result;
use crate::host_vec;
use crate::kernel::MAX_HEAD_DIM;

/// Tokens of one task.
const TOKENS_PER_TASK: usize = 16;
/// Sums that a sum of squares is made of: they lie in SIMD lanes.
const LANES: usize = 16;

pub(super) fn prepare_qk(call: PrepareQk<'_>, processor: Processor, threads: &Threads) -> Result<()> {
    match call.dtype {
        DType::F32 => prepare_elements::<f32>(call, processor, threads),
        DType::F16 => prepare_elements::<f16>(call, processor, threads),
        DType::Bf16 => prepare_elements::<bf16>(call, processor, threads),
    }
}

fn prepare_elements<T: RowElement>(call: PrepareQk<'_>, processor: Processor, threads: &Threads) -> Result<()> {
    let mask = call.mask;
    let mut segments = host_vec::reserve(call.segments.len())?;
    let (mut tokens, mut bytes) = (0, 0);
    for segment in call.segments {
        let segment = Segment::<T>::new(segment, tokens)?;
        tokens += segment.batch * segment.seq;
        bytes = segment.token_bytes();
        segments.push(segment);
    }
    threads.team(worth(tokens, bytes)).for_each(tokens, TOKENS_PER_TASK, |token| {
        let Some(segment) = segments.iter().rev().find(|segment| segment.first_item <= token) else { return };
        let (b, s) = ((token - segment.first_item) / segment.seq, (token - segment.first_item) % segment.seq);
        if mask.is_none_or(|mask| mask.keeps(b, segment.first_token + s)) {
            processor.vectorize(
                #[inline(always)]
                || segment.prepare(b, s),
            );
        }
    });
    Ok(())
}

/// A segment in host memory.
struct Segment<'a, T> {
    batch: usize,
    seq: usize,
    /// Tokens of the segments before, of all batch rows.
    first_item: usize,
    /// Place of its first token in the mask.
    first_token: usize,
    rows: [Rows<'a, T>; 2],
    rotary: Option<Tables<'a, T>>,
}

/// q or k.
struct Rows<'a, T> {
    /// None in place.
    from: Option<HostInput<'a, T>>,
    to: HostOutput<'a, T>,
    heads: usize,
    dim: usize,
    norm: Option<Norm>,
}

struct Norm {
    weight: Vec<f32>,
    eps: f32,
}

struct Tables<'a, T> {
    cos: Numbers<'a, T>,
    sin: Numbers<'a, T>,
    half: usize,
    pairing: RotaryPairing,
}

/// A tensor of the call's element type or of f32.
enum Numbers<'a, T> {
    Same(HostInput<'a, T>),
    F32(HostInput<'a, f32>),
}

/// The rotation of a token.
#[derive(Clone, Copy)]
struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    pairing: RotaryPairing,
}

impl<'a, T: RowElement> Segment<'a, T> {
    fn new(segment: PrepareSegment<'a>, first_item: usize) -> Result<Self> {
        let PrepareSegment { q, k, norm, rotary, first_token, .. } = segment;
        let (batch, seq) = match q.layout().shape() {
            &[batch, seq, ..] => (batch, seq),
            _ => (0, 0),
        };
        let [q_norm, k_norm] = match norm {
            None => [None, None],
            Some(HeadNorm { weights: [q, k], eps }) => [Some(Norm::new::<T>(q, eps)?), Some(Norm::new::<T>(k, eps)?)],
        };
        Ok(Self {
            batch,
            seq,
            first_item,
            first_token,
            rows: [Rows::new(q, q_norm)?, Rows::new(k, k_norm)?],
            rotary: rotary.map(Tables::new).transpose()?,
        })
    }

    /// Bytes of a token's rows.
    fn token_bytes(&self) -> usize {
        self.rows.iter().map(|rows| rows.heads * rows.dim * size_of::<T>()).sum()
    }

    /// The rows of one token.
    #[inline(always)]
    fn prepare(&self, b: usize, s: usize) {
        let mut converted = [[0.0; MAX_HEAD_DIM / 2]; 2];
        let [cos, sin] = &mut converted;
        let angles = self.rotary.as_ref().map(
            #[inline(always)]
            |tables| Angles {
                cos: tables.cos.row(&[b, s], &mut cos[..tables.half]),
                sin: tables.sin.row(&[b, s], &mut sin[..tables.half]),
                pairing: tables.pairing,
            },
        );
        for rows in &self.rows {
            rows.prepare(b, s, angles);
        }
    }
}

impl<'a, T: RowElement> Rows<'a, T> {
    fn new(rows: PreparedRows<'a>, norm: Option<Norm>) -> Result<Self> {
        let (from, to) = match rows {
            PreparedRows::InPlace(to) => (None, HostOutput::new(to)?),
            PreparedRows::Copied(from, to) => (Some(HostInput::new(from)?), HostOutput::new(to)?),
        };
        let (heads, dim) = match to.layout.shape() {
            &[_, _, heads, dim] => (heads, dim),
            _ => (0, 0),
        };
        Ok(Self { from, to, heads, dim, norm })
    }

    #[inline(always)]
    fn prepare(&self, b: usize, s: usize, angles: Option<Angles<'_>>) {
        let to = self.to.batch_rows(b);
        let from = self.from.as_ref().map(
            #[inline(always)]
            |from| from.batch_rows(b),
        );
        let mut row = [0.0; MAX_HEAD_DIM];
        let row = &mut row[..self.dim];
        for h in 0..self.heads {
            // SAFETY: each row is asked for once, and rows of outputs overlap neither one another
            // nor an input (checked by problem).
            let to = unsafe { to.row(s, h, self.dim) };
            match &from {
                Some(from) => T::widen_into(from.row(s, h, self.dim), row),
                None => T::widen_into(to, row),
            }
            if let Some(norm) = &self.norm {
                norm.apply(row);
            }
            if let Some(angles) = angles {
                angles.rotate(row);
            }
            T::narrow(row, to);
        }
    }
}

impl Norm {
    fn new<T: RowElement>(weight: Input<'_>, eps: f32) -> Result<Self> {
        let len = weight.layout.numel();
        let mut wide = host_vec::zeroed(len)?;
        match Numbers::<T>::new(weight)? {
            Numbers::Same(weight) => T::widen_into(weight.row(&[], len), &mut wide),
            Numbers::F32(weight) => wide.copy_from_slice(weight.row(&[], len)),
        }
        Ok(Self { weight: wide, eps })
    }

    #[inline(always)]
    fn apply(&self, row: &mut [f32]) {
        let factor = 1.0 / (sum_of_squares(row) / row.len() as f32 + self.eps).sqrt();
        for (x, &weight) in row.iter_mut().zip(&self.weight) {
            *x = *x * factor * weight;
        }
    }
}

#[inline(always)]
fn sum_of_squares(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += x * x;
    }
    sums.iter().sum()
}

impl<'a, T: RowElement> Tables<'a, T> {
    fn new(HeadRotary { cos, sin, pairing }: HeadRotary<'a>) -> Result<Self> {
        let half = cos.layout.shape().last().copied().unwrap_or(0);
        Ok(Self { cos: Numbers::new(cos)?, sin: Numbers::new(sin)?, half, pairing })
    }
}

impl<'a, T: RowElement> Numbers<'a, T> {
    fn new(input: Input<'a>) -> Result<Self> {
        Ok(if input.dtype == T::DTYPE { Self::Same(HostInput::new(input)?) } else { Self::F32(HostInput::new(input)?) })
    }

    /// A row of `scratch`'s length as f32.
    #[inline(always)]
    fn row<'s>(&'s self, position: &[usize], scratch: &'s mut [f32]) -> &'s [f32] {
        match self {
            Self::Same(input) => T::widen(input.row(position, scratch.len()), scratch),
            Self::F32(input) => input.row(position, scratch.len()),
        }
    }
}

impl Angles<'_> {
    #[inline(always)]
    fn rotate(self, row: &mut [f32]) {
        let Self { cos, sin, pairing } = self;
        match pairing {
            RotaryPairing::Interleaved => {
                for ((pair, &cos), &sin) in row.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                    let [a, b] = *pair;
                    *pair = [a * cos - b * sin, b * cos + a * sin];
                }
            }
            RotaryPairing::Halves => {
                let (first, second) = row[..2 * cos.len()].split_at_mut(cos.len());
                for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}
