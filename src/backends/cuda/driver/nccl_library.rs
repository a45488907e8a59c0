//! NCCL, loaded when it is first asked for. Its functions are called through this table alone.
//!
//! cudarc's binding is not used: it looks for files without a version in their names, which only packages for developers
//! install; it panics where there is none; and its enum of results has no place for those of newer libraries.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use libloading::Library;

/// `ncclComm_t`.
pub type RawComm = *mut c_void;

/// `ncclUniqueId`: what rank 0 makes, and the application carries to the others.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` of NCCL 2.18, which newer ones read too, by its version.
#[derive(Debug)]
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

/// The version whose form [`Config`] has, as NCCL counts.
const CONFIG_VERSION: c_uint = 21_800;
/// `NCCL_API_MAGIC`.
const MAGIC: c_uint = 0xcafe_beef;
/// `NCCL_CONFIG_UNDEF_INT`: what NCCL is to choose.
const UNDEFINED: c_int = c_int::MIN;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTES: c_int = 1;

/// Names of the library, the first of which is what a package for users installs.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// What a call came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Done,
    /// The communicator does not wait: [`Nccl::progress`] says when it is done.
    Going,
}

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The library's functions that are used.
        #[derive(Debug)]
        pub struct Nccl {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// Never unloaded: communicators have threads of their own.
            _library: Library,
        }

        impl Nccl {
            /// # Safety
            /// The library is NCCL.
            unsafe fn of(library: Library) -> Result<Self, libloading::Error> {
                $(
                    // SAFETY: NCCL's functions have had these signatures since 2.14.
                    let $field = *unsafe { library.get($name) }?;
                )*
                Ok(Self { $($field,)* _library: library })
            }
        }
    };
}

functions! {
    get_version = b"ncclGetVersion\0": fn(*mut c_int) -> c_int;
    get_unique_id = b"ncclGetUniqueId\0": fn(*mut UniqueId) -> c_int;
    comm_init_rank_config = b"ncclCommInitRankConfig\0": fn(*mut RawComm, c_int, UniqueId, c_int, *mut Config) -> c_int;
    comm_get_async_error = b"ncclCommGetAsyncError\0": fn(RawComm, *mut c_int) -> c_int;
    comm_finalize = b"ncclCommFinalize\0": fn(RawComm) -> c_int;
    comm_destroy = b"ncclCommDestroy\0": fn(RawComm) -> c_int;
    comm_abort = b"ncclCommAbort\0": fn(RawComm) -> c_int;
    comm_count = b"ncclCommCount\0": fn(RawComm, *mut c_int) -> c_int;
    comm_user_rank = b"ncclCommUserRank\0": fn(RawComm, *mut c_int) -> c_int;
    comm_cu_device = b"ncclCommCuDevice\0": fn(RawComm, *mut c_int) -> c_int;
    send = b"ncclSend\0": fn(*const c_void, usize, c_int, c_int, RawComm, CUstream) -> c_int;
    recv = b"ncclRecv\0": fn(*mut c_void, usize, c_int, c_int, RawComm, CUstream) -> c_int;
    group_start = b"ncclGroupStart\0": fn() -> c_int;
    group_end = b"ncclGroupEnd\0": fn() -> c_int;
    get_error_string = b"ncclGetErrorString\0": fn(c_int) -> *const c_char;
}

