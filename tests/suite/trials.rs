//! From tests to trials: a test is a function, run once for each kernel, path and element type that it depends on.

use std::sync::{PoisonError, RwLock};

use anyhow::{Context, Result};
use libtest_mimic::{Completion, Failed, Trial};
use varlen_fa::{BackendKind, DType, Device, Kernel, MaskedAttention, Path};

/// Trials that fill the device's memory run alone; every other one holds this for reading.
static MEMORY: RwLock<()> = RwLock::new(());

/// The variable that has an emulated GPU run all trials, in every element type: `whole`.
const WHOLE: &str = "VARLEN_FA_TEST_EMULATED";

/// What an emulated GPU leaves out otherwise, by words of the names.
const LEFT_OUT: &[&str] = &[
    // Sizes of real models, and grids past 65,535 workgroups.
    "prod_c2",
    "c8_prod",
    "all_valid_b4",
    "workgroups",
    "many_sequences",
    "more_heads_than_a_grid",
    "more_words_than_one_scan",
    // A kernel for each of many head dimensions.
    "every_fourth_head_dim",
    "lse/head_dims",
];

/// What a trial runs: one kernel of a device, forced, on one path, with one element type.
#[derive(Debug, Clone)]
pub struct Variant {
    /// The device.
    pub device: Device,
    /// The kernel to force.
    pub kernel: Kernel,
    /// The path to force; none where the mask leaves no choice.
    pub path: Option<Path>,
    /// Element type of q, k, v and the output.
    pub dtype: DType,
    /// Keys of the kernel's tiles, to force one length of several.
    pub tile_keys: Option<usize>,
}

/// Paths that a call with metadata can take.
const PATHS_OF_METADATA: [Path; 3] = [Path::Dense, Path::Fused, Path::Packed];

impl Variant {
    /// The device's first kernel, and the first element type that it computes with.
    pub fn first(device: &Device, path: Option<Path>) -> Self {
        let kernel = device.capabilities().kernels[0];
        Self { device: device.clone(), kernel, path, dtype: kernel.dtypes()[0], tile_keys: None }
    }

    /// The device's first kernel that computes with an element type: tensors of it exist on the device.
    pub fn of_dtype(device: &Device, dtype: DType, path: Option<Path>) -> Result<Self> {
        let kernels = &device.capabilities().kernels;
        let kernel = kernels.iter().find(|kernel| kernel.dtypes().contains(&dtype));
        let kernel = kernel.copied().with_context(|| format!("no kernel here computes with {dtype}"))?;
        Ok(Self { device: device.clone(), kernel, path, dtype, tile_keys: None })
    }

    /// Keys of no kernel's tiles: the longest are taken.
    pub const LONGEST_TILES: usize = usize::MAX;

    /// With the longest of the kernel's key tiles, which calls take on segments and under metadata of the device.
    pub fn with_longest_tiles(&self) -> Self {
        Self { tile_keys: Some(Self::LONGEST_TILES), ..self.clone() }
    }

    /// The layer with everything forced. Of tiles of several lengths f16 takes the longest, and other element types what the plan
    /// chooses: kernels have the same instructions for both.
    pub fn layer(&self) -> MaskedAttention {
        let layer = MaskedAttention::new(&self.device).with_kernel(self.kernel);
        let longest = (self.dtype == DType::F16).then_some(Self::LONGEST_TILES);
        let layer = self.tile_keys.or(longest).into_iter().fold(layer, MaskedAttention::with_tile_keys);
        match self.path {
            Some(path) => layer.with_path(path),
            None => layer,
        }
    }
}

/// Adds the trials of one file.
pub type Register = fn(&mut Trials);

/// What a test returns: nothing, or that it could not run here and why.
pub trait Outcome: 'static {
    /// The harness's word for it.
    fn completion(self) -> Completion;
}

impl Outcome for () {
    fn completion(self) -> Completion {
        Completion::Completed
    }
}

impl Outcome for Completion {
    fn completion(self) -> Completion {
        self
    }
}

/// The list being built for one device.
#[derive(Debug)]
pub struct Trials {
    device: Device,
    /// Another one of the same GPU, for every second variant. An emulated GPU compiles each shader in the one thread of a device's
    /// queue, which is most of what its trials do: with two devices, two processors do it.
    second: Option<Device>,
    /// What tells the device from others of its kind.
    label: Option<&'static str>,
    /// Whether some trials are left to a GPU, and others to one element type: on an emulated GPU, unless all is asked for.
    is_short: bool,
    /// Whether the trials being added are about element types, and so run in each of them.
    in_every_dtype: bool,
    list: Vec<Trial>,
}

