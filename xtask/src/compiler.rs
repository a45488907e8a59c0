//! The pinned CUDA compiler, in a Python environment under the target folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::workspace::{Workspace, capture, run, text};

/// The packages and their versions, one a line, as pip reads them.
pub const PACKAGES: &str = include_str!("../cuda-compiler.txt");

/// What the compiler must say its version is.
const VERSION: &str = "Cuda compilation tools, release 13.0, V13.0.88";

/// Environment variables of nvcc and gcc that could change what is compiled.
const ENVIRONMENT_SETTINGS: [&str; 6] =
    ["NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "NVCC_CCBIN", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"];

/// An installed compiler.
#[derive(Debug)]
pub struct Compiler {
    nvcc: PathBuf,
    /// What it says its version is.
    pub version: String,
}

impl Compiler {
    /// Installs the compiler unless it is there, and checks that it can run.
    pub fn install(workspace: &Workspace) -> Result<Self> {
        for tool in ["gcc", "g++"] {
            capture(Command::new(tool).arg("--version"))
                .context("nvcc reads the C++ headers through gcc: install gcc and g++")?;
        }
        let environment = workspace.target.join("cuda-compiler");
        // Written last: a broken installation has none.
        let stamp = environment.join("installed.txt");
        if fs::read_to_string(&stamp).is_ok_and(|installed| installed == PACKAGES) {
            return Self::open(&environment)
                .with_context(|| format!("{} is damaged: remove it and try again", environment.display()));
        }
        install_packages(&environment)?;
        let compiler = Self::open(&environment)?;
        fs::write(&stamp, PACKAGES).with_context(|| format!("cannot write {}", stamp.display()))?;
        Ok(compiler)
    }

    fn open(environment: &Path) -> Result<Self> {
        let nvcc = find_nvcc(environment)?;
        let output = capture(Command::new(&nvcc).arg("--version"))?;
        let printed = text(&output);
        let version = printed.lines().find(|line| line.starts_with("Cuda compilation tools")).unwrap_or_default();
        ensure!(version == VERSION, "{} is {version:?}, expected {VERSION:?}", nvcc.display());
        Ok(Self { nvcc, version: version.to_owned() })
    }

    /// Where programs find the CUDA runtime, which is not where the compiler looks by default.
    pub fn libraries(&self) -> Result<PathBuf> {
        let home = self.nvcc.parent().and_then(Path::parent).context("the compiler is in no folder")?;
        Ok(home.join("lib"))
    }

    /// The command that runs the compiler.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.nvcc);
        for name in ENVIRONMENT_SETTINGS {
            command.env_remove(name);
        }
        command
    }
}

fn install_packages(environment: &Path) -> Result<()> {
    eprintln!("installing the CUDA compiler into {} (about 500 MB)", environment.display());
    if environment.exists() {
        fs::remove_dir_all(environment).with_context(|| format!("cannot remove {}", environment.display()))?;
    }
    capture(Command::new("python3").args(["-m", "venv"]).arg(environment))
        .context("the CUDA compiler comes as Python packages; they need python3 with venv (Debian: python3-venv)")?;
    let mut pip = Command::new(environment.join("bin/python3"));
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]);
    run(pip.args(PACKAGES.lines())).context(
        "pip could not install the CUDA compiler: its message is above; it needs a package index to download from",
    )
}

fn find_nvcc(environment: &Path) -> Result<PathBuf> {
    let lib = environment.join("lib");
    let entries = fs::read_dir(&lib).with_context(|| format!("cannot read {}", lib.display()))?;
    for entry in entries {
        let nvcc = entry?.path().join("site-packages/nvidia/cu13/bin/nvcc");
        if nvcc.is_file() {
            return Ok(nvcc);
        }
    }
    bail!("no python*/site-packages/nvidia/cu13/bin/nvcc in {}", lib.display())
}
