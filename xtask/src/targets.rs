//! Platforms that nothing here can run: the library compiles for them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::workspace::{Workspace, cargo, run, stdout_of};

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
        let library = stdout_of(Command::new("rustc").args(["--print", "target-libdir", "--target", target]))?;
        if !Path::new(library.trim()).is_dir() {
            run(Command::new("rustup").args(["target", "add", target]))
                .with_context(|| format!("{target}: rustup adds the standard library for it"))?;
        }
        println!("+ {target}");
        let mut check = cargo();
        check.current_dir(&workspace.root).env("RUSTFLAGS", "-D warnings");
        run(check.args(["check", "--release", "--quiet", "-p", "varlen-fa", "--lib", "--target", target]))?;
    }
    println!("the library compiles for {} targets", TARGETS.len());
    Ok(())
}
