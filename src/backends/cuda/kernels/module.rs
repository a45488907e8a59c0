//! The compiled kernels. They are loaded once for each context, however many devices there are over
//! it; a function is looked up at its first launch.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_void};
use std::fmt;
#[cfg(feature = "emulated-sm100")]
use std::sync::OnceLock;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::DriverError;
use cudarc::driver::result::{function, module};
use cudarc::driver::sys::{CUfunction_attribute, CUmodule, CUresult};

use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::Kernel;

use crate::backends::cuda::driver::capture::RelaxedCapture;
use crate::backends::cuda::driver::context::Context;
use crate::backends::cuda::driver::launch::Function;

use super::tiles::{FormSm80, ListForm, ListTile, Tile};

/// The CUDA version whose compiler made the kernels, as the driver counts: 1000 · major + 10 ·
/// minor. Older drivers do not load them.
pub const KERNELS_CUDA: i32 = 13_000;

/// Bytes at a multiple of 16, as the driver reads the headers of a fatbin where they lie.
#[cfg_attr(feature = "emulated-sm100", derive(Clone))]
#[repr(C, align(16))]
struct Aligned<Bytes: ?Sized>(Bytes);

type Image = &'static Aligned<[u8]>;

static ATTENTION_SM80: Image = &Aligned(*varlen_fa_kernels_sm80::ATTENTION_SM80);
static ATTENTION_SM80_LATER: Image = &Aligned(*varlen_fa_kernels_sm80_later::ATTENTION_SM80_LATER);
static ATTENTION_SM90: Image = &Aligned(*varlen_fa_kernels::ATTENTION_SM90);
static ATTENTION_SM100: Image = &Aligned(*varlen_fa_kernels::ATTENTION_SM100);
static LSE: Image = &Aligned(*varlen_fa_kernels::LSE);
static METADATA: Image = &Aligned(*varlen_fa_kernels::METADATA);
static PREPARE_QK: Image = &Aligned(*varlen_fa_kernels::PREPARE_QK);
static PACK: Image = &Aligned(*varlen_fa_kernels::PACK);
static TILE_LISTS: Image = &Aligned(*varlen_fa_kernels::TILE_LISTS);

/// Where an attention kernel's code is, and what runs it.
struct AttentionImage {
    kernel: Kernel,
    image: Image,
    /// Compute capabilities; `None` for every one that the library supports.
    capabilities: Option<&'static [(i32, i32)]>,
}

/// A row for each image of an attention kernel, the preferred kernels first. Of a kernel's images the first one counts that a chip runs.
static ATTENTION: [AttentionImage; 4] = [
    // Code for the family of 10.0, of which 10.3 is.
    AttentionImage { kernel: Kernel::CudaSm100, image: ATTENTION_SM100, capabilities: Some(&[(10, 0), (10, 3)]) },
    AttentionImage { kernel: Kernel::CudaSm90, image: ATTENTION_SM90, capabilities: Some(&[(9, 0)]) },
    // Machine code of 8.0 serves 8.6 and 8.9 too, and that of 10.0 serves 10.3. No chip of an embedded module is among them: 8.7 does
    // not run the code of 8.0.
    AttentionImage {
        kernel: Kernel::CudaSm80,
        image: ATTENTION_SM80,
        capabilities: Some(&[(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)]),
    },
    // Machine code of 12.0, and PTX.
    AttentionImage { kernel: Kernel::CudaSm80, image: ATTENTION_SM80_LATER, capabilities: None },
];

/// The attention kernels that a chip runs, the preferred ones first.
#[derive(Clone)]
pub struct AttentionImages(Vec<(Kernel, Image)>);

impl AttentionImages {
    /// For a compute capability.
    pub fn of(compute_capability: (i32, i32)) -> Self {
        let runs = |row: &&AttentionImage| row.capabilities.is_none_or(|all| all.contains(&compute_capability));
        let emulated = (compute_capability == (9, 0)).then(emulated_sm100).flatten();
        let emulated = emulated.map(|image| (Kernel::CudaSm100, image));
        let compiled = ATTENTION.iter().filter(runs).map(|row| (row.kernel, row.image));
        let mut images: Vec<_> = emulated.into_iter().chain(compiled).collect();
        images.dedup_by_key(|&mut (kernel, _)| kernel);
        Self(images)
    }

    /// The kernels.
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> {
        self.0.iter().map(|&(kernel, _)| kernel)
    }
}