impl Trials {
    /// An empty list. A second device of the same GPU, if any, gets every other variant.
    pub fn new(device: Device, second: Option<Device>) -> Self {
        let is_short = is_emulated_gpu(&device) && std::env::var(WHOLE).as_deref() != Ok("whole");
        if is_short {
            eprintln!("{}: emulated, so most trials are in one element type; {WHOLE}=whole runs all", device.name());
        }
        Self { device, second, label: None, is_short, in_every_dtype: false, list: Vec::new() }
    }

    /// Adds trials on another device of the same kind, with a label that follows the kind in their names.
    pub fn add_on(&mut self, label: &'static str, device: Device, registers: &[Register]) {
        let mut others = Self::new(device, None);
        others.label = Some(label);
        registers.iter().for_each(|register| register(&mut others));
        self.list.append(&mut others.list);
    }

    /// The finished list.
    pub fn into_list(self) -> Vec<Trial> {
        self.list
    }

    /// The device under test.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Adds trials of what depends on the element type: loads and stores, rounding, places at odd addresses. Of others, an emulated
    /// GPU, which compiles each kernel for about a second, gets one type.
    pub fn in_every_dtype(&mut self, register: impl FnOnce(&mut Self)) {
        let before = std::mem::replace(&mut self.in_every_dtype, true);
        register(self);
        self.in_every_dtype = before;
    }

    /// One trial.
    pub fn once<R: Outcome>(&mut self, test: &str, run: fn(&Device) -> Result<R>) {
        self.once_with(test, run);
    }

    /// One trial of a closure.
    pub fn once_with<R: Outcome>(&mut self, test: &str, run: impl FnOnce(&Device) -> Result<R> + Send + 'static) {
        let device = self.device.clone();
        self.push(&[], test, None, move || run(&device));
    }

    /// One trial that no other runs beside.
    pub fn alone<R: Outcome>(&mut self, test: &str, run: fn(&Device) -> Result<R>) {
        let (name, device) = (self.name(&[], test, None), self.device.clone());
        self.list.push(Trial::ignorable_test(name, move || {
            let _alone = MEMORY.write().unwrap_or_else(PoisonError::into_inner);
            completion(run(&device))
        }));
    }

    /// One trial for each element type.
    pub fn each_dtype<R: Outcome>(&mut self, test: &str, run: fn(&Device, DType) -> Result<R>) {
        for &dtype in self.device.capabilities().dtypes {
            let device = self.device.clone();
            self.push(&[], test, Some(dtype), move || run(&device, dtype));
        }
    }

    /// One trial for each kernel and element type.
    pub fn each_kernel<R: Outcome>(&mut self, test: &str, run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static) {
        self.each_kernel_of(self.device.capabilities().dtypes, test, run);
    }

    /// The same for some element types.
    pub fn each_kernel_of<R: Outcome>(
        &mut self,
        dtypes: &[DType],
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        for kernel in self.device.capabilities().kernels.clone() {
            self.variants(dtypes, test, kernel, None, run);
        }
    }

    /// The same for kernels that add a bias.
    pub fn each_kernel_with_bias<R: Outcome>(
        &mut self,
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        for kernel in self.device.capabilities().kernels.clone().into_iter().filter(|kernel| kernel.has_bias()) {
            self.variants(self.device.capabilities().dtypes, test, kernel, None, run);
        }
    }

    /// The same for kernels that take key ranges.
    pub fn each_kernel_with_ranges<R: Outcome>(
        &mut self,
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        for kernel in self.device.capabilities().kernels.clone().into_iter().filter(|kernel| kernel.has_ranges()) {
            self.variants(self.device.capabilities().dtypes, test, kernel, None, run);
        }
    }

    /// One trial for each kernel that takes key ranges, each path that metadata can take, and each element type.
    pub fn each_path_with_ranges<R: Outcome>(
        &mut self,
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        for kernel in self.device.capabilities().kernels.clone().into_iter().filter(|kernel| kernel.has_ranges()) {
            for path in PATHS_OF_METADATA {
                self.variants(self.device.capabilities().dtypes, test, kernel, Some(path), run);
            }
        }
    }

    /// One trial for each kernel that has every score modifier, and each element type.
    pub fn each_kernel_with_modifiers<R: Outcome>(
        &mut self,
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        for kernel in self.device.capabilities().kernels.clone().into_iter().filter(has_modifiers) {
            self.variants(self.device.capabilities().dtypes, test, kernel, None, run);
        }
    }

    /// The same for each path that metadata can take.
    pub fn each_path_with_modifiers<R: Outcome>(
        &mut self,
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        for kernel in self.device.capabilities().kernels.clone().into_iter().filter(has_modifiers) {
            for path in PATHS_OF_METADATA {
                self.variants(self.device.capabilities().dtypes, test, kernel, Some(path), run);
            }
        }
    }

