//! Which devices are here, and which must be.

use std::env;

use anyhow::{Result, bail};
use libtest_mimic::{Completion, Failed, Trial};
use varlen_fa::{BackendKind, Config, DType, Device};

use super::limits;

const REQUIRE: &str = "VARLEN_FA_TEST_REQUIRE";

/// The best device of a kind, if there is one, and the trial that says so. The environment of the library is not read; a
/// software adapter counts as a wgpu device.
pub fn open(kind: BackendKind, is_required: bool) -> (Trial, Option<Device>) {
    let opened = limits::open(Config::default().with_device(kind.into()));
    if let Ok(device) = &opened {
        eprintln!("the suite runs on {}", device.capabilities());
    }
    let status = opened.as_ref().cloned().map_err(|error| format!("{error:#}"));
    let least = limits::are_least();
    let present = Trial::ignorable_test(format!("{kind}/present"), move || match status {
        Ok(device) => match least.and_then(|_| check_capabilities(&device, kind)) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => Err(Failed::from(format!("{error:#}"))),
        },
        Err(why) if is_required => Err(Failed::from(format!("{REQUIRE} names {kind}, but {why}"))),
        Err(why) => Ok(Completion::ignored_with(why)),
    });
    (present, opened.ok())
}

/// A device of the same GPU as the one that was [opened](open).
pub fn another(kind: BackendKind) -> Option<Device> {
    let opened = limits::open(Config::default().with_device(kind.into()));
    opened.inspect_err(|error| eprintln!("the suite has one {kind} device alone: {error:#}")).ok()
}

/// The kinds of devices whose absence is a failure.
pub fn required() -> Result<Vec<BackendKind>> {
    let value = env::var(REQUIRE).unwrap_or_default();
    let names = value.split(',').map(str::trim).filter(|name| !name.is_empty());
    names
        .map(|name| match BackendKind::ALL.iter().find(|kind| kind.name() == name) {
            Some(&kind) => Ok(kind),
            None => bail!("{REQUIRE}: expected some of {:?}, got {name:?}", BackendKind::ALL),
        })
        .collect()
}

/// What the rest of the suite relies on: without it, trials would be missing and nobody would notice.
fn check_capabilities(device: &Device, kind: BackendKind) -> Result<()> {
    let capabilities = device.capabilities();
    for dtype in [DType::F16, DType::Bf16] {
        if !capabilities.dtypes.contains(&dtype) {
            bail!("{capabilities} does not compute with {dtype}");
        }
    }
    if capabilities.kernels.is_empty() {
        bail!("{capabilities} has no kernel");
    }
    if capabilities.backend != kind {
        bail!("asked for {kind}, got {capabilities}");
    }
    if !device.name().contains(kind.name()) {
        bail!("the device's name is {:?}, which does not say that it is {kind}", device.name());
    }
    device.synchronize()?;
    Ok(())
}