/// The sm100 kernel in its emulated form, which compute capability 9.0 runs.
#[cfg(feature = "emulated-sm100")]
fn emulated_sm100() -> Option<Image> {
    EMULATED_SM100.get().copied()
}

#[cfg(not(feature = "emulated-sm100"))]
fn emulated_sm100() -> Option<Image> {
    None
}

#[cfg(feature = "emulated-sm100")]
static EMULATED_SM100: OnceLock<Image> = OnceLock::new();

/// Keeps a fatbin for devices that are opened from now on; false if there is one already.
#[cfg(feature = "emulated-sm100")]
pub fn set_emulated_sm100(fatbin: &[u8]) -> bool {
    // At a multiple of 16 bytes, and there as long as the process.
    let words = fatbin.len().div_ceil(16).max(1);
    let blocks: &'static mut [Aligned<[u8; 16]>] = Box::leak(vec![Aligned([0; 16]); words].into_boxed_slice());
    for (block, bytes) in blocks.iter_mut().zip(fatbin.chunks(16)) {
        block.0[..bytes.len()].copy_from_slice(bytes);
    }
    let bytes = std::ptr::slice_from_raw_parts(blocks.as_ptr().cast::<u8>(), words * 16);
    #[expect(clippy::cast_ptr_alignment, reason = "the blocks are aligned like what they become")]
    // SAFETY: the blocks are 16 bytes each without padding, initialised and never freed;
    // `Aligned<[u8]>` is laid out like its slice, with the alignment that blocks have.
    let image = unsafe { &*(bytes as *const Aligned<[u8]>) };
    EMULATED_SM100.set(image).is_ok()
}

/// A kernel function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Entry {
    Pack,
    Scatter,
    ScatterLse,
    Merge {
        dtype: DType,
    },
    PrepareQk {
        dtype: DType,
        form: PrepareForm,
    },
    MetadataCount,
    MetadataScan,
    MetadataIndex,
    MetadataRanges,
    TileLists,
    RangeTiles,
    /// Of the sm80 kernel.
    Attention {
        dtype: DType,
        tile: Tile,
        form: FormSm80,
    },
    /// Of a kernel with tile lists.
    AttentionByLists {
        dtype: DType,
        tile: ListTile,
        form: ListForm,
    },
}

/// The forms of the kernel that normalises and rotates q and k.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PrepareForm {
    /// Heads of at most 256 elements, all or none of which rotate; tensors, weights and tables lie in
    /// 16-byte words, and pairs of halves in whole chunks.
    Words,
    /// Heads of at most 256 elements.
    Narrow,
    Wide,
}

impl PrepareForm {
    /// Every form.
    #[cfg(test)]
    pub const ALL: [Self; 3] = [Self::Words, Self::Narrow, Self::Wide];

    const fn name(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Narrow => "narrow",
            Self::Wide => "wide",
        }
    }
}

/// The module that a function is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Home {
    Pack,
    Lse,
    Metadata,
    PrepareQk,
    TileLists,
    Attention(Kernel),
}

impl Entry {
    fn home(self) -> Home {
        match self {
            Self::Pack | Self::Scatter => Home::Pack,
            Self::ScatterLse | Self::Merge { .. } => Home::Lse,
            Self::MetadataCount | Self::MetadataScan | Self::MetadataIndex | Self::MetadataRanges => Home::Metadata,
            Self::PrepareQk { .. } => Home::PrepareQk,
            Self::TileLists | Self::RangeTiles => Home::TileLists,
            Self::Attention { .. } => Home::Attention(Kernel::CudaSm80),
            Self::AttentionByLists { tile, .. } => Home::Attention(tile.kernel),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Pack => "pack_rows".to_owned(),
            Self::Scatter => "scatter_rows".to_owned(),
            Self::ScatterLse => "scatter_lse".to_owned(),
            Self::Merge { dtype } => format!("merge_{dtype}"),
            Self::PrepareQk { dtype, form } => format!("prepare_qk_{dtype}_{}", form.name()),
            Self::MetadataCount => "metadata_count".to_owned(),
            Self::MetadataScan => "metadata_scan".to_owned(),
            Self::MetadataIndex => "metadata_index".to_owned(),
            Self::MetadataRanges => "metadata_ranges".to_owned(),
            Self::TileLists => "tile_lists".to_owned(),
            Self::RangeTiles => "range_tiles".to_owned(),
            Self::Attention { dtype, tile, form } => {
                format!("attention_{}_{dtype}_{}", Kernel::CudaSm80, tile.name(form))
            }
            Self::AttentionByLists { dtype, tile, form } => {
                format!("attention_{}_{dtype}_{}", tile.kernel, tile.name(form))
            }
        }
    }

