//! The crate as it is published: what is in it, how large it is, and whether it works by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::{Workspace, cargo, run, stdout_of};

/// The most bytes of the compressed package. The compiled kernels are nearly all of it, and they are compressed already; crates.io
/// takes 10 MB.
const MAX_BYTES: u64 = 6_000_000;

/// Files that users of the package need.
const NEEDED: &[&str] = &[
    "CHANGELOG.md",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "docs/joint-layer.md",
    "kernels/prebuilt/attention_sm80.fatbin",
    "shaders/attention/portable.wgsl",
    "src/lib.rs",
];

/// What must not be in it: it would not build there, or serves this repository alone.
const UNWANTED: &[&str] = &["adapters/", "benches/", "examples/", "kernels/tests/", "scripts/", "tests/", "xtask/"];

/// Packs the crate, and checks what is in it and that it builds where it lies alone.
pub fn check(workspace: &Workspace) -> Result<()> {
    let folder = unpacked(workspace, Source::WorkingTree)?;
    // In the workspace's target folder, which has the dependencies compiled.
    in_package(workspace, &folder, &["check", "--release", "--lib", "--locked"])
}

/// Which files are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Those that lie there, committed or not.
    WorkingTree,
    /// Those of the commit: nothing else may have changed.
    Commit,
}

/// Packs the crate, checks what is in it, and unpacks it outside of the workspace's packages; returns its folder.
pub fn unpacked(workspace: &Workspace, source: Source) -> Result<PathBuf> {
    let mut package = cargo();
    package.current_dir(&workspace.root).args(["package", "-p", "varlen-fa", "--no-verify", "--quiet"]);
    if source == Source::WorkingTree {
        package.arg("--allow-dirty");
    }
    run(&mut package)?;
    let name = format!("varlen-fa-{}", workspace.version("varlen-fa")?);
    let file = workspace.target.join("package").join(format!("{name}.crate"));
    let size = fs::metadata(&file).with_context(|| format!("cargo did not write {}", file.display()))?.len();
    ensure!(size <= MAX_BYTES, "{} has {size} bytes, more than {MAX_BYTES}", file.display());

    let folder = workspace.target.join("package-unpacked");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder)?;
    run(Command::new("tar").arg("-xzf").arg(&file).arg("-C").arg(&folder))?;
    let folder = folder.join(&name);
    // A folder below a workspace counts as a member of it, unless it says that it is none.
    let manifest = folder.join("Cargo.toml");
    let text = fs::read_to_string(&manifest)?;
    fs::write(&manifest, format!("{text}\n[workspace]\n"))?;

    let files = stdout_of(Command::new("tar").arg("-tzf").arg(&file))?;
    let files: Vec<&str> = files.lines().filter_map(|line| line.strip_prefix(&name)?.strip_prefix('/')).collect();
    let faults = faults(&files);
    ensure!(faults.is_empty(), "{}: {}", file.display(), faults.join("; "));
    let kernels = bytes_of(&folder.join("kernels/prebuilt"))?;
    println!(
        "{name}.crate: {} files, {:.2} MB, of which compiled kernels are {:.2}",
        files.len(),
        size as f64 / 1e6,
        kernels as f64 / 1e6
    );
    Ok(folder)
}

/// What is wrong with the list of files.
fn faults(files: &[&str]) -> Vec<String> {
    let missing = NEEDED.iter().filter(|needed| !files.contains(needed)).map(|needed| format!("{needed} is missing"));
    let is_unwanted = |file: &&&str| UNWANTED.iter().any(|folder| file.starts_with(folder));
    missing.chain(files.iter().filter(is_unwanted).map(|file| format!("{file} does not belong there"))).collect()
}

fn bytes_of(folder: &Path) -> Result<u64> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}

/// Runs cargo in the unpacked package.
pub fn in_package(workspace: &Workspace, folder: &Path, arguments: &[&str]) -> Result<()> {
    println!("+ cargo {} (in the unpacked package)", arguments.join(" "));
    run(cargo().current_dir(folder).env("CARGO_TARGET_DIR", &workspace.target).args(arguments))
}

#[cfg(test)]
mod tests {
    use super::{NEEDED, faults};

    #[test]
    fn missing_and_unwanted_files_are_told() {
        assert!(faults(NEEDED).is_empty());
        let mut files = NEEDED.to_vec();
        files.pop();
        files.push("tests/suite/main.rs");
        assert_eq!(faults(&files), ["src/lib.rs is missing", "tests/suite/main.rs does not belong there"]);
    }
}
