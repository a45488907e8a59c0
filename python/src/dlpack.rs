//! DLPack, the exchange of tensors without a copy: what others offer, and what we offer.
//! <https://dmlc.github.io/dlpack/latest/>

use std::ffi::{CStr, c_void};
use std::ptr::{self, NonNull};

use pyo3::ffi;
use pyo3::prelude::*;
use varlen_fa::Layout;

/// The newest version that we understand.
pub(crate) const VERSION: (u32, u32) = (1, 0);

/// `DLDeviceType`
pub(crate) mod device_type {
    pub(crate) const CPU: i32 = 1;
    pub(crate) const CUDA: i32 = 2;
    pub(crate) const CUDA_HOST: i32 = 3;
    pub(crate) const CUDA_MANAGED: i32 = 13;
}

/// `DLDataTypeCode`
pub(crate) mod type_code {
    pub(crate) const INT: u8 = 0;
    pub(crate) const UINT: u8 = 1;
    pub(crate) const FLOAT: u8 = 2;
    pub(crate) const BFLOAT: u8 = 4;
    pub(crate) const BOOL: u8 = 6;
}

/// `DLPACK_FLAG_BITMASK_READ_ONLY`
const READ_ONLY: u64 = 1;

const PLAIN: &CStr = c"dltensor";
const PLAIN_USED: &CStr = c"used_dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const VERSIONED_USED: &CStr = c"used_dltensor_versioned";

/// `DLDataType`
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

/// `DLTensor`
#[repr(C)]
#[derive(Debug)]
pub(crate) struct RawTensor {
    pub data: *mut c_void,
    pub device_type: i32,
    pub device_id: i32,
    pub rank: i32,
    pub dtype: DataType,
    pub shape: *mut i64,
    /// In elements; null for row-major.
    pub strides: *mut i64,
    pub byte_offset: u64,
}

/// `DLManagedTensor`
#[repr(C)]
struct Managed {
    tensor: RawTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// `DLManagedTensorVersioned`
#[repr(C)]
struct ManagedVersioned {
    version: [u32; 2],
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedVersioned)>,
    flags: u64,
    tensor: RawTensor,
}

/// `DLPackExchangeAPI`, up to what is used of it: functions of a package that need no capsules.
#[repr(C)]
struct ExchangeApi {
    version: [u32; 2],
    previous: *const c_void,
    allocate: *const c_void,
    managed_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut *mut ManagedVersioned) -> i32>,
}

/// The functions that a type of tensors offers by `__dlpack_c_exchange_api__`. They live as long as
/// the process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exchange(unsafe extern "C" fn(*mut c_void, *mut *mut ManagedVersioned) -> i32);

impl Exchange {
    /// Those of a type, if it offers any that we understand.
    pub fn of_type(class: &Bound<'_, PyAny>) -> Option<Self> {
        const NAME: &CStr = c"dlpack_exchange_api";
        let capsule = class.getattr_opt("__dlpack_c_exchange_api__").ok()??;
        // SAFETY: any object may be asked, and the name ends in 0.
        if unsafe { ffi::PyCapsule_IsValid(capsule.as_ptr(), NAME.as_ptr()) } == 0 {
            return None;
        }
        // SAFETY: it is a capsule of this name.
        let api = NonNull::new(unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), NAME.as_ptr()) })?;
        // SAFETY: by DLPack, it points to such a struct, which is never freed.
        let api = unsafe { api.cast::<ExchangeApi>().as_ref() };
        (api.version[0] == VERSION.0).then_some(api.managed_from_object)?.map(Self)
    }

    /// A tensor of the type, without a synchronisation of streams.
    pub fn take(self, object: &Bound<'_, PyAny>) -> PyResult<Taken> {
        let mut managed = ptr::null_mut();
        // SAFETY: an object of the type, and room for the result; the interpreter is attached.
        let status = unsafe { self.0(object.as_ptr().cast(), &raw mut managed) };
        match NonNull::new(managed).filter(|_| status == 0) {
            Some(managed) => Ok(Taken(Owned::Versioned(managed))),
            None => Err(PyErr::fetch(object.py())),
        }
    }
}