    /// One trial for each kernel, each path that metadata can take, and each element type.
    pub fn each_path<R: Outcome>(&mut self, test: &str, run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static) {
        self.each_path_of(self.device.capabilities().dtypes, test, run);
    }

    /// The same for paths that metadata built on the device can take.
    pub fn each_path_of_device_meta<R: Outcome>(
        &mut self,
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        self.each_path_of_device_meta_in(self.device.capabilities().dtypes, test, run);
    }

    /// The same for some element types.
    pub fn each_path_of_device_meta_in<R: Outcome>(
        &mut self,
        dtypes: &[DType],
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        for kernel in self.device.capabilities().kernels.clone() {
            for &path in paths_of_device_meta(kernel) {
                self.variants(dtypes, test, kernel, Some(path), run);
            }
        }
    }

    /// The same for some element types.
    pub fn each_path_of<R: Outcome>(
        &mut self,
        dtypes: &[DType],
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        for kernel in self.device.capabilities().kernels.clone() {
            for path in PATHS_OF_METADATA {
                self.variants(dtypes, test, kernel, Some(path), run);
            }
        }
    }

    /// The same for kernels that take more beside such metadata: what `takes` says.
    pub fn each_path_of_more_with_device_meta<R: Outcome>(
        &mut self,
        takes: impl Fn(Kernel) -> bool,
        test: &str,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        let kernels = self.device.capabilities().kernels.clone();
        for kernel in kernels.into_iter().filter(|&kernel| kernel.takes_all_with_device_meta() && takes(kernel)) {
            for &path in paths_of_device_meta(kernel) {
                self.variants(self.device.capabilities().dtypes, test, kernel, Some(path), run);
            }
        }
    }

    fn variants<R: Outcome>(
        &mut self,
        dtypes: &[DType],
        test: &str,
        kernel: Kernel,
        path: Option<Path>,
        run: impl Fn(&Variant) -> Result<R> + Copy + Send + 'static,
    ) {
        let parts: Vec<_> = [Some(kernel.name()), path.map(Path::name)].into_iter().flatten().collect();
        let most = if self.is_short && !self.in_every_dtype { 1 } else { usize::MAX };
        for &dtype in dtypes.iter().filter(|dtype| kernel.dtypes().contains(dtype)).take(most) {
            let device = self.second.as_ref().filter(|_| self.list.len() % 2 == 1).unwrap_or(&self.device);
            let variant = Variant { device: device.clone(), kernel, path, dtype, tile_keys: None };
            self.push(&parts, test, Some(dtype), move || run(&variant));
        }
    }

    fn push<R: Outcome>(
        &mut self,
        parts: &[&str],
        test: &str,
        dtype: Option<DType>,
        run: impl FnOnce() -> Result<R> + Send + 'static,
    ) {
        let name = self.name(parts, test, dtype);
        if self.is_short && LEFT_OUT.iter().any(|word| name.contains(word)) {
            let why = || Ok(Completion::ignored_with(format!("an emulated GPU runs it where {WHOLE}=whole")));
            self.list.push(Trial::ignorable_test(name, why));
            return;
        }
        self.list.push(Trial::ignorable_test(name, move || {
            let _beside_others = MEMORY.read().unwrap_or_else(PoisonError::into_inner);
            completion(run())
        }));
    }

    fn name(&self, parts: &[&str], test: &str, dtype: Option<DType>) -> String {
        let backend = self.device.capabilities().backend.name();
        let before = [backend].into_iter().chain(self.label).chain(parts.iter().copied());
        before.chain([test]).chain(dtype.map(DType::name)).collect::<Vec<_>>().join("/")
    }
}

/// Paths that a kernel takes with metadata that the device built.
fn paths_of_device_meta(kernel: Kernel) -> &'static [Path] {
    match kernel.works_by_tile_lists() {
        // The dense one needs metadata on the host.
        true => &[Path::Fused, Path::Packed],
        false => &PATHS_OF_METADATA,
    }
}

/// Whether the device is a GPU that a processor emulates: compilers of such take seconds for each kernel.
pub fn is_emulated_gpu(device: &Device) -> bool {
    device.capabilities().is_software && device.capabilities().backend != BackendKind::Cpu
}

/// Whether a kernel has every score modifier.
pub fn has_modifiers(kernel: &Kernel) -> bool {
    kernel.has_softcap() && kernel.has_alibi() && kernel.has_sinks()
}

fn completion<R: Outcome>(result: Result<R>) -> Result<Completion, Failed> {
    // With `#`, the whole chain of causes.
    result.map(Outcome::completion).map_err(|error| Failed::from(format!("{error:#}")))
}
