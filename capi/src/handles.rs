//! Handles: numbers that stand for live objects. They are looked up, never dereferenced. So a
//! handle that was freed, has the wrong type or was never issued is an error. Freeing a handle
//! while another thread's call uses it is safe: the object lives until that call returns.

use std::collections::BTreeMap;
use std::ptr::without_provenance_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::arguments::Name;
use crate::failure::{Failure, Result};
use crate::types::varlen_fa_status;

/// The low bits of a handle are its kind; the rest counts up, so that no number is issued twice.
const KIND_BITS: u32 = 4;
const KINDS: [&str; 11] = [
    "",
    "device",
    "key mask",
    "metadata",
    "cu_seqlens",
    "device metadata",
    "key ranges",
    "score modifiers",
    "communicator",
    "sharded metadata",
    "parallel request",
];

static NEXT: AtomicUsize = AtomicUsize::new(1);

/// Live objects of one kind.
#[derive(Debug)]
pub(crate) struct Table<T>(RwLock<BTreeMap<usize, Arc<T>>>);

impl<T> Table<T> {
    pub const fn new() -> Self {
        Self(RwLock::new(BTreeMap::new()))
    }
}

/// A handle type of the header; [`handle!`] implements it beside the object.
pub(crate) trait Handle: Sized + 'static {
    type Object: Send + Sync;
    /// Place in [`KINDS`].
    const KIND: usize;
    fn table() -> &'static Table<Self::Object>;
}

/// `handle!(type in the header, place in KINDS, object)`.
macro_rules! handle {
    ($handle:ty, $kind:literal, $object:ty) => {
        impl $crate::handles::Handle for $handle {
            type Object = $object;
            const KIND: usize = $kind;
            fn table() -> &'static $crate::handles::Table<$object> {
                static TABLE: $crate::handles::Table<$object> = $crate::handles::Table::new();
                &TABLE
            }
        }
    };
}
pub(crate) use handle;

/// The tables, held by the thread that forks, so that none is locked by another in the child.
mod forks {
    use std::any::Any;
    use std::cell::RefCell;
    use std::sync::PoisonError;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::Handle;
    use crate::types::*;

    type Guard = Box<dyn Any>;

    /// Every table's lock; no thread ever holds two otherwise.
    const HOLD: [fn() -> Guard; super::KINDS.len() - 1] = [
        hold::<varlen_fa_device>,
        hold::<varlen_fa_key_mask>,
        hold::<varlen_fa_meta>,
        hold::<varlen_fa_cu_seqlens>,
        hold::<varlen_fa_device_meta>,
        hold::<varlen_fa_key_ranges>,
        hold::<varlen_fa_score_modifiers>,
        hold::<varlen_fa_communicator>,
        hold::<varlen_fa_sharded_meta>,
        hold::<varlen_fa_parallel_request>,
    ];

    thread_local! {
        static HELD: RefCell<Vec<Guard>> = const { RefCell::new(Vec::new()) };
    }

    fn hold<H: Handle>() -> Guard {
        Box::new(H::table().0.write().unwrap_or_else(PoisonError::into_inner))
    }

    extern "C" fn before() {
        // A thread that is ending no longer has thread-local storage.
        let _ = HELD.try_with(|held| held.borrow_mut().extend(HOLD.map(|hold| hold())));
    }

    /// In the parent and in the child.
    extern "C" fn after() {
        let _ = HELD.try_with(|held| held.borrow_mut().clear());
    }

    /// From now on forks wait until no table is in use.
    pub fn watch() {
        static IS_WATCHED: AtomicBool = AtomicBool::new(false);
        if !IS_WATCHED.swap(true, Ordering::Relaxed) {
            register();
        }
    }

    #[cfg(unix)]
    fn register() {
        use std::ffi::c_int;
        type Handler = Option<extern "C" fn()>;
        unsafe extern "C" {
            fn pthread_atfork(prepare: Handler, parent: Handler, child: Handler) -> c_int;
        }
        // SAFETY: declared as POSIX has it; the handlers live as long as the library. Where it
        // fails for lack of memory, forks are as safe as they are without.
        let _ = unsafe { pthread_atfork(Some(before), Some(after), Some(after)) };
    }

    #[cfg(not(unix))]
    fn register() {
        // Nothing forks here.
        let _ = (before, after);
    }
}

/// Issues a handle for an object.
pub(crate) fn issue<H: Handle>(object: H::Object) -> *mut H {
    forks::watch();
    let handle = NEXT.fetch_add(1, Ordering::Relaxed) << KIND_BITS | H::KIND;
    // A table changes in one step, so a poisoned lock guards a consistent one.
    H::table().0.write().unwrap_or_else(PoisonError::into_inner).insert(handle, Arc::new(object));
    without_provenance_mut(handle)
}

/// The object of a handle. It lives at least as long as the returned reference.
pub(crate) fn get<H: Handle>(name: Name, handle: *const H) -> Result<Arc<H::Object>> {
    let table = H::table().0.read().unwrap_or_else(PoisonError::into_inner);
    table.get(&handle.addr()).map(Arc::clone).ok_or_else(|| refuse::<H>(name, handle.addr()))
}

/// Ends a handle. NULL is ignored.
pub(crate) fn free<H: Handle>(name: Name, handle: *mut H) -> Result<()> {
    if handle.is_null() {
        return Ok(());
    }
    let object = H::table().0.write().unwrap_or_else(PoisonError::into_inner).remove(&handle.addr());
    // Dropped without the lock, since the drop may wait for a device.
    object.map(drop).ok_or_else(|| refuse::<H>(name, handle.addr()))
}

fn refuse<H: Handle>(name: Name, handle: usize) -> Failure {
    let expected = format!("a {} handle", KINDS[H::KIND]);
    if handle == 0 {
        return Failure::argument(varlen_fa_status::NullPointer, name, expected, "NULL");
    }
    let (count, kind) = (handle >> KIND_BITS, handle & ((1 << KIND_BITS) - 1));
    let was_issued = count != 0 && count < NEXT.load(Ordering::Relaxed) && (1..KINDS.len()).contains(&kind);
    let got = match was_issued {
        false => format!("{handle:#x}, which this library never issued"),
        true if kind == H::KIND => "one that was freed".to_owned(),
        true => format!("a {} handle", KINDS[kind]),
    };
    Failure::argument(varlen_fa_status::BadHandle, name, expected, got)
}
