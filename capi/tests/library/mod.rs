//! The files of the C library, which cargo builds beside the tests and benches (`built/Cargo.toml`).

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

/// What the library is called there, as linkers know it.
pub const NAME: &str = "varlen_fa_built";

/// Paths of the library.
#[derive(Debug, Clone)]
pub struct Library {
    /// The folder of both files.
    pub folder: PathBuf,
    /// For linking into a program.
    pub static_library: PathBuf,
    /// For loading.
    pub shared_library: PathBuf,
}

impl Library {
    /// That of this test's profile and features.
    pub fn built() -> Result<Self> {
        let program = env::current_exe()?;
        let folder = program.parent().context("the test has no parent folder")?.to_owned();
        let static_library = folder.join(format!("lib{NAME}.a"));
        let shared_library = folder.join(format!("{}{NAME}{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX));
        ensure!(shared_library.exists(), "cargo did not build {}", shared_library.display());
        Ok(Self { folder, static_library, shared_library })
    }
}

/// This package's folder.
pub fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command; returns an error with its output if it fails.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    expect_success(command, &output)?;
    Ok(output)
}

/// Returns an error with the output if the command failed.
pub fn expect_success(command: &Command, output: &Output) -> Result<()> {
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    ensure!(output.status.success(), "{} from {command:?}\n{}", output.status, String::from_utf8_lossy(&said));
    Ok(())
}
