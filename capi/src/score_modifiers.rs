//! What happens to scores: soft cap, ALiBi, attention sinks.

use std::sync::Arc;

use varlen::ScoreModifiers;

use crate::arguments::{Name, Place, reserve, slice};
use crate::failure::{Result, guard};
use crate::handles::{self, handle};
use crate::types::{varlen_fa_score_modifiers, varlen_fa_status};

handle!(varlen_fa_score_modifiers, 7, ScoreModifiers);

/// Creates score modifiers, for `num_heads` query heads. Their values are checked by the calls that
/// use them.
///
/// `softcap`: scores become softcap * tanh(score / softcap), after the softmax scale; 0 for no cap.
/// `alibi`: the slope of each query head, whose product with the distance of query and key,
/// |i + Sk - Sq - j|, is taken from the score; NULL for none.
/// `sinks`: one more score of each query head, without a value, that takes weight from the keys;
/// NULL for none.
/// Both arrays lie in host memory and are copied; a bias is added after the cap and ALiBi.
/// `modifiers`: receives the handle, to be given to varlen_fa_score_modifiers_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_score_modifiers_create(
    softcap: f32,
    alibi: *const f32,
    sinks: *const f32,
    num_heads: u64,
    modifiers: *mut *mut varlen_fa_score_modifiers,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("modifiers"), modifiers) }?;
        let mut made = ScoreModifiers::new().with_softcap(softcap);
        if !alibi.is_null() {
            // SAFETY: by the header, `num_heads` numbers that nobody writes.
            made = made.with_alibi(copy(unsafe { slice(Name::of("alibi"), alibi, num_heads) }?)?);
        }
        if !sinks.is_null() {
            // SAFETY: by the header, `num_heads` numbers that nobody writes.
            made = made.with_sinks(copy(unsafe { slice(Name::of("sinks"), sinks, num_heads) }?)?);
        }
        place.put(handles::issue(made));
        Ok(())
    })
}

fn copy(values: &[f32]) -> Result<Vec<f32>> {
    let mut copied = reserve(values.len())?;
    copied.extend_from_slice(values);
    Ok(copied)
}

/// Frees score modifiers; NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_score_modifiers_free(modifiers: *mut varlen_fa_score_modifiers) -> varlen_fa_status {
    guard(|| handles::free(Name::of("modifiers"), modifiers))
}

/// The modifiers of a handle; none of NULL.
pub(crate) fn optional(name: Name, modifiers: *const varlen_fa_score_modifiers) -> Result<Option<Arc<ScoreModifiers>>> {
    if modifiers.is_null() { Ok(None) } else { handles::get(name, modifiers).map(Some) }
}
