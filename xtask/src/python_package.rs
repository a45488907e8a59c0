//! The Python package: its wheel, and its tests on the installed wheel.

use std::env::consts::{ARCH, OS};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::workspace::{Workspace, capture, run};

const TOOLS: [&str; 3] = ["maturin==1.16.0", "numpy==2.4.6", "pytest==9.2.0"];
/// A linker that links against an old C library wherever it runs.
const LINKER: &str = "ziglang==0.17.1";
/// The C library that the wheel needs on Linux, at least.
const GLIBC: (u32, u32) = (2, 28);
/// Bytes that the wheel must stay below.
const LIMIT: u64 = 12_000_000;

/// Builds the wheel, and tests it installed. PyTorch is heavy, so its tests run only where `python3` or
/// PYTHONPATH has it; pytest prints the reason where they do not.
pub fn check(workspace: &Workspace) -> Result<()> {
    let folder = workspace.target.join("python-package");
    let (environment, wheels, package) = (folder.join("venv"), folder.join("wheels"), workspace.root.join("python"));
    for stale in [&environment, &wheels] {
        if stale.exists() {
            fs::remove_dir_all(stale).with_context(|| format!("cannot remove {}", stale.display()))?;
        }
    }
    capture(Command::new("python3").args(["-m", "venv", "--system-site-packages"]).arg(&environment))
        .context("python3 cannot make an environment (Debian: install python3-venv)")?;
    let python = environment.join("bin/python3");
    let pip = || {
        let mut pip = Command::new(&python);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
        pip
    };
    run(pip().arg("--only-binary=:all:").args(TOOLS)).context("pip could not install the tools")?;

    let mut maturin = Command::new(environment.join("bin/maturin"));
    maturin.current_dir(&package).args(["build", "--release", "--locked", "--interpreter"]).arg(&python);
    maturin.arg("--out").arg(&wheels).env("CARGO_TARGET_DIR", &workspace.target);
    if OS == "linux" {
        match run(pip().arg("--only-binary=:all:").arg(LINKER)) {
            Ok(()) => {
                let linker = write_linker(&folder, &python)?;
                maturin.arg("--compatibility").arg(format!("manylinux_{}_{}", GLIBC.0, GLIBC.1));
                // The linker of the last step alone, so that nothing else is built anew.
                maturin.arg("--").arg("-C").arg(format!("linker={}", linker.display()));
            }
            Err(error) => {
                println!("{LINKER} is not installed, so the wheel needs the C library of this machine: {error:#}");
            }
        }
    }
    run(&mut maturin)?;
    let built: Vec<PathBuf> = fs::read_dir(&wheels)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    let [wheel] = &built[..] else { bail!("expected one wheel in {}, got {built:?}", wheels.display()) };
    let size = fs::metadata(wheel)?.len();
    println!("{}: {:.1} MB", wheel.file_name().unwrap_or_default().display(), size as f64 / 1e6);
    ensure!(size < LIMIT, "the wheel has {size} bytes; it must have less than {LIMIT}");

    run(pip().args(["--no-deps", "--no-index"]).arg(wheel))?;
    run(Command::new(&python).current_dir(&folder).args(["-m", "varlen_fa", "doctor"]))?;
    let tests = package.join("tests");
    run(Command::new(&python).current_dir(tests).args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]))
}

/// A program that links against the old C library; maturin checks that nothing newer came in.
fn write_linker(folder: &Path, python: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;

    let (path, target) = (folder.join("linker"), format!("{ARCH}-linux-gnu.{}.{}", GLIBC.0, GLIBC.1));
    let script = format!("#!/bin/sh\nexec '{}' -m ziglang cc -target {target} \"$@\"\n", python.display());
    fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}
