//! Which devices are here, and which must be.

use std::env;

use anyhow::{Result, bail};
use libtest_mimic::{Completion, Failed, Trial};
use varlen_fa::{Config, DType, Device, DeviceChoice};

use super::limits;

/// Names that `VARLEN_FA_TEST_REQUIRE` may list.
const DEVICES: [&str; 3] = ["cpu", "wgpu", "cuda"];
const REQUIRE: &str = "VARLEN_FA_TEST_REQUIRE";

/// The device, if it can be had, and the trials that say so. The environment of the library is not read; a software
/// adapter counts as a wgpu device.
pub fn open(choice: DeviceChoice) -> (Vec<Trial>, Option<Device>) {
    let name = name(choice);
    let required = required(env::var(REQUIRE).ok().as_deref());
    let opened = limits::open(Config::default().with_device(choice));
    let mut trials = Vec::new();
    let is_required = match required {
        Ok(names) => names.contains(&name),
        Err(error) => {
            trials.push(Trial::test("require", move || Err(Failed::from(error))));
            false
        }
    };
    if let Ok(device) = &opened {
        eprintln!("the suite runs on {}", device.name());
    }
    let status = opened.as_ref().cloned().map_err(|error| format!("{error:#}"));
    let least = limits::are_least();
    trials.push(Trial::ignorable_test(format!("{name}/present"), move || match status {
        Ok(device) => match least.and_then(|_| check_capabilities(&device, name)) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => Err(Failed::from(format!("{error:#}"))),
        },
        Err(why) if is_required => Err(Failed::from(format!("{REQUIRE} names {name}, but {why}"))),
        Err(why) => Ok(Completion::ignored_with(why)),
    }));
    (trials, opened.ok())
}

/// The name of a device's kind, which starts the names of its trials.
fn name(choice: DeviceChoice) -> &'static str {
    match choice {
        DeviceChoice::Cpu => "cpu",
        DeviceChoice::Wgpu => "wgpu",
        _ => "cuda",
    }
}

fn required(value: Option<&str>) -> Result<Vec<&'static str>> {
    let names = value.unwrap_or_default().split(',').map(str::trim).filter(|name| !name.is_empty());
    names
        .map(|name| match DEVICES.into_iter().find(|&known| known == name) {
            Some(known) => Ok(known),
            None => bail!("{REQUIRE}: expected some of {DEVICES:?}, got {name:?}"),
        })
        .collect()
}

/// What the rest of the suite relies on: without it, trials would be missing and nobody would notice.
fn check_capabilities(device: &Device, name: &str) -> Result<()> {
    let capabilities = device.capabilities();
    for dtype in [DType::F16, DType::Bf16] {
        if !capabilities.dtypes.contains(&dtype) {
            bail!("{capabilities} does not compute with {dtype}");
        }
    }
    if capabilities.kernels.is_empty() {
        bail!("{capabilities} has no kernel");
    }
    if capabilities.backend.name() != name {
        bail!("asked for {name}, got {capabilities}");
    }
    if !device.name().contains(name) {
        bail!("the device's name is {:?}, which does not say that it is {name}", device.name());
    }
    device.synchronize()?;
    Ok(())
}
