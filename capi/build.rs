//! How the shared library is linked.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let has_elf = matches!(env::var("CARGO_CFG_TARGET_OS").as_deref(), Ok("linux" | "android" | "freebsd"));
    if has_elf {
        // Threads of the CPU device, and thread-local values of other threads, outlive dlclose: the
        // library stays where it is, and a later dlopen finds it again.
        println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