/// A tensor that was taken from a capsule; its memory stays valid until this is dropped.
#[derive(Debug)]
pub(crate) struct Taken(Owned);

#[derive(Debug)]
enum Owned {
    Plain(NonNull<Managed>),
    Versioned(NonNull<ManagedVersioned>),
}

impl Taken {
    /// Takes the tensor out of what `__dlpack__` returned, and marks the capsule as used.
    ///
    /// # Errors
    /// What came instead of such a capsule.
    pub fn from_capsule(capsule: &Bound<'_, PyAny>) -> Result<Self, String> {
        let object = capsule.as_ptr();
        let holds = |name: &CStr| {
            // SAFETY: any object may be asked, and the name ends in 0.
            unsafe { ffi::PyCapsule_IsValid(object, name.as_ptr()) == 1 }
        };
        let (name, used) = match (holds(VERSIONED), holds(PLAIN)) {
            (true, _) => (VERSIONED, VERSIONED_USED),
            (_, true) => (PLAIN, PLAIN_USED),
            _ => return Err("what is no capsule of a tensor, or one that was used before".to_owned()),
        };
        // SAFETY: it is a capsule of this name.
        let pointer = unsafe { ffi::PyCapsule_GetPointer(object, name.as_ptr()) };
        let taken = if name == VERSIONED {
            let managed = NonNull::new(pointer.cast::<ManagedVersioned>()).ok_or("an empty capsule")?;
            // SAFETY: by DLPack, capsules of this name hold such a struct; every version starts like this.
            let version = unsafe { (*managed.as_ptr()).version };
            if version[0] != VERSION.0 {
                return Err(format!("a tensor of DLPack {}.{}", version[0], version[1]));
            }
            Self(Owned::Versioned(managed))
        } else {
            Self(Owned::Plain(NonNull::new(pointer.cast()).ok_or("an empty capsule")?))
        };
        // From here on the capsule's destructor leaves the tensor to us.
        // SAFETY: it is a capsule, and the name is static.
        if unsafe { ffi::PyCapsule_SetName(object, used.as_ptr()) } != 0 {
            std::mem::forget(taken);
            return Err("a capsule that cannot be marked as used".to_owned());
        }
        Ok(taken)
    }

    /// Where the elements lie.
    pub fn tensor(&self) -> &RawTensor {
        match self.0 {
            // SAFETY: by DLPack, it is valid until its deleter was called, which `drop` does.
            Owned::Plain(managed) => unsafe { &(*managed.as_ptr()).tensor },
            // SAFETY: as above.
            Owned::Versioned(managed) => unsafe { &(*managed.as_ptr()).tensor },
        }
    }

