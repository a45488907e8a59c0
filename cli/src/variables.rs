//! The library's environment variables.

use std::env;

use varlen_fa::Config;

/// The library's variables that are set, but for the one that names the device.
pub fn set() -> impl Iterator<Item = (&'static str, String)> {
    let names = [Config::VARLEN_VARIABLE, Config::KERNEL_VARIABLE, Config::CPU_VARIABLE, Config::THREADS_VARIABLE];
    names.into_iter().filter_map(|name| Some((name, env::var(name).ok().filter(|value| !value.is_empty())?)))
}
