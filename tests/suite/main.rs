//! The suite that every device passes: written once, run for each device, each of its kernels, each path and element type.
//!
//! A trial is named `device/kernel/path/test/dtype`, without the parts that its test does not depend on. A device that is
//! absent is one ignored trial, `device/present`, with the reason beside it. A filter that begins with a device's name and a
//! slash, such as `cpu/`, opens that device alone.
//!
//! | variable | meaning |
//! |---|---|
//! | `VARLEN_FA_TEST_REQUIRE` | `cpu,wgpu,cuda` or some of them: devices whose absence is a failure |
//! | `VARLEN_FA_TEST_LIMITS` | `webgpu`: wgpu devices have WebGPU's default limits and no optional feature |
//! | `VARLEN_FA_TEST_EMULATED` | `whole`: an emulated GPU runs every trial in every element type, not a share of them |
//! | `VARLEN_FA_TEST_CASES` | number of cases of each property test (64, or 8 on an emulated GPU) |
//! | `VARLEN_FA_TEST_SEED` | seed of the property tests (0) |
//!
//! The answers come from `varlen-fa-testkit`, whose f64 oracle shares no code with the library.

#![allow(clippy::single_range_in_vec_init, reason = "one run of tokens is meant")]

mod any_head_dim;
mod bias;
mod bindings;
mod call;
mod cases;
mod check;
mod dense;
mod device_meta;
#[cfg(feature = "wgpu")]
mod dispatches;
mod dist;
mod dist_calls;
mod dist_faults;
#[cfg(feature = "nccl")]
mod dist_nccl;
#[cfg(feature = "cuda")]
mod dist_peer;
#[cfg(feature = "emulated-sm100")]
mod emulated_sm100;
#[cfg(feature = "cuda")]
mod external_cuda;
#[cfg(feature = "wgpu")]
mod external_wgpu;
mod grouped_heads;
mod head_dims;
mod host_memory;
mod instruction_sets;
mod joint;
mod key_tiles;
mod large;
mod layouts;
mod limits;
mod long_keys;
#[cfg(feature = "wgpu")]
mod long_work;
mod lse;
mod masks;
mod memory;
mod merge;
mod modifiers;
mod modifying;
mod numerics;
mod packed;
mod placement;
mod plans;
mod prepare_qk;
mod presence;
mod properties;
mod ranges;
mod refusals;
mod repeats;
mod rule;
mod segments;
mod shapes;
mod tensors;
mod threads;
mod trials;
#[cfg(feature = "wgpu")]
mod wgpu_device;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use varlen_fa::{BackendKind, Device};

use self::trials::{Register, Trials, is_emulated_gpu};

/// What every device passes in every element type, on an emulated GPU too.
const ABOUT_DTYPES: &[Register] = &[
    cases::register,
    masks::register,
    layouts::register,
    numerics::register,
    bias::register,
    dense::register,
    packed::register,
    tensors::register,
];

/// What else every device passes.
const SHARED: &[Register] = &[
    plans::register,
    ranges::register,
    device_meta::register,
    shapes::register,
    grouped_heads::register,
    key_tiles::register,
    any_head_dim::register,
    segments::register,
    long_keys::register,
    lse::register,
    merge::register,
    modifiers::register,
    prepare_qk::register,
    joint::register,
    dist::register,
    dist_calls::register,
    repeats::register,
    properties::register,
    refusals::register,
    large::register,
    bindings::register,
    #[cfg(feature = "wgpu")]
    long_work::register,
];

/// What only devices of this kind have.
fn own(kind: BackendKind) -> &'static [Register] {
    match kind {
        BackendKind::Cpu => {
            &[dist_faults::register, host_memory::register, instruction_sets::register, threads::register]
        }
        #[cfg(feature = "wgpu")]
        BackendKind::Wgpu => &[wgpu_device::register, external_wgpu::register],
        #[cfg(feature = "cuda")]
        BackendKind::Cuda => &[
            external_cuda::register,
            dist_peer::register,
            #[cfg(feature = "nccl")]
            dist_nccl::register,
            #[cfg(feature = "emulated-sm100")]
            emulated_sm100::register,
        ],
        _ => &[],
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Before any device is opened.
    #[cfg(feature = "emulated-sm100")]
    if let Err(error) = emulated_sm100::set() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let mut list = Vec::new();
    let required = presence::required().unwrap_or_else(|error| {
        list.push(Trial::test("require", move || Err(Failed::from(error))));
        Vec::new()
    });
    for &kind in BackendKind::ALL.iter().filter(|&&kind| is_asked_for(arguments.filter.as_deref(), kind)) {
        let (present, device) = presence::open(kind, required.contains(&kind));
        list.push(present);
        list.extend(device.into_iter().flat_map(|device| trials_of(kind, device)));
    }
    libtest_mimic::run(&arguments, list).exit_code()
}

fn trials_of(kind: BackendKind, device: Device) -> Vec<Trial> {
    let second = if is_emulated_gpu(&device) { presence::another(kind) } else { None };
    let mut trials = Trials::new(device, second);
    trials.in_every_dtype(|trials| ABOUT_DTYPES.iter().for_each(|register| register(trials)));
    SHARED.iter().chain(own(kind)).for_each(|register| register(&mut trials));
    trials.into_list()
}

/// Whether a filter may name trials of this kind of device: one that begins with another kind's name does not.
fn is_asked_for(filter: Option<&str>, kind: BackendKind) -> bool {
    let first = filter.and_then(|filter| Some(filter.split_once('/')?.0));
    let named = first.and_then(|first| BackendKind::ALL.iter().find(|kind| kind.name() == first));
    named.is_none_or(|&named| named == kind)
}
