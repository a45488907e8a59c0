//! Platforms that nothing here can run: the library compiles for them.

use anyhow::Result;

use crate::toolchain::add_standard_library;
use crate::workspace::{Workspace, cargo, run};

/// Targets, as Rust names them. docs/platforms.md says what is known of each. CI builds that of browsers and runs that of 64-bit Arm.
const TARGETS: &[&str] = &[
    "x86_64-pc-windows-gnu",
    "aarch64-apple-darwin",
    "aarch64-linux-android",
    "i686-unknown-linux-gnu",
    "wasm32-unknown-unknown",
];

/// Checks the library with its default features for each target. Adds targets by rustup where they are missing.
pub fn check(workspace: &Workspace) -> Result<()> {
    for target in TARGETS {
        add_standard_library(target)?;
        println!("+ {target}");
        let mut check = cargo();
        check.current_dir(&workspace.root).env("RUSTFLAGS", "-D warnings");
        run(check.args(["check", "--release", "--quiet", "-p", "varlen-fa", "--lib", "--target", target]))?;
    }
    println!("the library compiles for {} targets", TARGETS.len());
    Ok(())
}
