//! The log-sum-exp of rows: where it goes on the packed path, and what it merges.

use half::{bf16, f16};

use super::copy::worth;
use super::host::{HostInput, HostOutput};
use super::rows::RowElement;
use super::threads::Threads;
use crate::call::memory::{Input, Output};
use crate::call::op::{Merge, MergePart};
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::MAX_HEAD_DIM;
use crate::mask::meta::VarlenMeta;

/// Rows that one task merges.
const ROWS_PER_TASK: usize = 64;

/// Packed `[H, total_valid]` to padded `[B, H, S]`, −∞ elsewhere.
pub(super) fn scatter(from: Input<'_>, to: Output<'_>, meta: &VarlenMeta) -> Result<()> {
    let (from, to) = (HostInput::<f32>::new(from)?, HostOutput::<f32>::new(to)?);
    let &[batch, heads, seq] = to.layout.shape() else { return Ok(()) };
    let inv_indices = meta.inv_indices()?;
    for b in 0..batch {
        let packed = &inv_indices[b * seq..][..seq];
        for h in 0..heads {
            // SAFETY: one row at a time is asked for.
            let row = unsafe { to.row(&[b, h], seq) };
            for (lse, &packed) in row.iter_mut().zip(packed) {
                *lse = usize::try_from(packed).map_or(f32::NEG_INFINITY, |packed| from.at(&[h, packed]));
            }
        }
    }
    Ok(())
}

/// −∞ in every element of a `[B, H, S]` view.
pub(super) fn no_keys(to: Output<'_>) -> Result<()> {
    let to = HostOutput::<f32>::new(to)?;
    let &[batch, heads, seq] = to.layout.shape() else { return Ok(()) };
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        // SAFETY: one row at a time is asked for.
        unsafe { to.row(&[b, h], seq) }.fill(f32::NEG_INFINITY);
    }
    Ok(())
}

/// Attention over the keys of both parts.
pub(super) fn merge(merge: Merge<'_>, threads: &Threads) -> Result<()> {
    match merge.out.dtype {
        DType::F32 => merge_elements::<f32>(merge, threads),
        DType::F16 => merge_elements::<f16>(merge, threads),
        DType::Bf16 => merge_elements::<bf16>(merge, threads),
    }
}

fn merge_elements<T: RowElement>(Merge { parts, out, lse }: Merge<'_>, threads: &Threads) -> Result<()> {
    let part = |MergePart { out, lse }| Ok((HostInput::<T>::new(out)?, HostInput::<f32>::new(lse)?));
    let [first, second] = parts;
    let [(out1, lse1), (out2, lse2)] = [part(first)?, part(second)?];
    let out = HostOutput::<T>::new(out)?;
    let lse = lse.map(HostOutput::<f32>::new).transpose()?;
    let &[batch, seq, heads, dim] = out.layout.shape() else { return Ok(()) };
    let tokens = batch * seq;
    let team = threads.team(worth(tokens, heads * dim * size_of::<T>()));
    team.for_each(tokens, ROWS_PER_TASK, |token| {
        let (b, s) = (token / seq, token % seq);
        let mut rows = [[0.0; MAX_HEAD_DIM]; 3];
        let [row, row1, row2] = rows.each_mut().map(|row| &mut row[..dim]);
        for h in 0..heads {
            let parts = [lse1.row(&[b, h], seq)[s], lse2.row(&[b, h], seq)[s]];
            let Weights { factors: [factor1, factor2], lse: merged } = Weights::of(parts);
            let row1 = T::widen(out1.row(&[b, s, h], dim), row1);
            let row2 = T::widen(out2.row(&[b, s, h], dim), row2);
            for ((to, &x1), &x2) in row.iter_mut().zip(row1).zip(row2) {
                *to = weighted(factor1, x1) + weighted(factor2, x2);
            }
            // SAFETY: rows of the output do not overlap (checked by problem), and each is asked for
            // once.
            T::narrow(row, unsafe { out.row(&[b, s, h], dim) });
            if let Some(lse) = &lse {
                // SAFETY: as above, one element at a time.
                unsafe { lse.row(&[b, h, s], 1) }.fill(merged);
            }
        }
    });
    Ok(())
}

/// How much the rows of two parts count, and the log-sum-exp of both.
struct Weights {
    /// `None` for a part without keys.
    factors: [Option<f32>; 2],
    lse: f32,
}

impl Weights {
    /// In f64, so that each is rounded once.
    fn of(parts: [f32; 2]) -> Self {
        let [lse1, lse2] = parts.map(f64::from);
        // NaN if one is.
        let largest = if lse1 > lse2 || lse1.is_nan() { lse1 } else { lse2 };
        if largest == f64::NEG_INFINITY {
            return Self { factors: [None; 2], lse: f32::NEG_INFINITY };
        }
        let weights = [lse1, lse2].map(|lse| (lse - largest).exp());
        let sum = weights[0] + weights[1];
        let factor = |part: usize| (parts[part] != f32::NEG_INFINITY).then_some((weights[part] / sum) as f32);
        Self { factors: [factor(0), factor(1)], lse: (largest + sum.ln()) as f32 }
    }
}

#[inline(always)]
fn weighted(factor: Option<f32>, value: f32) -> f32 {
    // What a part without keys holds does not count, were it NaN.
    factor.map_or(0.0, |factor| factor * value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_without_keys_do_not_count_and_nan_spreads() {
        let of = |lse1: f32, lse2: f32| {
            let Weights { factors, lse } = Weights::of([lse1, lse2]);
            (factors, lse)
        };
        let none = f32::NEG_INFINITY;
        assert_eq!(of(none, none), ([None; 2], none));
        assert_eq!(of(3.0, none), ([Some(1.0), None], 3.0));
        assert_eq!(of(none, -900.0), ([None, Some(1.0)], -900.0));
        assert_eq!(of(1.0, 1.0), ([Some(0.5); 2], 1.0 + std::f32::consts::LN_2));
        assert_eq!(of(-1e30, 1e30), ([Some(0.0), Some(1.0)], 1e30));
        for (lse1, lse2) in [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::NAN, none), (none, f32::NAN), (f32::INFINITY, 1.0)]
        {
            let (factors, lse) = of(lse1, lse2);
            assert!(
                lse.is_nan() && factors.into_iter().flatten().any(f32::is_nan),
                "{lse1}, {lse2}: {factors:?}, {lse}"
            );
        }
    }
}