    /// Whether several of its blocks are to share a multiprocessor and its shared memory.
    fn shares_multiprocessors(self) -> bool {
        matches!(self, Self::AttentionByLists { tile, .. } if tile.blocks > 1)
    }

    /// Dynamic shared memory.
    fn shared_bytes(self) -> u32 {
        match self {
            Self::Attention { tile, form, .. } => tile.shared_bytes(form),
            Self::AttentionByLists { tile, .. } => tile.shared_bytes,
            _ => 0,
        }
    }
}

/// The modules of one context.
pub struct Modules {
    /// Those that run there.
    attention: Vec<(Kernel, CUmodule)>,
    lse: CUmodule,
    metadata: CUmodule,
    pack: CUmodule,
    prepare_qk: CUmodule,
    /// Where a kernel reads tile lists.
    tile_lists: Option<CUmodule>,
    functions: Mutex<HashMap<Entry, Function>>,
}

// SAFETY: modules and functions may be used from any thread, and stay valid as long as their
// context: nothing unloads them.
unsafe impl Send for Modules {}
// SAFETY: as above; the map of functions is behind a lock.
unsafe impl Sync for Modules {}

impl fmt::Debug for Modules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { attention, lse, metadata, pack, prepare_qk, tile_lists, .. } = self;
        let mut modules = f.debug_struct("Modules");
        modules.field("attention", attention).field("lse", lse).field("metadata", metadata).field("pack", pack);
        modules.field("prepare_qk", prepare_qk).field("tile_lists", tile_lists).finish_non_exhaustive()
    }
}

impl Modules {
    /// The kernels in a context, which is current; they are loaded if they are not there yet.
    ///
    /// They stay until the context is destroyed, and graphs that were captured may go on to run
    /// them when the device is dropped.
    pub fn of(context: &Context, images: &AttentionImages) -> Result<Arc<Self>, DriverError> {
        // By the number of the context, which a later context at the same address does not have.
        // What is kept of a context that is destroyed is a few handles that nobody finds again; it
        // does not keep the context.
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
    fn load(images: &AttentionImages) -> Result<Self, DriverError> {
        // Another thread may be capturing a stream.
        let _relaxed = RelaxedCapture::enter()?;
        let load = |image: Image| {
            // SAFETY: the image is a whole, aligned fatbin, whose header says how long it is.
            unsafe { module::load_data(image.0.as_ptr().cast::<c_void>()) }
        };
        let (lse, metadata, pack) = (load(LSE)?, load(METADATA)?, load(PACK)?);
        let prepare_qk = load(PREPARE_QK)?;
        let reads_lists = images.kernels().any(Kernel::works_by_tile_lists);
        let tile_lists = reads_lists.then(|| load(TILE_LISTS)).transpose()?;
        let mut attention = vec![];
        for &(kernel, image) in &images.0 {
            match load(image) {
                Ok(module) => attention.push((kernel, module)),
                // Every call falls back to it.
                Err(error) if kernel == Kernel::CudaSm80 => return Err(error),
                // Without the kernel there are the others: its self-check fails, and so it is not
                // trusted.
                Err(error) => log::debug!("kernel {kernel} is not loaded: {error}"),
            }
        }
        Ok(Self { attention, lse, metadata, pack, prepare_qk, tile_lists, functions: Mutex::default() })
    }

    /// A function; the context that the modules were loaded into is current.
    pub fn function(&self, context: &Context, entry: Entry) -> Result<Function> {
        // A panic while it is held leaves the map as it was: functions are only inserted whole.
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&found) = functions.get(&entry) {
            return Ok(found);
        }
        let found = context.check(self.look_up(entry), "looking up a kernel")?;
        functions.insert(entry, found);
        Ok(found)
    }

