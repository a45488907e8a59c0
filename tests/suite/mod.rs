//! The suite that every device passes: written once, run for each device, each of its kernels, each path and element type.
//!
//! A trial is named `device/kernel/path/test/dtype`, less the parts that its test does not depend on. A device that is
//! absent is one ignored trial, `device/present`, with the reason beside it.
//!
//! | variable | meaning |
//! |---|---|
//! | `VARLEN_FA_TEST_REQUIRE` | `cpu,wgpu,cuda` or some of them: devices whose absence is a failure |
//! | `VARLEN_FA_TEST_LIMITS` | `webgpu`: wgpu devices have WebGPU's default limits and no optional feature |
//! | `VARLEN_FA_TEST_CASES` | number of cases of each property test (64, or 16 on an emulated GPU) |
//! | `VARLEN_FA_TEST_SEED` | seed of the property tests (0) |
//!
//! The answers come from `varlen-fa-testkit`, whose f64 oracle shares no code with the library.

mod bias;
mod bindings;
pub mod call;
mod cases;
pub mod check;
mod dense;
mod device_meta;
#[cfg(feature = "wgpu")]
mod dispatches;
mod head_dims;
mod large;
mod layouts;
mod limits;
mod long_keys;
#[cfg(feature = "wgpu")]
mod long_work;
mod masks;
pub mod memory;
mod numerics;
mod packed;
pub mod placement;
mod plans;
mod presence;
mod properties;
mod refusals;
mod repeats;
mod shapes;
mod tensors;
pub mod trials;
#[cfg(feature = "wgpu")]
mod wgpu_in_place;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use varlen_fa::DeviceChoice;

use self::trials::Trials;

/// Runs the suite, and the trials that `own` adds for this device alone; the `main` of each thin file.
pub fn run(choice: DeviceChoice, own: fn(&mut Trials)) -> ExitCode {
    let arguments = Arguments::from_args();
    let (presence, device) = presence::open(choice);
    let mut list = presence;
    if let Some(device) = device {
        let mut trials = Trials::new(device);
        for register in [
            plans::register,
            cases::register,
            masks::register,
            device_meta::register,
            shapes::register,
            layouts::register,
            long_keys::register,
            numerics::register,
            bias::register,
            dense::register,
            packed::register,
            tensors::register,
            repeats::register,
            properties::register,
            refusals::register,
            large::register,
            bindings::register,
            #[cfg(feature = "wgpu")]
            long_work::register,
            #[cfg(feature = "wgpu")]
            wgpu_in_place::register,
            own,
        ] {
            register(&mut trials);
        }
        list.extend(trials.into_list());
    }
    libtest_mimic::run(&arguments, list).exit_code()
}
