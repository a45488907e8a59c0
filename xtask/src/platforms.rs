//! The CPU device on systems that this one can stand in for: what is built for them runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::toolchain::Toolchain;
use crate::workspace::{Workspace, run, stdout_of};

/// The C program of the guide with the DLL, and an example in Rust, both in Wine. Gives why they cannot run, where they cannot.
pub fn windows(workspace: &Workspace) -> Result<Option<String>> {
    let toolchain = Toolchain::of(Some("x86_64-pc-windows-gnu"))?;
    if let Some(missing) = toolchain.missing() {
        return Ok(Some(missing));
    }
    // One build for both, or cargo would choose other features for each.
    let example = ["-p", "varlen-fa", "--example", "masked_attention"];
    let built = build(workspace, &toolchain, &example)?;
    let program = built.join("masked_attention.exe");
    let mut compiler = compile(workspace, &toolchain, &program);
    run(compiler.arg("-L").arg(&built).arg("-lvarlen_fa"))?;
    run(toolchain.program(workspace, &program)?.arg("cpu"))?;
    let example = built.join("examples/masked_attention.exe");
    run(toolchain.program(workspace, example)?.args(["--device", "cpu", "--json", "-"]))?;
    Ok(None)
}

/// The same C program with the static library and without any shared one. Gives why it cannot run, where it cannot.
pub fn musl(workspace: &Workspace) -> Result<Option<String>> {
    let toolchain = Toolchain::of(Some("x86_64-unknown-linux-musl"))?;
    if let Some(missing) = toolchain.missing() {
        return Ok(Some(missing));
    }
    let built = build(workspace, &toolchain, &[])?;
    let program = built.join("masked_attention");
    let libraries =
        stdout_of(Command::new("rustc").args(["--print", "target-libdir", "--target", toolchain.target()]))?;
    let mut compiler = compile(workspace, &toolchain, &program);
    // Rust's unwinder: glibc's is what musl-gcc would link else.
    compiler.args(["-static", "-nodefaultlibs"]).arg(built.join("libvarlen_fa.a"));
    run(compiler.arg(Path::new(libraries.trim()).join("self-contained/libunwind.a")).args(["-lm", "-lc"]))?;
    run(toolchain.program(workspace, &program)?.arg("cpu"))?;
    Ok(None)
}

/// Builds the C library without GPU devices, and what is named beside; gives the folder.
fn build(workspace: &Workspace, toolchain: &Toolchain, beside: &[&str]) -> Result<PathBuf> {
    // Half the time of a full build: nothing is timed here.
    const LITTLE: &str = "profile.release.opt-level=1";
    let words = ["build", "--release", "--no-default-features", "--config", LITTLE, "-p", "varlen-fa-capi", "--lib"];
    let mut cargo = toolchain.cargo(workspace, &words)?;
    run(cargo.args(beside)).context("the CPU device alone")?;
    Ok(workspace.target.join(toolchain.target()).join("release"))
}

/// Compiles the C program of the guide, but for its libraries.
fn compile(workspace: &Workspace, toolchain: &Toolchain, program: &Path) -> Command {
    let capi = workspace.root.join("capi");
    let mut compiler = Command::new(toolchain.tool("gcc"));
    compiler.args(["-std=c11", "-I"]).arg(capi.join("include")).arg(capi.join("examples/masked_attention.c"));
    compiler.arg("-o").arg(program);
    compiler
}
