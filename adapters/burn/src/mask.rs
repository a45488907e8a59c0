//! Masks, from one library to the other.

use burn_tensor::{Bool, Tensor};
use varlen_fa::KeyMask;

use crate::error::{Error, Result};

/// The key mask of a padding mask, `[B, S]`. burn's convention is the opposite of the library's: `true` marks *padding* in
/// [`MhaInput::mask_pad`](https://docs.rs/burn-nn/latest/burn_nn/attention/struct.MhaInput.html) and its kin, and it marks what
/// is *kept* in a [`KeyMask`]. This turns it round.
///
/// The mask is read on the host: on a GPU that waits for what writes it. Do it once per request, and build
/// [`VarlenMeta`](varlen_fa::VarlenMeta) of the result.
///
/// ```
/// use burn_tensor::{Bool, Device, Tensor};
/// use varlen_fa_burn::key_mask;
/// use varlen_fa_burn::varlen_fa::VarlenMeta;
///
/// let padding = Tensor::<2, Bool>::from_data([[false, false, true], [false, false, false]], &Device::flex());
/// let meta = VarlenMeta::from_key_mask(&key_mask(padding)?)?;
/// assert_eq!(meta.total_valid(), 5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Runtime`] if the mask cannot be read, [`varlen_fa::Error::TooLarge`], [`varlen_fa::Error::OutOfMemory`].
pub fn key_mask(padding: Tensor<2, Bool>) -> Result<KeyMask> {
    let [batch, seq] = padding.dims();
    let data = padding.try_into_data().map_err(|error| Error::Runtime(format!("{error:?}")))?;
    let keep: Vec<bool> = data.iter::<bool>().map(|is_padding| !is_padding).collect();
    Ok(KeyMask::from_bool(batch, seq, &keep)?)
}
