//! The compiled kernels. They are loaded once a context, however many devices there are over it; a function is looked up at its
//! first launch.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::fmt;
#[cfg(feature = "emulated-sm100")]
use std::sync::OnceLock;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::DriverError;
use cudarc::driver::result::{function, module};
use cudarc::driver::sys::{CUfunction, CUfunction_attribute, CUmodule, CUresult};

use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::Kernel;

use super::capture::Relaxed;
use super::context::Context;
use super::tiles::{FormSm80, ListTile, Tile};

/// The CUDA version whose compiler made the kernels, as the driver counts: 1000 · major + 10 · minor. Older drivers do not load
/// them.
pub(super) const KERNELS_CUDA: i32 = 13_000;

/// Bytes at a multiple of 16, as the driver reads the headers of a fatbin in place.
#[cfg_attr(feature = "emulated-sm100", derive(Clone))]
#[repr(C, align(16))]
pub(super) struct Aligned<Bytes: ?Sized>(Bytes);

static ATTENTION_SM80: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../kernels/prebuilt/attention_sm80.fatbin"));
static ATTENTION_SM90: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../kernels/prebuilt/attention_sm90.fatbin"));
static ATTENTION_SM100: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../kernels/prebuilt/attention_sm100.fatbin"));
static METADATA: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../kernels/prebuilt/metadata.fatbin"));
static PACK: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../kernels/prebuilt/pack.fatbin"));

/// The kernels of single architectures that a chip runs.
#[derive(Clone, Copy)]
pub(super) struct ListImages {
    sm90: Option<&'static Aligned<[u8]>>,
    sm100: Option<&'static Aligned<[u8]>>,
}

impl ListImages {
    /// For a compute capability.
    pub fn of(compute_capability: (i32, i32)) -> Self {
        let (sm90, sm100) = match compute_capability {
            (9, 0) => (Some(ATTENTION_SM90), emulated_sm100()),
            // Code for the family of 10.0, of which 10.3 is.
            (10, 0 | 3) => (None, Some(ATTENTION_SM100)),
            _ => (None, None),
        };
        Self { sm90, sm100 }
    }

    /// The kernels, the preferred one first.
    pub fn kernels(self) -> impl Iterator<Item = Kernel> {
        let sm100 = self.sm100.map(|_| Kernel::CudaSm100);
        sm100.into_iter().chain(self.sm90.map(|_| Kernel::CudaSm90))
    }
}

/// The sm100 kernel in its emulated form, which compute capability 9.0 runs.
#[cfg(feature = "emulated-sm100")]
fn emulated_sm100() -> Option<&'static Aligned<[u8]>> {
    EMULATED_SM100.get().copied()
}

#[cfg(not(feature = "emulated-sm100"))]
fn emulated_sm100() -> Option<&'static Aligned<[u8]>> {
    None
}

#[cfg(feature = "emulated-sm100")]
static EMULATED_SM100: OnceLock<&'static Aligned<[u8]>> = OnceLock::new();

/// Keeps a fatbin for devices that are opened from now on; false if there is one already.
#[cfg(feature = "emulated-sm100")]
pub(super) fn set_emulated_sm100(fatbin: &[u8]) -> bool {
    // At a multiple of 16 bytes, and there as long as the process.
    let words = fatbin.len().div_ceil(16).max(1);
    let blocks: &'static mut [Aligned<[u8; 16]>] = Box::leak(vec![Aligned([0; 16]); words].into_boxed_slice());
    for (block, bytes) in blocks.iter_mut().zip(fatbin.chunks(16)) {
        block.0[..bytes.len()].copy_from_slice(bytes);
    }
    let bytes = std::ptr::slice_from_raw_parts(blocks.as_ptr().cast::<u8>(), words * 16);
    #[expect(clippy::cast_ptr_alignment, reason = "the blocks are aligned like what they become")]
    // SAFETY: the blocks are 16 bytes each without padding, initialised and never freed; `Aligned<[u8]>` is laid out like its slice,
    // with the alignment that blocks have.
    let image = unsafe { &*(bytes as *const Aligned<[u8]>) };
    EMULATED_SM100.set(image).is_ok()
}