    fn look_up(&self, entry: Entry) -> Result<Function, DriverError> {
        // The driver may load the kernel only now, and the stream may be captured.
        let _relaxed = RelaxedCapture::enter()?;
        let (name, shared_bytes) = (entry.name(), entry.shared_bytes());
        let module = match entry.home() {
            Home::Pack => Some(self.pack),
            Home::Lse => Some(self.lse),
            Home::Metadata => Some(self.metadata),
            Home::PrepareQk => Some(self.prepare_qk),
            // Planned only where they are loaded.
            Home::TileLists => self.tile_lists,
            Home::Attention(kernel) => {
                self.attention.iter().find_map(|&(loaded, module)| (loaded == kernel).then_some(module))
            }
        };
        let module = module.ok_or(DriverError(CUresult::CUDA_ERROR_NOT_FOUND))?;
        // No name holds a zero byte; one that did would not be found.
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the module is loaded as long as its context is there.
        let raw = unsafe { module::get_function(module, name) }?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // More than 48 KiB must be asked for; asking for less does no harm.
        // SAFETY: the function was just found.
        unsafe { function::set_function_attribute(raw, attribute, shared_bytes as i32) }?;
        if entry.shares_multiprocessors() {
            let share = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            // In percent. The driver alone may leave room for one block.
            // SAFETY: as above.
            unsafe { function::set_function_attribute(raw, share, 100) }?;
        }
        Ok(Function { raw, shared_bytes })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// kernels/prebuilt/manifest.json, as far as it matters here.
    #[derive(serde::Deserialize)]
    struct Manifest {
        compiler: String,
        fatbins: BTreeMap<String, Fatbin>,
    }

    #[derive(serde::Deserialize)]
    struct Fatbin {
        kernels: BTreeSet<String>,
    }

    fn manifest() -> Manifest {
        serde_json::from_str(include_str!("../../../../kernels/prebuilt/manifest.json")).unwrap()
    }

    #[test]
    fn images_are_fatbins_at_aligned_addresses() {
        let rows = [LSE, METADATA, PACK, PREPARE_QK, TILE_LISTS];
        for image in ATTENTION.iter().map(|row| row.image).chain(rows) {
            assert_eq!(image.0[..4], 0xba55_ed50_u32.to_le_bytes());
            assert!((image.0.as_ptr() as usize).is_multiple_of(16));
        }
    }

    #[test]
    fn the_images_are_of_the_compiler_that_the_driver_is_checked_for() {
        let compiler = manifest().compiler;
        let release = format!("release {},", crate::backends::cuda::driver::probe::version(KERNELS_CUDA));
        assert!(compiler.contains(&release), "{compiler} is not {release}");
    }

    #[test]
    fn chips_prefer_the_kernel_that_is_made_for_them() {
        let kernels = |capability| AttentionImages::of(capability).kernels().collect::<Vec<_>>();
        for capability in [(8, 0), (8, 9), (12, 0), (13, 0)] {
            assert_eq!(kernels(capability), [Kernel::CudaSm80], "{capability:?}");
        }
        assert_eq!(kernels((9, 0)), [Kernel::CudaSm90, Kernel::CudaSm80]);
        for capability in [(10, 0), (10, 3)] {
            assert_eq!(kernels(capability), [Kernel::CudaSm100, Kernel::CudaSm80], "{capability:?}");
        }
    }

    /// Entries of a fatbin: whether it is PTX, and the architecture that it is for.
    fn contents(image: Image) -> BTreeSet<(bool, u16)> {
        let word = |at: usize| u16::from_le_bytes([image.0[at], image.0[at + 1]]);
        let long = |at: usize| usize::from(word(at)) | usize::from(word(at + 2)) << 16;
        // A header of 16 bytes; then each entry has its kind at 0, the size of its own header at 4 and that of what follows at 8, and
        // its architecture at 28.
        let mut found = BTreeSet::new();
        let mut at = 16;
        while at < image.0.len() {
            found.insert((word(at) == 1, word(at + 28)));
            at += long(at + 4) + long(at + 8);
        }
        assert_eq!(at, image.0.len());
        found
    }

    #[test]
    fn every_chip_has_an_image_of_the_oldest_kernel_that_it_runs() {
        let chips = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)];
        for (major, minor) in chips {
            let images = AttentionImages::of((major, minor)).0;
            let found: Vec<_> = images.iter().filter(|(kernel, _)| *kernel == Kernel::CudaSm80).collect();
            let [(_, image)] = found[..] else { panic!("{} images for {major}.{minor}", found.len()) };
            let contents = contents(image);
            // What serves a minor version serves later ones, but for 8.7, which runs code of its own or PTX.
            let machine_code = contents.contains(&(false, 10 * major as u16)) && (major, minor) != (8, 7);
            assert!(machine_code || contents.contains(&(true, 80)), "{major}.{minor}: {contents:?}");
            // The driver compiles PTX each time that it is new to it: not for chips that have machine code.
            assert_eq!(machine_code, matches!(major, 8..=10 | 12) && (major, minor) != (8, 7), "{major}.{minor}");
        }
    }

    #[test]
    fn every_chip_whose_kernel_reads_tile_lists_has_an_image_that_makes_them() {
        let found = contents(TILE_LISTS);
        let mut chips = 0;
        for row in ATTENTION.iter().filter(|row| row.kernel.works_by_tile_lists()) {
            for &(major, _) in row.capabilities.unwrap_or_default() {
                assert!(found.contains(&(false, 10 * major as u16)), "{}: {found:?}", row.kernel);
                chips += 1;
            }
        }
        assert_eq!(chips, 3);
    }

    /// Every function that can be asked for.
    fn entries() -> impl Iterator<Item = Entry> {
        let attention = [DType::F16, DType::Bf16].into_iter().flat_map(|dtype| {
            (8..=512).step_by(8).flat_map(move |head_dim| {
                let rows = FormSm80::ALL.into_iter().filter_map(move |form| {
                    Tile::of(head_dim).map(|tile| Entry::Attention { dtype, tile, form: tile.compiled_form(form) })
                });
                let lists = ATTENTION.iter().flat_map(move |row| {
                    let forms = ListForm::ALL.into_iter().filter(move |form| form.is_of(row.kernel));
                    forms.flat_map(move |form| {
                        let tile = ListTile::of(row.kernel, head_dim);
                        let of_plain = tile.filter(|_| form == ListForm::PLAIN);
                        let plain: Vec<_> = of_plain.into_iter().flat_map(ListTile::short).collect();
                        let of_ranges = |tile: Option<ListTile>| tile.filter(|_| form.has_ranges && !form.has_segments);
                        let short = of_ranges(tile.and_then(ListTile::short_ranged));
                        let narrow = of_ranges(tile.and_then(|tile| tile.narrow(head_dim)));
                        let small = of_plain.and_then(|tile| tile.small(head_dim));
                        let pairs = of_plain.into_iter().chain(plain.clone()).filter_map(ListTile::paired);
                        let entry = move |tile| Entry::AttentionByLists { dtype, tile, form };
                        tile.into_iter().chain(plain).chain(short).chain(narrow).chain(small).chain(pairs).map(entry)
                    })
                });
                rows.chain(lists)
            })
        });
        let metadata = [Entry::MetadataCount, Entry::MetadataScan, Entry::MetadataIndex, Entry::MetadataRanges];
        let others = [Entry::Pack, Entry::Scatter, Entry::TileLists, Entry::RangeTiles].into_iter().chain(metadata);
        let lse = [DType::F32, DType::F16, DType::Bf16].map(|dtype| Entry::Merge { dtype });
        let prepare_qk = [DType::F32, DType::F16, DType::Bf16]
            .into_iter()
            .flat_map(|dtype| PrepareForm::ALL.map(|form| Entry::PrepareQk { dtype, form }));
        others.chain(lse).chain([Entry::ScatterLse]).chain(prepare_qk).chain(attention)
    }

    #[test]
    fn the_fatbins_hold_the_functions_that_are_looked_up_and_no_others() {
        let mut looked_up = BTreeMap::<String, BTreeSet<String>>::new();
        for entry in entries() {
            let fatbin = match entry.home() {
                Home::Pack => "pack".to_owned(),
                Home::Lse => "lse".to_owned(),
                Home::Metadata => "metadata".to_owned(),
                Home::PrepareQk => "prepare_qk".to_owned(),
                Home::TileLists => "tile_lists".to_owned(),
                Home::Attention(kernel) => format!("attention_{kernel}"),
            };
            looked_up.entry(fatbin).or_default().insert(entry.name());
        }
        // Both are made from one source.
        let of_later_chips = looked_up["attention_sm80"].clone();
        looked_up.insert("attention_sm80_later".to_owned(), of_later_chips);
        let compiled: BTreeMap<_, _> =
            manifest().fatbins.into_iter().map(|(name, fatbin)| (name, fatbin.kernels)).collect();
        assert_eq!(looked_up, compiled);
    }
}
