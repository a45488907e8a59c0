//! Where things are, and how other programs are run.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The repository, as cargo sees it.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    /// The repository's root.
    #[serde(rename = "workspace_root")]
    pub root: PathBuf,
    /// Cargo's target folder.
    #[serde(rename = "target_directory")]
    pub target: PathBuf,
    packages: Vec<Package>,
}

/// A member of the workspace.
#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
}

impl Workspace {
    /// Asks cargo.
    pub fn find() -> Result<Self> {
        let printed = stdout_of(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
        serde_json::from_str(&printed).context("cannot read what `cargo metadata` printed")
    }

    /// The version of a member.
    pub fn version(&self, package: &str) -> Result<String> {
        let found = self.packages.iter().find(|member| member.name == package);
        Ok(found.with_context(|| format!("the workspace has no package {package}"))?.version.clone())
    }

    /// The repository's files of this pattern, as git matches it: paths below the root, also of files that are new.
    pub fn files(&self, pattern: &str) -> Result<Vec<String>> {
        let mut git = Command::new("git");
        git.current_dir(&self.root).args(["ls-files", "--cached", "--others", "--exclude-standard", "--", pattern]);
        let listed = stdout_of(&mut git)?;
        let exists = |file: &&str| self.root.join(file).is_file();
        Ok(listed.lines().filter(exists).map(str::to_owned).collect())
    }
}

/// The cargo that started this program.
pub fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}

/// Installs Python packages into an environment of their own below `folder`, unless they are there;
/// returns the folder of its programs.
pub fn python_with(folder: &Path, packages: &[&str]) -> Result<PathBuf> {
    let environment = folder.join(packages.join(","));
    let (programs, installed) = (environment.join("bin"), environment.join("installed"));
    if installed.is_file() {
        return Ok(programs);
    }
    let python = programs.join("python3");
    capture(Command::new("python3").args(["-m", "venv"]).arg(&environment))
        .context("python3 cannot make an environment (Debian: install python3-venv)")?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]);
    run(pip.args(packages)).with_context(|| format!("pip could not install {}", packages.join(", ")))?;
    fs::write(&installed, "").with_context(|| format!("cannot write {}", installed.display()))?;
    Ok(programs)
}

/// Whether there is a program of this name, on the `PATH` or among cargo's own.
pub fn is_installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(program).is_file())
        || env::var_os("CARGO_HOME").is_some_and(|home| PathBuf::from(home).join("bin").join(program).is_file())
}

/// Runs a command; an error unless it succeeds. Its output is shown.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("{status} from {}", line(command));
    }
    Ok(())
}

/// Runs a command and returns its output; an error with that output unless it succeeds.
pub fn capture(command: &mut Command) -> Result<Output> {
    let output = command.stdin(Stdio::null()).output().with_context(|| cannot_start(command))?;
    if !output.status.success() {
        bail!("{} from {}\n{}", output.status, line(command), text(&output).trim_end());
    }
    Ok(output)
}

/// Runs a command and returns its standard output; what it says on standard error is shown.
pub fn stdout_of(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| cannot_start(command))?;
    if !output.status.success() {
        bail!("{} from {}", output.status, line(command));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Standard output, then standard error.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start {}", command.get_program().display())
}

fn line(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