/// A kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Entry {
    Pack,
    Scatter,
    MetadataCount,
    MetadataScan,
    MetadataIndex,
    Attention {
        dtype: DType,
        tile: Tile,
        form: FormSm80,
    },
    /// sm90 and sm100.
    AttentionByLists {
        dtype: DType,
        tile: ListTile,
    },
}

/// A kernel that is ready to be launched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function {
    pub raw: CUfunction,
    /// Its dynamic shared memory.
    pub shared_bytes: u32,
}

/// The modules of one context.
pub(super) struct Modules {
    attention: CUmodule,
    /// Only where they run.
    attention_sm90: Option<CUmodule>,
    attention_sm100: Option<CUmodule>,
    metadata: CUmodule,
    pack: CUmodule,
    functions: Mutex<HashMap<Entry, Function>>,
}

// SAFETY: modules and functions may be used from any thread, and stay valid as long as their context: nothing unloads them.
unsafe impl Send for Modules {}
// SAFETY: as above; the map of functions is behind a lock.
unsafe impl Sync for Modules {}

impl fmt::Debug for Modules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { attention, metadata, pack, .. } = self;
        let mut modules = f.debug_struct("Modules");
        modules.field("attention", attention).field("metadata", metadata).field("pack", pack).finish_non_exhaustive()
    }
}

impl Modules {
    /// The kernels in a context, which is current; they are loaded if they are not there yet.
    ///
    /// They stay until the context is destroyed, and graphs that were captured may go on to run them when the device is dropped.
    pub fn of(context: &Context, images: ListImages) -> Result<Arc<Self>, DriverError> {
        // By the number of the context, which a later context at the same address does not have. What is kept of a context that
        // is destroyed is a few handles that nobody finds again; it does not keep the context.
        static LOADED: Mutex<BTreeMap<u64, Arc<Modules>>> = Mutex::new(BTreeMap::new());
        let number = context.number()?;
        // A panic while it is held leaves the map as it was: modules are only inserted whole.
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(modules) = loaded.get(&number) {
            return Ok(Arc::clone(modules));
        }
        let modules = Arc::new(Self::load(images)?);
        loaded.insert(number, Arc::clone(&modules));
        Ok(modules)
    }

    /// Loads the kernels into the current context.
    fn load(images: ListImages) -> Result<Self, DriverError> {
        // Another thread may be capturing a stream.
        let _relaxed = Relaxed::enter()?;
        let load = |image: &Aligned<[u8]>| {
            // SAFETY: the image is a whole, aligned fatbin, whose header says how long it is.
            unsafe { module::load_data(image.0.as_ptr().cast::<c_void>()) }
        };
        let (attention, metadata, pack) = (load(ATTENTION_SM80)?, load(METADATA)?, load(PACK)?);
        // Without them there are the others: calls fail, so that they are not trusted.
        let load_extra = |image: Option<&Aligned<[u8]>>, kernel: Kernel| {
            let loaded = image.map(load).transpose();
            loaded.inspect_err(|error| log::debug!("kernel {kernel} is not loaded: {error}")).ok().flatten()
        };
        let attention_sm90 = load_extra(images.sm90, Kernel::CudaSm90);
        let attention_sm100 = load_extra(images.sm100, Kernel::CudaSm100);
        Ok(Self { attention, attention_sm90, attention_sm100, metadata, pack, functions: Mutex::default() })
    }

