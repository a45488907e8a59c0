//! Key masks as models carry them: additive floating-point masks, and integers of which only 0 and 1 make sense. Values that are
//! neither are refused, with their place.

use std::fmt::Display;

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::mask::key_mask::{KeyMask, MaskInteger, check_token_count};

impl KeyMask {
    /// The largest value of an additive mask that drops its token: far below any difference of scores, so that the token's weight
    /// would be 0, and above the −10000 of models in every element type (−9984 in bf16).
    pub const ADDITIVE_DROPPED: f32 = -1000.0;

    /// A mask from `[B, S]` numbers that models add to scores, row-major: 0 keeps the token, and anything from
    /// [`ADDITIVE_DROPPED`](Self::ADDITIVE_DROPPED) = −1000 down drops it: −10000, the lowest finite number of a type, −∞. The
    /// elements of a `[B, 1, 1, S]` mask are the same in the same order; for one row that all batch rows share see
    /// [`broadcast`](Self::broadcast).
    ///
    /// Other values are refused, for a mask is not a bias: give them to
    /// [`AttentionMask::with_bias`](crate::AttentionMask::with_bias).
    ///
    /// ```
    /// use varlen_fa::KeyMask;
    ///
    /// let mask = KeyMask::from_additive(2, 3, &[0.0, f32::NEG_INFINITY, 0.0, -1e4, f32::MIN, 0.0])?;
    /// assert_eq!(mask, KeyMask::from_integers(2, 3, &[1_u8, 0, 1, 0, 0, 1])?);
    /// assert!(KeyMask::from_additive(1, 2, &[0.0, -2.5]).is_err());
    /// # Ok::<(), varlen_fa::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::MaskRow`] for the first value between, above 0 or NaN; as [`from_bool`](Self::from_bool).
    pub fn from_additive<T: Element>(batch: usize, seq: usize, values: &[T]) -> Result<Self> {
        let is_kept = |value: &T| value.to_f32() == 0.0;
        let is_sound = |value: &T| is_kept(value) || value.to_f32() <= Self::ADDITIVE_DROPPED;
        let rule = "0 (kept) or at most -1000 (dropped), since a mask is not a bias";
        expect_sound(batch, seq, values, is_sound, rule, |value| value.to_f32())?;
        Self::from_flags(batch, seq, values, is_kept)
    }

    /// A mask from `[B, S]` integers, row-major, of which 1 keeps the token and 0 drops it; any other value is refused.
    /// [`from_integers`](Self::from_integers) takes them all.
    ///
    /// # Errors
    /// [`Error::MaskRow`] for the first value that is neither; as [`from_bool`](Self::from_bool).
    pub fn from_integers_strict<T: MaskInteger>(batch: usize, seq: usize, values: &[T]) -> Result<Self> {
        expect_sound(batch, seq, values, |value| value.is_flag(), "0 (dropped) or 1 (kept)", |value| *value)?;
        Self::from_integers(batch, seq, values)
    }

    /// The mask of `batch` rows that are all like the one row of this mask: a `[1, S]` mask broadcast over a batch.
    ///
    /// ```
    /// use varlen_fa::KeyMask;
    ///
    /// let row = KeyMask::from_bool(1, 3, &[true, true, false])?;
    /// assert_eq!(row.broadcast(4)?, KeyMask::from_lengths(3, &[2; 4])?);
    /// # Ok::<(), varlen_fa::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::MaskSize`] if the mask has another number of rows than 1 or `batch`, [`Error::TooLarge`] if `batch · seq` does not
    /// fit an `i32`, [`Error::OutOfMemory`].
    pub fn broadcast(&self, batch: usize) -> Result<Self> {
        check_token_count("mask", batch, self.seq())?;
        match self.batch() {
            rows if rows == batch => Ok(self.clone()),
            1 => self.repeated(batch),
            rows => Err(Error::MaskSize { argument: "mask", expected: [1, self.seq()], got: [rows, self.seq()] }),
        }
    }
}