    /// Whether nobody may write the memory.
    pub fn is_read_only(&self) -> bool {
        match self.0 {
            Owned::Plain(_) => false,
            // SAFETY: as in `tensor`.
            Owned::Versioned(managed) => unsafe { (*managed.as_ptr()).flags & READ_ONLY != 0 },
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        match self.0 {
            Owned::Plain(managed) => {
                // SAFETY: it is valid, and nobody uses it any more.
                let deleter = unsafe { (*managed.as_ptr()).deleter };
                if let Some(deleter) = deleter {
                    // SAFETY: by DLPack, to be called once; it was taken out of its capsule.
                    unsafe { deleter(managed.as_ptr()) };
                }
            }
            Owned::Versioned(managed) => {
                // SAFETY: as above.
                let deleter = unsafe { (*managed.as_ptr()).deleter };
                if let Some(deleter) = deleter {
                    // SAFETY: as above.
                    unsafe { deleter(managed.as_ptr()) };
                }
            }
        }
    }
}

/// What a capsule of ours keeps alive: the object that owns the memory, the shape and the strides.
struct Offered {
    _owner: Py<PyAny>,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

/// A tensor in host memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostTensor<'a> {
    pub data: *mut c_void,
    pub dtype: DataType,
    pub layout: &'a Layout,
}

/// A capsule of a tensor in the memory of `owner`, which it keeps alive.
pub(crate) fn offer<'py>(
    owner: Bound<'py, PyAny>,
    tensor: HostTensor<'_>,
    versioned: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let py = owner.py();
    let shape = tensor.layout.shape().iter().map(|&size| size as i64).collect();
    let strides = tensor.layout.strides().iter().map(|&stride| stride as i64).collect();
    let mut offered = Box::new(Offered { _owner: owner.unbind(), shape, strides });
    let raw = RawTensor {
        data: tensor.data,
        device_type: device_type::CPU,
        device_id: 0,
        rank: offered.shape.len() as i32,
        dtype: tensor.dtype,
        shape: offered.shape.as_mut_ptr(),
        strides: offered.strides.as_mut_ptr(),
        byte_offset: 0,
    };
    let context = Box::into_raw(offered).cast();
    let (pointer, name, destructor): (*mut c_void, _, ffi::PyCapsule_Destructor) = if versioned {
        let version = [VERSION.0, VERSION.1];
        let managed = ManagedVersioned { version, context, deleter: Some(delete_versioned), flags: 0, tensor: raw };
        (Box::into_raw(Box::new(managed)).cast(), VERSIONED, drop_versioned)
    } else {
        let managed = Managed { tensor: raw, context, deleter: Some(delete_plain) };
        (Box::into_raw(Box::new(managed)).cast(), PLAIN, drop_plain)
    };
    // SAFETY: the pointer is not null, the name is static, and the destructor takes such a capsule.
    let capsule = unsafe { ffi::PyCapsule_New(pointer, name.as_ptr(), Some(destructor)) };
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, capsule) }
}

/// Drops the owner of the memory, from whatever thread.
fn release(context: *mut c_void) {
    let drop_it = move |_: Python<'_>| {
        // SAFETY: `offer` made it by `Box::into_raw`, and a deleter is called once.
        drop(unsafe { Box::from_raw(context.cast::<Offered>()) });
    };
    // Where the interpreter is gone, so is everything that it owned.
    let _ = Python::try_attach(drop_it);
}

unsafe extern "C" fn delete_plain(managed: *mut Managed) {
    // SAFETY: `offer` made it by `Box::into_raw`; by DLPack the deleter is called once.
    let managed = unsafe { Box::from_raw(managed) };
    release(managed.context);
}

unsafe extern "C" fn delete_versioned(managed: *mut ManagedVersioned) {
    // SAFETY: as above.
    let managed = unsafe { Box::from_raw(managed) };
    release(managed.context);
}

/// The pointer of a capsule that nobody took the tensor of; null if somebody did.
///
/// # Safety
/// A capsule, and the interpreter is attached.
unsafe fn not_taken(capsule: *mut ffi::PyObject, name: &CStr) -> *mut c_void {
    // SAFETY: by this function's contract.
    if unsafe { ffi::PyCapsule_IsValid(capsule, name.as_ptr()) } == 0 {
        return ptr::null_mut();
    }
    // SAFETY: it is a capsule of this name.
    unsafe { ffi::PyCapsule_GetPointer(capsule, name.as_ptr()) }
}

unsafe extern "C" fn drop_plain(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls it with a capsule that `offer` made.
    let pointer = unsafe { not_taken(capsule, PLAIN) };
    if !pointer.is_null() {
        // SAFETY: nobody took it, so nobody else calls the deleter.
        unsafe { delete_plain(pointer.cast()) };
    }
}

unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: as above.
    let pointer = unsafe { not_taken(capsule, VERSIONED) };
    if !pointer.is_null() {
        // SAFETY: as above.
        unsafe { delete_versioned(pointer.cast()) };
    }
}
