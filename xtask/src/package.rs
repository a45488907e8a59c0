//! The crates as they are published: what is in them, how large they are, and whether they work by themselves.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::kernels::{IMAGE_PACKAGES, images};
use crate::table;
use crate::workspace::{Workspace, cargo, run, stdout_of};

/// The most bytes of a compressed package; crates.io takes 10 MB. Compiled kernels are compressed already.
const MAX_BYTES: u64 = 3_000_000;

/// The library's package.
pub const LIBRARY: &str = "varlen-fa";

/// Files that users of the library's package need.
const NEEDED: &[&str] = &[
    "CHANGELOG.md",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "docs/joint-layer.md",
    "kernels/prebuilt/manifest.json",
    "shaders/attention/portable.wgsl",
    "src/lib.rs",
];

/// Files of each package of compiled kernels, beside the images.
const NEEDED_BESIDE_IMAGES: &[&str] = &["Cargo.toml", "LICENSE-APACHE", "LICENSE-MIT", "README.md", "src/lib.rs"];

/// What must not be in them: it would not build there, serves this repository alone, or is in a package of its own.
const UNWANTED: &[&str] = &[
    "adapters/",
    "benches/",
    "examples/",
    "kernels/prebuilt/varlen-fa-kernels",
    "kernels/tests/",
    "scripts/",
    "tests/",
    "xtask/",
];

/// What is published, in the order in which one needs the other.
pub fn published() -> impl Iterator<Item = &'static str> {
    IMAGE_PACKAGES.into_iter().chain([LIBRARY])
}

/// Packs the crates, and checks what is in them and that the library builds where it lies alone.
pub fn check(workspace: &Workspace) -> Result<()> {
    let unpacked = Unpacked::new(workspace, Source::WorkingTree)?;
    // In the workspace's target folder, which has the dependencies compiled.
    unpacked.cargo(workspace, &["check", "--release", "--lib", "--locked"])
}

/// Which files are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Those that lie there, committed or not.
    WorkingTree,
    /// Those of the commit: nothing else may have changed.
    Commit,
}

/// The packed crates, unpacked outside of the workspace's packages.
#[derive(Debug)]
pub struct Unpacked {
    /// The library's folder.
    pub library: PathBuf,
    /// Lines of a manifest that have cargo take the packages of compiled kernels from where they lie: the registry may not have this
    /// version of them yet.
    pub patches: String,
}

impl Unpacked {
    /// Packs the crates, checks what is in them, and unpacks them.
    pub fn new(workspace: &Workspace, source: Source) -> Result<Self> {
        let mut package = cargo();
        package.current_dir(&workspace.root).args(["package", "--no-verify", "--quiet"]);
        package.args(published().flat_map(|name| ["-p", name]));
        if source == Source::WorkingTree {
            package.arg("--allow-dirty");
        }
        run(&mut package).context("cargo packs several packages that need one another from 1.90 on")?;
        let folder = workspace.target.join("package-unpacked");
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        fs::create_dir_all(&folder)?;

        let mut rows = vec![["crate", "files", "MB"].map(str::to_owned).to_vec()];
        let mut patches = String::from("\n[patch.crates-io]\n");
        for name in IMAGE_PACKAGES {
            let needed: Vec<_> = NEEDED_BESIDE_IMAGES.iter().map(|&file| file.to_owned()).chain(images(name)).collect();
            let unpacked = unpack(workspace, name, &folder, &needed, &mut rows)?;
            append(&unpacked.join("Cargo.toml"), NO_MEMBER)?;
            patches += &format!("{name} = {{ path = {:?} }}\n", unpacked.display().to_string());
        }
        let needed: Vec<_> = NEEDED.iter().map(|&file| file.to_owned()).collect();
        let library = unpack(workspace, LIBRARY, &folder, &needed, &mut rows)?;
        append(&library.join("Cargo.toml"), &format!("{NO_MEMBER}{patches}"))?;
        let lock = library.join("Cargo.lock");
        let text = fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
        fs::write(&lock, without_source(&text))?;
        print!("{}", table::format(&rows));
        Ok(Self { library, patches })
    }