/// Checks the number of values, and each of them.
fn expect_sound<T, Shown: Display>(
    batch: usize,
    seq: usize,
    values: &[T],
    is_sound: impl Fn(&T) -> bool,
    rule: &str,
    shown: impl Fn(&T) -> Shown,
) -> Result<()> {
    let expected = check_token_count("mask", batch, seq)?;
    Error::expect_length("mask", expected, values.len())?;
    // The whole mask at once, which takes less time than looking for the first.
    if values.iter().fold(true, |all, value| all & is_sound(value)) {
        return Ok(());
    }
    let place = values.iter().position(|value| !is_sound(value)).unwrap_or(0);
    Err(Error::MaskRow {
        argument: "mask",
        row: place / seq,
        expected: format!("token {} must be {rule}", place % seq),
        got: shown(&values[place]).to_string(),
    })
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// The same mask from the lowest and other numbers of one element type.
    fn additive<T: Element>(lowest: T, infinite: T) -> Result<()> {
        let dropped = [lowest, infinite, T::from_f32(-10000.0), T::from_f32(-1000.0)];
        let (zero, minus_zero) = (T::from_f32(0.0), T::from_f32(-0.0));
        let values: Vec<T> = dropped.iter().flat_map(|&dropped| [zero, dropped, minus_zero]).collect();
        let mask = KeyMask::from_additive(2, 6, &values)?;
        assert_eq!(mask, KeyMask::from_bool(2, 6, &[true, false, true].repeat(4))?);
        for wrong in [-992.0, -1.0, 1.0, 1e4, f32::INFINITY, f32::NAN, -1e-3] {
            let mut values = values.clone();
            values[8] = T::from_f32(wrong);
            let got = T::from_f32(wrong).to_f32().to_string();
            let error = KeyMask::from_additive(2, 6, &values).err();
            assert!(
                matches!(&error, Some(Error::MaskRow { argument: "mask", row: 1, expected, got: value })
                    if expected.contains("token 2 must be 0") && *value == got),
                "{wrong}: {error:?}"
            );
        }
        Ok(())
    }

    #[test]
    fn additive_masks_of_every_element_type() -> Result<()> {
        additive(f32::MIN, f32::NEG_INFINITY)?;
        additive(f16::MIN, f16::NEG_INFINITY)?;
        additive(bf16::MIN, bf16::NEG_INFINITY)
    }

    #[test]
    fn strict_integers_are_zeros_and_ones() -> Result<()> {
        let flags = [1_i64, 0, 0, 1, 1, 0];
        assert_eq!(KeyMask::from_integers_strict(3, 2, &flags)?, KeyMask::from_integers(3, 2, &flags)?);
        for wrong in [2, -1, i64::MIN, 1 << 32] {
            let error = KeyMask::from_integers_strict(3, 2, &[1, 0, 0, 1, 1, wrong]).err();
            let expected = "token 1 must be 0 (dropped) or 1 (kept)".to_owned();
            assert_eq!(error, Some(Error::MaskRow { argument: "mask", row: 2, expected, got: wrong.to_string() }));
        }
        assert!(KeyMask::from_integers_strict(1, 1, &[255_u8]).is_err());
        Ok(())
    }

    #[test]
    fn the_number_of_values_is_checked_first() {
        let length = |expected, got| Some(Error::Length { argument: "mask", expected, got });
        assert_eq!(KeyMask::from_additive(2, 3, &[1.5_f32; 5]).err(), length(6, 5));
        assert_eq!(KeyMask::from_integers_strict(2, 3, &[7_u8; 7]).err(), length(6, 7));
        assert_eq!(KeyMask::from_integers_strict(2, 0, &[7_u8]).err(), length(0, 1));
        assert!(KeyMask::from_additive::<f32>(2, 0, &[]).is_ok_and(|mask| mask.is_empty()));
        assert!(matches!(KeyMask::from_additive::<f32>(usize::MAX, 9, &[]), Err(Error::TooLarge { .. })));
    }

    #[test]
    fn one_row_is_broadcast() -> Result<()> {
        // More tokens than a word has bits.
        let row = KeyMask::from_runs(70, &[vec![0..3, 60..70]])?;
        assert_eq!(row.broadcast(3)?, KeyMask::from_runs(70, &vec![vec![0..3, 60..70]; 3])?);
        assert_eq!(row.broadcast(0)?, KeyMask::all(0, 70)?);
        let rows = KeyMask::from_lengths(4, &[1, 2])?;
        assert_eq!(rows.broadcast(2)?, rows);
        assert_eq!(rows.broadcast(3).err(), Some(Error::MaskSize { argument: "mask", expected: [1, 4], got: [2, 4] }));
        assert!(matches!(row.broadcast(1 << 30), Err(Error::TooLarge { .. })));
        Ok(())
    }
}
