//! What C gets instead of errors and panics: a status, and a message in the thread that made the
//! call.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use varlen::Error;

use crate::types::varlen_fa_status;

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why a call was refused or failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub status: varlen_fa_status,
    pub message: String,
}

impl Failure {
    /// An argument with a wrong value.
    pub fn argument(
        status: varlen_fa_status,
        argument: impl Display,
        expected: impl Display,
        got: impl Display,
    ) -> Self {
        Self { status, message: format!("`{argument}`: expected {expected}, got {got}") }
    }

    fn panic(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Self { status: varlen_fa_status::Panic, message: format!("varlen-fa failed: {text}") }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { status: status_of(&error), message: error.to_string() }
    }
}

fn status_of(error: &Error) -> varlen_fa_status {
    use varlen_fa_status as Status;
    match error {
        Error::Rank { .. } => Status::Rank,
        Error::Shape { .. } => Status::Shape,
        Error::Broadcast { .. } => Status::Broadcast,
        Error::HeadsNotDivisible { .. } => Status::HeadsNotDivisible,
        Error::HeadDim { .. } => Status::HeadDim,
        Error::UnsupportedDType { .. } => Status::UnsupportedDtype,
        Error::DTypeMismatch { .. } => Status::DtypeMismatch,
        Error::InnerStride { .. } => Status::InnerStride,
        Error::Misaligned { .. } => Status::Misaligned,
        Error::BufferTooSmall { .. } => Status::BufferTooSmall,
        Error::Overlap { .. } => Status::Overlap,
        Error::SelfOverlap { .. } => Status::SelfOverlap,
        Error::Length { .. } => Status::Length,
        Error::MaskSize { .. } | Error::RangesSize { .. } => Status::MaskSize,
        Error::MaskRow { .. } => Status::MaskRow,
        Error::CuSeqlens { .. } => Status::CuSeqlens,
        Error::SoftmaxScale { .. } => Status::SoftmaxScale,
        Error::ScoreModifier { .. } => Status::ScoreModifier,
        Error::SegmentCount { .. } | Error::Eps { .. } | Error::RotaryDim { .. } => Status::BadValue,
        Error::TooLarge { .. } => Status::TooLarge,
        Error::Environment { .. } => Status::Environment,
        Error::DeviceMismatch { .. } | Error::DeviceKind { .. } => Status::DeviceMismatch,
        Error::NotApplicable { .. } => Status::NotApplicable,
        Error::Handle { .. } => Status::BadHandle,
        Error::StreamCaptured { .. } => Status::StreamCaptured,
        Error::DeviceUnavailable { .. } => Status::DeviceUnavailable,
        Error::OutOfMemory { .. } => Status::OutOfMemory,
        Error::DeviceLost { .. } => Status::DeviceLost,
        Error::Backend { .. } => Status::Backend,
        Error::Sharding { .. } => Status::Sharding,
        Error::RanksDiffer { .. } => Status::RanksDiffer,
        Error::RankLost { .. } => Status::RankLost,
        Error::RankTimedOut { .. } => Status::RankTimedOut,
        _ => Status::Refused,
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of an exported function. Errors and panics become a status, and their message is
/// kept for the thread.
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> varlen_fa_status {
    // A panic leaves nothing half-changed for later calls: tables change in one step, and locks are
    // used even when poisoned.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return varlen_fa_status::Ok,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let failure = Failure::panic(&*payload);
            // Its drop could panic in turn.
            std::mem::forget(payload);
            failure
        }
    };
    let message = CString::new(failure.message.replace('\0', "\\0")).unwrap_or_default();
    // A thread that is ending no longer has thread-local storage.
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
    failure.status
}

/// The message of this thread's last call that did not return VARLEN_FA_STATUS_OK; "" if there was
/// none. It names the argument, what was expected and what came. The text is valid until the
/// thread's next call that fails, or until the thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last_error() -> String {
        // SAFETY: the text ends with 0 and is not replaced while it is copied: no call of this
        // thread comes between.
        unsafe { CStr::from_ptr(varlen_fa_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status() {
        assert_eq!(guard(|| panic!("at {}", 7)), varlen_fa_status::Panic);
        assert_eq!(last_error(), "varlen-fa failed: at 7");
        assert_eq!(guard(|| std::panic::panic_any(7)), varlen_fa_status::Panic);
        assert_eq!(last_error(), "varlen-fa failed: no message");
    }

    #[test]
    fn messages_stay_with_their_thread_until_the_next_failure() {
        let got = "a\0b";
        assert_eq!(
            guard(|| Err(Failure::argument(varlen_fa_status::BadValue, "x", 1, got))),
            varlen_fa_status::BadValue
        );
        assert_eq!(guard(|| Ok(())), varlen_fa_status::Ok);
        assert_eq!(last_error(), "`x`: expected 1, got a\\0b");
        assert_eq!(std::thread::spawn(last_error).join().unwrap(), "");
        assert_eq!(guard(|| Err(Error::HeadDim { got: 7 }.into())), varlen_fa_status::HeadDim);
        assert!(last_error().contains("head_dim"));
    }
}