    /// A kernel; the context that the modules were loaded into is current.
    pub fn function(&self, context: &Context, entry: Entry) -> Result<Function> {
        // A panic while it is held leaves the map as it was: functions are only inserted whole.
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&found) = functions.get(&entry) {
            return Ok(found);
        }
        let found = context.done(self.look_up(entry), "looking up a kernel")?;
        functions.insert(entry, found);
        Ok(found)
    }

    fn look_up(&self, entry: Entry) -> Result<Function, DriverError> {
        // The driver may load the kernel only now, and the stream may be captured.
        let _relaxed = Relaxed::enter()?;
        let (module, name, shared_bytes) = match entry {
            Entry::Pack => (self.pack, "pack_rows".to_owned(), 0),
            Entry::Scatter => (self.pack, "scatter_rows".to_owned(), 0),
            Entry::MetadataCount => (self.metadata, "metadata_count".to_owned(), 0),
            Entry::MetadataScan => (self.metadata, "metadata_scan".to_owned(), 0),
            Entry::MetadataIndex => (self.metadata, "metadata_index".to_owned(), 0),
            Entry::Attention { dtype, tile, form } => {
                (self.attention, attention_name(dtype, tile, form), tile.shared_bytes(form))
            }
            Entry::AttentionByLists { dtype, tile } => {
                let module = match tile {
                    ListTile::Sm90(_) => self.attention_sm90,
                    ListTile::Sm100(_) => self.attention_sm100,
                };
                // Planned only where it runs.
                let module = module.ok_or(DriverError(CUresult::CUDA_ERROR_NOT_FOUND))?;
                let (kernel, shape) = tile.names();
                (module, format!("attention_{kernel}_{dtype}_{shape}"), tile.shared_bytes())
            }
        };
        // No name holds a zero byte; one that did would not be found.
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the module is loaded as long as its context is there.
        let raw = unsafe { module::get_function(module, name) }?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // More than 48 KiB must be asked for; asking for less does no harm.
        // SAFETY: the function was just found.
        unsafe { function::set_function_attribute(raw, attribute, shared_bytes as i32) }?;
        Ok(Function { raw, shared_bytes })
    }
}

fn attention_name(dtype: DType, tile: Tile, form: FormSm80) -> String {
    format!("attention_sm80_{dtype}_d{}{}", tile.width, form.suffix())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(image: &[u8], name: &str) -> bool {
        image.windows(name.len()).any(|window| window == name.as_bytes())
    }

    #[test]
    fn images_are_fatbins_at_aligned_addresses() {
        for image in [ATTENTION_SM80, ATTENTION_SM90, ATTENTION_SM100, METADATA, PACK] {
            assert_eq!(image.0[..4], 0xba55_ed50_u32.to_le_bytes());
            assert!((image.0.as_ptr() as usize).is_multiple_of(16));
        }
    }

    #[test]
    fn the_images_are_of_the_compiler_that_the_driver_is_checked_for() {
        let manifest = include_str!("../../../kernels/prebuilt/manifest.json");
        let release = format!("release {}", super::super::probe::version(KERNELS_CUDA));
        assert!(manifest.contains(&release), "the manifest does not say {release}");
    }

    #[test]
    fn the_kernels_are_declared_under_the_names_that_are_looked_up() {
        let pack = include_bytes!("../../../kernels/pack.cu");
        assert!(contains(pack, "pack_rows(const __grid_constant__ PackParams"));
        assert!(contains(pack, "scatter_rows(const __grid_constant__ ScatterParams"));
        let metadata = include_bytes!("../../../kernels/metadata.cu");
        for name in ["metadata_count", "metadata_scan", "metadata_index"] {
            assert!(contains(metadata, &format!("{name}(const __grid_constant__ MetadataParams")), "{name}");
        }
        let attention = include_bytes!("../../../kernels/attention_sm80.cu");
        let sm90 = include_bytes!("../../../kernels/attention_sm90.cu");
        for name in ["attention_sm90_f16_d##D", "attention_sm90_bf16_d##D"] {
            assert!(contains(sm90, name), "{name}");
        }
        let sm100 = include_bytes!("../../../kernels/attention_sm100.cu");
        for name in ["attention_sm100_f16_d##D", "attention_sm100_bf16_d##D"] {
            assert!(contains(sm100, name), "{name}");
        }
        for form in [FormSm80::Plain, FormSm80::Masked, FormSm80::Fused] {
            for dtype in [DType::F16, DType::Bf16] {
                let suffix = form.suffix();
                let name = format!("attention_sm80_{dtype}_d##D{}{suffix},", if suffix.is_empty() { "" } else { "##" });
                assert!(contains(attention, &name), "{name}");
            }
        }
        let name = |form| Tile::of(72).map(|tile| attention_name(DType::Bf16, tile, form));
        assert_eq!(name(FormSm80::Masked).as_deref(), Some("attention_sm80_bf16_d96_masked"));
        assert_eq!(name(FormSm80::Fused).as_deref(), Some("attention_sm80_bf16_d96_fused"));
    }
}
