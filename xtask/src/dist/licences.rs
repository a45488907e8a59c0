//! The licences of everything that is built into the library.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::files::copy;
use crate::workspace::{Workspace, cargo, stdout_of};

/// A package as cargo knows it.
#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    repository: Option<String>,
    #[serde(default)]
    authors: Vec<String>,
    manifest_path: PathBuf,
}

/// Writes `THIRD-PARTY-LICENSES.txt`: each package with its licence, and the texts that come with it.
pub fn write(workspace: &Workspace, target: &str, folder: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    let mut tree = cargo();
    tree.current_dir(&workspace.root).args(["tree", "-p", "varlen-fa-capi", "--edges", "normal,no-proc-macro"]);
    let built_in = names(&stdout_of(tree.args(["--target", target, "--prefix", "none", "--format", "{p}"]))?);
    let mut metadata = cargo();
    let printed = stdout_of(metadata.current_dir(&workspace.root).args(["metadata", "--format-version", "1"]))?;
    let Metadata { packages } = serde_json::from_str(&printed).context("cannot read what `cargo metadata` printed")?;

    let known: BTreeMap<_, _> =
        packages.iter().map(|package| ((package.name.as_str(), package.version.as_str()), package)).collect();
    let mut text = String::from(HEAD);
    // Texts are the same in many packages.
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut count = 0;
    for (name, version) in &built_in {
        let package = known.get(&(name.as_str(), version.as_str()));
        let package = package.with_context(|| format!("cargo does not know {name} {version}"))?;
        // Our own licences lie beside.
        if package.manifest_path.starts_with(&workspace.root) {
            continue;
        }
        count += 1;
        let license = package.license.as_deref();
        let license = license.with_context(|| format!("{name} {version} does not say under which licence it is"))?;
        text += &format!("{name} {version}: {license}");
        let files = files(package.manifest_path.parent().context("a manifest without a folder")?)?;
        // A licence asks for the names of those who hold the rights, where no text has them.
        if files.is_empty() && !package.authors.is_empty() {
            text += &format!("; by {}", package.authors.join(", "));
        }
        text += &package.repository.as_ref().map_or(String::from("\n"), |address| format!("; {address}\n"));
        for file in files {
            let content = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            texts.entry(content.trim().replace("\r\n", "\n")).or_default().push(format!("{name} {version}"));
        }
    }
    ensure!(count > 0, "cargo lists no dependency");
    for (content, of) in &texts {
        text += &format!("\n{}\n{}\n{}\n\n{content}\n", "=".repeat(80), of.join(", "), "=".repeat(80));
    }
    let sysroot = stdout_of(Command::new("rustc").args(["--print", "sysroot"]))?;
    let notices = Path::new(sysroot.trim()).join("share/doc/rust/COPYRIGHT-library.html");
    if notices.is_file() {
        copy(&notices, &folder.join("RUST-STANDARD-LIBRARY-LICENSES.html"))?;
    }
    let path = folder.join("THIRD-PARTY-LICENSES.txt");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{count} packages are built in, under {} texts of licences", texts.len());
    Ok(())
}

const HEAD: &str = "\
The library has these packages built in, and Rust's standard library (MIT OR Apache-2.0, by The Rust
Project Contributors; https://www.rust-lang.org; its notices lie beside). The texts that come with them follow. Where a package
has several licences, any of them may be chosen that \"OR\" joins.

";

/// Names and versions of what `cargo tree` lists: `name v1.2.3 (…)`.
fn names(tree: &str) -> BTreeSet<(String, String)> {
    let words = tree.lines().map(|line| line.split_whitespace());
    words
        .filter_map(|mut words| Some((words.next()?.to_owned(), words.next()?.strip_prefix('v')?.to_owned())))
        .collect()
}

/// The files of a folder that hold licences.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().to_uppercase()).unwrap_or_default();
        let is_licence = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "COPYRIGHT"].iter().any(|of| name.starts_with(of));
        if is_licence && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn names_and_versions_are_read() {
        let found = names("a v1.0.0 (/somewhere)\nb v0.2.1\nb v0.2.1 (*)\n\n");
        let expected = [("a", "1.0.0"), ("b", "0.2.1")].map(|(name, version)| (name.to_owned(), version.to_owned()));
        assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
    }
}