    /// Runs cargo in the library's folder.
    pub fn cargo(&self, workspace: &Workspace, arguments: &[&str]) -> Result<()> {
        println!("+ cargo {} (in the unpacked package)", arguments.join(" "));
        run(cargo().current_dir(&self.library).env("CARGO_TARGET_DIR", &workspace.target).args(arguments))
    }
}

/// Lines of a manifest: a folder below a workspace counts as a member of it, unless it says that it is none.
const NO_MEMBER: &str = "\n[workspace]\n";

/// Unpacks a package into a folder below this one, which it gives. Fails if it is too large, if a needed file is not in it, or one that
/// does not belong there.
fn unpack(
    workspace: &Workspace,
    name: &str,
    below: &Path,
    needed: &[String],
    rows: &mut Vec<Vec<String>>,
) -> Result<PathBuf> {
    let name = format!("{name}-{}", workspace.version(name)?);
    let file = workspace.target.join("package").join(format!("{name}.crate"));
    let size = fs::metadata(&file).with_context(|| format!("cargo did not write {}", file.display()))?.len();
    ensure!(size <= MAX_BYTES, "{} has {size} bytes, more than {MAX_BYTES}", file.display());
    run(Command::new("tar").arg("-xzf").arg(&file).arg("-C").arg(below))?;

    let files = stdout_of(Command::new("tar").arg("-tzf").arg(&file))?;
    let files: Vec<&str> = files.lines().filter_map(|line| line.strip_prefix(&name)?.strip_prefix('/')).collect();
    let faults = faults(&files, needed);
    ensure!(faults.is_empty(), "{}: {}", file.display(), faults.join("; "));
    rows.push(vec![name.clone(), files.len().to_string(), format!("{:.2}", size as f64 / 1e6)]);
    Ok(below.join(name))
}

/// What is wrong with the list of files.
fn faults(files: &[&str], needed: &[String]) -> Vec<String> {
    let missing = needed.iter().filter(|needed| !files.contains(&needed.as_str()));
    let missing = missing.map(|needed| format!("{needed} is missing"));
    let is_unwanted = |file: &&&str| UNWANTED.iter().any(|folder| file.starts_with(folder));
    missing.chain(files.iter().filter(is_unwanted).map(|file| format!("{file} does not belong there"))).collect()
}

fn append(manifest: &Path, lines: &str) -> Result<()> {
    let text = fs::read_to_string(manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    Ok(fs::write(manifest, format!("{text}{lines}"))?)
}

/// A lock file in which the packages of compiled kernels have no source, as those of a patch have none. All else stays locked.
fn without_source(lock: &str) -> String {
    let mut is_ours = false;
    let of_registry = |line: &str| line.starts_with("source = ") || line.starts_with("checksum = ");
    let mut kept = String::with_capacity(lock.len());
    for line in lock.lines() {
        if let Some(name) = line.strip_prefix("name = ") {
            is_ours = IMAGE_PACKAGES.contains(&name.trim_matches('"'));
        }
        if !(is_ours && of_registry(line)) {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::{NEEDED, faults, without_source};

    #[test]
    fn missing_and_unwanted_files_are_told() {
        let needed: Vec<_> = NEEDED.iter().map(|&file| file.to_owned()).collect();
        assert!(faults(NEEDED, &needed).is_empty());
        let mut files = NEEDED.to_vec();
        files.pop();
        files.push("tests/suite/main.rs");
        assert_eq!(faults(&files, &needed), ["src/lib.rs is missing", "tests/suite/main.rs does not belong there"]);
    }

    #[test]
    fn compiled_kernels_alone_lose_their_source() {
        let entry = |name: &str, rest: &str| format!("[[package]]\nname = \"{name}\"\nversion = \"1.0.0\"\n{rest}\n");
        let registry = "source = \"registry\"\nchecksum = \"00\"\n";
        let lock =
            |of_kernels| entry("half", registry) + &entry("varlen-fa-kernels", of_kernels) + &entry("wgpu", registry);
        assert_eq!(without_source(&lock(registry)), lock(""));
    }
}
