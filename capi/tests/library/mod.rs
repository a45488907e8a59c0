//! The files of the C library, built by the cargo that runs a test or a bench.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

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
    /// Builds it once, in the profile and with the features of this test.
    pub fn built() -> Result<Self> {
        static BUILT: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        BUILT.get_or_init(|| Self::build().map_err(|error| format!("{error:#}"))).clone().map_err(anyhow::Error::msg)
    }

    fn build() -> Result<Self> {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
        command.current_dir(package()).args(["build", "--lib", "--message-format=json-render-diagnostics"]);
        if !cfg!(debug_assertions) {
            command.arg("--release");
        }
        let features: Vec<_> = [("cuda", cfg!(feature = "cuda")), ("wgpu", cfg!(feature = "wgpu"))]
            .into_iter()
            .filter_map(|(feature, is_on)| is_on.then_some(feature))
            .collect();
        command.arg("--no-default-features").arg("--features").arg(features.join(","));
        let printed = String::from_utf8(run(&mut command)?.stdout)?;
        let files = files_of(&printed)?;
        let find = |extensions: &[&str]| {
            let is_it =
                |file: &&PathBuf| file.extension().is_some_and(|extension| extensions.iter().any(|e| extension == *e));
            files.iter().find(is_it).cloned().with_context(|| format!("cargo built {files:?}, no {extensions:?}"))
        };
        let (static_library, shared_library) = (find(&["a"])?, find(&["so", "dylib"])?);
        let folder = shared_library.parent().context("the library has no parent folder")?.to_owned();
        Ok(Self { folder, static_library, shared_library })
    }
}

/// The files of this package's library, from what `cargo build --message-format=json` printed.
fn files_of(printed: &str) -> Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Message {
        target: Option<Target>,
        #[serde(default)]
        filenames: Vec<PathBuf>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    for line in printed.lines() {
        let message: Message = serde_json::from_str(line).with_context(|| format!("cargo printed {line:?}"))?;
        let is_ours = |target: Target| target.name == "varlen_fa" && target.kind.iter().any(|kind| kind == "cdylib");
        if message.target.is_some_and(is_ours) {
            return Ok(message.filenames);
        }
    }
    bail!("cargo did not report the library's files")
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