impl Nccl {
    /// The library, or why there is none and what to install.
    pub fn get() -> Result<&'static Self, String> {
        static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
    }

    fn check(&self, code: c_int) -> Result<Progress, String> {
        match code {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::Going),
            _ => {
                // SAFETY: any code is allowed.
                let words = unsafe { (self.get_error_string)(code) };
                if words.is_null() {
                    return Err(format!("NCCL's error {code}"));
                }
                // SAFETY: NCCL gives a text that is never freed.
                let words = unsafe { CStr::from_ptr(words) };
                Err(format!("NCCL: {} (error {code})", words.to_string_lossy()))
            }
        }
    }

    /// As `2.27.3`.
    pub fn version(&self) -> Result<String, String> {
        let mut version = 0;
        // SAFETY: the pointer is to an integer.
        self.check(unsafe { (self.get_version)(&mut version) })?;
        Ok(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
    }

    pub fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the pointer is to an id.
        self.check(unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// Starts to make a communicator that never waits, in the context that is current. [`progress`](Self::progress) says when it is
    /// made.
    pub fn init(&self, id: UniqueId, rank: c_int, world: c_int) -> Result<RawComm, String> {
        let mut config = Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: ptr::null(),
            split_share: UNDEFINED,
        };
        let mut comm = ptr::null_mut();
        // SAFETY: both pointers are live, and the configuration says its size and version.
        self.check(unsafe { (self.comm_init_rank_config)(&mut comm, world, id, rank, &mut config) })?;
        Ok(comm)
    }

    /// How far what was asked of a communicator has come, or what failed, here or elsewhere.
    ///
    /// # Safety
    /// The communicator is live; as below.
    pub unsafe fn progress(&self, comm: RawComm) -> Result<Progress, String> {
        let mut state = SUCCESS;
        // SAFETY: by the caller's promise, and the pointer is to a code.
        self.check(unsafe { (self.comm_get_async_error)(comm, &mut state) })?;
        self.check(state)
    }

    /// Rank, number of ranks, and the index of the GPU.
    ///
    /// # Safety
    /// The communicator is live.
    pub unsafe fn describe(&self, comm: RawComm) -> Result<[c_int; 3], String> {
        let mut found = [0; 3];
        let [rank, count, device] = &mut found;
        // SAFETY: by the caller's promise; as below.
        self.check(unsafe { (self.comm_user_rank)(comm, rank) })?;
        // SAFETY: as above.
        self.check(unsafe { (self.comm_count)(comm, count) })?;
        // SAFETY: as above.
        self.check(unsafe { (self.comm_cu_device)(comm, device) })?;
        Ok(found)
    }

    /// # Safety
    /// The communicator is live, and the memory until the stream has come past this.
    pub unsafe fn send(&self, from: u64, bytes: u64, to: c_int, comm: RawComm, on: CUstream) -> Result<(), String> {
        // SAFETY: by the caller's promise.
        self.check(unsafe { (self.send)(from as *const c_void, bytes as usize, BYTES, to, comm, on) }).map(drop)
    }

    /// # Safety
    /// As for [`send`](Self::send).
    pub unsafe fn receive(&self, to: u64, bytes: u64, from: c_int, comm: RawComm, on: CUstream) -> Result<(), String> {
        // SAFETY: by the caller's promise.
        self.check(unsafe { (self.recv)(to as *mut c_void, bytes as usize, BYTES, from, comm, on) }).map(drop)
    }

    pub fn start_group(&self) -> Result<(), String> {
        // SAFETY: it has no argument.
        self.check(unsafe { (self.group_start)() }).map(drop)
    }

    pub fn end_group(&self) -> Result<Progress, String> {
        // SAFETY: it has no argument.
        self.check(unsafe { (self.group_end)() })
    }

    /// Begins to end a communicator in an orderly way.
    ///
    /// # Safety
    /// The communicator is live, and nothing is asked of it afterwards but progress and to be destroyed or aborted.
    pub unsafe fn finalize(&self, comm: RawComm) -> Result<Progress, String> {
        // SAFETY: by the caller's promise.
        self.check(unsafe { (self.comm_finalize)(comm) })
    }

    /// Frees a communicator that is finalized.
    ///
    /// # Safety
    /// This is the last call with it.
    pub unsafe fn destroy(&self, comm: RawComm) -> Result<(), String> {
        // SAFETY: by the caller's promise.
        self.check(unsafe { (self.comm_destroy)(comm) }).map(drop)
    }

    /// Ends what the communicator does, on the device too, and frees it.
    ///
    /// # Safety
    /// This is the last call with it.
    pub unsafe fn abort(&self, comm: RawComm) -> Result<(), String> {
        // SAFETY: by the caller's promise.
        self.check(unsafe { (self.comm_abort)(comm) }).map(drop)
    }
}

fn load() -> Result<Nccl, String> {
    let mut why = String::new();
    for name in NAMES {
        // SAFETY: the library with NCCL's name is NCCL, whose initialisers do nothing that anybody notices.
        match unsafe { Library::new(name) } {
            // SAFETY: as above.
            Ok(library) => match unsafe { Nccl::of(library) } {
                Ok(nccl) => return Ok(nccl),
                Err(error) => why = format!("it is older than 2.14: {error}"),
            },
            Err(error) if why.is_empty() => why = error.to_string(),
            Err(_) => {}
        }
    }
    Err(format!(
        "NCCL cannot be loaded: {why}; install it (the package libnccl2 or nvidia-nccl) and name its folder in \
         LD_LIBRARY_PATH"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there is no NCCL the error says what to install; where there is one, it says its version.
    #[test]
    fn an_absent_library_is_an_error_that_says_what_to_install() {
        match Nccl::get() {
            Err(why) => assert!(why.contains("libnccl2") && why.contains("LD_LIBRARY_PATH"), "{why}"),
            Ok(nccl) => assert!(nccl.version().is_ok_and(|version| version.starts_with("2."))),
        }
    }

    #[test]
    fn the_configuration_is_that_of_2_18() {
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(size_of::<UniqueId>(), 128);
    }
}
